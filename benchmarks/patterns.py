"""Patterns for images and video, biases and spread attention, timed against PyTorch's fused dense attention.

    python -m benchmarks.patterns [--only bias,neighborhood,grids,balance] [--device cuda] [--out FILE]
    torchrun --nproc-per-node 2 -m benchmarks.patterns --only ranks --device cuda

`balance` only plans and needs no device; `ranks` runs plans on several. `--small` divides every grid, to prove the command anywhere; its
times say nothing.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from foveal.distributed import Task, attend_planned, context_parallel, plan_attention
from foveal.patterns.blocks import attend_grid
from foveal.patterns.draft import draft_attention, draft_map, draft_scores, patch_blocks
from foveal.patterns.flash_bias import alibi, alibi_slopes, biased_attention
from foveal.patterns.grat import criss_cross, grat_attention, group_blocks, surrounding
from foveal.patterns.neighborhood import TILES, Neighborhood, neighborhood_attention, simulate
from foveal.patterns.rectified import critical_blocks, hilbert_blocks, implicit_attention, rectified_attention

from .record import save

FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


def timed(calls: dict[str, Callable[[], object]], device: str, rounds: int = 5) -> dict[str, dict[str, float]]:
    """Median, least and largest milliseconds of each call; the calls take turns."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        if dist.is_initialized():  # the slowest rank counts
            dist.barrier()

    times: dict[str, list[float]] = {name: [] for name in calls}
    for n in range(rounds + 1):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            if n:  # the first is for warming up
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: {"ms": statistics.median(t), "least": min(t), "largest": max(t)} for name, t in times.items()}


def fused(q, k, v, mask=None):
    """Dense attention by the first backend of `FUSED` that takes it; a mask is materialised."""
    with sdpa_kernel(FUSED, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def draw(heads: int, length: int, width: int, device: str) -> list[torch.Tensor]:
    """Random queries, keys and values."""
    return [torch.randn(1, heads, length, width, device=device, dtype=DTYPES[device]) for _ in range(3)]


@torch.no_grad()
def bias(device: str, small: bool) -> Iterator[dict]:
    """FlashBias with ALiBi, without a causal order, against the same bias as a tensor."""
    for length in (256,) if small else (1024, 4096, 16384):
        q, k, v = draw(16, length, 64, device)
        slopes = alibi_slopes(16)
        pair = alibi(length, length, slopes, device=device)
        whole = (pair[0] @ pair[1].mT).to(q.dtype)
        calls = {
            "factors": lambda q=q, k=k, v=v, pair=pair: biased_attention(q, k, v, pair)[0],
            "bias as a tensor": lambda q=q, k=k, v=v, whole=whole: fused(q, k, v, whole),
            "no bias": lambda q=q, k=k, v=v: fused(q, k, v),
        }
        yield {
            "length": length,
            "bias_bytes": whole.nbytes,
            "factor_bytes": sum(p.nbytes for p in pair),
            **timed(calls, device),
        }


@torch.no_grad()
def neighborhood(device: str, small: bool) -> Iterator[dict]:
    """The published shapes of Generalized Neighborhood Attention beside their simulator."""
    shapes = [
        (Neighborhood((32768,), 2048), 24),
        (Neighborhood((32768,), 2048, 256), 24),
        (Neighborhood((256, 256), 80, 1), 24),
        (Neighborhood((256, 256), 80, 16), 24),
        (Neighborhood((30, 48, 80), (18, 24, 24), (16, 8, 8)), 24),
    ]
    if small:
        shapes = [(Neighborhood((512,), 128, 128), 2), (Neighborhood((16, 32), 16, 1), 2)]
    for hood, heads in shapes:
        length = int(torch.tensor(hood.shape).prod())
        q, k, v = draw(heads, length, 128, device)
        work = simulate(hood, TILES[len(hood.shape)], TILES[len(hood.shape)])
        calls = {
            "neighborhood": lambda q=q, k=k, v=v, hood=hood: neighborhood_attention(q, k, v, hood)[0],
            "dense": lambda q=q, k=k, v=v: fused(q, k, v),
        }
        row = {"shape": hood.shape, "window": hood.window, "stride": hood.stride, "block_sparse": work.block_sparse}
        yield {**row, "simulated": work.speedup, "bound": work.bound, **timed(calls, device, rounds=3)}


@torch.no_grad()
def grids(device: str, small: bool) -> Iterator[dict]:
    """GRAT on images, DraftAttention and Rectified SpaAttn on a video; choosing is part of the time."""
    image, video = ((64, 64), (3, 16, 32)) if small else ((512, 512), (33, 48, 80))
    heads = 2 if small else 24
    q, k, v = draw(heads, image[0] * image[1], 128, device)
    groups = group_blocks(image)
    cross, around = (m.float().mean().item() for m in (criss_cross(groups), surrounding(groups)))
    calls = {
        "grat, criss-cross": lambda: grat_attention(q, k, v, image)[0],
        "grat, surrounding": lambda: grat_attention(q, k, v, image, region="around")[0],
        "dense": lambda: fused(q, k, v),
    }
    yield {"grid": image, "density": cross, "density, grat, surrounding": around, **timed(calls, device, rounds=3)}

    q, k, v = draw(heads, video[0] * video[1] * video[2], 128, device)
    patches = patch_blocks(video, device=device)
    chosen = draft_map(draft_scores(q, k, patches), sparsity=0.9)
    calls = {"draft, sparsity 0.9": lambda: draft_attention(q, k, v, video)[0], "dense": lambda: fused(q, k, v)}
    yield {"grid": video, "density": chosen.float().mean().item(), **timed(calls, device, rounds=3)}

    runs = hilbert_blocks(video).to(device)

    def rectified():
        shares = implicit_attention(q, k, runs)
        return rectified_attention(q, k, v, runs, critical_blocks(shares), shares=shares)

    chosen = critical_blocks(implicit_attention(q, k, runs))
    calls = {
        "rectified, drop 0.8": rectified,
        "the same blocks alone": lambda: attend_grid(q, k, v, runs, chosen)[0],
        "dense": lambda: fused(q, k, v),
    }
    yield {"grid": video, "density": chosen.float().mean().item(), **timed(calls, device, rounds=3)}


def documents(ranks: int, tokens: int, seed: int) -> list[list[int]]:
    """As many tokens on each rank, in documents of log-normal length (median 2,048, sigma 1.5) cut at the rank's end."""
    rng, found = random.Random(seed), []
    for _ in range(ranks):
        left, some = tokens, []
        while left:
            some.append(min(left, max(1, int(rng.lognormvariate(7.6, 1.5)))))
            left -= some[-1]
        found.append(some)
    return found


def balance(device: str, small: bool) -> Iterator[dict]:
    """Unevenness and bytes of core attention disaggregation and of plain context parallelism, planned and not run."""
    for ranks in (8,) if small else (8, 16, 32, 64):
        lengths = documents(ranks, 131_072, seed=ranks)
        start = time.perf_counter()
        plan = plan_attention(lengths, block=128)
        seconds = time.perf_counter() - start
        found = {
            "own documents": plan.before,
            "planned": plan.after,
            "context parallel": context_parallel(lengths),
            "context parallel, zigzag": context_parallel(lengths, zigzag=True),
        }
        rows = {name: {"max over mean": b.unevenness, "GB sent": b.bytes / 1e9} for name, b in found.items()}
        yield {"ranks": ranks, "tokens a rank": 131_072, "planning_s": seconds, **rows}


@torch.no_grad()
def ranks(device: str, small: bool) -> Iterator[dict]:
    """One long document on rank 0, short ones elsewhere: planned over all ranks, and each its own; forward, one layer."""
    count, rank = dist.get_world_size(), dist.get_rank()
    tokens = 512 if small else 65_536
    lengths = [[tokens]] + [[tokens // 16] * 16] * (count - 1)
    q, k, v = (torch.randn(1, h, tokens, 128, device=device, dtype=DTYPES[device]) for h in (32, 8, 8))
    plan = plan_attention(lengths, block=128)
    numbered = list(enumerate(plan.documents))
    own = tuple(tuple(Task(n, 0, d.length) for n, d in numbered if d.rank == r) for r in range(count))
    alone = replace(plan, tasks=own)
    calls = {
        "planned": lambda: attend_planned(q, k, v, plan),
        "own documents": lambda: attend_planned(q, k, v, alone),
    }
    largest = (calls["planned"]() - calls["own documents"]()).abs().max().item()
    found = timed(calls, device)
    if rank == 0:
        yield {"ranks": count, "largest_difference": largest, "unevenness": alone.after.unevenness, **found}


PARTS = {"bias": bias, "neighborhood": neighborhood, "grids": grids, "balance": balance, "ranks": ranks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="bias,neighborhood,grids,balance")
    parser.add_argument("--device", choices=list(DTYPES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if "ranks" in options.only.split(","):
        if options.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    torch.manual_seed(0)
    result: dict[str, list[dict]] = {}
    for name in options.only.split(","):
        result[name] = []
        for row in PARTS[name](options.device, options.small):
            result[name].append(row)
            print(name, row, flush=True)
            if options.out is not None:
                save(options.out, result)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
