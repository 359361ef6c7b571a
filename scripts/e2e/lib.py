"""What the end-to-end scripts share: a coordinator to start and kill, HTTP, and waiting for a condition with a deadline."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

BIN = pathlib.Path(os.environ["EVERLIT_BIN"])


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until(what, condition, seconds=30.0, every=0.02):
    """The first true answer of `condition`; fails with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(every)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def children(pid):
    with contextlib.suppress(FileNotFoundError):
        return [int(c) for c in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def parent(pid):
    return int(open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[1])


class Refused(Exception):
    def __init__(self, status, body):
        super().__init__(f"{status}: {body}")
        self.status, self.body = status, body


class Everlit:
    """One `everlit up` on a folder and a port of its own. As a context it ends everything that it started."""

    def __init__(self, *flags, data=None, name="everlit-e2e-", listen="127.0.0.1", scheme="http"):
        self.own = data is None
        self.data = pathlib.Path(data or tempfile.mkdtemp(prefix=name))
        self.port = free_port()
        self.listen = f"{listen}:{self.port}"
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self.flags = list(flags)
        self.process = None
        # For doors with locks.
        self.locked = "--insecure-http" in flags
        self.token = None
        self.tls = None

    def __enter__(self):
        self.up()
        return self

    def __exit__(self, kind, *_):
        if kind:
            with contextlib.suppress(Exception):
                for job in self.get("/jobs?limit=20")["data"]:
                    lines = [f"{e['time']} {e['event']} {e['reason'] or ''} {json.dumps(e['data'])[:300]}" for e in self.events(job["job_id"])]
                    print(f"---- events of {job['job_id']}", *lines[-30:], sep="\n", file=sys.stderr)
                    pids = [str(r["pid"]) for r in self.summary(job["job_id"])["ranks"] if r["pid"]]
                    stacks = subprocess.run([BIN / "everlit-agent", "stacks", *pids], capture_output=True, text=True, timeout=20).stdout
                    print(f"---- what its ranks do\n{stacks[-6000:]}", file=sys.stderr)
            for log in ["up.log", "agent/agent.log"]:
                with contextlib.suppress(FileNotFoundError):
                    print(f"---- {log}\n{(self.data / log).read_text()[-3000:]}", file=sys.stderr)
        self.end()

    def up(self, wait=True):
        log = open(self.data / "up.log", "ab")
        command = [BIN / "everlit", "up", "--listen", self.listen, "--data-dir", self.data, *self.flags]
        self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        if wait:
            until("ready", self.is_ready, 20)
            until("a node", lambda: "an agent is linked" in (self.data / "up.log").read_text() if self.locked else self.get("/status")["nodes"]["ready"], 20)

    def is_ready(self):
        if self.process.poll() is not None:
            raise AssertionError("everlit up ended: " + (self.data / "up.log").read_text()[-2000:])
        with contextlib.suppress(OSError, Refused):
            self.get("/readyz")
            return True
        return False

    def kill(self):
        self.process.kill()
        self.process.wait()

    def interrupt(self, seconds=60):
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(seconds)

    def agent_pid(self):
        for folder in pathlib.Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):
                    line = (folder / "cmdline").read_bytes().split(b"\0")
                    if line[0].endswith(b"everlit-agent") and str(self.data / "agent").encode() in line:
                        return int(folder.name)
        return None

    def end(self):
        if self.process and self.process.poll() is None:
            with contextlib.suppress(Exception):
                for job in self.active():
                    self.post(f"/jobs/{job['job_id']}/stop?force=true")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.interrupt(20)
            if self.process.poll() is None:
                self.kill()
        agent = self.agent_pid()
        if agent:
            os.kill(agent, signal.SIGTERM)
            with contextlib.suppress(AssertionError):
                until("the agent's end", lambda: not is_alive(agent), 40)
        if self.own:
            shutil.rmtree(self.data, ignore_errors=True)

    def request(self, method, path, body=None, headers=None, raw=False, timeout=60):
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        own = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        headers = {**({"Content-Type": "application/json"} if data is not None else {}), **own, **(headers or {})}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with self.opener().open(request, timeout=timeout) as answer:
                text = answer.read()
                return text if raw else json.loads(text or b"null")
        except urllib.error.HTTPError as e:
            text = e.read()
            try:
                raise Refused(e.code, json.loads(text)) from None
            except json.JSONDecodeError:
                raise Refused(e.code, text) from None

    def opener(self):
        # Loopback goes through no proxy.
        return urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self.tls))

    def get(self, path, **more):
        return self.request("GET", path, **more)

    def post(self, path, body=None, **more):
        return self.request("POST", path, {} if body is None else body, **more)

    def active(self):
        return [j for j in self.get("/jobs?limit=500")["data"] if j["state"] not in ("succeeded", "failed", "stopped")]

    def submit(self, **job):
        return self.post("/jobs", job)["job_id"]

    def summary(self, job):
        return self.get(f"/jobs/{job}/summary")

    def state(self, job):
        return self.summary(job)["state"]

    def events(self, job):
        return self.get(f"/jobs/{job}/events?limit=500")["data"]

    def final(self, job, seconds=120):
        return until(f"job {job} final", lambda: (s := self.summary(job))["state"] in ("succeeded", "failed", "stopped") and s, seconds, 0.05)

    def running(self, job, seconds=60):
        def ready():
            summary = self.summary(job)
            assert summary["state"] not in ("succeeded", "failed", "stopped"), summary["reason"]
            return summary["state"] == "running" and all(r["pid"] for r in summary["ranks"]) and summary

        return until(f"job {job} running", ready, seconds)

    def at_step(self, job, step, seconds=120):
        def there():
            summary = self.summary(job)
            assert summary["state"] not in ("failed", "stopped"), summary["reason"]
            return (summary["step"] or 0) >= step and summary

        return until(f"job {job} at step {step}", there, seconds)

    def refused(self, method, path, body=None, **more):
        """The problem that the call is refused with."""
        try:
            answer = self.request(method, path, body, **more)
        except Refused as e:
            return e.status, e.body
        raise AssertionError(f"{method} {path} was not refused: {answer}")


def sse(response):
    """Events of an open stream as (id, event, data)."""
    fields = {}
    for line in response:
        line = line.decode().rstrip("\n")
        if not line:
            if "data" in fields:
                yield fields.get("id"), fields.get("event"), json.loads(fields["data"])
            fields = {}
        elif not line.startswith(":"):
            key, _, value = line.partition(": ")
            fields[key] = value


def run(checks, title):
    """Runs checks in order; names on the command line choose among them."""
    chosen = [c for c in checks if not sys.argv[1:] or c.__name__ in sys.argv[1:]]
    for check in chosen:
        started = time.monotonic()
        check()
        print(f"ok   {check.__name__} ({time.monotonic() - started:.1f} s)", flush=True)
    print(f"{title}: {len(chosen)} checks passed")
