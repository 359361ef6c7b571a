"""The Python package, end to end: a DDP script under the coordinator, and checkpoints that cross between Rust and Python."""

import hashlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from lib import BIN, Everlit, run, until

from everlit import CheckpointManager, checks, choose, manager, safetensors

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "worker/python/examples/train.py"
ENV = {"PYTHONPATH": str(ROOT / "worker/python"), "EVERLIT_BIN": str(BIN)}


def submit(everlit, steps, save_every, **more):
    command = [sys.executable, str(EXAMPLE), "--steps", str(steps), "--save-every", str(save_every)]
    return everlit.submit(command=command, world_size=2, env=ENV, **more)


def a_ddp_script_that_is_killed_twice_goes_on_from_verified_checkpoints():
    rng = random.Random(3)
    with Everlit() as everlit:
        job = submit(everlit, 600, 20, restart={"backoff": {"initial": "100ms"}})
        folder = everlit.data / "agent/jobs" / job / "checkpoints"
        everlit.at_step(job, 60)
        os.kill(everlit.summary(job)["ranks"][1]["pid"], signal.SIGKILL)
        until("the restart", lambda: everlit.summary(job)["attempt"] == 2, 60)
        reached = max(found.step for found in choose.list_checkpoints(str(folder)))
        everlit.at_step(job, reached + 30)
        pids = [rank["pid"] for rank in everlit.summary(job)["ranks"]]
        until("a save", lambda: any(folder.glob(".draft-*")), 60, 0.0005)
        time.sleep(rng.random() * 0.005)
        in_save = any(folder.glob(".draft-*"))
        os.kill(pids[0], signal.SIGKILL)
        summary = everlit.final(job, 180)
        assert summary["state"] == "succeeded" and summary["restarts"] == 2 and summary["step"] == summary["total_steps"] == 600, summary
        events = everlit.events(job)
        resumes = [event["data"]["step"] for event in events if event["event"] == "attempt_resumed"]
        torn = [event for event in events if event["event"] == "checkpoint_quarantined"]
        assert len(resumes) == 2 and 60 <= resumes[0] < resumes[1] and not torn, events
        log = everlit.get(f"/jobs/{job}/logs", raw=True).decode()
        for step in resumes:
            assert f"rank 0 of 2: starting at step {step}\n" in log and f"rank 1 of 2: starting at step {step}\n" in log, log
        for found in choose.list_checkpoints(str(folder)):
            checks.verify(found.path)
            subprocess.run([BIN / "everlit-agent", "checkpoint", "verify", found.path], check=True, stdout=subprocess.DEVNULL)
        losses = [float(line.split("loss=")[1]) for line in log.splitlines() if line.startswith("step=")]
        assert losses[-1] < 2.6 < losses[0], losses
        assert summary["last_checkpoint"]["step"] == 600, summary
        print(f"     resumed at steps {resumes}, a save under way at the second kill: {in_save}; loss {losses[0]:.2f} to {losses[-1]:.2f}")


def ctrl_c_makes_the_script_save_and_the_next_up_loses_no_step():
    with Everlit() as everlit:
        job = submit(everlit, 500, 100_000)
        reached = everlit.at_step(job, 40)["step"]
        assert everlit.interrupt() == 0
        everlit.up()
        after = everlit.at_step(job, reached)
        resumed = [event for event in everlit.events(job) if event["event"] == "attempt_resumed"]
        assert resumed and resumed[-1]["data"]["step"] >= reached, resumed
        assert after["restarts"] == 0 and after["lost_steps"] == 0, after
        assert everlit.final(job, 120)["state"] == "succeeded"
        print(f"     saved at step {resumed[-1]['data']['step']}, no step lost")


def the_script_runs_alone_and_under_torchrun():
    folder = pathlib.Path(tempfile.mkdtemp(prefix="everlit-e2e-"))
    env = {**os.environ, **ENV, "OMP_NUM_THREADS": "1"}
    try:
        alone = [sys.executable, EXAMPLE, "--save-every", "10", "--steps"]
        subprocess.run([*alone, "20"], cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
        again = subprocess.check_output([*alone, "40"], cwd=folder, env=env, text=True)
        assert "rank 0 of 1: starting at step 20" in again, again
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *alone[1:], "60"]
        gang = subprocess.run(torchrun, cwd=folder, env=env, text=True, capture_output=True)
        assert gang.returncode == 0 and "rank 1 of 2: starting at step 40" in gang.stdout, gang
        kept = [found.step for found in choose.list_checkpoints(str(folder / "checkpoints"))]
        assert kept == [60, 50, 40], kept
    finally:
        shutil.rmtree(folder)


def worker(folder, steps):
    """Trains with the Rust program and answers its output."""
    flags = ["--model", "mlp-10k", "--steps", str(steps), "--checkpoint-dir", folder, "--every-steps", "10"]
    env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    return subprocess.check_output([BIN / "everlit-worker", "train", *flags], env=env, text=True)


def checksum(path):
    """What `everlit-worker checksum` answers, computed here."""
    manifest = checks.verify(path)
    digests = {}
    for file in manifest.files:
        for name, one in safetensors.read(checks.read_file(str(path), file))[0].items():
            about = f"{name}\0{one.dtype}\0{list(one.shape)}\0".encode()
            digests[name] = hashlib.sha256(about + bytes(one.data)).hexdigest()
    return hashlib.sha256("".join(digests[name] for name in sorted(digests)).encode()).hexdigest()


def checkpoints_cross_between_rust_and_python():
    folder = pathlib.Path(tempfile.mkdtemp(prefix="everlit-e2e-"))
    try:
        rust, python = folder / "rust", folder / "python"
        worker(rust, 20)
        path = rust / "step-000000000020"
        own = subprocess.check_output([BIN / "everlit-worker", "checksum", path], text=True).strip()
        assert checksum(path) == own
        manifest = checks.verify(path)
        state, _ = manager.load(str(path), manifest)
        import torch

        assert all(isinstance(one, torch.Tensor) and one.dtype == torch.float32 and one.isfinite().all() for one in state.values())
        assert state["model.hidden.weight"].shape == (24, 64) and len(state) == 15, {name: one.shape for name, one in state.items()}

        def write(into, step):
            about = {name: getattr(manifest, name) for name in ("samples", "epoch", "global_batch", "seed", "data", "model")}
            saver = CheckpointManager(into)
            assert saver.save(step, state, must=True, **about)
            place = pathlib.Path(into) / f"step-{step:012}"
            seen = subprocess.check_output([BIN / "everlit-worker", "checksum", place], text=True).strip()
            assert seen == own == checksum(place), (seen, own)

        # At a new step, in the same folder: the Rust program takes it, since it is the newest.
        write(python, 20)
        write(rust, 25)
        output = worker(rust, 40)
        assert "resuming at step 25" in output, output
        # At the same step, in a folder of its own: both go on with the same bits.
        shutil.rmtree(rust)
        worker(rust, 20)
        ends = []
        for place in (rust, python):
            assert "resuming at step 20" in worker(place, 40)
            ends.append(subprocess.check_output([BIN / "everlit-worker", "checksum", place / "step-000000000040"], text=True))
        assert ends[0] == ends[1], ends
        print(f"     {len(state)} tensors, checksum {own[:16]}… equal; 20 more steps from either copy end with the same bits")
    finally:
        shutil.rmtree(folder)


CHECKS = [
    a_ddp_script_that_is_killed_twice_goes_on_from_verified_checkpoints,
    ctrl_c_makes_the_script_save_and_the_next_up_loses_no_step,
    the_script_runs_alone_and_under_torchrun,
    checkpoints_cross_between_rust_and_python,
]

if __name__ == "__main__":
    run(CHECKS, "e2e-python")
