"""The peer of our step benchmark: the model of `everlit-worker` in PyTorch with DistributedDataParallel over Gloo.

Same mathematics, weights, data order, learning rates and optimizer as the Rust program, written as an expert would
without torch.compile: fused kernels, gradients as views of the buckets, one static graph. One process per rank, with
torchrun's variables. Rank 0 prints a line of JSON per step: the loss is the mean over the whole batch. On a GPU nothing waits for it
before the end: the lines come then, and one with the rate of the steps after `--warm`.
"""

import argparse
import hashlib
import json
import math
import os
import pathlib
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "worker/python"))

import everlit
from everlit import manager

VOCABULARY = 256
EPSILON = 1e-5
ROPE_BASE = 10_000.0
DECAY = 0.1
#: dim, layers, heads, heads of keys and values, hidden
PRESETS = {
    "llama-1m": (128, 4, 4, 2, 448),
    "llama-10m": (384, 6, 6, 2, 1024),
    "llama-30m": (512, 10, 8, 4, 1408),
    "llama-124m": (768, 19, 12, 6, 2048),
}
MASK = 2**64 - 1


def mix(z):
    """The finalizer of splitmix64, of one number or of an array."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def mix_array(z):
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def stream(seed, name):
    state = mix(seed)
    for byte in name.encode():
        state = (state ^ byte) * 0x100000001B3 & MASK
    return mix(state)


def child(own, number):
    return mix(own ^ mix(number))


class Permutation:
    """A shuffle of `0..length` that is computed: a Feistel network over the next even power of two, walked until inside."""

    def __init__(self, keys, length):
        self.length = length
        self.half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
        self.keys = [np.uint64(child(keys, number)) for number in range(6)]

    def at(self, indices):
        image = self.round_trip(indices)
        while (outside := image >= self.length).any():
            image[outside] = self.round_trip(image[outside])
        return image

    def round_trip(self, indices):
        half, mask = np.uint64(self.half_bits), np.uint64((1 << self.half_bits) - 1)
        left, right = indices >> half, indices & mask
        for key in self.keys:
            left, right = right, left ^ (mix_array(key + right * np.uint64(0x9E3779B97F4A7C15)) & mask)
        return (left << half) | right


class Corpus:
    """Text as samples: number k is place `k % windows` of the shuffle of epoch `k / windows`."""

    def __init__(self, path, length, seed):
        place = pathlib.Path(path)
        files = sorted(place.glob("*.txt")) if place.is_dir() else [place]
        texts = [np.fromfile(file, np.uint8) for file in files]
        self.length, self.seed, self.epoch, self.order = length, seed, None, None
        self.text = np.concatenate(texts)
        counts = [max(0, len(text) - 1) // length for text in texts]
        begins = np.cumsum([0] + [len(text) for text in texts])
        #: Where each window begins in the whole text.
        self.begins = np.concatenate([begin + length * np.arange(count) for begin, count in zip(begins, counts)])
        self.span = np.arange(length + 1)
        if len(self.begins) == 0:
            raise SystemExit(f"`{path}` has not even one sample of {length + 1} bytes")

    def read(self, numbers):
        numbers = np.asarray(numbers, np.uint64)
        epochs, places = np.divmod(numbers, np.uint64(len(self.begins)))
        windows = np.empty(len(numbers), np.uint64)
        for epoch in np.unique(epochs):
            if epoch != self.epoch:
                self.epoch = epoch
                self.order = Permutation(child(stream(self.seed, "data"), int(epoch)), len(self.begins))
            own = epochs == epoch
            windows[own] = self.order.at(places[own])
        return torch.from_numpy(self.text[self.begins[windows][:, None] + self.span].astype(np.int64))


class Layer(nn.Module):
    def __init__(self, dim, heads, kv_heads, hidden):
        super().__init__()
        self.heads, self.kv_heads, self.head, self.hidden = heads, kv_heads, dim // heads, hidden
        kv = kv_heads * self.head
        self.attention_norm = nn.RMSNorm(dim, EPSILON)
        self.qkv = nn.Linear(dim, dim + 2 * kv, bias=False)
        self.attention_output = nn.Linear(dim, dim, bias=False)
        self.feed_norm = nn.RMSNorm(dim, EPSILON)
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x, cos, sin):
        samples, length, dim = x.shape
        joined = self.qkv(self.attention_norm(x)).view(samples, length, -1, self.head).transpose(1, 2)
        # Queries and keys are turned together: they lie side by side.
        both, v = joined.split([self.heads + self.kv_heads, self.kv_heads], 1)
        both = both * cos + both.roll(self.head // 2, -1) * sin
        q, k = both.split([self.heads, self.kv_heads], 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.attention_output(mixed.transpose(1, 2).reshape(samples, length, dim))
        gate, up = self.gate_up(self.feed_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, preset, length):
        super().__init__()
        dim, layers, heads, kv_heads, hidden = PRESETS[preset]
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.layers = nn.ModuleList(Layer(dim, heads, kv_heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, EPSILON)
        self.output = nn.Linear(dim, VOCABULARY, bias=False)
        half = dim // heads // 2
        rates = torch.exp(torch.arange(half, dtype=torch.float64) * (-2.0 * math.log(ROPE_BASE) / (2 * half)))
        angles = torch.outer(torch.arange(length, dtype=torch.float64), rates).repeat(1, 2)
        sign = torch.cat([-torch.ones(half), torch.ones(half)]).double()
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", (angles.sin() * sign).float(), persistent=False)

    def forward(self, samples):
        """The mean cross entropy of the samples' own predictions."""
        x = self.embedding(samples[:, :-1])
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = self.output(self.norm(x))
        return F.cross_entropy(logits.view(-1, VOCABULARY), samples[:, 1:].reshape(-1))


def learning_rate(step, total, peak):
    """The rate of update `step` (from 0): a linear rise, then half a cosine down to a tenth of the peak."""
    rise = min(100, max(1, total // 10))
    if step < rise:
        return peak * (step + 1) / rise
    part = (step - rise) / max(1, total - rise)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * part)))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=PRESETS, default="llama-1m")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--total-steps", type=int, help="steps that the learning rate is planned for [default: where --steps ends]")
    parser.add_argument("--batch-size", type=int, default=16, help="samples per update, over all ranks")
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", required=True, help="a text file, or a folder of *.txt")
    parser.add_argument("--init", help="a checkpoint of everlit-worker to take weights, moments, step and samples from")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--warm", type=int, default=0, help="steps that the rate leaves out")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    on_gpu = args.device == "cuda"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = Llama(args.model, args.sequence_length).to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bfloat16")
    groups = [
        {"params": [one for one in model.parameters() if one.dim() > 1], "weight_decay": DECAY},
        {"params": [one for one in model.parameters() if one.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
    step, samples = 0, 0
    if args.init:
        step, samples = take(args.init, model, optimizer)
    corpus = Corpus(args.data, args.sequence_length, args.seed)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True, broadcast_buffers=False)
    parameters = list(model.parameters())
    end = step + args.steps
    total = args.total_steps or end
    own = np.arange(rank, args.batch_size, world)
    # The mean over ranks of this is the mean over samples, however they are dealt.
    weight = len(own) * world / args.batch_size
    warmed, kept = None, []
    while step < end:
        if step == end - args.steps + args.warm:
            finish(device)
            warmed = time.perf_counter()
        started = time.perf_counter()
        with autocast:
            loss = ddp(corpus.read(samples + own).to(device, non_blocking=True))
        (loss * weight if weight != 1 else loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, args.learning_rate)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        samples += args.batch_size
        seconds = time.perf_counter() - started
        # Outside the time: the peer shows its loss without another reduction.
        shown = (loss.detach() * weight / world).double()
        if on_gpu:
            kept.append((step, shown))
            continue
        dist.reduce(shown, 0)
        if rank == 0:
            print(json.dumps({"step": step, "loss": shown.item(), "seconds": seconds}), flush=True)
    finish(device)
    rate = (args.steps - args.warm) / (time.perf_counter() - warmed)
    for number, shown in kept:
        dist.reduce(shown, 0)
        if rank == 0:
            print(json.dumps({"step": number, "loss": shown.item()}), flush=True)
    digest = hashlib.sha256(b"".join(one.detach().cpu().numpy().tobytes() for one in parameters)).hexdigest()
    if rank == 0:
        print(json.dumps({"steps_per_second": rate}), flush=True)
        print(json.dumps({"parameters": sum(one.numel() for one in parameters), "weights_sha256": digest}), flush=True)
    dist.destroy_process_group()


def finish(device):
    """Waits for what is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take(path, model, optimizer):
    """Weights, moments, step and samples of a checkpoint."""
    manifest = everlit.read_manifest(path)
    state, _ = manager.load(path, manifest)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[f"model.{name}"])
            if manifest.step:
                moments = {"exp_avg": state[f"adamw.m.{name}"].clone().to(parameter.device), "exp_avg_sq": state[f"adamw.v.{name}"].clone().to(parameter.device)}
                optimizer.state[parameter] = {"step": torch.tensor(float(manifest.step), device=parameter.device), **moments}
    return manifest.step, manifest.samples


if __name__ == "__main__":
    main()
