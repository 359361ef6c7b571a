#!/usr/bin/env bash
# Builds all four programs in release, side by side in target/release, and fetches what they need: libtorch and the sample text.
# Safe to run again: what is there is skipped. `scripts/build.sh --without-torch` leaves the built-in training program out.
. "$(dirname "$0")/common.sh"
need cargo c++ python3

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
cargo build --release --locked --workspace --features everlit-worker/torch || die "the build failed"
echo "$BIN/everlit"
