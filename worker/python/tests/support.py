"""What the tests share. They run with `python3 -m unittest discover -s worker/python/tests`, or with pytest."""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

HAS_TORCH = importlib.util.find_spec("torch") is not None
HAS_NUMPY = importlib.util.find_spec("numpy") is not None
HAS_TRANSFORMERS = HAS_TORCH and all(importlib.util.find_spec(name) is not None for name in ("transformers", "accelerate"))
needs_torch = unittest.skipUnless(HAS_TORCH, "torch can not be imported")
needs_numpy = unittest.skipUnless(HAS_NUMPY, "numpy can not be imported")
needs_transformers = unittest.skipUnless(HAS_TRANSFORMERS, "transformers or accelerate can not be imported")


def program(name):
    """One of the built Rust programs, or None."""
    folders = [os.environ.get("EVERLIT_BIN"), ROOT.parent.parent / "target/release"]
    found = [pathlib.Path(folder) / name for folder in folders if folder]
    return next((str(path) for path in found if path.exists()), None)


def needs_program(name):
    return unittest.skipUnless(program(name), f"{name} is not built; EVERLIT_BIN says where it is")


def clean_environment(**more):
    """This process's environment without a rank's variables."""
    kept = {name: value for name, value in os.environ.items() if not is_a_ranks(name)}
    return {**kept, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]), **more}


def is_a_ranks(name):
    ours = name.startswith("EVERLIT_") and name != "EVERLIT_BIN"
    return ours or name.startswith("TORCHELASTIC") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def until(what, condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.005)


class Case(unittest.TestCase):
    """With a folder of its own and the environment of a program alone."""

    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="everlit-test-")
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        before = dict(os.environ)
        self.addCleanup(lambda: (os.environ.clear(), os.environ.update(before)))
        for name in list(os.environ):
            if is_a_ranks(name):
                del os.environ[name]

    def path(self, *parts):
        return os.path.join(self.dir, *parts)

    def script(self, text):
        """Starts a Python program that can import the package."""
        path = self.path("script.py")
        pathlib.Path(path).write_text(text)
        return [sys.executable, path]

    def start(self, command, **environment):
        process = subprocess.Popen(command, cwd=self.dir, env=clean_environment(**environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def done(self, process, code=0, seconds=120):
        output, _ = process.communicate(timeout=seconds)
        self.assertEqual(process.returncode, code, output)
        return output


def read_json(path):
    return json.loads(pathlib.Path(path).read_text())


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
