import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
import unittest
from unittest import mock

from support import Case, clean_environment, needs_numpy, needs_program, needs_torch, program, read_json, until

import everlit
from everlit import Buffer, CheckpointError, CheckpointManager, Fenced, Refused, checks, safetensors


def tensor(text):
    return Buffer("U8", (len(text),), memoryview(text))


class AloneTest(Case):
    def manager(self, **more):
        return CheckpointManager(self.path("c"), **more)

    def steps(self):
        return sorted(int(name[5:]) for name in os.listdir(self.path("c")) if name.startswith("step-"))

    def test_a_state_comes_back_and_a_fresh_start_is_none(self):
        first = self.manager()
        self.assertIsNone(first.resume())
        state = {"model": {"w": tensor(b"abc")}, "n": 5, "nested": [{1: (2.5, None)}]}
        self.assertTrue(first.save(7, state, samples=70, seed=3))
        again = self.manager()
        self.assertEqual(again.resume(), state)
        self.assertEqual((again.step, again.samples, again.manifest.seed, again.manifest.attempt), (7, 70, 3, 1))

    def test_each_run_fences_off_the_one_before(self):
        first, second = self.manager(), self.manager()
        first.resume()
        self.assertTrue(first.save(1, {"n": 1}))
        second.resume()
        with self.assertRaisesRegex(Fenced, "attempt 1 is fenced off: attempt 2 may commit now"):
            first.save(2, {"n": 1})

    def test_old_checkpoints_go_unless_there_is_an_agent(self):
        manager = self.manager(keep=2)
        for step in range(1, 6):
            manager.save(step, {"n": 1})
        self.assertEqual(self.steps(), [4, 5])
        os.environ["EVERLIT_HEARTBEAT_FILE"] = self.path("HEARTBEAT")
        manager = self.manager(keep=2)
        for step in range(6, 10):
            manager.save(step, {"n": 1})
        self.assertEqual(self.steps(), [4, 5, 6, 7, 8, 9])

    def test_under_the_agent_its_choice_counts(self):
        self.manager().save(3, {"n": 3})
        self.manager().save(5, {"n": 5})
        os.environ.update(EVERLIT_RESUME_FROM=self.path("c/step-000000000003"), EVERLIT_CHECKPOINT_DIR=self.path("own"), EVERLIT_ATTEMPT="4", EVERLIT_JOB_ID="j")
        manager = self.manager()
        self.assertEqual(manager.resume(), {"n": 3})
        manager.save(4, {"n": 4})
        written = read_json(self.path("own/step-000000000004/MANIFEST.json"))
        self.assertEqual((written["attempt"], written["job_id"]), (4, "j"))
        os.environ["EVERLIT_RESUME_FROM"] = ""
        self.assertIsNone(self.manager().resume())
        os.environ["EVERLIT_RESUME_FROM"] = self.path("gone")
        with self.assertRaisesRegex(CheckpointError, "the checkpoint's folder is missing"):
            self.manager().resume()

    def test_damage_is_found_on_load_and_named(self):
        self.manager().save(1, {"w": tensor(b"x"), "n": 1})
        self.manager().save(2, {"w": tensor(b"x"), "n": 2})
        for name in ("state.json", "part-00000-of-00001.safetensors"):
            path = pathlib.Path(self.path("c/step-000000000002"), name)
            content = path.read_bytes()
            path.write_bytes(content[:-1] + b"?")
            os.environ["EVERLIT_RESUME_FROM"] = self.path("c/step-000000000002")
            with self.assertRaisesRegex(CheckpointError, rf"{name}: chunk 0 \(from byte 0\) has another sha256 than committed"):
                self.manager().resume()
            path.write_bytes(content)
        path.write_bytes(b"?")
        del os.environ["EVERLIT_RESUME_FROM"]
        self.assertEqual(self.manager().resume()["n"], 1)
        self.assertTrue(os.path.exists(self.path("c/quarantine/step-000000000002/REASON")))

    def test_a_save_that_fails_is_told_and_training_goes_on(self):
        os.environ["EVERLIT_HEARTBEAT_FILE"] = self.path("HEARTBEAT")
        everlit.heartbeat._forget()
        self.addCleanup(lambda: (everlit.heartbeat.stop(), everlit.heartbeat._forget()))
        manager = self.manager()
        manager.resume()
        told = lambda: read_json(self.path("HEARTBEAT")).get("save_error")

        def full(*_):
            raise OSError(28, "No space left on device")

        with mock.patch.object(safetensors.system, "reserve", full):
            self.assertFalse(manager.save(5, {"w": tensor(b"x")}))
            error = until("the report", told)
            self.assertEqual(error["step"], 5)
            self.assertRegex(error["reason"], r"checkpoint of step 5: could not write `.*part-00000-of-00001.safetensors`: No space left on device \(os error 28\)")
            with self.assertRaises(CheckpointError):
                manager.save(5, {"w": tensor(b"x")}, must=True)
        self.assertEqual([name for name in os.listdir(self.path("c")) if "step" in name], [])
        self.assertTrue(manager.save(6, {"w": tensor(b"x")}))
        until("its end", lambda: told() is None)

    def test_a_folder_that_can_not_be_used_costs_only_the_save(self):
        pathlib.Path(self.path("c")).write_text("a file is in the way")
        manager = self.manager()
        self.assertFalse(manager.save(5, {"n": 1}))
        with self.assertRaises(CheckpointError):
            manager.resume()

    @unittest.skipUnless(os.path.exists("/dev/shm") and os.geteuid() == 0, "a small file system needs root")
    def test_a_disk_that_is_really_full(self):
        os.mkdir(self.path("c"))
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", self.path("c")], capture_output=True).returncode != 0:
            self.skipTest("a small file system can not be mounted here")
        self.addCleanup(subprocess.run, ["umount", self.path("c")])
        manager = self.manager()
        self.assertTrue(manager.save(1, {"w": tensor(bytes(8000))}))
        self.assertFalse(manager.save(2, {"w": tensor(bytes(100_000))}))
        self.assertTrue(manager.save(3, {"w": tensor(bytes(8000))}))
        self.assertEqual(self.steps(), [1, 3])

    def test_what_can_not_be_saved_is_the_program_s_fault(self):
        with self.assertRaisesRegex(Refused, "checkpoint of step 5: f is a builtins"):
            self.manager().save(5, {"f": print})
        with self.assertRaisesRegex(TypeError, "`x` has no state_dict"):
            self.manager(objects={"x": 3})

    def test_objects_and_generators_come_back(self):
        class Box:
            def __init__(self, value):
                self.value = value

            def state_dict(self):
                return {"value": self.value}

            def load_state_dict(self, state):
                self.value = state["value"]

        manager = self.manager(objects={"box": Box([1, 2])}, every_steps=2)
        self.assertEqual(manager.restore(), 0)
        self.assertFalse(manager.after_step(1))
        self.assertTrue(manager.after_step(2))
        expected = random.random()
        box = Box(None)
        self.assertEqual(self.manager(objects={"box": box}).restore(), 2)
        self.assertEqual((box.value, random.random()), ([1, 2], expected))
        self.assertTrue(self.manager().after_step(3, last=True))
        with self.assertRaisesRegex(CheckpointError, "has no `box`"):
            self.manager(objects={"box": box}).restore()

    def test_files_of_other_programs_are_copied_and_committed(self):
        source = pathlib.Path(self.path("checkpoint-9"))
        (source / "sub").mkdir(parents=True)
        (source / "a.bin").write_bytes(b"x" * 10)
        (source / "sub" / "b.bin").write_bytes(b"y")
        manager = self.manager()
        self.assertTrue(manager.save_files(9, source))
        place = self.path("c/step-000000000009")
        self.assertEqual(sorted(os.listdir(place)), ["MANIFEST.json", "a.bin", "sub%2Fb.bin"])
        (source / "a.bin").write_bytes(b"changed later")
        self.assertEqual(self.manager().resume_path(), place)
        with self.assertRaisesRegex(CheckpointError, "another program wrote it"):
            self.manager().resume()

    def test_a_gang_without_a_process_group_is_refused(self):
        os.environ.update(RANK="0", WORLD_SIZE="2")
        with self.assertRaisesRegex(RuntimeError, "join the process group first"):
            self.manager().save(1, {"n": 1})

    @needs_program("everlit-worker")
    def test_tensors_by_name_have_the_rust_program_s_layout(self):
        if "checksum" not in subprocess.run([program("everlit-worker"), "--help"], capture_output=True, text=True).stdout:
            self.skipTest("everlit-worker has no checksum")
        numbers = Buffer("F32", (2, 1), memoryview(b"\0\0\x80\x3f\0\0\0\x40"))
        self.manager().save(1, {"model.b": numbers, "model.a": numbers})
        shown = subprocess.run([program("everlit-worker"), "checksum", self.path("c/step-000000000001")], capture_output=True, text=True)
        self.assertEqual(shown.returncode, 0, shown.stderr)
        self.assertEqual(shown.stdout.strip(), checksum({"model.a": numbers, "model.b": numbers}))
        self.assertEqual(os.listdir(self.path("c/step-000000000001")).count("state.json"), 0)

    @needs_torch
    def test_a_model_and_its_optimizer_go_on_with_the_same_bits(self):
        import torch

        def run(steps, manager, model, optimizer, scheduler):
            for step in range(manager.restore(), steps):
                loss = torch.nn.functional.dropout(model(torch.ones(4, 3))).square().sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                manager.after_step(step + 1, last=step + 1 == steps)
            return [parameter.detach().clone() for parameter in model.parameters()]

        def make(folder):
            torch.manual_seed(1)
            model = torch.nn.Linear(3, 2)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
            return CheckpointManager(self.path(folder), objects={"model": model, "optimizer": optimizer, "scheduler": scheduler}, every_steps=5), model, optimizer, scheduler

        whole = run(20, *make("whole"))
        run(10, *make("cut"))
        torch.manual_seed(999)
        cut = run(20, *make("cut"))
        self.assertTrue(all(torch.equal(a, b) for a, b in zip(whole, cut)))

    @needs_numpy
    def test_numpy_states_come_back(self):
        import numpy

        manager = self.manager()
        manager.save(1, {"w": numpy.arange(3.0), "rng": numpy.random.get_state()})
        back = self.manager().resume()
        self.assertEqual(back["w"].tolist(), [0, 1, 2])
        numpy.random.set_state(back["rng"])
        self.manager().save(2, {"w": numpy.arange(3.0)})
        self.assertIsInstance(self.manager().resume()["w"], numpy.ndarray)


def checksum(tensors):
    import hashlib

    whole = hashlib.sha256()
    for name in sorted(tensors):
        one = tensors[name]
        about = f"{name}\0{one.dtype}\0{list(one.shape)}\0".encode()
        whole.update(hashlib.sha256(about + bytes(one.data)).hexdigest().encode())
    return whole.hexdigest()


SAVER = """
import sys
from everlit import CheckpointManager, Buffer
manager = CheckpointManager(sys.argv[1], keep=2)
state = manager.resume()
if state: assert bytes(state["w"].data) == bytes([manager.step % 256]) * 3_000_000 and state["step"] == manager.step, manager.step
print("ready", flush=True)
step = manager.step
while True:
    step += 1
    manager.save(step, {"w": Buffer("U8", (3_000_000,), memoryview(bytes([step % 256]) * 3_000_000)), "step": step})
"""


class KillTest(Case):
    def test_kills_at_any_moment_of_a_save_leave_only_whole_checkpoints(self):
        rng = random.Random(5)
        folder = self.path("c")
        in_save = newest = 0
        for _ in range(int(os.environ.get("EVERLIT_SAVE_KILLS", "10"))):
            running = self.start([*self.script(SAVER), folder])
            self.assertEqual(running.stdout.readline(), "ready\n")
            until("a save", lambda: any(name.startswith(".draft-") for name in os.listdir(folder)))
            time.sleep(rng.random() * 0.05)
            in_save += any(name.startswith(".draft-") for name in os.listdir(folder))
            running.kill()
            running.wait()
            steps = sorted(name for name in os.listdir(folder) if name.startswith("step-"))
            for name in steps:
                checks.verify(os.path.join(folder, name))
            self.assertGreaterEqual(int(steps[-1][5:]) if steps else 0, newest)
            newest = int(steps[-1][5:]) if steps else 0
        self.assertGreater(in_save, 0)
        self.assertFalse(os.path.exists(os.path.join(folder, "quarantine")))


RANK = """
import json, os, sys, time
import torch, torch.distributed as dist
import everlit
from everlit import CheckpointManager, distributed_context, reduce_metrics
from everlit import safetensors
with distributed_context() as context:
    manager = CheckpointManager(sys.argv[1])
    state = manager.resume()
    out = {"step": manager.step, "rank_state": manager.rank_state, "sum": float(state["a"].sum()) if state else None}
    full = {f"t{n}": torch.full((n + 1,), float(n)) for n in range(6)}
    out["saved"] = manager.save(manager.step + 1, {"a": torch.ones(4), "more": full, "n": 3}, rank_state={"rank": context.rank, "t": torch.tensor([context.rank])}, samples=8)
    out["mean"] = reduce_metrics({"loss": context.rank + 1.0, "x": 2})
    out["max"] = reduce_metrics({"loss": context.rank}, op="max")
    if sys.argv[2] == "full" and context.rank == 1:
        def full_disk(*_): raise OSError(28, "No space left on device")
        safetensors.system.reserve = full_disk
    out["second"] = manager.save(manager.step + 2, full)
    try:
        manager.save(manager.step + 3, {"x": torch.ones(1 + context.rank)})
    except everlit.Refused as error:
        out["unlike"] = str(error)
    try:
        reduce_metrics({f"r{context.rank}": 1.0})
    except ValueError as error:
        out["names"] = str(error)
    if context.rank == 1 and sys.argv[2] == "stop":
        os.kill(os.getpid(), 15)
    step = manager.step
    while sys.argv[2] == "stop" and step < 1000:
        step += 1
        time.sleep(0.002)
        if manager.should_stop(step):
            manager.save(5000, full, must=True)
            print(json.dumps({"stopped": step}), flush=True)
            everlit.exit_terminated()
    out["rank_state"] = str(out["rank_state"])
    print(json.dumps(out), flush=True)
"""


@needs_torch
class GangTest(Case):
    def gang(self, how, code=0, world=2):
        from support import free_port

        common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        command = [*self.script(RANK), self.path("c"), how]
        ranks = [self.start(command, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(world)]
        return [[json.loads(line) for line in self.done(rank, code).splitlines() if line.startswith("{")][-1] for rank in ranks]

    def test_ranks_share_agree_and_resume(self):
        first = self.gang("plain")
        for rank, out in enumerate(first):
            self.assertEqual((out["step"], out["sum"], out["saved"], out["second"]), (0, None, True, True))
            self.assertEqual((out["mean"], out["max"]), ({"loss": 1.5, "x": 2.0}, {"loss": 1.0}))
            self.assertIn("different tensors", out["unlike"])
            self.assertIn("different names", out["names"])
        place = self.path("c/step-000000000001")
        ranks = [f"rank-0000{rank}-of-00002.{end}" for rank in (0, 1) for end in ("json", "safetensors")]
        parts = [f"part-0000{rank}-of-00002.safetensors" for rank in (0, 1)]
        self.assertEqual(sorted(os.listdir(place)), sorted(["MANIFEST.json", "state.json", *ranks, *parts]))
        self.assertEqual(checks.verify(place).world_size, 2)
        # The newest has only tensors by name, and no rank's own state.
        os.environ.update(EVERLIT_RESUME_FROM=place)
        manager = CheckpointManager(self.path("c"))
        self.assertEqual((manager.resume()["n"], manager.rank_state), (3, None))
        del os.environ["EVERLIT_RESUME_FROM"]
        import shutil

        shutil.rmtree(self.path("c/step-000000000002"))
        second = self.gang("plain")
        self.assertEqual([(out["step"], out["sum"], out["rank_state"]) for out in second], [(1, 4.0, f"{{'rank': {rank}, 't': tensor([{rank}])}}") for rank in (0, 1)])

    def test_one_rank_s_full_disk_fails_the_save_on_all(self):
        self.assertEqual([out["second"] for out in self.gang("full")], [False, False])
        self.assertEqual(sorted(name for name in os.listdir(self.path("c")) if "step" in name), ["step-000000000001"])

    def test_one_rank_s_sigterm_stops_all_at_one_step(self):
        stopped = self.gang("stop", 143)
        self.assertEqual(stopped[0], stopped[1])
        checks.verify(self.path("c/step-000000005000"))


def group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


LOADER = """
import sys, time
import torch
import everlit
class Data(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            time.sleep(0.005)
            yield torch.ones(3)
model = torch.nn.Linear(3, 1)
manager = everlit.CheckpointManager(sys.argv[1], objects={"model": model}, every_steps=0)
step = manager.restore()
for batch in torch.utils.data.DataLoader(Data(), batch_size=4, num_workers=2):
    step += 1
    model(batch).sum().backward()
    if step == 5: print("stepping", flush=True)
    manager.after_step(step)
"""


@needs_torch
class LoaderTest(Case):
    def test_a_data_loader_s_workers_outlive_the_group_s_sigterm_until_the_save_is_done(self):
        command = [*self.script(LOADER), self.path("c")]
        running = subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE, text=True, start_new_session=True)
        self.addCleanup(running.stdout.close)
        self.assertEqual(running.stdout.readline(), "stepping\n")
        os.killpg(running.pid, signal.SIGTERM)
        self.assertEqual(running.wait(60), 143)
        until("the workers' end", lambda: not group_lives(running.pid))
        [name] = [name for name in os.listdir(self.path("c")) if name.startswith("step-")]
        checks.verify(self.path("c", name))


class ProgramTest(Case):
    def test_the_command_line(self):
        CheckpointManager(self.path("c")).save(3, {"w": tensor(b"abc"), "n": 1})
        CheckpointManager(self.path("c")).save(4, {"w": tensor(b"abc"), "n": 1})
        run = lambda *args: subprocess.run([sys.executable, "-m", "everlit", *args], env=clean_environment(), capture_output=True, text=True)
        shown = run("inspect", self.path("c"))
        self.assertEqual(shown.returncode, 0, shown.stderr)
        self.assertIn("step 4 is whole: 2 files", shown.stdout)
        self.assertIn("w  U8 [3]", shown.stdout)
        self.assertEqual(run("verify", self.path("c/step-000000000003")).stdout.count("whole"), 1)
        pathlib.Path(self.path("c/step-000000000003/state.json")).write_bytes(b"")
        damaged = run("verify", self.path("c"))
        self.assertEqual((damaged.returncode, damaged.stdout.count("whole")), (1, 1))
        self.assertIn("state.json has 0 bytes instead of", damaged.stdout)
        self.assertEqual(run("verify", self.path("none")).returncode, 1)
        self.assertEqual(run("dance", self.dir).returncode, 2)

    def test_importing_starts_nothing_and_needs_nothing(self):
        code = "import sys, everlit, threading; print(threading.active_count(), 'torch' in sys.modules, 'numpy' in sys.modules)"
        self.assertEqual(self.done(self.start([sys.executable, "-c", code], EVERLIT_HEARTBEAT_FILE=self.path("h"))), "1 False False\n")

    def test_shards_and_metrics_alone(self):
        self.assertEqual(everlit.data_shards(), [])
        pathlib.Path(self.path("shards")).write_text("a b.txt\nc\n")
        os.environ["EVERLIT_DATA_SHARDS"] = self.path("shards")
        self.assertEqual(everlit.data_shards(), ["a b.txt", "c"])
        self.assertEqual(list(everlit.stream_shards()), ["a b.txt", "c"], "files of the node are there")

    def test_shards_of_a_store_are_asked_for_ahead_and_awaited(self):
        feed = pathlib.Path(self.path("feed"))
        (feed / "have").mkdir(parents=True)
        os.mkfifo(feed / "want")
        paths = [str(feed / "have" / f"00000{index}-s") for index in range(4)]
        pathlib.Path(self.path("shards")).write_text("".join(f"{path}\n" for path in paths))
        os.environ["EVERLIT_DATA_SHARDS"], os.environ["EVERLIT_SHARD_FEED"] = self.path("shards"), str(feed)
        asked = []

        def agent():
            with open(feed / "want") as want:
                for line in iter(want.readline, ""):
                    asked.append(line.strip())
                    name = line.strip().lstrip("!")
                    if name == "000003-s":
                        (feed / "have" / f"{name}.error").write_text("it changed")
                        if "!" in line:
                            return
                    elif "!" in line:
                        (feed / "have" / name).write_text(name)

        thread = threading.Thread(target=agent)
        thread.start()
        seen = []
        # The pipe stays open between two questions.
        holder = os.open(feed / "want", os.O_RDWR)
        with self.assertRaisesRegex(RuntimeError, "it changed"):
            for path in everlit.stream_shards(ahead=1):
                seen.append(pathlib.Path(path).read_text())
        os.write(holder, b"!000003-s\n")
        thread.join()
        os.close(holder)
        self.assertEqual(seen, ["000000-s", "000001-s", "000002-s"])
        self.assertEqual(asked[:3], ["000001-s", "!000000-s", "000002-s"])
        self.assertEqual(everlit.reduce_metrics({"a": 1, "b": 2.5}), {"a": 1.0, "b": 2.5})
        with self.assertRaises(ValueError):
            everlit.reduce_metrics({}, op="median")

    def test_an_output_is_there_when_it_is_whole(self):
        with self.assertRaisesRegex(RuntimeError, "kind preprocess"):
            with everlit.output_file("/x/000003-a.txt"):
                pass
        out = pathlib.Path(self.path("out"))
        out.mkdir()
        os.environ["EVERLIT_OUTPUT_DIR"] = str(out)
        with everlit.output_file("/x/000003-a.txt", ".bin") as path:
            pathlib.Path(path).write_bytes(b"tokens")
            self.assertEqual([file.name for file in out.iterdir()], ["000003-a.txt.bin.tmp"])
        self.assertEqual((out / "000003-a.txt.bin").read_bytes(), b"tokens")
        with self.assertRaises(KeyError), everlit.output_file("/x/000004-b") as path:
            pathlib.Path(path).write_bytes(b"half")
            raise KeyError("lost")
        self.assertEqual([file.name for file in out.iterdir()], ["000003-a.txt.bin"])
        with self.assertRaises(ValueError), everlit.output_file("/x/000004-b", "/../y"):
            pass

    def test_an_exception_is_written_where_torchrun_looks(self):
        os.environ["TORCHELASTIC_ERROR_FILE"] = self.path("error.json")

        @everlit.record
        def main():
            raise KeyError("lost")

        with self.assertRaises(KeyError):
            main()
        message = read_json(self.path("error.json"))["message"]
        self.assertEqual((message["message"], list(message["extraInfo"])), ("KeyError: 'lost'", ["py_callstack", "timestamp"]))

    @needs_torch
    def test_a_program_alone_is_a_group_of_one(self):
        code = "import everlit, torch.distributed as d\nwith everlit.distributed_context() as c: print(c.rank, c.world_size, d.get_world_size(), c.is_main)\nprint(d.is_initialized())"
        self.assertEqual(self.done(self.start([sys.executable, "-c", code])), "0 1 1 True\nFalse\n")


if __name__ == "__main__":
    unittest.main()
