#!/usr/bin/env bash
# Holds `everlit simulate` against real jobs: `scripts/goodput.sh [MINUTES]` (10) runs gangs at three failure rates, kills their ranks at the
# very moments of the simulator's faults, and compares goodput by the jobs' own ledgers with what the simulator says from costs that were
# measured on another job. Fails where they are more than 2 points apart. A machine that stands still for a second spoils a run, and says so.
# EVERLIT_GOODPUT_SEED repeats the moments; EVERLIT_GOODPUT_IN_PLACE=1 adds the built-in trainer's recovery in place, for as long again;
# EVERLIT_BIN takes programs that are built already.
. "$(dirname "$0")/common.sh"
need python3
[ -n "${EVERLIT_BIN:-}" ] || { scripts/build.sh >/dev/null || exit 1; }
EVERLIT_BIN=${EVERLIT_BIN:-$BIN} python3 scripts/e2e/goodput.py "$@"
