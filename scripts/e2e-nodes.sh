#!/usr/bin/env bash
# Several machines, from the outside: servers that join over TLS with every refusal and its message; folders that go with jobs; floods of connections that say nothing; what is no frame, and clocks that are days off;
# then gangs across hosts, which are network namespaces: hosts that are cut off, links that are half open. That part needs root and `ip` (iproute2).
# `scripts/e2e-nodes.sh NAME…` runs single checks of scripts/e2e/joining.py, packages.py, flood.py, frames.py and nodes.py.
. "$(dirname "$0")/common.sh"
need python3
skipped=
skip() {
  echo "SKIPPED: $1"
  skipped=yes
}
command -v openssl >/dev/null || skip "certificates that are not ours: openssl is not here"
scripts/build.sh >/dev/null || exit 1
export EVERLIT_BIN=$BIN
python3 scripts/e2e/joining.py "$@" || exit 1
python3 scripts/e2e/packages.py "$@" || exit 1
python3 scripts/e2e/flood.py "$@" || exit 1
python3 scripts/e2e/frames.py "$@" || exit 1
probe=everlit-probe-$$
if ip netns add "$probe" 2>/dev/null && ip -n "$probe" link add evlprobe type bridge 2>/dev/null; then
  ip netns del "$probe"
  python3 scripts/e2e/nodes.py "$@" || exit 1
else
  ip netns del "$probe" 2>/dev/null
  skip "hosts in network namespaces: they take root and \`ip\` (iproute2)"
fi
[ -z "$skipped" ] || exit 77
