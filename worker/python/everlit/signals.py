"""What the outside asks of a running rank: SIGTERM (save, then end) and SIGUSR1 (save, then go on).

The handlers only set flags; `CheckpointManager` carries them to all ranks, so that all act at one step. They are
installed when there is something to save: before, SIGTERM ends the process at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn, Optional

from .pulse import heartbeat

#: The exit code after SIGTERM, as a shell reports it.
EXIT_TERMINATED = 143

_owner: Optional[int] = None
_stop = False
_save = False


def install() -> bool:
    """Installs the handlers; False when that is not possible here, because this is not the main thread."""
    global _owner
    if _owner == os.getpid():
        return True
    if threading.current_thread() is not threading.main_thread():
        return False
    _owner = os.getpid()
    signal.signal(signal.SIGTERM, _on_stop)
    signal.signal(signal.SIGUSR1, _on_save)
    heartbeat.saves_on_signal()
    return True


def stop_requested() -> bool:
    """Whether this rank was told to end."""
    return _stop


def save_requested() -> bool:
    """Whether this rank was told to save; stays so until a save begins."""
    return _save


def save_done() -> None:
    """A save begins, by this rank's or another one's request."""
    global _save
    _save = False


def exit_terminated(why: str = "") -> NoReturn:
    """Ends the program with 143, the code of a rank that was told to end and did; call it after the save."""
    if why:
        print(why, file=sys.stderr, flush=True)
    heartbeat.stop()
    raise SystemExit(EXIT_TERMINATED)


def _on_stop(number: int, frame: Optional[FrameType]) -> None:
    global _stop
    _stop = True


def _on_save(number: int, frame: Optional[FrameType]) -> None:
    global _save
    _save = True


def _after_fork() -> None:
    """A child of the rank, such as a data loader's worker, ends by its parent's SIGTERM only.

    The group's SIGTERM reaches it too, but the rank needs it for the step it is in. Blocked and waited for by a thread,
    since torch's loader sets a handler of its own that dies of any but its parent's.
    """
    if _owner is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_parent, args=(os.getppid(),), name="everlit-sigterm", daemon=True).start()


def _await_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    # As torch's own handler: anything else looks like a failure of the loader.
    os._exit(0)


os.register_at_fork(after_in_child=_after_fork)
