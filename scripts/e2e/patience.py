"""What an alarms run keeps everybody waiting with: programs that are slow or say nothing, bursts of load, and a disk that stands still."""

import os
import random
import subprocess
import sys
import threading
import time

# Heartbeats by the contract, from a thread, so that a slow first step, an evaluation or a save on a slow disk is seen to be alive. The ranks
# meet after every step. What it took it notes outside of the slow disk, one line each: what, seconds.
FOREIGN = """
import json, os, pathlib, random, socket, subprocess, sys, threading, time
notes, seed, first, steps, agent = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
rank, world, attempt = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["EVERLIT_ATTEMPT"])
path, folder = os.environ["EVERLIT_HEARTBEAT_FILE"], pathlib.Path(os.environ["EVERLIT_CHECKPOINT_DIR"])
chance, mine = random.Random(seed), random.Random(seed + str(rank))
now = {"phase": "init", "step": None}
news = threading.Event()

def beats():
    seq = 0
    while True:
        news.wait(1.0)
        news.clear()
        seq += 1
        beat = {"seq": seq, "pid": os.getpid(), "rank": rank, "attempt": attempt, "total_steps": steps, **now}
        with open(path + ".new", "w") as file:
            json.dump(beat, file)
        os.rename(path + ".new", path)
        time.sleep(0.1)

def say(**more):
    now.update(more)
    news.set()

def note(what, began):
    with open(notes, "a") as file:
        file.write(f"{what} {time.monotonic() - began:.2f}\\n")

def save(step):
    began = time.monotonic()
    say(phase="checkpoint")
    if rank == 0:
        draft = folder / f"mine-{step}"
        draft.mkdir()
        with open(draft / "state.bin", "wb") as file:
            for _ in range(chance_save.randrange(1, 9)):
                file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        if chance_save.random() < 0.25:
            time.sleep(chance_save.uniform(3, 30))
        done = subprocess.run([agent, "checkpoint", "commit", str(draft), "--step", str(step)], capture_output=True, text=True)
        if done.returncode:
            print("not committed:", done.stderr, flush=True)
    note("save", began)
    say(phase="train")

chance_save = random.Random(seed + "save")
threading.Thread(target=beats, daemon=True).start()
news.set()
address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if rank == 0:
    server = socket.create_server(address)
    peers = [server.accept()[0] for _ in range(world - 1)]
else:
    while True:
        try:
            peers = [socket.create_connection(address)]
            break
        except OSError:
            time.sleep(0.1)

def meet():
    for peer in peers:
        peer.sendall(b".")
    for peer in peers:
        if not peer.recv(1):
            sys.exit("a peer is gone")

say(phase="train", step=0)
print("begins", flush=True)
for step in range(1, steps + 1):
    began = time.monotonic()
    time.sleep(first * mine.uniform(0.8, 1) if step == 1 else 0.1)
    if step > 30 and chance.random() < 0.003:
        # Without a word: a script may evaluate so.
        time.sleep(chance.uniform(2, 20))
    meet()
    note("first" if step == 1 else "step", began)
    say(step=step)
    if chance.random() < 0.004:
        began = time.monotonic()
        say(phase="evaluate")
        time.sleep(chance.uniform(2, 40))
        note("evaluation", began)
        say(phase="train")
    if step % 60 == 0:
        save(step)
"""

# No heartbeats: a line after so long, or none, and then nothing for so long, with a part of a CPU in use.
MUTE = """
import sys, time
before, quiet, busy = map(float, sys.argv[1:])
time.sleep(before)
if quiet:
    print("begins", flush=True)
end = time.monotonic() + quiet
while time.monotonic() < end:
    used = time.process_time()
    while time.process_time() < used + busy:
        pass
    time.sleep(1)
"""

# Each ends by itself.
LOADS = {
    "cpu": "while time.monotonic() < end: sum(range(1000))",
    "memory": "a = bytearray(64 << 20)\nwhile time.monotonic() < end: b = bytes(a)",
    "writes": """
with open(path, "wb") as file:
    while time.monotonic() < end:
        file.seek(0)
        file.write(os.urandom(1 << 20) * 8)
        file.flush()
        os.fsync(file.fileno())
os.unlink(path)""",
}


class Disturber(threading.Thread):
    """Disturbs again and again while it may; `calm` waits until it does not."""

    def __init__(self, disk, seed):
        super().__init__(daemon=True)
        self.disk, self.chance = disk, random.Random(seed)
        self.may, self.quiet, self.quit = threading.Event(), threading.Event(), False
        self.quiet.set()
        self.times, self.seconds, self.now, self.trouble = 0, 0.0, "", ""
        # Beginning and what it was of the newest, for whoever asks what went on at a moment.
        self.newest = []

    def calm(self):
        self.may.clear()
        self.quiet.wait()

    def sleep(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.may.is_set() and not self.quit:
            time.sleep(0.1)

    def run(self):
        while not self.quit:
            if not self.may.wait(0.2):
                continue
            self.quiet.clear()
            self.sleep(self.chance.uniform(*self.PAUSE))
            if self.may.is_set() and not self.quit:
                began = time.monotonic()
                try:
                    self.disturb()
                except Exception as e:
                    self.trouble = repr(e)
                self.times += 1
                self.seconds += time.monotonic() - began
                self.now = ""
            if not self.may.is_set() or self.quit:
                self.quiet.set()

    def begins(self, what):
        self.now = what
        self.newest = [*self.newest[-4:], f"{time.strftime('%H:%M:%S')} {what}"]

    def disturb(self):
        raise NotImplementedError


class Bursts(Disturber):
    """More processes than cores for a while: computing, copying memory, writing with fsync; niced and not."""

    PAUSE = (8, 30)

    def disturb(self):
        cores = os.cpu_count() or 1
        seconds = self.chance.uniform(10, 30)
        loads = []
        if self.chance.random() < 0.75:
            loads += ["cpu"] * self.chance.randint(cores + 1, min(3 * cores, cores + 16))
        if self.chance.random() < 0.4:
            loads += ["memory"] * self.chance.randint(1, 2)
        if self.chance.random() < 0.4 or not loads:
            loads += ["writes"] * self.chance.randint(1, 2)
        nices = [self.chance.choice((0, 0, 10, 19)) for _ in loads]
        kinds = ", ".join(f"{loads.count(kind)} {kind}" for kind in LOADS if kind in loads)
        self.begins(f"{kinds} for {seconds:.0f} s, nice {sorted(nices)}")
        running = []
        for number, (load, nice) in enumerate(zip(loads, nices)):
            path = self.disk.folder / f"noise-{number}"
            program = f"import os, time\nos.nice({nice})\npath, end = {str(path)!r}, time.monotonic() + {seconds}\n{LOADS[load]}"
            running.append(subprocess.Popen([sys.executable, "-c", program]))
        self.sleep(seconds)
        for process in running:
            process.terminate()
            process.wait()
        for number in range(len(loads)):
            (self.disk.folder / f"noise-{number}").unlink(missing_ok=True)


class Stalls(Disturber):
    """The disk stands still: in the midst of a save, at any moment, or several times shortly one after the other."""

    PAUSE = (8, 45)

    def __init__(self, disk, seed):
        super().__init__(disk, seed)
        self.in_save, self.slowest, self.stood = 0, 0.0, 0.0

    def saving(self):
        """Whether a save is under way somewhere."""
        jobs = self.disk.folder / "agent" / "jobs"
        for job in os.listdir(jobs):
            try:
                if any(name.startswith((".draft-", "mine-")) for name in os.listdir(jobs / job / "checkpoints")):
                    return True
            except FileNotFoundError:
                pass
        return False

    def freeze(self, seconds, what):
        self.begins(f"{what} for {seconds:.1f} s")
        self.in_save += self.saving()
        took = self.disk.freeze(seconds)
        self.slowest = max(self.slowest, took)
        self.stood += took

    def disturb(self):
        kind = self.chance.random()
        if kind < 0.25:
            for _ in range(self.chance.randint(3, 6)):
                self.freeze(self.chance.uniform(0.2, 1.5), "disk stands, in a row,")
                time.sleep(self.chance.uniform(0.1, 1))
            return
        if kind < 0.75:
            deadline = time.monotonic() + 15
            while not self.saving() and time.monotonic() < deadline and self.may.is_set():
                time.sleep(0.01)
        # Half of them for a little less or more than `heartbeat.timeout`: then beats are due again in the moment of a verdict.
        self.freeze(self.chance.uniform(9.3, 10.2) if self.chance.random() < 0.5 else self.chance.uniform(1, 20), "disk stands")
