"""Which checkpoint to resume from, and which to throw away.

A checkpoint is good when it verifies in full now; nothing is remembered. Trap: a commit may exchange a folder while it
is being read, which looks like damage; so a folder is only moved when it still is the one (by inode) that was read.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass, field
from typing import Optional

from . import fence
from . import manifest as layout
from .commit import remove_tree
from .errors import Busy, CheckpointError, Damage, Failed
from .fence import doing
from .manifest import Manifest
from .checks import verify

LOOKS_MAX = 8
#: Quarantined folders of one step at most; then the names are taken again from the first.
SAME_STEP_MAX = 100


@dataclass
class Found:
    """A committed checkpoint, unverified: its step and folder."""

    step: int
    path: str


@dataclass
class Quarantined:
    """A checkpoint that was moved away: its step, where it is now, and why."""

    step: int
    path: str
    reason: str


@dataclass
class Chosen:
    """The newest checkpoint that verifies, if there is any, and what was moved away on the way."""

    path: Optional[str] = None
    manifest: Optional[Manifest] = None
    quarantined: list[Quarantined] = field(default_factory=list)


def list_checkpoints(folder: str) -> list[Found]:
    """All committed checkpoints of a folder, newest first, unverified. A missing folder has none."""
    found = []
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Failed("list", folder, error) from error
    for name in names:
        step = layout.folder_step(name)
        path = os.path.join(folder, name)
        if step is None:
            continue
        with doing("look at", path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(os.path.join(path, layout.MANIFEST_NAME))
            found.append(Found(step, path))
    return sorted(found, key=lambda one: -one.step)


def newest_verified(folder: str) -> Chosen:
    """Takes the newest checkpoint that verifies in full and quarantines each damaged newer one."""
    chosen = Chosen()
    for found in list_checkpoints(folder):
        for look in range(1, LOOKS_MAX + 1):
            inode = _inode(found.path)
            if inode is None:
                break
            try:
                chosen.manifest = verify(found.path)
                chosen.path = found.path
                return chosen
            except Damage as damage:
                if damage.transient:
                    raise CheckpointError(f"could not verify `{found.path}`: {damage}") from damage
                moved = _move_away(folder, found, damage.reason, inode)
            if moved:
                chosen.quarantined.append(moved)
                break
            if look == LOOKS_MAX:
                raise Busy(found.path)
    return chosen


def quarantine(folder: str, step: int, reason: str) -> Optional[Quarantined]:
    """Moves a checkpoint away for a reason that its bytes do not show. None: it is not there."""
    path = os.path.join(folder, layout.step_folder(step))
    inode = _inode(path)
    return _move_away(folder, Found(step, path), reason, inode) if inode is not None else None


def prune(folder: str, keep: int) -> list[int]:
    """Removes all but the newest `keep` checkpoints, and never the newest that verifies; answers the removed steps."""
    every = list_checkpoints(folder)
    keep = max(1, keep)
    if len(every) <= keep:
        return []
    good = None
    for found in every:
        try:
            verify(found.path)
            good = found
            break
        except Damage as damage:
            if damage.transient:
                raise
    if good is None:
        return []
    removed = []
    with fence.lock(folder):
        for found in every[keep:]:
            if found is good:
                continue
            # Under a draft's name first: a half removed one must not look committed.
            grave = os.path.join(folder, layout.draft_folder(found.step, 0))
            remove_tree(grave)
            with doing("remove", found.path), contextlib.suppress(FileNotFoundError):
                os.rename(found.path, grave)
                removed.append((found.step, grave))
        fence.sync_dir(folder)
    for _, grave in removed:
        remove_tree(grave)
    return [step for step, _ in removed]


def _inode(path: str) -> Optional[int]:
    with doing("look at", path):
        try:
            return os.lstat(path).st_ino
        except FileNotFoundError:
            return None


def _move_away(folder: str, found: Found, reason: str, looked_at: int) -> Optional[Quarantined]:
    """Renames into the quarantine, unless the folder is no longer the one that was looked at."""
    shelf = os.path.join(folder, layout.QUARANTINE)
    fence.make_dir(shelf)
    with fence.lock(folder):
        if _inode(found.path) != looked_at:
            return None
        name = layout.step_folder(found.step)
        names = [name] + [f"{name}-{number}" for number in range(2, SAME_STEP_MAX + 1)]
        target = os.path.join(shelf, next((one for one in names if not os.path.lexists(os.path.join(shelf, one))), name))
        remove_tree(target)
        with doing("quarantine", found.path):
            os.rename(found.path, target)
        fence.sync_dir(shelf)
        fence.sync_dir(folder)
    # Never through a link; a full disk may cost the note, the caller has the reason too.
    if stat.S_ISDIR(os.lstat(target).st_mode):
        with contextlib.suppress(CheckpointError):
            fence.replace_file(target, layout.REASON_NAME, f"{reason}\n".encode())
    return Quarantined(found.step, target, reason)
