"""Training figures: steps against PyTorch's DistributedDataParallel, and saves against a memory copy and against dd, all in the same run."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import time

BIN = pathlib.Path(os.environ["EVERLIT_BIN"])
PYTHON = os.environ.get("EVERLIT_PYTHON")
RUNS = int(os.environ.get("EVERLIT_STEP_RUNS", "3"))
# A multiple of eight, and how often eight steps are held against each other.
WARM_STEPS = 8
SAVE_BLOCKS = int(os.environ.get("EVERLIT_SAVE_BLOCKS", "24"))
HERE = pathlib.Path(__file__).resolve().parent
# Model, samples per update, bytes per sample, steps to warm up and to measure, least ratio to the peer.
MODELS = [("llama-1m", 16, 128, 20, 80, 1.3), ("llama-30m", 8, 128, 4, 16, 1.05), ("llama-124m", 4, 128, 2, 6, 1.0)]
LINE = re.compile(r"step=(\d+) loss=(\S+)")


def environment(rank, world, folder, **more):
    base = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1"}
    gang = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    return {**base, **gang, "EVERLIT_RENDEZVOUS": f"dir:{folder}", **more}


def lines_of(commands):
    """Starts every rank; answers rank 0's lines with the time at which they came."""
    ranks = [subprocess.Popen(c, env=e, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for c, e in commands]
    lines = [(time.perf_counter(), line) for line in ranks[0].stdout]
    for rank in ranks:
        rank.communicate()
        if rank.returncode:
            raise SystemExit(f"bench: a rank ended with {rank.returncode}")
    return lines


def first_checkpoint(model, batch, length, folder):
    command = [BIN / "everlit-worker", "train", "--model", model, "--batch-size", batch, "--sequence-length", length, "--steps", 1, "--checkpoint-dir", folder]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    return folder / "step-000000000001"


def ours(model, batch, length, start, end):
    with tempfile.TemporaryDirectory() as folder:
        command = [BIN / "everlit-worker", "train", "--model", model, "--batch-size", str(batch), "--sequence-length", str(length), "--steps", str(end)]
        beats = [pathlib.Path(folder) / f"HEARTBEAT-{rank}" for rank in (0, 1)]
        ranks = [([*command], environment(rank, 2, folder, EVERLIT_RESUME_FROM=str(start), EVERLIT_HEARTBEAT_FILE=str(beats[rank]))) for rank in (0, 1)]
        lines = lines_of(ranks)
        wait = beat(beats[0].parent).get("metrics", {}).get("data_wait", 0.0)
    return [(at, int(m[1]), float(m[2])) for at, line in lines if (m := LINE.match(line))], wait


def first_step():
    """Seconds from the start of two ranks to their first step's end."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(BIN / "everlit-worker"), "train", "--model", "llama-1m", "--steps", "1"]
        begun = time.perf_counter()
        lines = lines_of([(command, environment(rank, 2, folder)) for rank in (0, 1)])
        return next(at for at, line in lines if LINE.match(line)) - begun


def theirs(model, batch, length, start, end, port):
    command = [PYTHON, HERE / "ddp.py", "--model", model, "--batch-size", str(batch), "--sequence-length", str(length), "--steps", str(end - 1)]
    command += ["--init", start, "--data", BIN / "sample-text"]
    more = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    lines = lines_of([([str(c) for c in command], environment(rank, 2, "/nowhere", **more)) for rank in (0, 1)])
    return [step for _, line in lines if "loss" in (step := json.loads(line))]


def steps(row):
    """Steps per second of two ranks with a thread each; ours is wall time, the peer's leaves out what only shows its loss."""
    if not PYTHON:
        raise SystemExit("SKIPPED: the peer needs PyTorch (scripts/fetch-python-torch.sh)")
    from lib import free_port

    row("start of two ranks to the end of their first step, llama-1m", [first_step() for _ in range(7)], "s", 0.7)
    for model, batch, length, warm, measured, least in MODELS:
        with tempfile.TemporaryDirectory() as temp:
            end = 1 + warm + measured
            start = first_checkpoint(model, batch, length, pathlib.Path(temp))
            ratios, own, peer, apart, waits = [], [], [], [], []
            for _ in range(RUNS):
                seen, wait = ours(model, batch, length, start, end)
                waits.append(wait * 100)
                first = next(one for one in seen if one[1] > warm)
                rate = (seen[-1][1] - first[1]) / (seen[-1][0] - first[0])
                they = theirs(model, batch, length, start, end, free_port())
                other = measured / sum(one["seconds"] for one in they[warm:])
                losses = {one["step"]: one["loss"] for one in they}
                apart.append(max(abs(loss - losses[step]) / losses[step] for _, step, loss in seen if step in losses))
                own.append(rate)
                peer.append(other)
                ratios.append(rate / other)
            row(f"{model}: steps, 2 ranks", own, "per s", 0, "more")
            row(f"{model}: steps of PyTorch DDP, 2 ranks", peer, "per s", 0, "more")
            row(f"{model}: ours over PyTorch DDP", ratios, "x", least, "more")
            row(f"{model}: losses apart at the most, relative", apart, "", 0.01)
            row(f"{model}: time that steps waited for data", waits, "%", 1)


def beat(folder, rank=0):
    try:
        return json.loads((folder / f"HEARTBEAT-{rank}").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def checkpoint(row):
    """What a save costs a step, and how fast it is written and read, for about 500 MB of state."""
    with tempfile.TemporaryDirectory() as temp:
        temp = pathlib.Path(temp)
        # 42 million parameters: 504 MB with AdamW's moments.
        sizes = json.dumps({"dim": 640, "layers": 9, "heads": 10, "kv_heads": 5, "hidden": 1728})
        command = [BIN / "everlit-worker", "train", "--model", sizes, "--sequence-length", "128"]
        shared = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm", prefix="everlit-bench-"))
        try:
            folder = temp / "run"
            folder.mkdir()
            end = WARM_STEPS + 8 * SAVE_BLOCKS
            arguments = [*command, "--batch-size", "2", "--steps", str(end + 1), "--checkpoint-dir", folder / "c", "--every-steps", "8"]
            env = environment(0, 1, "/nowhere", EVERLIT_SNAPSHOT_DIR=str(shared), EVERLIT_HEARTBEAT_FILE=str(folder / "HEARTBEAT-0"), EVERLIT_ATTEMPT="1", EVERLIT_RESUME_FROM="")
            # One thread computes, one core is left for copying and writing, as where an accelerator computes.
            process = subprocess.Popen([str(a) for a in arguments], env=env, stdout=subprocess.DEVNULL)
            times, seen = {}, {}
            while process.poll() is None:
                now = beat(folder)
                if now.get("step") and now["step"] not in times:
                    times[now["step"]] = time.perf_counter()
                if now.get("metrics", {}).get("save_stall_seconds"):
                    seen[now["metrics"]["save_stall_seconds"]] = True
                time.sleep(0.005)
            assert process.returncode == 0
            stalls = [stall * 1000 for stall in seen]
            # Of eight steps the first four have the copy and the write of a save beside them, the others nothing: the same run, seconds
            # apart, since whole runs differ by more than a save costs.
            blocks = range(WARM_STEPS, end, 8)
            assert all(step in times for block in blocks for step in (block, block + 4, block + 8)), "a step was not seen"
            added = [((times[k + 4] - times[k]) / (times[k + 8] - times[k + 4]) - 1) * 100 for k in blocks]
            row("a step, mean of the run", [(times[end] - times[WARM_STEPS]) / (end - WARM_STEPS) * 1000], "ms", 0, "more")
            state = newest_bytes(temp)
            row("state of the save figures", [state / 1e6], "MB", 450, "more")
            row("a step held up by a save, with a core to spare", stalls, "ms", 5)
            row("four steps with a save behind them, over four without", added, "%", 1)
            disk(row, temp)
        finally:
            shutil.rmtree(shared)


def newest_bytes(temp):
    folder = max(temp.glob("run/c/step-*"), key=lambda f: f.stat().st_mtime)
    return sum(f.stat().st_size for f in folder.iterdir())


def disk(row, temp):
    """Write rate against `dd conv=fsync`, read rate with verification against a cold read, by everlit-worker's own helper."""
    writes, reads = [], []
    for run in range(max(RUNS, 5)):
        answer = json.loads(subprocess.check_output([BIN / "everlit-worker", "disk", temp / f"disk-{run}"], text=True))
        target = temp / "dd"
        started = time.perf_counter()
        subprocess.run(["dd", "if=/dev/zero", f"of={target}", "bs=1M", "count=477", "conv=fsync"], check=True, stderr=subprocess.DEVNULL)
        dd = 500.17 / (time.perf_counter() - started)
        target.unlink()
        writes.append(answer["write_mb_per_second"] / dd)
        reads.append(answer["load_mb_per_second"] / answer["cold_read_mb_per_second"])
        shutil.rmtree(temp / f"disk-{run}")
    row("durable write with checksums over dd conv=fsync", writes, "x", 1, "more")
    row("load with verification over a cold read", reads, "x", 0.8, "more")
