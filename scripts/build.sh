#!/usr/bin/env bash
# Builds all four programs in release, side by side in target/release, and fetches what they need: libtorch and the sample text.
# Safe to run again: what is there is skipped. `--without-torch` leaves the built-in training program out; `--cuda` builds it with GPUs
# and NCCL in it, for which a PyTorch for CUDA is fetched (3.6 GB, once per machine) or found by EVERLIT_TORCH_PYTHON.
. "$(dirname "$0")/common.sh"
need cargo c++ python3
FEATURES=everlit-worker/torch
case "${1:-}" in
  "" | --without-torch) ;;
  --cuda)
    FEATURES=everlit-worker/nccl
    EVERLIT_LIBTORCH_CUDA=$(scripts/fetch-libtorch-cuda.sh | tail -n 1) || die "libtorch for CUDA could not be found or fetched"
    export EVERLIT_LIBTORCH_CUDA
    ;;
  *) die "unknown argument $1: there are --without-torch and --cuda" ;;
esac

if [ "${1:-}" = --without-torch ]; then
  say "building everlit, everlit-agent and everlit-shim"
  cargo build --release --locked --workspace || die "the build failed"
  echo "$BIN/everlit"
  exit 0
fi
LIBTORCH=$(scripts/fetch-libtorch.sh | tail -n 1) || die "libtorch could not be fetched"
export LIBTORCH
scripts/fetch-sample-text.sh >&2 || die "the sample text could not be fetched"
say "building all programs (the first time takes some minutes: libtorch's bindings are compiled)"
cargo build --release --locked --workspace --features "$FEATURES" || die "the build failed"
echo "$BIN/everlit"
