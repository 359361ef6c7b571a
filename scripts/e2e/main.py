"""The main job, end to end: real programs, real kills, seen only from the outside."""

import contextlib
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest.mock

from lib import BIN, Everlit, is_alive, parent, run, sse, until
from outside import beat, environment, manifest

CUTS = int(os.environ.get("EVERLIT_CUTS", "5"))
LINES = int(os.environ.get("EVERLIT_LINES", "200000"))
SAVE_KILLS = int(os.environ.get("EVERLIT_SAVE_KILLS", "20"))
SMALL = {"model": "mlp-10k", "steps": 400, "batch_size": 32}


def a_true_job_passes_through_every_layer():
    with Everlit() as everlit:
        job = everlit.submit(command=["true"])
        summary = everlit.final(job)
        assert summary["state"] == "succeeded", summary
        assert summary["ranks"][0]["exit"]["code"] == 0 and summary["ranks"][0]["pid"] is None, summary
        names = [e["event"] for e in everlit.events(job)]
        assert names == ["job_submitted", "attempt_placed", "job_running", "job_final"], names
        ledger = summary["ledger"]
        assert abs(sum(ledger.values()) - wall(summary)) < 0.005, (ledger, wall(summary))


def wall(summary):
    at = lambda key: time.mktime(time.strptime(summary[key][:19], "%Y-%m-%dT%H:%M:%S")) + float(summary[key][19:-1])
    return at("finished_at") - at("submitted_at")


def a_program_gets_torchrun_s_environment():
    wanted = """RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE MASTER_ADDR
        MASTER_PORT TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_ERROR_FILE
        TORCH_NCCL_ASYNC_ERROR_HANDLING OMP_NUM_THREADS PYTHONUNBUFFERED EVERLIT_JOB_ID EVERLIT_ATTEMPT EVERLIT_HEARTBEAT_FILE
        EVERLIT_CHECKPOINT_DIR EVERLIT_RESUME_FROM EVERLIT_DATA_SHARDS PATH""".split()
    with Everlit() as everlit:
        os.environ["EVERLIT_TEST_LEAK"] = "secret"
        job = everlit.submit(command=["env", "-0"], world_size=2, env={"MINE": "yes"}, secrets={"KEY": "s3cr3t"})
        assert everlit.final(job)["state"] == "succeeded"
        seen = []
        for rank in (0, 1):
            text = everlit.get(f"/jobs/{job}/logs?rank={rank}", raw=True).decode()
            seen.append(dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair))
        for env in seen:
            missing = [name for name in wanted if name not in env]
            assert not missing, missing
            assert env["MINE"] == "yes" and env["KEY"] == "s3cr3t" and "EVERLIT_TEST_LEAK" not in env and "EVERLIT_TOKEN" not in env
            assert env["EVERLIT_JOB_ID"] == env["TORCHELASTIC_RUN_ID"] == job and env["WORLD_SIZE"] == "2"
        assert [env["RANK"] for env in seen] == ["0", "1"]
        differing = {name for name in seen[0] if seen[0][name] != seen[1].get(name)}
        allowed = {"RANK", "LOCAL_RANK", "ROLE_RANK", "TORCHELASTIC_ERROR_FILE", "EVERLIT_HEARTBEAT_FILE", "EVERLIT_DATA_SHARDS"}
        assert differing <= allowed, differing
        # What the program itself printed (the tail of its exit) is its own affair.
        shown = json.dumps([everlit.get(f"/jobs/{job}"), everlit.events(job), everlit.get("/jobs")])
        assert "s3cr3t" not in shown and "***" in shown


def a_foreign_program_is_restarted_read_and_resumed():
    script = pathlib.Path(tempfile.mkdtemp(prefix="everlit-e2e-")) / "program.py"
    script.write_text(
        """
import os, pathlib, subprocess, sys, time
rank, attempt = os.environ["RANK"], int(os.environ["EVERLIT_ATTEMPT"])
resume = os.environ["EVERLIT_RESUME_FROM"]
start = int((pathlib.Path(resume) / "state.txt").read_text()) if resume else 0
print(f"rank {rank} attempt {attempt} begins at {start}")
for step in range(start + 1, 41):
    time.sleep(0.02)
    if rank == "0":
        print(f"step={step}/40 loss={10 / step:.3f}")
        if step == 20 and attempt == 1:
            draft = pathlib.Path(os.environ["EVERLIT_CHECKPOINT_DIR"]) / "mine-20"
            draft.mkdir()
            (draft / "state.txt").write_text(str(step))
            subprocess.run([sys.argv[1], "checkpoint", "commit", str(draft), "--step", str(step)], check=True)
    if step == 30 and attempt == 1 and rank == "1":
        sys.exit(9)
"""
    )
    with Everlit() as everlit:
        command = [sys.executable, str(script), str(BIN / "everlit-agent")]
        job = everlit.submit(command=command, world_size=2, restart={"scope": "gang"})
        summary = everlit.final(job)
        assert summary["state"] == "succeeded" and summary["restarts"] == 1 and summary["attempt"] == 2, summary
        assert summary["step"] == 40 and summary["total_steps"] == 40 and summary["progress"] == 1.0, summary
        assert abs(summary["loss"] - 0.25) < 1e-9, summary
        log = everlit.get(f"/jobs/{job}/logs", raw=True).decode()
        assert "rank 0 attempt 1 begins at 0" in log and "rank 1 attempt 2 begins at 20" in log, log
        attempts = everlit.get(f"/jobs/{job}/attempts")
        attempts = attempts.get("data", attempts) if isinstance(attempts, dict) else attempts
        assert attempts[0]["cause"] == "exit" and attempts[0]["first_failed_rank"] == 1 and attempts[1]["resumed_from_step"] == 20, attempts


def a_crash_loop_is_visible_and_ends_with_the_rank_s_words():
    with Everlit() as everlit:
        job = everlit.submit(
            command=["sh", "-c", "echo no such model: tiny >&2; exit 3"],
            restart={"max_start_failures": 8, "backoff": {"max": "4s"}},
        )
        summary = everlit.final(job)
        assert summary["state"] == "failed" and "no such model: tiny" in summary["reason"], summary
        delays = [e["data"]["delay_ms"] for e in everlit.events(job) if e["event"] == "restart_scheduled"]
        plain = [500, 1000, 2000, 4000, 4000, 4000, 4000]
        assert len(delays) == 7 and all(max(500, p * 0.8) <= d <= p * 1.2 for d, p in zip(delays, plain)), delays
        assert len(set(delays[3:])) > 1, "no jitter: " + str(delays)
        print(f"     delays: {delays}; reason: {summary['reason']}")


def has_frames(text):
    return "everlit_worker::main" in text and "gloo::transport::tcp::Loop::run" in text


def a_stopped_rank_is_found_by_its_gang_s_own_pace():
    with Everlit() as everlit:
        worker = {"model": "mlp-10k", "steps": 1_000_000, "batch_size": 16}
        job = everlit.submit(world_size=2, worker=worker, checkpoint={"every_steps": 200}, restart={"backoff": {"initial": "50ms", "max": "50ms"}})
        before = everlit.at_step(job, 1500)
        for rank in before["ranks"]:
            tell = [BIN / "everlit-agent", "stacks", str(rank["pid"])]
            # Only of a thread that waits, which each does in most of its steps.
            until("frames", lambda: has_frames(subprocess.run(tell, capture_output=True, text=True, check=True, timeout=60).stdout))
        stopped = time.monotonic()
        os.kill(before["ranks"][1]["pid"], signal.SIGSTOP)

        def failed():
            return next((e for e in everlit.events(job) if e["event"] in ("rank_replaced", "gang_failed")), None)

        # Without it the silence of ten seconds would be the first to tell.
        event = until("the standstill to be seen", failed, 9)
        seen = time.monotonic() - stopped
        assert event["event"] == "rank_replaced" and event["data"]["cause"] == "stuck" and event["data"]["rank"] == 1, event
        until("the next steps", lambda: (s := everlit.summary(job))["generation"] == 1 and s["state"] == "running", 60)
        back = time.monotonic() - stopped
        summary = everlit.summary(job)
        assert summary["attempt"] == 1 and summary["restarts"] == 1 and summary["lost_steps"] == 0, summary
        assert summary["ranks"][0]["pid"] == before["ranks"][0]["pid"] and not is_alive(before["ranks"][1]["pid"]), summary
        print(f"     seen after {seen:.1f} s, beyond the old step after {back:.1f} s: {event['reason']}")
        told = everlit.get(f"/jobs/{job}/attempts/1/postmortem")
        failure = told["failures"][0]
        assert failure["cause"] == "stuck" and failure["stacks"][0]["rank"] == 1 and "stopped" in failure["stacks"][0]["text"], failure
        # Of the one that was stopped as of the other, which waits for it. A verdict waits half a second for them, which a busy machine may exceed.
        for stack in failure["stacks"]:
            late = "were not told within" in stack["text"]
            # A thread of the one that lives may run just then: such a one is told without.
            has = has_frames(stack["text"]) if stack["rank"] == 1 else "everlit_worker::" in stack["text"]
            assert has != late, stack
            print(f"     frames of rank {stack['rank']}: {'not told in time' if late else 'told'}")
        assert failure["recovered_ms"] and failure["nodes"] and all(rank["lines"] for rank in told["ranks"]), told
        assert everlit.refused("GET", f"/jobs/{job}/attempts/9/postmortem")[0] == 404
        everlit.post(f"/jobs/{job}/stop?force=true")


class Slowed(threading.Thread):
    """While it lives a process gets a tenth of the time: it is stopped and goes on again. On a busy machine the others may get no more than a third."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.over = pid, threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()

    def run(self):
        with contextlib.suppress(ProcessLookupError):
            while not self.over.is_set():
                os.kill(self.pid, signal.SIGSTOP)
                self.over.wait(0.018)
                os.kill(self.pid, signal.SIGCONT)
                time.sleep(0.002)


TELLS = """
import json, os, time
rank, path = os.environ["RANK"], os.environ["EVERLIT_HEARTBEAT_FILE"]
for step in range(1, 100_000):
    time.sleep(0.2)
    metrics = {"data_seconds": 0.18 if rank == "1" else 0.02, "compute_seconds": 0.015, "exchange_seconds": 0.0 if rank == "1" else 0.16}
    beat = {"seq": step, "rank": int(rank), "phase": "train", "step": step, "metrics": metrics}
    with open(path + ".tmp", "w") as file:
        json.dump(beat, file)
    os.rename(path + ".tmp", path)
"""


def a_slow_rank_is_named_with_its_part_while_it_holds_the_others_up():
    with Everlit() as everlit:
        told = lambda job, name: [e for e in everlit.events(job) if e["event"] == name]
        foreign = everlit.submit(command=[sys.executable, "-c", TELLS], world_size=2)
        # Steps are long beside one stop, so that stops fall into all that it does and not now into this and now into that.
        worker = {"model": "mlp-500k", "steps": 1_000_000, "batch_size": 2048}
        # Stops are many and short: it is not to be taken for one that hangs.
        patient = {"timeout": "60s", "progress_timeout": "60s"}
        job = everlit.submit(world_size=2, worker=worker, checkpoint={"every_steps": 1000}, heartbeat=patient)
        summary = everlit.at_step(job, 20)
        with Slowed(summary["ranks"][1]["pid"]):
            event = until("a slow rank", lambda: told(job, "rank_slow"), 300)[0]
            assert (event["data"]["rank"], event["data"]["part"]) == (1, "compute") and event["data"]["ratio"] > 1.5, event
            print(f"     {event['reason']}")
            assert [rank["slow"] for rank in everlit.summary(job)["ranks"]] == [None, "compute"]
            assert "slow: compute" in subprocess.check_output([BIN / "everlit", "get", job], env={**os.environ, "EVERLIT_URL": everlit.url}, text=True)
            event = until("the other program's", lambda: told(foreign, "rank_slow"), 60)[0]
            assert "needs 5.6 times as long" in event["reason"] and "data takes 180 ms, theirs 20 ms" in event["reason"], event
            assert event["data"]["rank"] == 1, event
            assert "everlit_slow_ranks 2" in everlit.get("/metrics", raw=True).decode()
        over = until("it keeps up", lambda: told(job, "rank_slow_over"), 300)[0]
        assert over["data"]["rank"] == 1, over
        assert [rank["slow"] for rank in everlit.summary(job)["ranks"]] == [None, None]
        assert len(told(job, "rank_slow")) == len(told(foreign, "rank_slow")) == 1 and not told(foreign, "rank_slow_over")
        assert everlit.summary(job)["restarts"] == everlit.summary(foreign)["restarts"] == 0


def a_spare_takes_a_lost_rank_s_place_and_the_others_never_stop():
    with Everlit() as everlit:
        job = everlit.submit(world_size=2, worker={"model": "mlp-10k", "steps": 1_000_000, "batch_size": 16}, restart={"spares": 1})
        able = lambda s: s["spares"] and s["spares"][0]["pid"] and s["spares"][0]["phase"] == "load"
        everlit.at_step(job, 300)
        before = until("a spare that waits", lambda: able(s := everlit.summary(job)) and s, 30)
        os.kill(before["ranks"][0]["pid"], signal.SIGKILL)
        after = until("its place taken", lambda: (s := everlit.summary(job))["generation"] == 1 and s["state"] == "running" and s, 30)
        assert after["ranks"][0]["pid"] == before["spares"][0]["pid"] and after["ranks"][1]["pid"] == before["ranks"][1]["pid"], after
        assert after["attempt"] == 1 and after["restarts"] == 1 and after["lost_steps"] == 0 and after["ledger"]["backoff"] == 0, after
        again = until("another spare", lambda: able(s := everlit.summary(job)) and s, 30)
        assert again["spares"][0]["pid"] != before["spares"][0]["pid"], again
        # What the spare writes is the rank's from now on.
        log = lambda: everlit.get(f"/jobs/{job}/logs?rank=0", raw=True).decode()
        until("its lines in the rank's log", lambda: "step=" in log().partition("taking over at step")[2], 30)
        everlit.post(f"/jobs/{job}/stop")
        everlit.final(job)
        pids = [r["pid"] for s in (before, again) for r in s["ranks"] + s["spares"]]
        until("every process gone", lambda: not any(map(is_alive, pids)), 10)


def an_elastic_gang_goes_on_with_fewer_ranks_and_grows_back():
    """Twice: the second time the process that is to join is killed, too, before it can."""
    with Everlit() as everlit:
        worker = {"model": "mlp-10k", "steps": 1_000_000, "batch_size": 12}
        restart = {"backoff": {"initial": "50ms", "max": "1s"}}
        job = everlit.submit(world_size=3, min_world_size=2, worker=worker, checkpoint={"every_steps": 500}, restart=restart)
        everlit.at_step(job, 100)
        seen = lambda name: [event for event in everlit.events(job) if event["event"] == name]
        able = lambda rank: rank["pid"] and beat(environment(rank["pid"])["EVERLIT_HEARTBEAT_FILE"]).get("in_place")
        tried = lambda: all(able(rank) for rank in everlit.summary(job)["ranks"])
        until("every rank's self-test", tried, 30)
        # What a heartbeat said then is known to the coordinator with the steps after it.
        before = everlit.at_step(job, everlit.summary(job)["step"] + 50)
        os.kill(before["ranks"][0]["pid"], signal.SIGKILL)
        until("fewer ranks that step", lambda: seen("recovered_in_place"), 120)
        until("three ranks again", lambda: len(seen("gang_grown")) == 1, 60)
        after = everlit.summary(job)
        pids = [rank["pid"] for rank in after["ranks"]]
        assert pids[:2] == [before["ranks"][2]["pid"], before["ranks"][1]["pid"]] and len(pids) == 3, (before, after)
        assert (after["attempt"], after["restarts"], after["lost_steps"]) == (1, 1, 0), after
        until("three ranks that can go on", tried, 30)
        everlit.at_step(job, everlit.summary(job)["step"] + 50)

        os.kill(after["ranks"][2]["pid"], signal.SIGKILL)
        joins = until("one that is to join", lambda: (s := everlit.summary(job))["spares"] and s["spares"][0]["pid"], 30)
        os.kill(joins, signal.SIGKILL)
        until("three ranks once more", lambda: len(seen("gang_grown")) == 2, 60)
        again = everlit.summary(job)
        assert (again["attempt"], again["restarts"], again["lost_steps"], len(again["ranks"])) == (1, 2, 0, 3), again
        assert joins not in [rank["pid"] for rank in again["ranks"]] and again["ledger"]["backoff"] == 0, again
        took = [event["data"]["took_ms"] for event in everlit.events(job) if event["event"] in ("recovered_in_place", "gang_grown")]
        print(f"     shrunk and grown twice, all stepping again after {took} ms")
        everlit.post(f"/jobs/{job}/stop")
        final = everlit.final(job)
        saved = manifest(pathlib.Path(final["last_checkpoint"]["location"].split(":", 1)[1]))
        assert saved["samples"] == 12 * saved["step"] and saved["world_size"] == 3, saved


def an_elastic_gang_begins_small_and_takes_the_room_that_comes():
    with Everlit() as everlit:
        cpus = everlit.get("/nodes")["data"][0]["capacity"]["cpus"]
        filler = everlit.submit(command=["sleep", "600"], resources={"cpus": cpus - 1})
        everlit.running(filler)
        worker = {"model": "mlp-10k", "steps": 1_000_000, "batch_size": 16}
        job = everlit.submit(world_size=2, min_world_size=1, worker=worker, resources={"cpus": 1}, checkpoint={"every_steps": 200})
        small = everlit.at_step(job, 300)
        assert len(small["ranks"]) == 1, small
        everlit.post(f"/jobs/{filler}/stop?force=true")
        until("two ranks that step", lambda: any(e["event"] == "gang_grown" for e in everlit.events(job)), 60)
        grown = everlit.at_step(job, everlit.summary(job)["step"] + 100)
        assert len(grown["ranks"]) == 2 and grown["ranks"][0]["pid"] == small["ranks"][0]["pid"], grown
        assert (grown["attempt"], grown["restarts"], grown["lost_steps"]) == (1, 0, 0), grown
        placed = next(e for e in everlit.events(job) if e["event"] == "attempt_placed")
        print(f"     {placed['reason']}; {next(e for e in everlit.events(job) if e['event'] == 'gang_grown')['reason']}")


def one_rank_is_restarted_and_the_others_hear_nothing():
    with Everlit() as everlit, tempfile.TemporaryDirectory() as folder:
        script = 'echo "rank $RANK of $WORLD_SIZE, restart $TORCHELASTIC_RESTART_COUNT"; while [ ! -e "$DONE" ]; do sleep 0.05; done; echo "rank $RANK done"'
        done = pathlib.Path(folder, "done")
        job = everlit.submit(world_size=3, command=["sh", "-c", script], env={"DONE": str(done)}, restart={"scope": "rank"})
        before = [rank["pid"] for rank in everlit.running(job)["ranks"]]

        def replaced(rank, old):
            summary = everlit.summary(job)
            return summary if summary["ranks"][rank]["pid"] not in (None, old) else None

        killed = time.monotonic()
        os.kill(before[1], signal.SIGKILL)
        first = until("another process of rank 1", lambda: replaced(1, before[1]))
        took = time.monotonic() - killed
        pids = [rank["pid"] for rank in first["ranks"]]
        assert (pids[0], pids[2]) == (before[0], before[2]) and (first["attempt"], first["restarts"]) == (1, 1), first
        # With the agent dead nobody sees the end; the next agent does.
        os.kill(everlit.agent_pid(), signal.SIGKILL)
        os.kill(pids[2], signal.SIGKILL)
        second = until("another process of rank 2", lambda: replaced(2, pids[2]))
        everlit.kill()
        os.kill(before[0], signal.SIGKILL)
        everlit.up()
        third = until("another process of rank 0", lambda: replaced(0, before[0]))
        assert [rank["pid"] for rank in third["ranks"]][1:] == [pids[1], second["ranks"][2]["pid"]] and third["attempt"] == 1, third
        done.touch()
        summary = everlit.final(job)
        assert (summary["state"], summary["attempt"], summary["restarts"]) == ("succeeded", 1, 3), summary
        lines = everlit.get(f"/jobs/{job}/logs", raw=True).decode().splitlines()
        assert sum("done" in line for line in lines) == 3 and sum("rank 1 of 3" in line for line in lines) == 2, lines
        told = everlit.get(f"/jobs/{job}/attempts/1/postmortem")["failures"]
        assert [failure["rank"] for failure in told] == [1, 2, 0] and all("only this rank" in failure["decision"] for failure in told), told
        print(f"     another process of the killed rank after {took:.2f} s, the others went on")


def a_rank_that_the_kernel_kills_for_want_of_memory_is_told_as_such():
    group = pathlib.Path("/sys/fs/cgroup/memory/everlit-e2e")
    if os.geteuid() != 0 or not group.parent.joinpath("memory.limit_in_bytes").exists():
        print("     SKIPPED: needs root and the memory controller of cgroups version 1")
        return
    group.mkdir(exist_ok=True)
    try:
        group.joinpath("memory.limit_in_bytes").write_text(str(64 << 20))
        with Everlit() as everlit:
            script = f"echo before it; echo $$ > {group}/cgroup.procs && exec {sys.executable} -c 'x = bytearray(1 << 29)'"
            job = everlit.submit(command=["sh", "-c", script], restart={"max_restarts": 0})
            summary = everlit.final(job)
            assert summary["state"] == "failed" and "want of memory" in summary["reason"], summary["reason"]
            told = everlit.get(f"/jobs/{job}/attempts/1/postmortem")
            assert told["cause"] == "out_of_memory" and told["failures"][0]["exit"]["signal"] == 9, told
            assert told["ranks"] == [{"rank": 0, "lines": ["before it"]}] and "restarts are used" in told["decision"], told
            print(f"     {told['reason']}; {told['decision']}")
    finally:
        group.rmdir()


def a_line_of_output_ends_retries_or_keeps_from_the_node():
    line = "CUDA error: uncorrectable ECC error encountered"
    # Below the line a native stack trace, longer than what is told of the output.
    script = f"echo 'step 1'; echo '{line}' >&2; for n in $(seq 100); do echo \"frame #$n: c10::cuda\"; done; exit 1"
    policy = lambda action: [{"name": "ecc", "pattern": "(?i)uncorrectable ecc", "action": action}]
    with Everlit() as everlit:
        job = everlit.submit(command=["sh", "-c", script], log_policies=policy("cancel_retries"))
        summary = everlit.final(job)
        reason = summary["reason"]
        assert summary["state"] == "failed" and summary["attempt"] == 1 and summary["restarts"] == 0, summary
        assert line in reason and '"ecc"' in reason and "rank 0" in reason and "cancel_retries" in reason, reason
        exit = summary["ranks"][0]["exit"]
        assert exit["matched"] == {"policy": 0, "line": line} and len(exit["tail"]) == 20, exit
        told = everlit.get(f"/jobs/{job}/attempts/1/postmortem")
        assert line in told["reason"] and line in told["failures"][0]["decision"] and line in told["decision"], told
        event = next(e for e in everlit.events(job) if e["event"] == "log_policy_matched")
        assert event["data"]["action"] == "cancel_retries" and event["data"]["line"] == line, event
        print(f"     {reason}")

        # The one node there is: the job waits, says so, and a user may change that.
        job = everlit.submit(command=["sh", "-c", script], log_policies=policy("exclude_node"))
        until("the job to wait", lambda: everlit.summary(job)["state"] == "queued" and everlit.summary(job)["attempt"] == 1, 30)
        told = everlit.get(f"/jobs/{job}/explain")
        assert "no other node can hold it" in told["reason"] and all("log_policies" in why for why in told["nodes"].values()), told
        print(f"     {told['reason']}")
        node = everlit.get("/nodes")["data"][0]
        assert len(node["blames"]) == 2 and node["avoided"], node
        everlit.post(f"/jobs/{job}/restart")
        until("its next attempt", lambda: everlit.summary(job)["attempt"] == 2, 30)
        everlit.post(f"/jobs/{job}/stop")
        everlit.final(job)
        everlit.post(f"/nodes/{node['node']}/uncordon")
        until("a clean slate", lambda: not everlit.get("/nodes")["data"][0]["avoided"], 10)


def a_broken_gpu_is_named_and_left_for_another():
    """No GPU is needed: where NVIDIA's library is loaded from stands one that answers from files."""
    source = pathlib.Path(__file__).resolve().parents[2] / "worker/tests/fake_nvml.c"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as undo:
        fake = pathlib.Path(folder)
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", fake / "libnvidia-ml.so.1", source], check=True)
        paths = os.pathsep.join(filter(None, [folder, os.environ.get("LD_LIBRARY_PATH")]))
        undo.enter_context(unittest.mock.patch.dict(os.environ, {"LD_LIBRARY_PATH": paths, "EVERLIT_FAKE_NVML": folder}))
        everlit = undo.enter_context(Everlit())
        script = "echo gpus $CUDA_VISIBLE_DEVICES; echo step=$EVERLIT_ATTEMPT; sleep 600"
        job = everlit.submit(command=["sh", "-c", script], resources={"gpus": 1})
        first = until("the first attempt", lambda: everlit.summary(job)["ranks"][0]["pid"], 30)
        assert everlit.get("/nodes")["data"][0]["gpus_granted"] == [0]
        (fake / "draft").write_text("0 79\n")
        (fake / "draft").rename(fake / "xid")
        event = until("the error", lambda: next((e for e in everlit.events(job) if e["event"] == "gpu_error"), None), 30)
        print(f"     {event['reason']}")
        os.kill(first, signal.SIGKILL)
        until("the next attempt", lambda: (s := everlit.summary(job))["attempt"] == 2 and s["ranks"][0]["pid"], 30)
        node = everlit.get("/nodes")["data"][0]
        assert (node["gpus_avoided"], node["gpus_granted"], node["avoided"], node["blames"]) == ([0], [1], False, []), node
        told = everlit.get(f"/jobs/{job}/attempts/1/postmortem")
        assert told["cause"] == "gpu" and told["first_failed_rank"] == 0 and "without cost" in told["decision"], told
        assert f"GPU 0 of {node['node']} fell off the bus (Xid 79): the hardware, not the program" in told["reason"], told
        assert "gpu" in [failure["cause"] for failure in told["failures"]], told
        everlit.post(f"/jobs/{job}/stop?force=true")
        assert everlit.final(job)["restarts"] == 1
        everlit.post(f"/nodes/{node['node']}/uncordon")
        until("a clean slate", lambda: not everlit.get("/nodes")["data"][0]["gpus_avoided"], 10)


def typed_as_it_stands():
    """The owner's lines, through bash, curl, jq and ps."""
    missing = [tool for tool in ("bash", "curl", "jq", "ps") if not shutil.which(tool)]
    if missing:
        print(f"     SKIPPED: {', '.join(missing)} not found; README.md says how to get it")
        return
    with Everlit() as everlit:
        script = """
            set -e
            JOB_ID=$(curl -s -X POST $URL/jobs -H "Content-Type: application/json" -d '{"world_size": 4}' | jq -r .job_id)
            echo "$JOB_ID"
            curl -s $URL/jobs/$JOB_ID/summary | jq -e '.ranks | length == 4' >/dev/null
            (curl -sN --max-time 20 $URL/jobs/$JOB_ID/logs/stream || true) | grep -m1 '^event: log' >/dev/null
            test "$(curl -s -o /dev/null -w '%{http_code}' -X DELETE $URL/jobs/$JOB_ID)" = 409
        """
        done = subprocess.run(["bash", "-c", script], env={**os.environ, "URL": everlit.url}, capture_output=True, text=True)
        assert done.returncode == 0, done
        job = done.stdout.strip()
        everlit.at_step(job, 3)
        listing = subprocess.check_output(["ps", "aux"], text=True)
        workers = [int(line.split()[1]) for line in listing.splitlines() if "everlit-worker train" in line and job in line]
        pids = [r["pid"] for r in everlit.summary(job)["ranks"]]
        assert sorted(workers) == sorted(pids), (workers, pids)
        os.kill(workers[2], signal.SIGKILL)
        until("recovered", lambda: (s := everlit.running(job))["restarts"] == 1 and s, 60)
        everlit.at_step(job, 1)
        # The shim's death is survived too, and free.
        shim = parent(everlit.summary(job)["ranks"][1]["pid"])
        os.kill(shim, signal.SIGKILL)
        until("recovered again", lambda: (s := everlit.running(job))["restarts"] == 2 and s, 60)
        causes = [e["data"].get("cause") for e in everlit.events(job) if e["event"] in ("restart_scheduled", "rank_replaced")]
        assert causes == ["signal", "infrastructure"], causes
        everlit.at_step(job, 1)
        assert everlit.refused("DELETE", f"/jobs/{job}")[0] == 409
        pids = [r["pid"] for r in everlit.summary(job)["ranks"]]
        everlit.request("DELETE", f"/jobs/{job}?stop_first=true")
        until("the job's removal", lambda: gone(everlit, job), 60)
        assert not any(is_alive(pid) for pid in pids)
        until("its files' removal", lambda: not (everlit.data / "agent/jobs" / job).exists(), 20)


def gone(everlit, job):
    try:
        everlit.get(f"/jobs/{job}")
        return False
    except Exception as e:
        return getattr(e, "status", 0) == 404


def the_coordinator_s_death_is_not_noticed():
    with Everlit() as everlit:
        job = everlit.submit(world_size=2, worker={**SMALL, "steps": 1500})
        before = everlit.at_step(job, 100)
        pids = [r["pid"] for r in before["ranks"]]
        history = everlit.events(job)
        everlit.kill()
        heartbeats = list((everlit.data / "agent/jobs" / job).rglob("HEARTBEAT"))
        steps = [json.loads(h.read_text())["step"] for h in heartbeats]
        until("steps without a coordinator", lambda: all(json.loads(h.read_text())["step"] > s + 20 for h, s in zip(heartbeats, steps)))
        assert all(map(is_alive, pids))
        everlit.up()
        after = everlit.running(job)
        assert [r["pid"] for r in after["ranks"]] == pids and after["attempt"] == 1 and after["restarts"] == 0, after
        assert everlit.events(job)[: len(history)] == history
        final = everlit.final(job)
        assert final["state"] == "succeeded" and final["restarts"] == 0 and final["step"] == 1500, final


def ctrl_c_saves_and_the_next_up_resumes():
    with Everlit() as everlit:
        job = everlit.submit(world_size=2, worker={**SMALL, "steps": 3000}, checkpoint={"every_steps": 100000})
        reached = everlit.at_step(job, 150)["step"]
        assert everlit.interrupt() == 0
        assert everlit.agent_pid() is None
        everlit.up()
        after = everlit.at_step(job, reached)
        resumed = [e for e in everlit.events(job) if e["event"] == "attempt_resumed"]
        assert resumed and resumed[-1]["data"]["step"] >= reached, resumed
        assert after["restarts"] == 0 and after["lost_steps"] == 0, after
        assert everlit.final(job)["state"] == "succeeded"


def sigterm_leaves_ranks_running():
    with Everlit() as everlit:
        job = everlit.submit(command=["sleep", "1000"], world_size=2)
        pids = [r["pid"] for r in everlit.running(job)["ranks"]]
        everlit.process.terminate()
        assert everlit.process.wait(20) == 0
        assert all(map(is_alive, pids))
        everlit.up()
        assert [r["pid"] for r in everlit.running(job)["ranks"]] == pids


def the_agent_s_death_is_not_noticed():
    with Everlit() as everlit:
        job = everlit.submit(command=["sleep", "1000"], world_size=2)
        short = everlit.submit(command=["sh", "-c", "sleep 1; exit 0"])
        everlit.running(short)
        pids = [r["pid"] for r in everlit.running(job)["ranks"]]
        old = everlit.agent_pid()
        os.kill(old, signal.SIGKILL)
        until("another agent", lambda: (new := everlit.agent_pid()) and new != old and new)
        assert everlit.final(short)["state"] == "succeeded"
        until("the node", lambda: everlit.get("/status")["nodes"]["ready"] == 1)
        assert [r["pid"] for r in everlit.running(job)["ranks"]] == pids


def a_reader_misses_and_repeats_nothing_over_cuts():
    """A long log, read with cuts of the connection and of the coordinator; the bytes are hashed on both sides."""
    with Everlit() as everlit:
        program = f"import sys\nfor n in range({LINES}): sys.stdout.write('line %d of the log, with some text to carry\\n' % n)"
        job = everlit.submit(command=[sys.executable, "-c", program])
        rng = random.Random(7)
        digest, last, count, cuts, ended = hashlib.sha256(), None, 0, 0, False
        per_cut = LINES // (CUTS + 1)
        while not ended:
            headers = {"Last-Event-ID": last} if last else {}
            try:
                ended, last, count = read_some(everlit, job, headers, digest, last, count, per_cut if cuts < CUTS else None)
            except OSError as e:
                print(f"     cut: {e}", file=sys.stderr)
            if not ended:
                cuts += 1
                if cuts % 2 and rng.random() < 0.8:
                    everlit.kill()
                    everlit.up()
        expected = hashlib.sha256()
        for n in range(LINES):
            expected.update(b"line %d of the log, with some text to carry\n" % n)
        assert count == LINES and digest.digest() == expected.digest(), (count, LINES)
        assert cuts >= CUTS, cuts
        print(f"     {count} lines over {cuts} cuts, sha256 {digest.hexdigest()[:16]}… equal")


def read_some(everlit, job, headers, digest, last, count, stop_after):
    import urllib.request

    request = urllib.request.Request(f"{everlit.url}/jobs/{job}/logs/stream", headers=headers)
    taken = 0
    with urllib.request.urlopen(request, timeout=60) as response:
        for event_id, event, data in sse(response):
            if event == "end":
                return True, event_id, count
            assert event == "log", (event, data)
            digest.update(data["line"].encode() + b"\n")
            last, count, taken = event_id, count + 1, taken + 1
            if stop_after and taken >= stop_after:
                break
    return False, last, count


def kills_at_any_moment_of_a_save_leave_only_whole_checkpoints():
    rng = random.Random(11)
    with Everlit() as everlit:
        job = everlit.submit(
            world_size=2,
            worker={"model": "mlp-500k", "steps": 1_000_000, "batch_size": 16},
            checkpoint={"every_steps": 5},
            restart={"scope": "gang", "max_restarts": 100_000, "max_start_failures": 1000, "backoff": {"initial": "1ms", "max": "1ms"}},
        )
        folder = everlit.data / "agent/jobs" / job / "checkpoints"
        in_save = 0
        for n in range(SAVE_KILLS):
            attempt = n + 1
            until("stepping", lambda: (s := everlit.summary(job))["attempt"] == attempt and s["step"] and s["state"] == "running", 60, 0.01)
            pids = [r["pid"] for r in everlit.summary(job)["ranks"]]
            until("a save", lambda: any(folder.glob(".draft-*")), 60, 0.0005)
            time.sleep(rng.random() * 0.02)
            in_save += any(folder.glob(".draft-*"))
            os.kill(rng.choice(pids), signal.SIGKILL)
            until("the restart", lambda: everlit.summary(job)["attempt"] == attempt + 1, 60, 0.01)
        everlit.at_step(job, 1)
        events = []
        after = ""
        while True:
            page = everlit.get(f"/jobs/{job}/events?limit=500{after}")
            events += page["data"]
            if not page["has_more"]:
                break
            after = f"&after={page['last_id']}"
        resumes = [e for e in events if e["event"] == "attempt_resumed"]
        torn = [e for e in events if e["event"] == "checkpoint_quarantined"]
        everlit.post(f"/jobs/{job}/stop?force=true")
        everlit.final(job)
        assert len(resumes) == SAVE_KILLS and not torn, (len(resumes), torn)
        for found in folder.glob("step-*"):
            subprocess.run([BIN / "everlit-agent", "checkpoint", "verify", found], check=True, stdout=subprocess.DEVNULL)
        assert in_save, "no kill fell into a save"
        print(f"     {SAVE_KILLS} kills, {in_save} with a save under way, {len(resumes)} resumes, 0 torn")


CHECKS = [
    a_true_job_passes_through_every_layer,
    a_program_gets_torchrun_s_environment,
    a_foreign_program_is_restarted_read_and_resumed,
    a_crash_loop_is_visible_and_ends_with_the_rank_s_words,
    a_stopped_rank_is_found_by_its_gang_s_own_pace,
    a_slow_rank_is_named_with_its_part_while_it_holds_the_others_up,
    a_spare_takes_a_lost_rank_s_place_and_the_others_never_stop,
    an_elastic_gang_goes_on_with_fewer_ranks_and_grows_back,
    an_elastic_gang_begins_small_and_takes_the_room_that_comes,
    one_rank_is_restarted_and_the_others_hear_nothing,
    a_rank_that_the_kernel_kills_for_want_of_memory_is_told_as_such,
    a_line_of_output_ends_retries_or_keeps_from_the_node,
    a_broken_gpu_is_named_and_left_for_another,
    typed_as_it_stands,
    the_coordinator_s_death_is_not_noticed,
    ctrl_c_saves_and_the_next_up_resumes,
    sigterm_leaves_ranks_running,
    the_agent_s_death_is_not_noticed,
    a_reader_misses_and_repeats_nothing_over_cuts,
    kills_at_any_moment_of_a_save_leave_only_whole_checkpoints,
]

if __name__ == "__main__":
    run(CHECKS, "e2e-main")
