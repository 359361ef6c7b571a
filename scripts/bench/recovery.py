"""Recovery figures: kill -9 of one of two ranks until both are through their next step, ours and torchrun's in turn in one run."""

import contextlib
import os
import pathlib
import signal
import statistics
import socket
import subprocess
import tempfile
import threading
import time

from lib import Everlit, free_port, is_alive, until

PYTHON = os.environ.get("EVERLIT_PYTHON")
# Kills of each kind; in place they are quick, so there are many of them.
KILLS = int(os.environ.get("EVERLIT_RECOVERY_KILLS", "200"))
PEER_KILLS = int(os.environ.get("EVERLIT_PEER_KILLS", "21"))
LARGE_KILLS = int(os.environ.get("EVERLIT_LARGE_KILLS", "5"))
ROUNDS = 3
HERE = pathlib.Path(__file__).resolve().parent
TEXT = str(min(pathlib.Path(os.environ["EVERLIT_BIN"], "sample-text").glob("*.txt"), default=""))
# A gang without a step for so long does not come back by itself.
STUCK_SECONDS = 45


def parts(total):
    return [total // ROUNDS + (n < total % ROUNDS) for n in range(ROUNDS)]


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def ours(kills, lost, less_backoff, **restart):
    """Seconds from each kill of a rank of the built-in program, ranks in turn, to a step of all."""
    times = []
    with Everlit() as everlit:
        policy = {"max_restarts": 100_000, "max_start_failures": 1_000, "backoff": {"jitter": 0}, **restart}
        job = everlit.submit(world_size=2, worker={"steps": 1_000_000}, checkpoint={"every_steps": 20}, restart=policy)
        for n in range(kills):
            before = until("steps of its own", lambda: ready(everlit, job, n, restart), 120, 0.02)
            started = time.monotonic()
            os.kill(before["ranks"][n % 2]["pid"], signal.SIGKILL)

            def again():
                now = everlit.summary(job)
                assert now["state"] not in ("failed", "stopped", "succeeded"), now["reason"]
                through = now["state"] == "running" and now["restarts"] == n + 1
                return through and all(r["pid"] and r["step"] for r in now["ranks"])

            until("every rank's next step", again, 120, 0.005)
            took = time.monotonic() - started
            if less_backoff:
                took -= [e["data"]["delay_ms"] for e in newest_events(everlit, job) if e["event"] == "restart_scheduled"][-1] / 1000
            times.append(took)
        lost.append(everlit.summary(job)["lost_steps"])
        everlit.post(f"/jobs/{job}/stop", {"force": True})
        everlit.final(job)
    return times


def ready(everlit, job, restarts, restart):
    """Between two kills: every rank has done a few steps, saved, and, in place, a spare waits."""
    summary = everlit.summary(job)
    if summary["state"] != "running" or summary["restarts"] != restarts or not all(r["pid"] and r["step"] for r in summary["ranks"]):
        return None
    marks = everlit.__dict__.setdefault("marks", {"highest": 0})
    # Past everything that was done before: a gang that fails without a new step waits longer each time.
    first, since = marks.setdefault(restarts, (max(marks["highest"], summary["step"]), time.monotonic()))
    marks["highest"] = max(marks["highest"], summary["step"])
    spares = all(s["pid"] and s["phase"] == "load" for s in summary["spares"]) and len(summary["spares"]) == restart.get("spares", 0)
    # A new spare is warm a second after its start.
    settled = time.monotonic() - since > (1.5 if restart.get("spares") else 0.5)
    return summary if summary["step"] >= first + 3 and spares and settled and summary["last_checkpoint"] else None


def newest_events(everlit, job):
    events, after = [], ""
    while True:
        page = everlit.get(f"/jobs/{job}/events?limit=500{after}")
        events += page["data"]
        if not page["has_more"]:
            return events
        after = f"&after={page['last_id']}"


def reported(folder, rank):
    with contextlib.suppress(FileNotFoundError, ValueError):
        path = folder / f"rank-{rank}"
        pid, step = path.read_text().split()
        return int(pid), int(step), path.stat().st_mtime
    return None


def stepping(folder, since):
    """Process ids of both ranks when both have done a step since a time, and live."""
    found = [reported(folder, rank) for rank in (0, 1)]
    if all(found) and all(at > since and is_alive(pid) for pid, _, at in found):
        return [pid for pid, _, _ in found]
    return None


def kill_in_turn(folder, kills, again):
    """Kills ranks of a script in turn. Seconds to the next step of both; those that did not come back by themselves are None."""
    times = []
    reached = 0

    def further():
        """Both step, beyond what was reached before: whoever is killed each time before that is in a crash loop, and may be given up."""
        pids = stepping(folder, time.time() - 2)
        return pids if pids and min(reported(folder, rank)[1] for rank in (0, 1)) > reached else None

    for n in range(kills):
        pids = until("both ranks step", further, 120, 0.02)
        time.sleep(1)
        pids = stepping(folder, time.time() - 2) or pids
        reached = max(reported(folder, rank)[1] for rank in (0, 1))
        since, started = time.time(), time.monotonic()
        os.kill(pids[n % 2], signal.SIGKILL)
        try:
            until("the next step of both", lambda: stepping(folder, since + 0.05) and reported(folder, n % 2)[0] != pids[n % 2], STUCK_SECONDS, 0.01)
            times.append(time.monotonic() - started)
        except AssertionError:
            times.append(None)
            again()
    return times


def torchrun(kills):
    with tempfile.TemporaryDirectory() as temp:
        folder = pathlib.Path(temp)
        state = {}

        def start():
            end(state.get("process"))
            command = [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1000", "--master-port", str(free_port())]
            state["process"] = subprocess.Popen(
                [*command, str(HERE / "ddp_restart.py"), str(folder), TEXT], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
            )

        start()
        try:
            return kill_in_turn(folder, kills, start)
        finally:
            end(state["process"])


def end(process):
    """A launcher and its ranks, which are sessions and groups of their own below it."""
    if process is None or process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(40)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def script_under_us(kills):
    with Everlit() as everlit, tempfile.TemporaryDirectory() as temp:
        command = [PYTHON, str(HERE / "ddp_restart.py"), temp, TEXT]
        job = everlit.submit(world_size=2, command=command, restart={"max_restarts": 1000, "backoff": {"jitter": 0}})
        times = kill_in_turn(pathlib.Path(temp), kills, lambda: everlit.post(f"/jobs/{job}/restart"))
        everlit.post(f"/jobs/{job}/stop", {"force": True})
        everlit.final(job)
        return times


def recovery(row):
    in_place, spare, gang, peer, script = [], [], [], [], []
    lost = []
    for few, some, peers in zip(parts(KILLS), parts(max(3, KILLS // 8)), parts(PEER_KILLS)):
        in_place += ours(few, lost, False)
        spare += ours(few, lost, False, spares=1)
        gang += ours(some, [], True, scope="gang")
        if PYTHON:
            peer += torchrun(peers)
            script += script_under_us(peers)
    for name, times, target in [("in place", in_place, 1.0), ("in place with a spare", spare, 0.5)]:
        row(f"kill -9 of a rank to the next step of all, {name}", times, "s", target)
        row(f"  99th percentile of {len(times)} kills", [percentile(times, 0.99)], "s", target)
    row("  steps lost in place, all kills together", [sum(lost)], "steps", len(in_place) + len(spare))
    row("the gang from its snapshot, less backoff", gang, "s", 1.2)
    if PYTHON:
        back = [t for t in peer if t]
        row("torchrun with a DDP script, where it came back", back or [STUCK_SECONDS], "s", 1_000)
        row(f"  kills of {len(peer)} after which it did not step for {STUCK_SECONDS} s", [peer.count(None)], "kills", 1_000)
        row("ours over torchrun's", [statistics.median(in_place) / statistics.median(back or [STUCK_SECONDS])], "x", 0.25)
        row("the same script under us, with the backoff of 0.5 s", [t for t in script if t] or [STUCK_SECONDS], "s", 1_000)
        row(f"  kills of {len(script)} that it did not survive", [script.count(None)], "kills", 0)


def loopback_seconds(size):
    """To send so many bytes over a TCP connection on loopback."""
    piece = 8 << 20
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    with sender, receiver:
        data, buffer, left = bytes(piece), bytearray(piece), size
        started = time.monotonic()
        thread = threading.Thread(target=lambda: [sender.sendall(data) for _ in range(-(-size // piece))])
        thread.start()
        while left > 0:
            left -= receiver.recv_into(buffer)
        took = time.monotonic() - started
        thread.join()
    return took


def large(row):
    """Eight ranks with 1 GB of state each, of which one is killed: the next step of all, less what a step of all takes anyway."""
    sizes = {"dim": 1024, "layers": 7, "heads": 16, "kv_heads": 4, "hidden": 3072}
    state = 12 * (7 * (2 * 1024 * 1024 + 2 * 1024 * 256 + 3 * 1024 * 3072) + 2 * 256 * 1024)
    worker = {"model": sizes, "sequence_length": 8, "batch_size": 8, "steps": 1_000_000}
    copies = [loopback_seconds(state) for _ in range(3)]
    spent, clean = [], []
    with Everlit() as everlit:
        job = everlit.submit(world_size=8, worker=worker, checkpoint={"every_steps": 1_000_000}, restart={"max_restarts": 1000, "backoff": {"jitter": 0}})

        def at(step):
            summary = everlit.summary(job)
            assert summary["state"] not in ("failed", "stopped", "succeeded"), summary["reason"]
            return summary if all(r["pid"] and (r["step"] or 0) >= step for r in summary["ranks"]) else None

        until("first steps", lambda: at(2), 600, 0.05)
        for n in range(LARGE_KILLS):
            first = everlit.summary(job)["step"]
            until("a step", lambda first=first: at(first + 1), 300, 0.01)
            begun = time.monotonic()
            before = until("two clean steps", lambda first=first: at(first + 3), 300, 0.01)
            clean.append((time.monotonic() - begun) / 2)
            started = time.monotonic()
            os.kill(before["ranks"][(3 * n + 1) % 8]["pid"], signal.SIGKILL)
            again = until("the next step of all", lambda n=n: (now := at(first + 4)) and now["restarts"] == n + 1 and now, 300, 0.01)
            spent.append(time.monotonic() - started)
            assert again["lost_steps"] == 0, again["lost_steps"]
        recovered = [e["data"] for e in newest_events(everlit, job) if e["event"] == "recovered_in_place"]
        everlit.post(f"/jobs/{job}/stop", {"force": True})
        everlit.final(job)
    assert len(recovered) == LARGE_KILLS, f"{len(recovered)} of {LARGE_KILLS} kills were recovered in place"
    copy, step = statistics.median(copies), statistics.median(clean)
    row(f"{state / 1e9:.2f} GB over loopback by one connection", copies, "s", 1_000)
    row("a clean step of 8 ranks with that state", clean, "s", 1_000)
    row("kill -9 of one of them to the next step of all, less that step", [took - step for took in spent], "s", 0.5 + copy)
