"""What is no frame, at the agents' door, from the outside (scripts/e2e-nodes.sh): each is told why, and who belongs here goes on."""

import base64
import contextlib
import json
import os
import socket
import struct
import time

from lib import Everlit, run, until

TEXT, BINARY, CLOSE, PING = 1, 2, 8, 9
MIB = 1 << 20


class Bare(Everlit):
    """A coordinator without an agent."""

    def __init__(self):
        super().__init__("--no-local-agent")

    def up(self, wait=True):
        super().up(wait=False)
        until("ready", self.is_ready, 20)


class Closed(Exception):
    """The coordinator's close frame, or the end without one."""


class Agent:
    """An agent of this machine, as far as the wire shows."""

    def __init__(self, everlit):
        told = json.loads((everlit.data / "coordinator.json").read_text())
        host, port = told["url"].removeprefix("http://").rstrip("/").split(":")
        self.raw = socket.create_connection((host, int(port)), timeout=20)
        key = base64.b64encode(os.urandom(16)).decode()
        self.raw.sendall(
            f"GET /agent/link HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: {key}\r\nAuthorization: Bearer {told['token']}\r\n\r\n".encode()
        )
        self.left = b""
        while b"\r\n\r\n" not in self.left:
            self.left += self.raw.recv(4096) or b"\r\n\r\n"
        head, self.left = self.left.split(b"\r\n\r\n", 1)
        assert b" 101 " in head.splitlines()[0], head

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.raw.close()

    def send(self, payload, kind=TEXT):
        data = payload if isinstance(payload, bytes) else (payload if isinstance(payload, str) else json.dumps(payload)).encode()
        size = len(data)
        head = struct.pack("!BB", 0x80 | kind, 0x80 | (size if size < 126 else 126 if size < 65536 else 127))
        head += b"" if size < 126 else struct.pack("!H", size) if size < 65536 else struct.pack("!Q", size)
        # A mask of zeros is a mask.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.raw.sendall(head + bytes(4) + data)
        return self

    def exactly(self, count):
        while len(self.left) < count:
            more = self.raw.recv(65536)
            if not more:
                raise Closed("without a word")
            self.left += more
        taken, self.left = self.left[:count], self.left[count:]
        return taken

    def next(self):
        """The next frame of text; a close frame is raised."""
        while True:
            first, second = self.exactly(2)
            size = second & 127
            size = struct.unpack("!H", self.exactly(2))[0] if size == 126 else struct.unpack("!Q", self.exactly(8))[0] if size == 127 else size
            data = self.exactly(size)
            if first & 15 == CLOSE:
                raise Closed(data[2:].decode())
            if first & 15 == TEXT:
                return json.loads(data)

    def told(self):
        """Why the link ended."""
        try:
            while True:
                frame = self.next()
                if frame["type"] == "refused":
                    return frame["reason"]
        except Closed as why:
            return str(why)


def hello(name, **more):
    capacity = {"cpus": 1.0, "memory": 1 << 30, "gpus": [], "slots": 4}
    base = {"type": "hello", "protocol": 1, "node": name, "boot_id": "b", "version": "0", "pid": 1, "capacity": capacity}
    return {**base, "ranks": [], "checkpoints": [], "draining": False, **more}


def what_is_no_frame_ends_the_link_and_is_told():
    with Everlit() as everlit:
        running = everlit.submit(command=["sleep", "600"])
        before = everlit.running(running)

        def refused(*said, opened=True, kind=TEXT):
            with Agent(everlit) as agent:
                if opened:
                    agent.send(hello("odd"))
                    assert agent.next()["type"] == "welcome"
                for frame in said:
                    agent.send(frame, kind)
                return agent.told()

        cases = {
            "no JSON at first": refused("not json", opened=False),
            "another frame than hello at first": refused({"type": "draining"}, opened=False),
            "a later protocol": refused(hello("odd", protocol=99), opened=False),
            "a second hello": refused(hello("odd")),
            "no UTF-8": refused(b"\xff\xfe", kind=TEXT),
            "a frame of 16 MiB and one byte": refused(b'"' + b"x" * (16 * MIB) + b'"'),
        }
        for what, why in cases.items():
            print(f"     {what}: {why[:150] or chr(45)}")
        assert "protocol" in cases["a later protocol"] and "install the same version" in cases["a later protocol"], cases
        for what in ("no JSON at first", "another frame than hello at first", "a second hello"):
            assert "hello" in cases[what].lower(), (what, cases[what])
        assert cases["a frame of 16 MiB and one byte"] and cases["no UTF-8"], cases
        # What a later agent may say is passed over: unknown words, unknown fields, and what is nested deeply.
        with Agent(everlit) as agent:
            agent.send(hello("new", hours_from_now=1))
            assert agent.next()["type"] == "welcome"
            agent.send({"type": "of_the_future", "x": 1}).send("[" * 100_000).send({"type": "beats", "beats": [], "more": {}})
            agent.send(bytes(33) + b"of a log stream that nobody opened", BINARY).send(b"", BINARY)
            until("it is linked", lambda: any(n["node"] == "new" and n["state"] == "ready" for n in everlit.get("/nodes")["data"]), 10)
            agent.send("", PING)
            time.sleep(0)
            assert any(n["node"] == "new" and n["state"] == "ready" for n in everlit.get("/nodes")["data"])
        # Nobody else has noticed.
        after = everlit.running(running)
        assert (after["attempt"], after["restarts"], after["ranks"][0]["pid"]) == (1, 0, before["ranks"][0]["pid"]), after
        everlit.post(f"/jobs/{running}/stop?force=true")


def times_that_can_not_be_right_change_nothing():
    with Bare() as everlit:
        day = 24 * 3_600_000
        for name, skew in [("ahead", 9 * day), ("behind", -9 * day)]:
            job = everlit.submit(command=["true"])

            def now(skew=skew):
                return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() + skew / 1_000)) + ".000Z"

            with Agent(everlit) as agent:
                agent.send(hello(name))
                frame = agent.next()
                while frame["type"] != "start_gang":
                    frame = agent.next()
                incarnation = f"{job}-a{frame['attempt']}-r0"
                agent.send({"type": "resumed", "job": job, "attempt": frame["attempt"], "step": None, "path": None, "quarantined": []})
                agent.send({"type": "started", "incarnation": incarnation, "pid": 4_000_000, "at": now()})
                everlit.running(job)
                exit_ = {"code": 0, "signal": None, "error": None, "at": now(), "tail": [], "message": None}
                agent.send({"type": "exited", "incarnation": incarnation, "exit": exit_, "lost": False})
                end = everlit.final(job)
            assert end["state"] == "succeeded", end
            parts = end["ledger"]
            assert all(0 <= seconds < 60 for seconds in parts.values()), parts
            at = [end[name] for name in ("submitted_at", "started_at", "finished_at")]
            assert at == sorted(at), at
            told = end["ranks"][0]["exit"]["at"]
            assert at[0] <= told <= at[2], (told, at)
            print(f"     a clock 9 days {name}: succeeded, {sum(parts.values()):.1f} s in all")


CHECKS = [what_is_no_frame_ends_the_link_and_is_told, times_that_can_not_be_right_change_nothing]

if __name__ == "__main__":
    run(CHECKS, "frames")
