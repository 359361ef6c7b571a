"""Recovery for PyTorch training scripts: heartbeats, verified checkpoints, and the manners of a rank under everlit.

Everything works alone, under torchrun and under the coordinator; only there heartbeats are written. Importing this
package imports neither torch nor numpy and starts nothing.
"""

from __future__ import annotations

from .distributed import DistributedContext, data_shards, distributed_context, output_file, reduce_metrics, stream_shards
from .errors import Busy, CheckpointError, Damage, Fenced, Failed, Refused
from .manager import CheckpointManager
from .manifest import Manifest
from .pulse import Heartbeat, heartbeat
from .errorfile import record
from .safetensors import Buffer
from .signals import EXIT_TERMINATED, exit_terminated, save_requested, stop_requested
from .checks import read_manifest, verify

__version__ = "0.1.0"

__all__ = [
    "EXIT_TERMINATED",
    "Buffer",
    "Busy",
    "CheckpointError",
    "CheckpointManager",
    "Damage",
    "DistributedContext",
    "Failed",
    "Fenced",
    "Heartbeat",
    "Manifest",
    "Refused",
    "data_shards",
    "distributed_context",
    "exit_terminated",
    "heartbeat",
    "output_file",
    "read_manifest",
    "record",
    "reduce_metrics",
    "save_requested",
    "stop_requested",
    "stream_shards",
    "verify",
]
