#!/usr/bin/env bash
# Several machines, from the outside: servers that join over TLS, and every refusal with its message.
# `scripts/e2e-nodes.sh NAME…` runs single checks of scripts/e2e/joining.py.
. "$(dirname "$0")/common.sh"
need python3 openssl
scripts/build.sh >/dev/null || exit 1
EVERLIT_BIN=$BIN python3 scripts/e2e/joining.py "$@"
