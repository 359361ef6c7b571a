#!/usr/bin/env bash
# Changes the two engines in every way that cargo-mutants knows, and shows which changes no test notices.
# `scripts/mutants.sh [K/N]` takes every change, or one shard of N (from 0). First their unit tests look, then the simulation at what they missed.
# Takes hours: about 3 s a change. `EVERLIT_MUTANTS_AGAIN=1` goes on where a run was ended, and with the changes that it had not noticed.
. "$(dirname "$0")/common.sh"
need cargo python3
PATH=$CACHE/mutants/bin:$PATH
if ! command -v cargo-mutants >/dev/null; then
  say "installing cargo-mutants into $CACHE/mutants"
  cargo install --quiet --locked --root "$CACHE/mutants" cargo-mutants@27.1.0 || die "cargo-mutants could not be installed"
fi
exec python3 scripts/mutants.py "$TARGET/mutants" "${1:-0/1}"
