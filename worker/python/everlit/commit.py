"""Writing a checkpoint: a draft folder, the description of its files, and the commit.

The commit makes everything durable under the draft's name first (each file, then the manifest, then the folder), and
only then, under the lock and with the fence checked, renames. A step that is committed again is exchanged with the old
one in one system call, so a reader finds one of the two whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from typing import Optional

from . import fence, system
from . import manifest as layout
from .errors import Damage, Failed, Fenced, Refused
from .fence import doing
from .manifest import CHUNK_BYTES, MANIFEST_NAME, Manifest, ManifestFile
from .checks import hash_chunk, in_threads, open_regular, read_manifest, verify


def begin(folder: str, step: int, attempt: int) -> str:
    """Makes the draft folder of a step, or empties what this attempt left under that name. One rank calls it."""
    fence.make_dir(folder)
    fence.check(folder, attempt)
    draft = os.path.join(folder, layout.draft_folder(step, attempt))
    remove_tree(draft)
    with doing("create", draft):
        os.mkdir(draft)
    return draft


def describe_file(path: str) -> ManifestFile:
    """Reads a file once, hashing its chunks, and answers its line of the manifest."""
    folder, name = os.path.split(path)
    if not layout.is_plain_name(name):
        raise Refused(f"`{path}` has no plain file name")
    try:
        fd, length = open_regular(folder or ".", name)
    except Damage as damage:
        raise Refused(f"`{path}`: {damage}") from None
    try:
        with doing("read", path):

            def one(chunk: int) -> Optional[str]:
                return hash_chunk(fd, chunk * CHUNK_BYTES, min(CHUNK_BYTES, length - chunk * CHUNK_BYTES))

            found = list(in_threads(one, range(layout.chunks(length, CHUNK_BYTES))))
            sha256 = [one for one in found if one is not None]
            if len(sha256) != len(found) or os.fstat(fd).st_size != length:
                raise Refused(f"`{path}`: it changed while it was read")
    finally:
        os.close(fd)
    return ManifestFile(name, length, CHUNK_BYTES, sha256)


def commit(folder: str, draft: str, manifest: Manifest) -> str:
    """Commits `draft`, a folder directly in `folder` that holds exactly the manifest's files, and answers the final path.

    `manifest.attempt` is the fencing token. Asking again after a lost answer is no error. A draft that has the final
    name already becomes a checkpoint by its manifest alone.
    """
    place = os.path.join(folder, layout.step_folder(manifest.step))
    if not os.path.lexists(draft) and _committed_by_us(place, manifest):
        return place
    _check_draft(folder, draft, manifest)
    for file in manifest.files:
        fence.sync(os.path.join(draft, file.name))
    in_place = os.path.normpath(draft) == os.path.normpath(place)
    text = _manifest_text(manifest)
    if not in_place:
        _write_manifest(draft, text)
        fence.sync_dir(draft)
    with fence.lock(folder):
        fence.check(folder, manifest.attempt)
        fence.raise_locked(folder, manifest.attempt)
        if in_place:
            fence.replace_file(place, MANIFEST_NAME, text)
        else:
            _place_locked(draft, place, manifest)
        fence.sync_dir(folder)
        # For people only, so its failure is nobody's.
        with contextlib.suppress(Failed):
            fence.replace_file(folder, "LATEST", f"{layout.step_folder(manifest.step)}\n".encode())
    if not in_place:
        # After an exchange the old checkpoint lies under the draft's name; a failure here is left to `sweep_drafts`.
        shutil.rmtree(draft, ignore_errors=True)
    return place


def sweep_drafts(folder: str, below_attempt: int) -> int:
    """Removes the drafts of attempts below `below_attempt`, and what an interrupted removal left; answers how many."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise Failed("list", folder, error) from error
    stale = [name for name in names if (attempt := layout.draft_attempt(name)) is not None and attempt < below_attempt]
    for name in stale:
        remove_tree(os.path.join(folder, name))
    return len(stale)


def remove_tree(path: str) -> None:
    """Removes a folder, a file or a link with that name; none is no error."""
    with doing("remove", path), contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def _committed_by_us(place: str, manifest: Manifest) -> bool:
    try:
        old = read_manifest(place)
    except Damage:
        return False
    return old.attempt == manifest.attempt and old.files == manifest.files


def _check_draft(folder: str, draft: str, manifest: Manifest) -> None:
    """Everything that can be told before anything is changed."""
    if manifest.format != layout.MANIFEST_FORMAT:
        raise Refused(f"format {manifest.format} is not {layout.MANIFEST_FORMAT}")
    try:
        layout.check_files(manifest.files)
    except layout.BadManifest as error:
        raise Refused(str(error)) from None
    names = [file.name for file in manifest.files]
    if names != sorted(names):
        raise Refused("the files are not in name order")
    if os.path.dirname(os.path.normpath(draft)) != os.path.normpath(folder):
        raise Refused(f"`{draft}` is not in `{folder}`")
    fence.check(folder, manifest.attempt)
    for file in manifest.files:
        try:
            fd, found = open_regular(draft, file.name)
        except Damage as damage:
            raise Refused(str(damage)) from None
        os.close(fd)
        if found != file.bytes:
            raise Refused(f"{file.name} has {found} bytes, not {file.bytes}")


def _manifest_text(manifest: Manifest) -> bytes:
    try:
        text = manifest.to_json()
        # What a reader would not take must not become a checkpoint.
        layout.parse(text)
    except ValueError as error:
        raise Refused(str(error)) from None
    if len(text) > layout.MANIFEST_BYTES_MAX:
        raise Refused(f"the manifest would have {len(text)} bytes")
    return text


def _write_manifest(draft: str, text: bytes) -> None:
    path = os.path.join(draft, MANIFEST_NAME)
    with doing("write", path):
        # Only ever a regular file of our own, whatever lies there.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with os.fdopen(fd, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def _place_locked(draft: str, place: str, manifest: Manifest) -> None:
    """The one moment: the draft gets the final name, under the lock."""
    with doing("look at", place):
        try:
            os.lstat(place)
            there = True
        except FileNotFoundError:
            there = False
    if not there:
        with doing("commit", place):
            os.rename(draft, place)
        return
    with contextlib.suppress(Damage):
        old = read_manifest(place)
        if old.attempt > manifest.attempt:
            raise Fenced(manifest.attempt, old.attempt)
    try:
        system.exchange(draft, place)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS):
            raise Failed("commit", place, error) from error
        # Without an exchange a good old one is kept: the same step of the same job is as good.
        try:
            verify(place)
        except Damage as damage:
            if damage.transient:
                raise Refused(str(damage)) from None
            remove_tree(place)
            with doing("commit", place):
                os.rename(draft, place)
