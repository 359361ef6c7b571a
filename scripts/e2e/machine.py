"""Machines of their own: systemd as process 1 in namespaces, on a bridge of this one. Needs root, systemd, cgroup2 and `ip`."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from hosts import ip
from lib import BIN, until

HERE = pathlib.Path(__file__).resolve().parent
NET = "10.202.{}".format(os.getpid() % 250)
BRIDGE = f"evm{os.getpid() % 100000}"
SYSTEMD = "/lib/systemd/systemd"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def why_not():
    """Why there can be none here; None where there can be."""
    if os.getuid() != 0:
        return "machines of their own take root"
    for tool, package in [("unshare", "util-linux"), ("nsenter", "util-linux"), ("ip", "iproute2"), ("dbus-daemon", "dbus")]:
        if not shutil.which(tool):
            return f"{tool} is not here (Debian package {package})"
    if not os.path.exists(SYSTEMD):
        return "systemd is not here (Debian package systemd)"
    if not cgroups():
        return "no cgroup2 is mounted here"
    tried = subprocess.run(["unshare", "-m", "-p", "-C", "-n", "-u", "-i", "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces can be made here: {tried.stderr.strip()}" if tried.returncode else None


def cgroups():
    mounts = [line.split() for line in open("/proc/mounts")]
    return next((pathlib.Path(words[1]) for words in mounts if words[2] == "cgroup2"), None)


@contextlib.contextmanager
def network():
    """The bridge that machines are on; this one is .1 of it."""
    ip("link", "add", BRIDGE, "type", "bridge")
    try:
        ip("addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        yield
    finally:
        ip("link", "del", BRIDGE, check=False)


class Machine:
    """One, with this project's programs and scripts in /opt unless it is `bare`."""

    made = 0

    def __init__(self, name, bare=False):
        Machine.made += 1
        self.name, self.bare, self.number = name, bare, 10 + Machine.made
        self.address = f"{NET}.{self.number}"
        self.root = pathlib.Path(tempfile.mkdtemp(prefix=f"everlit-e2e-{name}-"))
        self.cgroup = cgroups() / f"everlit-e2e-{os.getpid()}-{self.number}"
        self.process = None

    def __enter__(self):
        self.cgroup.mkdir()
        bound = [] if self.bare else [BIN, "everlit", HERE.parent, "scripts"]
        command = ["unshare", "-m", "-p", "-C", "-n", "-u", "-i", "--fork", "--kill-child", HERE / "machine.sh", self.root, self.name, *bound]
        # In its cgroup before it has its own view of them.
        shell = ["sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', self.cgroup, *command]
        self.log = open(self.root.with_suffix(".log"), "wb")
        self.process = subprocess.Popen([str(word) for word in shell], stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, start_new_session=True)
        try:
            self.init = until("its process 1", self.first, 20)
            port = f"{BRIDGE}{self.number}"
            ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", self.init)
            ip("link", "set", port, "master", BRIDGE, "up")
            for words in [("addr", "add", f"{self.address}/24", "dev", "eth0"), ("link", "set", "eth0", "up"), ("link", "set", "lo", "up")]:
                done = subprocess.run(["nsenter", "-t", str(self.init), "-n", "ip", *words], capture_output=True, text=True)
                assert done.returncode == 0, (words, done)
            until("systemd is up", lambda: self.run("systemctl", "is-system-running", check=False).stdout.strip() in ("running", "degraded"), 60, 0.2)
        except BaseException:
            print(f"---- {self.name} does not start (is fs.inotify.max_user_instances used up?)", self.root.with_suffix(".log").read_text()[-2000:], sep="\n", file=sys.stderr)
            self.end()
            raise
        return self

    def first(self):
        if self.process.poll() is not None:
            raise AssertionError("the machine ended: " + self.root.with_suffix(".log").read_text()[-2000:])
        for child in pathlib.Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{child}/exe").endswith("systemd/systemd"):
                    return int(child)
        return None

    def run(self, *words, user=None, input=None, check=True, seconds=120, **env):
        """Runs a command there, and answers it with its output."""
        own = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", **env}
        shell = ["env", "-i", *(f"{name}={value}" for name, value in own.items())]
        shell += ["runuser", "-u", user, "--"] if user else []
        command = ["nsenter", "-t", str(self.init), "-m", "-p", "-C", "-n", "-u", "-i", "-r", "-w", *shell, *map(str, words)]
        done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=seconds, stdin=None if input is not None else subprocess.DEVNULL)
        if check and done.returncode:
            raise AssertionError(f"{words} on {self.name}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done

    def unit(self, unit, *names):
        """Properties of a unit."""
        told = self.run("systemctl", "show", unit, "-p", ",".join(names)).stdout
        found = dict(line.split("=", 1) for line in told.splitlines() if "=" in line)
        return found[names[0]] if len(names) == 1 else [found[name] for name in names]

    def main_pid(self, unit):
        return int(self.unit(unit, "MainPID"))

    def read(self, path):
        return self.run("cat", path).stdout

    def __exit__(self, kind, *_):
        if kind:
            with contextlib.suppress(Exception):
                print(f"---- journal of {self.name}", self.run("journalctl", "--no-pager", "-n", "60", check=False).stdout[-8000:], sep="\n", file=sys.stderr)
        self.end()

    def end(self):
        # Process 1 goes with it, and everything with that.
        self.process.kill()
        self.process.wait()
        self.log.close()
        until("its processes are gone", lambda: not (self.cgroup / "cgroup.procs").exists() or self.emptied(), 20)
        self.root.with_suffix(".log").unlink()
        self.root.rmdir()

    def emptied(self):
        for folder in sorted(self.cgroup.rglob("*/"), key=lambda folder: -len(folder.parts)):
            with contextlib.suppress(OSError):
                if folder.is_dir():
                    folder.rmdir()
        with contextlib.suppress(OSError):
            self.cgroup.rmdir()
        return not self.cgroup.exists()
