"""What needs a GPU, on the built programs; what was seen is written into docs/gpu.md."""

import datetime
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from lib import BIN, Everlit, free_port, run, until

DEVICE = os.environ.get("EVERLIT_GPU_DEVICE", "cuda")
PYTHON = os.environ["EVERLIT_PYTHON"]
ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- seen -->", "<!-- /seen -->"
#: Model, samples per update, bytes per sample, steps to warm up and to measure.
MODELS = [("llama-30m", 32, 512, 20, 100), ("llama-124m", 16, 512, 10, 60)]
LINE = re.compile(r"step=(\d+) loss=(\S+)")
#: The job that is killed: long enough on a GPU, and small enough where only the checks are tried.
KILLED = {"model": "llama-30m", "sequence_length": 256} if DEVICE == "cuda" else {"model": "llama-1m", "sequence_length": 16}
#: What was seen: check, figure.
SEEN = []


def saw(what, figure):
    SEEN.append((what, figure))
    print(f"     {what}: {figure}", flush=True)


def gpus():
    if DEVICE != "cuda":
        return []
    listed = subprocess.run(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"], capture_output=True, text=True, check=True)
    return listed.stdout.strip().splitlines()


def environment(rank, world, folder, **more):
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES") if name in os.environ}
    gang = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "OMP_NUM_THREADS": 1, "EVERLIT_RENDEZVOUS": f"dir:{folder}"}
    return {**kept, **{name: str(value) for name, value in gang.items()}, **more}


def gang(world, *arguments, seconds=300, **more):
    """Ranks without an agent: rank 0's lines with the time at which they came. All must end well."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(part) for part in (BIN / "everlit-worker", "train", "--device", DEVICE, *arguments)]
        errors = [open(pathlib.Path(folder) / f"stderr-{rank}", "w+") for rank in range(world)]
        ranks = [
            subprocess.Popen(command, env=environment(rank, world, folder, **more), stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL, stderr=errors[rank], text=True)
            for rank in range(world)
        ]
        try:
            lines = [(time.perf_counter(), line) for line in ranks[0].stdout]
            codes = [rank.wait(seconds) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        for code, error in zip(codes, errors):
            error.seek(0)
            assert code == 0, f"a rank ended with {code}: {error.read()[-2000:]}"
    return lines


def losses(lines):
    return [(at, int(m[1]), float(m[2])) for at, line in lines if (m := LINE.match(line))]


def checksum(folder):
    newest = max(folder.glob("step-*"))
    return subprocess.check_output([BIN / "everlit-worker", "checksum", newest], text=True, env=environment(0, 1, "/nowhere")).strip()


def everything_that_one_process_can_show():
    if DEVICE != "cuda":
        print("     left out: there is nothing of it without a GPU")
        return
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([BIN / "everlit-worker", "gpu-check", folder], env=environment(0, 1, "/nowhere"), capture_output=True, text=True, timeout=500)
    print(done.stdout, end="")
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    for line in done.stdout.splitlines():
        if line.startswith("PASS "):
            what, _, figure = line.removeprefix("PASS ").partition(": ")
            SEEN.append((what, figure))


def two_ranks_share_one_gpu_over_gloo():
    with tempfile.TemporaryDirectory() as temp:
        temp = pathlib.Path(temp)
        common = ["--model", "llama-1m", "--steps", "30", "--batch-size", "16", "--deterministic", "--seed", "3", "--every-steps", "0"]
        more = {"CUDA_VISIBLE_DEVICES": "0"} if DEVICE == "cuda" else {}
        alone = losses(gang(1, *common, "--checkpoint-dir", temp / "alone", **more))
        # With a resume that is empty the ranks know that an agent, here this script, found nothing to go on from.
        both = [losses(gang(2, *common, "--checkpoint-dir", temp / str(n), EVERLIT_RESUME_FROM="", EVERLIT_ATTEMPT="1", **more)) for n in range(2)]
        apart = abs(both[0][-1][2] - alone[-1][2])
        sums = [checksum(temp / str(n)) for n in range(2)]
        assert sums[0] == sums[1], "the repeat has other bits"
        assert apart < 2e-3, f"loss {both[0][-1][2]} with two ranks, {alone[-1][2]} with one"
        saw("two ranks on one GPU over Gloo", f"loss {apart:.1e} from one rank's after 30 steps; the same bits in a repeat")


def a_checkpoint_of_a_processor_goes_on_on_a_gpu():
    with tempfile.TemporaryDirectory() as temp:
        temp = pathlib.Path(temp)
        common = ["--model", "llama-1m", "--batch-size", "16", "--seed", "3"]
        cpu = [str(BIN / "everlit-worker"), "train", "--device", "cpu", *common, "--steps", "20", "--checkpoint-dir", str(temp / "a"), "--every-steps", "10", "--keep", "5"]
        done = subprocess.run(cpu, env=environment(0, 1, "/nowhere"), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        there = losses([(0, line) for line in done.stdout.splitlines()])[-1][2]
        (temp / "b").mkdir()
        shutil.copytree(temp / "a" / "step-000000000010", temp / "b" / "step-000000000010")
        here = losses(gang(1, *common, "--steps", "20", "--checkpoint-dir", temp / "b"))[-1][2]
        assert abs(here - there) < 5e-3, f"{here} and {there}"
        saw("a processor's checkpoint goes on on the GPU", f"loss {abs(here - there):.1e} apart after 10 steps")


def a_killed_rank_comes_back_to_the_same_bits():
    job = {
        "worker": {**KILLED, "device": DEVICE, "deterministic": True, "steps": 400, "batch_size": 8, "dropout": 0.1},
        "checkpoint": {"every_steps": 20},
        "restart": {"backoff": {"initial": "50ms", "max": "200ms"}},
    }
    with Everlit() as everlit:
        folder = lambda name: everlit.data / "agent" / "jobs" / name / "checkpoints"
        undisturbed = everlit.submit(**job)
        assert everlit.final(undisturbed, 300)["state"] == "succeeded", everlit.summary(undisturbed)["reason"]
        killed = everlit.submit(**job)
        for count in range(1, 4):
            summary = everlit.at_step(killed, 90 * count)
            if count == 1:
                nvml(everlit)
            old = summary["ranks"][0]["pid"]
            begun = time.monotonic()
            os.kill(old, signal.SIGKILL)

            def stepped():
                rank = everlit.summary(killed)["ranks"][0]
                return rank["pid"] not in (None, old) and rank["step"]

            until("a step after the kill", stepped, 120, 0.01)
            back = time.monotonic() - begun
        summary = everlit.final(killed, 300)
        assert summary["state"] == "succeeded" and summary["restarts"] == 3, summary
        sums = [checksum(folder(name)) for name in (undisturbed, killed)]
        assert sums[0] == sums[1], f"killed {sums[1]}, undisturbed {sums[0]}"
        saw("killed three times under the coordinator", f"the undisturbed run's bytes ({sums[0][:16]}…); {back:.2f} s from the last kill to its next step")


def nvml(everlit):
    """While a job computes."""
    if DEVICE != "cuda":
        return

    def busy():
        load = everlit.get("/nodes")["data"][0]["load"]["gpus"][0]
        return load if load["utilization"] > 0 and load["memory"] > 1 << 28 else None

    load = until("a busy GPU", busy, 10, 0.1)
    status = everlit.get("/status")["gpus"]
    assert status["used"] == 1, status
    saw("NVML's figures by REST", f"{load['utilization']:.0%} busy, {load['memory'] / 2**30:.1f} GiB used, {load['temperature']} °C; {status['used']} of {status['total']} GPUs granted")


def nccl_between_two_gpus():
    if len(gpus()) < 2:
        print("     left out: it takes two GPUs")
        return
    job = {
        "world_size": 2,
        "worker": {**KILLED, "device": DEVICE, "deterministic": True, "steps": 300, "batch_size": 16},
        "checkpoint": {"every_steps": 20},
    }
    with Everlit() as everlit:
        folder = lambda name: everlit.data / "agent" / "jobs" / name / "checkpoints"
        undisturbed = everlit.submit(**job)
        assert everlit.final(undisturbed, 300)["state"] == "succeeded", everlit.summary(undisturbed)["reason"]
        killed = everlit.submit(**job)
        os.kill(everlit.at_step(killed, 100)["ranks"][1]["pid"], signal.SIGKILL)
        summary = everlit.final(killed, 300)
        assert summary["state"] == "succeeded" and summary["restarts"] == 1, summary
        sums = [checksum(folder(name)) for name in (undisturbed, killed)]
        assert sums[0] == sums[1], f"killed {sums[1]}, undisturbed {sums[0]}"
        saw("NCCL between two GPUs, one rank killed", f"the undisturbed run's bytes ({sums[0][:16]}…)")


def saves_are_behind_the_step():
    with tempfile.TemporaryDirectory() as temp:
        temp = pathlib.Path(temp)
        shared = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm", prefix="everlit-gpu-"))
        try:
            model = "llama-124m" if DEVICE == "cuda" else "llama-1m"
            heartbeat = temp / "HEARTBEAT"
            more = {"EVERLIT_SNAPSHOT_DIR": str(shared), "EVERLIT_HEARTBEAT_FILE": str(heartbeat), "EVERLIT_ATTEMPT": "1", "EVERLIT_RESUME_FROM": ""}
            rates = {}
            for every in (10, 0):
                arguments = ["--model", model, "--batch-size", "16", "--sequence-length", KILLED["sequence_length"], "--steps", "120", "--every-steps", every]
                seen = losses(gang(1, *arguments, "--checkpoint-dir", temp / str(every), **more))
                first = next(one for one in seen if one[1] > 20)
                last = [one for one in seen if one[1] < 120][-1]
                rates[every] = (last[1] - first[1]) / (last[0] - first[0])
                if every:
                    stall = json.loads(heartbeat.read_text())["metrics"]["save_stall_seconds"]
            state = sum(file.stat().st_size for file in max((temp / "10").glob("step-*")).iterdir())
            added = (rates[0] / rates[10] - 1) * 100
            saw(f"a save of {state / 1e9:.2f} GB in every 10th step", f"a step held up {stall * 1e3:.2f} ms; {rates[10]:.1f} steps/s with, {rates[0]:.1f} without ({added:+.1f} %)")
        finally:
            shutil.rmtree(shared)


def steps_beside_pytorch_ddp():
    models = MODELS if DEVICE == "cuda" else [("llama-1m", 8, 64, 5, 20)]
    for model, batch, length, warm, measured in models:
        for precision in ("float32", "bfloat16"):
            with tempfile.TemporaryDirectory() as temp:
                temp = pathlib.Path(temp)
                shape = ["--model", model, "--batch-size", batch, "--sequence-length", length, "--precision", precision]
                gang(1, *shape, "--steps", 1, "--checkpoint-dir", temp)
                start, end = temp / "step-000000000001", 1 + warm + measured
                seen = losses(gang(1, *shape, "--steps", end, EVERLIT_RESUME_FROM=str(start)))
                first = next(one for one in seen if one[1] > warm)
                rate = (seen[-1][1] - first[1]) / (seen[-1][0] - first[0]) if seen[-1][1] > first[1] else float("nan")
                command = [PYTHON, ROOT / "scripts/bench/ddp.py", *shape, "--steps", end - 1, "--warm", warm, "--init", start, "--data", BIN / "sample-text", "--device", DEVICE]
                env = {**environment(0, 1, "/nowhere"), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
                done = subprocess.run([str(part) for part in command], env=env, capture_output=True, text=True, timeout=500)
                assert done.returncode == 0, done.stderr[-2000:]
                told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
                peer = next(one["steps_per_second"] for one in told if "steps_per_second" in one)
                loss = next(one["loss"] for one in told if one.get("step") == seen[-1][1])
                apart = abs(loss - seen[-1][2])
                assert apart < 0.05, f"loss {seen[-1][2]} and {loss}"
                saw(f"{model}, {precision}, {batch} samples of {length}", f"{rate:.2f} steps/s, PyTorch DDP {peer:.2f} ({rate / peer:.2f} times); loss {apart:.1e} apart after {end} steps")


CHECKS = [
    everything_that_one_process_can_show,
    two_ranks_share_one_gpu_over_gloo,
    a_checkpoint_of_a_processor_goes_on_on_a_gpu,
    a_killed_rank_comes_back_to_the_same_bits,
    nccl_between_two_gpus,
    saves_are_behind_the_step,
    steps_beside_pytorch_ddp,
]


def write_page():
    found = gpus()
    lines = [f"Seen on {datetime.date.today()} by `scripts/gpu-check.sh`, on {len(found)} × {found[0]} (name, memory, driver):", "", "| what | seen |", "|---|---|"]
    lines += [f"| {what} | {figure} |" for what, figure in SEEN]
    if len(found) < 2:
        lines += ["", "Not run: NCCL between two GPUs, which that machine does not have."]
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    PAGE.write_text(head + BEGIN + "\n" + "\n".join(lines) + "\n" + END + rest.split(END)[1])
    print(f"written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    run(CHECKS, "gpu")
    if DEVICE == "cuda" and not sys.argv[1:]:
        write_page()
