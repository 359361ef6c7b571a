"""A small file system of its own for a data folder, so that its disk can be full or stand still without hurting anything else."""

import errno
import os
import pathlib
import shutil
import subprocess
import tempfile
import threading
import time

TOOLS = ("mkfs.ext4", "mount", "umount", "fsfreeze")


class Disk:
    """ext4 in a file, mounted at `folder`; needs root. `why` says why there is none, and then `folder` is a plain one."""

    def __init__(self, megabytes):
        self.base = pathlib.Path(tempfile.mkdtemp(prefix="everlit-soak-"))
        self.folder = self.base / "data"
        self.folder.mkdir()
        self.why = self.mount(megabytes)

    def mount(self, megabytes):
        missing = [tool for tool in TOOLS if not shutil.which(tool)]
        if os.geteuid() != 0:
            return "needs root to mount a file system of its own"
        if missing:
            return f"{', '.join(missing)} not found"
        image = self.base / "image"
        with open(image, "wb") as file:
            file.truncate(megabytes << 20)
        for command in (["mkfs.ext4", "-q", "-F", image], ["mount", "-o", "loop", image, self.folder]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return f"{command[0]}: {done.stderr.strip()}"
        return ""

    def remove(self, keep):
        """Unmounts; with `keep` the folder's content stays, as a plain copy."""
        kept = self.folder
        if not self.why:
            if keep:
                kept = self.base / "kept"
                subprocess.run(["cp", "-a", self.folder, kept], check=False)
            if subprocess.run(["umount", self.folder], capture_output=True).returncode:
                subprocess.run(["umount", "-l", self.folder], check=False)
            (self.base / "image").unlink()
        if not keep:
            shutil.rmtree(self.base, ignore_errors=True)
        return kept

    def fill(self, seconds):
        """Not a byte is free for so long. Answers how often a write was refused for that."""
        path, refused = self.folder / "filler", 0
        file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        try:
            about = os.statvfs(self.folder)
            # Most of it without writing; the file system keeps some blocks for itself.
            os.posix_fallocate(file, 0, max(4096, (about.f_bavail - 2048) * about.f_frsize))
            os.lseek(file, 0, os.SEEK_END)
            began = time.monotonic()
            while time.monotonic() < began + seconds:
                # What others give up is taken too.
                try:
                    while True:
                        os.write(file, b"x" * 4096)
                except OSError as e:
                    if e.errno != errno.ENOSPC:
                        raise
                    refused += 1
                time.sleep(0.02)
        finally:
            os.close(file)
            path.unlink()
        return refused

    def freeze(self, seconds, meanwhile=lambda: None):
        """Every write waits for so long. Answers how long a write of four bytes and its fsync took."""
        # Thawed by a process of its own: nothing that this one touches may stand between, not even its own end.
        script = 'fsfreeze -f "$2" || exit 1; echo frozen; sleep "$1"; fsfreeze -u "$2"'
        command = ["sh", "-c", script, "freeze", str(seconds), self.folder]
        freezer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert freezer.stdout.readline() == "frozen\n", "the file system could not be frozen"
        took = []

        def write():
            began = time.monotonic()
            with open(self.folder / "probe", "wb") as file:
                file.write(b"slow")
                file.flush()
                os.fsync(file.fileno())
            took.append(time.monotonic() - began)

        probe = threading.Thread(target=write)
        probe.start()
        try:
            meanwhile()
        finally:
            freezer.wait()
            freezer.stdout.close()
            probe.join()
        return took[0]
