"""Object storage from the outside: a real S3 server, and a proxy of ours that fails in every way."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import tempfile
import time

from lib import BIN, Everlit, is_alive, run, sse, until
from stores import KEY, READER, READER_SECRET, SECRET, Proxy, Weed

# Bits are compared: everything is a function of seed, step and rank.
STEPS = 240
TRAINED = {"model": "llama-1m", "steps": STEPS, "batch_size": 8, "sequence_length": 32, "seed": 5, "deterministic": True}
SEED = int(os.environ.get("EVERLIT_SEED", str(random.SystemRandom().randrange(1 << 32))))
FAST = {"initial": "50ms", "max": "500ms"}


def opened(url, key=KEY, secret=SECRET):
    """What a job needs to reach the server."""
    return {"env": {"AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1"}, "secrets": {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}}


def checksum(folder):
    return subprocess.check_output([BIN / "everlit-worker", "checksum", folder], text=True).strip()


def checkpoints(everlit, job):
    return everlit.data / "agent" / "jobs" / job / "checkpoints"


def newest(folder):
    return max((f for f in folder.glob("step-*") if (f / "MANIFEST.json").exists()), default=None)


def named(everlit, job, event):
    return [e for e in everlit.events(job) if e["event"] == event]


def resumed(everlit, job):
    return [e["reason"] for e in named(everlit, job, "attempt_resumed")]


def trained(everlit, job):
    """The weights that a job has ended with."""
    assert everlit.final(job)["state"] == "succeeded", everlit.summary(job)["reason"]
    folder = newest(checkpoints(everlit, job))
    assert folder.name == f"step-{STEPS:012}", folder
    return checksum(folder)


UNDISTURBED = []


def undisturbed():
    if not UNDISTURBED:
        with Everlit() as everlit:
            UNDISTURBED.append(trained(everlit, everlit.submit(world_size=2, worker=TRAINED, checkpoint={"every_steps": 10})))
    return UNDISTURBED[0]


def stop_ranks(everlit, job, how=signal.SIGKILL):
    """No rank saves or says anything more."""
    for rank in everlit.summary(job)["ranks"]:
        if rank["pid"]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank["pid"], how)


def remove(folder):
    """All of it, though a shim or an agent may still write a line."""
    until("it is gone", lambda: shutil.rmtree(folder, ignore_errors=True) or not folder.exists())


def lose_everything(everlit):
    """The machine is gone: coordinator, agent and ranks are killed, the folder is removed."""
    pids = [rank["pid"] for job in everlit.active() for rank in everlit.summary(job["job_id"])["ranks"] if rank["pid"]]
    agent = everlit.agent_pid()
    everlit.kill()
    for pid in [agent, *pids]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until("nobody lives", lambda: not any(is_alive(pid) for pid in [agent, *pids]))
    remove(everlit.data)


def lost_midway(to, settings, committed):
    """A job whose machine is lost while it trains, as what is in its store shows; and the newest step there."""
    for _ in range(5):
        lost = Everlit()
        lost.up()
        job = lost.submit(world_size=2, worker=TRAINED, checkpoint={"every_steps": 10, "to": to}, **settings)
        until("a few are in the store", lambda: committed(job)[-1:] >= [20], 120)
        lose_everything(lost)
        if committed(job)[-1] < STEPS:
            return job, committed(job)[-1]
    raise AssertionError("it was always through before it was lost")


def trains_to_a_bucket_loses_all_else_and_goes_on_elsewhere():
    wanted = undisturbed()
    with Weed() as weed:
        job, step = lost_midway("s3://runs", opened(weed.url()), weed.committed)
        with Everlit() as everlit:
            again = everlit.submit(world_size=2, worker=TRAINED, checkpoint={"every_steps": 10, "to": "s3://runs"}, resume_from=f"s3://runs/{job}", **opened(weed.url()))
            assert trained(everlit, again) == wanted
            first = resumed(everlit, again)[0]
            assert first == f"attempt 1 resumes from the checkpoint of step {step}, fetched from s3://runs/{job}", first
            until("the last one is in the bucket", lambda: weed.committed(again)[-1:] == [STEPS])
            assert len(weed.committed(again)) <= 3
            print(f"     went on from step {step} of {STEPS}; the weights are an undisturbed run's ({wanted[:16]}…)")
            secret = subprocess.run(["grep", "-rlF", SECRET, everlit.data], capture_output=True, text=True).stdout.split()
            assert all(path.endswith((".db", ".db-wal", ".sqlite", ".sqlite-wal", "db.sqlite3")) or "/state" in path for path in secret), secret


def an_agent_that_lost_its_folder_fetches_what_is_in_the_bucket():
    wanted = undisturbed()
    with Weed() as weed, Everlit() as everlit:
        job = everlit.submit(world_size=2, worker=TRAINED, restart={"backoff": FAST}, checkpoint={"every_steps": 10, "to": "s3://runs/a b/ü"}, **opened(weed.url()))
        until("some are in the bucket", lambda: named(everlit, job, "checkpoint_stored"), 60)
        # Nobody writes while all of it goes, with the snapshots in shared memory.
        stop_ranks(everlit, job, signal.SIGSTOP)
        for snapshot in pathlib.Path("/dev/shm").glob(f"**/*{job}*"):
            shutil.rmtree(snapshot, ignore_errors=True)
        remove(checkpoints(everlit, job))
        stop_ranks(everlit, job)
        assert trained(everlit, job) == wanted
        print(f"     {resumed(everlit, job)[-1]}")
        assert "fetched from s3://runs/a b/ü/" in resumed(everlit, job)[-1], resumed(everlit, job)


# Answers of a store that does not do it, and what the event calls them.
ANSWERS = {403: "denied", 404: "not_found", 409: "conflict", 412: "conflict", 429: "busy", 500: "busy", 503: "busy", 507: "full", "skew": "clock", "refuse": "unreachable"}
ENDLESS = {"model": "mlp-10k", "steps": 100_000_000}


def each_bad_answer_is_told_and_costs_nothing():
    with Weed() as weed, Proxy(weed.port) as proxy, Everlit() as everlit:
        job = everlit.submit(world_size=1, worker=ENDLESS, checkpoint={"every": "1s", "to": "s3://runs"}, **opened(proxy.url()))
        until("the first is in the bucket", lambda: weed.committed(job), 60)
        for answer, trouble in ANSWERS.items():
            # 404 and 409 where they have no good meaning: what is put.
            proxy.rule = lambda method, path, answer=answer: answer if method in ("PUT", "POST") else None
            before = len(named(everlit, job, "store_failed"))
            told = until(f"{answer} is told", lambda: (e := named(everlit, job, "store_failed"))[before:] and e[-1], 120)
            assert told["data"]["trouble"] == trouble, (answer, told)
            assert answer != "skew" or "this machine's clock is off by 3600 s, behind the store's" in told["reason"], told
            assert proxy.fired[str(answer)] > 0
            step = everlit.summary(job)["step"]
            everlit.at_step(job, step + 100)
            kept = weed.committed(job)[-1]
            worked = len(named(everlit, job, "store_works_again"))
            proxy.rule = lambda method, path: None
            until("it works again", lambda: len(named(everlit, job, "store_works_again")) > worked, 120)
            assert weed.committed(job)[-1] > kept
            print(f"     {answer}: {told['reason'][:150]}")
        summary = everlit.summary(job)
        assert (summary["restarts"], summary["state"]) == (0, "running"), summary
        everlit.post(f"/jobs/{job}/stop")


def a_last_checkpoint_outlives_the_store_s_faults_and_its_agent():
    with Weed() as weed, Proxy(weed.port) as proxy, Everlit() as everlit:
        for answer in (404, "refuse"):
            proxy.rule = lambda method, path: answer if method in ("PUT", "POST") else None
            job = everlit.submit(world_size=1, worker={"model": "mlp-10k", "steps": 300}, checkpoint={"every_steps": 100, "to": "s3://runs"}, **opened(proxy.url()))
            assert everlit.final(job)["state"] == "succeeded"
            until(f"{answer} is told", lambda: named(everlit, job, "store_failed"), 120)
            assert proxy.fired[str(answer)] > 0 and not weed.committed(job)
            if answer == "refuse":
                # The agent after this one knows nothing of it but what it is told.
                gone = everlit.agent_pid()
                os.kill(gone, signal.SIGKILL)
                until("another agent", lambda: everlit.agent_pid() not in (None, gone) and everlit.get("/status")["nodes"]["ready"], 60)
            proxy.rule = lambda method, path: None
            until("the last one is in the bucket", lambda: weed.committed(job)[-1:] == [300], 120)
            until("it is told", lambda: named(everlit, job, "checkpoint_stored"), 30)


def an_outage_of_two_minutes_costs_no_step():
    seconds = int(os.environ.get("EVERLIT_OUTAGE", "120"))
    with Weed() as weed, Proxy(weed.port) as proxy, Everlit() as everlit:
        job = everlit.submit(world_size=2, worker=ENDLESS, restart={"backoff": FAST}, checkpoint={"every": "1s", "to": "s3://runs"}, **opened(proxy.url()))
        until("the first is in the bucket", lambda: weed.committed(job), 60)
        proxy.rule = lambda method, path: "refuse"
        began = time.monotonic()
        kept = weed.committed(job)[-1]
        until("it is told", lambda: named(everlit, job, "store_failed"), 60)
        # A rank dies meanwhile: the disk here has what is needed.
        stop_ranks(everlit, job)
        until("the next attempt", lambda: everlit.summary(job)["attempt"] == 2 and everlit.summary(job)["state"] == "running", 60)
        summary = everlit.at_step(job, kept + 1)
        step, restarts = summary["step"], summary["restarts"]
        until("the outage's end", lambda: time.monotonic() - began > seconds, seconds + 10, 0.5)
        assert everlit.summary(job)["step"] > step
        assert weed.committed(job)[-1] == kept, "nothing went through"
        proxy.rule = lambda method, path: None
        until("it works again", lambda: named(everlit, job, "store_works_again") and weed.committed(job)[-1] > kept, 120)
        assert everlit.summary(job)["restarts"] == restarts, "the store had none restarted"
        print(f"     {proxy.fired['refuse']} requests refused in {seconds} s; from step {kept} to {everlit.summary(job)['step']} meanwhile")
        everlit.post(f"/jobs/{job}/stop")


def through_a_store_that_fails_now_and_then_the_weights_are_the_same():
    wanted = undisturbed()
    with Weed() as weed, Proxy(weed.port) as proxy:
        dice = random.Random(SEED)
        faults = [500, 503, "refuse", "cut", "alter", ("wait", 0.3)]

        def rule(method, path):
            return dice.choice(faults) if dice.random() < 0.25 else None

        proxy.rule = rule
        job, step = lost_midway("s3://runs", opened(proxy.url()), weed.committed)
        proxy.fired.clear()
        with Everlit() as everlit:
            again = everlit.submit(world_size=2, worker=TRAINED, checkpoint={"every_steps": 10, "to": "s3://runs"}, resume_from=f"s3://runs/{job}", **opened(proxy.url()))
            assert trained(everlit, again) == wanted
            until("faults came", lambda: sum(proxy.fired.values()) > 3)
            # One that was altered may have been passed over for an older one.
            print(f"     seed {SEED}, {step} in the bucket: {resumed(everlit, again)[0]}; faults of the second part: {proxy.fired}")


def what_can_not_be_opened_says_so():
    with Weed() as weed, Everlit() as everlit:
        cases = [
            ("credentials", "a wrong key", opened(weed.url(), "nobody-knows-this-key"), "s3://runs", "access key nobo… from the job's env and secrets was not accepted"),
            ("credentials", "a wrong secret", opened(weed.url(), secret="wrong"), "s3://runs", "was not accepted"),
            ("denied", "one that may only read", opened(weed.url(), READER, READER_SECRET), "s3://runs", "may not do this"),
            ("no_bucket", "no such bucket", opened(weed.url()), "s3://nowhere", "there is no bucket `nowhere`"),
            ("unreachable", "nobody listens", opened("http://127.0.0.1:9"), "s3://runs", "could not"),
            ("no_bucket", "a folder that is not mounted", {}, "/not/mounted", "make it, or mount it"),
        ]
        for trouble, what, settings, to, words in cases:
            job = everlit.submit(world_size=1, worker={"model": "mlp-10k", "steps": 300}, checkpoint={"every_steps": 100, "to": to}, **settings)
            told = until(what, lambda: named(everlit, job, "store_failed"), 60)[0]
            assert told["data"]["trouble"] == trouble and words in told["reason"], told
            assert SECRET not in json.dumps(everlit.events(job))
            assert everlit.final(job)["state"] == "succeeded"
            print(f"     {what}: {told['reason'][:170]}")
        for place, settings, words in [
            ("s3://runs/nothing-here", opened(weed.url()), "there is no checkpoint"),
            ("s3://nowhere/x", opened(weed.url()), "there is no bucket"),
            ("s3://runs/x", opened(weed.url(), secret="wrong"), "was not accepted"),
        ]:
            job = everlit.submit(world_size=1, worker={"model": "mlp-10k", "steps": 300}, resume_from=place, restart={"max_start_failures": 1, "backoff": FAST}, **settings)
            final = everlit.final(job)
            assert final["state"] == "failed" and words in final["reason"], final
            print(f"     resume_from {place}: {final['reason'][:170]}")
        for body, words in [
            ({"checkpoint": {"to": "s3://key:secret@runs"}}, "must not hold credentials"),
            ({"checkpoint": {"to": "ftp://runs"}}, "must be s3://"),
            ({"checkpoint": {"to": "s3://runs/../x"}}, "no empty part"),
            ({"checkpoint": {"keep_stored": 2}}, "is for checkpoint.to"),
            ({"resume_from": "http://bucket/x"}, "must be s3://"),
        ]:
            status, problem = everlit.refused("POST", "/jobs", {"world_size": 1, **body})
            assert status == 422 and words in json.dumps(problem), problem


def everlit_cli(everlit, *arguments, **settings):
    """Exit code, what it prints, and what it says beside."""
    env = {**os.environ, "EVERLIT_URL": everlit.url, **settings}
    done = subprocess.run([BIN / "everlit", "checkpoints", *map(str, arguments)], env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def the_command_line_lists_verifies_fetches_and_removes():
    with Weed() as weed, Everlit() as everlit, tempfile.TemporaryDirectory() as folder:
        own = opened(weed.url())
        job = everlit.submit(world_size=2, worker=TRAINED, checkpoint={"every_steps": 30, "to": "s3://runs"}, **own)
        wanted = trained(everlit, job)
        until("all are in the bucket", lambda: weed.committed(job)[-1:] == [STEPS])
        keys = {**own["env"], **own["secrets"]}
        place = f"s3://runs/{job}"
        code, text, _ = everlit_cli(everlit, "ls", place, **keys)
        steps = [int(line.split()[0]) for line in text.splitlines()[1:]]
        assert code == 0 and steps == sorted(weed.committed(job), reverse=True), text
        code, text, _ = everlit_cli(everlit, "ls", job)
        assert code == 0 and str(STEPS) in text, text
        code, text, _ = everlit_cli(everlit, "verify", place, **keys)
        assert code == 0 and f"step {STEPS}" in text and "verified" in text, text
        code, text, _ = everlit_cli(everlit, "fetch", job, "--into", folder, **keys)
        assert code == 0 and checksum(pathlib.Path(folder) / f"step-{STEPS:012}") == wanted, text
        subprocess.run([BIN / "everlit-agent", "checkpoint", "verify", f"{folder}/step-{STEPS:012}"], check=True, stdout=subprocess.DEVNULL)
        code, _, words = everlit_cli(everlit, "fetch", place, "--into", folder, **keys)
        assert code == 1 and "is there already" in words, words
        # A byte in the bucket is another.
        name = next(name for name in weed.keys(f"runs/{job}/step-{STEPS:012}") if name.endswith(".safetensors"))
        content = bytearray(weed.get(name))
        content[-9] ^= 1
        assert weed.put(name, bytes(content))
        code, _, words = everlit_cli(everlit, "verify", place, **keys)
        assert code == 1 and "has another sha256 than committed" in words, words
        print(f"     {words.strip()}")
        code, text, _ = everlit_cli(everlit, "rm", f"{place}/step-{STEPS:012}", **keys)
        assert code == 0 and STEPS not in weed.committed(job), text
        for arguments, settings, expected, said in [
            (["ls", place], {**keys, "AWS_SECRET_ACCESS_KEY": "wrong"}, 1, "was not accepted"),
            (["verify", "s3://runs/nothing"], keys, 1, "there is no such checkpoint"),
            (["rm", place], keys, 2, "say which"),
            (["ls", "s4://x"], keys, 2, "must be s3://"),
        ]:
            code, _, words = everlit_cli(everlit, *arguments, **settings)
            assert code == expected and said in words, (arguments, code, words)


def written(folder, attempt, content):
    """A checkpoint of step 100 that a program has committed."""
    draft = folder / "new"
    draft.mkdir(parents=True)
    (draft / "part.bin").write_bytes(content)
    env = {**os.environ, "EVERLIT_CHECKPOINT_DIR": str(folder), "EVERLIT_ATTEMPT": str(attempt)}
    subprocess.run([BIN / "everlit-agent", "checkpoint", "commit", draft, "--step", "100"], env=env, check=True, stdout=subprocess.DEVNULL)
    return folder / "step-000000000100"


def of_two_that_race_to_commit_a_step_exactly_one_wins():
    with Weed() as weed, tempfile.TemporaryDirectory() as folder:
        own = opened(weed.url())
        env = {**os.environ, **own["env"], **own["secrets"]}
        put = lambda path, place: subprocess.Popen([BIN / "everlit", "checkpoints", "put", path, place], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        ends = {"first": 0, "second": 0}
        for older, newer in [(1, 1), (1, 2)]:
            one = written(pathlib.Path(folder, f"{older}{newer}a"), older, os.urandom(100_000))
            two = written(pathlib.Path(folder, f"{older}{newer}b"), newer, os.urandom(100_000))
            for round in range(20):
                place = f"s3://runs/race-{older}-{newer}-{round}"
                racing = [put(path, place) for path in ((one, two) if round % 2 else (two, one))]
                said = [process.communicate(timeout=60)[0] for process in racing]
                codes = [process.returncode for process in racing]
                kept = json.loads(weed.get(f"{place[5:]}/step-000000000100/MANIFEST.json"))
                if older == newer:
                    assert sorted(codes) == [0, 1], (codes, said)
                    won = one if codes[0 if round % 2 else 1] == 0 else two
                else:
                    # The newer attempt stays, whoever came first; the older one is refused, or was first and made room.
                    won = two
                    assert codes[1 if round % 2 else 0] == 0, said
                ends["first" if won == one else "second"] += 1
                assert kept == json.loads((won / "MANIFEST.json").read_text()), round
                assert all(code == 0 or "may not commit step 100" in text for code, text in zip(codes, said)), said
                subprocess.run([BIN / "everlit", "checkpoints", "verify", place], env=env, check=True, stdout=subprocess.DEVNULL)
        print(f"     40 races, 20 of them of two attempts: one checkpoint each time, whole; {ends}")


def a_shared_folder_works_the_same():
    wanted = undisturbed()
    with tempfile.TemporaryDirectory() as shared:
        committed = lambda job: sorted(int(path.parent.name[5:]) for path in pathlib.Path(shared, job).glob("step-*/MANIFEST.json"))
        job, step = lost_midway(f"file://{shared}", {}, committed)
        for place in [f"file://{shared}/{job}", f"{shared}/{job}"]:
            with Everlit() as everlit:
                again = everlit.submit(world_size=2, worker=TRAINED, checkpoint={"every_steps": 10, "to": shared}, resume_from=place)
                assert trained(everlit, again) == wanted
                assert resumed(everlit, again)[0] == f"attempt 1 resumes from the checkpoint of step {step}, fetched from {shared}/{job}", resumed(everlit, again)


LINES = 3_000
# Two attempts of numbered lines; the first one fails.
NUMBERED = ["sh", "-c", f'i=0; while [ $i -lt {LINES} ]; do echo "attempt $EVERLIT_ATTEMPT line $i of an archive"; i=$((i+1)); done; [ $EVERLIT_ATTEMPT = 2 ] || exit 7']


def logs_and_why_it_failed_are_there_when_the_node_is_gone():
    expected = [f"attempt {attempt} line {line} of an archive" for attempt in (1, 2) for line in range(LINES)]
    with Weed() as weed, Everlit() as everlit:
        job = everlit.submit(world_size=1, command=NUMBERED, restart={"backoff": FAST}, logs={"to": "s3://runs/logs"}, **opened(weed.url()))
        assert everlit.final(job)["state"] == "succeeded"
        read = lambda: everlit.request("GET", f"/jobs/{job}/logs", raw=True).decode().splitlines()
        assert read() == expected
        stream = lambda **more: [(id, data) for id, event, data in sse(everlit.request("GET", f"/jobs/{job}/logs/stream", raw=True, **more).splitlines(True)) if event == "log"]
        told = stream()
        until("both attempts are in the bucket", lambda: len(named(everlit, job, "logs_archived")) == 2)
        until("why the first failed, too", lambda: named(everlit, job, "postmortem_stored"))
        kept = json.loads(weed.get(f"runs/logs/{job}/postmortems/attempt-0000000001.json"))
        last = kept["ranks"][0]["lines"]
        assert kept["failures"][0]["exit"]["code"] == 7 and last == expected[LINES - 200 : LINES], kept
        assert kept == everlit.get(f"/jobs/{job}/attempts/1/postmortem")
        for again, flags in [("nobody is linked", ["--no-local-agent"]), ("a node of that name has nothing", [])]:
            agent = everlit.agent_pid()
            everlit.kill()
            if agent:
                os.kill(agent, signal.SIGKILL)
                until("the agent is gone", lambda: not is_alive(agent))
            remove(everlit.data / "agent")
            everlit.flags = flags
            everlit.up(wait=False)
            until("ready", everlit.is_ready)
            if not flags:
                until("its node", lambda: everlit.get("/status")["nodes"]["ready"])
            assert read() == expected, again
            middle = told[len(told) // 2]
            rest = stream(headers={"Last-Event-ID": middle[0]})
            assert rest == told[len(told) // 2 + 1 :], (again, rest[:1], middle)
            tail = everlit.request("GET", f"/jobs/{job}/logs?tail=3&attempt=1", raw=True).decode().splitlines()
            assert tail == expected[LINES - 3 : LINES], tail
            found = everlit.get(f"/jobs/{job}/attempts/1/postmortem")
            assert found["ranks"] == kept["ranks"] and not found.get("lines_missing"), found
            print(f"     {again}: {len(expected)} lines, each once and in order; {len(rest)} after {middle[0]}")


CHECKS = [
    logs_and_why_it_failed_are_there_when_the_node_is_gone,
    trains_to_a_bucket_loses_all_else_and_goes_on_elsewhere,
    an_agent_that_lost_its_folder_fetches_what_is_in_the_bucket,
    what_can_not_be_opened_says_so,
    the_command_line_lists_verifies_fetches_and_removes,
    of_two_that_race_to_commit_a_step_exactly_one_wins,
    a_shared_folder_works_the_same,
    each_bad_answer_is_told_and_costs_nothing,
    a_last_checkpoint_outlives_the_store_s_faults_and_its_agent,
    through_a_store_that_fails_now_and_then_the_weights_are_the_same,
    an_outage_of_two_minutes_costs_no_step,
]

if __name__ == "__main__":
    run(CHECKS, "e2e-s3")
