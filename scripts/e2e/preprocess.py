"""Jobs of kind preprocess, from the outside: what is in a bucket becomes something else in a bucket, once, whatever dies meanwhile."""

import array
import collections
import json
import os
import pathlib
import random
import shutil
import signal
import tempfile

from data import fill, text_shards
from joining import Cluster
from lib import Everlit, children, is_alive, run, until
from s3 import FAST, SEED, named, opened
from stores import READER, READER_SECRET, Proxy, Weed

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
TOKENIZE = str(REPOSITORY / "worker/python/examples/tokenize_text.py")
SHARDS = 12


def outputs(weed, job, bucket="runs/made"):
    """What a job has put there, by name."""
    prefix = f"{bucket}/{job}/shards/"
    return {name.removeprefix(prefix): weed.get(name) for name in weed.keys(f"{bucket}/{job}/shards")}


def records(weed, job, bucket="runs/made"):
    found = {}
    for name in weed.keys(f"{bucket}/{job}"):
        last = name.rsplit("/", 1)[1]
        if last.startswith("rank-"):
            found[last] = json.loads(weed.get(name))
    return found


def upper(shards, end=""):
    return {f"{index:06}-{name}{end}": shards[name].upper() for index, name in enumerate(sorted(shards))}


def tokens(text):
    """What the example makes, said in another way."""
    parts, document = [], []
    for line in text.split(b"\n"):
        if line.strip():
            document.append(line)
        elif document:
            parts.append(b"\n".join(document) + b"\n")
            document = []
    if document:
        parts.append(b"\n".join(document))
    return array.array("H", [token for part in parts for token in [*part, 256]]).tobytes()


def counted(folder, slow=0.0):
    """A program that says in a file which shard it was given, and makes capitals of it."""
    body = "tr '[:lower:]' '[:upper:]' < \"$1\" > \"$2\""
    return ["sh", "-c", f'echo "$RANK $EVERLIT_ATTEMPT ${{1##*/}}" >> {folder}/made; sleep {slow}; {body}', "sh", "{input}", "{output}"]


def made(folder):
    path = pathlib.Path(folder) / "made"
    return [line.split(" ", 2)[2] for line in path.read_text().splitlines()] if path.exists() else []


def text_becomes_token_shards():
    shards = text_shards(SHARDS)
    with Weed() as weed, Everlit() as own:
        fill(weed, shards)
        job = own.submit(kind="preprocess", world_size=3, command=["python3", TOKENIZE, "{input}", "{output}.bin"], data={"shards": ["s3://runs/text/"], "to": "s3://runs/made"}, **opened(weed.url()))
        final = own.final(job)
        assert final["state"] == "succeeded", final["reason"]
        found = outputs(weed, job)
        assert found == {f"{index:06}-{name}.bin": tokens(shards[name]) for index, name in enumerate(sorted(shards))}, sorted(found)
        assert (final["step"], final["total_steps"]) == (SHARDS, SHARDS), final
        told = records(weed, job)
        assert sorted(told) == [f"rank-{rank:05}-of-00003.json" for rank in range(3)], sorted(told)
        lines = [line for rank in told.values() for line in rank]
        assert sorted((line["output"]["name"], line["output"]["bytes"]) for line in lines) == sorted((name, len(content)) for name, content in found.items())
        assert len(told["rank-00001-of-00003.json"]) == SHARDS // 3
        until("nothing of it is left on the node", lambda: not (own.data / "agent" / "jobs" / job / "data").exists())
        # What one job has made is what another reads.
        folder = tempfile.mkdtemp(prefix="everlit-e2e-")
        again = own.submit(kind="preprocess", world_size=2, command=["sh", "-c", 'wc -c < "$1" > "$2"', "sh", "{input}", "{output}"], data={"shards": [f"s3://runs/made/{job}/shards/"], "to": folder}, **opened(weed.url()))
        assert own.final(again)["state"] == "succeeded", own.summary(again)["reason"]
        sizes = sorted(int(path.read_text()) for path in (pathlib.Path(folder) / again / "shards").iterdir())
        assert sizes == sorted(map(len, found.values()))
        shutil.rmtree(folder)
        print(f"     {SHARDS} shards of text, {sum(map(len, found.values())) // 2} tokens; a second job counted them into a folder")


def ranks(own, job):
    return {rank["rank"]: rank["pid"] for rank in own.summary(job)["ranks"]}


def a_killed_rank_goes_on_alone_and_makes_nothing_twice():
    shards = text_shards(SHARDS)
    with Weed() as weed, Everlit() as own, tempfile.TemporaryDirectory() as folder:
        fill(weed, shards)
        job = own.submit(kind="preprocess", world_size=2, command=counted(folder, 0.4), restart={"backoff": FAST}, data={"shards": ["s3://runs/text/"], "to": "s3://runs/made"}, **opened(weed.url()))
        until("some are stored", lambda: len(outputs(weed, job)) >= 4, 60)
        before = ranks(own, job)
        stored = set(outputs(weed, job))
        programs = children(before[1])
        os.kill(before[1], signal.SIGKILL)
        until("its program is gone too", lambda: not any(is_alive(pid) for pid in programs), 20)
        until("another in its place", lambda: (now := ranks(own, job))[1] not in (None, before[1]) and now, 30)
        assert ranks(own, job)[0] == before[0], "the other rank was left alone"
        final = own.final(job)
        assert final["state"] == "succeeded" and final["attempt"] == 1, final
        assert outputs(weed, job) == upper(shards)
        counts = collections.Counter(made(folder))
        twice = {name for name, count in counts.items() if count > 1}
        assert set(counts) == set(upper(shards)) and len(twice) <= 1 and not twice & stored, (counts, stored)
        # The agent, and then the coordinator.
        for who in ["agent", "coordinator"]:
            (pathlib.Path(folder) / "made").unlink()
            job = own.submit(kind="preprocess", world_size=2, command=counted(folder, 0.3), restart={"backoff": FAST}, data={"shards": ["s3://runs/text/"], "to": "s3://runs/made"}, **opened(weed.url()))
            until("some are stored", lambda: len(outputs(weed, job)) >= 3, 60)
            if who == "agent":
                os.kill(own.agent_pid(), signal.SIGKILL)
            else:
                own.kill()
                own.up()
            final = own.final(job)
            assert final["state"] == "succeeded" and final["restarts"] == 0, (who, final)
            assert outputs(weed, job) == upper(shards) and sorted(made(folder)) == sorted(upper(shards)), (who, sorted(made(folder)))
            print(f"     {who} killed in the midst: each of {SHARDS} shards was made once")


def a_new_attempt_knows_what_is_stored():
    shards = text_shards(SHARDS)
    with Weed() as weed, Everlit() as own, tempfile.TemporaryDirectory() as folder:
        fill(weed, shards)
        job = own.submit(kind="preprocess", world_size=2, command=counted(folder, 0.3), restart={"backoff": FAST, "scope": "gang"}, data={"shards": ["s3://runs/text/"], "to": "s3://runs/made"}, **opened(weed.url()))
        until("some are stored", lambda: len(outputs(weed, job)) >= 4, 60)
        os.kill(ranks(own, job)[0], signal.SIGKILL)
        # What the node knew of it is gone, as on another node.
        shutil.rmtree(own.data / "agent" / "jobs" / job / "data" / "done")
        final = own.final(job)
        assert final["state"] == "succeeded" and final["attempt"] == 2, final
        assert outputs(weed, job) == upper(shards)
        counts = collections.Counter(made(folder))
        twice = [name for name, count in counts.items() if count > 1]
        assert set(counts) == set(upper(shards)) and len(twice) <= 4, counts
        print(f"     the second attempt made {len(made(folder)) - len(counts)} of {SHARDS} shards again, those that were under way")


def through_a_store_that_fails_and_an_outage():
    shards = text_shards(SHARDS)
    with Weed() as weed, Proxy(weed.port) as proxy, Everlit() as own, tempfile.TemporaryDirectory() as folder:
        fill(weed, shards)
        dice = random.Random(SEED)
        faults = [429, 500, 503, 409, "refuse", "cut", ("wait", 0.3)]
        # A conflict tells who reads that it is another object.
        fits = lambda method, fault: fault if fault != 409 or method == "PUT" else 503
        proxy.rule = lambda method, path: fits(method, dice.choice(faults)) if dice.random() < 0.3 and ("/shards/" in path or "/text/" in path) else None
        job = own.submit(kind="preprocess", world_size=2, command=counted(folder), restart={"backoff": FAST}, data={"shards": ["s3://runs/text/"], "to": "s3://runs/made"}, **opened(proxy.url()))
        assert own.final(job, 240)["state"] == "succeeded", own.summary(job)["reason"]
        assert outputs(weed, job) == upper(shards) and sum(proxy.fired.values()) > 3, proxy.fired
        print(f"     seed {SEED}: {proxy.fired}, and all outputs are right")
        # Nothing can be put there: what is made waits, and no more than a few wait.
        (pathlib.Path(folder) / "made").unlink()
        down = {"on": True}
        proxy.rule = lambda method, path: "refuse" if down["on"] and method == "PUT" else None
        job = own.submit(kind="preprocess", world_size=1, command=counted(folder), heartbeat={"progress_timeout": "1h"}, restart={"backoff": FAST}, data={"shards": ["s3://runs/text/"], "to": "s3://runs/made"}, **opened(proxy.url()))
        until("it is told", lambda: named(own, job, "store_failed"), 60)
        until("it has come as far as it may", lambda: len(made(folder)) == 4, 60)
        refused = proxy.fired["refuse"]
        until("it is tried again", lambda: proxy.fired["refuse"] > refused + 8, 90)
        assert len(made(folder)) == 4 and not outputs(weed, job), made(folder)
        assert (own.summary(job)["state"], own.summary(job)["restarts"]) == ("running", 0)
        down["on"] = False
        assert own.final(job, 240)["state"] == "succeeded"
        assert outputs(weed, job) == upper(shards) and sorted(made(folder)) == sorted(upper(shards))
        print(f"     {proxy.fired['refuse']} requests refused: {named(own, job, 'store_failed')[0]['reason'][:140]}")


def over_nodes_that_come_and_go():
    shards = text_shards(24, 4_000)
    with Weed() as weed, Cluster() as own, tempfile.TemporaryDirectory() as folder:
        fill(weed, shards)
        for name in ["a", "b", "c"]:
            own.join(name, "--slots", "2")
        job = own.submit(kind="preprocess", world_size=4, command=counted(folder, 0.3), restart={"backoff": FAST}, data={"shards": ["s3://runs/text/"], "to": "s3://runs/made"}, **opened(weed.url()))
        until("some are stored", lambda: len(outputs(weed, job)) >= 5, 60)
        used = {rank["node"] for rank in own.summary(job)["ranks"]}
        assert len(used) == 2, used
        leaves = next(agent for agent in own.agents if agent.name == max(used))
        leaves.process.terminate()
        final = own.final(job)
        assert final["state"] == "succeeded", final["reason"]
        others = {rank["node"] for rank in final["ranks"]}
        assert leaves.name not in others and outputs(weed, job) == upper(shards), others
        counts = collections.Counter(made(folder))
        twice = [name for name, count in counts.items() if count > 1]
        # What was under way, and what was made there and not stored yet.
        assert set(counts) == set(upper(shards)) and len(twice) <= 12, counts
        assert len(records(weed, job)) == 4
        print(f"     on {sorted(used)}, then on {sorted(others)}: {len(twice)} of {len(shards)} shards were made again")


LOOP = """
import everlit, sys
for shard in everlit.stream_shards():
    with everlit.output_file(shard, ".upper") as path, open(path, "wb") as out:
        out.write(open(shard, "rb").read().upper())
"""
FORGETS = """
for path in $(cat "$EVERLIT_DATA_SHARDS"); do
  name=${path##*/}
  case $name in 000002*) continue;; esac
  tr a-z A-Z < "$path" > "$EVERLIT_OUTPUT_DIR/$name.tmp" && mv "$EVERLIT_OUTPUT_DIR/$name.tmp" "$EVERLIT_OUTPUT_DIR/$name"
done
"""
TWICE = """
for path in $(cat "$EVERLIT_DATA_SHARDS"); do
  name=${path##*/}
  echo x > "$EVERLIT_OUTPUT_DIR/$name.one"
  echo x > "$EVERLIT_OUTPUT_DIR/$name.two"
done
"""


def a_program_may_go_through_its_shards_by_itself():
    shards = {f"{index:02}.txt": content for index, content in enumerate(text_shards(SHARDS).values())}
    with Weed() as weed, Everlit() as own:
        fill(weed, shards)
        python = {"env": {**opened(weed.url())["env"], "PYTHONPATH": str(REPOSITORY / "worker/python")}, "secrets": opened(weed.url())["secrets"]}
        data = {"shards": ["s3://runs/text/"], "to": "s3://runs/made"}
        job = own.submit(kind="preprocess", world_size=2, command=["python3", "-c", LOOP], data={**data, "stream": True}, **python)
        final = own.final(job)
        assert final["state"] == "succeeded", final["reason"]
        assert outputs(weed, job) == upper(shards, ".upper")
        assert final["step"] == SHARDS
        few = {"max_restarts": 1, "backoff": FAST}
        job = own.submit(kind="preprocess", world_size=2, command=["sh", "-c", FORGETS], restart=few, data=data, **opened(weed.url()))
        final = own.final(job)
        assert final["state"] == "failed" and "1 of its shards have no output" in final["reason"] and "000002-02.txt" in final["reason"], final["reason"]
        print(f"     {final['reason'][:200]}")
        assert len(outputs(weed, job)) == SHARDS - 1
        job = own.submit(kind="preprocess", world_size=1, command=["sh", "-c", TWICE], restart=few, data=data, **opened(weed.url()))
        final = own.final(job)
        assert final["state"] == "failed" and "both outputs of one shard" in final["reason"], final["reason"]
        print(f"     {final['reason'][:200]}")


def what_goes_wrong_says_so():
    shards = {f"{index:02}.txt": content for index, content in enumerate(text_shards(4).values())}
    with Weed() as weed, Everlit() as own:
        fill(weed, shards)
        few = {"max_restarts": 1, "backoff": FAST}
        data = {"shards": ["s3://runs/text/"], "to": "s3://runs/made"}
        poison = 'case "$1" in *02.txt) echo bad >&2; exit 7;; esac; cp "$1" "$2"'
        for command, words in [
            (["sh", "-c", poison, "sh", "{input}", "{output}"], ["000002-02.txt", "exit status: 7"]),
            (["sh", "-c", 'kill -9 $$', "sh", "{input}", "{output}"], ["signal 9"]),
            (["true", "{input}", "{output}"], ["wrote nothing"]),
            (["sh", "-c", 'cp "$1" "$2.a"; cp "$1" "$2.b"', "sh", "{input}", "{output}"], ["each shard has one output"]),
            (["sh", "-c", 'cp "$1" "${2%/*}/other"', "sh", "{input}", "{output}"], ["wrote `other`"]),
            (["no-such-program", "{input}", "{output}"], ["could not run no-such-program"]),
        ]:
            job = own.submit(kind="preprocess", world_size=1, command=command, restart=few, data=data, **opened(weed.url()))
            final = own.final(job)
            assert final["state"] == "failed" and all(word in final["reason"] for word in words), final["reason"]
            print(f"     {final['reason'][:170]}")
            if "02.txt" in words[0]:
                assert sorted(outputs(weed, job)) == ["000000-00.txt", "000001-01.txt"]
        for to, settings, words in [
            ("s3://nowhere/x", opened(weed.url()), "there is no bucket `nowhere`"),
            ("s3://runs/made", opened(weed.url(), secret="wrong"), "was not accepted"),
            ("/not/mounted", opened(weed.url()), "make it, or mount it"),
        ]:
            job = own.submit(kind="preprocess", world_size=1, command=["cp", "{input}", "{output}"], restart={"max_start_failures": 1}, data={**data, "to": to}, **settings)
            final = own.final(job)
            assert final["state"] == "failed" and words in final["reason"], final["reason"]
            print(f"     {to}: {final['reason'][:150]}")
        # One that may only read: what is made waits, the event says why, and a stop ends it.
        job = own.submit(kind="preprocess", world_size=1, command=["cp", "{input}", "{output}"], data=data, **opened(weed.url(), READER, READER_SECRET))
        told = until("it is told", lambda: named(own, job, "store_failed"), 60)
        assert told[0]["data"]["trouble"] == "denied", told
        own.post(f"/jobs/{job}/stop")
        assert own.final(job)["state"] == "stopped"
        print(f"     {told[0]['reason'][:170]}")
        command = ["cp", "{input}", "{output}"]
        for body, pointer, words in [
            ({"data": data}, "/command", "needs it"),
            ({"command": command}, "/data/shards", "needs it"),
            ({"command": command, "data": {"shards": ["s3://runs/x/"]}}, "/data/to", "needs it"),
            ({"command": ["cp", "{input}"], "data": data}, "/command", "has {input} and no {output}"),
            ({"command": command, "data": {**data, "shards": ["/x"]}}, "/data/shards", "reads from stores"),
            ({"command": command, "data": {**data, "to": "s3://k:s@b/x"}}, "/data/to", "credentials"),
            ({"command": command, "data": {**data, "stream": False}}, "/data/stream", "one by one"),
            ({"command": command, "data": data, "resume_from": "s3://runs/x"}, "/resume_from", "leave it out"),
            ({"kind": "train", "command": command, "data": {"to": "s3://runs/x"}}, "/data/to", "is for kind preprocess"),
        ]:
            status, problem = own.refused("POST", "/jobs", {"kind": "preprocess", **body})
            assert status == 422 and any(fault["pointer"] == pointer and words in fault["detail"] for fault in problem["errors"]), (body, problem)


if __name__ == "__main__":
    run(
        [
            text_becomes_token_shards,
            a_killed_rank_goes_on_alone_and_makes_nothing_twice,
            a_new_attempt_knows_what_is_stored,
            through_a_store_that_fails_and_an_outage,
            over_nodes_that_come_and_go,
            a_program_may_go_through_its_shards_by_itself,
            what_goes_wrong_says_so,
        ],
        "preprocessing",
    )
