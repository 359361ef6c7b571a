"""`MANIFEST.json`, format 1, and the names of a checkpoint folder.

A reader ignores fields that it does not know and refuses a format that it does not know. Types are checked as strictly
as the Rust programs do, so that both accept the same texts.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass, field
from typing import Any, Optional

MANIFEST_NAME = "MANIFEST.json"
MANIFEST_FORMAT = 1
CHUNK_BYTES = 4 * 1024 * 1024
#: A larger manifest is refused unread.
MANIFEST_BYTES_MAX = 64 * 1024 * 1024
QUARANTINE = "quarantine"
REASON_NAME = "REASON"

#: Stands for the manifest's own checksum while that is computed.
NO_SHA256 = "0" * 64

U32_MAX, U64_MAX = 2**32 - 1, 2**64 - 1


class BadManifest(ValueError):
    """The text is not a manifest of format 1."""


class UnknownFormat(ValueError):
    """The text says that it is of another format."""

    def __init__(self, format: int) -> None:
        super().__init__(f"format {format}")
        self.format = format


@dataclass
class ManifestFile:
    """One file of a checkpoint: plain name, exact length, length of a chunk, hex sha256 per chunk."""

    name: str
    bytes: int
    chunk_bytes: int
    sha256: list[str]


@dataclass
class DataPosition:
    """Where in which data: hex sha256 over the ordered list of shards (or empty), samples consumed in this epoch."""

    listing_sha256: str = ""
    cursor: int = 0


@dataclass
class Manifest:
    """What a checkpoint is and what it must contain, byte for byte."""

    step: int
    attempt: int = 1
    job_id: str = ""
    generation: int = 0
    epoch: int = 0
    world_size: int = 0
    global_batch: int = 0
    samples: int = 0
    seed: int = 0
    data: DataPosition = field(default_factory=DataPosition)
    #: `{"family": text, "config": anything}`, or None.
    model: Optional[dict[str, Any]] = None
    created_at: str = ""
    files: list[ManifestFile] = field(default_factory=list)
    format: int = MANIFEST_FORMAT

    def to_json(self) -> bytes:
        """The file's text, its own checksum among it."""
        text = self._to_json(NO_SHA256)
        return self._to_json(hashlib.sha256(text).hexdigest())

    def _to_json(self, sha256: str) -> bytes:
        document = {
            "format": self.format,
            "job_id": self.job_id,
            "attempt": self.attempt,
            "generation": self.generation,
            "step": self.step,
            "epoch": self.epoch,
            "world_size": self.world_size,
            "global_batch": self.global_batch,
            "samples": self.samples,
            "seed": self.seed,
            "data": {"listing_sha256": self.data.listing_sha256, "cursor": self.data.cursor},
            "model": self.model,
            "created_at": self.created_at,
            "files": [file_to_json(file) for file in self.files],
            "manifest_sha256": sha256,
        }
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False).encode()


def file_to_json(file: ManifestFile) -> dict[str, Any]:
    """One entry of `files`."""
    return {"name": file.name, "bytes": file.bytes, "chunk_bytes": file.chunk_bytes, "sha256": file.sha256}


def parse(text: bytes) -> Manifest:
    """Reads and checks a manifest's text."""
    try:
        value = json.loads(text.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise BadManifest(str(error) or "nested too deep") from None
    if not isinstance(value, dict):
        raise BadManifest("it is not an object")
    # The format comes first: another format may have none of our fields.
    format = _count(value, "format", U64_MAX)
    if format != MANIFEST_FORMAT:
        raise UnknownFormat(format)
    data = _object(value.get("data", {}), "data")
    files = value.get("files")
    if not isinstance(files, list):
        raise BadManifest("`files` is missing or not a list")
    manifest = Manifest(
        job_id=_text(value, "job_id", ""),
        attempt=_count(value, "attempt", U32_MAX),
        generation=_count(value, "generation", U32_MAX, 0),
        step=_count(value, "step", U64_MAX),
        epoch=_count(value, "epoch", U64_MAX, 0),
        world_size=_count(value, "world_size", U32_MAX, 0),
        global_batch=_count(value, "global_batch", U64_MAX, 0),
        samples=_count(value, "samples", U64_MAX, 0),
        seed=_count(value, "seed", U64_MAX, 0),
        data=DataPosition(_text(data, "listing_sha256", ""), _count(data, "cursor", U64_MAX, 0)),
        model=_model(value.get("model")),
        created_at=_time(value),
        files=[_file(file) for file in files],
    )
    _check_sum(value.get("manifest_sha256"), manifest, text)
    check_files(manifest.files)
    return manifest


def _check_sum(sha256: Any, manifest: Manifest, text: bytes) -> None:
    """Whether the text is the one that was written. Other programs' manifests, which have no model, need not say."""
    if sha256 is None:
        if manifest.model is not None:
            raise BadManifest("it has no checksum of its own")
        return
    if not isinstance(sha256, str) or len(sha256.encode("utf-8", "replace")) != len(NO_SHA256) or sha256.encode("utf-8", "replace") not in text:
        raise BadManifest("its own checksum can not be read")
    if hashlib.sha256(text.replace(sha256.encode(), NO_SHA256.encode(), 1)).hexdigest() != sha256:
        raise BadManifest("it has another sha256 than it says")


def check_files(files: list[ManifestFile]) -> None:
    """What must hold of a manifest's list of files, wherever it comes from."""
    if not files:
        raise BadManifest("it names no file")
    names = set()
    for file in files:
        shown = file.name.encode("unicode_escape").decode()
        if not is_plain_name(file.name):
            raise BadManifest(f"`{shown}` is not a plain file name")
        if file.name in names:
            raise BadManifest(f"`{shown}` is named twice")
        names.add(file.name)
        if file.chunk_bytes == 0 or len(file.sha256) != chunks(file.bytes, file.chunk_bytes):
            raise BadManifest(f"`{shown}` has a wrong number of chunks")


def is_plain_name(name: str) -> bool:
    """Whether a name stays inside its folder, and is not the manifest's or a hidden file's."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return False
    plain = all(c not in "/\\" and unicodedata.category(c) != "Cc" for c in name)
    return 0 < length <= 255 and not name.startswith(".") and name != MANIFEST_NAME and plain


def chunks(length: int, chunk_bytes: int) -> int:
    """Chunks of a file; an empty file has one, of nothing."""
    return max(1, -(-length // chunk_bytes))


def step_folder(step: int) -> str:
    """The folder's name for a step: twelve digits, so that names sort like steps."""
    return f"step-{step:012d}"


def folder_step(name: str) -> Optional[int]:
    """The step of a folder's name, if it is one; each step has one spelling."""
    match = re.fullmatch(r"step-([0-9]+)", name)
    if not match or int(match[1]) > U64_MAX or step_folder(int(match[1])) != name:
        return None
    return int(match[1])


def draft_folder(step: int, attempt: int) -> str:
    """The draft's name; attempt 0 marks what is being removed."""
    return f".draft-{step_folder(step)}-a{attempt}"


def draft_attempt(name: str) -> Optional[int]:
    """The attempt of a draft's name, if it is one."""
    match = re.fullmatch(r"\.draft-(step-[0-9]+)-a([0-9]+)", name)
    return int(match[2]) if match and folder_step(match[1]) is not None and int(match[2]) <= U32_MAX else None


def now() -> str:
    """Wall time in UTC with milliseconds."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("duplicate field")
    return value


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadManifest(f"`{name}` is not an object")
    return value


def _count(value: dict[str, Any], name: str, most: int, default: Optional[int] = None) -> int:
    number = value.get(name, default)
    if number is None:
        raise BadManifest(f"missing field `{name}`" if name not in value else f"`{name}` is null")
    if type(number) is not int or not 0 <= number <= most:
        raise BadManifest(f"`{name}` is not a whole number from 0 to {most}")
    return number


def _text(value: dict[str, Any], name: str, default: Optional[str] = None) -> str:
    text = value.get(name, default)
    if not isinstance(text, str):
        raise BadManifest(f"`{name}` is missing or not a text")
    return text


def _time(value: dict[str, Any]) -> str:
    text = _text(value, "created_at")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d([.,]\d+)?(Z|[+-]\d\d(:?\d\d)?)", text, re.IGNORECASE):
        raise BadManifest("`created_at` is not a time")
    return text


def _model(value: Any) -> Optional[dict[str, Any]]:
    if value is None:
        return None
    if "config" not in _object(value, "model"):
        raise BadManifest("`model` has no `config`")
    return {"family": _text(value, "family"), "config": value["config"]}


def _file(value: Any) -> ManifestFile:
    entry = _object(value, "files")
    sha256 = entry.get("sha256")
    if not isinstance(sha256, list) or not all(isinstance(one, str) for one in sha256):
        raise BadManifest("`sha256` is missing or not a list of texts")
    return ManifestFile(_text(entry, "name"), _count(entry, "bytes", U64_MAX), _count(entry, "chunk_bytes", U64_MAX), sha256)
