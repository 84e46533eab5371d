"""Exact statistics of dense causal attention, from the log-sum-exp, without ever holding a length x total matrix."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence, Set
from itertools import pairwise

import torch
from torch import Tensor

from foveal.errors import InputError
from foveal.ops.dense import HIDDEN, Prepared, check, prepare, spread, wide
from foveal.ops.route import Route, no_kernel, routed

COLUMNS = frozenset({"col_mass", "col_low"})
NAMES = COLUMNS | {
    "entropy", "sink_mass", "mean_distance", "row_max", "row_argmax",
    "offset_histogram", "block_map", "top_k", "top_k_keys",
}  # fmt: skip

_ROWS = 256  # queries of a tile
_TILE_NUMBERS = 3 << 17  # probabilities of a tile: 1.5 MB, so that the passes after the product stay in the cache
_FEW_EDGES = 3  # of distance bins in a tile: up to here, a pass for each is cheaper than all diagonals
_TIE = 1e-5  # relative; rounding must not make p = 1/t a low probability
# What the kernels are built for.
_GPU_RANKS, _GPU_BINS, _GPU_TOP, _GPU_BLOCK = (2, 5, 10), 128, 32, 64


@torch.no_grad()
def attention_stats(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    want: Set[str],
    scale: float,
    softcap: float | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    mass: Tensor | None = None,
    sink: int = 4,
    rows: tuple[int, int] | None = None,
    threshold: float | None = None,
    edges: Sequence[int] | None = None,
    block: int = 64,
    top: int = 8,
) -> dict[str, Tensor]:
    """Statistics of the probabilities p = exp(logit - lse) that the queries give the keys they see.

    `lse` `[batch, heads, length]` is that of `attend` with the same keywords, learned sinks included (their own share
    belongs to no key). `rows` = (start, stop) looks at those queries only. Other keywords: see `foveal.ops.dense`.
    Computed and returned in float32, or in float64 for float64 queries.

    - `col_mass` `[batch, heads, total]`: sum of p over the queries.
    - `col_low` `[batch, heads, total]`: how many queries see the key and give it p < `threshold`; by default p < 1/t, t
      the number of keys they see (Scissorhands); a tie with that, to within 1e-5, is not low.
    - `entropy` `[batch, heads, queries]`: -sum p log p over the keys, in nats.
    - `sink_mass` `[batch, heads, queries]`: p on the first `sink` keys.
    - `mean_distance` `[batch, heads, queries]`: sum of p * (query position - key position), in tokens.
    - `row_max`, `row_argmax` `[batch, heads, queries]`: the largest p and its key (0 and 0 where nothing is seen).
    - `offset_histogram` `[batch, heads, bins]`: sum of p by distance in tokens; bin b holds edges[b] <= distance <
      edges[b + 1], the last one everything from its edge on. `edges` ascend from 0; default `log_edges(total)`.
    - `block_map` `[batch, heads, ceil(queries / block), ceil(total / block)]`: sum of p over blocks of `block` queries
      (counted from the first of `rows`) and `block` keys.
    - `top_k`, `top_k_keys` `[batch, heads, queries, top]`: the `top` largest p > 0, falling, and their keys (int64);
      0 and -1 where there are fewer; among equals, which ones is not said.

    Raises `InputError` for an unknown name, a range outside the queries, a parameter out of range or shapes that do
    not fit.
    """
    check(q, k, None, bias=bias, mass=mass)
    start, stop = _check(q, lse, want, rows, threshold, edges, block, top)
    edges = log_edges(k.shape[2]) if edges is None else list(edges)
    how = {"scale": scale, "softcap": softcap, "bias": bias, "mass": mass}
    route = _route(q, k, lse, want=want, rows=rows, edges=edges, block=block, top=top, **how)
    run = _by_kernels if route.name == "triton" else _by_tiles
    past = k.shape[2] - q.shape[2] + start  # keys before the first of these queries
    few = _few_seen(q, mass, past, stop - start, threshold) if "col_low" in want else None
    out = run(q, k, lse, slice(start, stop), sorted(want), sink, few, edges, block, top, **how)
    if mass is not None and "col_low" in out:
        out["col_low"].masked_fill_(spread(mass, q.shape[1]) == 0, 0.0)
    return {name: out[name] for name in want}


def log_edges(total: int) -> list[int]:
    """Distance bins that double: 0, 1, 2-3, 4-7, ... up to the largest distance among `total` positions."""
    return [0, *(1 << n for n in range(max(0, total - 1).bit_length()))]


@routed("attention_stats")
def _route(
    q, k, lse, *, want, scale, softcap=None, bias=None, mass=None, sink=4, rows=None, threshold=None, edges=None,
    block=64, top=8,
) -> Route:  # fmt: skip
    edges = log_edges(k.shape[2]) if edges is None else edges
    start, stop = rows if rows is not None else (0, q.shape[2])
    reasons = {
        "nothing to compute": 0 in q.shape or start == stop or not want,
        "the kernels take bfloat16 and float16": q.dtype not in (torch.bfloat16, torch.float16) or k.dtype != q.dtype,
        "the kernels take head sizes that are multiples of 8, up to 256": q.shape[3] % 8 or q.shape[3] > 256,
        f"the kernels take a bias of rank {_GPU_RANKS[-1]} at most": bias and bias[0].shape[3] > _GPU_RANKS[-1],
        f"the kernels take {_GPU_BINS} bins at most": "offset_histogram" in want and len(edges) > _GPU_BINS,
        f"the kernels take blocks that are multiples of {_GPU_BLOCK}": "block_map" in want and block % _GPU_BLOCK,
        f"the kernels list {_GPU_TOP} keys at most": {"top_k", "top_k_keys"} & set(want) and top > _GPU_TOP,
        "the kernels are written for CUDA": torch.version.hip is not None,
    }
    why = no_kernel(q) or next((reason for reason, holds in reasons.items() if holds), None)
    return Route("torch", why) if why else Route("triton", "one pass for the columns, one for the rows")


def _check(q, lse, want, rows, threshold, edges, block, top) -> tuple[int, int]:
    length = q.shape[2]
    start, stop = rows if rows is not None else (0, length)
    if unknown := set(want) - NAMES:
        raise InputError(f"expected statistics out of {sorted(NAMES)}, got {sorted(unknown)}; ask for those")
    if not 0 <= start <= stop <= length:
        raise InputError(f"expected rows within 0..{length}, got {rows}; give (start, stop) of the queries")
    if lse.shape != q.shape[:3]:
        raise InputError(f"expected lse {list(q.shape[:3])}, got {list(lse.shape)}; pass that of attend, all queries")
    if threshold is not None and not 0 < threshold <= 1:
        raise InputError(f"expected a threshold within 0..1, got {threshold}; give a probability, or None for 1/t")
    if edges is not None and (not len(edges) or edges[0] != 0 or any(a >= b for a, b in pairwise(edges))):
        raise InputError(f"expected edges that ascend from 0, got {list(edges)}; give the first distance of each bin")
    if block < 1 or top < 1:
        raise InputError(f"expected block and top of at least 1, got {block} and {top}; give positive numbers")
    return start, stop


def _few_seen(q: Tensor, mass: Tensor | None, past: int, length: int, threshold: float | None) -> Tensor:
    """The probability below which a key counts as low, `[batch, heads or KV heads, length]` or `[1, 1, length]`."""
    dtype = wide(q.dtype)
    if threshold is not None:
        return torch.full((1, 1, length), threshold, dtype=dtype, device=q.device)
    if mass is None:
        seen = torch.arange(past + 1, past + length + 1, device=q.device)[None, None]
    else:
        seen = (mass > 0).cumsum(-1)[..., past : past + length]
    return (1 - _TIE) / seen.clamp(min=1).to(dtype)


# ---------------------------------------------------------------------- on a GPU


def _by_kernels(
    q, k, lse, rows, want, sink, few, edges, block, top, *, scale, softcap, bias, mass
) -> dict[str, Tensor]:
    from foveal.ops.gpu import bias as columns
    from foveal.ops.gpu import stats as gpu

    lse = torch.where(lse.isneginf(), gpu.ABSENT, lse.float() * gpu.LOG2E)[:, :, rows].contiguous()
    phi_q = phi_k = log_mass = None
    if bias is not None:
        rank = next(w for w, r in zip(gpu.RANK_WIDTHS, _GPU_RANKS, strict=True) if bias[0].shape[3] <= r)
        phi_q, phi_k = columns.split_factors(bias[0][:, :, rows].float() * gpu.LOG2E, bias[1], rank)
    if mass is not None:
        log_mass = torch.where(mass > 0, mass.float().clamp(min=1e-37).log2(), HIDDEN).contiguous()
    inputs = (q[:, :, rows], k, lse, phi_q, phi_k, log_mass)
    past = k.shape[2] - q.shape[2] + rows.start
    by_column = [name for name in want if name in COLUMNS]
    by_row = [name for name in want if name not in COLUMNS]
    out = {}
    if by_column:
        low = None if few is None else few.expand(q.shape[0], -1, -1).float().log2().contiguous()
        out |= zip(by_column, gpu.columns(*inputs, low, past, scale, softcap, ",".join(by_column)), strict=True)
    if by_row:
        bins = torch.tensor(edges, dtype=torch.int32, device=q.device)
        found = gpu.rows(*inputs, bins, past, scale, softcap, sink, block, top, ",".join(by_row))
        out |= zip(by_row, found, strict=True)
    return out


# ---------------------------------------------------------------------- by tiles, in PyTorch


def _by_tiles(q, k, lse, rows, want, sink, few, edges, block, top, **how) -> dict[str, Tensor]:
    heads, past = q.shape[1], k.shape[2] - q.shape[2] + rows.start
    p = _fold_lse(prepare(q, k, k[..., :0], **how), lse, rows)
    out = _empty(p, want, len(edges), block, top)
    few = None if few is None else spread(few, heads).expand(q.shape[0], heads, -1)[..., None]
    for b in range(q.shape[0]):
        for heads, kv in _head_groups(p):
            here = {name: t[b, heads] for name, t in out.items()}
            for s, e, c, x, room in _tiles(p, b, heads, kv, past, sink if set(want) == {"sink_mass"} else None):
                some = None if few is None else few[b, heads, s:e]
                _add(here, x, room, slice(s, e), c, past + s, sink, some, edges, block)
    return out


def _empty(p: Prepared, want: Sequence[str], bins: int, block: int, top: int) -> dict[str, Tensor]:
    """Zeros to add to; maxima also where only their keys are wanted."""
    batch, heads, length, total = *p.q.shape[:3], p.k.shape[2]
    shapes = dict.fromkeys(COLUMNS, (total,)) | {"offset_histogram": (bins,), "top_k": (length, top)}
    shapes["block_map"] = (-(-length // block), -(-total // block))
    beside = {"row_argmax": "row_max", "top_k_keys": "top_k"}
    names = sorted({*want, *(beside[name] for name in want if name in beside)} - beside.keys())
    out = {name: p.q.new_zeros(batch, heads, *shapes.get(name, (length,))) for name in names}
    if "row_argmax" in want:
        out["row_argmax"] = p.q.new_zeros(batch, heads, length, dtype=torch.long)
    if "top_k" in out:
        out["top_k_keys"] = p.q.new_full((batch, heads, length, top), -1, dtype=torch.long)
    return out


def _head_groups(p: Prepared) -> Iterator[tuple[slice, int]]:
    group = p.q.shape[1] // p.k.shape[1]
    for kv in range(p.k.shape[1]):
        yield slice(kv * group, (kv + 1) * group), kv


def _tiles(
    p: Prepared, b: int, heads: slice, kv: int, past: int, limit: int | None
) -> Iterator[tuple[int, int, int, Tensor, Tensor]]:
    """Yield (first query, end, first key, logit - lse `[group, queries, keys]`, room for as much) over a KV head's triangle.

    Tiles share their memory: fresh pages for each would cost as much as the passes over them.
    """
    group, length, width = heads.stop - heads.start, p.q.shape[2], p.q.shape[3]
    keys = p.k[b, kv].T
    columns = max(128, (_TILE_NUMBERS if p.q.is_cpu else 1 << 24) // (group * _ROWS))
    memory, spare = p.q.new_empty(2, group * min(_ROWS, length) * min(columns, keys.shape[1]))
    for s in range(0, length, _ROWS):
        e = min(s + _ROWS, length)
        q = p.q[b, heads, s:e].reshape(-1, width)
        end = past + e if limit is None else min(past + e, limit)
        for c in range(0, end, columns):
            some = keys[:, c : min(c + columns, end)]
            size = q.shape[0] * some.shape[1]
            x = _logits(p, q, some, memory[:size].view(q.shape[0], -1)).view(group, e - s, -1)
            yield s, e, c, x, spare[:size].view_as(x)


def _logits(p: Prepared, q: Tensor, keys: Tensor, into: Tensor) -> Tensor:
    if p.softcap is None:
        return torch.mm(q, keys, out=into)
    x = torch.mm(q[:, : p.split], keys[: p.split], out=into).div_(p.softcap).tanh_()
    return x.addmm_(q[:, p.split :], keys[p.split :], beta=p.softcap)


def _add(
    out: dict[str, Tensor],
    x: Tensor,
    room: Tensor,
    rows: slice,
    c: int,
    first: int,
    sink: int,
    few: Tensor | None,
    edges: Sequence[int],
    block: int,
) -> None:
    """Add one tile to the sums of its heads. Query 0 of the tile stands at position `first`, key 0 at `c`."""
    end = c + x.shape[-1]
    cut = end > first + 1  # the tile reaches past the diagonal; what lies there may even be inf
    p = torch.exp(x, out=room) if "entropy" in out else x.exp_()
    if cut:
        p.tril_(first - c)
    if "col_mass" in out:
        out["col_mass"][:, c:end] += p.sum(1)
    if few is not None:
        low = torch.lt(p, few, out=torch.empty_like(p))  # counting a bool mask is many times slower
        out["col_low"][:, c:end] += (low.tril_(first - c) if cut else low).sum(1)
    if "entropy" in out:
        # what lies past the diagonal may be inf, and inf * 0 is NaN
        out["entropy"][:, rows] -= (x.clamp_(max=-HIDDEN) if cut else x).mul_(p).sum(-1)
    if "sink_mass" in out and c < sink:
        out["sink_mass"][:, rows] += p[..., : sink - c].sum(-1)
    if "mean_distance" in out:
        # Positions count from the tile's first key: far from 0 float32 would lose the small differences.
        keys = torch.arange(end - c, dtype=p.dtype, device=p.device)
        queries = torch.arange(first - c, first - c + p.shape[1], dtype=p.dtype, device=p.device)
        out["mean_distance"][:, rows] += p.sum(-1) * queries - p @ keys
    if "row_max" in out:
        _add_max(out, p, rows, c)
    if "offset_histogram" in out:
        _add_distances(out["offset_histogram"], p, first - c, edges)
    if "block_map" in out:
        _add_blocks(out["block_map"], p, rows.start, c, block)
    if "top_k" in out:
        _add_top(out["top_k"][:, rows], out["top_k_keys"][:, rows], p, c)


def _add_max(out: dict[str, Tensor], p: Tensor, rows: slice, c: int) -> None:
    top, best = p.amax(-1), out["row_max"][:, rows]
    if "row_argmax" in out:
        # The first of the largest: max(-1) takes four times as long as these three passes.
        falling = torch.arange(p.shape[-1], 0, -1, dtype=p.dtype, device=p.device)
        largest = torch.eq(p, top[..., None], out=torch.empty_like(p)).mul_(falling)
        where = c + p.shape[-1] - largest.amax(-1).long()
        out["row_argmax"][:, rows] = torch.where(top > best, where, out["row_argmax"][:, rows])
    out["row_max"][:, rows] = torch.maximum(top, best)


def _add_distances(histogram: Tensor, p: Tensor, shift: int, edges: Sequence[int]) -> None:
    """Add a tile to the bins its distances fall in; row r and column j of the tile are shift + r - j apart."""
    rows, columns = p.shape[1:]
    first = bisect_right(edges, max(0, shift - columns + 1)) - 1
    last = bisect_right(edges, shift + rows - 1) - 1
    if last - first > _FEW_EDGES:
        histogram.index_add_(1, *_by_diagonal(p, shift, edges))
        return
    beyond = p.sum((1, 2))
    for n in range(first, last):
        farther = p.tril(shift - edges[n + 1]).sum((1, 2))
        histogram[:, n] += beyond - farther
        beyond = farther
    histogram[:, last] += beyond


def _by_diagonal(p: Tensor, shift: int, edges: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Sums `[group, distances]` of p along its diagonals, and the bin of each."""
    group, rows, columns = p.shape
    width = rows + columns
    # Read in lines one longer than they were written, every line moves one place: diagonals become columns.
    flat = p.new_zeros(group, rows * width)
    flat[:, : rows * (width - 1)].view(group, rows, width - 1)[..., :columns] = p
    sums = flat.view(group, rows, width).sum(1)  # column n holds j - r = n, or n - width for n > columns
    rising = torch.cat([sums[:, :columns].flip(-1), sums[:, columns + 1 :].flip(-1)], -1)
    distances = torch.arange(shift - columns + 1, shift + rows, device=p.device)  # below 0 there is nothing
    bins = torch.searchsorted(torch.tensor(edges, device=p.device), distances.clamp(min=0), right=True) - 1
    return bins, rising


def _add_blocks(block_map: Tensor, p: Tensor, row: int, column: int, block: int) -> None:
    """Add the tile that starts at this row and column to the blocks it touches."""
    for_rows, a = _membership(row, p.shape[1], block, p)
    for_columns, b = _membership(column, p.shape[2], block, p)
    block_map[:, a : a + for_rows.shape[1], b : b + for_columns.shape[1]] += for_rows.T @ (p @ for_columns)


def _membership(start: int, count: int, block: int, like: Tensor) -> tuple[Tensor, int]:
    """`[count, blocks]`, 1 where a place from `start` on lies in a block; and the first of these blocks."""
    first, last = start // block, (start + count - 1) // block
    places = torch.arange(start, start + count, device=like.device) // block - first
    return (places[:, None] == torch.arange(last - first + 1, device=like.device)).to(like.dtype), first


def _add_top(best: Tensor, keys: Tensor, p: Tensor, c: int) -> None:
    """Keep the largest of what is listed and of one tile."""
    if not bool((p.amax(-1) > best[..., -1]).any()):
        return
    found, where = p.topk(min(best.shape[-1], p.shape[-1]), -1)
    where = (where + c).masked_fill_(found == 0, -1)
    both, all_keys = torch.cat([best, found], -1), torch.cat([keys, where], -1)
    largest, place = both.topk(best.shape[-1], -1)
    best.copy_(largest)
    keys.copy_(all_keys.gather(-1, place))


def _fold_lse(p: Prepared, lse: Tensor, rows: slice) -> Prepared:
    """The wide problem on some queries whose logits are logit - lse: a column of the product, not a pass over it."""
    dtype = wide(p.q.dtype)
    lse = lse[:, :, rows].to(dtype)
    lse = lse.masked_fill(lse.isneginf(), -HIDDEN)[..., None]  # rows that see nothing get p = 0
    q = p.q[:, :, rows].to(dtype)
    head = q[..., : p.split] * p.scale
    q = torch.cat([head, q[..., p.split :], -lse], -1)
    k = p.k.to(dtype)
    return Prepared(q, torch.cat([k, k.new_ones(*k.shape[:3], 1)], -1), k, 1.0, p.softcap, p.split, p.exact)
