"""The figures of README: each the median of at least seven samples taken from the outside, with the target it is held against."""

import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import agents
import recovery
import store
import training
from lib import Everlit, is_alive, parent, until

LOAD = os.environ["EVERLIT_LOAD"]
RUNS = int(os.environ.get("EVERLIT_RUNS", "7"))
rows = []


def row(name, values, unit, target, better="less"):
    value = statistics.median(values)
    met = value <= target if better == "less" else value >= target
    rows.append({"what": name, "median": value, "min": min(values), "max": max(values), "samples": len(values), "unit": unit, "target": target, "met": met})
    print(f"{name:<58} {value:>12,.2f} {unit:<10} (min {min(values):,.2f}, max {max(values):,.2f}; target {target:g}) {'ok' if met else 'NOT MET'}", flush=True)


def load(everlit, *args):
    return json.loads(subprocess.check_output([LOAD, everlit.url, *map(str, args)], text=True))


def rss_mb(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def cpu_ticks(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def control():
    with Everlit() as everlit:
        load(everlit, "running", 10)
        answer = load(everlit, "running", 50)
        row("submit to RUNNING, trivial job", [answer["submit_to_running_ms"]["p50"]], "ms", 30)
        row("trivial jobs finished, 8 clients", [load(everlit, "finish", 1000, 8)["finished_per_second"] for _ in range(RUNS)], "per s", 300, "more")
        exits = []
        for _ in range(RUNS):
            job = everlit.submit(command=["sleep", "100"], restart={"max_restarts": 0})
            pid = everlit.running(job)["ranks"][0]["pid"]
            # The kill's own time against the time of the event that it caused in the coordinator, both by this machine's clock.
            killed = time.time()
            os.kill(pid, signal.SIGKILL)
            everlit.final(job)
            failed = [e for e in everlit.events(job) if e["event"] == "gang_failed"]
            exits.append((stamp(failed[0]["time"]) - killed) * 1000)
        row("kill -9 of a rank until the coordinator knows", exits, "ms", 20)
    accepted = []
    for _ in range(RUNS):
        with Everlit() as everlit:
            accepted.append(load(everlit, "submit", 32, 2)["accepted_per_second"])
    row("durable submissions accepted, 32 clients", accepted, "per s", 5000, "more")


def engine():
    events = 100_000
    with tempfile.TemporaryDirectory() as home:
        subprocess.run([os.environ["EVERLIT_ENGINE"], "--bench", "--quiet"], env=os.environ | {"CRITERION_HOME": home}, check=True, stdout=subprocess.DEVNULL)
        for name, what in (("beats", "heartbeats"), ("mixed", "events, a restart of a gang in 100")):
            sample = json.loads(pathlib.Path(home, "engine", name, "new", "sample.json").read_text())
            rates = [events * rounds / took * 1e9 for rounds, took in zip(sample["iters"], sample["times"])]
            row(f"engine, 1,000 jobs of 10 ranks: {what}", rates, "/s", 200_000, "more")


def stamp(text):
    import datetime

    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def logs():
    with Everlit() as everlit:
        row("a log line's age at an SSE reader", [load(everlit, "tail", 100)["line_age_ms"]["p50"] for _ in range(RUNS)], "ms", 20)
        answers = [load(everlit, "lines", 300_000) for _ in range(RUNS)]
        row("log lines through an SSE reader", [a["lines_per_second"] for a in answers], "per s", 100_000, "more")
        row("log lines lost or out of order", [a["lost"] + a["out_of_order"] for a in answers], "lines", 0)


def train():
    with Everlit() as everlit:
        firsts, rates = [], []
        for n in range(RUNS + 1):
            started = time.monotonic()
            job = everlit.submit(world_size=2, worker={"steps": 100000})
            until("the first step", lambda: all(r["step"] for r in everlit.summary(job)["ranks"]), 60, 0.01)
            # The first run warms the page cache and is not counted.
            firsts += [time.monotonic() - started] * (n > 0)
            finish(everlit, job)
        row("submit to first step, 2 ranks, 1M parameters", firsts, "s", 1.5)
        for _ in range(RUNS):
            job = everlit.submit(world_size=4, worker={"model": "mlp-10k", "steps": 10_000_000, "batch_size": 32}, checkpoint={"every_steps": 1_000_000})
            everlit.at_step(job, 50)
            first, at = everlit.summary(job)["step"], time.monotonic()
            time.sleep(4)
            rates.append((everlit.summary(job)["step"] - first) / (time.monotonic() - at))
            finish(everlit, job)
        row("mlp-10k, 4 ranks: steps of each rank", rates, "per s", 100, "more")


def finish(everlit, job):
    everlit.post(f"/jobs/{job}/stop", {"force": True})
    everlit.final(job)


def idle():
    with Everlit() as everlit:
        job = everlit.submit(command=["sleep", "1000"], world_size=8)
        pids = [r["pid"] for r in everlit.running(job)["ranks"]]
        shims = [parent(pid) for pid in pids]
        everyone = [everlit.process.pid, everlit.agent_pid(), *shims]
        assert all(map(is_alive, everyone))
        time.sleep(5)
        shares = []
        for _ in range(RUNS):
            before, at = sum(map(cpu_ticks, everyone)), time.monotonic()
            time.sleep(4)
            shares.append((sum(map(cpu_ticks, everyone)) - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - at) * 100)
        row("idle coordinator, resident", [rss_mb(everyone[0])], "MB", 30)
        row("idle agent, resident", [rss_mb(everyone[1])], "MB", 15)
        row("idle shim, resident", [rss_mb(shim) for shim in shims], "MB", 2.5)
        row("all of them with 8 quiet ranks: share of one core", shares, "%", 0.5)
    with Everlit() as everlit:
        load(everlit, "finish", 2000, 8)
        before = rss_mb(everlit.process.pid)
        for _ in range(int(os.environ.get("EVERLIT_PAST_JOBS", "10000")) // 2000):
            load(everlit, "finish", 2000, 8)
        row("coordinator's growth over 10,000 more past jobs", [rss_mb(everlit.process.pid) - before], "MB", 10)


AREAS = {
    "control": control,
    "engine": engine,
    "logs": logs,
    "train": train,
    "recovery": lambda: recovery.recovery(row),
    "large": lambda: recovery.large(row),
    "idle": idle,
    "agents": lambda: agents.agents(row, RUNS),
    "store": lambda: store.store(row, RUNS),
    "steps": lambda: training.steps(row),
    "checkpoint": lambda: training.checkpoint(row),
}

if __name__ == "__main__":
    chosen = sys.argv[1:] or list(AREAS)
    for area in chosen:
        AREAS[area]()
    pathlib.Path(os.environ["EVERLIT_RESULTS"]).write_text(json.dumps({"load_average": os.getloadavg(), "rows": rows}, indent=1))
    missed = [r["what"] for r in rows if not r["met"]]
    print(f"bench: {len(rows)} figures, {len(missed)} below target" + (": " + "; ".join(missed) if missed else ""))
