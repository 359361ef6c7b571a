"""What `everlit simulate` says of a job, held against what became of real ones: goodput at three failure rates.

The simulator's faults depend on a seed and a rate alone. Here the same stream of chance is drawn, and each fault becomes a kill -9 of a real rank
at that moment of the job's life. So both have the same failures, and what differs is the model, not the luck. What things cost is measured on
other jobs that run beside those that are compared, under the same load, and are killed at moments of their own; nothing is fitted.
"""

import contextlib
import heapq
import json
import math
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from lib import BIN, Everlit
from outside import Losses, check_ledger, environment, moment, stat

SEED = int(os.environ.get("EVERLIT_GOODPUT_SEED", str(random.SystemRandom().randrange(1 << 32))))
# Recovery in place keeps the processors busy with five trainings: for a machine that nobody else uses.
IN_PLACE = os.environ.get("EVERLIT_GOODPUT_IN_PLACE", "") not in ("", "0")
MINUTES = 10.0
POINTS_MAX = 2.0
KIND = "software_bug"
EVERY = "4s"
# Defaults of backoff; nothing is ever given up.
RESTART = {"max_restarts": 1_000_000, "max_start_failures": 1_000_000, "heal_after": "30d"}
WORKER = {"model": "mlp-10k", "steps": 10**12, "batch_size": 16}
MANY = 40
# A kill that comes later than this is another failure than the simulated one.
LATE_SECONDS_MAX = 1.0
FLAGS = {
    "step": "--step-time",
    "save_stall": "--save-stall",
    "save": "--save-time",
    "seen_exit": "--seen-exit",
    "start": "--start-time",
    "stop": "--stop-time",
    "load": "--load-time",
    "load_snapshot": "--load-snapshot-time",
}

# Name, program or scope of the built-in one, the simulator's word for it, seconds between two failures of a job on average, jobs at each of these
# rates, seconds between two kills of a measured job: its recoveries must be over by then, also on a machine that others use.
POLICIES = (
    ("gang", "sleepers", "checkpoint", (60, 30, 12), 2, (7.0, 11.0)),
    ("in place", "auto", "in-place", (90, 45, 20), 1, (14.0, 22.0)),
)
PARTS = ("training", "repeated", "checkpointing", "undetected", "restoring", "backoff", "queued", "starting")
MASK = (1 << 64) - 1

# A gang of any program that mostly sleeps, so that its pace is its own on a machine that others use too: a step each `pause` in which all ranks
# wait for each other, a save by rank 0 each `every` seconds that everybody waits for. It notes when an attempt has done its first step.
SLEEPERS = """
import json, os, pathlib, socket, subprocess, sys, time
agent, notes, pause, every = sys.argv[1], pathlib.Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
rank, size, attempt = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), os.environ["EVERLIT_ATTEMPT"]
path = os.environ["EVERLIT_HEARTBEAT_FILE"]
resume, place = os.environ["EVERLIT_RESUME_FROM"], (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
seq = 0
def beat(phase, step):
    global seq
    seq += 1
    with open(path + ".new", "w") as file:
        json.dump({"seq": seq, "pid": os.getpid(), "rank": rank, "attempt": int(attempt), "phase": phase, "step": step, "total_steps": 1 << 40}, file)
    os.rename(path + ".new", path)
def join():
    if rank == 0:
        listener = socket.create_server(place, backlog=size)
        return [listener.accept()[0] for _ in range(size - 1)]
    while True:
        try:
            return [socket.create_connection(place)]
        except ConnectionRefusedError:
            time.sleep(0.005)
def barrier():
    for peer in peers if rank == 0 else []:
        peer.recv(1) or sys.exit("a peer is gone")
    for peer in peers:
        peer.sendall(b"x")
    for peer in peers if rank else []:
        peer.recv(1) or sys.exit("rank 0 is gone")
def save(step):
    draft = pathlib.Path(os.environ["EVERLIT_CHECKPOINT_DIR"]) / f"mine-{attempt}-{step}"
    draft.mkdir()
    (draft / "state.txt").write_text(str(step))
    subprocess.run([agent, "checkpoint", "commit", str(draft), "--step", str(step)], check=True, stdout=subprocess.DEVNULL)
step = int((pathlib.Path(resume) / "state.txt").read_text()) if resume else 0
begun = step
beat("load", step)
peers = join()
saved = time.monotonic()
while True:
    time.sleep(pause)
    barrier()
    step += 1
    beat("train", step)
    if rank == 0 and step == begun + 1:
        (notes / attempt).write_text(str(time.time()))
    if rank == 0 and time.monotonic() - saved >= every:
        saved = time.monotonic()
        beat("checkpoint", step)
        save(step)
        beat("train", step)
"""
PAUSE_SECONDS = 0.1


class Chance:
    """The simulator's source of chance: coordinator/src/simulate/random.rs, to the bit."""

    def __init__(self, seed, stream):
        name = 0xCBF29CE484222325
        for byte in stream.encode():
            name = ((name ^ byte) * 0x100000001B3) & MASK
        self.state = (seed ^ name) & MASK
        self.next()

    def next(self):
        self.state = z = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def unit(self):
        return (self.next() >> 11) / (1 << 53)

    def exponential(self):
        return -math.log(1.0 - self.unit())


def simulated_faults(seed, mean, seconds):
    """Seconds from submission at which the simulator's faults come (coordinator/src/simulate/faults.rs)."""
    chance, moments = Chance(seed, KIND), []
    at = chance.exponential() * mean
    while at < seconds:
        moments.append(at)
        # The node, the luck and the repair of this one.
        for _ in range(3):
            chance.next()
        at += chance.exponential() * mean
    return moments


class Job:
    """One real gang: when its ranks are to be killed, what was, and its ledger at the end."""

    def __init__(self, everlit, program, seed, seconds, mean=None, each=None):
        self.mean, self.seed = mean, seed
        self.chance = random.Random(seed)
        self.notes = None
        if program == "sleepers":
            self.notes = pathlib.Path(tempfile.mkdtemp(dir=everlit.data))
            command = [sys.executable, "-I", "-S", "-c", SLEEPERS, str(BIN / "everlit-agent"), str(self.notes), str(PAUSE_SECONDS), EVERY.rstrip("s")]
            what = {"command": command, "restart": RESTART}
        else:
            what = {"worker": WORKER, "checkpoint": {"every": EVERY}, "restart": {**RESTART, "scope": program}}
        self.id = everlit.submit(world_size=2, **what)
        self.began = time.time()
        self.moments = simulated_faults(seed, mean, seconds) if mean else self.now_and_then(seconds, each)
        self.fired = self.nobody = 0
        self.summary = None

    def now_and_then(self, seconds, each):
        """Moments far enough apart, the last of them far enough from the end."""
        moments = [self.chance.uniform(*each)]
        while moments[-1] < seconds - each[1]:
            moments.append(moments[-1] + self.chance.uniform(*each))
        return moments[:-1]

    def kill(self, everlit):
        """One of the ranks that live. Only they are looked at: to look at any other process may take long on a machine that others use."""
        pids = [rank["pid"] for rank in everlit.summary(self.id)["ranks"] if rank["pid"]]
        living = [pid for pid in pids if stat(pid) and environment(pid).get("EVERLIT_JOB_ID") == self.id]
        if not living:
            self.nobody += 1
            return
        # It may end just now, with a gang that is being stopped.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.chance.choice(living), signal.SIGKILL)
        self.fired += 1

    def end(self, everlit, losses):
        asked = time.time()
        self.summary = everlit.summary(self.id)
        check_ledger(self.summary, asked, time.time(), losses)
        losses.check(self.summary["state"] in ("running", "recovering"), f"job {self.id} is {self.summary['state']}: {self.summary['reason']}")
        self.events, after = [], ""
        while True:
            page = everlit.get(f"/jobs/{self.id}/events?limit=500{after}")
            self.events += page["data"]
            after = f"&after={page['last_id']}"
            if not page["has_more"]:
                break

    def count(self, name):
        return sum(event["event"] == name for event in self.events)

    def lasted(self):
        return sum(self.summary["ledger"].values())

    def loading(self):
        """Seconds of the first attempt from its ranks' start to their first step: training in the ledger of a program that never told of a step."""
        if not self.notes:
            return 0.0
        begun = next((moment(event["time"]) for event in self.events if event["event"] == "job_running"), self.began + self.lasted())
        ended = next((moment(event["time"]) for event in self.events if event["event"] == "gang_failed"), self.began + self.lasted())
        note = self.notes / "1"
        first = float(note.read_text()) if note.exists() else math.inf
        return max(0.0, min(first, ended) - begun)

    def ledger(self):
        """The job's own, with the first loading of a program that is not the built-in one where the built-in one's is."""
        ledger, loading = dict(self.summary["ledger"]), self.loading()
        return ledger | {"training": ledger["training"] - loading, "starting": ledger["starting"] + loading}


def busy():
    """Processor time that was used and that there was, by the kernel."""
    fields = [int(field) for field in open("/proc/stat").readline().split()[1:9]]
    return sum(fields) - fields[3] - fields[4], sum(fields)


def drive(everlit, jobs, seconds, losses):
    """Fires every kill at its moment, and takes each job's ledger at its end."""
    plan = [(job.began + moment, number, job, True) for number, job in enumerate(jobs) for moment in job.moments]
    plan += [(job.began + seconds, number, job, False) for number, job in enumerate(jobs)]
    heapq.heapify(plan)
    late = 0.0
    while plan:
        at, _, job, kills = heapq.heappop(plan)
        time.sleep(max(0.0, at - time.time()))
        if kills:
            job.kill(everlit)
            late = max(late, time.time() - at)
        else:
            job.end(everlit, losses)
    losses.check(late <= LATE_SECONDS_MAX, f"a kill came {late:.1f} s late: this machine stood still, and nothing can be compared")
    return late


def simulate(everlit, *flags, runs=1):
    """What the simulator says for one node with a gang of two."""
    flags = ["--nodes", "1", "--gpus-per-node", "2", "--spares", "0", "--failures", "none", "--runs", str(runs), *flags]
    return json.loads(subprocess.check_output([BIN / "everlit", "--url", everlit.url, "simulate", "--json", *flags], text=True))


def in_ms(ms):
    return f"{round(ms)}ms"


class Policy:
    """One recovery policy: real jobs at each rate, and those that its costs are measured on."""

    def __init__(self, everlit, number, policy, seconds, losses):
        name, program, recovery, means, copies, each = policy
        self.everlit, self.name, self.recovery, self.losses = everlit, name, recovery, losses
        seed = SEED + 100 * number
        self.own = Job(everlit, program, seed + 51, seconds, each=each)
        # What recovery in place falls back to is measured on a job that does nothing else.
        self.gang = Job(everlit, "gang", seed + 50, seconds, each=each) if program == "auto" else self.own
        self.measured = list(dict.fromkeys([self.own, self.gang]))
        self.compared = [Job(everlit, program, seed + at, seconds, mean) for at, mean in enumerate(means * copies)]
        before = busy()
        late = drive(everlit, [*self.measured, *self.compared], seconds, losses)
        used, there = (after - was for was, after in zip(before, busy()))
        print(f"\n{name}: {seconds:.0f} s, processors {100 * used / there:.0f} % busy, kills at most {late * 1000:.0f} ms late")
        self.costs = self.measure()
        for job in [*self.measured, *self.compared]:
            everlit.post(f"/jobs/{job.id}/stop?force=true")
        for job in [*self.measured, *self.compared]:
            everlit.final(job.id)

    def measure(self):
        """Costs in milliseconds, as the simulator itself takes them from jobs."""
        found = {}
        for job in self.measured:
            report = simulate(self.everlit, "--from-job", job.id)
            print(f"     measured, {job.fired} kills: " + "; ".join(report["measured"]))
            found[job] = report["scenario"]["costs"]
        own, gang = found[self.own], found[self.gang]
        costs = {name: own[f"{name}_ms"] for name in ("step", "save_stall", "save", "seen_exit")}
        costs |= {name: gang[f"{name}_ms"] for name in ("start", "stop", "load", "load_snapshot")}
        if self.own.notes:
            # The sleepers commit before they go on, and tell nobody how long that takes.
            costs["save"] = 0
        self.seen_ms = costs["seen_exit"]
        flags = [word for name, ms in costs.items() for word in (FLAGS[name], in_ms(ms))]
        if self.own.count("rank_replaced"):
            success = self.own.count("recovered_in_place") / self.own.count("rank_replaced")
            flags += ["--in-place-time", in_ms(own["in_place_ms"]), "--in-place-success", f"{success:.3f}"]
        print("     " + " ".join(flags), flush=True)
        return flags

    def foretold(self, job, seed, runs):
        rate = 86_400 / job.mean * 1_000
        flags = ["--duration", in_ms(job.lasted() * 1_000), "--failure", f"{KIND}={rate!r}", "--seed", str(seed), "--recovery", self.recovery]
        flags += ["--checkpoint-every", EVERY, *(word for key, value in RESTART.items() for word in (f"--{key.replace('_', '-')}", str(value)))]
        return simulate(self.everlit, *self.costs, *flags, runs=runs)

    def as_told(self, run):
        """A run's ledger as a job's would be: the step in flight at a failure is training there, and only what is not seen is undetected."""
        ledger, counts = dict(run["ledger_ms"]), run["counts"]
        unseen = min(ledger["undetected"], self.seen_ms * (counts["failures"] - counts["hit_nothing"]))
        ledger["training"] += ledger["undetected"] - unseen
        ledger["undetected"] = unseen
        return {part: ms / 1_000 for part, ms in ledger.items()}

    def rows(self):
        """For each rate: kills, restarts, and the goodput by the ledger as it is, as it is compared, as simulated, and at this rate in general."""
        rows = {}
        for job in self.compared:
            one = self.foretold(job, job.seed, 1)["runs"][0]
            real, ledger, counts = job.ledger(), self.as_told(one), one["counts"]
            came = job.fired + job.nobody
            self.losses.check(counts["failures"] == came, f"{counts['failures']} simulated failures, {came} real: the streams differ")
            for who, parts in ((f"real, {job.nobody} kills found no rank", real), (f"simulated, {counts['hit_nothing']} did", ledger)):
                shares = ", ".join(f"{part} {100 * parts[part] / job.lasted():.1f}" for part in PARTS if parts[part])
                print(f"     each {job.mean} s, {who}: {shares}", flush=True)
            many = [self.as_told(run)["training"] / job.lasted() for run in self.foretold(job, SEED + 10_000, MANY)["runs"]]
            told = job.summary["ledger"]["training"] / job.lasted()
            goodputs = (told, real["training"] / job.lasted(), ledger["training"] / job.lasted(), statistics.mean(many))
            rows.setdefault(job.mean, []).append((job.fired, job.summary["restarts"], *(100 * goodput for goodput in goodputs)))
        for mean, jobs in rows.items():
            kills, restarts, *goodputs = zip(*jobs)
            yield self.name, mean, len(jobs), sum(kills), sum(restarts), *map(statistics.mean, goodputs)


def main():
    if len(sys.argv) > 2:
        sys.exit("usage: goodput.sh [MINUTES]")
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else MINUTES
    print(f"seed {SEED} (EVERLIT_GOODPUT_SEED), {minutes:g} minutes{' for each recovery policy' if IN_PLACE else ''}", flush=True)
    losses = Losses()
    rows = []
    with Everlit(name="everlit-goodput-") as everlit:
        for number, policy in enumerate(POLICIES if IN_PLACE else POLICIES[:1]):
            rows += Policy(everlit, number, policy, minutes * 60, losses).rows()
    print("\n| recovery | a failure each | jobs | kills | restarts | ledger | real | simulated | points apart | at this rate |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, mean, jobs, kills, restarts, told, real, simulated, many in rows:
        shares = " | ".join(f"{share:.1f} %" for share in (told, real, simulated))
        print(f"| {name} | {mean} s | {jobs} | {kills} | {restarts} | {shares} | {simulated - real:+.1f} | {many:.1f} % |")
    worst = max((abs(row[7] - row[6]) for row in rows), default=math.inf)
    passed = worst <= POINTS_MAX and not losses.found
    print(f"goodput: {'agrees' if passed else 'FAILED'}: at most {worst:.1f} points apart (allowed: {POINTS_MAX:g}), {len(losses.found)} losses")
    sys.exit(0 if passed else 1)


main()
