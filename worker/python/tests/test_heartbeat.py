import json
import os
import pathlib
import signal
import time
import unittest
import unittest.mock

from support import Case, needs_torch, read_json, until

from everlit import pulse
from everlit.pulse import Heartbeat

FIELDS = {"seq", "pid", "rank", "attempt", "generation", "phase", "step", "total_steps", "samples", "loss", "metrics", "saves_on_signal", "save_error", "time"}


class World:
    """The heartbeat's own thread, run here by a clock that only its waits move: how often it writes does not depend on the machine."""

    def __init__(self, file):
        self.now, self.writes, self.flag, self.steps = 0.0, [], False, False
        self.beat = Heartbeat()
        self.beat._started, self.beat._path, self.beat._beat, self.beat._wake = True, file, {"seq": 0, "phase": "init"}, self
        self.really_write, self.beat._write = self.beat._write, self.write

    def run_until(self, end, steps):
        self.writes, self.steps, self.beat._ended, self.end = self.writes[-1:] or [self.now], steps, False, end
        with unittest.mock.patch.object(pulse, "time", self):
            self.beat._run()

    def gaps(self):
        return [round(after - before, 2) for before, after in zip(self.writes, self.writes[1:])]

    def write(self):
        self.really_write()
        self.writes.append(self.now)
        self.beat._ended = self.now > self.end - 0.05

    # What the heartbeat sees of it: a clock,

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    # and what wakes it.

    def set(self):
        self.flag = True

    def clear(self):
        self.flag = False

    def wait(self, seconds):
        if self.steps:
            self.now += 0.001
            self.beat.step(1)
        elif not self.flag:
            self.now += seconds


class HeartbeatTest(Case):
    def setUp(self):
        super().setUp()
        self.file = self.path("HEARTBEAT")
        os.environ.update(EVERLIT_HEARTBEAT_FILE=self.file, EVERLIT_ATTEMPT="2", RANK="1", WORLD_SIZE="2")

    def beat(self):
        beat = Heartbeat()
        beat.start()
        self.addCleanup(beat.stop)
        return beat

    def read(self):
        text = pathlib.Path(self.file).read_bytes()
        self.assertLessEqual(len(text), 4096)
        value = json.loads(text)
        self.assertLessEqual(set(value), FIELDS)
        return value

    def test_it_says_what_the_contract_asks_for(self):
        beat = self.beat()
        first = self.read()
        self.assertEqual((first["seq"], first["pid"], first["rank"], first["attempt"], first["phase"]), (1, os.getpid(), 1, 2, "init"))
        beat.step(120, 2000, samples=7680, loss=2.31, lr=0.0003)
        value = until("a write", lambda: (v := self.read()).get("step") == 120 and v)
        about = {name: value[name] for name in ("phase", "step", "total_steps", "samples", "loss", "metrics")}
        self.assertEqual(about, {"phase": "train", "step": 120, "total_steps": 2000, "samples": 7680, "loss": 2.31, "metrics": {"lr": 0.0003}})
        self.assertRegex(value["time"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")

    def test_writes_are_neither_too_many_nor_too_few(self):
        world = World(self.file)
        world.run_until(1.0, steps=True)
        self.assertEqual(world.gaps(), [0.1] * 10)
        world.run_until(6.0, steps=False)
        self.assertEqual(world.gaps(), [1.0] * 5)

    def test_a_sign_of_life_comes_without_a_step(self):
        self.beat()
        before = self.read()["seq"]
        until("a write", lambda: self.read()["seq"] > before)

    def test_each_read_finds_a_whole_file_with_a_greater_number(self):
        beat = self.beat()
        last = 0
        for step in range(300):
            beat.step(step, loss=step)
            seq = self.read()["seq"]
            self.assertGreaterEqual(seq, last)
            last = seq
            time.sleep(0.001)

    def test_numbers_that_are_none_are_left_out(self):
        beat = self.beat()
        beat.step(1, loss=float("nan"), good=1, bad=float("inf"), text="x")
        beat.metrics(**{"n" * 65: 1, **{f"m{number}": number for number in range(100)}})
        value = until("a write", lambda: "metrics" in (v := self.read()) and v)
        self.assertEqual((value["loss"], len(value["metrics"]), "bad" in value["metrics"]), (None, 32, False))

    def test_it_stays_below_4_kib(self):
        beat = self.beat()
        beat.metrics(**{("ü\n" * 30 + str(number)): 1e-300 + number for number in range(32)})
        beat.save_failed(7, "\u0001" * 5000)
        value = until("a write", lambda: "save_error" in (v := self.read()) and v)
        self.assertEqual((value["save_error"]["step"], len(value["save_error"]["reason"])), (7, 512))
        beat.save_worked()
        until("a write", lambda: "save_error" not in self.read())

    def test_phases(self):
        beat = self.beat()
        with beat.in_phase("load"):
            until("load", lambda: self.read()["phase"] == "load")
        until("init", lambda: self.read()["phase"] == "init")
        with self.assertRaisesRegex(ValueError, "dance"):
            beat.phase("dance")

    def test_the_end_writes_the_last_word(self):
        beat = self.beat()
        beat.step(1)
        beat.step(2)
        beat.stop()
        self.assertEqual(self.read()["step"], 2)

    def test_nothing_is_written_outside_the_coordinator(self):
        del os.environ["EVERLIT_HEARTBEAT_FILE"]
        beat = Heartbeat()
        beat.step(1, loss=object())
        beat.phase("train")
        beat.saves_on_signal()
        beat.stop()
        self.assertEqual((os.listdir(self.dir), beat._thread), ([], None))

    def test_a_folder_that_can_not_be_written_is_silence(self):
        os.environ["EVERLIT_HEARTBEAT_FILE"] = self.path("not/there")
        self.beat().step(1)

    def test_a_forked_child_stays_silent_and_an_ending_program_does_not(self):
        command = self.script(
            """
import os, sys, everlit
everlit.heartbeat.step(1)
child = os.fork()
everlit.heartbeat.step(100 if child == 0 else 2)
if child == 0: sys.exit(0)
os.waitpid(child, 0)
"""
        )
        self.done(self.start(command, EVERLIT_HEARTBEAT_FILE=self.file))
        self.assertEqual(self.read()["step"], 2)

    @needs_torch
    def test_a_loss_may_be_a_tensor(self):
        import torch

        beat = self.beat()
        beat.step(1, loss=torch.tensor(1.5, requires_grad=True))
        until("a write", lambda: self.read().get("loss") == 1.5)


LOOP = """
import sys, time, everlit
from everlit import CheckpointManager, Buffer, heartbeat
manager = CheckpointManager(every_steps=1000)
state = manager.resume()
for step in range(manager.step + 1, 100000):
    time.sleep(0.002)
    heartbeat.step(step, 100000)
    manager.after_step(step, state={"w": Buffer("U8", (1,), bytes([step % 256]))}, samples=2 * step)
"""


class SignalTest(Case):
    def test_sigterm_saves_and_ends_with_143_and_sigusr1_saves(self):
        environment = {"EVERLIT_HEARTBEAT_FILE": self.path("HEARTBEAT"), "EVERLIT_CHECKPOINT_DIR": self.path("c"), "EVERLIT_RESUME_FROM": "", "EVERLIT_ATTEMPT": "1"}
        running = self.start(self.script(LOOP), **environment)
        beat = lambda: read_json(self.path("HEARTBEAT")) if os.path.exists(self.path("HEARTBEAT")) else {}
        until("the handler", lambda: beat().get("saves_on_signal"))
        running.send_signal(signal.SIGUSR1)
        saved = until("a save", lambda: os.path.exists(self.path("c")) and [n for n in os.listdir(self.path("c")) if n.startswith("step-")])
        running.send_signal(signal.SIGTERM)
        output = self.done(running, 143)
        self.assertIn("told to end: stopped after step", output)
        last = beat()["step"]
        self.assertTrue(os.path.exists(self.path("c", f"step-{last:012}")) and saved)
        # It goes on from there, and before anything is to be saved it ends at once.
        running = self.start(self.script(LOOP), **{**environment, "EVERLIT_RESUME_FROM": self.path("c", f"step-{last:012}"), "EVERLIT_ATTEMPT": "2"})
        until("a step", lambda: beat().get("attempt") == 2 and beat().get("step", 0) > last)
        running.send_signal(signal.SIGTERM)
        self.done(running, 143)
        early = self.start(self.script("import time, everlit\neverlit.heartbeat.phase('init')\ntime.sleep(60)"), **environment)
        until("its first sign", lambda: beat().get("pid") == early.pid)
        early.send_signal(signal.SIGTERM)
        self.done(early, -signal.SIGTERM)


if __name__ == "__main__":
    unittest.main()
