"""`python -m everlit inspect DIR` and `python -m everlit verify DIR`: of one checkpoint, or of a folder of them."""

from __future__ import annotations

import argparse
import os
import sys

from . import choose, safetensors
from .errors import CheckpointError, Damage
from .manifest import MANIFEST_NAME
from .checks import read_file, read_manifest, verify


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m everlit", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, about in (("inspect", "what is in it, and whether it is whole"), ("verify", "exit 0 when everything is whole, byte for byte")):
        verbs.add_parser(verb, help=about).add_argument("dir", help="a checkpoint, or a folder of checkpoints")
    args = parser.parse_args()
    try:
        found = [args.dir] if os.path.lexists(os.path.join(args.dir, MANIFEST_NAME)) else [one.path for one in choose.list_checkpoints(args.dir)]
        if not found:
            print(f"everlit: `{args.dir}` has no checkpoint", file=sys.stderr)
            return 1
        good = [(_inspect if args.verb == "inspect" else _verify)(path) for path in found]
    except CheckpointError as error:
        print(f"everlit: {error}", file=sys.stderr)
        return 1
    return 0 if all(good) else 1


def _verify(path: str) -> bool:
    try:
        manifest = verify(path)
    except Damage as damage:
        print(f"{path}: {damage}")
        return False
    print(f"{path}: step {manifest.step} is whole: {len(manifest.files)} files")
    return True


def _inspect(path: str) -> bool:
    if not _verify(path):
        return False
    manifest = read_manifest(path)
    owner = f"job {manifest.job_id or '-'}, attempt {manifest.attempt}, {manifest.world_size} ranks, {manifest.samples} samples, {manifest.created_at}"
    print(f"  {owner}")
    for file in manifest.files:
        print(f"  {file.name}  {file.bytes} bytes")
        if not file.name.endswith(".safetensors"):
            continue
        try:
            tensors, _ = safetensors.read(read_file(path, file))
        except safetensors.BadSafetensors as error:
            print(f"    not safetensors: {error}")
            continue
        for name, tensor in tensors.items():
            print(f"    {name}  {tensor.dtype} {list(tensor.shape)}")
    return True


if __name__ == "__main__":
    sys.exit(main())
