"""Checkpoints that can be proved: the same bytes after any kills, any world size, every kind of damage seen."""

import array
import contextlib
import json
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import tempfile
import time

from lib import BIN, Everlit, run, until

KILLS = int(os.environ.get("EVERLIT_KILLS", "6"))
SEED = int(os.environ.get("EVERLIT_SEED", str(random.SystemRandom().randrange(1 << 32))))
# Dropout, clipping, accumulation and evaluation are all in the job whose bytes are compared.
PROVED = {
    "model": "llama-1m", "steps": 240, "batch_size": 7, "micro_batch_size": 2, "sequence_length": 32, "dropout": 0.1, "seed": 5,
    "evaluation": {"every_steps": 80, "samples": 32},
}
FAST = {"initial": "50ms", "max": "200ms"}


def checkpoints(everlit, job):
    return everlit.data / "agent" / "jobs" / job / "checkpoints"


def newest(folder):
    return max((f for f in folder.glob("step-*") if (f / "MANIFEST.json").exists()), default=None)


def manifest(folder):
    return json.loads((folder / "MANIFEST.json").read_text())


def checksum(folder):
    return subprocess.check_output([BIN / "everlit-worker", "checksum", folder], text=True).strip()


def gang(world, folder, *arguments, resume=None):
    """Ranks without an agent: exit codes and outputs."""
    rendezvous = tempfile.mkdtemp(dir=folder)
    processes = []
    for rank in range(world):
        env = {"PATH": os.environ["PATH"], "RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1", "EVERLIT_RENDEZVOUS": f"dir:{rendezvous}"}
        if resume is not None:
            env["EVERLIT_RESUME_FROM"] = str(resume)
        command = [BIN / "everlit-worker", "train", *map(str, arguments)]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [p.communicate(timeout=300)[0] for p in processes]
    return [p.returncode for p in processes], outputs


def tensors(path):
    """Float32 tensors of a safetensors file by name."""
    content = pathlib.Path(path).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    found = {}
    for name, about in header.items():
        if name != "__metadata__":
            found[name] = array.array("f", data[slice(*about["data_offsets"])])
    return found


def killed_at_random_moments_a_run_ends_with_the_undisturbed_bytes():
    chance = random.Random(SEED)
    print(f"     seed {SEED}")
    job = {"world_size": 3, "worker": {**PROVED, "steps": max(PROVED["steps"], 40 * KILLS)}, "checkpoint": {"every_steps": 3}}
    with Everlit() as everlit:
        undisturbed = everlit.submit(**job)
        assert everlit.final(undisturbed, 600)["state"] == "succeeded"
        wanted = checksum(newest(checkpoints(everlit, undisturbed)))
        for scope in ("auto", "gang"):
            kill_one_job(everlit, chance, job, scope, undisturbed, wanted)


def kill_one_job(everlit, chance, job, scope, undisturbed, wanted):
    killed = everlit.submit(**job, restart={"scope": scope, "max_restarts": 1000, "max_start_failures": 1000, "backoff": FAST})
    folder = checkpoints(everlit, killed)
    kills = saves = 0
    while kills < KILLS:
        summary = everlit.running(killed, 120)
        # Every other kill waits for a save to be under way.
        if kills % 2:
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline and not list(folder.glob(".draft-*")):
                time.sleep(0.0005)
        else:
            time.sleep(chance.uniform(0.05, 1.5))
        summary = everlit.summary(killed)
        if summary["state"] == "succeeded":
            break
        pids = [r["pid"] for r in summary["ranks"] if r["pid"]]
        if not pids:
            continue
        saving = bool(list(folder.glob(".draft-*")))
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(pids), signal.SIGKILL)
            kills += 1
            saves += saving
            until("a restart", lambda: everlit.summary(killed)["restarts"] >= kills or everlit.summary(killed)["state"] == "succeeded", 60)
    summary = everlit.final(killed, 900)
    assert summary["state"] == "succeeded", summary["reason"]
    got = checksum(newest(folder))
    names = [e["event"] for e in everlit.events(killed)]
    memory = [e for e in everlit.events(killed) if "shared memory" in json.dumps(e)]
    in_place = names.count("recovered_in_place")
    assert (in_place > 0) == (scope == "auto"), names
    print(f"     {scope}: {kills} kills, {saves} of them in a save, {in_place} recoveries in place, {len(memory)} resumes from shared memory")
    print(f"     undisturbed {wanted}\n     killed      {got}")
    assert kills == KILLS, f"only {kills} kills before the run was over"
    assert got == wanted and summary["restarts"] >= kills
    old, new = (manifest(newest(checkpoints(everlit, j))) for j in (undisturbed, killed))
    assert (old["samples"], old["data"]) == (new["samples"], new["data"])


def another_world_size_goes_on_with_the_same_batches():
    worker = {**PROVED, "batch_size": 12, "steps": 160, "dropout": 0, "evaluation": {"every_steps": 160, "samples": 128}}
    with Everlit() as everlit:
        straight = everlit.submit(world_size=3, worker=worker)
        a = everlit.final(straight, 600)
        first = everlit.submit(world_size=3, worker=worker, checkpoint={"every_steps": 20})
        everlit.at_step(first, 60)
        everlit.post(f"/jobs/{first}/stop")
        everlit.final(first)
        middle = newest(checkpoints(everlit, first))
        # Nothing about batch, data or schedule is said again: the new job keeps the old one's.
        second = everlit.submit(world_size=2, resume_from=first)
        b = everlit.final(second, 600)
        assert a["state"] == b["state"] == "succeeded", (a["reason"], b["reason"])
        ends = [manifest(newest(checkpoints(everlit, job))) for job in (straight, second)]
        for key in ("step", "samples", "epoch", "data", "global_batch"):
            assert ends[0][key] == ends[1][key], key
        assert (ends[0]["world_size"], ends[1]["world_size"]) == (3, 2)
        losses = [a["evaluation_loss"], b["evaluation_loss"]]
        print(f"     changed after step {manifest(middle)['step']}: evaluation loss {losses[0]:.4f} and {losses[1]:.4f}")
        assert abs(losses[0] - losses[1]) < 0.01 * losses[0], losses
        config = everlit.data / "config.json"
        config.write_text(json.dumps({"worker": everlit.get(f"/jobs/{first}")["spec"]["worker"]}))
        gradients = []
        for world in (3, 2, 1):
            out = everlit.data / f"gradient-{world}"
            codes, outputs = gang(world, everlit.data, "--config", config, "--steps", manifest(middle)["step"] + 1, "--gradient-out", out, resume=middle)
            assert codes == [0] * world, outputs
            gradients.append(tensors(out))
        for other in gradients[1:]:
            apart = math.sqrt(sum((x - y) ** 2 for name in other for x, y in zip(gradients[0][name], other[name])))
            size = math.sqrt(sum(x * x for name in other for x in other[name]))
            print(f"     first reduced gradient: {apart / size:.1e} apart, relative to its norm")
            assert apart < 1e-6 * size


def every_kind_of_damage_is_rejected_and_the_newest_good_one_taken():
    with tempfile.TemporaryDirectory() as temp:
        temp = pathlib.Path(temp)
        train = [BIN / "everlit-worker", "train", "--model", "mlp-10k", "--every-steps", "10", "--keep", "9"]
        subprocess.run([*train, "--steps", "20", "--checkpoint-dir", temp / "good"], check=True, stdout=subprocess.DEVNULL)
        good = temp / "good" / "step-000000000020"
        cases = 0
        for file in sorted(good.iterdir()):
            content = file.read_bytes()
            damages = [(f"cut to {n}", content[:n]) for n in sorted({0, 1, 7, 8, len(content) // 3, len(content) - 1})]
            damages += [("a byte more", content + b"\0"), ("empty", b""), ("missing", None)]
            # Every byte of what is short, and 200 places over every range of what is long.
            places = range(len(content)) if len(content) < 3000 else sorted({*range(0, len(content), len(content) // 200), *range(64), len(content) - 1})
            for at in places:
                bad = bytearray(content)
                bad[at] ^= 1 << at % 8
                damages.append((f"bit {at % 8} of byte {at}", bytes(bad)))
            for what, bad in damages:
                if bad == content:
                    continue
                file.unlink() if bad is None else file.write_bytes(bad)
                answer = subprocess.run([BIN / "everlit-agent", "checkpoint", "verify", good], capture_output=True, text=True)
                assert answer.returncode == 1 and (file.name in answer.stderr), (file.name, what, answer)
                cases += 1
                file.write_bytes(content)
            assert subprocess.run([BIN / "everlit-agent", "checkpoint", "verify", good], capture_output=True).returncode == 0
        taken = 0
        for file in sorted(good.iterdir()):
            copy = temp / f"copy-{file.name}"
            shutil.copytree(temp / "good", copy)
            bad = bytearray((copy / good.name / file.name).read_bytes())
            bad[len(bad) // 2] ^= 1
            (copy / good.name / file.name).write_bytes(bad)
            answer = subprocess.run([*train, "--steps", "21", "--checkpoint-dir", copy], capture_output=True, text=True)
            assert answer.returncode == 0 and "resuming at step 10 from" in answer.stdout, answer
            reason = (copy / "quarantine" / good.name / "REASON").read_text()
            assert file.name in reason, reason
            taken += 1
        print(f"     {cases} damages rejected with the file's name, {taken} resumes from the one before")
        (temp / "text").mkdir()
        (temp / "text" / "a.txt").write_text("other text " * 1000)
        refusals = [
            (["--model", "mlp-10k", "--seed", "9"], "trained with seed"),
            (["--model", "mlp-500k"], "not of model mlp"),
            (["--model", "mlp-10k", "--data", temp / "text"], "the data's files are not those"),
        ]
        for arguments, says in refusals:
            command = [BIN / "everlit-worker", "train", "--steps", "30", "--checkpoint-dir", temp / "good", *arguments]
            answer = subprocess.run(command, capture_output=True, text=True)
            assert answer.returncode == 78 and says in answer.stderr, answer


def a_snapshot_in_memory_outlives_its_ranks():
    """The checkpoint folder is made read-only, so that the newest step is in shared memory only; then a rank is killed."""
    if os.geteuid() != 0:
        print("     SKIPPED: needs root to make a folder read-only for a while")
        return
    with Everlit() as everlit:
        worker = {**PROVED, "steps": 4000, "evaluation": {}}
        job = everlit.submit(world_size=2, worker=worker, checkpoint={"every_steps": 10}, restart={"scope": "gang", "backoff": FAST})
        folder = checkpoints(everlit, job)
        until("a checkpoint", lambda: newest(folder), 60)
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
            before = manifest(newest(folder))["step"]
            everlit.at_step(job, before + 35)
            failed = until("the event", lambda: [e for e in everlit.events(job) if e["event"] == "checkpoint_failed"], 30)
            assert everlit.state(job) == "running", "training goes on"
            print(f"     {json.dumps(failed[0])[:240]}")
        finally:
            subprocess.run(["umount", "-l", folder], check=True)
        summary = everlit.summary(job)
        os.kill(summary["ranks"][0]["pid"], signal.SIGKILL)
        resumed = until("a resume", lambda: [e for e in everlit.events(job) if "shared memory" in json.dumps(e)], 60)
        print(f"     killed at step {summary['step']}, newest checkpoint {before}; {json.dumps(resumed[0])[:240]}")
        everlit.at_step(job, summary["step"] + 5)
        until("a commit after it", lambda: manifest(newest(folder))["step"] > before, 60)
        everlit.post(f"/jobs/{job}/stop")
        everlit.final(job)
        until("shared memory is freed", lambda: not list(pathlib.Path("/dev/shm").glob(f"everlit-*/*/{job}")), 30)


def saves_on_demand_and_by_time():
    with Everlit() as everlit:
        job = everlit.submit(world_size=2, worker={**PROVED, "steps": 100_000}, checkpoint={"every": "1h"})
        everlit.at_step(job, 5)
        assert newest(checkpoints(everlit, job)) is None
        everlit.post(f"/jobs/{job}/checkpoint")
        until("the checkpoint", lambda: newest(checkpoints(everlit, job)), 30)
        until("it is verified", lambda: (c := everlit.summary(job)["last_checkpoint"]) and c["verified"], 30)
        everlit.post(f"/jobs/{job}/stop")
        everlit.final(job)
        status, body = everlit.refused("POST", f"/jobs/{job}/checkpoint", {})
        assert status == 409, body
        sleeper = everlit.submit(command=["sleep", "60"])
        everlit.running(sleeper)
        status, body = everlit.refused("POST", f"/jobs/{sleeper}/checkpoint", {})
        assert status == 409 and "SIGUSR1" in json.dumps(body), body
        auto = everlit.submit(world_size=2, worker={**PROVED, "steps": 100_000}, checkpoint={"every": "auto"})
        interval = until("an interval", lambda: everlit.summary(auto).get("metrics", {}).get("checkpoint_interval_seconds"), 60)
        until("saves by themselves", lambda: newest(checkpoints(everlit, auto)), 60)
        points = until("a series", lambda: (p := everlit.get(f"/jobs/{auto}/metrics")["data"]) and len(p) > 3 and p, 60)
        print(f"     interval {interval} s; metrics {sorted(points[-1]['metrics'])}")
        for name in ("grad_norm", "lr", "tokens_per_second", "data_wait", "flop_utilization"):
            assert name in points[-1]["metrics"], name


def an_evaluation_job_measures_a_checkpoint():
    with Everlit() as everlit:
        worker = {**PROVED, "steps": 60, "evaluation": {"every_steps": 60, "samples": 64}}
        trained = everlit.final(everlit.submit(world_size=2, worker=worker), 300)
        measured = everlit.final(everlit.submit(kind="evaluate", world_size=3, resume_from=trained["job_id"]), 120)
        assert measured["state"] == "succeeded", measured["reason"]
        print(f"     while training {trained['evaluation_loss']:.6f}, measured again {measured['evaluation_loss']:.6f}")
        assert abs(trained["evaluation_loss"] - measured["evaluation_loss"]) < 1e-5


def numbers_that_are_none_stop_the_job_or_are_skipped():
    with Everlit() as everlit:
        wild = {**PROVED, "learning_rate": 1e6, "max_grad_norm": 0, "steps": 40, "evaluation": {}}
        failed = everlit.final(everlit.submit(world_size=2, worker=wild), 120)
        assert failed["state"] == "failed" and failed["restarts"] == 0, failed
        assert "at step" in failed["reason"] and "not" not in failed["reason"][:3], failed["reason"]
        print(f"     {failed['reason']}")
        skipped = everlit.final(everlit.submit(world_size=2, worker={**wild, "on_nan": "skip"}), 120)
        assert skipped["state"] == "succeeded" and skipped["metrics"]["skipped_steps"] > 0, skipped


def what_does_not_fit_is_refused_with_numbers():
    with Everlit() as everlit:
        sizes = {"dim": 16384, "layers": 100, "heads": 128, "kv_heads": 128, "hidden": 65536}
        job = everlit.submit(worker={"model": sizes})
        reason = until("a reason", lambda: json.dumps(everlit.get(f"/jobs/{job}/explain")), 20)
        assert "GiB" in reason and everlit.state(job) == "queued", reason
        answer = subprocess.run([BIN / "everlit-worker", "train", "--model", json.dumps(sizes)], capture_output=True, text=True)
        assert answer.returncode == 78 and "does not fit" in answer.stderr, answer
        # A machine with less than 40 GiB is told so, after the figures.
        dry = subprocess.run([BIN / "everlit-worker", "train", "--dry-run", "--model", "llama-1b"], capture_output=True, text=True)
        assert dry.returncode in (0, 78) and "parameters: 99" in dry.stdout and "largest batch that fits" in dry.stdout, dry


def too_little_shared_memory_is_said_and_costs_only_the_snapshots():
    if os.geteuid() != 0:
        print("     SKIPPED: needs root to make a small /dev/shm")
        return
    with tempfile.TemporaryDirectory() as temp:
        inner = "mount -t tmpfs -o size=1m tmpfs /dev/shm && mkdir /dev/shm/s && exec " + " ".join(
            [str(BIN / "everlit-worker"), "train", "--steps", "20", "--every-steps", "5", "--batch-size", "1", "--sequence-length", "16", "--checkpoint-dir", f"{temp}/c"]
        )
        env = {"PATH": os.environ["PATH"], "EVERLIT_SNAPSHOT_DIR": "/dev/shm/s"}
        answer = subprocess.run(["unshare", "-m", "sh", "-c", inner], env=env, capture_output=True, text=True)
        assert answer.returncode == 0, answer
        assert "shared memory has 1 MiB left" in answer.stderr and "--shm-size" in answer.stderr, answer.stderr
        assert newest(pathlib.Path(temp) / "c").name == "step-000000000020"


run(
    [
        every_kind_of_damage_is_rejected_and_the_newest_good_one_taken,
        saves_on_demand_and_by_time,
        an_evaluation_job_measures_a_checkpoint,
        numbers_that_are_none_stop_the_job_or_are_skipped,
        what_does_not_fit_is_refused_with_numbers,
        too_little_shared_memory_is_said_and_costs_only_the_snapshots,
        a_snapshot_in_memory_outlives_its_ranks,
        another_world_size_goes_on_with_the_same_batches,
        killed_at_random_moments_a_run_ends_with_the_undisturbed_bytes,
    ],
    "checkpoints",
)
