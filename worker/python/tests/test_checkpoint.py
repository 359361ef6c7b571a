import hashlib
import json
import os
import pathlib
import subprocess
import threading
import time
import unittest
from unittest import mock

from support import Case, needs_program, program, read_json

from everlit import checks, choose, commit, fence, manifest, system
from everlit.errors import Busy, CheckpointError, Damage, Failed, Fenced, Refused
from everlit.manifest import CHUNK_BYTES, Manifest

BIG = b"".join(number.to_bytes(4, "little") for number in range(2 * CHUNK_BYTES // 4)) + b"tail"
FILES = {"big.bin": BIG, "empty.bin": b"", "small.json": b"{}"}


class CheckpointCase(Case):
    def checkpoint(self, step, attempt=1, files=FILES, **more):
        draft = commit.begin(self.dir, step, attempt)
        for name, content in files.items():
            pathlib.Path(draft, name).write_bytes(content)
        described = [commit.describe_file(os.path.join(draft, name)) for name in sorted(files)]
        return commit.commit(self.dir, draft, Manifest(step=step, attempt=attempt, created_at=manifest.now(), files=described, **more))

    def names(self):
        return sorted(name for name in os.listdir(self.dir) if name not in (".lock", "FENCE", "LATEST"))


class CommitTest(CheckpointCase):
    def test_a_commit_is_laid_out_as_the_contract_says(self):
        path = self.checkpoint(100, attempt=3, job_id="j", samples=6400, seed=2**64 - 1, model={"family": "x", "config": {"a": 1}})
        self.assertEqual(path, self.path("step-000000000100"))
        self.assertEqual(sorted(os.listdir(path)), ["MANIFEST.json", "big.bin", "empty.bin", "small.json"])
        self.assertEqual((open_text(self.path("FENCE")), open_text(self.path("LATEST"))), ("3\n", "step-000000000100\n"))
        self.assertEqual(self.names(), ["step-000000000100"])
        written = read_json(os.path.join(path, "MANIFEST.json"))
        self.assertEqual(
            list(written),
            "format job_id attempt generation step epoch world_size global_batch samples seed data model created_at files manifest_sha256".split(),
        )
        big = written["files"][0]
        expected = [hashlib.sha256(BIG[at : at + CHUNK_BYTES]).hexdigest() for at in range(0, len(BIG), CHUNK_BYTES)]
        self.assertEqual(big, {"name": "big.bin", "bytes": len(BIG), "chunk_bytes": CHUNK_BYTES, "sha256": expected})
        self.assertEqual(written["files"][1]["sha256"], [hashlib.sha256(b"").hexdigest()])
        self.assertEqual(checks.verify(path).seed, 2**64 - 1)

    @needs_program("everlit-agent")
    def test_the_rust_programs_take_it(self):
        path = self.checkpoint(7)
        self.assertEqual(rust("checkpoint", "verify", path), "step 7 is whole: 3 files\n")

    @needs_program("everlit-agent")
    def test_what_the_rust_programs_commit_is_whole_here(self):
        draft = self.path("tmp-12")
        os.mkdir(draft)
        for name, content in FILES.items():
            pathlib.Path(draft, name).write_bytes(content)
        path = rust("checkpoint", "commit", draft, EVERLIT_ATTEMPT="4").strip()
        self.assertEqual((checks.verify(path).step, fence.fence(self.dir)), (12, 4))
        with self.assertRaises(Fenced):
            self.checkpoint(13, attempt=3)
        # And in turn: the fence raised here holds there.
        self.checkpoint(14, attempt=6)
        os.mkdir(self.path("tmp-15"))
        pathlib.Path(self.path("tmp-15"), "a").write_bytes(b"x")
        refused = subprocess.run([program("everlit-agent"), "checkpoint", "commit", self.path("tmp-15")], env={"EVERLIT_ATTEMPT": "5"}, capture_output=True, text=True)
        self.assertEqual(refused.returncode, 1)
        self.assertIn("attempt 5 is fenced off: attempt 6 may commit now", refused.stderr)

    def test_a_step_that_is_committed_again_is_exchanged(self):
        self.checkpoint(5, attempt=1, files={"old": b"old"})
        path = self.checkpoint(5, attempt=2, files={"new": b"new"})
        self.assertEqual((checks.verify(path).attempt, self.names()), (2, ["step-000000000005"]))

    def test_where_names_can_not_be_exchanged_a_good_old_one_stays(self):
        def cannot(*_):
            raise OSError(22, "Invalid argument")

        old = self.checkpoint(5, attempt=1, files={"old": b"old"})
        with mock.patch.object(system, "exchange", cannot):
            self.checkpoint(5, attempt=2, files={"new": b"new"})
            self.assertEqual(checks.verify(old).attempt, 1)
            pathlib.Path(old, "old").write_bytes(b"bad")
            self.checkpoint(5, attempt=2, files={"new": b"new"})
        self.assertEqual((checks.verify(old).attempt, self.names()), (2, ["step-000000000005"]))

    def test_asking_again_after_a_lost_answer_is_no_error(self):
        draft = commit.begin(self.dir, 5, 1)
        pathlib.Path(draft, "a").write_bytes(b"x")
        about = Manifest(step=5, created_at=manifest.now(), files=[commit.describe_file(os.path.join(draft, "a"))])
        self.assertEqual(commit.commit(self.dir, draft, about), commit.commit(self.dir, draft, about))

    def test_files_under_the_final_name_become_a_checkpoint_by_the_manifest(self):
        path = self.path("step-000000000009")
        os.mkdir(path)
        pathlib.Path(path, "a").write_bytes(b"x")
        about = Manifest(step=9, created_at=manifest.now(), files=[commit.describe_file(os.path.join(path, "a"))])
        self.assertEqual(commit.commit(self.dir, path, about), path)
        checks.verify(path)

    def test_contradictions_are_refused_before_anything_changes(self):
        draft = commit.begin(self.dir, 5, 1)
        for name in "ab":
            pathlib.Path(draft, name).write_bytes(b"x")
        a, b = (commit.describe_file(os.path.join(draft, name)) for name in "ab")
        longer = manifest.ManifestFile("a", 2, CHUNK_BYTES, a.sha256)
        for files, why in [([], "names no file"), ([b, a], "not in name order"), ([a, a], "named twice"), ([longer], "has 1 bytes, not 2")]:
            with self.assertRaisesRegex(Refused, why):
                commit.commit(self.dir, draft, Manifest(step=5, created_at=manifest.now(), files=files))
        with self.assertRaisesRegex(Refused, "is not in"):
            commit.commit(self.path("elsewhere"), draft, Manifest(step=5, created_at=manifest.now(), files=[a]))
        with self.assertRaisesRegex(Refused, "`step`"):
            commit.commit(self.dir, draft, Manifest(step=-5, created_at=manifest.now(), files=[a]))
        os.symlink("a", os.path.join(draft, "l"))
        with self.assertRaisesRegex(Refused, "not a regular file"):
            commit.describe_file(os.path.join(draft, "l"))
        self.assertEqual(self.names(), [".draft-step-000000000005-a1"])


class FenceTest(CheckpointCase):
    def test_the_fence_rises_and_never_falls(self):
        fence.raise_fence(self.path("deep/er"), 3)
        fence.raise_fence(self.path("deep/er"), 2)
        self.assertEqual(fence.fence(self.path("deep/er")), 3)

    def test_an_older_attempt_can_not_commit_even_when_it_began_before(self):
        draft = commit.begin(self.dir, 5, 1)
        pathlib.Path(draft, "a").write_bytes(b"x")
        about = Manifest(step=5, attempt=1, created_at=manifest.now(), files=[commit.describe_file(os.path.join(draft, "a"))])
        fence.raise_fence(self.dir, 2)
        with self.assertRaisesRegex(Fenced, "attempt 1 is fenced off: attempt 2 may commit now"):
            commit.commit(self.dir, draft, about)
        with self.assertRaises(Fenced):
            commit.begin(self.dir, 6, 1)
        self.assertEqual(choose.list_checkpoints(self.dir), [])
        self.assertEqual((commit.sweep_drafts(self.dir, 2), self.names()), (1, []))

    def test_a_fence_that_is_not_a_number_lets_nobody_in(self):
        pathlib.Path(self.dir, "FENCE").write_text("x")
        with self.assertRaisesRegex(Failed, "not a decimal attempt"):
            self.checkpoint(1, attempt=2**32 - 1)

    def test_the_lock_excludes_until_it_is_free(self):
        held = threading.Event()

        def hold():
            with fence.lock(self.dir):
                held.set()
                time.sleep(0.1)

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        with mock.patch.object(fence, "LOCK_WAIT_SECONDS", 0.01), self.assertRaises(Busy):
            with fence.lock(self.dir):
                pass
        with fence.lock(self.dir):
            pass
        thread.join()


class DamageTest(CheckpointCase):
    def setUp(self):
        super().setUp()
        self.place = self.checkpoint(5)

    def damaged(self, why):
        with self.assertRaisesRegex(Damage, why) as caught:
            checks.verify(self.place)
        self.assertFalse(caught.exception.transient)
        if program("everlit-agent"):
            refused = subprocess.run([program("everlit-agent"), "checkpoint", "verify", self.place], capture_output=True, text=True)
            self.assertEqual(refused.returncode, 1)
            if "is not valid" not in str(caught.exception):
                self.assertEqual(refused.stderr.strip(), f"everlit-agent: {caught.exception}")
        return caught.exception

    def test_every_file_flipped_cut_grown_gone_and_replaced(self):
        for name, content in [*FILES.items(), ("MANIFEST.json", pathlib.Path(self.place, "MANIFEST.json").read_bytes())]:
            path = pathlib.Path(self.place, name)
            own = "MANIFEST.json is not valid" if name == "MANIFEST.json" else None
            for at in {0, len(content) // 2, len(content) - 1} if content else ():
                path.write_bytes(content[:at] + bytes([content[at] ^ 0x80]) + content[at + 1 :])
                self.damaged(own or rf"{name}: chunk {at // CHUNK_BYTES} \(from byte {at // CHUNK_BYTES * CHUNK_BYTES}\) has another sha256 than committed")
            if content:
                path.write_bytes(content[:-1])
                self.damaged(own or f"{name} has {len(content) - 1} bytes instead of {len(content)}")
            path.write_bytes(content + b"x")
            self.damaged(own or f"{name} has {len(content) + 1} bytes instead of {len(content)}")
            path.unlink()
            self.damaged(f"{name} is missing")
            path.mkdir()
            self.damaged(f"{name} is not a regular file")
            path.rmdir()
            path.symlink_to(self.path("LATEST"))
            self.damaged(f"{name} is not a regular file")
            path.unlink()
            os.mkfifo(path)
            self.damaged(f"{name} is not a regular file")
            path.unlink()
            path.write_bytes(content)
            checks.verify(self.place)

    def test_no_bit_of_the_manifest_changes_unseen(self):
        self.place = self.checkpoint(6, files={"a": b"x"}, samples=7, model={"family": "x", "config": {"a": 1}})
        path = pathlib.Path(self.place, "MANIFEST.json")
        content = path.read_bytes()
        for at in range(len(content)):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
            with self.assertRaises(Damage, msg=str(at)):
                checks.verify(self.place)
        path.write_bytes(content.replace(b'"samples": 7', b'"samples": 8'))
        with self.assertRaisesRegex(Damage, "MANIFEST.json is not valid: it has another sha256 than it says"):
            checks.verify(self.place)

    def test_extra_files_are_ignored(self):
        pathlib.Path(self.place, "extra").write_bytes(b"x")
        checks.verify(self.place)

    def test_manifests_that_lie(self):
        path = pathlib.Path(self.place, "MANIFEST.json")
        truth = json.loads(path.read_text())
        del truth["manifest_sha256"]

        def lie(why, files=None, text=None, **fields):
            value = json.loads(json.dumps({**truth, **fields}))
            for key, field in (files or {}).items():
                value["files"][0][key] = field
            path.write_bytes(text if text is not None else json.dumps(value).encode())
            self.damaged(why)

        lie("has format 2, this build reads format 1", format=2)
        lie("it is of step 6, its folder of another", step=6)
        for step in (-5, 5.0, "5", True, None, 2**64):
            lie("is not valid", step=step)
        for name in ("../big.bin", "/etc/passwd", ".hidden", "", "a\\b", "a\nb", "MANIFEST.json", "x" * 256, "\ud800"):
            lie("is not a plain file name", files={"name": name})
        lie("is named twice", files={"name": "small.json"})
        lie("names no file", text=json.dumps({**truth, "files": []}).encode())
        lie("wrong number of chunks", files={"chunk_bytes": 0})
        lie("wrong number of chunks", files={"sha256": []})
        lie("wrong number of chunks", files={"bytes": 10 * CHUNK_BYTES})
        lie("big.bin has 8388612 bytes instead of 8388613", files={"bytes": len(BIG) + 1})
        lie("big.bin: chunk 1", files={"sha256": [truth["files"][0]["sha256"][0]] * 3})
        lie("big.bin: chunk 0", files={"sha256": ["x"] * 3})
        lie("missing.bin is missing", files={"name": "missing.bin"})
        for text in (b"", b"{", b"[]", b"null", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"format":1,"format":1}', b'{"format":1,"x":NaN}'):
            lie("is not valid", text=text)
        lie("is not valid", created_at="yesterday")
        lie("is not valid", attempt=2**32)
        lie("is not valid", model={"family": 1, "config": {}})
        lie("it has no checksum of its own", model={"family": "x", "config": {}})
        lie("its own checksum can not be read", manifest_sha256="x")
        lie("is not valid", manifest_sha256=7)
        lie("it has another sha256 than it says", manifest_sha256="1" * 64)
        with open(path, "wb") as file:
            file.truncate(manifest.MANIFEST_BYTES_MAX + 1)
        self.damaged("more than 67108864")

    def test_what_can_be_read_as_it_was_written_is_read(self):
        path = pathlib.Path(self.place, "MANIFEST.json")
        value = json.loads(path.read_text())
        for file in value["files"]:
            file["sha256"] = [one.upper() for one in file["sha256"]]
        least = {name: value[name] for name in ("format", "attempt", "step", "created_at", "files")}
        path.write_text(json.dumps({**least, "of_the_future": {"x": 1}}))
        self.assertEqual(checks.verify(self.place).world_size, 0)


class ChooseTest(CheckpointCase):
    def test_the_newest_that_verifies_is_taken_and_damaged_newer_ones_put_aside(self):
        good = self.checkpoint(10)
        for step in (20, 30):
            pathlib.Path(self.checkpoint(step), "small.json").write_bytes(b"[]")
        os.mkdir(self.path("step-000000000040"))
        chosen = choose.newest_verified(self.dir)
        self.assertEqual((chosen.path, [one.step for one in chosen.quarantined]), (good, [30, 20]))
        reason = open_text(self.path("quarantine/step-000000000030/REASON"))
        self.assertEqual(reason, "small.json: chunk 0 (from byte 0) has another sha256 than committed\n")
        self.assertEqual(self.names(), ["quarantine", "step-000000000010", "step-000000000040"])

    def test_what_can_not_be_read_now_is_not_thrown_away(self):
        self.checkpoint(10)
        with mock.patch.object(os, "preadv", side_effect=OSError(5, "Input/output error")), self.assertRaises(CheckpointError):
            choose.newest_verified(self.dir)
        self.assertEqual(self.names(), ["step-000000000010"])

    def test_a_folder_that_was_exchanged_while_it_was_read_is_read_again(self):
        path = self.checkpoint(10)
        looks = []
        plain = choose.verify

        def look(at):
            looks.append(at)
            if len(looks) == 1:
                self.checkpoint(10, attempt=2)
                raise Damage("a torn look", file="")
            return plain(at)

        with mock.patch.object(choose, "verify", look):
            self.assertEqual(choose.newest_verified(self.dir).path, path)
        self.assertEqual((len(looks), os.listdir(self.path("quarantine"))), (2, []))

    def test_pruning_keeps_the_newest_good_one(self):
        for step in (10, 20, 30, 40):
            self.checkpoint(step, files={"a": b"x"})
        for step in (30, 40):
            pathlib.Path(self.path(f"step-{step:012}"), "a").write_bytes(b"y")
        self.assertEqual(choose.prune(self.dir, 2), [10])
        self.assertEqual(choose.prune(self.dir, 1), [30])
        self.assertEqual(self.names(), ["step-000000000020", "step-000000000040"])

    def test_a_checkpoint_is_put_aside_on_demand(self):
        self.checkpoint(10)
        for number in (1, 2):
            moved = choose.quarantine(self.dir, 10, "failed 3 resumes")
            self.assertEqual(os.path.basename(moved.path), "step-000000000010" + ("-2" if number == 2 else ""))
            self.checkpoint(10)
        self.assertIsNone(choose.quarantine(self.dir, 11, "x"))

    def test_names(self):
        self.assertEqual(manifest.folder_step(manifest.step_folder(2**64 - 1)), 2**64 - 1)
        for name in ("step-100", "step-", "step-+00000000100", "step-000000000100x", "STEP-000000000100", "step-٠٠٠٠٠٠٠٠٠١٠٠"):
            self.assertIsNone(manifest.folder_step(name), name)
        self.assertEqual(manifest.draft_attempt(manifest.draft_folder(100, 7)), 7)
        self.assertIsNone(manifest.draft_attempt(".draft-step-100-a7"))


def open_text(path):
    return pathlib.Path(path).read_text()


def rust(*args, **environment):
    return subprocess.check_output([program("everlit-agent"), *args], env={"PATH": os.environ["PATH"], **environment}, text=True)


if __name__ == "__main__":
    unittest.main()
