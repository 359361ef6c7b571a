"""Full verification of a checkpoint: the manifest's form, plain file names, exact lengths and every chunk's sha256.

Extra files are ignored, links are refused. Chunks are hashed in threads (hashlib lets go of the interpreter's lock).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, Iterable, Optional, TypeVar

from . import manifest as layout
from .errors import Damage, os_words
from .manifest import MANIFEST_NAME, Manifest, ManifestFile

READ_BYTES = 1024 * 1024
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
T = TypeVar("T")
R = TypeVar("R")


def verify(path: str | os.PathLike[str]) -> Manifest:
    """Verifies the checkpoint in folder `path` in full and answers its manifest; raises `Damage`."""
    path = os.fspath(path)
    manifest = read_manifest(path)
    for file in manifest.files:
        verify_file(path, file)
    return manifest


def verify_file(folder: str, file: ManifestFile) -> None:
    """Verifies one file of a manifest in full; raises `Damage`."""
    fd, found = open_regular(folder, file.name)
    try:
        _check_length(file, found)
        for damage in in_threads(lambda chunk: _look_at(fd, file, chunk), range(len(file.sha256))):
            if damage:
                raise damage
    finally:
        os.close(fd)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Reads and checks the manifest alone: format, names, and counts of chunks, not the files."""
    path = os.fspath(path)
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise Damage("the checkpoint's folder is not a regular file", file="")
    except OSError as error:
        raise reading("the checkpoint's folder", error) from None
    fd, length = open_regular(path, MANIFEST_NAME)
    with os.fdopen(fd, "rb") as file:
        if length > layout.MANIFEST_BYTES_MAX:
            raise Damage(f"{MANIFEST_NAME} has {length} bytes, more than {layout.MANIFEST_BYTES_MAX}", file=MANIFEST_NAME)
        try:
            text = file.read(layout.MANIFEST_BYTES_MAX + 1)
        except OSError as error:
            raise reading(MANIFEST_NAME, error) from None
    try:
        manifest = layout.parse(text)
    except layout.UnknownFormat as error:
        known = f"{MANIFEST_NAME} has format {error.format}, this build reads format {layout.MANIFEST_FORMAT}"
        raise Damage(known, file=MANIFEST_NAME) from None
    except layout.BadManifest as error:
        raise Damage(f"{MANIFEST_NAME} is not valid: {error}", file=MANIFEST_NAME) from None
    step = layout.folder_step(os.path.basename(os.path.normpath(path)))
    if step is not None and step != manifest.step:
        raise Damage(f"{MANIFEST_NAME} is not valid: it is of step {manifest.step}, its folder of another", file=MANIFEST_NAME)
    return manifest


def read_file(folder: str, expected: ManifestFile) -> bytearray:
    """Reads one file into memory and verifies what was read, so that the bytes used are the bytes checked."""
    fd, found = open_regular(folder, expected.name)
    try:
        _check_length(expected, found)
        content = bytearray(expected.bytes)
        whole = memoryview(content)

        def take(chunk: int) -> Optional[Damage]:
            offset = chunk * expected.chunk_bytes
            part = whole[offset : offset + expected.chunk_bytes]
            try:
                if not _fill(fd, part, offset):
                    return _length(expected, offset)
            except OSError as error:
                return reading(expected.name, error)
            return None if hashlib.sha256(part).hexdigest() == expected.sha256[chunk].lower() else _content(expected, chunk)

        for damage in in_threads(take, range(len(expected.sha256))):
            if damage:
                raise damage
        return content
    finally:
        os.close(fd)


def open_regular(folder: str, name: str) -> tuple[int, int]:
    """Opens a regular file of the folder without following a link; answers its descriptor and length."""
    try:
        fd = os.open(os.path.join(folder, name), _FLAGS)
    except OSError as error:
        raise reading(name, error) from None
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode):
        os.close(fd)
        raise Damage(f"{name} is not a regular file", file=name)
    return fd, about.st_size


def reading(file: str, error: OSError) -> Damage:
    """What a failed call says about a file."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return Damage(f"{file} is missing", file=file)
    # A link under O_NOFOLLOW; a socket; a folder.
    if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
        return Damage(f"{file} is not a regular file", file=file)
    return Damage(f"{file} could not be read: {os_words(error)}", file=file, transient=True)


def hash_chunk(fd: int, offset: int, length: int) -> Optional[str]:
    """The hex sha256 of `length` bytes from `offset`; None when the file ends before."""
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(min(READ_BYTES, length)))
    while length > 0:
        part = buffer[: min(len(buffer), length)]
        if not _fill(fd, part, offset):
            return None
        hasher.update(part)
        offset += len(part)
        length -= len(part)
    return hasher.hexdigest()


def in_threads(work: Callable[[T], R], items: Iterable[T]) -> Iterable[R]:
    """The answers in order, made by as many threads as this rank's share of the cores."""
    items = list(items)
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(len(items), 16, max(1, cores // max(1, int(ranks) if ranks.isdigit() else 1)))
    if threads <= 1:
        return map(work, items)
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def _look_at(fd: int, file: ManifestFile, chunk: int) -> Optional[Damage]:
    offset = chunk * file.chunk_bytes
    try:
        found = hash_chunk(fd, offset, min(file.chunk_bytes, file.bytes - offset))
    except OSError as error:
        return reading(file.name, error)
    if found is None:
        return _length(file, offset)
    return None if found == file.sha256[chunk].lower() else _content(file, chunk)


def _fill(fd: int, part: memoryview, offset: int) -> bool:
    done = 0
    while done < len(part):
        count = os.preadv(fd, [part[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True


def _check_length(file: ManifestFile, found: int) -> None:
    if found != file.bytes:
        raise _length(file, found)


def _length(file: ManifestFile, found: int) -> Damage:
    return Damage(f"{file.name} has {found} bytes instead of {file.bytes}", file=file.name)


def _content(file: ManifestFile, chunk: int) -> Damage:
    where = f"{file.name}: chunk {chunk} (from byte {chunk * file.chunk_bytes})"
    return Damage(f"{where} has another sha256 than committed", file=file.name, chunk=chunk)
