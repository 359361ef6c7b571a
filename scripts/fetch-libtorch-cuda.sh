#!/usr/bin/env bash
# Finds or fetches the CUDA build of the libtorch that scripts/fetch-libtorch.sh fetches for the CPU, with CUDA's and NCCL's headers, and
# prints its folder as the last line: what EVERLIT_LIBTORCH_CUDA is set to for a build with GPUs.
#
# It is a PyTorch installation by pip: that of EVERLIT_TORCH_PYTHON (an interpreter that has PyTorch 2.11.0 for CUDA 13 already), else the
# environment of scripts/fetch-python-torch.sh, which downloads about 3.6 GB once per machine. The folder is a few links into it.
# Settings: EVERLIT_CACHE (default: $XDG_CACHE_HOME/everlit or ~/.cache/everlit), EVERLIT_TORCH_PYTHON.
set -euo pipefail

TORCH=2.11.0
CRT=13.0.88
CCCL=13.0.85
CACHE="${EVERLIT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/everlit}"
STAGED="$CACHE/libtorch-$TORCH-cuda"

fail() {
  echo "fetch-libtorch-cuda: $*" >&2
  exit 1
}

PYTHON="${EVERLIT_TORCH_PYTHON:-}"
if [ -z "$PYTHON" ]; then
  PYTHON="$("$(dirname "$0")/fetch-python-torch.sh" | tail -n 1)" || fail "PyTorch could not be fetched"
fi
# Not by importing it: that takes seconds, and needs no more than the files to be there.
SITE="$("$PYTHON" -c 'import importlib.util; print(importlib.util.find_spec("torch").submodule_search_locations[0])' 2>/dev/null)" ||
  fail "$PYTHON has no PyTorch; unset EVERLIT_TORCH_PYTHON to fetch one"
SITE="$(dirname "$SITE")"
FOUND="$(sed -n "s/^__version__ = '\([0-9.]*\).*/\1/p" "$SITE/torch/version.py")"
[ "$FOUND" = "$TORCH" ] || fail "$PYTHON has PyTorch ${FOUND:-of no known version}, not $TORCH"

STAMP="torch-$TORCH from $SITE layout-2"
if [ "$(cat "$STAGED/stamp" 2>/dev/null || true)" = "$STAMP" ]; then
  echo "$STAGED"
  exit 0
fi
mkdir -p "$CACHE"
draft="$(mktemp -d "$CACHE/.libtorch-cuda.XXXXXX")"
trap 'rm -rf "$draft"' EXIT
# The libraries look for each other beside themselves and below `nvidia`: a link to their folder keeps that true.
ln -s "$SITE/torch/lib" "$draft/lib"
ln -s "$SITE/nvidia/nccl/include" "$draft/nccl"
# A CUDA toolkit's headers do as well as those that pip installs, of which two small packages are not among PyTorch's own.
for place in "$SITE/nvidia/cu13/include" "${CUDA_HOME:-/usr/local/cuda}/include"; do
  if [ -e "$place/cuda_runtime_api.h" ] && [ -e "$place/cublas_v2.h" ]; then
    ln -s "$place" "$draft/cuda"
    break
  fi
done
mkdir "$draft/more"
# header FILE REQUIREMENT: what $draft/cuda lacks comes from a package of its own.
header() {
  if [ ! -e "$draft/cuda/cuda_runtime_api.h" ] || [ -e "$draft/cuda/$1" ] || [ -e "$draft/cuda/cccl/$1" ]; then return; fi
  echo "fetch-libtorch-cuda: downloading $2" >&2
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$draft/wheel" "$2" >&2 || fail "pip could not install $2"
  cp -r "$draft/wheel/nvidia/cu13/include/." "$draft/more/"
  rm -rf "$draft/wheel"
}
header crt/host_defines.h "nvidia-cuda-crt==$CRT"
header nv/target "nvidia-cuda-cccl==$CCCL"
for file in lib/libtorch_cuda.so nccl/nccl.h cuda/cuda_runtime_api.h; do
  [ -e "$draft/$file" ] || fail "$file was not found in $SITE (PyTorch for CUDA 13 by pip has it; CUDA_HOME is looked at for CUDA's headers)"
done
echo "$STAMP" >"$draft/stamp"
chmod 755 "$draft"
rm -rf "$STAGED"
mv -T "$draft" "$STAGED"
trap - EXIT
echo "$STAGED"
