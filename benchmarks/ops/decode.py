"""Decode attention over pages: bandwidth, against dense kernels of PyTorch on contiguous keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from foveal.ops.formats import encode
from foveal.ops.paged_attention import _torch, attend_ragged, page_logits
from foveal.ops.pages import Pages
from foveal.ops.ragged import Logit
from foveal.ops.recent import Recent

from .timing import graph_us, relative_error

KV_HEADS, GROUP, DIM, SIZE = 8, 4, 128, 32


def pages_of(
    lengths: list[int], dim: int = DIM, *, dtype=torch.bfloat16, format: str | None = None, seed: int = 0
) -> Pages:
    """Rows of these lengths whose pages lie in random order."""
    g = torch.Generator().manual_seed(seed)
    counts = [-(-n // SIZE) for n in lengths]
    total = sum(counts)
    order, table, used = torch.randperm(total, generator=g).to(torch.int32), torch.zeros(len(lengths), max(counts)), 0
    table = table.to(torch.int32)
    for row, n in enumerate(counts):
        table[row, :n] = order[used : used + n]
        used += n
    stored = {name: torch.randn(total, SIZE, dim, device="cuda", dtype=dtype) for name in ("key", "value")}
    if format is not None:
        for name in ("key", "value"):
            stored[name], stored[name + "_scale"] = encode(stored[name], format)
    length = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    return Pages(table=table.cuda(), length=length, bound=max(lengths), format=format, **stored)


def grid() -> Iterator[dict]:
    """Errors of the kernel against float32 softmax attention over the same numbers, over shapes, types and options."""
    torch.manual_seed(0)
    shapes = [(dim, group, torch.bfloat16) for dim in (64, 96, 256) for group in (1, 4, 9)]
    shapes += [(128, group, torch.bfloat16) for group in (1, 3, 4, 7, 8, 9, 16)] + [(128, 4, torch.float16)]
    for dim, group, dtype in shapes:
        yield _check(f"dim {dim} group {group} {str(dtype)[6:]}", [300, 1, 64, 2049, 0, 33], group, dim, dtype)
    for format in ("fp8", "int8", "int4"):
        for dim in (64, 96, 128):
            yield _check(f"dim {dim} {format}", [300, 1, 64, 2049], 4, dim, torch.bfloat16, format=format)
        q, pages = (
            torch.randn(3, 4, DIM, device="cuda", dtype=torch.bfloat16),
            pages_of([1000, 500, 777], format=format),
        )
        moved = torch.randn(3, 4, DIM, device="cuda", dtype=torch.bfloat16)
        for name, how in (("", {}), (", moved keys", {"moved": moved})):
            yield _compare(f"{format}, newest {WINDOW} as they came{name}", q, with_newest(pages), Logit(0.1), **how)
    q = torch.randn(3, 4, DIM, device="cuda", dtype=torch.bfloat16)
    extra = torch.randn(3, 4, 1000, device="cuda")
    extra[0, :, 100:900] = -torch.inf
    slots = torch.randint(0, 500, (3, 260), device="cuda", dtype=torch.int32)
    slots[:, 200:230] = -1
    options = {
        "soft-cap, sinks": (Logit(0.2, 5.0, torch.randn(3, 4, device="cuda")), {}),
        "extra that hides": (Logit(0.1), {"extra": extra}),
        "lists of slots": (Logit(0.1), {"slots": slots}),
        "moved keys": (Logit(0.1), {"moved": torch.randn(3, 4, DIM, device="cuda", dtype=torch.bfloat16)}),
        "first and last keys": (Logit(0.1), {"window": (4, 256)}),
    }
    for name, (logit, how) in options.items():
        yield _compare(name, q, pages_of([1000, 500, 777]), logit, **how)


def _check(name, lengths, group, dim, dtype, format=None) -> dict:
    q = torch.randn(len(lengths), group, dim, device="cuda", dtype=dtype)
    return _compare(name, q, pages_of(lengths, dim, dtype=dtype, format=format), Logit(dim**-0.5))


def _compare(name: str, q, pages: Pages, logit: Logit, **how) -> dict:
    plain = {"extra": None, "slots": None, "moved": None, "window": None} | how
    listed = (plain["slots"], 1, False)
    expected = _torch(q.float(), pages, logit, plain["extra"], listed, plain["moved"], plain["window"], "weights")
    got = attend_ragged(q, pages, logit, want="weights", **how)
    mass = attend_ragged(q, pages, logit, want="mass", **how)
    errors = [relative_error(got.out, expected.out), relative_error(got.weights, expected.weights)]
    errors.append(relative_error(mass.weights, expected.weights.sum(1)))
    seen = ~expected.lse.isneginf()
    if not torch.equal(seen, ~got.lse.isneginf()):
        errors.append(float("inf"))
    errors.append((got.lse - expected.lse)[seen].abs().max().item())
    if not how and pages.recent is None:
        logits = page_logits(q, pages, logit)
        shown = torch.arange(pages.bound, device=q.device) < pages.length[:, None, None]
        want = _torch(q.float(), pages, logit, None, (None, 1, False), None, None, "weights")
        ours = (
            (logits - logits.masked_fill(~shown, -torch.inf).logsumexp(-1, keepdim=True)).exp().masked_fill(~shown, 0)
        )
        if logit.sinks is None:
            errors.append(relative_error(ours, want.weights))
    return {"case": name, "error": max(errors)}


def run() -> Iterator[dict]:
    """Rows of the table: microseconds, bytes a second, and the dense kernels beside them."""
    ragged = [131072] * 2 + [1024] * 6
    cases = {
        "1 x 128k": [131072] * 8,
        "32 x 8k": [8192] * 256,
        "2 heads 128k, 6 heads 1k": ragged,
        "1 x 32k": [32768] * 8,
        "1 x 8k": [8192] * 8,
        "1 x 4k": [4096] * 8,
    }
    for name, lengths in cases.items():
        bytes_ = sum(lengths) * DIM * 4
        sets = max(2, min(24, -(-160_000_000 // bytes_)))
        inputs = [(_query(lengths), pages_of(lengths, seed=i)) for i in range(sets)]
        row = {"case": name, "bytes": bytes_}
        row["ours_us"] = graph_us([lambda q=q, p=p: attend_ragged(q, p, LOGIT) for q, p in inputs])
        row["ours_mass_us"] = graph_us([lambda q=q, p=p: attend_ragged(q, p, LOGIT, want="mass") for q, p in inputs])
        row["ours_weights_us"] = graph_us(
            [lambda q=q, p=p: attend_ragged(q, p, LOGIT, want="weights") for q, p in inputs]
        )
        del inputs
        if len(set(lengths)) == 1:
            row |= _dense(lengths, sets)
        row["TB/s"] = bytes_ / row["ours_us"] / 1e6
        yield row
    for format, width in (("fp8", 1.0), ("int8", 1.0), ("int4", 0.5)):
        for name in ("1 x 128k", "32 x 8k"):
            lengths = cases[name]
            inputs = [(_query(lengths), pages_of(lengths, seed=i, format=format)) for i in range(2)]
            us = graph_us([lambda q=q, p=p: attend_ragged(q, p, LOGIT) for q, p in inputs])
            held = sum(lengths) * (2 * DIM * width + (16 if format == "int4" else 4))
            yield {"case": f"{name} {format}", "bytes": int(held), "ours_us": us, "TB/s": held / us / 1e6}
            if format == "int4":
                newest = [(q, with_newest(p)) for q, p in inputs]
                us = graph_us([lambda q=q, p=p: attend_ragged(q, p, LOGIT) for q, p in newest])
                held += len(lengths) * WINDOW * 4 * DIM + sum(lengths) * 4
                case = f"{name} {format}, newest {WINDOW} in bfloat16"
                yield {"case": case, "bytes": int(held), "ours_us": us, "TB/s": held / us / 1e6}


LOGIT = Logit(DIM**-0.5)
WINDOW = 128


def with_newest(pages: Pages) -> Pages:
    """The last keys of each row in full precision beside its codes."""
    like = torch.empty(0, DIM, device="cuda", dtype=torch.bfloat16)
    recent = Recent.start(pages.rows, WINDOW, pages.bound, like, like)
    for x in (recent.key, recent.value):
        x.normal_()
    slot = pages.length[:, None] - 1 - torch.arange(WINDOW, device="cuda")
    recent.slot.copy_(slot.clamp(min=-1))
    recent.refresh()
    return dataclasses.replace(pages, recent=recent)


def _query(lengths: list[int]) -> torch.Tensor:
    return torch.randn(len(lengths), GROUP, DIM, device="cuda", dtype=torch.bfloat16)


def _dense(lengths: list[int], sets: int) -> dict:
    batch, n = len(lengths) // KV_HEADS, lengths[0]
    inputs = []
    for _ in range(sets):
        q = torch.randn(batch, KV_HEADS * GROUP, 1, DIM, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(batch, KV_HEADS, n, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        inputs.append((q, k, v))
    found = {}
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        with sdpa_kernel(backend):
            calls = [lambda x=x: F.scaled_dot_product_attention(*x, enable_gqa=True) for x in inputs]
            found[f"{name}_us"] = graph_us(calls)
    return found
