"""Gangs across hosts in network namespaces, hosts that are cut off, links that are half open (scripts/e2e-nodes.sh). Needs root."""

import contextlib
import json
import os
import pathlib
import select
import socket
import threading
import time

from hosts import Hosts
from lib import Everlit, is_alive, run, until

LONG = {"model": "mlp-10k", "steps": 1_000_000, "batch_size": 16}
EVERY = {"every_steps": 200}

# Meets as torch's own rendezvous does: rank 0 listens where it is told, the others call.
MEETS = """
import os, socket, sys, time
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
print("group", os.environ["GROUP_RANK"], "of", os.environ["GROUP_WORLD_SIZE"], "local", os.environ["LOCAL_RANK"], os.environ.get("GLOO_SOCKET_IFNAME"), flush=True)
if rank == 0:
    with socket.create_server(place) as door:
        met = sorted(int(door.accept()[0].recv(16)) for _ in range(world - 1))
        print("met", met, flush=True)
else:
    for _ in range(200):
        try:
            with socket.create_connection(place, 5) as s:
                s.sendall(str(rank).encode())
            break
        except OSError:
            time.sleep(0.05)
    else:
        sys.exit("nobody at " + str(place))
"""


def manifest(agent, job, step):
    return json.loads((agent.data / f"jobs/{job}/checkpoints/step-{step:012d}/MANIFEST.json").read_text())


def steps_on(agent, job):
    folder = agent.data / f"jobs/{job}/checkpoints"
    return sorted(int(f.name[5:]) for f in folder.glob("step-*")) if folder.exists() else []


class Elsewhere:
    """The second attempt, once it is beyond a step; and when it had done its first one."""

    def __init__(self, everlit, job, step):
        self.everlit, self.job, self.step = everlit, job, step
        self.begun = self.first_step_at = None

    def __call__(self):
        summary = self.everlit.summary(self.job)
        if summary["attempt"] != 2 or summary["step"] is None:
            return None
        self.begun = summary["step"] if self.begun is None else self.begun
        # Where it is asked too seldom to see it begin, it has begun.
        if self.first_step_at is None and summary["step"] > min(self.begun, self.step):
            self.first_step_at = time.monotonic()
        return summary["state"] == "running" and summary["step"] > self.step and summary


def places(summary):
    return [rank["node"] for rank in summary["ranks"]]


def a_gang_trains_across_hosts_as_on_one():
    with Hosts() as everlit:
        everlit.join_all("--slots", "2")
        addresses = {n["node"]: n["address"] for n in everlit.get("/nodes")["data"]}
        job = everlit.submit(world_size=4, worker={**LONG, "steps": 1000, "deterministic": True}, checkpoint=EVERY)
        used = places(everlit.at_step(job, 300))
        assert len(set(used)) == 2 and used == sorted(used), used
        end = everlit.final(job)
        assert (end["state"], end["restarts"], end["step"]) == ("succeeded", 0, 1000), end
        # One log, of both hosts.
        logs = everlit.get(f"/jobs/{job}/logs", raw=True).decode()
        assert all(f"rank {rank}: done after step 1000" in logs for rank in range(4)), logs[-2000:]
        assert len(everlit.get(f"/jobs/{job}/logs?tail=2", raw=True).splitlines()) == 2
        # Each host has the whole state, to the bit.
        first, second = (everlit.agent(name) for name in sorted(set(used)))
        one, two = (until("saved", lambda a=a: steps_on(a, job)[-1:] == [1000] and manifest(a, job, 1000)["files"], 20) for a in (first, second))
        assert one == two, (one, two)
        newest = until("both told", lambda: (c := everlit.get(f"/jobs/{job}/checkpoints")["data"][0]).get("also_on") and c, 20)
        assert {newest["node"], *newest["also_on"]} == set(used) and newest["verified"], newest
        print(f"     4 ranks on {used}, {addresses}; step 1000 has {one[0]['sha256'][0][:12]}… on both")


def a_program_that_is_not_ours_meets_where_it_is_told():
    with Hosts(names=("a", "b")) as everlit:
        everlit.join_all("--slots", "2")
        job = everlit.submit(world_size=4, command=["python3", "-c", MEETS])
        end = everlit.final(job)
        logs = everlit.get(f"/jobs/{job}/logs", raw=True).decode()
        assert end["state"] == "succeeded", (end["reason"], logs)
        assert "met [1, 2, 3]" in logs and logs.count("eth0") == 4, logs
        print("     " + "; ".join(sorted(set(logs.split("\n")) - {""})[:5]))


def a_host_that_is_cut_off_costs_a_lease_and_commits_nothing_more():
    with Hosts() as everlit:
        everlit.join_all("--slots", "2")
        job = everlit.submit(world_size=4, worker=LONG, checkpoint=EVERY)
        before = everlit.at_step(job, 700)
        lost = places(before)[3]
        agent = everlit.agent(lost)
        pids = [r["pid"] for r in before["ranks"]]
        until("a checkpoint on both", lambda: len(everlit.get(f"/jobs/{job}/checkpoints")["data"][0].get("also_on", [])) == 1, 20)
        everlit.cut(lost)
        cut = time.monotonic()
        last = steps_on(agent, job)[-1]

        elsewhere = Elsewhere(everlit, job, before["step"])
        after = until("training elsewhere", elsewhere, 60)
        took, first = time.monotonic() - cut, elsewhere.first_step_at - cut
        assert lost not in places(after) and after["last_checkpoint"]["verified"], after
        attempts = everlit.get(f"/jobs/{job}/attempts")
        attempts = attempts.get("data", attempts) if isinstance(attempts, dict) else attempts
        resumed = next(e["data"]["step"] for e in everlit.events(job) if e["event"] == "attempt_resumed")
        assert attempts[0]["cause"] == "node_lost" and resumed >= last, (attempts, resumed, last)
        # Lost is free: the budget has all of it.
        failed = [e for e in everlit.events(job) if e["event"] in ("gang_failed", "restart_scheduled")]
        assert [e["data"].get("cause") for e in failed] == ["node_lost"], failed
        # What was cut off lives on and can not commit: a step needs the others.
        assert all(is_alive(pid) for pid in pids[2:]) and not any(is_alive(pid) for pid in pids[:2])
        assert steps_on(agent, job)[-1] <= last + 200 and all(manifest(agent, job, s)["attempt"] == 1 for s in steps_on(agent, job))
        frozen = steps_on(agent, job)
        everlit.heal(lost)
        until("the host is back", lambda: everlit.node(lost)["state"] == "ready", 60)
        until("what ran there is stopped", lambda: not any(is_alive(pid) for pid in pids), 20)
        assert steps_on(agent, job) == frozen and everlit.node(lost)["ranks"] == 0
        now = everlit.summary(job)
        assert (now["attempt"], now["state"]) == (2, "running"), now
        print(f"     cut off at step {before['step']}; first step elsewhere after {first:.1f} s, {took:.1f} s later {places(after)} are beyond it (lease 10 s), resumed from step {resumed}")
        # It is used again.
        other = everlit.submit(command=["true"], world_size=2)
        assert everlit.final(other)["state"] == "succeeded" and set(places(everlit.summary(other))) == {lost}


def quarantined_on(agent, job):
    shelf = agent.data / f"jobs/{job}/checkpoints/quarantine"
    # The reason is written when it is there.
    return {int(f.parent.name[5:17]): f.read_text().strip() for f in shelf.glob("step-*/REASON")} if shelf.exists() else {}


def resumed(everlit, job, attempt):
    """The sentence of an attempt's start."""
    told = (e["reason"] for e in everlit.events(job) if e["event"] == "attempt_resumed")
    return next((reason for reason in told if reason.startswith(f"attempt {attempt} ")), None)


def a_gang_on_one_host_goes_on_from_a_copy_when_the_host_is_lost():
    with Hosts() as everlit:
        everlit.join_all("--slots", "2")
        job = everlit.submit(world_size=2, worker=LONG, checkpoint=EVERY)
        before = everlit.at_step(job, 700)
        (lost,) = set(places(before))
        agent = everlit.agent(lost)
        copied = until("a copy", lambda: next((c for c in everlit.get(f"/jobs/{job}/checkpoints")["data"] if c.get("also_on")), None), 20)
        (keeper,) = copied["also_on"]
        theirs = until("the copy is there", lambda: steps_on(everlit.agent(keeper), job), 5)
        everlit.cut(lost)
        cut = time.monotonic()

        elsewhere = Elsewhere(everlit, job, before["step"])
        after = until("training elsewhere", elsewhere, 60)
        took, first = time.monotonic() - cut, elsewhere.first_step_at - cut
        assert set(places(after)) == {keeper}, (places(after), keeper)
        begun = int(resumed(everlit, job, 2).rsplit(" ", 1)[1])
        assert begun >= theirs[-1], (begun, theirs)
        # The lost host trains on by itself, and commits what is worth nothing.
        late = until("late commits", lambda: [s for s in steps_on(agent, job) if s > before["step"] + 600], 30)
        everlit.heal(lost)
        until("what ran there is stopped", lambda: not any(is_alive(r["pid"]) for r in before["ranks"]), 60)
        until("put aside", lambda: (aside := quarantined_on(agent, job)) and max(aside) >= max(late) and all(s <= begun for s in steps_on(agent, job)), 20)
        aside = quarantined_on(agent, job)
        assert all(why == "it was committed when a later attempt had begun elsewhere" for why in aside.values()), aside
        assert all(c["attempt"] == 2 or c["step"] <= begun for c in everlit.get(f"/jobs/{job}/checkpoints")["data"])
        print(f"     {lost} cut off at step {before['step']}: first step elsewhere after {first:.1f} s (lease 10 s), after {took:.1f} s beyond it on {keeper} from its copy of step {begun}; late and put aside: {sorted(aside)}")
        # Back to where the late ones were: from what the second attempt has saved.
        for name in set(everlit.names) - {lost}:
            everlit.post(f"/nodes/{name}/cordon")
        everlit.post(f"/nodes/{keeper}/drain")
        back = until("back", lambda: (s := everlit.summary(job))["attempt"] == 3 and s["state"] == "running" and s["step"] and s, 60)
        told = resumed(everlit, job, 3)
        step = int(told.split(",")[0].rsplit(" ", 1)[1])
        # Fetched now, or copied there since it is back.
        assert set(places(back)) == {lost} and manifest(agent, job, step)["attempt"] == 2 and step >= begun, told
        assert not {c["step"] for c in everlit.get(f"/jobs/{job}/checkpoints")["data"] if c["attempt"] == 1 and c["step"] > begun}
        print(f"     {told}")


def a_gang_that_moves_takes_its_checkpoint_along():
    with Hosts(names=("a", "b")) as everlit:
        everlit.join_all("--slots", "2")
        worker = {**LONG, "steps": 1500, "deterministic": True}
        job = everlit.submit(world_size=2, worker=worker, checkpoint={**EVERY, "copies": 0})
        before = everlit.at_step(job, 500)
        (first,) = set(places(before))
        (other,) = set(everlit.names) - {first}
        assert not steps_on(everlit.agent(other), job)
        everlit.post(f"/nodes/{first}/drain")
        end = everlit.final(job)
        assert end["state"] == "succeeded" and set(places(end)) == {other}, end
        told = resumed(everlit, job, 2)
        assert told.endswith(f", fetched from {first}"), told
        assert end["lost_steps"] == 0 and end["restarts"] == 0, end
        everlit.post(f"/nodes/{first}/uncordon")
        undisturbed = everlit.submit(world_size=2, worker=worker, checkpoint=EVERY)
        assert everlit.final(undisturbed)["state"] == "succeeded"
        (place,) = set(places(everlit.summary(undisturbed)))
        one, two = manifest(everlit.agent(other), job, 1500)["files"], manifest(everlit.agent(place), undisturbed, 1500)["files"]
        assert [f["sha256"] for f in one] == [f["sha256"] for f in two], (one, two)
        # What a job leaves goes from every host that has some of it.
        (copy,) = set(everlit.names) - {place}
        until("its last checkpoint is copied", lambda: steps_on(everlit.agent(copy), undisturbed)[-1:] == [1500], 20)
        everlit.request("DELETE", f"/jobs/{undisturbed}")
        until("removed everywhere", lambda: not any((everlit.agent(n).data / f"jobs/{undisturbed}").exists() for n in everlit.names), 20)
        print(f"     {told}; step 1500 is bit for bit that of an undisturbed run")


def an_agent_that_ends_hands_over_what_only_it_has():
    with Hosts(names=("a", "b")) as everlit:
        everlit.join_all("--slots", "2")
        job = everlit.submit(world_size=2, worker={**LONG, "steps": 1500}, checkpoint={**EVERY, "copies": 0})
        (first,) = set(places(everlit.at_step(job, 500)))
        leaving = everlit.agent(first)
        leaving.process.terminate()
        end = everlit.final(job)
        told = resumed(everlit, job, 2)
        assert end["state"] == "succeeded" and first not in places(end) and told.endswith(f", fetched from {first}"), (end, told)
        assert (end["lost_steps"], end["restarts"]) == (0, 0), end
        assert leaving.process.wait(30) == 0
        print(f"     {first} was told to end: {told}")


def a_job_begins_from_what_another_has_left_on_another_host():
    with Hosts(names=("a", "b")) as everlit:
        everlit.join_all("--slots", "2")
        one = everlit.submit(world_size=2, worker={**LONG, "steps": 300}, checkpoint={**EVERY, "copies": 0})
        assert everlit.final(one)["state"] == "succeeded"
        (place,) = set(places(everlit.summary(one)))
        everlit.post(f"/nodes/{place}/cordon")
        two = everlit.submit(world_size=2, worker={"steps": 500}, resume_from=one)
        end = everlit.final(two)
        told = resumed(everlit, two, 1)
        assert end["state"] == "succeeded" and place not in places(end) and end["step"] == 500, end
        assert told == f"attempt 1 resumes from the checkpoint of step 300, fetched from {place}", told
        print(f"     {told}")


def all_hosts_silent_at_once_is_our_own_fault_and_ends_nothing():
    with Hosts("--node-timeout", "4s") as everlit:
        everlit.join_all("--slots", "2")
        job = everlit.submit(world_size=4, worker=LONG, checkpoint=EVERY)
        before = everlit.at_step(job, 300)
        pids = [r["pid"] for r in before["ranks"]]
        for name in everlit.names:
            everlit.cut(name)
        cut = time.monotonic()
        until("three leases", lambda: time.monotonic() - cut > 13, 20)
        assert all(is_alive(pid) for pid in pids) and everlit.summary(job)["attempt"] == 1
        for name in everlit.names:
            everlit.heal(name)
        until("all back", lambda: [n["state"] for n in everlit.get("/nodes")["data"]] == ["ready"] * 3, 60)
        after = everlit.at_step(job, before["step"] + 500, 90)
        assert (after["attempt"], after["restarts"]) == (1, 0) and [r["pid"] for r in after["ranks"]] == pids, after
        print(f"     cut for 13 s with leases of 4 s: the same processes, step {before['step']} then {after['step']}")


def a_coordinator_that_dies_is_no_news_to_a_gang_across_hosts():
    with Hosts(names=("a", "b")) as everlit:
        everlit.join_all("--slots", "2")
        job = everlit.submit(world_size=4, worker=LONG, checkpoint=EVERY)
        before = everlit.at_step(job, 300)
        everlit.kill()
        Everlit.up(everlit, wait=False)
        until("ready", everlit.is_ready, 20)
        after = everlit.at_step(job, before["step"] + 300, 60)
        assert [r["pid"] for r in after["ranks"]] == [r["pid"] for r in before["ranks"]] and after["restarts"] == 0, after
        # An agent, too.
        agent = everlit.agent("b")
        agent.process.kill()
        agent.process.wait()
        agent.start("run")
        again = everlit.at_step(job, after["step"] + 300, 60)
        assert [r["pid"] for r in again["ranks"]] == [r["pid"] for r in before["ranks"]] and again["restarts"] == 0, again
        # A rank that dies takes the gang with it, and that is told.
        os.kill(again["ranks"][3]["pid"], 9)
        back = until("again", lambda: (s := everlit.summary(job))["attempt"] == 2 and (s["step"] or 0) > again["step"] and s, 60)
        event = next(e for e in everlit.events(job) if e["event"] == "gang_failed")
        assert "several nodes" in json.dumps(event), event
        print(f"     killed rank 3 on {places(again)[3]}: attempt 2 is beyond step {again['step']}; {event['reason']}")
        assert places(back)


class Proxy:
    """Between agents and the coordinator: adds a delay each way, and goes silent without a word when told to."""

    def __init__(self, target, delay=0.0):
        self.target, self.delay, self.silent = target, delay, False
        self.door = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self.door.getsockname()[1]}"
        self.carried = 0
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                one, _ = self.door.accept()
            except OSError:
                return
            threading.Thread(target=self.carry, args=(one,), daemon=True).start()

    def carry(self, one):
        with contextlib.suppress(OSError), one, socket.create_connection(self.target) as two:
            born_silent = self.silent
            while True:
                ready, _, _ = select.select([one, two], [], [], 0.1)
                if self.silent or born_silent:
                    # Both ends keep a connection on which nothing comes any more.
                    born_silent = True
                    time.sleep(0.1)
                    if not self.silent and self.closed(one):
                        return
                    continue
                for source, sink in [(one, two), (two, one)]:
                    if source in ready:
                        data = source.recv(65536)
                        if not data:
                            return
                        time.sleep(self.delay)
                        sink.sendall(data)
                        self.carried += len(data)

    @staticmethod
    def closed(stream):
        stream.setblocking(False)
        try:
            return stream.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False


def a_slow_link_works_and_a_half_open_one_is_found():
    from joining import Cluster

    with Cluster("--node-timeout", "4s") as everlit:
        proxy = Proxy(("127.0.0.1", everlit.port), delay=0.1)
        agent = everlit.join("far", url=proxy.url)
        job = everlit.submit(command=["sh", "-c", "i=0; while :; do i=$((i+1)); echo line $i; sleep 0.2; done"])
        before = everlit.running(job)
        until("lines", lambda: everlit.get(f"/jobs/{job}/logs", raw=True).count(b"line") > 5, 20)
        assert proxy.carried > 1000, "it goes through the proxy"
        proxy.silent = True
        begun = time.monotonic()
        until("it is seen", lambda: everlit.node("far")["state"] == "lost", 20)
        seen = time.monotonic() - begun
        assert everlit.summary(job)["attempt"] == 1 and is_alive(before["ranks"][0]["pid"])
        proxy.silent = False
        until("it dials again, by itself", lambda: everlit.node("far")["state"] == "ready", 60)
        back = time.monotonic() - begun
        after = everlit.running(job)
        assert (after["attempt"], after["ranks"][0]["pid"]) == (1, before["ranks"][0]["pid"]), after
        lines = [int(line.split()[1]) for line in everlit.get(f"/jobs/{job}/logs", raw=True).decode().splitlines()]
        assert lines == list(range(1, len(lines) + 1)) and len(lines) > 20, "no line is lost or told twice"
        assert agent.is_alive()
        print(f"     0.1 s each way; half open: seen after {seen:.1f} s (lease 4 s), linked again after {back:.1f} s")
        everlit.post(f"/jobs/{job}/stop?force=true")


CHECKS = [
    a_gang_trains_across_hosts_as_on_one,
    a_program_that_is_not_ours_meets_where_it_is_told,
    a_host_that_is_cut_off_costs_a_lease_and_commits_nothing_more,
    a_gang_on_one_host_goes_on_from_a_copy_when_the_host_is_lost,
    a_gang_that_moves_takes_its_checkpoint_along,
    an_agent_that_ends_hands_over_what_only_it_has,
    a_job_begins_from_what_another_has_left_on_another_host,
    all_hosts_silent_at_once_is_our_own_fault_and_ends_nothing,
    a_coordinator_that_dies_is_no_news_to_a_gang_across_hosts,
    a_slow_link_works_and_a_half_open_one_is_found,
]

if __name__ == "__main__":
    run(CHECKS, "nodes")
