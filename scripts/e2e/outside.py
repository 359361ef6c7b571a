"""What can be seen of jobs without asking everlit for its opinion: processes, heartbeat files, checkpoints and the bytes that readers get.

Everything here observes and says what is wrong as a text in `Losses`; it never mends. Followers read over any number of deaths.
"""

import contextlib
import hashlib
import http.client
import json
import os
import pathlib
import re
import threading
import time
import urllib.request
from datetime import datetime

from lib import Refused, sse, until

FINAL = ("succeeded", "failed", "stopped")
FREE = ("infrastructure", "node_lost")
# A failure, whichever rung of the recovery ladder followed.
FAILURES = ("gang_failed", "rank_replaced", "rank_failed")
# What may still be told of a final job: its last save, by an agent whose disk was slow.
AFTER_FINAL = ("checkpoint_committed",)
# What a gang that is left alone never causes.
DISTURBANCES = (*FAILURES, "restart_scheduled", "attempt_placed", "job_queued", "job_final", "node_lost")

# A rank that steps, writes heartbeats and prints numbered lines. What it has printed for certain it notes in a file of its own, so that
# nobody has to believe the log about the log. It takes memory without end once a file `eat.<its name>` lies beside its note.
NUMBERED = """
import json, os, signal, sys, time
pause, notes = float(sys.argv[1]), sys.argv[2]
rank, attempt, path = os.environ["RANK"], os.environ["EVERLIT_ATTEMPT"], os.environ["EVERLIT_HEARTBEAT_FILE"]
name = f"{rank}.{attempt}.{os.getpid()}"
note = os.open(os.path.join(notes, name), os.O_CREAT | os.O_WRONLY)
told, eaten = [], []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
number, beaten = 0, 0.0
while True:
    if time.monotonic() - beaten >= 0.1:
        beaten = time.monotonic()
        beat = {"seq": number + 1, "pid": os.getpid(), "rank": int(rank), "attempt": int(attempt), "phase": "train", "step": number, "total_steps": 1 << 40}
        try:
            with open(path + ".new", "w") as file:
                json.dump(beat, file)
            os.rename(path + ".new", path)
        except OSError:
            pass
    os.write(1, f"numbered {name} {number}.\\n".encode())
    number += 1
    os.pwrite(note, b"%020d" % number, 0)
    if told:
        os.write(1, f"ended {name} {number}.\\n".encode())
        os.pwrite(note, b"%020d ended" % number, 0)
        sys.exit(0)
    while os.path.exists(os.path.join(notes, "eat." + name)):
        eaten.append(b"x" * (1 << 20))
    time.sleep(pause)
"""


class Losses:
    """Everything that must not be, as it is found."""

    def __init__(self):
        self.found = []
        self.lock = threading.Lock()

    def add(self, text):
        with self.lock:
            if len(self.found) < 200:
                self.found.append(text)
                print(f"LOSS {time.strftime('%H:%M:%S')} {text}", flush=True)

    def check(self, holds, text):
        if not holds:
            self.add(text() if callable(text) else text)
        return bool(holds)


def stat(pid):
    """State letter, process group and start time of a process; None when there is none or only its zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else (fields[0], int(fields[2]), int(fields[19]))


def identity(pid):
    """A process that can not be confused with a later one of the same number."""
    found = stat(pid)
    return (pid, found[2]) if found else None


def lives(who):
    return who is not None and identity(who[0]) == who


def environment(pid):
    with contextlib.suppress(OSError):
        pairs = pathlib.Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return dict(pair.decode(errors="replace").split("=", 1) for pair in pairs if b"=" in pair)
    return {}


class Ranks:
    """Living ranks of any job, found by what they were given: leaders of their process group with a job's environment."""

    def __init__(self, data):
        self.mark = str(data)
        self.known = {}

    def living(self):
        found, known = {}, {}
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            pid = int(name)
            about = stat(pid)
            if not about or about[1] != pid:
                continue
            who = (pid, about[2])
            env = self.known.get(who)
            if env is None:
                env = environment(pid)
                ours = "RANK" in env and env.get("EVERLIT_HEARTBEAT_FILE", "").startswith(self.mark)
                env = (env["EVERLIT_JOB_ID"], int(env["RANK"]), env["EVERLIT_HEARTBEAT_FILE"]) if ours else ()
            # A process between fork and exec still has another's environment: only what was seen as a rank's is kept for good.
            if env:
                known[who] = env
                found.setdefault(env[:2], []).append((who, env[2]))
        self.known = known
        return found

    def check_single(self, losses):
        twice = {key: whos for key, whos in self.living().items() if len(whos) > 1}
        if twice:
            # One that was killed a moment ago may not be gone yet.
            time.sleep(0.05)
            now = self.living()
            for key, whos in twice.items():
                still = [who for who in whos if who in now.get(key, [])]
                losses.check(len(still) < 2, f"two living incarnations of rank {key[1]} of job {key[0]}: {still}")


def beat(path):
    with contextlib.suppress(OSError, ValueError):
        return json.loads(pathlib.Path(path).read_text())
    return {}


class Gang:
    """The living ranks of a job at one moment: who they are and how far they are, by their own files."""

    def __init__(self, ranks, job):
        found = {rank: whos[-1] for (of, rank), whos in ranks.living().items() if of == job}
        self.who = {rank: who for rank, (who, _) in found.items()}
        self.files = {rank: path for rank, (_, path) in found.items()}
        self.steps = {rank: self.step(rank) for rank in found}

    def step(self, rank):
        about = beat(self.files[rank])
        return about.get("step") if about.get("pid") == self.who[rank][0] else None

    def stepped(self):
        """Whether every rank is beyond where it was when this was made."""
        return all((self.step(rank) or 0) > (self.steps[rank] or 0) for rank in self.who)


def moment(text):
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def check_ledger(summary, asked, answered, losses, slack=0.02):
    """The parts sum to the time since submission; `asked` and `answered` are the times around the question."""
    total = sum(summary["ledger"].values())
    began = moment(summary["submitted_at"])
    if summary["finished_at"]:
        asked = answered = moment(summary["finished_at"])
        slack = 0.002
    first, last = asked - began - slack, answered - began + slack
    losses.check(first <= total <= last, lambda: f"ledger of {summary['job_id']} sums to {total:.3f} s, not {first:.3f} to {last:.3f}: {summary['ledger']}")


class Follower(threading.Thread):
    """Reads a stream of server-sent events over any number of cuts, each time from the last id that it got."""

    def __init__(self, everlit, path, after=None):
        super().__init__(daemon=True)
        self.everlit, self.path, self.last = everlit, path, after
        self.cuts, self.taken, self.ended, self.quit = 0, 0, None, False
        self.trouble = ""

    def run(self):
        while not self.quit and self.ended is None:
            headers = {"Last-Event-ID": self.last} if self.last is not None else {}
            before = self.taken
            try:
                with urllib.request.urlopen(urllib.request.Request(self.everlit.url + self.path, headers=headers), timeout=30) as response:
                    for event_id, event, data in sse(response):
                        if self.quit:
                            return
                        if event == "error":
                            self.trouble = json.dumps(data)
                            break
                        self.take(event_id, event, data)
                        if event == "end":
                            self.ended = data
                            return
                        self.last = event_id
                        self.taken += 1
            except (OSError, http.client.HTTPException, ValueError) as e:
                self.trouble = repr(e)
            self.cuts += self.taken > before
            time.sleep(0.02)

    def take(self, event_id, event, data):
        raise NotImplementedError


class LogFollower(Follower):
    """A job's log: its bytes in order, and every numbered line exactly once."""

    def __init__(self, everlit, job, losses):
        super().__init__(everlit, f"/jobs/{job}/logs/stream")
        self.job, self.losses = job, losses
        self.digest, self.lines = hashlib.sha256(), 0
        self.next, self.over = {}, set()
        self.halves = {}
        # Set once a disk was full: then lines may be missing if a `gap` says how many bytes.
        self.may_miss, self.missed, self.told_missing = False, 0, 0
        # When it was full, by the clock: a rank that ended then takes the count of what its shim could not write with it.
        self.full, self.untold = [], 0

    def take(self, event_id, event, data):
        if event == "end":
            return
        if event == "gap" and self.may_miss:
            self.told_missing += data["bytes"]
            # The line that was begun is not all gone.
            for key in [key for key in self.halves if key[:2] == (data.get("rank"), data.get("attempt"))]:
                self.told_missing += len(self.halves.pop(key))
            return
        if event != "log":
            self.losses.add(f"the log of {self.job} has a {event} after {self.last}: {data}")
            return
        self.lines += 1
        whole = not data.get("partial")
        self.digest.update(data["line"].encode() + (b"\n" if whole else b""))
        key = (data["rank"], data["attempt"], data["stream"])
        line = self.halves.pop(key, "") + data["line"]
        if not whole:
            self.halves[key] = line
            return
        found = re.fullmatch(r"(numbered|ended) (\S+) (\d+)\.", line)
        if found:
            self.count(found[1], found[2], int(found[3]))

    def count(self, word, name, number):
        expected = self.next.get(name, 0)
        if self.may_miss and number > expected and name not in self.over:
            self.missed += sum(len(f"numbered {name} {n}.\n") for n in range(expected, number))
        elif name in self.over or number != expected:
            self.losses.add(f"the log of {self.job} says `{word} {name} {number}` where {expected} was next")
        if word == "ended":
            self.over.add(name)
        else:
            self.next[name] = number + 1

    def settle(self, notes, torn=()):
        """Holds what was read against what the ranks noted; answers how many lines of ranks in `torn` were in a killed shim's pipe."""
        in_pipes = 0
        for note in sorted(pathlib.Path(notes).glob("[0-9]*")):
            words = note.read_text().split()
            noted = int(words[0]) if words else 0
            got = self.next.get(note.name, 0)
            if note.name in torn:
                in_pipes += max(0, noted - got)
            elif got < noted and any(first <= note.stat().st_mtime <= last for first, last in self.full):
                self.untold += noted - got
            else:
                # A rank killed between a line and its note has printed one more than it noted.
                exact = len(words) > 1
                holds = got == noted if exact else got in (noted, noted + 1)
                self.losses.check(holds, f"rank {note.name} of {self.job} printed {noted} lines, its readers got {got}")
                self.losses.check(not exact or note.name in self.over, f"the last line of rank {note.name} of {self.job} is missing")
        told = self.missed <= self.told_missing
        self.losses.check(told, f"{self.missed} bytes of the log of {self.job} are missing, and {self.told_missing} were said to be")
        return in_pipes

    def compare(self):
        """The whole log, read at once, is what was read piece by piece."""
        raw = self.everlit.get(f"/jobs/{self.job}/logs", raw=True)
        if raw and not raw.endswith(b"\n") and not self.halves:
            raw += b"\n"
        same = hashlib.sha256(raw).digest() == self.digest.digest()
        self.losses.check(same, f"the log of {self.job} read at once ({len(raw)} bytes) is not what was read over {self.cuts} cuts ({self.lines} lines)")
        return len(raw)


class EventFollower(Follower):
    """Every event of the coordinator, in one sequence without a gap."""

    def __init__(self, everlit, losses):
        super().__init__(everlit, "/events/stream", after="0")
        self.losses = losses
        self.events, self.counts, self.finals, self.number = {}, {}, {}, None

    def take(self, event_id, event, data):
        number = int(event_id)
        if self.number is not None:
            self.losses.check(number == self.number + 1, f"event {number} follows event {self.number}")
        self.number = number
        job = data.get("job_id")
        self.counts[job, event] = self.counts.get((job, event), 0) + 1
        self.events.setdefault(job, []).append(data)
        if event == "job_final":
            self.losses.check(job not in self.finals, f"job {job} became final twice")
            self.finals[job] = data
        elif job in self.finals and event not in AFTER_FINAL:
            self.losses.add(f"job {job} had ended, and then: {event} {data['reason']}")

    def count(self, job, *names):
        return sum(self.counts.get((job, name), 0) for name in names)

    def failures(self, job):
        """Failures in a job so far: those that count, and those of our own that are free."""
        failed = [e for e in list(self.events.get(job, [])) if e["event"] in FAILURES]
        free = sum(e["data"]["cause"] in FREE for e in failed)
        return len(failed) - free, free

    def agrees(self, summary):
        """Whether everything that a summary tells of was seen here too."""
        job = summary["job_id"]
        return sum(self.failures(job)) == summary["restarts"] and self.count(job, "attempt_placed") == summary["attempt"]

    def disturbances(self, job):
        return self.count(job, *DISTURBANCES)

    def compare(self, job):
        pages, after = [], ""
        while True:
            page = self.everlit.get(f"/jobs/{job}/events?limit=500{after}")
            pages += page["data"]
            if not page["has_more"]:
                break
            after = f"&after={page['last_id']}"
        with contextlib.suppress(AssertionError):
            until("the stream's last event", lambda: self.events.get(job, [])[-1:] == pages[-1:], 10)
        got = self.events.get(job, [])
        self.losses.check(got == pages, lambda: f"events of {job}: {len(pages)} on record, {len(got)} came over the stream")
        return pages


def manifest(folder):
    return json.loads((pathlib.Path(folder) / "MANIFEST.json").read_text())


def damage(folder):
    """What is wrong with a checkpoint by its own manifest, computed here; empty when it is whole."""
    folder = pathlib.Path(folder)
    try:
        text = (folder / "MANIFEST.json").read_bytes()
        about = json.loads(text)
        own = about.get("manifest_sha256")
        if own and hashlib.sha256(text.replace(own.encode(), b"0" * 64, 1)).hexdigest() != own:
            return "MANIFEST.json does not have the checksum that it says"
        for file in about["files"]:
            content = (folder / file["name"]).read_bytes()
            if len(content) != file["bytes"]:
                return f"{file['name']} has {len(content)} bytes instead of {file['bytes']}"
            size = file["chunk_bytes"]
            hashes = [hashlib.sha256(content[at : at + size]).hexdigest() for at in range(0, max(1, len(content)), size)]
            if hashes != file["sha256"]:
                return f"{file['name']} has another sha256"
    except (OSError, ValueError, KeyError) as e:
        return repr(e)
    return ""


def checkpoints(everlit, job):
    return everlit.data / "agent" / "jobs" / job / "checkpoints"


def saved(folder):
    """Committed checkpoints, newest first."""
    return sorted((f for f in folder.glob("step-*") if (f / "MANIFEST.json").exists()), reverse=True)


def ask(everlit, job):
    """A job's summary with the times around the question."""
    asked = time.time()
    summary = everlit.summary(job)
    return summary, asked, time.time()


def summary_or_none(everlit, job):
    """The summary, or None while nobody answers."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        try:
            return everlit.summary(job)
        except Refused as e:
            if e.status != 503:
                raise
    return None
