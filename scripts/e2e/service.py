"""Coordinator and agent as services of a real systemd, from the outside (scripts/e2e-service.sh)."""

import contextlib
import ssl
import time

from lib import Everlit, run, until
from machine import Machine, network

COMMAND = ["sh", "-c", "trap 'exit 0' TERM; echo hello; while :; do sleep 0.1; done"]
INSTALL = "/opt/scripts/install-service.sh"
COORDINATOR, AGENT = "everlit-coordinator.service", "everlit-agent.service"


class Served(Everlit):
    """The coordinator that a unit of a machine runs."""

    def __init__(self, machine):
        self.machine, self.data, self.process = machine, machine.root, None
        self.url = f"https://{machine.address}:8000"
        self.token = machine.read("/var/lib/everlit/admin.token").strip()
        self.tls = ssl.create_default_context(cadata=machine.read("/var/lib/everlit/ca/ca.pem"))

    def node(self, name):
        return next((n for n in self.get("/nodes")["data"] if n["node"] == name), {"state": None})

    def everlit(self, *words, **more):
        env = {"EVERLIT_URL": self.url, "EVERLIT_TOKEN_FILE": "/var/lib/everlit/admin.token", "EVERLIT_CA_FILE": "/var/lib/everlit/ca/ca.pem"}
        return self.machine.run("everlit", *words, **env, **more)

    def end(self):
        pass


def refused(machine, code, *words_and_part, input=None):
    *words, part = words_and_part
    done = machine.run(INSTALL, *words, check=False, input=input)
    assert done.returncode == code and part in done.stderr, (words, done)
    last = done.stderr.strip().splitlines()[-1]
    assert part in last and (code == 2 or last.startswith("FAILED: ")), last
    print(f"     {' '.join(words)[:60]}: {last[:150]}")


@contextlib.contextmanager
def served():
    """A machine whose coordinator and agent are services."""
    with network(), Machine("one") as machine:
        machine.run(INSTALL, "coordinator", "--from", "/opt/everlit", "--", "--listen", "0.0.0.0:8000", "--own-ca", "--no-local-agent")
        everlit = Served(machine)
        token = everlit.post("/join-tokens", {})["token"]
        machine.run(INSTALL, "agent", "--from", "/opt/everlit", "--join", everlit.url, "--token-file", "-", "--", "--label", "zone=a", input=token)
        everlit.join_secret = token[-64:]
        yield machine, everlit


def same_ranks(everlit, job, before, machine):
    now = everlit.running(job)
    assert [r["pid"] for r in now["ranks"]] == before and now["restarts"] == 0 and now["attempt"] == 1, now
    for pid in before:
        machine.run("kill", "-0", pid)


def installing_says_each_step_and_every_fault_in_a_line():
    with network(), Machine("one") as machine:
        files = lambda: machine.run("find", "/usr/local", "/etc/systemd/system", "/var/lib", "-newer", "/etc/machine-id").stdout
        before = files()
        done = machine.run(INSTALL, "coordinator", "--from", "/opt/everlit", "--dry-run", "--", "--listen", "0.0.0.0:8000")
        assert "would: useradd" in done.stderr and "would: systemctl restart everlit-coordinator.service" in done.stderr, done.stderr
        assert files() == before and machine.run("id", "everlit", check=False).returncode, "a dry run changes nothing"
        refused(machine, 2, "say what to install: coordinator or agent")
        refused(machine, 2, "agent", "--form", "/opt", "`--form` is not known")
        refused(machine, 2, "agent", "--from", "--from needs a value")
        refused(machine, 2, "coordinator", "--join", "https://x", "are for an agent")
        refused(machine, 2, "agent", "--", "--label", "a=b; reboot", "options may have letters")
        refused(machine, 1, "agent", "--from", "/nowhere", "/nowhere/everlit-agent is not there")
        refused(machine, 1, "agent", "--from", "/opt/everlit", "is the folder of no node: say --join URL")
        refused(machine, 1, "agent", "--from", "/opt/everlit", "--join", "https://127.0.0.1:1", "--token-file", "/nowhere", "did not join")
        refused(machine, 1, "agent", "--from", "/opt/everlit", "--join", "https://127.0.0.1:1", "--token-file", "-", "did not join", input="K1nonsense")
        done = machine.run("runuser", "-u", "nobody", "--", INSTALL, "agent", "--from", "/opt/everlit", check=False)
        assert done.returncode == 1 and "this needs root" in done.stderr, done
        # An option that `up` does not know: the unit fails, is not tried again, and says why.
        done = machine.run(INSTALL, "coordinator", "--from", "/opt/everlit", "--", "--lisen", "x", check=False)
        assert done.returncode == 1 and "unexpected argument '--lisen'" in done.stderr and "does not start" in done.stderr.splitlines()[-1], done
        assert machine.unit(COORDINATOR, "ActiveState", "NRestarts") == ["failed", "0"]


def services_start_and_run_jobs():
    with served() as (machine, everlit):
        short, made = everlit.post("/join-tokens", {"ttl": "10s"})["token"], time.monotonic()
        for unit in [COORDINATOR, AGENT]:
            assert machine.unit(unit, "Type", "ActiveState", "SubState", "UnitFileState") == ["notify", "active", "running", "enabled"]
            verified = machine.run("systemd-analyze", "verify", unit, check=False)
            assert verified.returncode == 0 and not verified.stderr.strip(), verified
        until("they say what they do", lambda: machine.unit(AGENT, "StatusText") == "linked, 0 ranks", 20)
        until("they say what they do", lambda: machine.unit(COORDINATOR, "StatusText") == "1 nodes, 0 jobs, 0 more in the queue", 20)
        assert everlit.node("one")["labels"] == {"zone": "a"}
        modes = machine.run("stat", "-c", "%a %U %n", "/var/lib/everlit", "/var/lib/everlit-agent", "/var/lib/everlit-agent/node.json").stdout
        assert modes.split()[::3] == ["700", "700", "600"] and modes.split()[1::3] == ["everlit"] * 3, modes
        found = machine.run("grep", "-rl", everlit.join_secret, "/etc", "/var/lib/everlit-agent", "/run", "/tmp", "/var/log", check=False)
        assert not found.stdout, f"the token is nowhere: {found.stdout}"
        job = everlit.submit(command=COMMAND, world_size=2)
        pids = [r["pid"] for r in everlit.running(job)["ranks"]]
        for pid in pids:
            environ = dict(line.split("=", 1) for line in machine.read(f"/proc/{pid}/environ").split("\0") if line)
            leaked = {name for name in environ if name.startswith(("NOTIFY", "WATCHDOG", "INVOCATION", "LISTEN", "SYSTEMD", "JOURNAL", "OPTIONS"))}
            assert not leaked and environ["RANK"], environ
            status = machine.read(f"/proc/{pid}/status")
            assert "NoNewPrivs:\t1" in status and machine.run("stat", "-c", "%U", f"/proc/{pid}").stdout.strip() == "everlit", status
        until("its words", lambda: everlit.get(f"/jobs/{job}/logs", raw=True).count(b"hello") == 2)
        until("the agent tells of them", lambda: machine.unit(AGENT, "StatusText") == "linked, 2 ranks", 20)
        # Again: an upgrade to the same, with the options that it has.
        for role in ["agent", "coordinator"]:
            machine.run(INSTALL, role, "--from", "/opt/everlit")
        until("the node is back", lambda: everlit.node("one")["state"] == "ready", 20)
        same_ranks(everlit, job, pids, machine)
        assert everlit.node("one")["labels"] == {"zone": "a"}, everlit.node("one")
        # `stop` saves and gives the jobs back; what starts next goes on with them.
        begun = time.monotonic()
        machine.run("systemctl", "stop", AGENT)
        assert everlit.state(job) == "queued" and not any(is_alive_in(machine, pid) for pid in pids), everlit.summary(job)
        print(f"     a stop of the agent gave its job back in {time.monotonic() - begun:.1f} s")
        machine.run("systemctl", "start", AGENT)
        assert everlit.running(job)["restarts"] == 0
        # Who is expelled stays down.
        everlit.request("DELETE", "/nodes/one?force=true")
        until("it is down", lambda: machine.unit(AGENT, "ActiveState") == "failed", 40)
        assert machine.unit(AGENT, "ExecMainStatus", "NRestarts") == ["3", "0"]
        # Joining again takes another token, and one that is good.
        machine.run("rm", "/var/lib/everlit-agent/node.json")
        until("ten seconds", lambda: time.monotonic() - made > 10.5, 20)
        done = machine.run(INSTALL, "agent", "--from", "/opt/everlit", "--join", everlit.url, "--token-file", "-", input=short, check=False)
        assert done.returncode == 1 and "has expired" in done.stderr and "FAILED: this machine did not join" in done.stderr, done
        token = everlit.post("/join-tokens", {})["token"]
        machine.run(INSTALL, "agent", "--from", "/opt/everlit", "--join", everlit.url, "--token-file", "-", input=token)
        assert everlit.running(job)["restarts"] >= 0 and everlit.node("one")["labels"] == {"zone": "a"}
        machine.run(INSTALL, "agent", "--uninstall")
        assert everlit.state(job) == "queued", "it was saved"
        assert machine.run("ls", "/etc/systemd/system").stdout.count("everlit") == 1
        assert machine.run("everlit-agent", "--version").returncode == 0, "the coordinator needs the programs"
        machine.run(INSTALL, "coordinator", "--uninstall")
        left = machine.run("find", "/usr/local", "/etc/everlit", "/etc/systemd", "-name", "*everlit*", "-not", "-path", "/etc/everlit").stdout
        assert not left, left
        assert machine.run("ls", "/var/lib/everlit/admin.token", "/var/lib/everlit-agent").returncode == 0


def is_alive_in(machine, pid):
    return machine.run("kill", "-0", pid, check=False).returncode == 0


def restarts_and_hangs_spare_ranks():
    with served() as (machine, everlit):
        job = everlit.submit(command=COMMAND, world_size=2)
        pids = [r["pid"] for r in everlit.running(job)["ranks"]]
        for unit in [AGENT, COORDINATOR]:
            short = "[Service]\nWatchdogSec=2\n"
            machine.run("mkdir", "-p", f"/etc/systemd/system/{unit}.d")
            machine.run("tee", f"/etc/systemd/system/{unit}.d/short.conf", input=short)
        machine.run("systemctl", "daemon-reload")
        for unit in [AGENT, COORDINATOR]:
            main = machine.main_pid(unit)
            begun = time.monotonic()
            machine.run("systemctl", "restart", unit)
            assert machine.main_pid(unit) != main
            until("its node is back", lambda: back(everlit), 20)
            same_ranks(everlit, job, pids, machine)
            print(f"     {unit}: restarted in {time.monotonic() - begun:.1f} s, ranks {pids} run on")
        assert machine.unit(AGENT, "NRestarts") == "0"
        for how, seconds in [("KILL", 0), ("STOP", 2)]:
            for unit in [AGENT, COORDINATOR]:
                main, before = machine.main_pid(unit), int(machine.unit(unit, "NRestarts"))
                begun = time.monotonic()
                machine.run("kill", "-s", how, main)
                until(f"{unit} runs again", lambda: machine.unit(unit, "SubState") == "running" and machine.main_pid(unit) not in (0, main), 30, 0.1)
                took = time.monotonic() - begun
                assert int(machine.unit(unit, "NRestarts")) == before + 1
                until("its node is back", lambda: back(everlit), 20)
                same_ranks(everlit, job, pids, machine)
                print(f"     {unit}: SIG{how}, runs again after {took:.1f} s, ranks run on")
                if how == "STOP":
                    journal = machine.run("journalctl", "--no-pager", "-u", unit).stdout
                    assert "Watchdog timeout" in journal, journal[-2000:]
                    assert took > seconds / 2, "not before its time"
        # No alarm for who only waits.
        count = [machine.unit(unit, "NRestarts") for unit in [AGENT, COORDINATOR]]
        machine.run("sleep", "6")
        assert count == [machine.unit(unit, "NRestarts") for unit in [AGENT, COORDINATOR]]
        everlit.post(f"/jobs/{job}/stop?force=true")
        everlit.final(job)


def back(everlit):
    with contextlib.suppress(OSError):
        return everlit.node("one")["state"] == "ready"


def a_coordinator_with_an_agent_of_its_own_is_one_service():
    with network(), Machine("one") as machine:
        machine.run(INSTALL, "coordinator", "--from", "/opt/everlit", "--", "--listen", "0.0.0.0:8000", "--own-ca")
        everlit = Served(machine)
        until("its agent", lambda: back(everlit), 20)
        job = everlit.submit(command=COMMAND)
        pids = [r["pid"] for r in everlit.running(job)["ranks"]]
        agent = int(machine.read("/var/lib/everlit/agent/agent.lock"))
        assert "NOTIFY_SOCKET" not in machine.read(f"/proc/{agent}/environ"), "it does not speak for the coordinator"
        machine.run("systemctl", "restart", COORDINATOR)
        until("its agent", lambda: back(everlit), 20)
        same_ranks(everlit, job, pids, machine)
        assert int(machine.read("/var/lib/everlit/agent/agent.lock")) == agent
        machine.run("systemctl", "kill", "-s", "KILL", "--kill-who=main", COORDINATOR)
        until("it runs again", lambda: machine.unit(COORDINATOR, "NRestarts") == "1" and back(everlit), 20)
        same_ranks(everlit, job, pids, machine)
        machine.run(INSTALL, "coordinator", "--uninstall")
        assert not any(is_alive_in(machine, pid) for pid in [*pids, agent])


CHECKS = [
    installing_says_each_step_and_every_fault_in_a_line,
    services_start_and_run_jobs,
    restarts_and_hangs_spare_ranks,
    a_coordinator_with_an_agent_of_its_own_is_one_service,
]

if __name__ == "__main__":
    run(CHECKS, "service")
