"""Many agents at one coordinator: real `everlit-agent`s that joined over TLS, each with its own certificate, on loopback."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from joining import Cluster
from lib import until

WANTED = int(os.environ.get("EVERLIT_AGENTS", "200"))
# Each agent watches files: the kernel's bound is for each user, and others of this user need some.
INOTIFY = Path("/proc/sys/fs/inotify/max_user_instances")
OTHERS = 32


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid):
    """Resident and proportional megabytes: what it has, and what it has with each shared page split among those that share it."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return [int(re.search(rf"^{name}:\s+(\d+)", rollup, re.M)[1]) / 1024 for name in ("Rss", "Pss")]


def on_the_wire(port):
    """Bytes that came to and left from a port, of connections that are open now; None without `ss`."""
    try:
        text = subprocess.check_output(["ss", "-tinH", "sport", "=", f":{port}"], text=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    total = lambda name: sum(map(int, re.findall(rf"\b{name}:(\d+)", text)))
    return total("bytes_received") + total("bytes_acked")


def agents(row, runs):
    count = min(WANTED, int(INOTIFY.read_text()) - OTHERS)
    if count < WANTED:
        print(f"-- {count} agents, not {WANTED}: `sysctl fs.inotify.max_user_instances={WANTED + OTHERS}` lets one user run more", file=sys.stderr)
    with Cluster("--report-interval", "1s") as everlit:
        token = everlit.join_token(uses=count)
        started = time.monotonic()
        linked = lambda many: all(a.is_alive() for a in everlit.agents) and everlit.get("/status")["nodes"]["ready"] == many
        for n in range(count):
            everlit.join(f"n{n:03}", token=token, wait=False)
            # No more than handshakes of one address may be under way.
            if (n + 1) % 50 == 0 or n + 1 == count:
                until(f"{n + 1} linked", lambda: linked(n + 1), 60, 0.2)
        print(f"-- {count} agents joined and linked over TLS in {time.monotonic() - started:.1f} s", file=sys.stderr)
        # What joining cost is no part of what follows.
        time.sleep(10)
        shares, bytes_each = [], []
        for _ in range(runs):
            cpu, wire, at = cpu_seconds(everlit.process.pid), on_the_wire(everlit.port), time.monotonic()
            time.sleep(5)
            took = time.monotonic() - at
            shares.append((cpu_seconds(everlit.process.pid) - cpu) / took * 100)
            if wire is not None:
                bytes_each.append((on_the_wire(everlit.port) - wire) / took / count)
        late = max(node["report_age_seconds"] for node in everlit.get("/nodes?limit=500")["data"])
        row(f"{count} agents over TLS, a report each second: coordinator", shares, "% of core", 20)
        row(f"the oldest of {count} reports", [late], "s", 2.5)
        if bytes_each:
            row("bytes of TLS for an agent, both ways", bytes_each, "B/s", 2_000)
        own = [resident(agent.process.pid) for agent in everlit.agents]
        row("idle agent that joined, resident", [rss for rss, _ in own], "MB", 20)
        row("idle agent that joined, proportional", [pss for _, pss in own], "MB", 20)
        row(f"coordinator with {count} agents, resident", [resident(everlit.process.pid)[0]], "MB", 150)
