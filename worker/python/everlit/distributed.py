"""What a rank does together with the others: joining, agreeing, adding up. Alone, each of these is trivial.

Small agreements travel over a Gloo group on CPUs, also when the tensors' group is NCCL, so that they never wait for a
GPU. Every function here that says so must be called by all ranks, in the same order.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import zlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Iterator, Mapping, Optional, Sequence

from .environment import Environment
from .pulse import heartbeat

OPERATIONS = ("mean", "sum", "min", "max")

_control: Optional[tuple[Any, Any]] = None


@dataclass(frozen=True)
class DistributedContext:
    """This rank's place."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int
    #: `cuda:N` or `cpu`.
    device: str
    #: `nccl` or `gloo`.
    backend: str

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


@contextlib.contextmanager
def distributed_context(
    backend: Optional[str] = None, device: Optional[str] = None, timeout: Optional[timedelta] = None
) -> Iterator[DistributedContext]:
    """Joins the process group of torch, and leaves it at the end. A program alone gets a group of one.

    Without `device`, a rank takes the GPU of its local rank if there is one, else the CPU; without `backend`, NCCL on
    GPUs and Gloo on CPUs.
    """
    import torch
    import torch.distributed as torch_distributed

    dist: Any = torch_distributed
    env = Environment.read()
    heartbeat.phase("init")
    if device is None:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = f"cuda:{env.local_rank % gpus}" if gpus else "cpu"
    if backend is None:
        backend = "nccl" if device.startswith("cuda") else "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    address, port = os.environ.get("MASTER_ADDR") or "127.0.0.1", int(os.environ.get("MASTER_PORT") or 0)
    if address in ("127.0.0.1", "localhost"):
        # Gloo would take the address of the host's name, which need not be there.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    more: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    if env.world_size == 1:
        more.update(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(backend, **more)
    try:
        yield DistributedContext(env.rank, env.local_rank, env.world_size, env.local_world_size, address, port, device, backend)
    except SystemExit:
        leave()
        raise
    # After any other exception the ranks may be anywhere, and leaving together is not possible.
    leave()


def leave() -> None:
    """Leaves the process group, if one was joined. All ranks call it."""
    global _control
    _control = None
    dist = _dist()
    if dist is not None:
        dist.destroy_process_group()


def data_shards() -> list[str]:
    """This rank's shards, in order, as the job gave them; none when it gave none, or without the coordinator."""
    path = Environment.read().data_shards
    if path is None:
        return []
    with open(path, encoding="utf-8") as file:
        return [line for line in file.read().split("\n") if line]


def stream_shards(ahead: int = 2) -> Iterator[str]:
    """This rank's shards, in order, each once it is on this node; so many more are asked for ahead. Open a path before the next is taken."""
    feed, shards = Environment.read().shard_feed, data_shards()
    for index, path in enumerate(shards):
        if feed is not None:
            for later in shards[index + 1 : index + 1 + ahead]:
                _ask(feed, os.path.basename(later))
            _wait_for(feed, path)
        yield path


@contextlib.contextmanager
def output_file(shard: str, suffix: str = "") -> Iterator[str]:
    """Where to write what becomes of a shard, in a job of kind preprocess; what was written is stored when the block ends without an exception.
    The output's name is the shard's with `suffix` (at most 40 characters, no `/`) after it."""
    folder = Environment.read().output_dir
    if folder is None:
        raise RuntimeError("EVERLIT_OUTPUT_DIR is not set: this is for jobs of kind preprocess, with a command that has no {input}")
    if "/" in suffix or len(suffix) > 40:
        raise ValueError(f"suffix is `{suffix}`, which must have at most 40 characters and no `/`")
    place = os.path.join(folder, os.path.basename(shard) + suffix)
    draft = f"{place}.tmp"
    try:
        yield draft
        os.rename(draft, place)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
        raise


def _ask(feed: str, line: str) -> None:
    # Without an agent nobody has the other end, and opening must not wait for one; what is needed is asked for again.
    with contextlib.suppress(OSError):
        pipe = os.open(os.path.join(feed, "want"), os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(pipe, f"{line}\n".encode())
        finally:
            os.close(pipe)


def _wait_for(feed: str, path: str) -> None:
    asked = float("-inf")
    while not os.path.exists(path):
        with contextlib.suppress(FileNotFoundError):
            with open(f"{path}.error", encoding="utf-8") as why:
                raise RuntimeError(why.read())
        if time.monotonic() - asked >= 1.0:
            _ask(feed, f"!{os.path.basename(path)}")
            asked = time.monotonic()
        time.sleep(0.01)


def reduce_metrics(metrics: Mapping[str, Any], op: str = "mean") -> dict[str, float]:
    """The same numbers over all ranks (`mean`, `sum`, `min` or `max`), by one reduction in float64. All ranks call it."""
    if op not in OPERATIONS:
        raise ValueError(f"op is `{op}`, not one of {', '.join(OPERATIONS)}")
    names = sorted(metrics)
    values = [float(metrics[name]) for name in names]
    group = control()
    if group is None:
        return {name: value for name, value in zip(names, values)}
    dist, handle = group
    import torch

    # The last number tells whether all ranks gave the same names.
    own = float(zlib.crc32("\0".join(names).encode()))
    operations = {"mean": dist.ReduceOp.SUM, "sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}
    tensor = torch.tensor([*values, own], dtype=torch.float64)
    dist.all_reduce(tensor, operations[op], group=handle)
    world = dist.get_world_size()
    *reduced, check = tensor.tolist()
    if check != (own * world if op in ("mean", "sum") else own):
        raise ValueError("the ranks reduce metrics of different names")
    return {name: value / world if op == "mean" else value for name, value in zip(names, reduced)}


def gather(numbers: Sequence[int]) -> list[list[int]]:
    """Every rank's numbers (signed, 64 bits, as many on each), in rank order. All ranks call it."""
    group = control()
    if group is None:
        return [list(numbers)]
    dist, handle = group
    import torch

    own = torch.tensor(numbers, dtype=torch.int64)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own, group=handle)
    return [one.tolist() for one in every]


def rank_and_world() -> tuple[int, int]:
    """This rank and how many there are, of the process group that was joined."""
    dist = _dist()
    if dist is not None:
        return dist.get_rank(), dist.get_world_size()
    env = Environment.read()
    if env.world_size > 1:
        raise RuntimeError(f"WORLD_SIZE is {env.world_size}, but torch.distributed is not initialised: join the process group first")
    return 0, 1


def control() -> Optional[tuple[Any, Any]]:
    """torch.distributed and the group of small agreements; None alone. All ranks call it."""
    global _control
    _, world = rank_and_world()
    if world == 1:
        return None
    dist = _dist()
    # By the default group: a program may leave it and join another one.
    default = dist.group.WORLD
    if _control is None or _control[0] is not default:
        _control = (default, default if "gloo" in str(dist.get_backend()) else dist.new_group(backend="gloo"))
    return dist, _control[1]


def _dist() -> Any:
    torch = sys.modules.get("torch")
    dist = getattr(torch, "distributed", None)
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None
