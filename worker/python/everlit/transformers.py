"""For the Hugging Face Trainer: `trainer.add_callback(EverlitCallback())`, and `resume_path()` for `trainer.train`.

The Trainer writes its own `checkpoint-N`; a copy of that folder is committed as a verified checkpoint, and that is what a
restarted job resumes from. SIGTERM makes the Trainer save and end with exit code 143, SIGUSR1 makes it save.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from typing import Any, Optional

from transformers import TrainerCallback

from . import signals
from .manager import SLASH, CheckpointManager
from .pulse import heartbeat


class EverlitCallback(TrainerCallback):
    """Heartbeats, verified saves and the signals of a rank. `folder` is used without the coordinator."""

    def __init__(self, folder: str = "everlit-checkpoints", *, keep: int = 3, check_every: int = 1) -> None:
        self._manager = CheckpointManager(folder, keep=keep, check_every=check_every)
        self._stopping = False

    def resume_path(self) -> Optional[str]:
        """What to pass as `resume_from_checkpoint`: a folder that was verified, or None for a fresh start."""
        heartbeat.phase("load")
        path = self._manager.resume_path()
        return _with_folders(path) if path else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        signals.install()
        heartbeat.phase("train")
        heartbeat.step(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        logs = logs or {}
        chosen = {"lr": logs.get("learning_rate"), "grad_norm": logs.get("grad_norm"), "epoch": logs.get("epoch")}
        numbers = {name: value for name, value in chosen.items() if value is not None}
        heartbeat.step(state.global_step, state.max_steps, loss=logs.get("loss"), **numbers)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> Any:
        heartbeat.step(state.global_step, state.max_steps)
        stop, save = self._manager.poll(state.global_step)
        if stop:
            self._stopping = True
            control.should_training_stop = True
        if stop or save:
            control.should_save = True
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        heartbeat.phase("train")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        heartbeat.phase("evaluate")

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        source = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        self._manager.save_files(state.global_step, source, must=self._stopping)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._stopping and state.global_step < state.max_steps:
            signals.exit_terminated(f"told to end: stopped after step {state.global_step}, saved")


def _with_folders(path: str) -> str:
    """A checkpoint is one flat folder; where the Trainer had folders in its own, they are made again, until this program ends."""
    inside = [name for name in os.listdir(path) if SLASH in name]
    if not inside:
        return path
    target = tempfile.mkdtemp(prefix="everlit-resume-")
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    for name in os.listdir(path):
        place = os.path.join(target, *name.split(SLASH))
        os.makedirs(os.path.dirname(place), exist_ok=True)
        shutil.copyfile(os.path.join(path, name), place)
    return target
