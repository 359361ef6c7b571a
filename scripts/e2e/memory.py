"""A memory cgroup for one process, of version 1 or 2: the kernel's own out-of-memory killer, and its own count of what it killed."""

import os
import pathlib

ROOT = pathlib.Path("/sys/fs/cgroup")


class MemoryLimit:
    """`why` says why there is none here."""

    def __init__(self, megabytes):
        self.why, self.folder = "", None
        name = f"everlit-soak-{os.getpid()}"
        try:
            if (ROOT / "memory/memory.limit_in_bytes").exists():
                self.folder = ROOT / "memory" / name
                self.folder.mkdir()
                (self.folder / "memory.limit_in_bytes").write_text(str(megabytes << 20))
                self.counter = self.folder / "memory.oom_control"
            elif "memory" in (ROOT / "cgroup.subtree_control").read_text().split():
                self.folder = ROOT / name
                self.folder.mkdir()
                (self.folder / "memory.max").write_text(str(megabytes << 20))
                swap = self.folder / "memory.swap.max"
                if swap.exists():
                    swap.write_text("0")
                self.counter = self.folder / "memory.events"
            else:
                self.why = "no memory cgroup can be made here"
            if not self.why:
                self.kills()
        except (OSError, KeyError) as e:
            self.remove()
            self.why = f"no memory cgroup can be made here: {e!r}"

    def kills(self):
        return int(dict(line.split() for line in self.counter.read_text().splitlines())["oom_kill"])

    def take(self, pid):
        (self.folder / "cgroup.procs").write_text(str(pid))

    def remove(self):
        if self.folder and self.folder.exists():
            self.folder.rmdir()
