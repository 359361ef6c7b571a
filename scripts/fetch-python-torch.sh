#!/usr/bin/env bash
# Makes a Python environment with PyTorch, for the end-to-end check of the Python package and for the benches that run
# PyTorch beside us, and prints its interpreter as the last line.
#
# Importing PyTorch needs the CUDA wheels too: about 3.6 GB are downloaded, once per machine, and 6 GB kept. A finished
# environment has a stamp and is taken as it is. Settings: EVERLIT_CACHE (default: $XDG_CACHE_HOME/everlit or
# ~/.cache/everlit), PYTHON (default: python3), which makes it.
set -euo pipefail

TORCH=2.11.0
STAMP="torch-$TORCH layout-1"

CACHE="${EVERLIT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/everlit}"
PYTHON="${PYTHON:-python3}"
PLACE="$CACHE/python-torch-$TORCH"

fail() {
  echo "fetch-python-torch: $*" >&2
  exit 1
}
finished() {
  if [ "$(cat "$PLACE/stamp" 2>/dev/null || true)" = "$STAMP" ]; then
    echo "$PLACE/bin/python"
    exit 0
  fi
}

finished
command -v "$PYTHON" >/dev/null || fail "$PYTHON is missing: install Python 3 with pip, or set PYTHON"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$PYTHON is too old for PyTorch $TORCH: 3.10 or newer is needed"
mkdir -p "$CACHE"
# Two runs at once would fill the same folder: the second one waits.
exec 9>"$CACHE/python-torch.lock"
if command -v flock >/dev/null; then flock 9; fi
finished

# An environment knows its own path, so it can not be made elsewhere and moved; the stamp, written last, is the commit.
rm -rf "$PLACE"
"$PYTHON" -m venv "$PLACE" >&2 || fail "$PYTHON can not make an environment (on Debian: apt install python3-venv)"
echo "fetch-python-torch: installing torch==$TORCH (about 3.6 GB, once per machine)" >&2
"$PLACE/bin/python" -m pip install --quiet --disable-pip-version-check "torch==$TORCH" numpy >&2 || fail "pip could not install torch==$TORCH"
"$PLACE/bin/python" -c 'import numpy, torch, torch.distributed' >&2 || fail "torch==$TORCH was installed and can not be imported"
echo "$STAMP" >"$PLACE/stamp"
echo "$PLACE/bin/python"
