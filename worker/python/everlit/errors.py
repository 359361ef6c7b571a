"""Why a checkpoint operation did not happen, and why a checkpoint does not verify; the words are those of the Rust programs."""

from __future__ import annotations

from typing import Optional


class CheckpointError(Exception):
    """Any failure of a checkpoint operation."""

    #: Whether the same call may work later.
    transient = False


class Fenced(CheckpointError):
    """The attempt is older than the fence: this rank must end, nothing it wrote counts."""

    def __init__(self, attempt: int, fence: int) -> None:
        super().__init__(f"attempt {attempt} is fenced off: attempt {fence} may commit now")
        self.attempt, self.fence = attempt, fence


class Refused(CheckpointError):
    """What is to be committed contradicts itself or its files; asking again does not help."""

    def __init__(self, why: str) -> None:
        super().__init__(f"checkpoint refused: {why}")


class Busy(CheckpointError):
    """Another process holds the folder's lock for too long."""

    transient = True

    def __init__(self, path: str) -> None:
        super().__init__(f"`{path}` is locked by another process")


class Failed(CheckpointError):
    """The file system refused; nothing is known about the checkpoint."""

    transient = True

    def __init__(self, action: str, path: str, source: OSError) -> None:
        super().__init__(f"could not {action} `{path}`: {os_words(source)}")
        self.source = source


class Damage(CheckpointError):
    """Why a checkpoint does not verify: which file, which chunk and why.

    `transient`: the file system could not answer, which says nothing about the bytes and is no reason to throw the
    checkpoint away.
    """

    def __init__(self, reason: str, *, file: str, chunk: Optional[int] = None, transient: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.file, self.chunk, self.transient = reason, file, chunk, transient


def os_words(error: OSError) -> str:
    """The system's words as Rust prints them."""
    return f"{error.strerror or error} (os error {error.errno})" if error.errno else str(error)
