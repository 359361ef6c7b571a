"""Who looks on while a soak run does its worst: short jobs that must come to what they are, and an eye on everything that must hold."""

import contextlib
import http.client
import random
import threading
import time

from lib import Refused
from outside import FINAL, Ranks, check_ledger, checkpoints, damage, saved, summary_or_none

BUDGET = 500
PATIENT = {"max_restarts": BUDGET, "max_start_failures": BUDGET, "heal_after": "30d", "backoff": {"initial": "20ms", "max": "500ms"}}


def patiently(call, seconds=60):
    """The answer once somebody answers: a coordinator may just be dead, or its disk full."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call()
        except (OSError, http.client.HTTPException) as e:
            trouble = e
        except Refused as e:
            if e.status not in (409, 503):
                raise
            trouble = e
        if time.monotonic() > deadline:
            raise AssertionError(f"no answer within {seconds} s: {trouble!r}")
        time.sleep(0.1)


class Submitter(threading.Thread):
    """Short jobs, one after the other, each sent again with its key until it is accepted; and what each must come to."""

    KINDS = [(["true"], "succeeded"), (["sh", "-c", "sleep 0.5; echo done"], "succeeded"), (["sh", "-c", "exit 3"], "failed")]

    def __init__(self, everlit, seed):
        super().__init__(daemon=True)
        self.everlit, self.chance, self.quit = everlit, random.Random(seed), False
        self.accepted = {}

    def run(self):
        number = 0
        while not self.quit:
            number += 1
            command, state = self.chance.choice(self.KINDS)
            restart = {"max_restarts": 0} if state == "failed" else PATIENT
            body = {"command": command, "restart": restart, "labels": {"kind": "short"}}
            headers = {"Idempotency-Key": f"short-{number}"}
            with contextlib.suppress(AssertionError):
                job = patiently(lambda: self.everlit.post("/jobs", body, headers=headers), 150)["job_id"]
                self.accepted[job] = state
            time.sleep(self.chance.uniform(0.5, 2))


class Watcher(threading.Thread):
    """Looks on all the time: incarnations, states, ledgers, checkpoints."""

    def __init__(self, soak):
        super().__init__(daemon=True)
        self.soak, self.quit = soak, False
        self.ranks = Ranks(soak.everlit.data)
        self.seen, self.states, self.whole = set(), {}, {}
        self.looks, self.best = 0, {}

    def run(self):
        while not self.quit:
            try:
                self.ranks.check_single(self.soak.losses)
                self.seen.update(who for whos in self.ranks.living().values() for who, _ in whos)
                for job in [self.soak.train, self.soak.lines]:
                    self.look_at(job)
                self.look_at_checkpoints(self.soak.train)
                self.looks += 1
            except (OSError, http.client.HTTPException, Refused):
                pass
            time.sleep(0.2)

    def look_at(self, job):
        asked = time.time()
        summary = summary_or_none(self.soak.everlit, job) if job else None
        if not summary:
            return
        # An answer that had to wait for a disk may show any moment since it was asked for.
        check_ledger(summary, asked, time.time(), self.soak.losses, slack=0.05)
        before = self.states.get(job)
        if before in FINAL:
            self.soak.losses.check(summary["state"] == before, f"job {job} was {before} and is {summary['state']}")
        self.states[job] = summary["state"]
        self.soak.losses.check(summary["restarts"] <= 2 * BUDGET, f"job {job} has {summary['restarts']} restarts")

    def look_at_checkpoints(self, job):
        """The newest one that was seen whole stays, until a newer one is whole."""
        if not job or self.soak.damaging:
            return
        folder = checkpoints(self.soak.everlit, job)
        best = self.best.get(job)
        newest = next(iter(saved(folder)), None)
        if newest and (not best or newest.name > best):
            if not damage(newest) and not self.soak.damaging:
                self.best[job] = best = newest.name
        if best and newest and newest.name < best and not self.soak.damaging and self.states.get(job) not in FINAL:
            self.soak.losses.add(f"{best} of {job} was whole and is gone; the newest is {newest.name}")
            del self.best[job]
