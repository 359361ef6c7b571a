"""The fence and the lock of a checkpoint folder: an attempt that was replaced can never commit again.

`FENCE` holds the lowest attempt that may commit. It is read and changed under an exclusive lock on `.lock`, the same
lock that a commit's rename happens under; the Rust programs take the same one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from typing import Iterator

from .errors import Busy, Failed, Fenced
from .manifest import U32_MAX

FENCE_NAME = "FENCE"
LOCK_NAME = ".lock"
LOCK_WAIT_SECONDS = 20.0
LOCK_POLL_SECONDS = 0.002


@contextlib.contextmanager
def doing(action: str, path: str) -> Iterator[None]:
    """Gives an error of the system its place."""
    try:
        yield
    except OSError as error:
        raise Failed(action, path, error) from error


@contextlib.contextmanager
def lock(folder: str) -> Iterator[None]:
    """Holds the folder's lock, waiting for it at most 20 s."""
    path = os.path.join(folder, LOCK_NAME)
    with doing("open", path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        deadline = time.monotonic() + LOCK_WAIT_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EINTR):
                    raise Failed("lock", path, error) from error
            if time.monotonic() > deadline:
                raise Busy(folder)
            time.sleep(LOCK_POLL_SECONDS)
        yield
    finally:
        os.close(fd)


def fence(folder: str) -> int:
    """The lowest attempt that may commit; 0 when none was ever fenced."""
    path = os.path.join(folder, FENCE_NAME)
    try:
        with open(path, "rb") as file:
            text = file.read(64).strip()
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise Failed("read", path, error) from error
    if not re.fullmatch(rb"\+?[0-9]+", text) or int(text) > U32_MAX:
        raise Failed("read", path, OSError("not a decimal attempt"))
    return int(text)


def raise_fence(folder: str, attempt: int) -> None:
    """From now on only `attempt` and later ones commit into the folder, which is made if missing. Never lowers; durable."""
    make_dir(folder)
    with lock(folder):
        raise_locked(folder, attempt)


def raise_locked(folder: str, attempt: int) -> None:
    """`raise_fence` for a caller that holds the lock."""
    if fence(folder) < attempt:
        replace_file(folder, FENCE_NAME, b"%d\n" % attempt)


def check(folder: str, attempt: int) -> None:
    """Raises `Fenced` when `attempt` is below the fence."""
    known = fence(folder)
    if attempt < known:
        raise Fenced(attempt, known)


def make_dir(folder: str) -> None:
    """Makes the folder and its parents, and makes the new name durable."""
    if os.path.isdir(folder):
        return
    with doing("create", folder):
        os.makedirs(folder, exist_ok=True)
    sync_dir(os.path.dirname(os.path.abspath(folder)))


def sync_dir(folder: str) -> None:
    """Makes the names in the folder durable."""
    sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def sync(path: str, flags: int = os.O_RDONLY) -> None:
    """Makes a file's bytes durable."""
    with doing("sync", path):
        fd = os.open(path, flags | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def replace_file(folder: str, name: str, content: bytes) -> None:
    """Replaces a small file as a whole: temporary name, fsync, rename, fsync of the folder."""
    draft = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    target = os.path.join(folder, name)
    with doing("write", target):
        write_synced(draft, content)
        os.replace(draft, target)
    sync_dir(folder)


def write_synced(path: str, content: bytes) -> None:
    """Writes a new file and brings its bytes to the disk; its name is the folder's business."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
