"""A small character model in plain PyTorch with DistributedDataParallel. The five lines that everlit asks for are numbered.

Alone: `python train.py`. With torchrun: `torchrun --nproc-per-node 2 train.py`. With recovery:
`everlit submit --world-size 2 -- python train.py`.
"""

import argparse
import os
import pathlib
import shutil

import torch
import torch.distributed as dist
from torch import nn

import everlit  # 1


class CharModel(nn.Module):
    """The next byte from those before, by a small causal transformer."""

    def __init__(self, length, dim=64, layers=2, heads=4):
        super().__init__()
        self.embedding = nn.Embedding(256, dim)
        self.position = nn.Parameter(torch.zeros(length, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.output = nn.Linear(dim, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, inputs):
        return self.output(self.layers(self.embedding(inputs) + self.position, mask=self.mask, is_causal=True))


def read_text(path):
    """The bytes of a text file, or of a folder's *.txt; without a path, of the sample text beside the everlit programs."""
    program = shutil.which("everlit")
    repository = pathlib.Path(__file__).resolve().parents[3]
    beside = [os.environ.get("EVERLIT_BIN"), program and pathlib.Path(program).resolve().parent, repository / "target/release"]
    places = [path] if path else [pathlib.Path(folder) / "sample-text" for folder in beside if folder]
    place = next((pathlib.Path(one) for one in places if pathlib.Path(one).exists()), None)
    if place is None:
        raise SystemExit("no text: give --data, or run scripts/fetch-sample-text.sh")
    files = sorted(place.glob("*.txt")) if place.is_dir() else [place]
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def batch_of(text, length, count, seed):
    """Random windows: a function of the seed alone, so that a step that is done again sees the same text."""
    starts = torch.randint(len(text) - length - 1, (count,), generator=torch.Generator().manual_seed(seed))
    windows = torch.stack([text[start : start + length + 1] for start in starts]).long()
    return windows[:, :-1], windows[:, 1:]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", help="a text file, or a folder of *.txt")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32, help="samples per update, over all ranks")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--save-every", type=int, default=50)
    args = parser.parse_args()

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    text = read_text(args.data)
    model = nn.parallel.DistributedDataParallel(CharModel(args.length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)

    objects = {"model": model, "optimizer": optimizer, "schedule": schedule}
    checkpoints = everlit.CheckpointManager("checkpoints", objects=objects, every_steps=args.save_every)  # 2
    start = checkpoints.restore()  # 3
    print(f"rank {rank} of {world}: starting at step {start}", flush=True)
    for step in range(start + 1, args.steps + 1):
        inputs, targets = batch_of(text, args.length, args.batch_size // world, seed=step * world + rank)
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        everlit.heartbeat.step(step, args.steps, loss=loss, lr=schedule.get_last_lr()[0])  # 4
        checkpoints.after_step(step, last=step == args.steps)  # 5
        if rank == 0 and step % 20 == 0:
            print(f"step={step}/{args.steps} loss={loss.item():.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
