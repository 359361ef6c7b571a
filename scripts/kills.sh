#!/usr/bin/env bash
# Kills the coordinator and the agent under running gangs, a fifth of the times together with a rank, and holds from the outside that
# no job is disturbed, no state is wrong and no line of log is lost. `scripts/kills.sh [COORDINATOR_KILLS [AGENT_KILLS]]`: 20 and as many.
# EVERLIT_KILLS_SEED repeats the moments that a seed chose; EVERLIT_BIN takes programs that are built already.
. "$(dirname "$0")/common.sh"
need python3
[ -n "${EVERLIT_BIN:-}" ] || { scripts/build.sh >/dev/null || exit 1; }
EVERLIT_BIN=${EVERLIT_BIN:-$BIN} python3 scripts/e2e/kills.py "$@"
