"""Doors with locks, from the outside (scripts/e2e-doors.sh)."""

import contextlib
import os
import pathlib
import re
import socket
import ssl
import stat
import subprocess
import tempfile
import time

from lib import BIN, Everlit, free_port, run, until

SMALL = {"model": {"dim": 16, "layers": 1, "heads": 2, "kv_heads": 2, "hidden": 32}, "sequence_length": 8, "batch_size": 8}
COMMAND = ["sh", "-c", "echo hello; sleep 600"]


class Locked(Everlit):
    """A coordinator that other machines may call: TLS with a CA of its own, and tokens."""

    def __init__(self, *flags, **more):
        super().__init__("--own-ca", *flags, listen="0.0.0.0", scheme="https", **more)

    def up(self, wait=True):
        super().up(wait=False)
        until("its CA and the first token", lambda: (self.data / "ca/ca.pem").exists() and (self.data / "admin.token").exists(), 20)
        self.tls = ssl.create_default_context(cafile=self.data / "ca/ca.pem")
        self.token = (self.data / "admin.token").read_text()
        until("ready", self.is_ready, 20)
        until("a node", lambda: self.get("/status")["nodes"]["ready"], 20)

    def made(self, user, role, **more):
        return self.post("/tokens", {"user": user, "role": role, **more})["token"]

    @contextlib.contextmanager
    def as_(self, token):
        before, self.token = self.token, token
        try:
            yield
        finally:
            self.token = before

    def cli(self, *words, token=None, ca=True, **env):
        env = {**os.environ, "EVERLIT_URL": self.url, **({"EVERLIT_TOKEN": token} if token else {}), **env}
        if ca:
            env["EVERLIT_CA_FILE"] = str(self.data / "ca/ca.pem")
        return subprocess.run([BIN / "everlit", *words], env=env, capture_output=True, text=True, timeout=60)


def told(status_and_problem, status, code, *parts):
    found, problem = status_and_problem
    assert (found, problem["code"]) == (status, code), (found, problem)
    for part in parts:
        assert part in problem["detail"], (part, problem["detail"])
    print(f"     {status} {code}: {problem['detail'][:150]}")


def an_open_listener_without_locks_is_refused():
    with tempfile.TemporaryDirectory() as data:
        for flags, part in [
            ([], "--own-ca makes a certificate"),
            (["--anonymous", "viewer"], "--own-ca makes a certificate"),
            (["--tls-cert", "nowhere.pem"], "tls-key is missing"),
            (["--tls-cert", "nowhere.pem", "--tls-key", "nowhere.key"], "nowhere.pem can not be read"),
            (["--own-ca", "--insecure-http"], "is for doors without TLS"),
            (["--own-ca", "--anonymous", "root"], "must be one of viewer, user, operator, admin"),
        ]:
            done = subprocess.run(
                [BIN / "everlit", "up", "--listen", f"0.0.0.0:{free_port()}", "--data-dir", f"{data}/d", *flags],
                capture_output=True, text=True, timeout=20,
            )
            assert done.returncode in (1, 2) and part in done.stderr, (flags, done)
            print(f"     {' '.join(flags) or '(nothing)'}: {done.stderr.strip().splitlines()[0][:150]}")


def a_team_s_coordinator_by_curl_and_by_the_command_line():
    with Locked() as everlit:
        ca, token_file = everlit.data / "ca/ca.pem", everlit.data / "admin.token"
        for private in [token_file, everlit.data / "ca/ca.key", everlit.data / "agent.token"]:
            assert stat.S_IMODE(private.stat().st_mode) == 0o600, private
        # The line that `up` prints, as it stands.
        log = (everlit.data / "up.log").read_text()
        line = re.search(r"submit a job:  (.*)", log)[1]
        path = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", line], env=path, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, (line, done)
        # By curl, with the token in a file.
        (everlit.data / "header").write_text(f"Authorization: Bearer {token_file.read_text()}")
        curl = ["curl", "-s", "--noproxy", "*", "--cacert", ca, "-H", f"@{everlit.data}/header", f"https://localhost:{everlit.port}/whoami"]
        assert '"role":"admin"' in subprocess.run(curl, capture_output=True, text=True, timeout=30).stdout
        job = everlit.get("/jobs")["data"][0]
        assert job["user"] == "admin", job
        everlit.at_step(job["job_id"], 3)
        everlit.post(f"/jobs/{job['job_id']}/stop?force=true")
        # Who does not know the CA is told what to do; who has no token, too.
        foreign = everlit.cli("status", token="x", ca=False)
        assert foreign.returncode == 1 and "--ca-file" in foreign.stderr, foreign
        bare = everlit.cli("ls")
        assert bare.returncode == 1 and "a token is needed" in bare.stderr and "EVERLIT_TOKEN" in bare.stderr, bare
        print(f"     {foreign.stderr.strip()}\n     {bare.stderr.strip()}")
        admin = token_file.read_text()
        made = everlit.cli("token", "create", "--user", "alice", "--role", "user", "--ttl", "1h", token=admin)
        alice = made.stdout.strip()
        assert re.fullmatch(r"everlit_[0-9a-f]{12}_[0-9a-f]{64}", alice) and "not shown again" in made.stderr, made
        (everlit.data / "alice").write_text(alice)
        who = everlit.cli("whoami", EVERLIT_TOKEN_FILE=str(everlit.data / "alice"))
        assert who.stdout.startswith("alice, as user, until "), who
        submitted = everlit.cli("submit", "--", *COMMAND, token=alice)
        assert submitted.returncode == 0, submitted
        listed = everlit.cli("token", "ls", token=admin).stdout
        assert "alice" in listed and alice[-64:] not in listed, listed
        # No secret in a file, a log or an argv.
        secrets = [alice[-64:], admin[-64:]]
        mine = [folder for folder in pathlib.Path("/proc").iterdir() if folder.name.isdigit()]
        for folder in mine:
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes()
                assert str(everlit.data).encode() not in words or not any(s.encode() in words for s in secrets), words
        for path in everlit.data.rglob("*"):
            if path.is_file() and path.name not in ("admin.token", "alice", "header"):
                with contextlib.suppress(FileNotFoundError):
                    text = path.read_bytes()
                    assert not any(s.encode() in text for s in secrets), path


def roles_hold_and_users_keep_to_their_own():
    with Locked() as everlit:
        alice, bob, viewer, operator = (everlit.made(*who) for who in [("alice", "user"), ("bob", "user"), ("vera", "viewer"), ("otto", "operator")])
        with everlit.as_(alice):
            job = everlit.submit(command=COMMAND)
            everlit.running(job)
        with everlit.as_(bob):
            own = everlit.submit(command=COMMAND, name="of bob")
            told(everlit.refused("GET", f"/jobs/{job}/summary"), 404, "not_found", "of yours")
            told(everlit.refused("POST", f"/jobs/{job}/stop"), 404, "not_found", "of yours")
            told(everlit.refused("POST", "/jobs", {"resume_from": job}), 404, "not_found", "of yours to resume from")
            told(everlit.refused("POST", "/jobs", {"resume_from": job, "command": COMMAND}), 404, "not_found", "of yours to resume from")
            assert [j["job_id"] for j in everlit.get("/jobs?user=alice")["data"]] == [own]
            # The same key is another user's, and tells nothing of that one's job.
            key = {"Idempotency-Key": "k"}
            first = everlit.request("POST", "/jobs", {"command": COMMAND}, headers=key)["job_id"]
        with everlit.as_(alice):
            assert everlit.request("POST", "/jobs", {"command": COMMAND}, headers=key)["job_id"] != first
            told(everlit.refused("POST", "/tokens", {"user": "alice", "role": "admin"}), 403, "forbidden", "takes admin")
        with everlit.as_(viewer):
            assert everlit.summary(job)["state"] == "running"
            told(everlit.refused("POST", f"/jobs/{job}/stop"), 403, "forbidden", "`vera` is a viewer here, and this takes user")
            told(everlit.refused("DELETE", f"/jobs/{job}?stop_first=true"), 403, "forbidden")
            node = everlit.get("/nodes")["data"][0]["node"]
        with everlit.as_(operator):
            everlit.post(f"/nodes/{node}/cordon")
            everlit.post(f"/nodes/{node}/uncordon")
            everlit.post(f"/jobs/{job}/stop?force=true")
            told(everlit.refused("GET", "/audit"), 403, "forbidden", "takes admin")
        everlit.final(job)
        lines = [(e["user"], e["operation"], e["allowed"]) for e in everlit.get("/audit?limit=500")["data"]]
        for line in [("alice", "submit_job", True), ("bob", "stop_job", False), ("vera", "stop_job", False), ("otto", "cordon_node", True), ("otto", "stop_job", True)]:
            assert line in lines, (line, lines)
        assert all(e["address"] == "127.0.0.1" for e in everlit.get("/audit?limit=500")["data"])


def events_of_a_user_are_of_its_own_jobs():
    with Locked() as everlit:
        alice, bob = everlit.made("alice", "user"), everlit.made("bob", "user")
        stream = subprocess.Popen(
            ["curl", "-sN", "--noproxy", "*", "--max-time", "60", "--cacert", everlit.data / "ca/ca.pem", "-H", f"Authorization: Bearer {alice}", f"{everlit.url}/events/stream?after=0"],
            stdout=subprocess.PIPE, text=True,
        )
        with everlit.as_(bob):
            his = everlit.submit(command=["true"])
            everlit.final(his)
        with everlit.as_(alice):
            hers = everlit.submit(command=["true"])
        heard = ""
        for line in stream.stdout:
            heard += line
            if "job_final" in line or f'"job_id":"{hers}"' in line and "final" in heard.rsplit("event:", 1)[-1]:
                break
        stream.terminate()
        stream.wait()
        assert hers in heard and his not in heard, heard


def tokens_that_open_nothing():
    with Locked() as everlit:
        admin = everlit.token
        good = everlit.post("/tokens", {"user": "alice", "role": "user"})
        with everlit.as_(good["token"]):
            everlit.get("/jobs")
        everlit.request("DELETE", f"/tokens/{good['id']}")
        everlit.request("DELETE", f"/tokens/{good['id']}")
        with Locked() as other:
            foreign = other.made("alice", "admin")
            with everlit.as_(foreign):
                told(everlit.refused("GET", "/jobs"), 401, "unauthorized", "not known here")
        with everlit.as_(good["token"]):
            told(everlit.refused("GET", "/jobs"), 401, "unauthorized", "was revoked")
        with everlit.as_(admin[:-5]):
            told(everlit.refused("GET", "/jobs"), 401, "unauthorized", "was it cut off")
        told(everlit.refused("POST", "/tokens", {"user": "a b", "role": "root", "ttl": "1s"}), 422, "invalid", "3 faults")
        # It counts at once, and after a restart.
        everlit.kill()
        everlit.up()
        with everlit.as_(good["token"]):
            told(everlit.refused("GET", "/jobs"), 401, "unauthorized", "was revoked")
        assert everlit.token == admin, "the first token is made once"
        # A guesser is slowed down; who has a token is not locked out by it.
        with everlit.as_("everlit_" + "0" * 12 + "_" + "0" * 64):
            statuses = [everlit.refused("GET", "/jobs")[0] for _ in range(30)]
        assert statuses[:3] == [401] * 3 and statuses[-1] == 429, statuses
        assert everlit.get("/whoami")["role"] == "admin"


def a_restart_keeps_tokens_jobs_and_the_ca():
    with Locked() as everlit:
        alice = everlit.made("alice", "user")
        with everlit.as_(alice):
            job = everlit.submit(world_size=2, worker={**SMALL, "steps": 100_000})
            everlit.at_step(job, 5)
            pids = [r["pid"] for r in everlit.summary(job)["ranks"]]
        ca = (everlit.data / "ca/ca.pem").read_bytes()
        everlit.kill()
        everlit.up()
        with everlit.as_(alice):
            everlit.at_step(job, 10)
            assert [r["pid"] for r in everlit.summary(job)["ranks"]] == pids
            assert everlit.get(f"/jobs/{job}")["user"] == "alice"
            everlit.post(f"/jobs/{job}/stop?force=true")
        assert (everlit.data / "ca/ca.pem").read_bytes() == ca


def handshakes_that_never_end_hold_up_nobody():
    with Locked() as everlit:
        with contextlib.ExitStack() as opened:
            # From an address of its own; what is over its share is hung up on.
            for _ in range(1500):
                opened.enter_context(socket.create_connection(("127.0.0.1", everlit.port), source_address=("127.0.0.2", 0)))
            started = time.monotonic()
            assert everlit.get("/whoami")["role"] == "admin"
            print(f"     answered after {time.monotonic() - started:.2f} s beside 1500 silent connections")
        plain = socket.create_connection(("127.0.0.1", everlit.port))
        plain.sendall(b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" not in plain.recv(100), "no word in the clear"
        with everlit.as_(None):
            assert set(everlit.get("/status")) == {"version", "uptime_seconds", "leader", "auth"}
            told(everlit.refused("GET", "/jobs"), 401, "unauthorized", "a token is needed")


def a_proxy_in_front_and_a_trial():
    with Everlit("--insecure-http", "--anonymous", "viewer", listen="0.0.0.0") as everlit:
        assert everlit.get("/whoami") == {"user": None, "role": "viewer", "token": None, "expires_at": None}
        assert everlit.get("/status")["auth"] == "anonymous viewer"
        assert "--anonymous" in (everlit.data / "up.log").read_text()
        told(everlit.refused("POST", "/jobs", {"command": ["true"]}), 403, "forbidden", "a caller without a token is a viewer")
        # A page of a name that was turned to this address.
        told(everlit.refused("GET", "/jobs", headers={"Host": f"evil.example:{everlit.port}"}), 401, "unauthorized", "by no name")
        everlit.token = (everlit.data / "admin.token").read_text()
        everlit.final(everlit.submit(command=["true"]))
    # A proxy on this machine, too, brings others in.
    with Everlit("--insecure-http") as everlit:
        told(everlit.refused("GET", "/jobs"), 401, "unauthorized", "a token is needed")
        told(everlit.refused("GET", "/agent/link", headers={"Authorization": f"Bearer {(everlit.data / 'agent.token').read_text()}"}), 403, "forbidden", "everlit-agent join")
        everlit.token = (everlit.data / "admin.token").read_text()
        everlit.final(everlit.submit(command=["true"]))


CHECKS = [
    an_open_listener_without_locks_is_refused,
    a_team_s_coordinator_by_curl_and_by_the_command_line,
    roles_hold_and_users_keep_to_their_own,
    events_of_a_user_are_of_its_own_jobs,
    tokens_that_open_nothing,
    a_restart_keeps_tokens_jobs_and_the_ca,
    handshakes_that_never_end_hold_up_nobody,
    a_proxy_in_front_and_a_trial,
]

if __name__ == "__main__":
    run(CHECKS, "e2e-doors")
