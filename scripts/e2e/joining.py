"""Servers that join a coordinator over TLS, from the outside (scripts/e2e-nodes.sh)."""

import contextlib
import ctypes
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import tempfile
import threading
import time

from doors import Locked, told
from lib import BIN, Everlit, free_port, is_alive, run, until

COMMAND = ["sh", "-c", "trap 'exit 0' TERM; echo hello; while :; do sleep 0.1; done"]


class Cluster(Locked):
    """A coordinator without an agent of its own, and agents that joined it."""

    def __init__(self, *flags, **more):
        super().__init__("--no-local-agent", *flags, **more)
        self.agents = []

    def up(self, wait=True):
        Everlit.up(self, wait=False)
        until("its CA and the first token", lambda: (self.data / "ca/ca.pem").exists() and (self.data / "admin.token").exists(), 20)
        self.tls = ssl.create_default_context(cafile=self.data / "ca/ca.pem")
        self.token = (self.data / "admin.token").read_text()
        until("ready", self.is_ready, 20)

    def join_token(self, **wanted):
        return self.post("/join-tokens", wanted)["token"]

    def join(self, name, *flags, token=None, url=None, wait=True):
        agent = Agent(name, token or self.join_token(), url or self.url, flags)
        self.agents.append(agent)
        if wait:
            until(f"{name} ready", lambda: agent.is_alive() and self.node(name)["state"] == "ready", 20)
        return agent

    def node(self, name):
        return next((n for n in self.get("/nodes?limit=500")["data"] if n["node"] == name), {"state": None})

    def end(self):
        with contextlib.suppress(Exception):
            for job in self.active():
                self.post(f"/jobs/{job['job_id']}/stop?force=true")
            until("no jobs", lambda: not self.active(), 20)
        for agent in self.agents:
            agent.end()
        super().end()


class Agent:
    """`everlit-agent join` on a folder of its own."""

    PREFIX = []

    def __init__(self, name, token, url, flags):
        self.prefix = self.PREFIX
        self.name, self.data = name, pathlib.Path(tempfile.mkdtemp(prefix=f"everlit-e2e-{name}-"))
        self.log = self.data / "out.log"
        self.url, self.flags = url, list(flags)
        self.start("join", url, "--node", name, token=token)

    def start(self, verb, *words, token=None):
        env = {k: v for k, v in os.environ.items() if not k.startswith("EVERLIT_")}
        if token:
            env["EVERLIT_JOIN_TOKEN"] = token
        log = open(self.log, "ab")
        command = [*self.prefix, BIN / "everlit-agent", verb, *words, "--data-dir", self.data, *self.flags]
        self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)

    def text(self):
        return self.log.read_text()

    def is_alive(self):
        if self.process.poll() is not None:
            raise AssertionError(f"the agent of {self.name} ended with {self.process.returncode}: {self.text()[-2000:]}")
        return True

    def end(self):
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.data, ignore_errors=True)


def refused_join(url, token, *parts, node="late", flags=(), data=None):
    """`everlit-agent join`, which is refused with all of these words."""
    with tempfile.TemporaryDirectory() as folder:
        env = {k: v for k, v in os.environ.items() if not k.startswith("EVERLIT_")}
        env.update({"EVERLIT_JOIN_TOKEN": token} if token is not None else {})
        command = [BIN / "everlit-agent", "join", url, "--data-dir", data or folder, "--node", node, "--only", *flags]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done
    for part in parts:
        assert part in done.stderr, (part, done.stderr)
    if token:
        assert token[-30:] not in done.stderr + done.stdout, "no secret is told"
    print(f"     {done.stderr.strip()[:200]}")


def servers_join_by_the_line_that_is_printed():
    with Cluster() as everlit:
        admin = everlit.token
        made = everlit.cli("node", "token", "create", "--node", "gpu-1", token=admin)
        line = made.stdout.strip()
        assert re.fullmatch(r"EVERLIT_JOIN_TOKEN=K1[0-9a-f]{64}::[0-9a-f]{12}:[0-9a-f]{64} everlit-agent join https://\S+ --node gpu-1", line), line
        assert "not shown again" in made.stderr and "that the server can reach" in made.stderr, made.stderr
        print(f"     {line[:40]}… {line[line.index(' ') + 1:]}\n     {made.stderr.strip()}")
        folder = pathlib.Path(tempfile.mkdtemp(prefix="everlit-e2e-home-"))
        env = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(folder)}
        log = open(folder / "log", "ab")
        agent = subprocess.Popen(["bash", "-c", "exec env " + line], env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            until("gpu-1 ready", lambda: everlit.node("gpu-1")["state"] == "ready", 20)
            own = folder / ".local/share/everlit-agent"
            assert stat.S_IMODE((own / "node.json").stat().st_mode) == 0o600
            secret = line.split(" ")[0][-64:]
            for private in ["cmdline", "environ"]:
                shown = pathlib.Path(f"/proc/{agent.pid}/{private}").read_bytes()
                # The environment that it was started with can be read by its own user alone.
                assert private == "environ" or secret.encode() not in shown, shown
            health = subprocess.run([BIN / "everlit-agent", "health"], env=env, capture_output=True, text=True, timeout=20)
            assert health.returncode == 0 and json.loads(health.stdout)["linked"], health
            job = everlit.submit(command=COMMAND, world_size=2)
            ranks = everlit.running(job)["ranks"]
            assert {r["node"] for r in ranks} == {"gpu-1"}, ranks
            for rank in ranks:
                assert secret.encode() not in pathlib.Path(f"/proc/{rank['pid']}/environ").read_bytes(), "a rank sees no token"
            until("its words", lambda: everlit.get(f"/jobs/{job}/logs", raw=True).count(b"hello") == 2)
            listed = everlit.cli("node", "token", "ls", token=admin).stdout
            assert "used" in listed and "gpu-1" in listed and secret not in listed, listed
            audit = everlit.get("/audit?limit=50")["data"]
            assert any(a["operation"] == "join_node" and a["allowed"] for a in audit) and secret not in json.dumps(audit), audit
            everlit.post(f"/jobs/{job}/stop?force=true")
            everlit.final(job)
        finally:
            agent.terminate()
            agent.wait(40)
            shutil.rmtree(folder, ignore_errors=True)


def who_may_not_join_is_told_why():
    with Cluster() as everlit, Cluster() as other:
        url, good = everlit.url, everlit.join_token(uses=2)
        refused_join(url, None, "a join token is needed", "everlit node token create")
        refused_join(url, "", "not a join token")
        refused_join(url, everlit.token, "not a join token")
        refused_join(url, good[:-1], "cut off or damaged")
        wrong = good[:-64] + "0" * 64
        refused_join(url, wrong, "not known here")
        unknown = good[:-77] + "0" * 12 + good[-65:]
        refused_join(url, unknown, "not known here")
        refused_join(url, other.join_token(), "another CA than the join token names")
        refused_join(url.replace("https", "http"), good, "like https://")
        refused_join(f"https://127.0.0.1:{free_port()}", good, "could not reach 127.0.0.1")
        refused_join(url, good, "can not be the name of a node", node="a/b")
        # Revoked, expired, for another, used up.
        revoked = everlit.join_token()
        everlit.request("DELETE", f"/join-tokens/{revoked.split(':')[2]}")
        refused_join(url, revoked, "was revoked")
        short = everlit.join_token(ttl="10s")
        begun = time.monotonic()
        named = everlit.join_token(node="only-this")
        refused_join(url, named, "for another node than late")
        everlit.join("one", token=good)
        refused_join(url, good, "a node named one has joined already", node="one")
        two = everlit.join("two", token=good)
        refused_join(url, good, "was used already")
        refused_join(url, other.join_token(), "of another coordinator", data=two.data, node="two")
        refused_join(url, None, "is the folder of node two", data=two.data, node="three")
        until("ten seconds", lambda: time.monotonic() - begun > 10.5, 20)
        refused_join(url, short, "has expired")
        # A flood of wrong ones is slowed, and a good one passes.
        for _ in range(25):
            status, problem = everlit.refused("POST", "/join", {}, headers={"Authorization": "Bearer x"})
        told((status, problem), 429, "rate_limited")
        everlit.join("three", token=everlit.join_token())
        nodes = {n["node"]: n for n in everlit.get("/nodes")["data"]}
        assert set(nodes) == {"one", "two", "three"} and all(n["joined"]["token"] for n in nodes.values()), nodes
    with Everlit() as plain:
        told(plain.refused("POST", "/join-tokens", {}), 409, "conflict", "over TLS only", "--own-ca")
        refused_join(plain.url.replace("http", "https"), good, "does not speak TLS")


def a_fake_coordinator_never_sees_the_secret():
    with Cluster() as everlit:
        token = everlit.join_token()
        with tempfile.TemporaryDirectory() as folder:
            # Another CA and a certificate of it, for the name that agents ask for.
            script = (
                "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.pem -days 2 -subj '/CN=everlit CA' 2>/dev/null && "
                "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout own.key -out own.csr -subj '/CN=everlit coordinator' 2>/dev/null && "
                "printf 'subjectAltName=DNS:coordinator.everlit.internal' > ext && "
                "openssl x509 -req -in own.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out own.pem -days 2 -extfile ext 2>/dev/null && cat ca.pem >> own.pem"
            )
            subprocess.run(["sh", "-c", script], cwd=folder, check=True)
            heard = []
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(f"{folder}/own.pem", f"{folder}/own.key")
            door = socket.create_server(("127.0.0.1", 0))

            def listen():
                stream, _ = door.accept()
                with contextlib.suppress(OSError):
                    tls = context.wrap_socket(stream, server_side=True)
                    heard.append(tls.recv(100_000))
                heard.append(b"")

            thread = threading.Thread(target=listen, daemon=True)
            thread.start()
            refused_join(f"https://127.0.0.1:{door.getsockname()[1]}", token, "another CA than the join token names")
            thread.join(10)
            assert heard and not any(heard), heard
        # It is good still: it was shown to nobody.
        agent = everlit.join("one", token=token)
        # Who has joined is not fooled either: the impostor gets no hello.
        assert agent.is_alive()


def a_request_that_is_sent_again_makes_no_second_node():
    with Cluster() as everlit:
        token = everlit.join_token()
        _, _, name, secret = token.split(":")
        shown = {"Authorization": f"Bearer {name}:{secret}"}
        with tempfile.TemporaryDirectory() as folder:
            script = "openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout own.key -subj '/CN=x' 2>/dev/null"
            request = subprocess.run(["sh", "-c", script], cwd=folder, check=True, capture_output=True, text=True).stdout
            everlit.token = None
            first = everlit.post("/join", {"node": "gpu-1", "request": request}, headers=shown)
            # Its answer was lost: the same key may ask again, another may not.
            again = everlit.post("/join", {"node": "gpu-1", "request": request}, headers=shown)
            assert again["node"] == "gpu-1" and again["certificate"] != first["certificate"]
            other = subprocess.run(["sh", "-c", script], cwd=folder, check=True, capture_output=True, text=True).stdout
            told(everlit.refused("POST", "/join", {"node": "gpu-1", "request": other}, headers=shown), 409, "conflict", "has joined already")
            told(everlit.refused("POST", "/join", {"node": "gpu-2", "request": request}, headers=shown), 409, "conflict", "used already")
            damaged = request[:200] + ("A" if request[200] != "A" else "B") + request[201:]
            told(everlit.refused("POST", "/join", {"node": "gpu-2", "request": damaged}, headers=shown), 400, "bad_request", "certificate request")
        everlit.token = (everlit.data / "admin.token").read_text()
        assert everlit.node("gpu-1")["state"] == "lost" and everlit.node("gpu-1")["joined"], "it has joined, and not connected"
        # A node that has connected: its request, as it was sent, is refused.
        token = everlit.join_token()
        agent = everlit.join("one", token=token)
        own = json.loads((agent.data / "node.json").read_text())
        assert own["coordinator"] == everlit.url
        _, _, name, secret = token.split(":")
        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder, "key").write_text(own["key"])
            request = subprocess.run(["openssl", "req", "-new", "-key", "key", "-subj", "/CN=x"], cwd=folder, check=True, capture_output=True, text=True).stdout
            shown = {"Authorization": f"Bearer {name}:{secret}"}
            told(everlit.refused("POST", "/join", {"node": "one", "request": request}, headers=shown), 409, "conflict", "with this request already")


def an_agent_has_no_name_but_its_own():
    with Cluster() as everlit:
        one, two = everlit.join("one"), everlit.join("two")
        two.process.terminate()
        two.process.wait(40)
        file = two.data / "node.json"
        own = json.loads(file.read_text())
        # Its certificate is that of two, and it says that it is one.
        file.write_text(json.dumps({**own, "node": "one"}))
        two.start("run")
        until("it is turned away", lambda: "this agent says that it is one, and its certificate is that of two" in two.text(), 20)
        assert everlit.node("one")["state"] == "ready" and one.is_alive()
        two.process.terminate()
        two.process.wait(40)
        file.write_text(json.dumps(own))
        two.start("run")
        until("two is back", lambda: everlit.node("two")["state"] == "ready", 20)
        print("     " + next(line for line in two.text().splitlines() if "its certificate is that of" in line)[28:180])
        # The coordinator's own agent can not take a node's name, nor a node that one's.
    with Cluster() as everlit:
        everlit.flags.remove("--no-local-agent")
        everlit.interrupt()
        Everlit.up(everlit, wait=False)
        until("its own agent", lambda: everlit.is_ready() and everlit.get("/nodes")["data"], 20)
        local = everlit.get("/nodes")["data"][0]["node"]
        refused_join(everlit.url, everlit.join_token(), "coordinator's own agent", node=local)
        told(everlit.refused("DELETE", f"/nodes/{local}"), 409, "conflict", "--no-local-agent")


def certificates_are_renewed_and_an_expired_one_is_told():
    with Cluster("--node-certificate-ttl", "12s") as everlit:
        agent, asleep = everlit.join("one"), everlit.join("two")
        certificate = lambda agent: json.loads((agent.data / "node.json").read_text())["certificate"]
        first = certificate(agent)
        asleep.process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        until("a renewal", lambda: certificate(agent) != first, 20)
        print(f"     renewed after {time.monotonic() - begun:.0f} s of 12 s")
        second = certificate(agent)
        until("another", lambda: certificate(agent) != second, 20)
        until("more than a life", lambda: time.monotonic() - begun > 16, 20)
        # A restart: only what is good now comes in.
        everlit.kill()
        Everlit.up(everlit, wait=False)
        until("back", lambda: everlit.is_ready() and everlit.node("one")["state"] == "ready", 20)
        asleep.process.send_signal(signal.SIGCONT)
        until("it is told", lambda: "certificate has expired: join again" in asleep.text(), 40)
        audit = everlit.get("/audit?limit=100&user=node/one")["data"]
        assert audit and all(a["operation"] == "renew_certificate" and a["allowed"] for a in audit), audit
        # It joins again under its name once an admin has expelled it.
        asleep.process.terminate()
        asleep.process.wait(40)
        (asleep.data / "node.json").unlink()
        refused_join(everlit.url, everlit.join_token(), "a node named two has joined already", node="two", data=asleep.data)
        everlit.request("DELETE", "/nodes/two")
        asleep.start("join", everlit.url, "--node", "two", token=everlit.join_token())
        until("two ready", lambda: everlit.node("two")["state"] == "ready", 20)


def a_node_that_is_expelled_stops_everything_and_does_not_come_back():
    with Cluster() as everlit:
        agent = everlit.join("one")
        job = everlit.submit(command=COMMAND)
        pid = everlit.running(job)["ranks"][0]["pid"]
        told(everlit.refused("DELETE", "/nodes/one"), 409, "conflict", "1 ranks are placed on one", "drain it first")
        assert is_alive(pid)
        everlit.request("DELETE", "/nodes/one?force=true")
        assert agent.process.wait(40) == 3, agent.text()
        until("its rank's end", lambda: not is_alive(pid), 20)
        assert "this node was expelled" in agent.text() and everlit.node("one")["state"] is None, agent.text()
        assert everlit.state(job) == "queued", everlit.summary(job)
        agent.start("run")
        assert agent.process.wait(40) == 3, agent.text()
        print("     " + agent.text().splitlines()[-2][28:200])
        told(everlit.refused("DELETE", "/nodes/one"), 404, "not_found")
        events = [e["event"] for e in everlit.get(f"/jobs/{job}/events")["data"]]
        assert "gang_failed" in events, events
        # The job goes on elsewhere.
        everlit.join("two")
        assert everlit.running(job)["ranks"][0]["node"] == "two"
        everlit.post(f"/jobs/{job}/stop?force=true")


def a_restart_of_the_coordinator_is_no_news_to_ranks():
    with Cluster() as everlit:
        agents = [everlit.join(name) for name in ["one", "two", "three"]]
        jobs = [everlit.submit(command=COMMAND) for _ in range(3)]
        before = {job: everlit.running(job)["ranks"][0]["pid"] for job in jobs}
        for how in ["kill", "interrupt", "kill"]:
            getattr(everlit, how)()
            Everlit.up(everlit, wait=False)
            until("ready", everlit.is_ready, 20)
            ready = time.monotonic()
            until("all nodes", lambda: [n["state"] for n in everlit.get("/nodes")["data"]] == ["ready"] * 3, 20)
            print(f"     {how}: all agents are back {time.monotonic() - ready:.2f} s after the coordinator answers")
            assert {job: everlit.running(job)["ranks"][0]["pid"] for job in jobs} == before
        assert all(agent.is_alive() for agent in agents)
        assert all(everlit.summary(job)["restarts"] == 0 for job in jobs)
        for job in jobs:
            everlit.post(f"/jobs/{job}/stop?force=true")


def a_drains_deadline_is_kept_over_restarts_of_agent_and_coordinator():
    with Cluster() as everlit:
        agent = everlit.join("one")
        # It does not end when it is told to.
        job = everlit.submit(command=["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"], stop_grace="5m")
        pid = everlit.running(job)["ranks"][0]["pid"]
        begun = time.monotonic()
        everlit.post("/nodes/one/drain", {"deadline": "10s"})
        agent.process.kill()
        agent.process.wait()
        agent.start("run")
        until("the agent is back", lambda: agent.text().count("linked ranks=1") == 1, 20)
        until("half of the time", lambda: time.monotonic() - begun > 5, 10)
        everlit.kill()
        Everlit.up(everlit, wait=False)
        until("the agent is back", lambda: agent.text().count("linked ranks=1") == 2, 20)
        assert is_alive(pid)
        until("it is killed", lambda: not is_alive(pid), 20)
        took = time.monotonic() - begun
        assert 9.9 < took < 13, took
        print(f"     killed {took:.1f} s after a drain within 10 s, by a new agent and a new coordinator")
        until("its job waits", lambda: everlit.state(job) == "queued", 20)


class Manager:
    """What a service manager hears."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.path = f"{self.folder.name}/notify"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.heard = []
        # Always: what it does not take is not told.
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        while True:
            self.heard.append(self.socket.recv(4096).decode())

    def count(self):
        """How much it has heard of what was told until now."""
        mark = f"mark {len(self.heard)}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            own.sendto(mark.encode(), self.path)
        until("all that was told before", lambda: mark in self.heard, 5)
        return len(self.heard)

    def has(self, *words):
        return all(any(word in told for told in self.heard) for word in words)

    @contextlib.contextmanager
    def near(self):
        """What is started here is told whom to tell."""
        own = {"NOTIFY_SOCKET": self.path, "WATCHDOG_USEC": "300000"}
        os.environ.update(own)
        try:
            yield
        finally:
            for name in own:
                del os.environ[name]


@contextlib.contextmanager
def stopped(process):
    """Nothing of it runs."""
    process.send_signal(signal.SIGSTOP)
    threads = pathlib.Path(f"/proc/{process.pid}/task")
    try:
        until("it stands", lambda: all((thread / "stat").read_text().rsplit(")", 1)[1].split()[0] == "T" for thread in threads.iterdir()), 5)
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def first_thread_stopped(process):
    """Its first thread does not run, in which an agent has its loop; its others do."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    seize, interrupt, detach, any_child = 0x4206, 0x4207, 17, 0x40000000
    for request in [seize, interrupt]:
        assert ptrace(request, process.pid, None, None) == 0, os.strerror(ctypes.get_errno())
    assert os.waitpid(process.pid, any_child)[0] == process.pid
    try:
        yield
    finally:
        assert ptrace(detach, process.pid, None, None) == 0, os.strerror(ctypes.get_errno())


def a_service_manager_is_told_what_goes_on():
    one, two = Manager(), Manager()
    everlit = Cluster()
    with one.near():
        everlit.__enter__()
    try:
        until("the doors are open", lambda: one.has("READY=1"), 20)
        assert everlit.is_ready()
        with two.near():
            agent = everlit.join("one")
        until("the agent's loop turns", lambda: two.has("READY=1", "WATCHDOG=1", "STATUS=linked, 0 ranks"), 20)
        job = everlit.submit(command=COMMAND)
        rank = everlit.running(job)["ranks"][0]["pid"]
        until("both tell of it", lambda: two.has("STATUS=linked, 1 ranks") and one.has("STATUS=1 nodes, 1 jobs, 0 more in the queue"), 20)
        assert b"NOTIFY_SOCKET" not in pathlib.Path(f"/proc/{rank}/environ").read_bytes()
        for manager, process, how in [(one, everlit.process, stopped), (two, agent.process, stopped), (two, agent.process, first_thread_stopped)]:
            with how(process):
                before = manager.count()
                with contextlib.suppress(AssertionError):
                    until("a word", lambda: len(manager.heard) > before, 0.7)
                    raise RuntimeError(f"it told something while it was stopped: {manager.heard[before:]}")
            until("more words", lambda: len(manager.heard) > before + 2, 5)
        # Asked to leave: another takes over.
        agent.process.send_signal(signal.SIGUSR1)
        assert agent.process.wait(20) == 0 and two.has("STOPPING=1", "STATUS=asked to leave its ranks running"), two.heard[-3:]
        assert is_alive(rank)
        agent.start("run")
        until("it is back", lambda: everlit.node("one")["state"] == "ready", 20)
        now = everlit.running(job)
        assert now["ranks"][0]["pid"] == rank and now["restarts"] == 0, now
        everlit.process.send_signal(signal.SIGTERM)
        assert everlit.process.wait(20) == 0 and one.has("STOPPING=1", "STATUS=ending"), one.heard[-3:]
        Everlit.up(everlit, wait=False)
        until("ready", everlit.is_ready, 20)
        everlit.post(f"/jobs/{job}/stop?force=true")
    finally:
        everlit.end()


CHECKS = [
    a_drains_deadline_is_kept_over_restarts_of_agent_and_coordinator,
    a_service_manager_is_told_what_goes_on,
    servers_join_by_the_line_that_is_printed,
    who_may_not_join_is_told_why,
    a_fake_coordinator_never_sees_the_secret,
    a_request_that_is_sent_again_makes_no_second_node,
    an_agent_has_no_name_but_its_own,
    certificates_are_renewed_and_an_expired_one_is_told,
    a_node_that_is_expelled_stops_everything_and_does_not_come_back,
    a_restart_of_the_coordinator_is_no_news_to_ranks,
]

if not shutil.which("openssl"):
    CHECKS = [check for check in CHECKS if check not in (a_fake_coordinator_never_sees_the_secret, a_request_that_is_sent_again_makes_no_second_node)]

if __name__ == "__main__":
    run(CHECKS, "joining")
