"""Saving and resuming: every rank writes its share, rank 0 commits, every rank reads all.

The ranks agree three times in a save (state and folder, parts, commit), so that none goes on while another failed. A
save that fails for a full disk or a folder that can not be written costs nothing but itself; a fence ends the rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from typing import Any, Callable, Mapping, Optional, Union

from . import choose, distributed, fence, rng, safetensors, signals, state as states
from . import manifest as layout
from .commit import begin, commit, describe_file, sweep_drafts
from .environment import Environment
from .errors import CheckpointError, Damage, Failed, Fenced, Refused
from .fence import doing, write_synced
from .manifest import DataPosition, Manifest, ManifestFile
from .pulse import heartbeat
from .checks import read_file, read_manifest, verify, verify_file

STATE_NAME = "state.json"
#: How a slash in a file's path is written in the one flat folder of a checkpoint.
SLASH = "%2F"

_OK, _FAILED, _FENCED, _REFUSED = range(4)


@dataclass
class _Place:
    """What all ranks know before the first save or load."""

    folder: str
    attempt: int
    rank: int
    world: int
    env: Environment


class CheckpointManager:
    """Saves and resumes a training state as verified checkpoints.

    `folder` is used without the coordinator, which gives its own. `objects`: what `restore` and `after_step` load and
    save, anything with `state_dict` and `load_state_dict`. `every_steps`: updates between the saves of `after_step`.
    `keep`: how many checkpoints stay; under the coordinator, the job's setting counts. `share=False`: rank 0 writes
    everything, for states that differ between ranks. All ranks call the same methods in the same order.
    """

    def __init__(
        self,
        folder: Union[str, "os.PathLike[str]"] = "checkpoints",
        *,
        objects: Optional[Mapping[str, Any]] = None,
        every_steps: int = 50,
        keep: int = 3,
        share: bool = True,
        check_every: int = 1,
    ) -> None:
        self._folder = os.fspath(folder)
        self.objects = dict(objects or {})
        self.every_steps, self.keep, self.share, self.check_every = every_steps, keep, share, max(1, check_every)
        for name, one in self.objects.items():
            if not hasattr(one, "state_dict") or not hasattr(one, "load_state_dict"):
                raise TypeError(f"`{name}` has no state_dict and load_state_dict")
        self._place: Optional[_Place] = None
        self._saved_step: Optional[int] = None
        #: The manifest of what was resumed from; None after a fresh start.
        self.manifest: Optional[Manifest] = None
        #: Its folder.
        self.resumed_from: Optional[str] = None
        #: What this rank gave as `rank_state`, when as many ranks saved as there are now.
        self.rank_state: Any = None
        heartbeat.start()

    @property
    def step(self) -> int:
        """The step that was resumed from, 0 after a fresh start."""
        return self.manifest.step if self.manifest else 0

    @property
    def samples(self) -> int:
        """Samples consumed by the job when that checkpoint was made."""
        return self.manifest.samples if self.manifest else 0

    # Resuming

    def resume(self) -> Any:
        """The state to go on with, or None for a fresh start; raises when what is there can not be read.

        Under the agent it is the checkpoint that the agent chose, alone the newest one that verifies. Every file is
        verified as it is read. A checkpoint of another program's tensors comes as a dictionary by name.
        """
        heartbeat.phase("load")
        place = self._join()
        path = self._choose(place)
        problem: Optional[Exception] = None
        loaded = None
        if path is not None:
            try:
                self.manifest = read_manifest(path)
                loaded, self.rank_state = load(path, self.manifest, place.rank, place.world)
                self.resumed_from = path
            except (CheckpointError, ValueError, OSError) as error:
                problem = CheckpointError(f"checkpoint `{path}`: {error}")
        every = distributed.gather([_OK if problem is None else _FAILED, self.step])
        if problem is not None:
            raise problem
        if any(code != _OK for code, _ in every):
            raise CheckpointError("another rank could not load its checkpoint")
        if any(step != self.step for _, step in every):
            raise CheckpointError(f"the ranks do not resume alike: from steps {[step for _, step in every]}")
        signals.install()
        heartbeat.phase("train")
        return loaded

    def restore(self) -> int:
        """Loads `objects` and the random generators from `resume`; answers the step to go on after, 0 at a fresh start."""
        loaded = self.resume()
        if loaded is None:
            return 0
        for name, one in self.objects.items():
            if not isinstance(loaded, dict) or name not in loaded:
                raise CheckpointError(f"checkpoint `{self.resumed_from}` has no `{name}`")
            own = _unwrap(one)
            # A module copies into its own tensors; others keep what they are given, which is a view of a whole file.
            own.load_state_dict(loaded[name] if hasattr(own, "parameters") else _clone(loaded[name]))
        if isinstance(self.rank_state, dict) and "rng" in self.rank_state:
            rng.restore(self.rank_state["rng"])
        heartbeat.step(self.step, samples=self.samples or None)
        return self.step

    def resume_path(self) -> Optional[str]:
        """The folder to resume from, verified, for programs that read it themselves; None for a fresh start."""
        path = self._choose(self._join())
        if path is not None:
            self.manifest = verify(path)
            self.resumed_from = path
        return path

    # Saving

    def save(
        self,
        step: int,
        state: Any = None,
        *,
        rank_state: Any = None,
        samples: int = 0,
        epoch: int = 0,
        global_batch: int = 0,
        seed: int = 0,
        data: Optional[DataPosition] = None,
        model: Optional[Mapping[str, Any]] = None,
        must: bool = False,
    ) -> bool:
        """Saves a state as the checkpoint of `step`; answers whether it is committed.

        `state`: nested dictionaries, lists and tuples of tensors, arrays and plain values, the same on every rank;
        without it, `objects`. `rank_state`: this rank's own, such as its random generators. A failure that training can
        survive answers False and shows in the job's summary; with `must` (the last one) it raises.
        """
        manifest = Manifest(
            step=step, samples=samples, epoch=epoch, global_batch=global_batch, seed=seed, data=data or DataPosition(), model=dict(model) if model else None
        )
        if state is None:
            state = {name: _unwrap(one).state_dict() for name, one in self.objects.items()}
            rank_state = {"rng": rng.capture()} if rank_state is None else rank_state
        prepared: list[_Parts] = []

        def prepare(place: _Place) -> int:
            prepared.append(_Parts(state, rank_state))
            return states.fingerprint(prepared[0].leaves)

        return self._save(manifest, prepare, lambda place, draft: prepared[0].write(draft, place, self.share), must)

    def save_files(self, step: int, source: Union[str, "os.PathLike[str]"], *, samples: int = 0, must: bool = False) -> bool:
        """Commits copies of all regular files below `source` as the checkpoint of `step`, once all ranks have come here."""
        source = os.fspath(source)
        # Copies and no links: a program may write into its own files again, and a checkpoint must not change with them.
        return self._save(
            Manifest(step=step, samples=samples),
            lambda place: 0,
            lambda place, draft: _copy_files(source, draft) if place.rank == 0 else [],
            must,
        )

    def _save(self, manifest: Manifest, prepare: Callable[[_Place], int], write: Callable[[_Place, str], list[ManifestFile]], must: bool) -> bool:
        signals.install()
        signals.save_done()
        with heartbeat.in_phase("checkpoint"):
            try:
                self._save_together(manifest, prepare, write)
                problem: Optional[CheckpointError] = None
            except CheckpointError as error:
                problem = error
        if problem is None:
            heartbeat.save_worked()
            self._saved_step = manifest.step
            self._prune()
            return True
        heartbeat.save_failed(manifest.step, str(problem))
        if must or isinstance(problem, (Fenced, Refused)):
            raise problem
        print(f"rank {self._place.rank if self._place else 0}: {problem}; going on", file=sys.stderr, flush=True)
        return False

    def _save_together(self, manifest: Manifest, prepare: Callable[[_Place], int], write: Callable[[_Place, str], list[ManifestFile]]) -> None:
        place = self._join()
        manifest.job_id, manifest.attempt, manifest.world_size = place.env.job_id, place.attempt, place.world
        manifest.generation = place.env.generation or 0
        draft = os.path.join(place.folder, layout.draft_folder(manifest.step, place.attempt))

        def start() -> int:
            # What can not be saved is the program's fault, so it comes before what the disk says.
            alike = prepare(place)
            if place.rank == 0:
                begin(place.folder, manifest.step, place.attempt)
            return alike

        try:
            self._agree(manifest.step, "its start", start)
            self._agree(manifest.step, "a part", lambda: _write_note(draft, place.rank, write(place, draft)))
            self._agree(manifest.step, "the commit", lambda: _commit_parts(place, draft, manifest) if place.rank == 0 else None)
        except CheckpointError:
            if place.rank == 0:
                # What was written must not keep a full disk full.
                shutil.rmtree(draft, ignore_errors=True)
            raise

    def _agree(self, step: int, what: str, work: Callable[[], Optional[int]]) -> None:
        """Does this rank's part and hears how the others' went; the same kind of error on all of them."""
        code, alike = _OK, 0
        problem: Optional[Exception] = None
        try:
            alike = work() or 0
        except (Failed, Damage, OSError) as error:
            code, problem = _FAILED, error
        except Fenced as error:
            code, problem = _FENCED, error
        except (CheckpointError, TypeError, ValueError) as error:
            code, problem = _REFUSED, error
        every = distributed.gather([code, alike])
        worst = max(one[0] for one in every)
        if worst == _OK and any(one[1] != every[0][1] for one in every):
            raise Refused(f"checkpoint of step {step}: the ranks have different tensors; what differs belongs into rank_state")
        if worst == _OK:
            return
        where = next(rank for rank, one in enumerate(every) if one[0] == worst)
        text = f"checkpoint of step {step}: " + (str(problem) if problem is not None else f"{what} failed on rank {where}")
        if worst == _FENCED:
            fenced = problem if isinstance(problem, Fenced) else Fenced(self._place.attempt if self._place else 0, 0)
            fenced.args = (text,)
            raise fenced
        if worst == _REFUSED:
            refused = Refused("")
            refused.args = (text,)
            raise refused from problem
        raise CheckpointError(text) from problem

    # The loop

    def poll(self, step: int) -> tuple[bool, bool]:
        """Whether any rank was told to stop, and to save; the same answer on all ranks."""
        signals.install()
        if step % self.check_every:
            return False, False
        every = distributed.gather([int(signals.stop_requested()), int(signals.save_requested())])
        return any(stop for stop, _ in every), any(save for _, save in every)

    def should_stop(self, step: int) -> bool:
        """Whether any rank was told to end: save then, and call `exit_terminated`. The same answer on all ranks."""
        return self.poll(step)[0]

    def after_step(self, step: int, *, last: bool = False, **about: Any) -> bool:
        """After each update: saves when it is time, when it was asked for, and at the last step; answers whether it saved.

        After SIGTERM it saves and ends the program with exit code 143. `about`: what `save` takes.
        """
        stop, asked = self.poll(step)
        due = self.every_steps > 0 and step % self.every_steps == 0
        saved = self.save(step, **{"must": last or stop, **about}) if due or last or stop or asked else False
        if stop and not last:
            signals.exit_terminated(f"told to end: stopped after step {step}, saved")
        return saved

    # What both need

    def _join(self) -> _Place:
        """The folder and the attempt; alone, one more than any before, which fences off those that may still run."""
        if self._place is not None:
            return self._place
        env = Environment.read()
        rank, world = distributed.rank_and_world()
        folder = os.path.abspath(env.checkpoint_dir or self._folder)
        attempt = env.attempt
        if attempt is None:
            problem: Optional[CheckpointError] = None
            attempt = 0
            if rank == 0:
                try:
                    attempt = fence.fence(folder) + 1
                    fence.raise_fence(folder, attempt)
                    sweep_drafts(folder, attempt)
                except CheckpointError as error:
                    problem, attempt = error, 0
            attempt = distributed.gather([attempt])[0][0]
            if attempt == 0:
                raise problem or CheckpointError(f"rank 0 could not use `{folder}`")
        self._place = _Place(folder, attempt, rank, world, env)
        return self._place

    def _choose(self, place: _Place) -> Optional[str]:
        if place.env.resume_from is not None:
            return place.env.resume_from or None
        # One rank looks, since looking may move a damaged one away.
        step, problem = -1, None
        if place.rank == 0:
            try:
                chosen = choose.newest_verified(place.folder)
                step = chosen.manifest.step if chosen.manifest else -1
                for one in chosen.quarantined:
                    print(f"the checkpoint of step {one.step} is damaged and was put aside: {one.reason}", file=sys.stderr, flush=True)
            except CheckpointError as error:
                step, problem = -2, error
        step = distributed.gather([step])[0][0]
        if step == -2:
            raise problem or CheckpointError("rank 0 could not look for a checkpoint")
        return None if step == -1 else os.path.join(place.folder, layout.step_folder(step))

    def _prune(self) -> None:
        place = self._join()
        # Under an agent, the agent prunes.
        if place.rank == 0 and place.env.heartbeat_file is None:
            try:
                choose.prune(place.folder, self.keep)
            except CheckpointError as error:
                print(f"could not remove old checkpoints: {error}", file=sys.stderr, flush=True)


class _Parts:
    """A state on its way into files."""

    def __init__(self, state: Any, rank_state: Any) -> None:
        document, self.leaves = states.flatten(state)
        self.document = None if states.is_flat(state, self.leaves) else document
        self.rank_document, self.rank_leaves = states.flatten(rank_state)
        self.has_rank_state = rank_state is not None

    def write(self, draft: str, place: _Place, share: bool) -> list[ManifestFile]:
        """Writes this rank's share, durably."""
        owners = safetensors.share_out((one.nbytes for one in self.leaves.values()), place.world if share else 1)
        own = {name: one for (name, one), owner in zip(self.leaves.items(), owners) if owner == place.rank}
        files = []
        if own:
            files.append(_write_tensors(draft, f"part-{place.rank:05}-of-{place.world:05}.safetensors", own))
        if self.document is not None and place.rank == 0:
            files.append(_write_bytes(draft, STATE_NAME, states.to_json(self.document)))
        if self.has_rank_state:
            name = _rank_name(place.rank, place.world)
            files.append(_write_bytes(draft, f"{name}.json", states.to_json(self.rank_document)))
            if self.rank_leaves:
                files.append(_write_tensors(draft, f"{name}.safetensors", self.rank_leaves))
        return files


def load(path: str, manifest: Manifest, rank: int = 0, world: int = 1) -> tuple[Any, Any]:
    """The state of a checkpoint and this rank's own, every file verified as it is read."""
    tensors: dict[str, safetensors.Buffer] = {}
    forms: dict[str, str] = {}
    document = rank_document = None
    rank_tensors: dict[str, safetensors.Buffer] = {}
    own = _rank_name(rank, world)
    known = False
    for file in manifest.files:
        if file.name == STATE_NAME:
            document = (_document(path, file),)
        elif file.name == f"{own}.json":
            rank_document = (_document(path, file),)
        elif file.name == f"{own}.safetensors":
            rank_tensors = _tensors(path, file)[0]
        elif file.name.endswith(".safetensors") and not file.name.startswith("rank-"):
            known = True
            found, notes = _tensors(path, file)
            for name, tensor in found.items():
                if name in tensors:
                    raise ValueError(f"{file.name} has tensor `{name}`, which came twice")
                tensors[name], forms[name] = tensor, notes.get("format", "pt")
        else:
            verify_file(path, file)
    if document is None and not known:
        raise ValueError("it has no tensors and no state: another program wrote it")
    if document is None:
        state = {name: safetensors.restore(tensor, forms[name]) for name, tensor in sorted(tensors.items())}
    else:
        state = states.unflatten(document[0], _from(tensors))
    return state, states.unflatten(rank_document[0], _from(rank_tensors)) if rank_document else None


def _from(tensors: Mapping[str, safetensors.Buffer]) -> Callable[[str, str], Any]:
    def get(name: str, form: str) -> Any:
        if name not in tensors:
            raise ValueError(f"tensor `{name}` is missing")
        return safetensors.restore(tensors[name], form)

    return get


def _document(path: str, file: ManifestFile) -> Any:
    try:
        return states.from_json(bytes(read_file(path, file)))
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from None


def _tensors(path: str, file: ManifestFile) -> tuple[dict[str, safetensors.Buffer], dict[str, str]]:
    try:
        return safetensors.read(read_file(path, file))
    except safetensors.BadSafetensors as error:
        raise ValueError(f"{file.name}: {error}") from None


def _rank_name(rank: int, world: int) -> str:
    return f"rank-{rank:05}-of-{world:05}"


def _write_tensors(draft: str, name: str, leaves: Mapping[str, safetensors.Leaf]) -> ManifestFile:
    path = os.path.join(draft, name)
    with doing("write", path):
        fd = safetensors.write(path, leaves)
        try:
            # The disk writes while the chunks are hashed.
            described = describe_file(path)
            os.fsync(fd)
        finally:
            os.close(fd)
    return described


def _write_bytes(draft: str, name: str, content: bytes) -> ManifestFile:
    path = os.path.join(draft, name)
    with doing("write", path):
        write_synced(path, content)
    return describe_file(path)


def _note_name(rank: int) -> str:
    return f".part-{rank:05}.json"


def _write_note(draft: str, rank: int, files: list[ManifestFile]) -> None:
    path = os.path.join(draft, _note_name(rank))
    with doing("write", path), open(path, "w", encoding="utf-8") as file:
        json.dump([layout.file_to_json(one) for one in files], file)


def _commit_parts(place: _Place, draft: str, manifest: Manifest) -> None:
    """Reads every rank's note and removes it, since a checkpoint holds data and the manifest only; then commits."""
    files = []
    for rank in range(place.world):
        path = os.path.join(draft, _note_name(rank))
        with doing("read", path):
            with open(path, encoding="utf-8") as file:
                files += [ManifestFile(**one) for one in json.load(file)]
            os.unlink(path)
    manifest.files = sorted(files, key=lambda one: one.name)
    manifest.created_at = layout.now()
    commit(place.folder, draft, manifest)


def _copy_files(source: str, draft: str) -> list[ManifestFile]:
    files = []
    for folder, _, names in os.walk(source):
        for name in names:
            path = os.path.join(folder, name)
            target = os.path.join(draft, os.path.relpath(path, source).replace(os.sep, SLASH))
            with doing("copy", path):
                _copy(path, target)
            files.append(describe_file(target))
    return files


def _copy(path: str, target: str) -> None:
    with open(path, "rb") as source, open(target, "xb") as copy:
        rest = os.fstat(source.fileno()).st_size
        # Where the file system can, this shares the blocks.
        with contextlib.suppress(OSError, AttributeError):
            while rest > 0:
                done = os.copy_file_range(source.fileno(), copy.fileno(), rest)
                if done == 0:
                    break
                rest -= done
        if rest > 0:
            source.seek(0)
            copy.seek(0)
            shutil.copyfileobj(source, copy, 1 << 20)
        copy.flush()
        os.fsync(copy.fileno())


def _unwrap(one: Any) -> Any:
    """A model without its wrapper, so that names do not depend on how it is run."""
    while type(one).__name__ in ("DistributedDataParallel", "DataParallel", "OptimizedModule"):
        one = one.module if hasattr(one, "module") else one._orig_mod
    return one


def _clone(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _clone(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_clone, value))
    return value.clone() if hasattr(value, "clone") else value
