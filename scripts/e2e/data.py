"""Data shards in a bucket, from the outside: a real S3 server, and a proxy of ours that fails in every way."""

import contextlib
import os
import pathlib
import random
import signal
import tempfile

from lib import BIN, Everlit, run, until
from s3 import ENDLESS, FAST, SEED, STEPS, TRAINED, lose_everything, named, opened, stop_ranks, trained
from stores import READER, READER_SECRET, SECRET, Proxy, Weed

SHARDS = 6


def text_shards(count=SHARDS, size=40_000):
    """Parts of the sample text, by name; one of the names is odd."""
    text = b"".join(path.read_bytes() for path in sorted((BIN / "sample-text").glob("*.txt")))
    names = [f"{index:02}.txt" for index in range(count)]
    names[1] = "01 ä+b=c&d.txt"
    return {name: text[index * size : (index + 1) * size] for index, name in enumerate(names)}


def fill(weed, shards, place="runs/text"):
    for name, content in shards.items():
        assert weed.look("PUT", f"{place}/{name}", content) is not None, name


def files(folder, shards):
    for name, content in shards.items():
        (pathlib.Path(folder) / name).write_bytes(content)
    return [str(pathlib.Path(folder) / name) for name in sorted(shards)]


def cache(everlit):
    folder = everlit.data / "agent" / "shards"
    return [path for path in folder.iterdir() if not path.name.endswith(".part")] if folder.exists() else []


def got(proxy):
    """Shards that were asked of the server."""
    return [path for method, path, _ in proxy.seen if method == "GET" and "/text/" in path and "list-type" not in path]


def beyond(everlit, job, steps=50):
    """The attempt that runs now has gone on."""
    attempt = everlit.summary(job)["attempt"]
    until("a step", lambda: (s := everlit.summary(job))["step"] is not None and s["attempt"] >= attempt, 60)
    everlit.at_step(job, everlit.summary(job)["step"] + steps)


LOCAL = []


def from_files():
    """The weights of the same text, read from files."""
    if not LOCAL:
        with tempfile.TemporaryDirectory() as folder, Everlit() as everlit:
            shards = files(folder, text_shards())
            LOCAL.append(trained(everlit, everlit.submit(world_size=2, worker=TRAINED, checkpoint={"every_steps": 10}, data={"shards": shards})))
    return LOCAL[0]


def trains_from_a_bucket_as_from_files():
    wanted = from_files()
    with Weed() as weed, Proxy(weed.port) as proxy, Everlit() as everlit:
        fill(weed, text_shards())
        fill(weed, {"notes.md": b"not text", "deeper/07.txt": b"deeper"})
        own = opened(proxy.url())
        job = everlit.submit(world_size=2, worker=TRAINED, checkpoint={"every_steps": 10}, data={"shards": ["s3://runs/text/*.txt"]}, **own)
        assert trained(everlit, job) == wanted
        listed = named(everlit, job, "data_listed")[0]["data"]
        assert (listed["shards"], listed["bytes"]) == (SHARDS, SHARDS * 40_000), listed
        assert len(got(proxy)) == SHARDS and len(cache(everlit)) == SHARDS, got(proxy)
        # Another job finds it all there: nothing but a listing is asked for.
        again = everlit.submit(world_size=3, worker={**TRAINED, "steps": 30, "batch_size": 9}, checkpoint={"every_steps": 10}, data={"shards": ["s3://runs/text/*.txt"]}, **own)
        assert everlit.final(again)["state"] == "succeeded"
        assert len(got(proxy)) == SHARDS, got(proxy)
        assert SECRET not in str(everlit.events(again)) + str(everlit.get(f"/jobs/{again}"))
        print(f"     {SHARDS} shards fetched once for two jobs; the weights are those of the same files ({wanted[:16]}…)")


def loses_all_but_the_bucket_and_goes_on_with_the_same_data():
    wanted = from_files()
    with Weed() as weed:
        fill(weed, text_shards())
        job_of = {"world_size": 2, "worker": TRAINED, "checkpoint": {"every_steps": 10, "to": "s3://runs"}, "data": {"shards": ["s3://runs/text/"]}, **opened(weed.url())}
        for _ in range(5):
            lost = Everlit()
            lost.up()
            job = lost.submit(**job_of)
            until("a few are in the store", lambda: weed.committed(job)[-1:] >= [20], 120)
            lose_everything(lost)
            step = weed.committed(job)[-1]
            if step < STEPS:
                break
        with Everlit() as everlit:
            again = everlit.submit(**{**job_of, "resume_from": f"s3://runs/{job}"})
            assert trained(everlit, again) == wanted
            print(f"     went on from step {step} of {STEPS} on an empty folder: the same weights")


def a_changed_bucket_changes_no_running_job():
    with Weed() as weed, Everlit() as everlit:
        fill(weed, text_shards())
        job = everlit.submit(world_size=1, worker=ENDLESS, restart={"backoff": FAST}, checkpoint={"every": "1s"}, data={"shards": ["s3://runs/text/"]}, **opened(weed.url()))
        everlit.at_step(job, 50)
        fill(weed, {"00.txt": os.urandom(40_000), "99.txt": b"new " * 10_000})
        # What is here is what was listed: a restart goes on with it.
        stop_ranks(everlit, job)
        until("the next attempt", lambda: everlit.summary(job)["attempt"] == 2 and everlit.summary(job)["state"] == "running", 60)
        beyond(everlit, job)
        assert len(named(everlit, job, "data_listed")) == 1
        # Nothing is here any more, and the bucket has something else: that is not trained on.
        for path in cache(everlit):
            path.unlink()
        stop_ranks(everlit, job)
        final = everlit.final(job)
        assert final["state"] == "failed" and "00.txt" in final["reason"] and "changed since the job began" in final["reason"], final["reason"]
        print(f"     {final['reason'][:230]}")
        # A new job has the new data.
        again = everlit.submit(world_size=1, worker={"model": "mlp-10k", "steps": 20}, data={"shards": ["s3://runs/text/"]}, **opened(weed.url()))
        assert everlit.final(again)["state"] == "succeeded"
        assert named(everlit, again, "data_listed")[0]["data"]["shards"] == SHARDS + 1


def an_outage_is_waited_out_and_held_against_nobody():
    with Weed() as weed, Proxy(weed.port) as proxy, Everlit() as everlit:
        fill(weed, text_shards())
        broken = {"on": False}
        proxy.rule = lambda method, path: "refuse" if broken["on"] and "/text/" in path and "04.txt" in path else None
        broken["on"] = True
        # Even so little time without a step is too long for anybody else.
        job = everlit.submit(world_size=2, worker={**ENDLESS, "deterministic": True}, restart={"backoff": FAST}, heartbeat={"progress_timeout": "2s"}, data={"shards": ["s3://runs/text/"]}, **opened(proxy.url()))
        until("it is told", lambda: named(everlit, job, "store_failed"), 60)
        began = len(proxy.seen)
        until("it is tried again and again", lambda: len(proxy.seen) > began + 12, 60)
        summary = everlit.summary(job)
        assert (summary["restarts"], summary["attempt"]) == (0, 1), summary
        broken["on"] = False
        everlit.at_step(job, 50)
        until("it is told that it works", lambda: named(everlit, job, "data_from_store"), 30)
        summary = everlit.summary(job)
        assert (summary["restarts"], summary["attempt"]) == (0, 1), summary
        print(f"     {proxy.fired['refuse']} requests refused, no restart: {named(everlit, job, 'store_failed')[0]['reason'][:120]}")
        everlit.post(f"/jobs/{job}/stop")


def a_local_copy_stands_in_and_is_left_again():
    wanted = from_files()
    with Weed() as weed, Proxy(weed.port) as proxy, Everlit() as everlit, tempfile.TemporaryDirectory() as folder:
        fill(weed, text_shards())
        files(folder, text_shards())
        proxy.rule = lambda method, path: 503 if "/text/" in path and ".txt" in path else None
        spec = {"worker": TRAINED, "checkpoint": {"every_steps": 10}, "data": {"shards": ["s3://runs/text/"], "fallback": folder}, **opened(proxy.url())}
        job = everlit.submit(world_size=2, **spec)
        assert trained(everlit, job) == wanted
        told = named(everlit, job, "data_from_copy")
        assert len(told) == 1 and proxy.fired["503"] > 0, told
        print(f"     {told[0]['reason'][:160]}")
        other = everlit.submit(world_size=1, **{**spec, "worker": ENDLESS, "checkpoint": {"every": "1s"}, "restart": {"backoff": FAST}})
        until("it reads the copy", lambda: named(everlit, other, "data_from_copy"), 60)
        everlit.at_step(other, 50)
        proxy.rule = lambda method, path: None
        def again():
            stop_ranks(everlit, other)
            beyond(everlit, other)
            return named(everlit, other, "data_from_store")
        until("it reads the store again", again, 60, 0.5)
        print(f"     {named(everlit, other, 'data_from_store')[0]['reason'][:160]}")
        everlit.post(f"/jobs/{other}/stop")


def through_a_store_that_fails_now_and_then_the_data_is_the_same():
    wanted = from_files()
    with Weed() as weed, Proxy(weed.port) as proxy, Everlit() as everlit:
        fill(weed, text_shards())
        dice = random.Random(SEED)
        faults = [500, 503, "refuse", "cut", "alter", ("wait", 0.3)]
        proxy.rule = lambda method, path: dice.choice(faults) if dice.random() < 0.4 and ".txt" in path else None
        for _ in range(3):
            job = everlit.submit(world_size=2, worker=TRAINED, checkpoint={"every_steps": 10}, data={"shards": ["s3://runs/text/"]}, **opened(proxy.url()))
            assert trained(everlit, job) == wanted
            for path in cache(everlit):
                path.unlink()
        assert sum(proxy.fired.values()) > 3, proxy.fired
        print(f"     seed {SEED}: {proxy.fired}, and the same weights three times")


def a_small_cache_is_enough_and_never_overfull():
    wanted = from_files()
    bound = 100_000
    os.environ["EVERLIT_DATA_CACHE"] = str(bound)
    try:
        with Weed() as weed, Everlit() as everlit:
            fill(weed, text_shards())
            job = everlit.submit(world_size=2, worker=TRAINED, checkpoint={"every_steps": 10}, data={"shards": ["s3://runs/text/"]}, **opened(weed.url()))
            most = 0
            while everlit.summary(job)["state"] not in ("succeeded", "failed"):
                sizes = []
                for path in cache(everlit):
                    with contextlib.suppress(FileNotFoundError):
                        sizes.append(path.stat().st_size)
                most = max(most, sum(sizes))
            assert trained(everlit, job) == wanted
            assert 0 < most <= bound, most
            job = everlit.submit(world_size=1, command=["true"], data={"shards": ["s3://runs/text/"]}, restart={"max_start_failures": 1}, **opened(weed.url()))
            until("it says that there is no room", lambda: any("--data-cache" in e["reason"] for e in named(everlit, job, "store_failed")), 60)
            everlit.post(f"/jobs/{job}/stop")
            assert everlit.final(job)["state"] == "stopped"
            fill(weed, {"big.bin": os.urandom(bound + 1)}, "runs/large")
            job = everlit.submit(world_size=1, command=["true"], data={"shards": ["s3://runs/large/big.bin"]}, restart={"max_start_failures": 1}, **opened(weed.url()))
            final = everlit.final(job)
            assert final["state"] == "failed" and "--data-cache" in final["reason"], final
            print(f"     at most {most} of {bound} bytes for {SHARDS * 40_000} of data; {final['reason'][:150]}")
    finally:
        del os.environ["EVERLIT_DATA_CACHE"]


# Asks for its shards as it goes, and says what is in them.
ASKS = """
while read -r path; do
  name=${path##*/}
  until [ -e "$path" ]; do echo "!$name" > "$EVERLIT_SHARD_FEED/want"; sleep 0.05; done
  echo "rank $RANK: $(sha256sum < "$path" | cut -c1-64) $name"
done < "$EVERLIT_DATA_SHARDS"
"""
READS = """
while read -r path; do echo "rank $RANK: $(sha256sum < "$path" | cut -c1-64) ${path##*/}"; done < "$EVERLIT_DATA_SHARDS"
"""


def any_program_has_its_shards():
    import hashlib

    shards = text_shards()
    wanted = sorted((index % 2, hashlib.sha256(shards[name]).hexdigest(), f"{index:06}-{name}") for index, name in enumerate(sorted(shards)))
    with Weed() as weed, Everlit() as everlit:
        fill(weed, shards)
        for script, stream in [(READS, False), (ASKS, True)]:
            data = {"shards": ["s3://runs/text/"], **({"stream": True} if stream else {})}
            job = everlit.submit(world_size=2, command=["sh", "-c", script], data=data, **opened(weed.url()))
            assert everlit.final(job)["state"] == "succeeded", everlit.summary(job)["reason"]
            lines = everlit.get(f"/jobs/{job}/logs", raw=True).decode().splitlines()
            said = sorted((int(line.split(":")[0].split()[-1]), line.split(": ")[1].split(" ")[0], line.split(": ")[1].split(" ", 1)[1]) for line in lines if ": " in line)
            assert said == wanted, said
            until("its links are gone", lambda: not (everlit.data / "agent" / "jobs" / job / "data").exists())
        print(f"     {len(wanted)} shards over two ranks, ready before the start and asked for as it goes")


def what_can_not_be_had_says_so():
    with Weed() as weed, Proxy(weed.port) as proxy, Everlit() as everlit:
        fill(weed, text_shards())
        url = proxy.url()
        short = {"world_size": 1, "worker": {"model": "mlp-10k", "steps": 20}, "restart": {"max_start_failures": 1, "backoff": FAST}}
        for shards, settings, words in [
            ("s3://runs/nothing/", opened(url), "there is nothing to read"),
            ("s3://runs/text/*.parquet", opened(url), "there is nothing to read"),
            ("s3://runs/text/none.txt", opened(url), "could not look at s3://runs/text/none.txt"),
            ("s3://nowhere/x/", opened(url), "there is no bucket `nowhere`"),
            ("s3://runs/text/", opened(url, "nobody-knows-this-key"), "was not accepted"),
            ("s3://runs/text/", opened(url, secret="wrong"), "was not accepted"),
            ("file:///not/mounted/", {}, "make it, or mount it"),
        ]:
            job = everlit.submit(**short, data={"shards": [shards]}, **settings)
            final = everlit.final(job)
            assert final["state"] == "failed" and words in final["reason"], final["reason"]
            print(f"     {shards}: {final['reason'][:150]}")
        # One that may only read is enough.
        job = everlit.submit(**short, data={"shards": ["s3://runs/text/"]}, **opened(url, READER, READER_SECRET))
        assert everlit.final(job)["state"] == "succeeded"
        for path in cache(everlit):
            path.unlink()
        for answer, words in [(403, "may not do this"), (404, "changed since the job began"), (412, "changed since the job began")]:
            proxy.rule = lambda method, path, answer=answer: answer if method == "GET" and "02.txt" in path else None
            job = everlit.submit(**short, data={"shards": ["s3://runs/text/"]}, **opened(url))
            final = everlit.final(job)
            assert final["state"] == "failed" and words in final["reason"] and "02.txt" in final["reason"], (answer, final["reason"])
            assert proxy.fired[str(answer)] > 0
            print(f"     {answer}: {final['reason'][:150]}")
        for body, words in [
            ({"data": {"shards": ["s3://runs/text/", "/x"]}}, "must be all files of the nodes, or all in stores"),
            ({"data": {"shards": ["s3://runs//x"]}}, "no empty part"),
            ({"data": {"shards": ["/x"], "stream": True}}, "is for shards in a store"),
            ({"data": {"shards": ["s3://runs/x/"], "stream": False}}, "always asks for shards as it goes"),
            ({"data": {"fallback": "/x"}}, "is for shards in a store"),
        ]:
            status, problem = everlit.refused("POST", "/jobs", {"world_size": 1, **body})
            assert status == 422 and words in str(problem), problem


def an_agent_that_comes_after_another_is_asked_again():
    with Weed() as weed, Proxy(weed.port) as proxy, Everlit() as everlit:
        fill(weed, text_shards())
        broken = {"on": True}
        proxy.rule = lambda method, path: "refuse" if broken["on"] and "03.txt" in path else None
        job = everlit.submit(world_size=2, worker=ENDLESS, data={"shards": ["s3://runs/text/"]}, **opened(proxy.url()))
        until("it is told", lambda: named(everlit, job, "store_failed"), 60)
        agent = everlit.agent_pid()
        os.kill(agent, signal.SIGKILL)
        until("another agent", lambda: everlit.agent_pid() not in (None, agent), 30)
        broken["on"] = False
        everlit.at_step(job, 50)
        assert everlit.summary(job)["restarts"] == 0 and everlit.summary(job)["attempt"] == 1
        everlit.post(f"/jobs/{job}/stop")


if __name__ == "__main__":
    run(
        [
            trains_from_a_bucket_as_from_files,
            loses_all_but_the_bucket_and_goes_on_with_the_same_data,
            a_changed_bucket_changes_no_running_job,
            an_outage_is_waited_out_and_held_against_nobody,
            a_local_copy_stands_in_and_is_left_again,
            through_a_store_that_fails_now_and_then_the_data_is_the_same,
            a_small_cache_is_enough_and_never_overfull,
            any_program_has_its_shards,
            what_can_not_be_had_says_so,
            an_agent_that_comes_after_another_is_asked_again,
        ],
        "data in a bucket",
    )
