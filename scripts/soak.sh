#!/usr/bin/env bash
# Runs real jobs for some minutes while ranks, shims, agents, coordinators, memory, disk and checkpoints fail, and holds from the outside
# what must be true: `scripts/soak.sh MINUTES`. It prints the seed first (EVERLIT_SOAK_SEED repeats it), a table of the faults that were
# fired, and as its last line how many losses there were. EVERLIT_SOAK_WITHOUT leaves faults of that table out, by name, with commas.
# EVERLIT_SOAK_STEPS (3000) is the length of the trainings whose last bytes are compared; EVERLIT_BIN takes programs that are built already.
# Slow and full disks need root: the data folder lies on a small file system of its own.
. "$(dirname "$0")/common.sh"
need python3
[ -n "${EVERLIT_BIN:-}" ] || { scripts/build.sh >/dev/null || exit 1; }
EVERLIT_BIN=${EVERLIT_BIN:-$BIN} python3 scripts/e2e/soak.py "$@"
