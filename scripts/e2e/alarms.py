"""Jobs with default settings on a slow and busy machine, from a seed, while nobody is killed: every verdict is a false alarm.

One training of steps of about 100 ms runs the whole time. Beside it lanes run one job after the other: trainings of 2 or 3 ranks, gangs of a
Python program with heartbeats and a slow first step, and programs that say nothing. Three times a rank of the long training is stopped for
good after many undisturbed steps: this one must be found, and how fast is what the absence of false alarms is worth.
"""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time

from disk import Disk
from lib import BIN, Everlit, until
from outside import FINAL, EventFollower, Gang, Losses, Ranks, identity, lives, moment, stat
from patience import FOREIGN, MUTE, Bursts, Stalls
from witnesses import patiently

SEED = int(os.environ.get("EVERLIT_ALARMS_SEED", str(random.SystemRandom().randrange(1 << 32))))
CLEAN_STEPS = int(os.environ.get("EVERLIT_ALARMS_CLEAN_STEPS", "1000"))
DISK_MEGABYTES = 2048
STEP_SECONDS, TARGET_SECONDS = 0.1, 2.0
# A machine that is too busy for steps of 100 ms gets no more time than this for its clean steps.
CLEAN_SECONDS_MAX = 240
# So many of the newest steps decide how long the next may take.
NEWEST_STEPS = 130
SLOW_FIRST_SECONDS, SLOW_SAVE_SECONDS = 20, 1
# Nothing that happens here lasts so long: a job that does no step, or does not stop, hangs.
HANGS_SECONDS = 240
ALARMS = ("rank_replaced", "rank_failed", "gang_failed", "rank_alert", "rank_slow", "node_lost")


def load():
    """How busy the machine is, all of it."""
    told = f"load average {os.getloadavg()[0]:.1f}"
    with contextlib.suppress(OSError):
        # Some process had to wait for a core in so much of the last ten seconds.
        told += f", CPU pressure {pathlib.Path('/proc/pressure/cpu').read_text().split()[1].split('=')[1]} %"
    return told


class Events(EventFollower):
    """Every event; a verdict that nobody gave cause for is told at once, with what went on."""

    def __init__(self, everlit, losses, circumstances):
        super().__init__(everlit, losses)
        self.circumstances = circumstances
        self.kinds, self.expected, self.false = {}, None, 0

    def take(self, event_id, event, data):
        super().take(event_id, event, data)
        if event not in ALARMS:
            return
        job, about = data.get("job_id"), data.get("data", {})
        found = (job, about.get("rank", about.get("first_failed_rank")))
        if self.expected and self.expected[0] == job and found[1] in (self.expected[1], None) and about.get("cause") in ("stuck", "silent"):
            self.expected = None
            return
        self.false += 1
        self.losses.add(f"false alarm: {event} at {data['time']} of {self.kinds.get(job, 'no job of this test')}, {job}: {data['reason']}\n{self.circumstances()}")
        threading.Thread(target=self.explain, args=(job, about.get("attempt")), daemon=True).start()

    def explain(self, job, attempt):
        """What everlit itself has to say about it, as far as it is short."""
        with contextlib.suppress(Exception):
            told = self.everlit.get(f"/jobs/{job}/attempts/{attempt or self.everlit.summary(job)['attempt']}/postmortem")
            for failure in told["failures"][-1:]:
                # Of each thread the line that says what it waits in.
                threads = lambda stack: "\n     ".join(line for line in stack["text"].splitlines()[:200] if not line.startswith(" "))
                stacks = [f"rank {stack['rank']}: {threads(stack)[:1500]}" for stack in failure.get("stacks", [])[:3]]
                print(f"     postmortem of {job}: {failure.get('reason')}; load {failure.get('nodes')}", *stacks, sep="\n     ", flush=True)
        with contextlib.suppress(OSError):
            lines = (self.everlit.data / "agent/agent.log").read_text().splitlines()
            print("     agent.log:", *lines[-12:], sep="\n     ", flush=True)


class Lane(threading.Thread):
    """Jobs of one kind, one after the other, each held to what it must come to without a restart."""

    def __init__(self, run, seed):
        super().__init__(daemon=True)
        self.run_of, self.everlit = run, run.everlit
        self.chance = random.Random(seed)
        self.may, self.idle, self.quit = threading.Event(), threading.Event(), False
        self.may.set()
        self.jobs, self.firsts, self.saves, self.job = 0, [], [], None
        self.firsts_of = {}

    def body(self):
        """What it is in a few words, the job, and after how many seconds a user has had enough of it."""
        raise NotImplementedError

    def settle(self, job, slowest_save):
        """Notes what was seen of a job that is over."""

    def run(self):
        while not self.quit:
            if not self.may.is_set():
                self.idle.set()
                time.sleep(0.1)
                continue
            self.idle.clear()
            try:
                self.one()
            except Exception as e:
                if not self.run_of.over:
                    self.run_of.losses.add(f"{type(self).__name__}: {e!r}")
            time.sleep(0.2)
        self.idle.set()

    def one(self):
        kind, body, patience = self.body()
        job = patiently(lambda: self.everlit.post("/jobs", body))["job_id"]
        self.job, self.run_of.events.kinds[job] = job, kind
        began, slowest, stopped, summary, running = time.monotonic(), 0.0, False, None, None
        while True:
            with contextlib.suppress(OSError):
                summary = patiently(lambda: self.everlit.summary(job))
                if summary["state"] in FINAL:
                    break
                slowest = max(slowest, (summary["metrics"] or {}).get("save_write_seconds", 0))
                if summary["state"] == "running" and running is None:
                    running = time.monotonic()
                if running and summary["step"] and job not in self.firsts_of:
                    self.firsts_of[job] = time.monotonic() - running
                if not stopped and (self.quit or time.monotonic() > began + patience):
                    patiently(lambda: self.everlit.post(f"/jobs/{job}/stop"))
                    stopped, began = True, time.monotonic()
                assert not stopped or time.monotonic() < began + HANGS_SECONDS, f"{kind}, {job}, does not stop: {summary['state']}, {summary['reason']}"
            time.sleep(0.3)
        if self.run_of.over:
            return
        self.jobs += 1
        good = summary["state"] == ("stopped" if stopped else "succeeded") or (stopped and summary["state"] == "succeeded")
        good = good and summary["restarts"] == 0 and summary["attempt"] == 1
        told = f"{kind}, {job}, ended {summary['state']} with {summary['restarts']} restarts: {summary['reason']}"
        self.run_of.losses.check(good, told)
        self.settle(job, slowest)
        if good:
            until("its end is told", lambda: self.run_of.events.count(job, "job_final"), 60)
            patiently(lambda: self.everlit.request("DELETE", f"/jobs/{job}"))
            # Followers need nothing of it any more.
            self.run_of.events.events.pop(job, None)


class Trainings(Lane):
    """The built-in program, 2 or 3 ranks, saving often."""

    def body(self):
        world = self.chance.choice((2, 2, 3))
        # The last one's steps take seconds, and it saves 120 MB.
        kinds = (("mlp-10k", (2000, 8000), 50), ("mlp-500k", (300, 1200), 20), ("llama-1m", (60, 250), 5), ("llama-1m", (60, 250), 5), ("llama-10m", (5, 15), 2))
        model, steps, every = self.chance.choice(kinds)
        worker = {"model": model, "steps": self.chance.randint(*steps), "batch_size": world * self.chance.choice((2, 4))}
        if self.chance.random() < 0.3:
            worker["evaluation"] = {"every_steps": self.chance.choice((20, 60)), "samples": 64}
        checkpoint = self.chance.choice(({"every_steps": every}, {"every_steps": 4 * every}, {"every": "1s"}, {"every": "auto"}))
        body = {"world_size": world, "worker": worker, "checkpoint": checkpoint}
        return f"{world} ranks of {model}, {worker['steps']} steps, {checkpoint}", body, self.chance.uniform(40, 120)

    def settle(self, job, slowest_save):
        self.firsts.extend([self.firsts_of[job]] if job in self.firsts_of else [])
        self.saves.append(slowest_save)


class Scripts(Lane):
    """A gang of two Python programs with heartbeats; the first step is slow."""

    def __init__(self, run, seed):
        super().__init__(run, seed)
        self.evaluations, self.steps = [], []

    def body(self):
        self.number = getattr(self, "number", 0) + 1
        seed, first, steps = self.chance.randrange(1 << 30), self.chance.uniform(20, 90), self.chance.randint(200, 700)
        self.notes = self.run_of.notes / f"{id(self)}.{self.number}"
        command = [sys.executable, "-c", FOREIGN, str(self.notes), str(seed), f"{first:.1f}", str(steps), str(BIN / "everlit-agent")]
        return f"a script, first step {first:.0f} s, {steps} steps, seed {seed}", {"world_size": 2, "command": command}, 900

    def settle(self, job, _):
        kinds = {"first": self.firsts, "save": self.saves, "evaluation": self.evaluations, "step": self.steps}
        with contextlib.suppress(FileNotFoundError):
            for line in self.notes.read_text().splitlines():
                what, seconds = line.split()
                kinds[what].append(float(seconds))


class Mutes(Lane):
    """Programs without heartbeats that are quiet for as long as the defaults let them."""

    bag = []

    def body(self):
        if not self.bag:
            self.bag = ["sleeps", "computes", "alone", "never speaks"]
            self.chance.shuffle(self.bag)
        kind, before = self.bag.pop(), self.chance.uniform(0, 90)
        quiet, busy, world = {
            # `heartbeat.startup_timeout` is 2 minutes, `idle_timeout` of gangs 5.
            "sleeps": (self.chance.uniform(150, 285), 0, 2),
            "computes": (self.chance.uniform(320, 480), 0.06, 2),
            "alone": (self.chance.uniform(320, 480), 0, 1),
            "never speaks": (0, 0, 2),
        }[kind]
        command = [sys.executable, "-c", MUTE, f"{before:.0f}", f"{quiet:.0f}", str(busy)]
        return f"a mute program that {kind}: {before:.0f} s, {quiet:.0f} s", {"world_size": world, "command": command}, 1200


class Run:
    def __init__(self, everlit, disk, notes, losses):
        self.everlit, self.disk, self.notes, self.losses = everlit, disk, notes, losses
        self.chance = random.Random(SEED)
        self.ranks = Ranks(everlit.data)
        self.bursts, self.stalls = Bursts(disk, SEED + 1), Stalls(disk, SEED + 2)
        self.events = Events(everlit, losses, self.circumstances)
        self.events.start()
        self.agent = identity(everlit.agent_pid())
        self.proofs, self.slow_save = [], 0.0
        self.began = time.monotonic()
        self.steady = self.begin_steady()
        self.lanes = [Trainings(self, SEED + 3), Scripts(self, SEED + 4), Mutes(self, SEED + 5)]
        for thread in [self.bursts, self.stalls, *self.lanes]:
            thread.start()

    def circumstances(self):
        now = [f"now: {d.now}" for d in (self.bursts, self.stalls) if d.now]
        return "     " + "; ".join([load(), *now, "lately", *self.bursts.newest, *self.stalls.newest])

    def begin_steady(self):
        """The long training; its batch is such that a step takes about 100 ms here."""
        body = {"world_size": 2, "worker": {"model": "llama-1m", "steps": 10**9, "batch_size": 4}, "checkpoint": {"every_steps": 25}}
        trial = patiently(lambda: self.everlit.post("/jobs", body))["job_id"]
        self.events.kinds[trial] = "a training to measure a step"
        first = self.everlit.at_step(trial, 10)["step"]
        began = time.monotonic()
        steps = self.everlit.at_step(trial, first + 40)["step"] - first
        step = (time.monotonic() - began) / steps
        patiently(lambda: self.everlit.post(f"/jobs/{trial}/stop"))
        self.everlit.final(trial)
        body["worker"]["batch_size"] = max(2, min(64, round(4 * STEP_SECONDS / step / 2) * 2))
        job = patiently(lambda: self.everlit.post("/jobs", body))["job_id"]
        self.events.kinds[job] = "the long training"
        print(f"     a step of 4 samples takes {1000 * step:.0f} ms: the long training, {job}, takes {body['worker']['batch_size']}", flush=True)
        return job

    # ---- while everything is slow

    def look(self):
        with contextlib.suppress(Exception):
            summary = self.everlit.summary(self.steady)
            self.slow_save = max(self.slow_save, summary["metrics"].get("save_write_seconds", 0))
            return summary["step"] or 0
        return 0

    def disturbed(self, seconds):
        for disturber in (self.bursts, self.stalls):
            disturber.may.set()
        self.lanes[0].may.set()
        end = time.monotonic() + seconds
        self.steps_seen = (0, time.monotonic())
        while time.monotonic() < end and len(self.losses.found) < 50:
            self.minute()
            time.sleep(1)

    # Everything is being ended, whatever it was doing.
    over = False
    told, steps_seen, hangs = 0, (0, 0.0), False

    def minute(self):
        step = self.look()
        if step != self.steps_seen[0] or self.hangs:
            self.steps_seen = (step, time.monotonic())
        elif time.monotonic() > self.steps_seen[1] + HANGS_SECONDS:
            self.hangs = True
            summary = self.everlit.summary(self.steady)
            self.losses.add(f"the long training does no step since {HANGS_SECONDS} s: {summary['state']}, {summary['reason']}")
        minute = int((time.monotonic() - self.began) / 60)
        if minute == self.told:
            return
        self.told = minute
        firsts = [f for lane in self.lanes for f in list(lane.firsts)]
        saves = [self.slow_save, *(s for lane in self.lanes for s in list(lane.saves))]
        print(
            f"     {time.strftime('%H:%M:%S')} minute {minute}: {sum(lane.jobs for lane in self.lanes)} jobs over, long training at step {step}, slowest first step "
            f"{max(firsts, default=0):.0f} s, slowest save {max(saves):.1f} s, {self.bursts.seconds:.0f} s of load, disk stood {self.stalls.stood:.0f} s, "
            f"{load()}, false alarms: {self.events.false or 'none'}",
            flush=True,
        )

    # ---- the detector lives

    def prove(self):
        """Stops a rank for good, after many steps that nobody disturbed."""
        for disturber in (self.bursts, self.stalls):
            disturber.calm()
        self.lanes[0].may.clear()
        if self.hangs:
            return
        until("the trainings beside it are over", lambda: self.minute() or self.lanes[0].idle.is_set(), 400, 0.2)
        began, first = time.monotonic(), self.everlit.at_step(self.steady, 1)["step"]
        wanted = first + CLEAN_STEPS - NEWEST_STEPS
        while self.look() < wanted and time.monotonic() < began + CLEAN_SECONDS_MAX:
            self.minute()
            time.sleep(0.5)
        gang = Gang(self.ranks, self.steady)
        if len(gang.who) < 2:
            self.losses.add(f"the long training does not run: {self.everlit.summary(self.steady)['reason']}")
            return
        longest = self.longest_of_newest(gang)
        clean = max(1, max(gang.step(rank) or 0 for rank in gang.who) - first)
        step_ms = 1000 * (time.monotonic() - began) / clean
        time.sleep(self.chance.uniform(0, 0.3))
        victim = self.chance.choice(sorted(gang.who))
        pid = gang.who[victim][0]
        known = len(self.events.events[self.steady])
        self.events.expected = (self.steady, victim)
        stopped = time.time()
        os.kill(pid, signal.SIGSTOP)
        until(f"{pid} is stopped", lambda: (about := stat(pid)) is None or about[0] == "T", 10, 0.001)
        reached = max(gang.step(rank) or 0 for rank in gang.who)

        def all_step():
            now = Gang(self.ranks, self.steady)
            return sorted(now.who) == sorted(gang.who) and not lives(gang.who[victim]) and all((s or 0) > reached for s in now.steps.values())

        busy = load()
        try:
            until("all ranks step again", all_step, 90, 0.01)
        except AssertionError:
            self.events.expected = None
            self.losses.add(f"rank {victim} of the long training was stopped at {time.strftime('%H:%M:%S', time.localtime(stopped))}, and 90 s later not all step")
            return
        back = time.time() - stopped
        until("it is told", lambda: self.events.expected is None, 30)
        events = self.events.events[self.steady][known:]
        found = next(e for e in events if e["event"] in ALARMS)
        # The event comes with the first heartbeat that tells of it.
        with contextlib.suppress(AssertionError):
            until("the recovery is told", lambda: any(e["event"] == "recovered_in_place" for e in self.events.events[self.steady][known:]), 5)
        recovered = next((e for e in self.events.events[self.steady][known:] if e["event"] == "recovered_in_place"), None)
        proof = (moment(found["time"]) - stopped, moment(recovered["time"]) - stopped if recovered else None, back, clean, step_ms, longest, busy, found)
        self.proofs.append(proof)
        print("     " + self.say(proof), flush=True)

    def say(self, proof):
        found, recovered, back, clean, step_ms, longest, busy, event = proof
        told = f"recovered in place after {recovered:.2f} s" if recovered is not None else f"not in place ({event['event']})"
        verdict = "within" if back <= TARGET_SECONDS else "ABOVE"
        return (
            f"stopped for good after {clean} clean steps of {step_ms:.0f} ms (longest of the newest {longest:.0f} ms): found after {found:.2f} s, {told}, "
            f"all step after {back:.2f} s, {verdict} {TARGET_SECONDS:.0f} s; {busy}; {event['reason']}"
        )

    def longest_of_newest(self, gang):
        """The longest time between two of the next steps, in milliseconds, as rank 0's heartbeats tell of it."""
        longest, at, step = 0.0, time.monotonic(), gang.step(0) or 0
        last = step + NEWEST_STEPS
        deadline = at + NEWEST_STEPS
        while step < last and time.monotonic() < deadline:
            time.sleep(0.01)
            newer, now = gang.step(0) or step, time.monotonic()
            if newer > step:
                longest = max(longest, (now - at) / (newer - step))
                step, at = newer, now
        return 1000 * longest

    # ---- the end

    def finish(self):
        for disturber in (self.bursts, self.stalls):
            disturber.quit = True
            disturber.calm()
        for lane in self.lanes:
            lane.quit = True
        for lane in self.lanes:
            lane.join(180)
            self.losses.check(not lane.is_alive(), f"{type(lane).__name__} came to no end, with {lane.job}")
        for disturber in (self.bursts, self.stalls):
            self.losses.check(not disturber.trouble, f"{type(disturber).__name__}: {disturber.trouble}")
        summary = self.everlit.summary(self.steady)
        told = self.events.count(self.steady, "rank_replaced", "gang_failed")
        self.losses.check(summary["restarts"] == told, f"the long training has {summary['restarts']} restarts, events tell of {told}")
        self.everlit.post(f"/jobs/{self.steady}/stop")
        state = self.everlit.final(self.steady)["state"]
        self.losses.check(state == "stopped", f"the long training ended {state}")
        self.losses.check(lives(self.agent), "the agent is not the one of the beginning")

    def table(self):
        trainings, scripts, mutes = self.lanes
        every = lambda values: f"{len(values)}, slowest {max(values, default=0):.1f} s"
        slow = lambda values, limit: f"{every([v for v in values if v > limit])}"
        steps = scripts.steps
        rows = [
            ("trainings of 2 and 3 ranks", f"{trainings.jobs} and the long one"),
            ("scripts with heartbeats, gangs of 2", f"{scripts.jobs}"),
            ("mute programs", f"{mutes.jobs}"),
            (f"first steps slower than {SLOW_FIRST_SECONDS} s", slow(trainings.firsts + scripts.firsts, SLOW_FIRST_SECONDS)),
            ("first steps of trainings", every(trainings.firsts)),
            (f"saves slower than {SLOW_SAVE_SECONDS} s, of scripts", f"{slow(scripts.saves, SLOW_SAVE_SECONDS)}, of {len(scripts.saves)}"),
            (f"trainings with a save slower than {SLOW_SAVE_SECONDS} s", f"{slow([self.slow_save, *trainings.saves], SLOW_SAVE_SECONDS)}, of {len(trainings.saves) + 1}"),
            ("evaluations of scripts", every(scripts.evaluations)),
            ("steps of scripts longer than 2 s", f"{slow(steps, 2)}, of {len(steps)}, median {statistics.median(steps or [0]):.2f} s"),
            ("bursts of load", f"{self.bursts.times}, {self.bursts.seconds:.0f} s in all"),
            ("the disk stood still", f"{self.stalls.stood:.0f} s in all, a write took up to {self.stalls.slowest:.1f} s; {self.stalls.in_save} times in a save"),
            ("saves that failed", str(sum(count for (_, event), count in self.events.counts.items() if event == "checkpoint_failed"))),
            ("connections of the agent", str(sum(count for (_, event), count in self.events.counts.items() if event == "node_ready"))),
        ]
        for name, seen in rows:
            print(f"{name:<42}{seen}")
        for proof in self.proofs:
            print(self.say(proof))


def main():
    minutes = sys.argv[1] if len(sys.argv) > 1 else "60"
    if len(sys.argv) > 2 or not minutes.replace(".", "", 1).isdigit():
        sys.exit("usage: alarms.sh [MINUTES]")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    disk = Disk(DISK_MEGABYTES)
    if disk.why:
        disk.remove(keep=False)
        print(f"SKIPPED: {disk.why}")
        sys.exit(77)
    print(f"seed {SEED} (EVERLIT_ALARMS_SEED), {minutes} minutes", flush=True)
    losses, run, wrong = Losses(), None, True
    began = time.monotonic()
    notes = pathlib.Path(tempfile.mkdtemp(prefix="everlit-alarms-notes-"))
    everlit = Everlit(data=disk.folder)
    try:
        everlit.up()
        run = Run(everlit, disk, notes, losses)
        for _ in range(3):
            run.disturbed(float(minutes) * 20)
            run.prove()
        run.finish()
    except Exception as e:
        losses.add(repr(e))
    finally:
        if run:
            run.over = run.bursts.quit = run.stalls.quit = run.events.quit = True
            for lane in run.lanes:
                lane.quit = True
            run.bursts.calm()
            run.stalls.calm()
        with contextlib.suppress(Exception):
            everlit.end()
        wrong = bool(losses.found)
        kept = disk.remove(keep=wrong)
        shutil.rmtree(notes, ignore_errors=True)
    if run:
        run.table()
    if wrong:
        print(f"the data folder is kept: {kept}")
    others = len(losses.found) - (run.events.false if run else 0)
    also = f"; {others} other losses" if others else ""
    print(f"alarms: {'FAILED' if wrong else 'passed'}: {(time.monotonic() - began) / 60:.1f} minutes, false alarms: {run and run.events.false or 'none'}{also}")
    sys.exit(1 if wrong else 0)


main()
