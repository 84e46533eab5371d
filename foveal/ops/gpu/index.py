"""Scores of an indexer, and its best tokens inside chosen blocks. Meaning: `foveal.ops.index`.

A *list* belongs to a run of queries; its *columns* are the queries of the run in all heads of the indexer. Keys are the rows of a tile, so
that weights, ReLU, the sum over heads and the maximum over queries run along what one thread holds. The second kernel gathers the tokens
of the chosen blocks, leaves their scores in a scratch of its own that stays in the cache, and writes the best by name.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.ops.dense import last_dense

from .launch import given, padded
from .top import _ordered
from .tree import programs_of
from .variants import Variant


@triton.jit
def _columns(
    Q, W, list0, lists, size, length, q_head, q_token, w_head, w_token,
    H: tl.constexpr, HP: tl.constexpr, SP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, HAS_W: tl.constexpr,
):  # fmt: skip
    """Queries `[BM, DP]` and weights `[BM]` of the lists from list0 on; 0 for heads there are not."""
    c = tl.arange(0, BM)
    di = tl.arange(0, DP)
    head = c % HP
    mine = tl.minimum(list0 + c // (SP * HP), lists - 1)
    query = tl.minimum(mine * size + tl.minimum(c // HP % SP, size - 1), length - 1)
    at = Q + head.to(tl.int64)[:, None] * q_head + query.to(tl.int64)[:, None] * q_token + di[None, :]
    q = tl.load(at, mask=(head < H)[:, None] & (di < D)[None, :], other=0.0)
    w = tl.full([BM], 1.0, tl.float32)
    if HAS_W:
        w = tl.load(W + head.to(tl.int64) * w_head + query.to(tl.int64) * w_token, mask=head < H, other=0.0).to(
            tl.float32
        )
    return q, w


@triton.jit
def _of_queries(
    k,
    q,
    w,
    BN: tl.constexpr,
    N: tl.constexpr,
    HP: tl.constexpr,
    RELU: tl.constexpr,
    HAS_W: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Scores `[BN, N]` of keys for N queries of HP heads each."""
    s = tl.dot(k, tl.trans(q), input_precision="ieee" if PRECISE else "tf32")
    if RELU:
        s = tl.maximum(s, 0.0)
    if HAS_W:
        s = s * w[None, :]
    if HP > 1:
        s = tl.sum(tl.reshape(s, [BN, N, HP]), 2)
    return s


@triton.jit(do_not_specialize=["size", "first_list", "past", "block", "lists_here", "n"])
def _score(
    Q, W, K, OUT, n, lists, first_list, lists_here, size, length, past, block,
    q_batch, q_head, q_token, w_batch, w_head, w_token, k_batch, k_token,
    H: tl.constexpr, HP: tl.constexpr, SP: tl.constexpr, P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
    EACH: tl.constexpr, RELU: tl.constexpr, HAS_W: tl.constexpr, BLOCKS: tl.constexpr, PRECISE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of keys, or of means of blocks, for EACH tiles of P lists."""
    b = tl.program_id(2).to(tl.int64)
    key = tl.program_id(0) * BN + tl.arange(0, BN)
    di = tl.arange(0, DP)
    pi = tl.arange(0, P)
    BM: tl.constexpr = P * SP * HP
    begin = tl.program_id(1) * EACH * P
    stop = tl.minimum(begin + EACH * P, lists_here)
    out = OUT + b * lists_here * n
    first_token = tl.program_id(0) * BN
    if BLOCKS:
        first_token = first_token * block
    # The first list whose last query may read a key of this tile.
    seen = (first_token - past) // size - first_list
    seen = tl.minimum(tl.maximum(seen - begin, 0) // P * P + begin, stop)
    if first_token <= past:
        seen = begin
    for i in range(begin, seen, P):
        mine = i + pi
        at = out + mine.to(tl.int64)[None, :] * n + key[:, None]
        tl.store(at, tl.full([BN, P], float("-inf"), tl.float32), mask=(key < n)[:, None] & (mine < stop)[None, :])
    k_at = K + b * k_batch + key.to(tl.int64)[:, None] * k_token + di[None, :]
    k = tl.load(k_at, mask=(key < n)[:, None] & (di < D)[None, :], other=0.0)
    for i in tl.range(seen, stop, P, num_stages=STAGES):
        q, w = _columns(
            Q + b * q_batch, W + b * w_batch, first_list + i, lists, size, length, q_head, q_token, w_head, w_token,
            H, HP, SP, D, DP, BM, HAS_W,
        )  # fmt: skip
        s = _of_queries(k, q, w, BN, P * SP, HP, RELU, HAS_W, PRECISE)
        mine = first_list + i + pi
        if not BLOCKS:
            c = tl.arange(0, P * SP)
            query = tl.minimum((first_list + i + c // SP) * size + tl.minimum(c % SP, size - 1), length - 1)
            s = tl.where(key[:, None] <= (past + query)[None, :], s, float("-inf"))
        if SP > 1:
            s = tl.max(tl.reshape(s, [BN, P, SP]), 2)
        if BLOCKS:
            own = (past + mine * size) // block
            last = (past + tl.minimum((mine + 1) * size, length) - 1) // block
            s = tl.where((key == 0)[:, None] | (key[:, None] >= own[None, :]), float("inf"), s)
            s = tl.where(key[:, None] > last[None, :], float("-inf"), s)
        at = out + (i + pi).to(tl.int64)[None, :] * n + key[:, None]
        tl.store(at, s, mask=(key < n)[:, None] & (i + pi < stop)[None, :])


@triton.jit(do_not_specialize=["size", "first_list", "past", "budget", "kept", "lists_here"])
def _inside(
    Q, W, K, CHOSEN, OUT, SCORE, tiles, lists, first_list, lists_here, size, length, past, kept, budget,
    q_batch, q_head, q_token, w_batch, w_head, w_token, k_batch, k_token,
    H: tl.constexpr, HP: tl.constexpr, SP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, KP: tl.constexpr,
    CP: tl.constexpr, BN: tl.constexpr, RELU: tl.constexpr, HAS_W: tl.constexpr, PRECISE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The best tokens of the chosen blocks, one list after another."""
    BM: tl.constexpr = SP * HP
    ni = tl.arange(0, BN)
    di = tl.arange(0, DP)
    ki = tl.arange(0, KP)
    ci = tl.arange(0, CP)
    si = tl.arange(0, SP)
    HIDDEN: tl.constexpr = -2139095041  # -inf as an integer key
    PART: tl.constexpr = CP if CP < 1024 else 1024
    scratch = SCORE + tl.program_id(0).to(tl.int64) * CP
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        b = (tile // lists_here).to(tl.int64)
        mine = first_list + tile % lists_here
        q, w = _columns(
            Q + b * q_batch,
            W + b * w_batch,
            mine,
            lists,
            size,
            length,
            q_head,
            q_token,
            w_head,
            w_token,
            H,
            HP,
            SP,
            D,
            DP,
            BM,
            HAS_W,
        )
        position = past + tl.minimum(mine * size + tl.minimum(si, size - 1), length - 1)
        last = tl.max(position, 0)
        blocks = CHOSEN + kept.to(tl.int64) * tile
        listed = tl.sum((tl.load(blocks + ki, mask=ki < kept, other=-1) >= 0).to(tl.int32), 0)
        keys = K + b * k_batch
        for c in tl.range(0, listed * BLOCK, BN, num_stages=STAGES):
            i = c + ni
            token = tl.load(blocks + i // BLOCK, mask=i < listed * BLOCK, other=0) * BLOCK + i % BLOCK
            ok = (i < listed * BLOCK) & (token <= last)
            at = keys + tl.where(ok, token, 0).to(tl.int64)[:, None] * k_token + di[None, :]
            k = tl.load(at, mask=ok[:, None] & (di < D)[None, :], other=0.0)
            s = _of_queries(k, q, w, BN, SP, HP, RELU, HAS_W, PRECISE)
            s = tl.where(ok[:, None] & (token[:, None] <= position[None, :]), s, float("-inf"))
            tl.store(scratch + i, tl.max(s, 1), mask=i < listed * BLOCK)
        tl.debug_barrier()
        key = _ordered(tl.load(scratch + ci, mask=ci < listed * BLOCK, other=float("-inf")))
        want = tl.minimum(budget, tl.sum((key > HIDDEN).to(tl.int32), 0))
        least = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= want, 0, -2147483648)
        for bit in range(31):
            trial = least + (1 << (30 - bit))
            least = tl.where(tl.sum((key >= trial).to(tl.int32), 0) >= want, trial, least)
        room = want - tl.sum((key > least).to(tl.int32), 0)
        out = OUT + budget.to(tl.int64) * tile
        done, ties = 0, 0
        for c in range(0, listed * BLOCK, PART):  # again from memory: all at once takes too many registers
            i = c + tl.arange(0, PART)
            part = _ordered(tl.load(scratch + i, mask=i < listed * BLOCK, other=float("-inf")))
            level = (part == least).to(tl.int32)
            picked = ((part > least) | ((part == least) & (tl.cumsum(level, 0) + ties <= room))) & (part > HIDDEN)
            token = tl.load(blocks + i // BLOCK, mask=picked, other=0) * BLOCK + i % BLOCK
            tl.store(out + done + tl.cumsum(picked.to(tl.int32), 0) - 1, token, mask=picked)
            done += tl.sum(picked.to(tl.int32), 0)
            ties += tl.sum(level, 0)
        for c in range(want, budget, PART):
            i = c + tl.arange(0, PART)
            tl.store(out + i, -1, mask=i < budget)
        tl.debug_barrier()  # all have read what the next list overwrites


@torch.library.custom_op("foveal::index_scores", mutates_args=())
def index_scores(
    q: Tensor, w: Tensor | None, k: Tensor, relu: bool, size: int, start: int, stop: int, block: int, total: int
) -> Tensor:
    return launch_scores(q, w, k, relu, size, start, stop, block, total)


@index_scores.register_fake
def _(q, w, k, relu, size, start, stop, block, total):
    return q.new_empty(k.shape[0], stop - start, k.shape[1], dtype=torch.float32)


def launch_scores(q, w, k, relu: bool, size: int, start: int, stop: int, block: int, total: int) -> Tensor:
    """Scores float32 `[batch, stop - start, n]` of the runs start .. stop - 1 of queries q with n keys, or with means of blocks.

    block: 0 for keys; for means the tokens of a block: +inf marks blocks that are always read.  Later keys and blocks score -inf.
    """
    q, k = last_dense(q), last_dense(k)
    (batch, heads, length, D), n = q.shape, k.shape[1]
    out = torch.empty(batch, stop - start, n, dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    HP, SP, P, BN, stages, warps = settings_scores(heads, size, D, q.element_size())
    _score[(triton.cdiv(n, BN), triton.cdiv(stop - start, EACH * P), batch)](
        q, given(w, q), k, out, n, -(-length // size), start, stop - start, size, length, total - length, max(1, block),
        *q.stride()[:3], *_strides(w), *k.stride()[:2], H=heads, HP=HP, SP=SP, P=P, D=D, DP=padded(D), BN=BN, EACH=EACH,
        RELU=relu, HAS_W=w is not None, BLOCKS=block > 0, PRECISE=q.dtype == torch.float32, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return out


EACH = 16  # tiles of lists that meet one tile of keys


def settings_scores(heads: int, size: int, head_dim: int, itemsize: int) -> tuple[int, int, int, int, int, int]:
    """Places for heads and queries of a list, lists and keys of a tile, pipeline stages and warps."""
    HP, SP = triton.next_power_of_2(heads), triton.next_power_of_2(size)
    P = max(1, (64 if itemsize < 4 else 16) // (HP * SP))
    if itemsize == 4:
        return HP, SP, P, 16, 1, 4
    return HP, SP, P, 128 if P * HP * SP <= 64 and head_dim <= 128 else 64, 2, 4


@torch.library.custom_op("foveal::index_inside", mutates_args=())
def index_inside(
    q: Tensor, w: Tensor | None, k: Tensor, chosen: Tensor, budget: int, block: int, relu: bool, size: int, start: int
) -> Tensor:
    return launch_inside(q, w, k, chosen, budget, block, relu, size, start)


@index_inside.register_fake
def _(q, w, k, chosen, budget, block, relu, size, start):
    return q.new_empty(*chosen.shape[:2], budget, dtype=torch.int32)


def launch_inside(q, w, k, chosen, budget: int, block: int, relu: bool, size: int, start: int) -> Tensor:
    """The `budget` best tokens of the blocks chosen for the runs from `start` on, int32 `[batch, lists, kept]`, -1 at their end."""
    q, k, chosen = last_dense(q), last_dense(k), chosen.contiguous()
    heads, length, D = q.shape[1:]
    batch, lists_here, kept = chosen.shape
    out = torch.empty(batch, lists_here, budget, dtype=torch.int32, device=q.device)
    if not out.numel():
        return out
    width = max(128, triton.next_power_of_2(kept * block))
    HP, SP, BN, stages, warps = settings_inside(heads, size, D, width, q.element_size())
    programs = min(batch * lists_here, programs_of(q.device))
    score = torch.empty(programs, width, dtype=torch.float32, device=q.device)
    _inside[(programs,)](
        q, given(w, q), k, chosen, out, score, batch * lists_here, -(-length // size), start, lists_here, size, length,
        k.shape[1] - length, kept, budget, *q.stride()[:3], *_strides(w), *k.stride()[:2],
        H=heads, HP=HP, SP=SP, D=D, DP=padded(D), BLOCK=block, KP=triton.next_power_of_2(kept), CP=width, BN=BN,
        RELU=relu, HAS_W=w is not None, PRECISE=q.dtype == torch.float32, STAGES=stages, num_warps=warps, maxnreg=MOST,
    )  # fmt: skip
    return out


MOST = 128  # registers of a thread: two programs of eight warps run side by side


def settings_inside(heads: int, size: int, head_dim: int, width: int, itemsize: int) -> tuple[int, int, int, int, int]:
    """Places for heads and queries of a list, keys of a tile, pipeline stages and warps; a matrix product has 16 columns at least."""
    SP = triton.next_power_of_2(size)
    HP = max(triton.next_power_of_2(heads), 16 // SP)
    warps = 8 if width > 2048 else 4
    if itemsize == 4:
        return HP, SP, 16, 1, warps
    return HP, SP, 64 if head_dim <= 128 else 32, 3 if head_dim <= 128 else 2, warps


def _strides(w: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if w is None else w.stride()


# ---------------------------------------------------------------------- compiling without a GPU


def variants() -> list[Variant]:
    """The launches of the kernels over head sizes, heads, runs and types."""
    found = []
    for D in (64, 96, 128, 256):
        found += [_variant_scores(D, "bf16", 64, 1, True, False), _variant_inside(D, "bf16", 64, 1, True, 8192)]
    for heads, size in ((1, 1), (1, 32), (1, 128), (9, 1), (32, 4)):
        found.append(_variant_scores(128, "bf16", heads, size, heads > 1, True))
        found.append(_variant_inside(128, "bf16", heads, size, heads > 1, 2048 if heads == 9 else 8192))
    found += [_variant_scores(64, "fp32", 4, 1, True, False), _variant_inside(64, "fp32", 4, 1, True, 1024)]
    found += [_variant_scores(128, "fp16", 64, 1, True, True), _variant_inside(128, "fp16", 64, 1, True, 8192)]
    return found


def _variant_scores(D: int, dtype: str, heads: int, size: int, weighed: bool, blocks: bool) -> Variant:
    HP, SP, P, BN, stages, warps = settings_scores(heads, size, D, 4 if dtype == "fp32" else 2)
    constants = {"HP": HP, "SP": SP, "P": P, "BN": BN, "EACH": EACH, "BLOCKS": blocks}
    return _variant("scores", _score, D, dtype, heads, size, weighed, constants | {"STAGES": stages}, warps)


def _variant_inside(D: int, dtype: str, heads: int, size: int, weighed: bool, width: int) -> Variant:
    HP, SP, BN, stages, warps = settings_inside(heads, size, D, width, 4 if dtype == "fp32" else 2)
    constants = {"HP": HP, "SP": SP, "BN": BN, "BLOCK": 128, "KP": 64, "CP": width}
    return _variant("inside", _inside, D, dtype, heads, size, weighed, constants | {"STAGES": stages}, warps, MOST)


def _variant(name, kernel, D, dtype, heads, size, weighed, constants, warps, registers=None) -> Variant:
    signature = {n: "i32" for n in kernel.arg_names if n.islower()} | dict.fromkeys(("Q", "W", "K"), f"*{dtype}")
    signature |= {"CHOSEN": "*i32", "SCORE": "*fp32", "OUT": "*fp32" if kernel is _score else "*i32"}
    constants |= {"H": heads, "D": D, "DP": padded(D), "RELU": heads > 1, "HAS_W": weighed, "PRECISE": dtype == "fp32"}
    options = {"num_warps": warps} | ({"maxnreg": registers} if registers else {})
    free = frozenset(n for n in kernel.arg_names if n.islower() and n[:2] not in ("q_", "k_"))
    return Variant(f"{name} {D} {dtype} {heads}x{size}", kernel, signature, constants, options, free)
