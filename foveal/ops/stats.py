"""Exact statistics of dense causal attention, from the log-sum-exp, without ever holding a length x total matrix."""

from collections.abc import Iterator, Set

import torch
from torch import Tensor

from foveal.errors import InputError
from foveal.ops.dense import HIDDEN, Prepared, check, prepare, spread, wide

NAMES = frozenset({"col_mass", "col_low", "entropy", "sink_mass", "mean_distance", "row_max", "row_argmax"})

_ROWS = 256  # queries of a tile
_TILE_NUMBERS = 3 << 17  # probabilities of a tile: 1.5 MB, so that the passes after the product stay in the cache
_TIE = 1e-5  # relative; rounding must not make p = 1/t a low probability


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
) -> dict[str, Tensor]:
    """Statistics of the probabilities p = exp(logit - lse) that the queries give the keys they see.

    `lse` `[batch, heads, length]` is that of `attend` with the same keywords, learned sinks included (their own share
    belongs to no key). `rows` = (start, stop) looks at those queries only. Other keywords: see `foveal.ops.dense`.
    Computed and returned in float32, or in float64 for float64 queries.

    - `col_mass` `[batch, heads, total]`: sum of p over the queries.
    - `col_low` `[batch, heads, total]`: how many queries see the key and give it p < 1/t, t the number of keys they see
      (Scissorhands); a tie, to within 1e-5, is not low.
    - `entropy` `[batch, heads, queries]`: -sum p log p over the keys, in nats.
    - `sink_mass` `[batch, heads, queries]`: p on the first `sink` keys.
    - `mean_distance` `[batch, heads, queries]`: sum of p * (query position - key position), in tokens.
    - `row_max`, `row_argmax` `[batch, heads, queries]`: the largest p and its key (0 and 0 where nothing is seen).

    Raises `InputError` for an unknown name, a range outside the queries or shapes that do not fit.
    """
    check(q, k, None, bias=bias, mass=mass)
    length = q.shape[2]
    start, stop = rows if rows is not None else (0, length)
    if unknown := set(want) - NAMES:
        raise InputError(f"expected statistics out of {sorted(NAMES)}, got {sorted(unknown)}; ask for those")
    if not 0 <= start <= stop <= length:
        raise InputError(f"expected rows within 0..{length}, got {rows}; give (start, stop) of the queries")
    if lse.shape != q.shape[:3]:
        raise InputError(f"expected lse {list(q.shape[:3])}, got {list(lse.shape)}; pass that of attend, all queries")
    p = prepare(q, k, k[..., :0], scale=scale, softcap=softcap, bias=bias, mass=mass)
    p = _fold_lse(p, lse, slice(start, stop))
    past = k.shape[2] - length + start  # keys before the first of these queries
    out = _empty(p, want)
    few = _few_seen(p, mass, past) if "col_low" in want else None
    for b in range(q.shape[0]):
        for heads, kv in _head_groups(p):
            here = {name: t[b, heads] for name, t in out.items()}
            for s, e, c, x in _tiles(p, b, heads, kv, past, sink if set(want) == {"sink_mass"} else None):
                _add(here, x, slice(s, e), c, past + s, sink, None if few is None else few[b, heads, s:e])
    if mass is not None and "col_low" in out:
        out["col_low"].masked_fill_(spread(mass, q.shape[1]) == 0, 0.0)
    return {name: out[name] for name in want}


def _empty(p: Prepared, want: Set[str]) -> dict[str, Tensor]:
    batch, heads, length, _ = p.q.shape
    sizes = {"col_mass": p.k.shape[2], "col_low": p.k.shape[2]}
    out = {name: p.q.new_zeros(batch, heads, sizes.get(name, length)) for name in sorted(want)}
    if "row_argmax" in out:
        out["row_argmax"] = out["row_argmax"].long()
        out.setdefault("row_max", p.q.new_zeros(batch, heads, length))
    return out


def _few_seen(p: Prepared, mass: Tensor | None, past: int) -> Tensor:
    """The probability below which a key counts as low, `[batch, heads, length, 1]`: 1 / keys seen."""
    batch, heads, length, _ = p.q.shape
    if mass is None:
        seen = torch.arange(past + 1, past + length + 1, device=p.q.device).expand(batch, heads, -1)
    else:
        seen = spread((mass > 0).cumsum(-1)[..., past : past + length], heads)
    return ((1 - _TIE) / seen.clamp(min=1).to(p.q.dtype))[..., None]


def _head_groups(p: Prepared) -> Iterator[tuple[slice, int]]:
    group = p.q.shape[1] // p.k.shape[1]
    for kv in range(p.k.shape[1]):
        yield slice(kv * group, (kv + 1) * group), kv


def _tiles(
    p: Prepared, b: int, heads: slice, kv: int, past: int, limit: int | None
) -> Iterator[tuple[int, int, int, Tensor]]:
    """Yield (first query, end, first key, logit - lse `[group, queries, keys]`) over one KV head's triangle."""
    group, length, width = heads.stop - heads.start, p.q.shape[2], p.q.shape[3]
    keys = p.k[b, kv].T
    columns = max(128, (_TILE_NUMBERS if p.q.is_cpu else 1 << 24) // (group * _ROWS))
    for s in range(0, length, _ROWS):
        e = min(s + _ROWS, length)
        q = p.q[b, heads, s:e].reshape(-1, width)
        end = past + e if limit is None else min(past + e, limit)
        for c in range(0, end, columns):
            yield s, e, c, _logits(p, q, keys[:, c : min(c + columns, end)]).view(group, e - s, -1)


def _logits(p: Prepared, q: Tensor, keys: Tensor) -> Tensor:
    if p.softcap is None:
        return q @ keys
    x = (q[:, : p.split] @ keys[: p.split]).div_(p.softcap).tanh_()
    return torch.addmm(x, q[:, p.split :], keys[p.split :], beta=p.softcap)


def _add(out: dict[str, Tensor], x: Tensor, rows: slice, c: int, first: int, sink: int, few: Tensor | None) -> None:
    """Add one tile to the sums of its heads. Query 0 of the tile stands at position `first`, key 0 at `c`."""
    end = c + x.shape[-1]
    cut = end > first + 1  # the tile reaches past the diagonal; what lies there may even be inf
    p = x.exp() if "entropy" in out else x.exp_()
    if cut:
        p.tril_(first - c)
    if "col_mass" in out:
        out["col_mass"][:, c:end] += p.sum(1)
    if few is not None:
        low = torch.lt(p, few, out=torch.empty_like(p))  # counting a bool mask is many times slower
        out["col_low"][:, c:end] += (low.tril_(first - c) if cut else low).sum(1)
    if "entropy" in out:
        out["entropy"][:, rows] -= x.clamp_(max=-HIDDEN).mul_(p).sum(-1)
    if "sink_mass" in out and c < sink:
        out["sink_mass"][:, rows] += p[..., : sink - c].sum(-1)
    if "mean_distance" in out:
        # Positions count from the tile's first key: far from 0 float32 would lose the small differences.
        keys = torch.arange(end - c, dtype=p.dtype, device=p.device)
        queries = torch.arange(first - c, first - c + p.shape[1], dtype=p.dtype, device=p.device)
        out["mean_distance"][:, rows] += p.sum(-1) * queries - p @ keys
    if "row_max" in out:
        _add_max(out, p, rows, c)


def _add_max(out: dict[str, Tensor], p: Tensor, rows: slice, c: int) -> None:
    top, best = p.amax(-1), out["row_max"][:, rows]
    if "row_argmax" in out:
        # The first of the largest: max(-1) takes four times as long as these three passes.
        falling = torch.arange(p.shape[-1], 0, -1, dtype=p.dtype, device=p.device)
        largest = torch.eq(p, top[..., None], out=torch.empty_like(p)).mul_(falling)
        where = c + p.shape[-1] - largest.amax(-1).long()
        out["row_argmax"][:, rows] = torch.where(top > best, where, out["row_argmax"][:, rows])
    out["row_max"][:, rows] = torch.maximum(top, best)


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
