#!/usr/bin/env bash
# Doors with locks, from the outside: TLS, tokens, roles, the audit log, and every refusal with its message.
# `scripts/e2e-doors.sh NAME…` runs single checks of scripts/e2e/doors.py.
. "$(dirname "$0")/common.sh"
need python3 curl
scripts/build.sh >/dev/null || exit 1
EVERLIT_BIN=$BIN python3 scripts/e2e/doors.py "$@"
