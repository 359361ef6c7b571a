"""Hosts in network namespaces: a bridge on this machine, a namespace for each host, and cuts between them. Needs root."""

import contextlib
import os
import subprocess

from joining import Agent, Cluster

NET = "10.201.{}".format(os.getpid() % 250)
BRIDGE = f"evl{os.getpid() % 100000}"


def ip(*words, check=True):
    return subprocess.run(["ip", *map(str, words)], check=check, capture_output=True, text=True)


class Hosts(Cluster):
    """A coordinator on a bridge, and hosts beside it."""

    def __init__(self, *flags, names=("a", "b", "c"), **more):
        super().__init__(*flags, **more)
        self.names = list(names)
        self.url = f"https://{NET}.1:{self.port}"

    def namespace(self, name):
        return f"{BRIDGE}-{name}"

    def __enter__(self):
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for index, name in enumerate(self.names):
            own, port = self.namespace(name), f"{BRIDGE}{name}"
            ip("netns", "add", own)
            ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", own)
            ip("link", "set", port, "master", BRIDGE, "up")
            ip("-n", own, "addr", "add", f"{NET}.{11 + index}/24", "dev", "eth0")
            ip("-n", own, "link", "set", "eth0", "up")
            ip("-n", own, "link", "set", "lo", "up")
        return super().__enter__()

    def __exit__(self, *why):
        try:
            super().__exit__(*why)
        finally:
            for name in self.names:
                ip("netns", "del", self.namespace(name), check=False)
                ip("link", "del", f"{BRIDGE}{name}", check=False)
            ip("link", "del", BRIDGE, check=False)

    def join_all(self, *flags):
        token = self.join_token(uses=len(self.names))
        for name in self.names:
            self.join(name, *flags, token=token)

    def join(self, name, *flags, **more):
        with inside(self.namespace(name)):
            return super().join(name, *flags, **more)

    def agent(self, name):
        return next(agent for agent in self.agents if agent.name == name)

    def cut(self, name):
        """Nothing goes to or from a host any more, and nobody is told."""
        ip("link", "set", f"{BRIDGE}{name}", "down")

    def heal(self, name):
        ip("link", "set", f"{BRIDGE}{name}", "up")


@contextlib.contextmanager
def inside(namespace):
    """Agents that are started here begin in that namespace."""
    before = Agent.PREFIX
    Agent.PREFIX = ["ip", "netns", "exec", namespace]
    try:
        yield
    finally:
        Agent.PREFIX = before
