"""`everlit node deploy` over a real ssh to machines with a systemd of their own, from the outside (scripts/e2e-service.sh)."""

import contextlib
import json
import pathlib
import re
import shutil
import subprocess
import tempfile
import threading

from joining import COMMAND, Cluster
from lib import run, until
from machine import NET, Machine, network

SSHD = """
Port 22
HostKey /etc/ssh/host_key
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PidFile none
"""
SECRET = re.compile(rb"K1[0-9a-f]{64}::[0-9a-f]{12}:[0-9a-f]{64}")


class Server(Machine):
    """A machine without anything of ours, and with an ssh server: root, bob who may sudo, alice who may not."""

    def __init__(self, name, key):
        super().__init__(name, bare=True)
        self.key = key

    def __enter__(self):
        super().__enter__()
        try:
            self.write("/etc/ssh/sshd_config", SSHD)
            self.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/etc/ssh/host_key")
            for user in ["root", "bob", "alice"]:
                if user != "root":
                    # Without a password, and not locked either: sshd lets no locked one in.
                    self.run("useradd", "-m", "-s", "/bin/sh", "-p", "*", user)
                home = "/root" if user == "root" else f"/home/{user}"
                self.write(f"{home}/.ssh/authorized_keys", self.key)
                self.run("chown", "-R", f"{user}:", f"{home}/.ssh")
                self.run("chmod", "-R", "go=", f"{home}/.ssh")
            # What a login shell may say before anything else.
            self.write("/home/bob/.profile", "echo welcome\n")
            self.run("chmod", "755", "/etc")
            self.write("/etc/sudoers", "root ALL=(ALL:ALL) ALL\nbob ALL=(ALL) NOPASSWD: ALL\n")
            self.run("chmod", "440", "/etc/sudoers")
            self.run("mkdir", "-p", "/run/sshd")
            self.run("systemd-run", "--quiet", "--unit=ssh-server", "/usr/sbin/sshd", "-D", "-e", "-f", "/etc/ssh/sshd_config")
        except BaseException:
            self.end()
            raise
        return self

    def write(self, path, text):
        self.run("mkdir", "-p", pathlib.Path(path).parent)
        self.run("tee", path, input=text)


class Deploying(Cluster):
    """A coordinator on the bridge, and its command line with an ssh key."""

    def __init__(self, folder):
        super().__init__()
        self.url = f"https://{NET}.1:{self.port}"
        self.folder = pathlib.Path(folder)
        self.options = [
            "--identity", str(self.folder / "key"), "--ssh-option", f"UserKnownHostsFile={self.folder}/known", "--ssh-option", "IdentitiesOnly=yes",
            "--ssh-option", "StrictHostKeyChecking=accept-new",
        ]

    def deploy(self, *words, options=None, **env):
        env = {"EVERLIT_TOKEN_FILE": str(self.data / "admin.token"), **env}
        done = self.cli("node", "deploy", *(self.options if options is None else options), *map(str, words), **env)
        print("     " + "\n     ".join((done.stdout + done.stderr).strip().splitlines()))
        return done

    def refused(self, *words, part, code=1, **more):
        before = len(self.get("/nodes")["data"])
        done = self.deploy(*words, **more)
        assert done.returncode == code and part in done.stdout + done.stderr, (part, done)
        assert len((done.stdout + done.stderr).strip().splitlines()) == 1, "in one line"
        good = [t for t in self.get("/join-tokens?limit=500")["data"] if not t["revoked_at"] and t["used"] < t["uses"]]
        assert len(self.get("/nodes")["data"]) == before and not good, "no node, and no token is left"


@contextlib.contextmanager
def house(*names):
    with tempfile.TemporaryDirectory(prefix="everlit-e2e-ssh-") as folder, network(), contextlib.ExitStack() as stack:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{folder}/key"], check=True)
        key = pathlib.Path(folder, "key.pub").read_text()
        everlit = stack.enter_context(Deploying(folder))
        yield everlit, *[stack.enter_context(Server(name, key)) for name in names]


@contextlib.contextmanager
def no_secret_in_arguments():
    """Looks at every process of this machine (and so of those on it) for as long as it lasts."""
    over, found, looks = threading.Event(), [], 0

    def look():
        nonlocal looks
        while not over.is_set():
            looks += 1
            for line in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    if SECRET.search(line.read_bytes()):
                        found.append(line.read_bytes())
            over.wait(0.01)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(10)
    assert looks > 5 and not found, found


def agent_pid(server, data):
    return int(server.read(f"{data}/agent.lock"))


def leaves_nothing(server, user="root"):
    home = "/root" if user == "root" else f"/home/{user}"
    assert ".everlit-deploy" not in server.run("ls", "-A", home).stdout
    found = server.run("grep", "-rlE", "K1[0-9a-f]{64}::", "/etc", "/home", "/root", "/var", "/tmp", "/run", check=False).stdout
    assert not found, found


def servers_become_nodes_and_are_upgraded_while_their_ranks_run():
    with house("one", "two") as (everlit, one, two):
        hosts = [f"root@{one.address}", f"bob@{two.address}"]
        with no_secret_in_arguments():
            done = everlit.deploy(*hosts, "--", "--label", "zone=a")
        assert done.returncode == 0 and sorted(re.findall(r": node (\w+) joined \(", done.stdout)) == ["one", "two"], done
        assert len(done.stdout.splitlines()) == 2 and not done.stderr, done
        assert all(everlit.node(name)["labels"] == {"zone": "a"} for name in ["one", "two"])
        leaves_nothing(one)
        leaves_nothing(two, "bob")
        job = everlit.submit(command=COMMAND, world_size=2, resources={"cpus": everlit.node("one")["capacity"]["cpus"]})
        before = {(r["node"], r["pid"]) for r in everlit.running(job)["ranks"]}
        assert {node for node, _ in before} == {"one", "two"}, before
        agents = [agent_pid(server, "/var/lib/everlit-agent") for server in [one, two]]
        done = everlit.deploy(*hosts, "-o", "json")
        told = json.loads(done.stdout)
        assert done.returncode == 0 and {(t["node"], t["state"]) for t in told} == {("one", "upgraded"), ("two", "upgraded")}, done
        assert all(a != agent_pid(s, "/var/lib/everlit-agent") for a, s in zip(agents, [one, two])), "new agents"
        now = everlit.running(job)
        assert {(r["node"], r["pid"]) for r in now["ranks"]} == before and now["restarts"] == 0 and now["attempt"] == 1, now
        assert all(everlit.node(name)["labels"] == {"zone": "a"} for name in ["one", "two"]), "options are kept"
        assert one.unit("everlit-agent.service", "ActiveState", "UnitFileState") == ["active", "enabled"]
        # One that fails harms no other.
        done = everlit.deploy(hosts[0], f"nobody@{two.address}", "--parallel", "1")
        assert done.returncode == 1 and "node one upgraded" in done.stdout and "Permission denied" in done.stdout and "1 of 2 servers failed" in done.stderr, done
        # A server that is shut down gives its jobs back first.
        two.run("systemctl", "--no-block", "poweroff")
        until("the job waits", lambda: everlit.state(job) == "queued", 30)
        reasons = [e["reason"] for e in everlit.events(job)]
        assert any("two is draining" in (reason or "") for reason in reasons) and everlit.summary(job)["restarts"] == 0, reasons[-5:]
        everlit.post(f"/jobs/{job}/stop?force=true")


def without_root_an_agent_runs_in_the_background():
    with house("one") as (everlit, one):
        alice = f"alice@{one.address}"
        everlit.refused(alice, part="a service takes root, and `sudo -n` is refused there")
        with no_secret_in_arguments():
            done = everlit.deploy(alice, "--no-service", "--node", "of-alice")
        assert done.returncode == 0 and "node of-alice joined" in done.stdout, done
        leaves_nothing(one, "alice")
        data = "/home/alice/.local/share/everlit-agent"
        assert one.run("stat", "-c", "%a %U", data, f"{data}/node.json").stdout.split() == ["700", "alice", "600", "alice"]
        job = everlit.submit(command=COMMAND, world_size=2)
        pids = [r["pid"] for r in everlit.running(job)["ranks"]]
        before = agent_pid(one, data)
        done = everlit.deploy(alice, "--no-service")
        assert done.returncode == 0 and "node of-alice upgraded" in done.stdout and agent_pid(one, data) != before, done
        now = everlit.running(job)
        assert [r["pid"] for r in now["ranks"]] == pids and now["restarts"] == 0, now
        assert not one.run("find", "/etc/systemd", "/usr/local", "-name", "*everlit*").stdout
        everlit.post(f"/jobs/{job}/stop?force=true")
        everlit.final(job)


def what_goes_wrong_is_told_with_its_remedy():
    with house("one") as (everlit, one):
        root, alice = f"root@{one.address}", f"alice@{one.address}"
        nowhere = f"{NET}.250"
        quick = [*everlit.options, "--ssh-option", "ConnectTimeout=2"]
        everlit.refused(f"root@{nowhere}", part="is it up, and is this its name and --port?", options=quick)
        everlit.refused(root, "--port", 1, part="Connection refused")
        everlit.refused(f"carol@{one.address}", part="no password is asked for: bring a key there (ssh-copy-id)")
        strict = [*everlit.options[:2], "--ssh-option", "UserKnownHostsFile=/dev/null", "--ssh-option", "StrictHostKeyChecking=yes"]
        everlit.refused(root, part="connect to it by hand once, or --ssh-option StrictHostKeyChecking=accept-new", options=strict)
        everlit.refused(root, "--from", "/nowhere", part="scripts/build.sh")
        everlit.refused(root, "--join-url", "https://127.0.0.1:8000", part="is another machine to each server: say --join-url", code=2)
        everlit.refused(root, "--join-url", f"http://{NET}.1:8000", part="is not TLS", code=2)
        everlit.refused(root, alice, "--node", "x", part="--node names one server", code=2)
        # No room.
        one.run("mount", "-t", "tmpfs", "-o", "size=1m,mode=755", "small", "/usr/local")
        everlit.refused(root, part="/usr/local has 1 MiB free, and this takes")
        one.run("umount", "/usr/local")
        # No room on the way, where nobody saw it before.
        one.run("mount", "-t", "tmpfs", "-o", "size=20m,mode=755,uid=" + one.run("id", "-u", "alice").stdout.strip(), "small", "/home/alice")
        one.write("/home/alice/.ssh/authorized_keys", one.key)
        one.write("/usr/local/bin/df", "#!/bin/sh\nprintf 'x\\nx 0 0 99999999 0 x\\n'\n")
        one.run("chmod", "755", "/usr/local/bin/df")
        everlit.refused(alice, "--no-service", part="the programs can not be written to /home/alice: tar: ")
        assert ".everlit-deploy" not in one.run("ls", "-A", "/home/alice").stdout
        one.run("umount", "/home/alice")
        one.run("rm", "/usr/local/bin/df")
        # Another kind of machine, an old one, and one that can not be looked at.
        one.write("/usr/local/bin/uname", "#!/bin/sh\necho riscv64\n")
        one.run("chmod", "755", "/usr/local/bin/uname")
        everlit.refused(root, part="it is riscv64, and the programs in")
        one.run("rm", "/usr/local/bin/uname")
        one.write("/usr/local/bin/getconf", "#!/bin/sh\necho glibc 2.17\n")
        one.run("chmod", "755", "/usr/local/bin/getconf")
        everlit.refused(root, part="it has glibc 2.17, and the programs in")
        one.run("rm", "/usr/local/bin/getconf")
        # Joining is refused, and its reason is told.
        everlit.refused(root, "--join-url", f"https://{nowhere}:8000", part=f"did not join https://{nowhere}:8000: ")
        everlit.join("taken")
        everlit.refused(root, "--node", "taken", part="a node named taken has joined already")
        everlit.refused(root, "--node", "a b", part="a node's name has letters", code=2)
        viewer = everlit.made("eve", "viewer")
        everlit.refused(root, part="admin", EVERLIT_TOKEN=viewer)
        assert not one.run("find", "/root", "-name", ".everlit-deploy*").stdout
        # After all that it works.
        done = everlit.deploy(root)
        assert done.returncode == 0 and "node one joined" in done.stdout, done
        until("ready", lambda: everlit.node("one")["state"] == "ready", 20)
        everlit.refused(root, "--node", "other", part="it is node one already")
        # Another coordinator's admin does not get it, and does it no harm.
        own = one.read("/var/lib/everlit-agent/node.json")
        with Deploying(everlit.folder) as other:
            other.refused(root, part="is the folder of node one of another coordinator")
        assert one.read("/var/lib/everlit-agent/node.json") == own and everlit.node("one")["state"] == "ready"


CHECKS = [
    servers_become_nodes_and_are_upgraded_while_their_ranks_run,
    without_root_an_agent_runs_in_the_background,
    what_goes_wrong_is_told_with_its_remedy,
]

if not shutil.which("sudo"):
    CHECKS.remove(servers_become_nodes_and_are_upgraded_while_their_ranks_run)

if __name__ == "__main__":
    run(CHECKS, "deploy")
