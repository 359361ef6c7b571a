#!/usr/bin/env bash
# Everything that goes wrong, from the outside: each gets a clear error or a clear state, and nothing is lost.
# `scripts/e2e-bad-input.sh NAME…` runs single checks of scripts/e2e/bad_input.py.
. "$(dirname "$0")/common.sh"
need python3 curl
scripts/build.sh >/dev/null || exit 1
EVERLIT_BIN=$BIN python3 scripts/e2e/bad_input.py "$@"
