#!/usr/bin/env bash
# Coordinator and agents as services of a real systemd, and servers made nodes over a real ssh, in machines that are namespaces of this one.
# Needs root, systemd, dbus, `ip`, cgroup2; for the second part sshd and sudo. `scripts/e2e-service.sh NAME…` runs single checks.
. "$(dirname "$0")/common.sh"
need python3
skip() {
  echo "SKIPPED: $1"
  exit 77
}
why=$(cd scripts/e2e && EVERLIT_BIN=$BIN python3 -c 'import machine; print(machine.why_not() or "")')
[ -z "$why" ] || skip "$why"
scripts/build.sh >/dev/null || exit 1
export EVERLIT_BIN=$BIN
python3 scripts/e2e/service.py "$@" || exit 1
for tool in /usr/sbin/sshd ssh ssh-keygen sudo tar; do
  command -v "$tool" >/dev/null || skip "deploying over ssh: $tool is not here (Debian packages openssh-server, openssh-client, sudo)"
done
python3 scripts/e2e/deploy.py "$@" || exit 1
