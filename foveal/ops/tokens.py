"""Prefill over lists of keys: each query, or each block of queries, reads the keys it lists and no others."""

from __future__ import annotations

import torch
from torch import Tensor

from foveal.errors import InputError
from foveal.ops.dense import HIDDEN, Prepared, _cpu_kernel, _pad, check, exact, finish, prepare, spread, wide
from foveal.ops.route import Route, no_kernel, routed

_GATHERED_NUMBERS = 1 << 21  # keys copied, or logits made, at a time: 8 MB in float32
_ROWS = 256  # queries of a tile: later ones see more keys, so tiles skip what none of them sees


def attend_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    *,
    scale: float,
    size: int = 1,
    queries: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: tuple[Tensor, Tensor] | None = None,
    mass: Tensor | None = None,
    need_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention over listed keys; cost is proportional to the lengths of the lists (HISA, TokenSelect, Token Sparse).

    `slots` is int `[batch, kv_heads or heads, ceil(length / size), m]`: the queries a*size .. (a+1)*size read the keys
    slots[.., a, :], as far as causality lets them; -1 is none, and a key listed twice counts twice. Lists in ascending order
    let early queries skip the rest. `queries` bool `[batch, 1 or kv_heads or heads, length]` chooses the queries that are
    computed (None: all); the others return 0 and an lse of -inf and cost nothing, learned sinks left aside.
    Shapes and other keywords: see `foveal.ops.dense`. Raises `InputError` for lists or masks of another shape or dtype.
    """
    route = _route(
        q, k, v, slots, scale=scale, size=size, queries=queries, softcap=softcap, sinks=sinks, bias=bias, mass=mass
    )
    rows, counts, slots = _rows(q, slots, size, queries)
    if route.name == "triton":
        from foveal.ops.gpu import tokens as gpu

        out, lse = gpu.attend_tokens(q, k, v, slots, rows, counts, size, scale)
    else:
        p = prepare(q, k, v, scale=scale, softcap=softcap, bias=bias, mass=mass, differentiable=(q, k, v, sinks))
        out, lse = _run(p, slots, rows, counts, size)
    return finish(out, lse, q, sinks=sinks, holes=True, need_lse=need_lse)


@routed("attend_tokens")
def _route(
    q, k, v, slots, *, scale, size=1, queries=None, softcap=None, sinks=None, bias=None, mass=None, need_lse=False
) -> Route:
    check(q, k, v, sinks=sinks, bias=bias, mass=mass)
    batch, heads, length = q.shape[:3]
    kv_heads = k.shape[1]
    if size < 1:
        raise InputError(f"expected a block size of at least 1 query, got {size}")
    nq = -(-length // size)
    fits = slots.dim() == 4 and slots.shape[0] == batch and slots.shape[1] in (kv_heads, heads) and slots.shape[2] == nq
    if slots.is_floating_point() or slots.dtype == torch.bool or not fits:
        raise InputError(
            f"expected int slots [{batch}, {kv_heads} or {heads}, {nq}, m] for blocks of {size}, "
            f"got {slots.dtype} {list(slots.shape)}; give one list for each block of queries"
        )
    if queries is not None and (
        queries.dtype != torch.bool
        or queries.dim() != 3
        or (queries.shape[0], queries.shape[2]) != (batch, length)
        or queries.shape[1] not in (1, kv_heads, heads)
    ):
        raise InputError(
            f"expected queries bool [{batch}, 1 or {kv_heads} or {heads}, {length}], "
            f"got {queries.dtype} {list(queries.shape)}; say for each query whether it is computed"
        )
    why = no_kernel(q) or _unfit(q, k, v, softcap, bias, mass, sinks)
    return Route("torch", why) if why else Route("triton", "keys gathered tile by tile inside the kernel")


def _unfit(q: Tensor, k: Tensor, v: Tensor, softcap, bias, mass, sinks) -> str | None:
    """Why the kernel cannot do this; None if it can."""
    named = {"a soft-cap": softcap, "a bias": bias, "mass": mass}
    if given := [name for name, x in named.items() if x is not None]:
        return f"the kernel knows no {' and no '.join(name.removeprefix('a ') for name in given)}"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, sinks)):
        return "gradients are wanted and the kernel has no backward"
    if len({q.dtype, k.dtype, v.dtype}) > 1 or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"there is no kernel for {q.dtype} queries with {k.dtype} keys and {v.dtype} values"
    if q.shape[3] > 256 or v.shape[3] > 256 or 0 in q.shape:
        return f"the kernel takes head sizes to 256, not {q.shape[3]} and {v.shape[3]}"
    return None


def _rows(q: Tensor, slots: Tensor, size: int, queries: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(queries of each list, those to compute first; how many those are; lists), None where all queries are computed.

    Rows int32 `[batch, lists, nq, size]` count queries of the prompt, counts `[batch, lists, nq]`. Lists of KV heads are
    repeated for query heads only where the heads of a group compute different queries.
    """
    if queries is None:
        return None, None, slots
    length = q.shape[2]
    lists = max(slots.shape[1], queries.shape[1])
    slots = spread(slots, lists)
    nq = slots.shape[2]
    chosen = torch.nn.functional.pad(spread(queries, lists), (0, nq * size - length)).unflatten(2, (nq, size))
    order = chosen.byte().argsort(dim=-1, descending=True, stable=True)
    rows = order + torch.arange(nq, device=q.device)[:, None] * size
    return rows.int(), chosen.sum(-1, dtype=torch.int32), slots


def _run(p: Prepared, slots: Tensor, rows: Tensor | None, counts: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Gather and attend: lists are a batch, taken so many at a time that the copies stay in the cache."""
    batch, heads, length, _ = p.q.shape
    kv_heads, total = p.k.shape[1:3]
    if kv_heads > slots.shape[1]:  # a bias or mass of each query head has made keys of each query head
        slots, rows, counts = (t if t is None else spread(t, kv_heads) for t in (slots, rows, counts))
    lists, nq, m = slots.shape[1:]
    group = heads // lists
    if rows is None:
        starts = torch.arange(nq, device=slots.device) * size
        rows = (starts[:, None] + torch.arange(size, device=slots.device)).expand(batch, lists, nq, size)
        counts = (length - starts).clamp(max=size).expand(batch, lists, nq)
    slots, rows, counts = slots.flatten(0, 2).long(), rows.flatten(0, 2).long(), counts.flatten()
    # Row (b, h, query) of the flat queries, and (b, kv head, slot) of the flat keys.
    list_of = torch.arange(batch * lists, device=slots.device).repeat_interleave(nq)
    key_base = (list_of // lists * kv_heads + list_of % lists * kv_heads // lists) * total
    flat = Prepared(p.q.flatten(0, 2), p.k.flatten(0, 2), p.v.flatten(0, 2), p.scale, p.softcap, p.split, p.exact)
    places, outs, lses = [], [], []
    live = ((slots >= 0).any(-1) & (counts > 0)).nonzero()[:, 0]
    live = live[counts[live].argsort(stable=True)]  # lists with equally many queries need no padding
    width = p.k.shape[-1] + p.v.shape[-1]
    step = max(1, _GATHERED_NUMBERS // max(1, m * (width + group * min(size, _ROWS))))
    for some in live.split(step) if len(live) else ():
        most = int(counts[some].max())
        for start in range(0, most, _ROWS):
            stop = min(start + _ROWS, most)
            here = rows[some, start:stop]
            real = torch.arange(start, stop, device=here.device) < counts[some, None]
            here = here.where(real, 0)
            out, lse = _tile(flat, slots[some], key_base[some], here, list_of[some], group, length, total)
            heads_of = (list_of[some, None] * group + torch.arange(group, device=here.device))[:, :, None]
            keep = real[:, None].expand(-1, group, -1)
            places.append((heads_of * length + here[:, None])[keep])
            outs.append(out[keep].to(wide(out.dtype)))
            lses.append(lse[keep])
    out = p.q.new_zeros(batch * heads * length, p.v.shape[-1], dtype=wide(p.q.dtype))
    lse = out.new_full((batch * heads * length,), HIDDEN)
    if places:
        where = torch.cat(places)
        out, lse = out.index_put((where,), torch.cat(outs)), lse.index_put((where,), torch.cat(lses))
    return out.view(batch, heads, length, -1), lse.view(batch, heads, length)


def _tile(
    p: Prepared, slots: Tensor, key_base: Tensor, rows: Tensor, list_of: Tensor, group: int, length: int, total: int
) -> tuple[Tensor, Tensor]:
    """Out `[n, group, rows, value_dim]` and lse of n lists: slots `[n, m]`, rows `[n, rows]`."""
    position = (rows + total - length).int()
    after = slots.where(slots >= 0, total).int()  # no key is a key after all queries
    reach = (after <= position.amax(-1, keepdim=True)).any(0) * torch.arange(1, slots.shape[1] + 1, device=slots.device)
    m = max(int(reach.amax()), 1)
    hide = after[:, None, :m] > position[..., None]
    at = (key_base[:, None] + slots[:, :m].clamp(0, total - 1)).flatten()
    heads_of = list_of[:, None] * group + torch.arange(group, device=slots.device)
    q = p.q[heads_of[:, :, None] * length + rows[:, None]]
    k, v = (t.index_select(0, at).view(len(slots), 1, m, -1) for t in (p.k, p.v))
    if p.exact or not q.is_cpu:
        return exact(p.replace(q, k, v), causal=False, mask=lambda start, stop: ~hide[:, None, start:stop])
    width = max(q.shape[3], v.shape[3])
    mask = hide[:, None].to(wide(q.dtype)).mul_(HIDDEN)
    shared = (_pad(t, width).expand(-1, group, -1, -1) for t in (k, v))
    out, lse = _cpu_kernel(_pad(q, width), *shared, False, mask, p.scale)
    return out[..., : v.shape[3]], lse
