"""Real jobs under real faults for some minutes, from a seed; what must hold is held from the outside, after each fault and at the end.

Three kinds of jobs run: the built-in program again and again, whose last bytes must be those of a run that nobody disturbed; a gang that
prints numbered lines for the whole time; and short jobs, submitted through every fault. Faults come one after the other in random order,
each shown to have fired, and what follows each is known: which rank goes, what it costs, who must not notice.
"""

import contextlib
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

from disk import Disk
from lib import BIN, Everlit, Refused, parent, until
from memory import MemoryLimit
from outside import (
    NUMBERED,
    EventFollower,
    Gang,
    LogFollower,
    Losses,
    Ranks,
    check_ledger,
    checkpoints,
    damage,
    environment,
    identity,
    lives,
    manifest,
    saved,
    stat,
    summary_or_none,
)
from witnesses import PATIENT, Submitter, Watcher, patiently

SEED = int(os.environ.get("EVERLIT_SOAK_SEED", str(random.SystemRandom().randrange(1 << 32))))
WITHOUT = [name.strip() for name in os.environ.get("EVERLIT_SOAK_WITHOUT", "").split(",") if name.strip()]
STEPS, EVERY = int(os.environ.get("EVERLIT_SOAK_STEPS", "3000")), 20
PROVED = {"model": "mlp-500k", "steps": STEPS, "batch_size": 16, "seed": 5, "deterministic": True}
DISK_MEGABYTES = 768
HUNGRY_MEGABYTES = 96
SNAPSHOTS = pathlib.Path("/dev/shm")


class NotNow(Exception):
    """A fault that can not be fired at this moment."""


class Soak:
    def __init__(self, everlit, disk, notes, losses):
        self.everlit, self.disk, self.notes, self.losses = everlit, disk, notes, losses
        self.chance = random.Random(SEED)
        self.ranks = Ranks(everlit.data)
        self.train = self.lines = None
        self.damaging = False
        self.torn, self.proved, self.resumed_from = set(), 0, 0
        self.events = EventFollower(everlit, losses)
        self.events.start()
        self.fired, self.notes_of, self.skipped = {}, {}, {}
        # What each job's failures have come to, as far as faults explain them.
        self.paid = {}
        self.wanted = self.undisturbed()
        self.lines = everlit.submit(
            world_size=2, command=[sys.executable, "-c", NUMBERED, "0.02", str(notes)], restart=PATIENT, heartbeat={"timeout": "3s"}, stop_grace="10s"
        )
        self.log = LogFollower(everlit, self.lines, losses)
        self.log.start()
        self.train_again()
        self.watcher = Watcher(self)
        self.watcher.start()
        self.submitter = Submitter(everlit, SEED)
        self.submitter.start()

    # ---- the training whose bytes are known

    def submit_training(self):
        body = {"world_size": 2, "worker": PROVED, "checkpoint": {"every_steps": EVERY}, "restart": PATIENT}
        return patiently(lambda: self.everlit.post("/jobs", body))["job_id"]

    def undisturbed(self):
        began = time.monotonic()
        job = self.submit_training()
        summary = self.everlit.final(job, 600)
        assert summary["state"] == "succeeded" and summary["restarts"] == 0, summary["reason"]
        print(f"     undisturbed: {STEPS} steps in {time.monotonic() - began:.1f} s", flush=True)
        return self.checksum(job)

    def checksum(self, job):
        newest = saved(checkpoints(self.everlit, job))[0]
        return manifest(newest)["step"], subprocess.check_output([BIN / "everlit-worker", "checksum", newest], text=True).strip()

    def train_again(self):
        """Settles the training that has ended, if any, and begins the next."""
        if self.train:
            self.prove()
            self.check_account()
        self.train = self.submit_training()
        self.steady(self.train)

    def prove(self):
        summary = patiently(lambda: self.everlit.final(self.train, 600), 600)
        self.losses.check(summary["state"] == "succeeded", f"the training {self.train} ended {summary['state']}: {summary['reason']}")
        if summary["state"] == "succeeded":
            got = self.checksum(self.train)
            self.losses.check(got == self.wanted, f"the training {self.train} ended with {got}, undisturbed with {self.wanted}")
            self.proved += 1
        check_ledger(summary, 0, 0, self.losses)
        until("its shared memory is freed", lambda: not list(SNAPSHOTS.glob(f"everlit-*/*/{self.train}")), 30)

    # ---- who is there, and what it cost

    def steady(self, job, seconds=90):
        def there():
            gang = Gang(self.ranks, job)
            assert not self.is_final(job), f"job {job} is over"
            return len(gang.who) == 2 and all(gang.steps.values()) and gang

        return until(f"job {job} steps with both ranks", there, seconds, 0.02)

    def known(self, job, gang):
        summary = summary_or_none(self.everlit, job)
        pids = {rank["rank"]: rank["pid"] for rank in summary["ranks"]} if summary else {}
        known = summary and summary["state"] == "running" and pids == {rank: who[0] for rank, who in gang.who.items()}
        return known and self.events.agrees(summary) and summary

    def is_final(self, job):
        return bool(self.events.count(job, "job_final"))

    def is_late(self):
        """Whether the training may be over before a fault of its ranks is."""
        return self.is_final(self.train) or (patiently(lambda: self.everlit.summary(self.train))["step"] or 0) > 0.5 * STEPS

    def gang(self, job):
        """A steady gang that everybody agrees about; looked at anew each time, for one that failed may live a little longer."""

        def agreed():
            gang = self.steady(job)
            return self.known(job, gang) and gang

        return job, until(f"job {job} is known to run", agreed, 90, 0.02)

    def training(self):
        """The training's gang, with time left before its last step."""
        if self.is_late():
            self.train_again()
        return self.gang(self.train)

    def either(self):
        return self.gang(self.lines) if self.chance.random() < 0.4 or self.is_late() else self.gang(self.train)

    def name(self, gang, rank):
        """As the numbered rank calls itself."""
        return f"{rank}.{environment(gang.who[rank][0])['EVERLIT_ATTEMPT']}.{gang.who[rank][0]}"

    def recovered(self, job, gang, before, counted=0, free=0, at_most=None):
        """The gang came back at exactly this cost; `at_most`: counted restarts that it may cost."""
        until(f"the failure of {job} is on record", lambda: sum(self.events.failures(job)) >= sum(before) + counted + free, 90, 0.02)
        _, now = self.gang(job)
        self.paid[job] = self.events.failures(job)
        cost = tuple(b - a for a, b in zip(before, self.paid[job]))
        holds = counted <= cost[0] <= (at_most or counted) and cost[1] == free
        self.losses.check(holds, lambda: f"job {job}: {cost} counted and free restarts instead of {(counted, free)}: {self.events.events[job][-6:]}")
        for rank, who in gang.who.items():
            self.losses.check(now.who[rank] == who or not lives(who), f"rank {rank} of {job} lives twice")

    def check_account(self):
        for job in (self.train, self.lines):
            failures, paid = self.events.failures(job), self.paid.get(job, (0, 0))
            self.losses.check(failures == paid, lambda: f"job {job} has {failures} counted and free failures, faults explain {paid}: {self.events.events[job][-6:]}")

    def undisturbed_by(self, act):
        """Whatever `act` does, both gangs keep their processes, go on and pay nothing."""
        if self.is_final(self.train):
            self.train_again()
        gangs = {self.lines: self.gang(self.lines)[1]}
        with contextlib.suppress(AssertionError):
            gangs[self.train] = self.gang(self.train)[1]
        self.losses.check(self.train in gangs or self.is_final(self.train), f"job {self.train} does not step")
        before = {job: self.events.disturbances(job) for job in gangs}
        note = act()
        for job, gang in gangs.items():
            died = [rank for rank, who in gang.who.items() if not lives(who)]
            if died:
                # The training may have reached its end meanwhile, which is then soon on record.
                with contextlib.suppress(AssertionError):
                    until("its end", lambda: self.is_final(job), 10 if job == self.train else 0)
            self.losses.check(not died or self.is_final(job), f"ranks {died} of {job} did not outlive it")
            after = Gang(self.ranks, job)
            over = lambda: self.is_final(job) or self.events.disturbances(job) > before[job]
            until(f"more steps of {job}", lambda: after.stepped() or over(), 60, 0.02)
            until(f"job {job} is known to run", lambda: self.known(job, gang) or over(), 60, 0.02)
            more = self.events.disturbances(job) - before[job] - self.is_final(job)
            self.losses.check(not more, lambda: f"job {job} was disturbed: {self.events.events[job][-5:]}")
        return note

    def kill(self, pid):
        who = identity(pid)
        os.kill(pid, signal.SIGKILL)
        until(f"the end of {pid}", lambda: not lives(who), 20, 0.002)

    def stop(self, pid):
        os.kill(pid, signal.SIGSTOP)
        until(f"{pid} is stopped", lambda: (about := stat(pid)) is None or about[0] == "T", 10, 0.002)
        assert stat(pid), "it had ended before it was stopped"

    # ---- faults; each answers in a few words what was seen of it, and raises NotNow when it could not be fired

    def rank_killed(self):
        job, gang = self.either()
        before = self.events.failures(job)
        self.kill(gang.who[self.chance.randrange(2)][0])
        self.recovered(job, gang, before, counted=1)

    def rank_stopped(self):
        job, gang = self.either()
        before = self.events.failures(job)
        began = time.monotonic()
        self.stop(gang.who[self.chance.randrange(2)][0])
        self.recovered(job, gang, before, counted=1)
        return f"back after {time.monotonic() - began:.1f} s"

    def rank_paused(self):
        def act():
            pid = self.either()[1].who[self.chance.randrange(2)][0]
            self.stop(pid)
            time.sleep(self.chance.uniform(0.2, 1.0))
            os.kill(pid, signal.SIGCONT)

        self.undisturbed_by(act)

    def out_of_memory(self):
        job, gang = self.gang(self.lines)
        before = self.events.failures(job)
        rank = self.chance.randrange(2)
        limit = MemoryLimit(HUNGRY_MEGABYTES)
        if limit.why:
            raise NotNow(limit.why)
        who = gang.who[rank]
        eat = self.notes / f"eat.{self.name(gang, rank)}"
        try:
            limit.take(who[0])
            eat.touch()
            until("the kernel kills it", lambda: limit.kills() and not lives(who), 60, 0.01)
        finally:
            eat.unlink(missing_ok=True)
            until("the cgroup is empty", lambda: not (limit.folder / "cgroup.procs").read_text().strip(), 20)
            limit.remove()
        self.recovered(job, gang, before, counted=1)
        return "killed by the kernel"

    def damaged(self, harm):
        """The newest checkpoint is harmed while its gang stands still; what is in shared memory goes too, so that the gang needs the disk."""
        job, gang = self.training()
        folder = checkpoints(self.everlit, job)
        until("three checkpoints", lambda: len(saved(folder)) >= 3, 60)
        before, put_aside = self.events.failures(job), self.events.count(job, "checkpoint_quarantined")
        for who in gang.who.values():
            self.stop(who[0])
        self.damaging = True
        try:
            newest, older = saved(folder)[:2]
            assert not damage(newest) and not damage(older), (damage(newest), damage(older))
            what = harm(newest)
            assert damage(newest), f"{what} did no harm"
            for who in gang.who.values():
                snapshots = environment(who[0]).get("EVERLIT_SNAPSHOT_DIR")
                if snapshots:
                    shutil.rmtree(snapshots, ignore_errors=True)
            # On a busy machine they may have been found to be stuck already, which costs the same.
            for who in filter(lives, gang.who.values()):
                self.kill(who[0])
            step = manifest(older)["step"]
            until(f"{newest.name} is put aside", lambda: self.events.count(job, "checkpoint_quarantined") > put_aside, 60, 0.02)
            # Recovery in place may be tried for the first that is seen to be gone.
            self.recovered(job, gang, before, counted=1, at_most=2)
            resumed = [e for e in self.events.events[job] if e["event"] == "attempt_resumed"][-1]
            self.losses.check(resumed["data"].get("step") == step, f"{newest.name} was harmed ({what}) and {job} resumed so: {resumed['reason']}")
            self.losses.check((folder / "quarantine" / newest.name / "REASON").exists(), f"no reason lies beside {newest.name} of {job}")
            self.resumed_from += 1
            self.watcher.best.pop(job, None)
        finally:
            self.damaging = False
        return what

    def bit_flipped(self):
        def harm(folder):
            file = self.chance.choice(sorted(f for f in folder.iterdir() if f.is_file()))
            content = bytearray(file.read_bytes())
            before, bit = hashlib.sha256(content).digest(), self.chance.randrange(len(content) * 8)
            content[bit // 8] ^= 1 << bit % 8
            file.write_bytes(content)
            assert hashlib.sha256(file.read_bytes()).digest() != before
            return f"bit {bit} of {file.name}"

        return self.damaged(harm)

    def truncated(self):
        def harm(folder):
            file = self.chance.choice(sorted(f for f in folder.iterdir() if f.is_file()))
            length = file.stat().st_size
            shorter = self.chance.randrange(length)
            os.truncate(file, shorter)
            assert file.stat().st_size == shorter
            return f"{file.name} cut from {length} to {shorter} bytes"

        return self.damaged(harm)

    def shim_killed(self):
        job, gang = self.either()
        before = self.events.failures(job)
        rank = self.chance.randrange(2)
        shim = parent(gang.who[rank][0])
        assert pathlib.Path(f"/proc/{shim}/cmdline").read_bytes().split(b"\0")[0].endswith(b"everlit-shim")
        if job == self.lines:
            self.torn.add(self.name(gang, rank))
        self.kill(shim)
        until("its rank goes with it", lambda: not lives(gang.who[rank]), 20, 0.01)
        self.recovered(job, gang, before, free=1)

    def kill_coordinator(self):
        self.everlit.kill()
        time.sleep(self.chance.uniform(0, 1.0))
        self.everlit.up(wait=False)
        until("ready", self.everlit.is_ready, 30)

    def kill_agent(self):
        self.kill(until("an agent", self.everlit.agent_pid, 30))
        until("the next agent", self.everlit.agent_pid, 30)

    def coordinator_killed(self):
        self.undisturbed_by(self.kill_coordinator)

    def agent_killed(self):
        self.undisturbed_by(self.kill_agent)

    def both_killed(self):
        def act():
            self.kill(until("an agent", self.everlit.agent_pid, 30))
            self.kill_coordinator()
            until("the next agent", self.everlit.agent_pid, 30)

        self.undisturbed_by(act)

    def paused(self, pid):
        who = identity(pid)
        self.stop(pid)
        time.sleep(self.chance.uniform(0.5, 4.0))
        os.kill(pid, signal.SIGCONT)
        assert lives(who)

    def coordinator_paused(self):
        self.undisturbed_by(lambda: self.paused(self.everlit.process.pid))

    def agent_paused(self):
        self.undisturbed_by(lambda: self.paused(until("an agent", self.everlit.agent_pid, 30)))

    def rank_and_coordinator_killed(self):
        job, gang = self.either()
        before = self.events.failures(job)
        self.kill(gang.who[self.chance.randrange(2)][0])
        time.sleep(self.chance.uniform(0, 0.3))
        self.kill_coordinator()
        self.recovered(job, gang, before, counted=1)

    def disk_slow(self):
        if self.disk.why:
            raise NotNow(self.disk.why)

        def act():
            took = []
            for _ in range(3):
                seconds = self.chance.uniform(0.2, 1.0)
                took.append(self.disk.freeze(seconds))
                assert took[-1] > 0.5 * seconds, (took, seconds)
                time.sleep(self.chance.uniform(0.1, 0.5))
            return f"a write took up to {max(took):.1f} s"

        return self.undisturbed_by(act)

    def disk_slow_and_rank_killed(self):
        if self.disk.why:
            raise NotNow(self.disk.why)
        job, gang = self.either()
        before = self.events.failures(job)
        victim = gang.who[self.chance.randrange(2)]
        took = self.disk.freeze(self.chance.uniform(0.5, 1.5), lambda: os.kill(victim[0], signal.SIGKILL))
        until("the rank's end", lambda: not lives(victim), 20)
        self.recovered(job, gang, before, counted=1)
        return f"a write took {took:.1f} s"

    def at_any_cost(self, act):
        """Gangs may be restarted, and must be back; answers what it cost."""
        jobs = [self.training()[0], self.lines]
        before = {job: self.events.failures(job) for job in jobs}
        note = act()
        cost = []
        for job in jobs:
            until(f"{job} is back", lambda: self.is_final(job) or self.known(job, self.steady(job)), 120)
            self.paid[job] = self.events.failures(job)
            cost.append(sum(self.paid[job]) - sum(before[job]))
            self.events.compare(job)
        return f"{note}, restarts {cost[0]} + {cost[1]}"

    def disk_stalled(self):
        if self.disk.why:
            raise NotNow(self.disk.why)
        return self.at_any_cost(lambda: f"a write took {self.disk.freeze(self.chance.uniform(3, 6)):.1f} s")

    def disk_full(self):
        if self.disk.why:
            raise NotNow(self.disk.why)

        def act():
            self.log.may_miss = True
            began = time.time()
            refused = self.disk.fill(self.chance.uniform(2, 8))
            self.log.full.append((began - 1, time.time() + 1))
            assert refused, "no write was refused"
            return f"{refused} writes refused"

        return self.at_any_cost(act)

    FAULTS = [
        ("rank killed", rank_killed),
        ("rank stopped for good", rank_stopped),
        ("rank stopped for a moment", rank_paused),
        ("rank out of memory", out_of_memory),
        ("bit flipped in a checkpoint", bit_flipped),
        ("checkpoint truncated", truncated),
        ("shim killed", shim_killed),
        ("agent killed", agent_killed),
        ("agent stopped for a moment", agent_paused),
        ("coordinator killed", coordinator_killed),
        ("coordinator stopped for a moment", coordinator_paused),
        ("agent and coordinator killed", both_killed),
        ("rank and coordinator killed", rank_and_coordinator_killed),
        ("disk slow", disk_slow),
        ("disk slow and rank killed", disk_slow_and_rank_killed),
        ("disk stalled", disk_stalled),
        ("disk full", disk_full),
    ]

    def run(self, seconds):
        deadline = time.monotonic() + seconds
        bag = []
        while time.monotonic() < deadline and not self.losses.found:
            if not bag:
                bag = [fault for fault in self.FAULTS if fault[0] not in WITHOUT and fault[0] not in self.skipped]
                self.chance.shuffle(bag)
            name, fault = bag.pop()
            began = time.monotonic()
            try:
                note = fault(self) or ""
                self.check_account()
            except NotNow as e:
                self.skipped[name] = str(e)
                continue
            except Exception as e:
                if isinstance(e, ProcessLookupError) and self.is_final(self.train):
                    # The training was over before the fault came.
                    bag.append((name, fault))
                    continue
                self.losses.add(f"{name}: {e!r}")
                break
            self.fired[name] = self.fired.get(name, 0) + 1
            if note:
                self.notes_of[name] = note
            print(f"     {time.strftime('%H:%M:%S')} {name} ({time.monotonic() - began:.1f} s) {note}", flush=True)
            time.sleep(self.chance.uniform(0, 1))

    # ---- the end

    def finish(self):
        self.submitter.quit = True
        self.prove()
        self.check_account()
        self.everlit.post(f"/jobs/{self.lines}/stop")
        summary = self.everlit.final(self.lines, 60)
        self.losses.check(summary["state"] == "stopped", f"job {self.lines} ended {summary['state']}: {summary['reason']}")
        check_ledger(summary, 0, 0, self.losses)
        self.submitter.join(160)
        self.check_short_jobs()
        self.log.join(60)
        self.losses.check(self.log.ended is not None, f"the reader of {self.lines} came to no end: {self.log.trouble}")
        in_pipes = self.log.settle(self.notes, self.torn)
        self.log.compare()
        for job in (self.train, self.lines):
            self.events.compare(job)
        states = {job: self.everlit.state(job) for job in [*self.submitter.accepted, self.train, self.lines]}
        self.watcher.quit = True
        self.watcher.join(20)
        self.everlit.kill()
        self.everlit.up()
        for job, state in states.items():
            self.losses.check(self.everlit.state(job) == state, f"job {job} was {state} before the last kill")
        until("no rank lives", lambda: not any(map(lives, self.watcher.seen)) and not self.ranks.living(), 20)
        return in_pipes

    def check_short_jobs(self):
        for job, wanted in self.submitter.accepted.items():
            try:
                summary = self.everlit.final(job, 60)
                good = summary["state"] == wanted
                self.losses.check(good, f"job {job} ended {summary['state']} instead of {wanted}: {summary['reason']}")
                check_ledger(summary, 0, 0, self.losses)
            except (AssertionError, Refused) as e:
                self.losses.add(f"job {job} was accepted: {e}")

    def table(self):
        print(f"{'fault':<34}{'fired':>6}  seen the last time")
        for name, _ in self.FAULTS:
            if name in WITHOUT:
                note = "left out (EVERLIT_SOAK_WITHOUT)"
            elif name in self.skipped:
                note = f"SKIPPED: {self.skipped[name]}"
            else:
                note = self.notes_of.get(name, "")
            print(f"{name:<34}{self.fired.get(name, 0):>6}  {note}")


def main():
    if len(sys.argv) != 2 or not sys.argv[1].replace(".", "", 1).isdigit():
        sys.exit("usage: soak.sh MINUTES")
    unknown = set(WITHOUT) - {name for name, _ in Soak.FAULTS}
    if unknown:
        sys.exit(f"EVERLIT_SOAK_WITHOUT names no fault: {', '.join(unknown)}; there are: {', '.join(name for name, _ in Soak.FAULTS)}")
    print(f"seed {SEED} (EVERLIT_SOAK_SEED), {sys.argv[1]} minutes", flush=True)
    losses, soak, in_pipes = Losses(), None, 0
    began = time.monotonic()
    disk = Disk(DISK_MEGABYTES)
    notes = pathlib.Path(tempfile.mkdtemp(prefix="everlit-soak-notes-"))
    everlit = Everlit(data=disk.folder)
    try:
        everlit.up()
        soak = Soak(everlit, disk, notes, losses)
        soak.run(float(sys.argv[1]) * 60)
        if not losses.found:
            in_pipes = soak.finish()
    except Exception as e:
        losses.add(repr(e))
    finally:
        if soak:
            soak.submitter.quit = soak.watcher.quit = soak.log.quit = soak.events.quit = True
        with contextlib.suppress(Exception):
            everlit.end()
        kept = disk.remove(keep=bool(losses.found))
        shutil.rmtree(notes, ignore_errors=True)
    if soak:
        soak.table()
        print(
            f"{soak.proved} trainings ended with the undisturbed bytes ({soak.wanted[1]}), {soak.resumed_from} resumes past a harmed checkpoint, "
            f"{len(soak.submitter.accepted)} short jobs, {soak.log.lines} numbered lines over {soak.log.cuts} cuts "
            f"({in_pipes} died in the pipes of killed shims, {soak.log.missed} bytes and the last {soak.log.untold} lines of ranks on a full disk), {soak.watcher.looks} looks"
        )
    if losses.found:
        print(f"the data folder is kept: {kept}")
    fired = sum(soak.fired.values()) if soak else 0
    print(f"soak: {'passed' if not losses.found else 'FAILED'}: {fired} faults in {(time.monotonic() - began) / 60:.1f} minutes, losses: {len(losses.found) or 'none'}")
    sys.exit(1 if losses.found else 0)


main()
