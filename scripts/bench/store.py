"""Checkpoints in a bucket: a real S3 server on loopback, its own client beside us, and training with and without uploads."""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

from lib import BIN, Everlit, until
from stores import KEY, SECRET, Weed

FILES, FILE_MB = 4, 256
PYTHON = pathlib.Path(__file__).parents[2] / "worker" / "python"
# Commits what the check has made, says its first word once it has begun from it, and waits to be told to end.
WRITER = f"""
set -e
draft=$EVERLIT_CHECKPOINT_DIR/new
mkdir "$draft"
for n in 1 2 3 4; do head -c {FILE_MB}M "$SOURCE" > "$draft/part-$n.bin"; done
"{BIN}/everlit-agent" checkpoint commit "$draft" --step 100
sleep 1000
"""
# Reads every shard as it comes, then again and again: as they come, and the same files from a folder. It prints the first epoch's time
# and the others' pairs, all in seconds.
SHARDS, SHARD_MB = 64, 8
EPOCHS = """
import os, sys, time
import everlit

def epoch(paths):
    began = time.monotonic()
    length = 0
    for path in paths:
        with open(path, "rb") as file:
            length += len(file.read())
    assert length == int(os.environ["BYTES"]), length
    return time.monotonic() - began

folder, rounds = os.environ["COPY"], int(os.environ["ROUNDS"])
local = lambda: epoch(os.path.join(folder, name) for name in sorted(os.listdir(folder)))
cached = lambda: epoch(everlit.stream_shards())
print("first", cached(), flush=True)
local()
for n in range(rounds):
    pair = (cached(), local()) if n % 2 else (local(), cached())[::-1]
    print("pair", *pair, flush=True)
"""
READER = 'test -e "$EVERLIT_RESUME_FROM/MANIFEST.json" && echo begun; sleep 1000'


def opened(weed):
    return {"env": {"AWS_ENDPOINT_URL": weed.url(), "AWS_REGION": "us-east-1"}, "secrets": {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}}


def timed(*commands):
    """Seconds that commands take beside each other."""
    began = time.monotonic()
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for command in commands]
    assert [process.wait() for process in running] == [0] * len(running), commands
    os.sync()
    return time.monotonic() - began


def event(everlit, job, name):
    return next((e for e in everlit.events(job) if e["event"] == name), None)


def store(row, runs):
    with tempfile.TemporaryDirectory() as folder, Weed(volumes=60) as weed, Everlit() as everlit:
        folder = pathlib.Path(folder)
        source = folder / "source"
        source.write_bytes(os.urandom(FILE_MB << 20))
        ups, downs, firsts = [], [], []
        for run in range(min(runs, 3)):
            settings = opened(weed)
            settings["env"] = {**settings["env"], "SOURCE": str(source)}
            job = everlit.submit(command=["sh", "-c", WRITER], checkpoint={"to": "s3://runs", "copies": 0}, **settings)
            stored = until("it is in the bucket", lambda: event(everlit, job, "checkpoint_stored"), 300, 0.1)
            mine = FILES * FILE_MB / (stored["data"]["took_ms"] / 1000)
            own = folder / "own"
            own.mkdir(exist_ok=True)
            for n in range(FILES):
                (own / f"{run}-{n}.bin").write_bytes(os.urandom(FILE_MB << 20))
            took = timed([os.environ["EVERLIT_WEED"], "filer.copy", *(str(own / f"{run}-{n}.bin") for n in range(FILES)), f"http://127.0.0.1:{weed.filer}/buckets/runs/own/"])
            ups.append(mine / (FILES * FILE_MB / took) * 100)
            print(f"-- up: {mine:.0f} MB/s, the server's own client {FILES * FILE_MB / took:.0f} MB/s", file=sys.stderr)
            everlit.post(f"/jobs/{job}/stop", {"force": True})
            everlit.final(job)
            # Down: into an empty folder, until the rank has begun from it; its client: the same four files beside each other.
            began = time.monotonic()
            again = everlit.submit(command=["sh", "-c", READER], resume_from=f"s3://runs/{job}", **settings)
            until("it has begun", lambda: b"begun" in everlit.get(f"/jobs/{again}/logs", raw=True), 300, 0.05)
            first = time.monotonic() - began
            cat = [os.environ["EVERLIT_WEED"], "filer.cat", "-o"]
            took = timed(*([*cat, str(folder / f"got-{n}"), f"http://127.0.0.1:{weed.filer}/buckets/runs/own/{run}-{n}.bin"] for n in range(FILES)))
            downs.append(took / first * 100)
            firsts.append(first / took)
            print(f"-- down and begun: {first:.2f} s, the server's own client {took:.2f} s", file=sys.stderr)
            everlit.post(f"/jobs/{again}/stop", {"force": True})
            everlit.final(again)
        row("1 GB to the bucket, of the server's own client's speed", ups, "%", 85, "more")
        row("1 GB from the bucket and begun, over its client's time", firsts, "times", 1.2)
    with Weed() as weed, Everlit() as everlit:
        shares = []
        for _ in range(runs):
            rates = []
            for to in (None, "s3://runs"):
                place = {"to": to} if to else {}
                job = everlit.submit(world_size=2, worker={"model": "llama-1m", "steps": 1_000_000, "batch_size": 16}, checkpoint={"every_steps": 50, **place}, **opened(weed))
                everlit.at_step(job, 50)
                first, at = everlit.summary(job)["step"], time.monotonic()
                time.sleep(20)
                rates.append((everlit.summary(job)["step"] - first) / (time.monotonic() - at))
                everlit.post(f"/jobs/{job}/stop", {"force": True})
                everlit.final(job)
            shares.append(rates[1] / rates[0] * 100)
        row("steps with uploads each 50 steps, of those without", shares, "%", 98, "more")
    epochs(row, runs)


def epochs(row, runs):
    with tempfile.TemporaryDirectory() as folder, Weed() as weed, Everlit() as everlit:
        for n in range(SHARDS):
            content = os.urandom(SHARD_MB << 20)
            (pathlib.Path(folder) / f"{n:03}.bin").write_bytes(content)
            assert weed.look("PUT", f"runs/data/{n:03}.bin", content) is not None
        settings = opened(weed)
        env = {"PYTHONPATH": str(PYTHON), "COPY": folder, "BYTES": str(SHARDS * SHARD_MB << 20), "ROUNDS": str(max(runs, 3) * 3)}
        settings["env"] = {**settings["env"], **env}
        job = everlit.submit(command=["python3", "-c", EPOCHS], data={"shards": ["s3://runs/data/"], "stream": True}, **settings)
        assert everlit.final(job)["state"] == "succeeded", everlit.get(f"/jobs/{job}/logs", raw=True)
        said = [line.split() for line in everlit.get(f"/jobs/{job}/logs", raw=True).decode().splitlines()]
        pairs = [(float(cached), float(local)) for _, cached, local in (line[-3:] for line in said if "pair" in line)]
        first = next(float(line[-1]) for line in said if "first" in line)
        print(f"-- {SHARDS * SHARD_MB} MB: first epoch {first:.2f} s, then {min(c for c, _ in pairs):.3f} s from the cache, {min(l for _, l in pairs):.3f} s from a folder", file=sys.stderr)
        row("epochs after the first, of local files' speed", [local / cached * 100 for cached, local in pairs], "%", 100, "more")
