"""What a rank is told by its environment: torchrun's variables and everlit's. A program alone has none and is rank 0 of 1."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class Environment:
    """A rank's place in its gang, and the paths that it was given."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    #: Empty when running alone.
    job_id: str
    #: From 1; None without the agent.
    attempt: Optional[int]
    generation: Optional[int]
    heartbeat_file: Optional[str]
    checkpoint_dir: Optional[str]
    #: The agent's choice; empty is its word that there is nothing to resume from; None without the agent.
    resume_from: Optional[str]
    #: The file that lists this rank's shards.
    data_shards: Optional[str]
    #: The folder where shards of a store are asked for.
    shard_feed: Optional[str]
    #: The folder where outputs of a preprocessing job go.
    output_dir: Optional[str]

    @staticmethod
    def read() -> "Environment":
        """From `os.environ`; empty variables count as unset, but for `EVERLIT_RESUME_FROM`."""
        rank, world = _number("RANK") or 0, _number("WORLD_SIZE") or 1
        if rank >= world:
            raise ValueError(f"RANK is {rank}, but WORLD_SIZE is {world}")
        local = _number("LOCAL_RANK")
        return Environment(
            rank=rank,
            local_rank=rank if local is None else local,
            world_size=world,
            local_world_size=_number("LOCAL_WORLD_SIZE") or world,
            job_id=os.environ.get("EVERLIT_JOB_ID", ""),
            attempt=_number("EVERLIT_ATTEMPT"),
            generation=_number("EVERLIT_GENERATION"),
            heartbeat_file=os.environ.get("EVERLIT_HEARTBEAT_FILE") or None,
            checkpoint_dir=os.environ.get("EVERLIT_CHECKPOINT_DIR") or None,
            resume_from=os.environ.get("EVERLIT_RESUME_FROM"),
            data_shards=os.environ.get("EVERLIT_DATA_SHARDS") or None,
            shard_feed=os.environ.get("EVERLIT_SHARD_FEED") or None,
            output_dir=os.environ.get("EVERLIT_OUTPUT_DIR") or None,
        )


def _number(name: str) -> Optional[int]:
    text = os.environ.get(name, "").strip()
    if text and not text.isdigit():
        raise ValueError(f"{name} is `{text}`, not a number")
    return int(text) if text else None
