"""A real S3 server for checks, and a proxy in front of it that fails as it is told."""

import asyncio
import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request

from lib import free_port, until

KEY, SECRET = "everlit-check-key", "everlit-check-secret"
READER, READER_SECRET = "everlit-reader-key", "everlit-reader-secret"


# Loopback goes through no proxy.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def port_pair():
    """A port whose number and whose number plus 10,000 are free: the server takes both."""
    while True:
        port = free_port()
        if port < 50_000:
            with contextlib.suppress(OSError), socket.socket() as other:
                other.bind(("127.0.0.1", port + 10_000))
                return port


class Weed:
    """SeaweedFS with two users: one that may do everything in its buckets, and one that may only read."""

    def __init__(self, volumes=20):
        """With room for so many times 256 MB."""
        self.volumes = volumes

    def __enter__(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="everlit-s3-"))
        self.port, self.filer = port_pair(), port_pair()
        actions = ["Read", "Write", "List", "Tagging"]
        identity = lambda name, key, secret, actions: {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
        users = {"identities": [identity("everlit", KEY, SECRET, actions), identity("reader", READER, READER_SECRET, ["Read", "List"])]}
        (self.folder / "s3.json").write_text(json.dumps(users))
        (self.folder / "data").mkdir()
        ports = {"s3.port": self.port, "filer.port": self.filer, "master.port": port_pair(), "volume.port": port_pair()}
        command = [
            os.environ["EVERLIT_WEED"], "server", "-s3", f"-s3.config={self.folder}/s3.json", f"-dir={self.folder}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            f"-volume.max={self.volumes}", "-master.volumeSizeLimitMB=256", "-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0", *[f"-{name}={port}" for name, port in ports.items()],
        ]
        self.log = open(self.folder / "weed.log", "wb")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, cwd=self.folder)
        try:
            until("the S3 server", self.answers, 60)
            self.make("runs")
            # The first write waits for the first volume.
            until("a volume", lambda: self.put("runs/warm", b"x"), 60)
            self.remove("runs/warm")
        except BaseException:
            # Nobody else ends one that never came up.
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def answers(self):
        assert self.process.poll() is None, (self.folder / "weed.log").read_text()[-3000:]
        try:
            OPENER.open(f"http://127.0.0.1:{self.port}/", timeout=5).close()
        except urllib.error.HTTPError:
            return self.look("GET", "") is not None
        except OSError:
            return False
        return True

    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def look(self, method, path, data=None):
        """Past S3, straight at what is kept; None when it is not there."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.filer}/buckets/{urllib.parse.quote(path)}", data, {"Accept": "application/json"}, method=method)
        try:
            with OPENER.open(request, timeout=20) as answer:
                return answer.read()
        except (urllib.error.HTTPError, ConnectionError):
            return None

    def make(self, bucket):
        until("a bucket", lambda: self.look("PUT", bucket + "/") is not None, 20)

    def put(self, path, data):
        boundary = "everlit"
        body = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{path.rsplit("/", 1)[1]}"\r\n\r\n'.encode() + data + f"\r\n--{boundary}--\r\n".encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.filer}/buckets/{path}", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}, method="POST")
        try:
            with OPENER.open(request, timeout=20) as answer:
                return answer.status in (200, 201)
        except OSError:
            return False

    def get(self, path):
        return self.look("GET", path)

    def remove(self, path):
        self.look("DELETE", path)

    def keys(self, path):
        """Everything below a folder, by name from there."""
        found = []
        for entry in self.list(path):
            name = entry["FullPath"].removeprefix("/buckets/")
            if entry.get("Mode", 0) & (1 << 31):
                found += self.keys(name)
            else:
                found.append(name)
        return sorted(found)

    def list(self, path):
        request = urllib.request.Request(f"http://127.0.0.1:{self.filer}/buckets/{urllib.parse.quote(path)}/?limit=10000", headers={"Accept": "application/json"})
        try:
            with OPENER.open(request, timeout=20) as answer:
                return json.loads(answer.read()).get("Entries") or []
        except urllib.error.HTTPError:
            return []

    def committed(self, job, bucket="runs"):
        """Steps with a manifest, oldest first."""
        names = [name.split("/") for name in self.keys(f"{bucket}/{job}")]
        return sorted(int(name[2].removeprefix("step-")) for name in names if name[-1] == "MANIFEST.json")


class Proxy:
    """In front of a server. `rule(method, path)` answers what happens to a request: None (it goes through), a number (that status, with an
    S3 error), "skew" (the clock that signed is an hour behind), "refuse", "cut" (half of the answer), "alter" (a byte of the answer is another), ("wait", seconds)."""

    def __init__(self, port):
        self.to = port
        self.rule = lambda method, path: None
        self.fired = {}
        self.seen = []

    def __enter__(self):
        self.loop = asyncio.new_event_loop()
        started = threading.Event()

        async def begin():
            self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
            self.port = self.server.sockets[0].getsockname()[1]
            started.set()

        def work():
            asyncio.set_event_loop(self.loop)
            self.loop.run_until_complete(begin())
            self.loop.run_forever()

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()
        started.wait(10)
        return self

    def __exit__(self, *_):
        async def end():
            self.server.close()
            for task in asyncio.all_tasks():
                if task is not asyncio.current_task():
                    task.cancel()
            await asyncio.sleep(0)
            self.loop.call_soon(self.loop.stop)

        asyncio.run_coroutine_threadsafe(end(), self.loop)
        self.thread.join(10)

    def url(self):
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode("latin-1").split("\r\n")
                method, path, _ = lines[0].split(" ")
                fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)}
                body = await reader.readexactly(int(fields.get("content-length", 0)))
                if not await self.answer(writer, method, path, head, body):
                    break
        writer.close()

    async def answer(self, writer, method, path, head, body):
        action = self.rule(method, path)
        self.seen.append((method, path, action))
        if action is not None:
            self.fired[str(action)] = self.fired.get(str(action), 0) + 1
        if action == "refuse":
            return False
        if isinstance(action, tuple):
            await asyncio.sleep(action[1])
        if isinstance(action, int) or action == "skew":
            code = {"skew": "RequestTimeTooSkewed", 403: "AccessDenied", 404: "NoSuchKey", 409: "OperationAborted", 412: "PreconditionFailed", 429: "TooManyRequests", 500: "InternalError", 503: "SlowDown", 507: "InsufficientStorage"}[action]
            times = "<RequestTime>20260101T000000Z</RequestTime><ServerTime>2026-01-01T01:00:00Z</ServerTime>" if action == "skew" else ""
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>the proxy says so</Message>{times}</Error>".encode()
            writer.write(f"HTTP/1.1 {403 if action == 'skew' else action} X\r\nContent-Type: application/xml\r\nContent-Length: {len(text)}\r\n\r\n".encode() + (b"" if method == "HEAD" else text))
            await writer.drain()
            return True
        reader, other = await asyncio.open_connection("127.0.0.1", self.to)
        try:
            other.write(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1) + body)
            await other.drain()
            answer = await reader.read(-1)
        finally:
            other.close()
        begin, _, rest = answer.partition(b"\r\n\r\n")
        if action == "cut" and len(rest) > 1:
            writer.write(begin + b"\r\n\r\n" + rest[: len(rest) // 2])
            await writer.drain()
            return False
        if action == "alter" and len(rest) > 100:
            rest = rest[:-50] + bytes([rest[-50] ^ 1]) + rest[-49:]
        writer.write(begin + b"\r\n\r\n" + rest)
        await writer.drain()
        return False
