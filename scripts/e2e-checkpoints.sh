#!/usr/bin/env bash
# Checkpoints that can be proved, on the built programs: killed at random moments to the same bytes, another world size midway, damage of
# every kind, saves on demand, snapshots in shared memory, numbers that are none. `scripts/e2e-checkpoints.sh NAME…` runs single checks of
# scripts/e2e/checkpoints.py; EVERLIT_KILLS (6) says how many kills.
. "$(dirname "$0")/common.sh"
need python3
scripts/build.sh >/dev/null || exit 1
EVERLIT_BIN=$BIN python3 scripts/e2e/checkpoints.py "$@"
