"""Connections that come in numbers and say nothing, from the outside (scripts/e2e-nodes.sh): who belongs here still comes in."""

import contextlib
import resource
import select
import socket
import ssl
import time

from joining import Cluster
from lib import run, until

# Loopback has more addresses than one: floods come from these, and who belongs here from 127.0.0.1.
STRANGERS = ["127.0.0.2", "127.0.0.3"]
HELD = 2_000
OF_ONE_MAX = 1_024
HEADER = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Half: "


class Flood:
    """Connections that are held open. As a context it closes them."""

    def __init__(self, everlit):
        self.everlit, self.all = everlit, []
        self.tls = ssl.create_default_context(cafile=everlit.data / "ca/ca.pem")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for one in self.all:
            with contextlib.suppress(OSError):
                one.close()

    def open(self, address, how):
        raw = socket.create_connection(("127.0.0.1", self.everlit.port), timeout=20, source_address=(address, 0))
        if how == "half a handshake":
            raw.sendall(b"\x16\x03\x01\x02\x00\x01\x00")
        elif how in ("TLS", "half a header"):
            try:
                raw = self.tls.wrap_socket(raw, server_hostname="127.0.0.1")
            except (OSError, ssl.SSLError):
                return
            if how == "half a header":
                raw.sendall(HEADER)
        raw.setblocking(False)
        self.all.append(raw)

    def held(self):
        """How many the other end has not hung up on."""
        poll = select.poll()
        for one in self.all:
            poll.register(one, select.POLLRDHUP)
        return len(self.all) - len(poll.poll(0))


def health(everlit):
    begun = time.monotonic()
    assert everlit.get("/health", timeout=10)
    return (time.monotonic() - begun) * 1_000


def who_belongs_here_comes_in_while_thousands_say_nothing():
    with Cluster() as everlit:
        first = everlit.join("before")
        with Flood(everlit) as flood:
            begun = time.monotonic()
            for n in range(HELD):
                flood.open(STRANGERS[n % 2], "half a header" if n % 4 == 0 else "TLS")
            made = time.monotonic() - begun
            # More than handshakes of one address may be under way: these wait for nothing but their time.
            for n in range(400):
                flood.open(STRANGERS[n % 2], "half a handshake" if n % 2 else "nothing")
            held = flood.held()
            assert held >= HELD, f"{held} are held: made in {made:.1f} s"
            answers = [health(everlit) for _ in range(20)]
            begun = time.monotonic()
            everlit.join("late")
            joined = time.monotonic() - begun
            still = flood.held()
            assert still >= HELD * 9 // 10, f"{still} were still held when it had joined"
            assert first.is_alive() and everlit.node("before")["state"] == "ready"
            print(f"     {held} held ({made:.1f} s to make): /health in {max(answers):.1f} ms at most, a server joined in {joined:.2f} s, {still} still held")
            until("all are hung up on", lambda: flood.held() == 0, 90, 0.5)
            print(f"     all were hung up on {time.monotonic() - begun:.0f} s later")
            assert first.is_alive() and everlit.node("before")["state"] == "ready"


def one_address_has_its_share_and_no_more():
    with Cluster() as everlit:
        agent = everlit.join("own")
        with Flood(everlit) as flood:
            for _ in range(OF_ONE_MAX + 200):
                flood.open(STRANGERS[0], "TLS")
            until("no more than its share", lambda: flood.held() <= OF_ONE_MAX, 20)
            assert flood.held() >= OF_ONE_MAX - 20, flood.held()
            log = (everlit.data / "up.log").read_text()
            assert log.count("a connection is turned away: its address has as many connections as one may have") == 1, log[-2000:]
            assert health(everlit) < 5_000 and agent.is_alive()
            print(f"     {flood.held()} of {OF_ONE_MAX + 200} are held")


CHECKS = [who_belongs_here_comes_in_while_thousands_say_nothing, one_address_has_its_share_and_no_more]

if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    run(CHECKS, "flood")
