#!/usr/bin/env bash
# Runs real jobs with default settings through slow saves, slow first steps, standing disks and a busy machine, and kills nobody: whoever is
# called stuck, silent, idle or lost is a false alarm. `scripts/alarms.sh [MINUTES]` (60). Three times, a third of the minutes apart and on
# top of them, a rank is stopped for good after EVERLIT_ALARMS_CLEAN_STEPS (1000) steps of about 100 ms: the detector lives, and this is how
# fast it is. It prints the seed first (EVERLIT_ALARMS_SEED repeats it), a line per minute, a table of what was exercised, and as its last
# line how many false alarms there were. EVERLIT_BIN takes programs that are built already.
# Needs root, for the data folder lies on a small file system of its own; without, it says SKIPPED and ends with 77.
. "$(dirname "$0")/common.sh"
need python3
[ -n "${EVERLIT_BIN:-}" ] || { scripts/build.sh >/dev/null || exit 1; }
EVERLIT_BIN=${EVERLIT_BIN:-$BIN} python3 scripts/e2e/alarms.py "$@"
