#!/usr/bin/env bash
# Builds everlit with GPUs and NCCL and proves it on a machine with a GPU: what NCCL and the reducer do in one process, two ranks on one
# GPU, NCCL between two GPUs, a rank killed under the coordinator, saves behind the step, NVML's figures, steps beside PyTorch's DDP. What
# was seen goes into docs/gpu.md. `scripts/gpu-check.sh NAME…` runs single checks of scripts/e2e/gpu.py and leaves the page alone.
# SKIPPED (77) without a GPU. Settings: EVERLIT_TORCH_PYTHON (an interpreter that has PyTorch 2.11.0 for CUDA 13; else it is fetched),
# EVERLIT_BIN (a folder with programs built by `scripts/build.sh --cuda` elsewhere, for a machine that can not build),
# EVERLIT_GPU_DEVICE=cpu (tries the checks themselves on a processor: says nothing about GPUs and writes nothing).
. "$(dirname "$0")/common.sh"
need python3
if [ "${EVERLIT_GPU_DEVICE:-cuda}" = cuda ] && ! nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
  echo "SKIPPED: no NVIDIA GPU here (nvidia-smi lists none)"
  exit 77
fi
TORCH_PYTHON=${EVERLIT_TORCH_PYTHON:-}
[ -n "$TORCH_PYTHON" ] || TORCH_PYTHON=$(scripts/fetch-python-torch.sh | tail -n 1) || die "PyTorch could not be fetched"
if [ -n "${EVERLIT_BIN:-}" ]; then
  BIN=$EVERLIT_BIN
  # Programs from elsewhere look for libtorch where they were built.
  LIBRARIES=$("$TORCH_PYTHON" -c 'import importlib.util; print(importlib.util.find_spec("torch").submodule_search_locations[0])')/lib
  export LD_LIBRARY_PATH=$LIBRARIES${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
else
  need cargo c++
  EVERLIT_TORCH_PYTHON=$TORCH_PYTHON scripts/build.sh --cuda >/dev/null || exit 1
fi
EVERLIT_BIN=$BIN EVERLIT_PYTHON=$TORCH_PYTHON PYTHONPATH=scripts/e2e python3 scripts/e2e/gpu.py "$@"
