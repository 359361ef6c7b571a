"""Kills of the coordinator and of the agent under running gangs, at random moments of steps, saves and recoveries.

Two gangs of two ranks run all the time: the built-in program, which trains and saves, and one that prints numbered lines. After each
kill it is shown from the outside that nobody was disturbed. A fifth of the kills come together with the kill of a rank.
"""

import contextlib
import os
import random
import signal
import sys
import time

from lib import Everlit, until
from outside import (
    FAILURES,
    NUMBERED,
    EventFollower,
    Gang,
    LogFollower,
    Losses,
    Ranks,
    ask,
    check_ledger,
    checkpoints,
    damage,
    identity,
    lives,
    saved,
)

SEED = int(os.environ.get("EVERLIT_KILLS_SEED", str(random.SystemRandom().randrange(1 << 32))))
EACH = 50
# A recovery takes about so long from the rank's kill to the gang's next step; kills are spread over a little more.
RECOVERY_SECONDS = 1.0
PAUSE_SECONDS = 0.02
FAST = {"initial": "1ms", "max": "1ms"}
ENDLESS = {"max_restarts": 1_000_000, "heal_after": "30d", "max_start_failures": 1_000_000, "backoff": FAST}


class Kills:
    def __init__(self, everlit, losses):
        self.everlit, self.losses = everlit, losses
        self.chance = random.Random(SEED)
        self.ranks = Ranks(everlit.data)
        self.notes = everlit.data / "notes"
        self.notes.mkdir()
        self.train = everlit.submit(
            world_size=2, worker={"model": "mlp-10k", "steps": 10**12, "batch_size": 16}, checkpoint={"every_steps": 40}, restart=ENDLESS
        )
        program = [sys.executable, "-c", NUMBERED, str(PAUSE_SECONDS), str(self.notes)]
        self.lines = everlit.submit(world_size=2, command=program, restart=ENDLESS, stop_grace="10s")
        self.jobs = [self.train, self.lines]
        self.restarts = dict.fromkeys(self.jobs, 0)
        self.kills_of = dict.fromkeys(self.jobs, 0)
        self.disturbed = dict.fromkeys(self.jobs, 0)
        self.standing = {}
        self.logs = [LogFollower(everlit, job, losses) for job in self.jobs]
        self.events = EventFollower(everlit, losses)
        for follower in [*self.logs, self.events]:
            follower.start()
        self.done = {"coordinator": 0, "agent": 0}
        self.moments = dict.fromkeys(("in a step", "in a save", "in a recovery"), 0)
        self.rank_kills = 0
        # An agent killed in the moment between making a rank's `state` and starting its shim: nobody can tell whether that ran, so the attempt is
        # begun again at no cost.
        self.begun_again = dict.fromkeys(self.jobs, 0)
        self.slowest = 0.0

    def steady(self, job):
        """The gang once both of its ranks run and step."""

        def there():
            gang = Gang(self.ranks, job)
            return len(gang.who) == 2 and all(gang.steps.values()) and gang

        return until(f"job {job} steps with both ranks", there, 60, 0.01)

    def settled(self):
        """Everybody steps, and the coordinator and the event stream know everything that happened before."""
        gangs = {job: self.steady(job) for job in self.jobs}
        for job in self.jobs:
            until(f"job {job} is known to run", lambda: self.knows(job, gangs[job]), 30, 0.01)
            self.disturbed[job] = self.events.disturbances(job)
            summary = self.everlit.summary(job)
            self.standing[job] = (summary["state"], summary["restarts"], summary["attempt"])
        return gangs

    def knows(self, job, gang, undisturbed=False):
        summary = self.everlit.summary(job)
        if undisturbed:
            seen = (summary["state"], summary["restarts"], summary["attempt"])
            self.losses.check(seen == self.standing[job], lambda: f"job {job} is shown as {seen}, not {self.standing[job]}")
        pids = {rank["rank"]: rank["pid"] for rank in summary["ranks"]}
        known = summary["state"] == "running" and summary["step"] and self.events.agrees(summary)
        return known and pids == {rank: who[0] for rank, who in gang.who.items()} and summary

    def drafts(self):
        return any(name.startswith(".draft-") and not name.endswith("-a0") for name in os.listdir(checkpoints(self.everlit, self.train)))

    def wait_for_save(self):
        deadline = time.monotonic() + 20
        while not self.drafts():
            if time.monotonic() > deadline:
                raise AssertionError("no save within 20 s")
            time.sleep(0.0003)
        # A save takes some milliseconds: any of them may be hit.
        time.sleep(self.chance.random() * 0.004)

    def kill_one(self, kind, with_rank, save):
        began = time.monotonic()
        gangs = self.settled()
        daemon = identity(self.everlit.agent_pid() if kind == "agent" else self.everlit.process.pid)
        victim = None
        if save:
            self.wait_for_save()
        else:
            time.sleep(self.chance.random() * 0.2)
        if with_rank:
            job = self.train if self.chance.random() < 0.75 else self.lines
            victim = (job, self.chance.randrange(2))
            order = self.chance.choice(["together", "after", "recovery", "recovery", "recovery"])
        else:
            order = None
        if order in ("together", "recovery"):
            self.kill_rank(gangs, victim)
        if order == "recovery":
            time.sleep(self.chance.random() * RECOVERY_SECONDS * (1 if victim[0] == self.train else 0.2))
        saving = self.drafts()
        recovering = order == "recovery" and not self.steps_again(gangs, victim[0])
        os.kill(daemon[0], signal.SIGKILL)
        if order == "after":
            self.kill_rank(gangs, victim)
        self.moments["in a recovery" if recovering else "in a save" if saving else "in a step"] += 1
        if kind == "coordinator":
            self.everlit.process.wait()
            self.restart_coordinator(victim)
        else:
            until("the agent's end", lambda: not lives(daemon), 10, 0.001)
            until("the next agent", self.everlit.agent_pid, 30, 0.01)
        self.confirm(gangs, victim, kind == "agent" and recovering)
        self.done[kind] += 1
        self.slowest = max(self.slowest, time.monotonic() - began)

    def steps_again(self, gangs, job):
        gang = Gang(self.ranks, job)
        return len(gang.who) == 2 and gang.who != gangs[job].who and all(gang.steps.values())

    def kill_rank(self, gangs, victim):
        job, rank = victim
        who = gangs[job].who[rank]
        if not self.losses.check(lives(who), f"rank {rank} of {job} was gone before it was killed"):
            return
        os.kill(who[0], signal.SIGKILL)
        self.rank_kills += 1
        until("the rank's end", lambda: not lives(who), 10, 0.001)

    def restart_coordinator(self, victim):
        if self.chance.random() < 0.5:
            # Shown without any coordinator: whoever was not killed goes on.
            for job in self.jobs:
                if not victim or victim[0] != job:
                    gang = Gang(self.ranks, job)
                    until(f"steps of {job} without a coordinator", gang.stepped, 20, 0.01)
        self.everlit.up(wait=False)
        until("ready", self.everlit.is_ready, 20, 0.003)

    def confirm(self, gangs, victim, may_begin_again):
        for job in self.jobs:
            if victim and victim[0] == job:
                gang = self.confirm_recovery(job, gangs[job].who[victim[1]], may_begin_again)
            else:
                gang = self.confirm_peace(job, gangs[job])
            summary = until(f"job {job} is known to run", lambda: self.knows(job, gang, not (victim and victim[0] == job)), 30, 0.01)
            restarts = self.restarts[job]
            self.losses.check(summary["restarts"] == restarts, lambda: f"job {job} counts {summary['restarts']} restarts, not {restarts}")
            check_ledger(*ask(self.everlit, job), self.losses)
        self.ranks.check_single(self.losses)

    def confirm_peace(self, job, gang):
        for rank, who in gang.who.items():
            self.losses.check(lives(who), f"rank {rank} of {job} ({who}) did not outlive the kill")
        gang = Gang(self.ranks, job)
        until(f"more steps of {job}", gang.stepped, 30, 0.01)
        more = self.events.disturbances(job) - self.disturbed[job]
        self.losses.check(not more, lambda: f"job {job} was disturbed: {self.events.events[job][-5:]}")
        return gang

    def confirm_recovery(self, job, killed, may_begin_again):
        self.kills_of[job] += 1
        until(f"the failure of {job} is on record", lambda: self.events.failures(job)[0] >= self.kills_of[job], 30, 0.01)
        gang = self.steady(job)
        until(f"job {job} is known to run", lambda: self.knows(job, gang), 30, 0.01)
        self.losses.check(killed not in gang.who.values(), f"the killed rank of {job} lives")
        counted, free = self.events.failures(job)
        self.losses.check(counted == self.kills_of[job], f"{counted} counted failures of {job} after {self.kills_of[job]} kills of its ranks")
        if free > self.begun_again[job]:
            self.losses.check(may_begin_again, lambda: f"job {job} began once more: {self.events.events[job][-8:]}")
            self.begun_again[job] = free
        self.restarts[job] = self.kills_of[job] + free
        return gang

    def finish(self):
        """Ends the jobs and settles what readers got."""
        gangs = {job: self.steady(job) for job in self.jobs}
        for job in self.jobs:
            self.everlit.post(f"/jobs/{job}/stop")
        for job, log in zip(self.jobs, self.logs):
            summary = self.everlit.final(job, 60)
            self.losses.check(summary["state"] == "stopped", f"job {job} ended {summary['state']}: {summary['reason']}")
            self.losses.check(summary["restarts"] == self.restarts[job], f"job {job} ended with {summary['restarts']} restarts, not {self.restarts[job]}")
            check_ledger(summary, 0, 0, self.losses)
            until(f"nothing of {job} lives", lambda: not any(map(lives, gangs[job].who.values())), 10)
            self.losses.check(not [key for key in self.ranks.living() if key[0] == job], f"ranks of {job} live on")
            log.join(60)
            self.losses.check(log.ended is not None, f"the reader of {job} came to no end: {log.trouble}")
            log.compare()
            events = self.events.compare(job)
            failed = sum(e["event"] in FAILURES for e in events)
            self.losses.check(failed == self.restarts[job], f"{failed} failures of {job} on record, not {self.restarts[job]}")
        self.logs[1].settle(self.notes)
        newest = saved(checkpoints(self.everlit, self.train))
        self.losses.check(newest and not damage(newest[0]), lambda: f"the newest checkpoint: {damage(newest[0]) if newest else 'there is none'}")

    def told(self, started):
        total = sum(self.done.values())
        spread = ", ".join(f"{count} {moment}" for moment, count in self.moments.items())
        lines = sum(log.lines for log in self.logs)
        return (
            f"{self.done['coordinator']} coordinator and {self.done['agent']} agent kills ({spread}), {self.rank_kills} with a rank's kill, "
            f"{sum(self.begun_again.values())} starts cut in two and begun again; "
            f"{lines} lines read over {sum(log.cuts for log in self.logs)} cuts; {(time.monotonic() - started) / max(1, total):.2f} s per kill, "
            f"slowest {self.slowest:.1f} s; {len(self.losses.found)} losses"
        )


def plan(coordinator, agent, chance):
    """Kinds in random pairs; of each kind a fifth together with a rank's kill, half of the others in a save.

    Pairs, because `everlit up` waits twice as long each time before it starts its agent again and forgets that only when it is itself
    started anew: many agent kills in a row under one coordinator would be ten seconds apart.
    """
    moments = {}
    for kind, count in (("coordinator", coordinator), ("agent", agent)):
        rank = round(count / 5)
        saves = (count - rank) // 2
        moments[kind] = [(kind, True, False)] * rank + [(kind, False, True)] * saves + [(kind, False, False)] * (count - rank - saves)
        chance.shuffle(moments[kind])
    kinds = []
    while moments["coordinator"] or moments["agent"]:
        pair = [moments[kind].pop() for kind in ("coordinator", "agent") if moments[kind]]
        chance.shuffle(pair)
        kinds += pair
    return kinds


def main():
    wanted = [int(word) for word in sys.argv[1:]]
    if len(wanted) > 2 or any(count < 0 for count in wanted):
        sys.exit("usage: kills.sh [COORDINATOR_KILLS [AGENT_KILLS]]")
    coordinator = wanted[0] if wanted else 20
    agent = wanted[1] if len(wanted) > 1 else coordinator
    print(f"seed {SEED} (EVERLIT_KILLS_SEED), {coordinator} coordinator and {agent} agent kills", flush=True)
    losses = Losses()
    everlit = Everlit(name="everlit-kills-")
    everlit.own = False
    everlit.up()
    kills = None
    started = time.monotonic()
    try:
        kills = Kills(everlit, losses)
        kills.settled()
        started = time.monotonic()
        for number, (kind, with_rank, save) in enumerate(plan(coordinator, agent, kills.chance), 1):
            try:
                kills.kill_one(kind, with_rank, save)
            except Exception as e:
                losses.add(f"kill {number} ({kind}{', with a rank' if with_rank else ''}): {e!r}")
            if number % EACH == 0:
                print(f"     {kills.told(started)}", flush=True)
            if losses.found:
                break
        kills.finish()
    except Exception as e:
        losses.add(repr(e))
    finally:
        for follower in [*kills.logs, kills.events] if kills else []:
            follower.quit = True
        everlit.own = not losses.found
        with contextlib.suppress(Exception):
            everlit.end()
    if losses.found:
        print(f"     the data folder is kept: {everlit.data}")
    verdict = "kills: no job disturbed, no wrong state, no line of log lost" if not losses.found else "kills: FAILED"
    print(f"{verdict}: {kills.told(started) if kills else losses.found}")
    sys.exit(1 if losses.found else 0)


main()
