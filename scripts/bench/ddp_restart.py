"""A plain PyTorch script as people write them: DistributedDataParallel over Gloo, its own torch.save every 20 steps, nothing of everlit in it.

Takes everything else from torchrun's variables. After each step a rank leaves its process id and the step in FOLDER/rank-N.
"""

import os
import pathlib
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

SAVE_EVERY = 20
WINDOW = 128


class Model(nn.Module):
    def __init__(self, dim=128, layers=4):
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(dim, 256)
        self.mask = nn.Transformer.generate_square_subsequent_mask(WINDOW)

    def forward(self, tokens):
        return self.head(self.layers(self.embed(tokens), mask=self.mask, is_causal=True))


def main():
    folder = pathlib.Path(sys.argv[1])
    text = torch.frombuffer(bytearray(pathlib.Path(sys.argv[2]).read_bytes()), dtype=torch.uint8)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    model = DistributedDataParallel(Model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    first, checkpoint = 0, folder / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step in range(first + 1, 1_000_000):
        chance = torch.Generator().manual_seed(step * world + rank)
        at = torch.randint(len(text) - WINDOW - 1, (8,), generator=chance)
        batch = torch.stack([text[i : i + WINDOW + 1] for i in at.tolist()]).long()
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and step % SAVE_EVERY == 0:
            torch.save({"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, folder / "checkpoint.new")
            os.replace(folder / "checkpoint.new", checkpoint)
        print(f"step={step} loss={loss.item():.4f}", flush=True)
        (folder / f"rank-{rank}.new").write_text(f"{os.getpid()} {step}")
        os.replace(folder / f"rank-{rank}.new", folder / f"rank-{rank}")


main()
