"""The heartbeat file: what this rank does, for the agent that watches it.

Calls only change numbers; a thread of its own writes the file, at most ten times a second and at least once a second,
so that a slow disk never slows a step. It begins with the first call, and does nothing outside the coordinator.
The trap: a call that holds the interpreter's lock for more than the job's `heartbeat.timeout` stops this thread too.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import threading
import time
from typing import Any, Iterator, Optional

from .environment import Environment
from .manifest import now

WRITE_SECONDS_MIN = 0.1
WRITE_SECONDS_MAX = 1.0
BYTES_MAX = 4096
METRICS_MAX = 32
METRIC_NAME_MAX = 64
REASON_MAX = 512
PHASES = ("init", "load", "train", "checkpoint", "evaluate", "serve")


class Heartbeat:
    """One rank's sign of life; programs use the one instance `everlit.heartbeat`."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.RLock()
        # Not held by a step: the disk may be slow.
        self._writing = threading.Lock()
        self._beat: dict[str, Any] = {}
        self._metrics: dict[str, float] = {}
        self._path: Optional[str] = None
        self._thread: Optional[threading.Thread] = None
        self._wake = threading.Event()
        self._started = self._ended = False
        self._written = self._converted = 0.0

    def start(self) -> None:
        """Writes the first heartbeat and starts the thread; every other call does this too."""
        with self._lock:
            if self._started:
                return
            self._started = True
            env = Environment.read()
            self._path = env.heartbeat_file
            if self._path is None:
                return
            self._beat = {"seq": 0, "pid": os.getpid(), "rank": env.rank, "attempt": env.attempt or 0, "phase": self._beat.get("phase", "init")}
            if env.generation is not None:
                self._beat["generation"] = env.generation
            self._write()
            self._thread = threading.Thread(target=self._run, name="everlit-heartbeat", daemon=True)
            self._thread.start()
            atexit.register(self.stop)

    def stop(self) -> None:
        """Writes the last state and ends the thread; called at the interpreter's end."""
        with self._lock:
            if self._thread is None or self._ended:
                return
            self._ended = True
            self._wake.set()
            thread = self._thread
        if thread is not threading.current_thread():
            thread.join(5)
        self._write()

    def step(self, step: int, total_steps: Optional[int] = None, *, samples: Optional[int] = None, loss: Any = None, **metrics: Any) -> None:
        """`step` updates are done. Numbers may be tensors; those are read at most ten times a second."""
        self.start()
        if self._path is None:
            return
        with self._lock:
            changed = {"step": int(step), "total_steps": total_steps, "samples": samples}
            self._beat.update({name: int(value) for name, value in changed.items() if value is not None})
            fresh = time.monotonic() - self._converted >= WRITE_SECONDS_MIN
            if fresh:
                self._converted = time.monotonic()
            if loss is not None and (fresh or isinstance(loss, (int, float))):
                self._beat["loss"] = _number(loss)
            for name, value in metrics.items():
                if fresh or isinstance(value, (int, float)):
                    self._set_metric(name, value)
            if self._beat["phase"] in ("init", "load"):
                self._beat["phase"] = "train"
            self._wake.set()

    def metrics(self, **metrics: Any) -> None:
        """Any other numbers, by name."""
        self.start()
        with self._lock:
            for name, value in metrics.items():
                self._set_metric(name, value)
            self._wake.set()

    def phase(self, phase: str) -> None:
        """What this rank does from now on: init, load, train, checkpoint, evaluate or serve."""
        if phase not in PHASES:
            raise ValueError(f"`{phase}` is not one of {', '.join(PHASES)}")
        with self._lock:
            self._beat["phase"] = phase
            self.start()
            self._wake.set()

    @contextlib.contextmanager
    def in_phase(self, phase: str) -> Iterator[None]:
        """A phase for a while, then the one before."""
        before = self._beat.get("phase", "train")
        self.phase(phase)
        try:
            yield
        finally:
            self.phase(before)

    def save_failed(self, step: int, reason: str) -> None:
        """A save failed while training goes on."""
        self.start()
        with self._lock:
            self._beat["save_error"] = {"step": int(step), "reason": reason[:REASON_MAX]}
            self._wake.set()

    def save_worked(self) -> None:
        """The newest save worked."""
        self.start()
        with self._lock:
            if self._beat.pop("save_error", None) is not None:
                self._wake.set()

    def saves_on_signal(self) -> None:
        """SIGUSR1 makes this program save; without this the signal is never sent."""
        self.start()
        with self._lock:
            self._beat["saves_on_signal"] = True
            self._wake.set()

    def _set_metric(self, name: str, value: Any) -> None:
        number = _number(value)
        if number is None:
            self._metrics.pop(name, None)
        elif 0 < len(name) <= METRIC_NAME_MAX and (name in self._metrics or len(self._metrics) < METRICS_MAX):
            self._metrics[name] = number

    def _run(self) -> None:
        while not self._ended:
            self._wake.wait(WRITE_SECONDS_MAX)
            rest = WRITE_SECONDS_MIN - (time.monotonic() - self._written)
            if rest > 0 and not self._ended:
                time.sleep(rest)
            self._wake.clear()
            if not self._ended:
                self._write()

    def _write(self) -> None:
        path = self._path
        if path is None:
            return
        with self._writing:
            with self._lock:
                self._beat["seq"] += 1
                self._written = time.monotonic()
                text = self._text()
            draft = os.path.splitext(path)[0] + ".tmp"
            # A heartbeat that can not be written shows as silence, which is the truth about this node's disk.
            with contextlib.suppress(OSError):
                with open(draft, "wb") as file:
                    file.write(text)
                os.replace(draft, path)

    def _text(self) -> bytes:
        metrics = dict(self._metrics)
        beat = dict(self._beat)
        while True:
            document = {**beat, **({"metrics": metrics} if metrics else {}), "time": now()}
            text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
            if len(text) <= BYTES_MAX:
                return text
            if metrics:
                metrics.popitem()
            elif "save_error" not in beat:
                return text
            else:
                beat["save_error"] = {**beat["save_error"], "reason": beat["save_error"]["reason"][:-100]}
                if not beat["save_error"]["reason"]:
                    del beat["save_error"]


def _number(value: Any) -> Optional[float]:
    try:
        number = float(value.detach() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


heartbeat = Heartbeat()


def _after_fork() -> None:
    # A child (a data loader's worker) is not the rank: its copy must never write.
    heartbeat._forget()
    heartbeat._started = True


os.register_at_fork(after_in_child=_after_fork)
