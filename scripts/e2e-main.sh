#!/usr/bin/env bash
# The main job from the outside, on the built programs: what a user types, what is killed, what must be true after it.
# `scripts/e2e-main.sh NAME…` runs single checks of scripts/e2e/main.py.
. "$(dirname "$0")/common.sh"
need python3 curl
scripts/build.sh >/dev/null || exit 1
EVERLIT_BIN=$BIN python3 scripts/e2e/main.py "$@"
