"""HiP's search by halving, whole in one kernel. Meaning: `foveal.ops.tree`.

A program searches for one run of queries after another. The groups of a level are two numbers each, kept in a scratch of its own that
stays in the cache; the keys that stand for them are gathered into tiles and multiplied with all queries of the run at once, and the best
groups are found by bisection of an integer key. Where the first block stands for a group, the lower half inherits the score.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveal.ops.dense import last_dense

from .launch import padded
from .top import _ordered
from .variants import Variant


@triton.jit
def _stands(low, high, KIND: tl.constexpr):
    """The block that stands for low .. high - 1; -1 for none."""
    block = low
    if KIND == 1:
        block = (low + high) // 2
    if KIND == 2:
        mixed = tl.abs((low.to(tl.int64) * 2654435761 + high.to(tl.int64) * 40503) >> 7)
        block = low + (mixed % tl.maximum(high - low, 1)).to(tl.int32)
    return tl.where(low < high, block, -1)


@triton.jit
def _rows(
    Q,
    which,
    row0,
    rows,
    query0,
    stride,
    length,
    q_head,
    q_token,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BM: tl.constexpr,
):
    """Queries of a run in all heads, `[BM, DP]`; beyond the last it is repeated, which changes no maximum."""
    r = tl.minimum(row0 + tl.arange(0, BM), rows - 1)
    query = tl.minimum(query0 + r // G * stride, length - 1).to(tl.int64)
    di = tl.arange(0, DP)
    at = Q + (which * G + r % G).to(tl.int64)[:, None] * q_head + query[:, None] * q_token + di[None, :]
    return tl.load(at, mask=(di < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["wanted", "query_block", "stride", "sink", "recent"])
def _search(
    Q, K, OUT, STATE, SCORE, tiles, nq, kv_heads, length, total, q_batch, q_head, q_token, k_batch, k_head, k_token,
    wanted, query_block, stride, sink, recent,
    G: tl.constexpr, ROWS: tl.constexpr, KB: tl.constexpr, KBP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, WP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr, PRECISE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    RB: tl.constexpr = BN // KBP  # blocks of a tile
    FIRST: tl.constexpr = KIND == 0
    SIDES: tl.constexpr = 1 if FIRST else 2  # halves that are scored
    place = tl.arange(0, WP)
    di = tl.arange(0, DP)
    ni = tl.arange(0, BN)
    # Of this program: left and right ends of the groups and the blocks to score; then their scores and those inherited.
    LEFT = STATE + tl.program_id(0).to(tl.int64) * (4 * WP)
    STANDS = LEFT + 2 * WP
    MADE = SCORE + tl.program_id(0).to(tl.int64) * (3 * WP)
    HAD = MADE + 2 * WP
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        a = tile % nq
        g = tile // nq % kv_heads
        b = (tile // nq // kv_heads).to(tl.int64)
        newest = total - length + a * query_block
        between = tl.maximum(newest + 1 - recent - sink, 0)
        count = (between + KB - 1) // KB
        groups = tl.minimum(count, wanted)
        some = tl.maximum(groups, 1)
        left = (count.to(tl.int64) * tl.minimum(place, groups) // some).to(tl.int32)
        right = (count.to(tl.int64) * tl.minimum(place + 1, groups) // some).to(tl.int32)
        steps = 0
        while (some << steps) < count:
            steps += 1
        begin = 0
        if FIRST:
            begin = tl.where(steps > 0, -1, 0)  # before the first halving whole groups are scored, to be inherited
        q_run = Q + b * q_batch
        keys = K + b * k_batch + g.to(tl.int64) * k_head
        if ROWS * G <= BM:
            q = _rows(q_run, g, 0, ROWS * G, a * query_block, stride, length, q_head, q_token, G, D, DP, BM)
        for step in range(begin, steps):
            middle = (left + right) // 2
            if FIRST:
                middle = tl.where(step < 0, left, middle)
                tl.store(STANDS + place, _stands(middle, right, KIND))
            else:
                tl.store(STANDS + 2 * place, _stands(left, middle, KIND))
                tl.store(STANDS + 2 * place + 1, _stands(middle, right, KIND))
            tl.store(LEFT + place, left)
            tl.store(LEFT + WP + place, right)
            tl.debug_barrier()
            for c in tl.range(0, SIDES * groups, RB, num_stages=STAGES):
                i = c + ni // KBP
                block = tl.load(STANDS + i, mask=i < SIDES * groups, other=-1)
                token = sink + block * KB + ni % KBP
                ok = (block >= 0) & (ni % KBP < KB) & (token <= newest - recent)
                at = keys + tl.where(ok, token, 0).to(tl.int64)[:, None] * k_token + di[None, :]
                k = tl.load(at, mask=ok[:, None] & (di < D)[None, :], other=0.0)
                if ROWS * G <= BM:
                    s = tl.dot(k, tl.trans(q), input_precision="ieee" if PRECISE else "tf32")
                    best = tl.max(s, 1)
                else:
                    best = tl.full([BN], float("-inf"), tl.float32)
                    for row0 in range(0, ROWS * G, BM):
                        part = _rows(
                            q_run, g, row0, ROWS * G, a * query_block, stride, length, q_head, q_token, G, D, DP, BM
                        )
                        s = tl.dot(k, tl.trans(part), input_precision="ieee" if PRECISE else "tf32")
                        best = tl.maximum(best, tl.max(s, 1))
                best = tl.where(ok, best, float("-inf"))
                tl.store(
                    MADE + c + tl.arange(0, RB),
                    tl.max(tl.reshape(best, [RB, KBP]), 1),
                    mask=c + tl.arange(0, RB) < SIDES * groups,
                )
            tl.debug_barrier()
            left = tl.load(LEFT + place)
            right = tl.load(LEFT + WP + place)
            middle = (left + right) // 2
            if FIRST:
                middle = tl.where(step < 0, left, middle)
                low = tl.load(HAD + place, mask=(place < groups) & (step >= 0), other=0.0)
                high = tl.load(MADE + place, mask=place < groups, other=0.0)
            else:
                low = tl.load(MADE + 2 * place, mask=place < groups, other=0.0)
                high = tl.load(MADE + 2 * place + 1, mask=place < groups, other=0.0)
            # Keys of what is empty are the least there are, so that no bisection counts them.
            is_low = left < middle
            is_high = middle < right
            key_low = tl.where(is_low, _ordered(low), -2147483648)
            key_high = tl.where(is_high, _ordered(high), -2147483648)
            want = tl.minimum(wanted, tl.sum(is_low.to(tl.int32) + is_high.to(tl.int32), 0))
            least = tl.where(
                tl.sum((key_low >= 0).to(tl.int32) + (key_high >= 0).to(tl.int32), 0) >= want, 0, -2147483648
            )
            for bit in range(31):
                trial = least + (1 << (30 - bit))
                least = tl.where(
                    tl.sum((key_low >= trial).to(tl.int32) + (key_high >= trial).to(tl.int32), 0) >= want, trial, least
                )
            room = want - tl.sum((key_low > least).to(tl.int32) + (key_high > least).to(tl.int32), 0)
            level_low = (is_low & (key_low == least)).to(tl.int32)
            level = level_low + (is_high & (key_high == least)).to(tl.int32)
            before = tl.cumsum(level, 0) - level
            take_low = is_low & ((key_low > least) | ((key_low == least) & (before < room)))
            take_high = is_high & ((key_high > least) | ((key_high == least) & (before + level_low < room)))
            taken = take_low.to(tl.int32) + take_high.to(tl.int32)
            rank = tl.cumsum(taken, 0) - taken
            tl.debug_barrier()  # all have read what is overwritten now
            tl.store(LEFT + rank, left, mask=take_low)
            tl.store(LEFT + WP + rank, middle, mask=take_low)
            tl.store(LEFT + rank + take_low.to(tl.int32), middle, mask=take_high)
            tl.store(LEFT + WP + rank + take_low.to(tl.int32), right, mask=take_high)
            if FIRST:
                tl.store(HAD + rank, low, mask=take_low)
                tl.store(HAD + rank + take_low.to(tl.int32), high, mask=take_high)
            tl.debug_barrier()
            groups = want
            left = tl.load(LEFT + place, mask=place < groups, other=0)
            right = tl.load(LEFT + WP + place, mask=place < groups, other=0)
            tl.debug_barrier()
        ji = tl.arange(0, KBP)
        token = sink + left[:, None] * KB + ji[None, :]
        token = tl.where((left < right)[:, None] & (token <= newest - recent), token, -1)
        out = OUT + wanted.to(tl.int64) * tile * KB + place[:, None] * KB + ji[None, :]
        tl.store(out, token, mask=(place < wanted)[:, None] & (ji < KB)[None, :])


@torch.library.custom_op("foveal::tree_search", mutates_args=())
def tree_search(
    q: Tensor, k: Tensor, wanted: int, query_block: int, key_block: int, sink: int, recent: int, kind: int, stride: int
) -> Tensor:
    return launch(q, k, wanted, query_block, key_block, sink, recent, kind, stride)


@tree_search.register_fake
def _(q, k, wanted, query_block, key_block, sink, recent, kind, stride):
    runs = -(-q.shape[2] // query_block)
    return k.new_empty(k.shape[0], k.shape[1], runs, wanted * key_block, dtype=torch.int32)


def launch(
    q, k, wanted: int, query_block: int, key_block: int, sink: int, recent: int, kind: int, stride: int
) -> Tensor:
    """As `foveal.ops.tree_search`; kind counts its REPRESENTATIVES."""
    q, k = last_dense(q), last_dense(k)
    (batch, heads, length, D), (kv_heads, total) = q.shape, k.shape[1:3]
    nq, G = -(-length // query_block), heads // kv_heads
    out = torch.empty(batch, kv_heads, nq, wanted * key_block, dtype=torch.int32, device=q.device)
    tiles = batch * kv_heads * nq
    if not out.numel():
        return out
    rows = -(-query_block // stride)
    width = max(16, triton.next_power_of_2(wanted))
    blocks = triton.next_power_of_2(key_block)
    BM, BN, stages, warps = settings(rows * G, D, blocks, width, q.element_size())
    programs = min(tiles, programs_of(q.device))
    state = torch.empty(programs, 4, width, dtype=torch.int32, device=q.device)
    score = torch.empty(programs, 3, width, dtype=torch.float32, device=q.device)
    _search[(programs,)](
        q, k, out, state, score, tiles, nq, kv_heads, length, total, *q.stride()[:3], *k.stride()[:3],
        wanted, query_block, stride, sink, recent, G=G, ROWS=rows, KB=key_block, KBP=blocks, D=D, DP=padded(D), WP=width,
        BM=BM, BN=BN, KIND=kind, PRECISE=q.dtype == torch.float32, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return out


@cache
def programs_of(device: torch.device) -> int:
    """As many as can run at once, so that what each keeps in memory stays in the cache."""
    return 4 * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1)


def settings(rows: int, head_dim: int, key_block: int, width: int, itemsize: int) -> tuple[int, int, int, int]:
    """Rows and keys of a tile, pipeline stages and warps."""
    warps = 8 if width > 1024 else 4
    if itemsize == 4:
        return 16, max(32, key_block), 1, warps
    BM = min(128 if head_dim <= 128 else 64, max(16, triton.next_power_of_2(rows)))
    return BM, max(64, key_block), 2, warps


# ---------------------------------------------------------------------- compiling without a GPU


def variants() -> list[Variant]:
    """The launches of the kernel over head sizes, types, blocks and representatives."""
    found = [_variant(D, "bf16", 64, 2, 256, 0) for D in (64, 96, 128, 256)]
    found += [_variant(128, "bf16", 128, 2, 256, kind) for kind in (0, 1, 2)]
    found += [
        _variant(128, "fp16", 512, 16, 127, 0),
        _variant(128, "bf16", 28, 3, 2048, 0),
        _variant(128, "bf16", 64, 2, 2048, 1),
    ]
    found += [_variant(128, "bf16", 64, 128, 64, 0), _variant(64, "fp32", 96, 2, 256, 0)]
    return found


def _variant(D: int, dtype: str, rows: int, key_block: int, wanted: int, kind: int) -> Variant:
    width, blocks = max(16, triton.next_power_of_2(wanted)), triton.next_power_of_2(key_block)
    BM, BN, stages, warps = settings(rows, D, blocks, width, 4 if dtype == "fp32" else 2)
    signature = {"Q": f"*{dtype}", "K": f"*{dtype}", "OUT": "*i32", "STATE": "*i32", "SCORE": "*fp32"}
    signature |= {n: "i32" for n in _search.arg_names if n.islower()}
    constants = {
        "G": 4,
        "ROWS": rows // 4,
        "KB": key_block,
        "KBP": blocks,
        "D": D,
        "DP": padded(D),
        "WP": width,
        "BM": BM,
        "BN": BN,
    }
    constants |= {"KIND": kind, "PRECISE": dtype == "fp32", "STAGES": stages}
    free = frozenset(
        ("tiles", "nq", "kv_heads", "length", "total", "wanted", "query_block", "stride", "sink", "recent")
    )
    return Variant(
        f"tree {D} {dtype} rows={rows} {wanted}x{key_block} kind={kind}",
        _search,
        signature,
        constants,
        {"num_warps": warps},
        free,
    )
