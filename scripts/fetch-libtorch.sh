#!/usr/bin/env bash
# Fetches the CPU libtorch that the built-in training program links against, and prints its folder as the last line.
#
# Downloads go through pip (about 544 MB, once per machine); only the libraries and headers that are needed are kept,
# staged as torch-sys expects them. A finished folder has a stamp and is taken as it is; a run that is cut short
# leaves nothing under the final name. Settings: EVERLIT_CACHE (default: $XDG_CACHE_HOME/everlit or ~/.cache/everlit),
# PYTHON (default: python3), whose pip is used.
set -euo pipefail

TORCH=2.11.0
CUDART=13.0.96
CUPTI=13.0.85
STAMP="torch-$TORCH cudart-$CUDART cupti-$CUPTI layout-1"

CACHE="${EVERLIT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/everlit}"
PYTHON="${PYTHON:-python3}"
DOWNLOADS="$CACHE/downloads"
STAGED="$CACHE/libtorch-$TORCH-cpu"

fail() {
  echo "fetch-libtorch: $*" >&2
  exit 1
}

if [ "$(cat "$STAGED/stamp" 2>/dev/null || true)" = "$STAMP" ]; then
  echo "$STAGED"
  exit 0
fi

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || fail "only Linux on x86_64 is supported, this is $(uname -s) on $(uname -m)"
command -v "$PYTHON" >/dev/null || fail "$PYTHON is missing: install Python 3 with pip, or set PYTHON"
"$PYTHON" -m pip --version >/dev/null 2>&1 || fail "$PYTHON has no pip: install it (on Debian: apt install python3-pip)"

mkdir -p "$DOWNLOADS"
# Two runs at once would stage the same folder twice: the second one waits.
exec 9>"$CACHE/libtorch.lock"
if command -v flock >/dev/null; then flock 9; fi
if [ "$(cat "$STAGED/stamp" 2>/dev/null || true)" = "$STAMP" ]; then
  echo "$STAGED"
  exit 0
fi

# One wheel that matches the pattern $1, downloaded as requirement $2 unless it lies there already.
wheel() {
  local found
  found="$(find "$DOWNLOADS" -maxdepth 1 -name "$1" | sort | head -n 1)"
  if [ -z "$found" ]; then
    echo "fetch-libtorch: downloading $2" >&2
    local pip=("$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: -d "$DOWNLOADS")
    "${pip[@]}" "$2" >&2 ||
      "${pip[@]}" --python-version 3.11 --platform manylinux_2_28_x86_64 --platform manylinux_2_25_x86_64 --platform manylinux2014_x86_64 "$2" >&2 ||
      fail "pip could not download $2"
    found="$(find "$DOWNLOADS" -maxdepth 1 -name "$1" | sort | head -n 1)"
  fi
  [ -n "$found" ] || fail "pip downloaded no file like $1"
  echo "$found"
}

torch="$(wheel "torch-$TORCH-*x86_64.whl" "torch==$TORCH")"
cudart="$(wheel "nvidia_cuda_runtime-$CUDART-*x86_64.whl" "nvidia-cuda-runtime==$CUDART")"
cupti="$(wheel "nvidia_cuda_cupti-$CUPTI-*x86_64.whl" "nvidia-cuda-cupti==$CUPTI")"

draft="$(mktemp -d "$CACHE/.libtorch.XXXXXX")"
trap 'rm -rf "$draft"' EXIT

"$PYTHON" - "$draft" "$torch" "$cudart" "$cupti" <<'PY' || fail "could not unpack the downloads; remove $DOWNLOADS and run again"
import os, shutil, sys, zipfile

draft, torch, cudart, cupti = sys.argv[1:]

def take(archive, wanted):
    """Unpacks the members for which wanted(name) answers a path."""
    taken = 0
    with zipfile.ZipFile(archive) as wheel:
        for entry in wheel.infolist():
            place = wanted(entry.filename)
            if place is None or entry.is_dir():
                continue
            path = os.path.join(draft, place)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with wheel.open(entry) as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            taken += 1
    return taken

LIBRARIES = {"torch/lib/libc10.so", "torch/lib/libtorch_cpu.so", "torch/lib/libgomp.so.1"}

def from_torch(name):
    if name in LIBRARIES:
        return "lib/" + os.path.basename(name)
    if name.startswith("torch/include/"):
        return name[len("torch/"):]

def library(which):
    return lambda name: "lib/" + which if os.path.basename(name) == which else None

take(torch, from_torch)
take(cudart, library("libcudart.so.13"))
take(cupti, library("libcupti.so.13"))
needed = [os.path.join(draft, "lib", os.path.basename(l)) for l in LIBRARIES]
needed += [os.path.join(draft, p) for p in ("lib/libcudart.so.13", "lib/libcupti.so.13", "include/torch/csrc/distributed/c10d/reducer.hpp")]
missing = [path for path in needed if not os.path.exists(path)]
if missing:
    sys.exit("not in the downloads: " + ", ".join(os.path.relpath(path, draft) for path in missing))
PY

# The wheel's libtorch.so is an empty stub that needs CUDA; the CPU library stands in for it.
ln -s libtorch_cpu.so "$draft/lib/libtorch.so"
echo "$TORCH" >"$draft/build-version"
echo "$STAMP" >"$draft/stamp"
chmod 755 "$draft"

rm -rf "$STAGED"
mv -T "$draft" "$STAGED"
trap - EXIT
echo "$STAGED"
