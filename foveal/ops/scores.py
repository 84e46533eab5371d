"""Estimates of what matters, cheap enough to choose by: scores of pages, of blocks, of tokens and of diagonals.

Queries are `[batch, heads, length, head_dim]`, keys `[batch, kv_heads, total, head_dim]`; the queries are the last
`length` of `total` positions. Query block a holds the queries a * query_block ..; key block b the keys b * key_block ..;
last blocks may be partial. Key blocks of which no query of a block sees any key score -inf, so a score says by itself
what is visible. Results are in float32 (float64 for float64 inputs). What is computed here serves to choose, so none of
it carries gradients.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.errors import InputError
from foveal.ops.dense import check, wide
from foveal.ops.pages import Pages
from foveal.ops.route import Route, no_kernel, routed

_TILE_NUMBERS = 1 << 21  # numbers of one intermediate tile: 8 MB in float32
_GROUPS = ("max", "sum", "mean", None)
_POOLS = ("mean", "max")


# ---------------------------------------------------------------------- pages (Quest)


@torch.no_grad()
def page_bound(
    q: Tensor,
    lo: Tensor,
    hi: Tensor,
    *,
    group: str | None = "max",
    count: Tensor | None = None,
    size: int = 1,
    keep_first: int = 0,
    keep_last: int = 0,
) -> Tensor:
    """Upper bounds of q . key over each page, from its smallest and largest key per dimension (Quest, section 3.2).

    `q` `[rows, group, head_dim]`, one row for each KV head of a sequence; `lo`, `hi` `[rows, pages, head_dim]`. The bound
    is relu(q) . hi + min(q, 0) . lo, unscaled. `group` says how the query heads of a row are joined: "max", "sum", "mean",
    or None to keep them apart. `count` `[rows]`, on the tensors' device, is how many pages a row holds (None: all), or how
    many keys where `size` says how many a page has: later pages score -inf. The first `keep_first` and last `keep_last`
    pages that a row holds score +inf. Returns `[rows, 1, pages]`, or `[rows, group, pages]` for None. Raises `InputError`
    for other shapes or words.
    """
    how = {"group": group, "count": count, "size": size, "keep_first": keep_first, "keep_last": keep_last}
    route = _page_bound_route(q, lo, hi, **how)
    if route.name == "triton":
        from foveal.ops.gpu.pooled import page_bound as kernel

        return kernel(q, lo, hi, group or "none", count, size, keep_first, keep_last)
    dtype = wide(q.dtype)
    q, lo, hi = q.to(dtype), lo.to(dtype), hi.to(dtype)
    bound = torch.baddbmm(q.clamp(min=0) @ hi.mT, q.clamp(max=0), lo.mT)
    if group is not None:
        bound = bound.amax(1, keepdim=True) if group == "max" else getattr(bound, group)(1, keepdim=True)
    if count is None and not keep_first and not keep_last:
        return bound
    pages = lo.shape[1]
    page = torch.arange(pages, device=q.device)
    held = torch.full((1,), pages, device=q.device) if count is None else (-(-count // size)).clamp(max=pages)
    held = held[:, None]
    forced = (page < keep_first) | (page >= held - keep_last)
    bound = bound.masked_fill(forced[:, None], math.inf)
    return bound.masked_fill((page >= held)[:, None], -math.inf)


@routed("page_bound")
def _page_bound_route(q, lo, hi, *, group="max", count=None, size=1, keep_first=0, keep_last=0) -> Route:
    if q.dim() != 3 or lo.dim() != 3 or lo.shape != hi.shape or (q.shape[0], q.shape[2]) != (lo.shape[0], lo.shape[2]):
        raise InputError(
            "expected q [rows, group, head_dim] and bounds [rows, pages, head_dim], "
            f"got {list(q.shape)}, {list(lo.shape)} and {list(hi.shape)}; give one row for each KV head of a sequence"
        )
    if group not in _GROUPS:
        raise InputError(f"expected group to be one of {_GROUPS}, got '{group}'; choose how query heads are joined")
    if count is not None and count.shape != q.shape[:1]:
        raise InputError(f"expected count [{q.shape[0]}], one for each row, got {list(count.shape)}; match the rows")
    if min(keep_first, keep_last) < 0:
        raise InputError(f"expected pages to keep from 0 up, got {keep_first} and {keep_last}; give counts")
    _check_size(size)
    why = no_kernel(q) or _no_half(q, lo, hi)
    if why is None and (q.shape[1] > 32 or q.shape[2] > 256):
        why = f"the kernel takes groups to 32 and head sizes to 256, not {q.shape[1]} and {q.shape[2]}"
    return Route("torch", why) if why else Route("triton", "two products and the group's maximum in one kernel")


# ---------------------------------------------------------------------- pooled blocks


@torch.no_grad()
def pool_blocks(x: Tensor, size: int, pool: str = "mean") -> Tensor:
    """Mean, or largest value per dimension, of each block of `size` tokens: `[batch, heads, ceil(length / size), head_dim]`.

    A partial last block counts the tokens it has. Raises `InputError` for another word or a size below 1.
    """
    route = _pool_blocks_route(x, size, pool)
    if route.name == "triton":
        from foveal.ops.gpu.pooled import pool_blocks as kernel

        return kernel(x, size, pool)
    length = x.shape[2]
    whole = length // size * size
    parts = [x[:, :, :whole].unflatten(2, (-1, size))] if whole else []
    if whole < length:
        parts.append(x[:, :, None, whole:])
    if not parts:
        return x.new_zeros(*x.shape[:2], 0, x.shape[3], dtype=wide(x.dtype))
    pooled = [t.mean(3, dtype=wide(x.dtype)) if pool == "mean" else t.amax(3).to(wide(x.dtype)) for t in parts]
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled, 2)


@routed("pool_blocks")
def _pool_blocks_route(x, size, pool="mean") -> Route:
    if pool not in _POOLS:
        raise InputError(f"expected pool to be one of {_POOLS}, got '{pool}'; choose how a block is summed up")
    _check_size(size)
    why = no_kernel(x) or _no_half(x)
    if why is None and x.shape[3] > 256:
        why = f"the kernel takes head sizes to 256, not {x.shape[3]}"
    return Route("torch", why) if why else Route("triton", "one read of the tokens, whatever their strides")


@torch.no_grad()
def pooled_scores(
    q: Tensor,
    k: Tensor,
    query_block: int,
    key_block: int,
    *,
    scale: float,
    pool: str = "mean",
    causal: bool = True,
) -> Tensor:
    """Logits between pooled query blocks and pooled key blocks, `[batch, heads, nq, nk]`; -inf where not visible.

    `pool`: "mean" (FlexPrefill, section 3.2; DraftAttention) or "max" per dimension. `causal=False` leaves every block
    visible. Raises `InputError` for shapes that do not fit or sizes below 1.
    """
    _pooled_scores_route(q, k, query_block, key_block, scale=scale, pool=pool, causal=causal)
    heads, length = q.shape[1:3]
    kv_heads, total = k.shape[1:3]
    qp, kp = pool_blocks(q, query_block, pool), pool_blocks(k, key_block, pool)
    scores = (qp * scale).unflatten(1, (kv_heads, heads // kv_heads)).flatten(2, 3) @ kp.mT
    scores = scores.unflatten(2, (heads // kv_heads, qp.shape[2])).flatten(1, 2)
    if not causal:
        return scores
    end = seen_blocks(qp.shape[2], kp.shape[2], query_block, key_block, total - length, q.device)
    return scores.masked_fill_(torch.arange(kp.shape[2], device=q.device) >= end[:, None], -math.inf)


@routed("pooled_scores")
def _pooled_scores_route(q, k, query_block, key_block, *, scale, pool="mean", causal=True) -> Route:
    check(q, k, None)
    _check_size(query_block)
    _check_size(key_block)
    return _pool_blocks_route(q, query_block, pool)


def seen_blocks(nq: int, nk: int, query_block: int, key_block: int, past: int, device) -> Tensor:
    """How many key blocks the queries of each block see any of, `[nq]`: `past` keys lie before the first query."""
    last = past + torch.arange(1, nq + 1, device=device) * query_block - 1
    return (last // key_block + 1).clamp(max=nk)


@torch.no_grad()
def pool_newest(pages: Pages, source: str, size: int, pooled: dict[str, Tensor]) -> None:
    """Pool anew, in place, the block of `size` slots that holds each row's newest key; rows without keys stay as they are.

    source: "key" or "value".  pooled: by "min", "max" or "mean", `[rows, blocks, head_dim]`. Slots past a row's length do not count.
    """
    low, high, mean = (pooled.get(kind) for kind in ("min", "max", "mean"))
    if _pool_newest_route(pages, source, size, pooled).name == "triton":
        from foveal.ops.gpu.pooled import pool_newest as kernel

        kernel(getattr(pages, source), pages.table, pages.length, size, low, high, mean)
        return
    length = pages.length.long()[:, None]
    block = (length - 1).clamp(min=0) // size
    slots = block * size + torch.arange(size, device=length.device)
    held = (slots < length)[..., None]
    x = pages.gather(source, slots * (slots < length), next(iter(pooled.values())).dtype)
    row = torch.arange(len(length), device=length.device)
    for kind, to in pooled.items():
        fill = {"min": math.inf, "max": -math.inf, "mean": 0.0}[kind]
        y = x.masked_fill(~held, fill)
        new = y.sum(1, dtype=wide(x.dtype)) / held.sum(1).clamp(min=1) if kind == "mean" else getattr(y, "a" + kind)(1)
        at = (row, block[:, 0])
        to[at] = torch.where(length > 0, new.to(to.dtype), to[at])


@routed("pool_newest")
def _pool_newest_route(pages, source, size, pooled) -> Route:
    if not pooled or not pooled.keys() <= {"min", "max", "mean"} or source not in ("key", "value"):
        raise InputError(f"expected 'key' or 'value' by 'min', 'max' or 'mean', got '{source}' by {sorted(pooled)}")
    _check_size(size)
    x = getattr(pages, source)
    why = no_kernel(x)
    if why is None and pages.format is not None:
        why = "the kernel reads no codes"
    if why is None and (size > 256 or _no_half(x) is not None):
        why = f"the kernel takes blocks to 256 slots in half or single precision, not {size} in {x.dtype}"
    return Route("torch", why) if why else Route("triton", "one kernel for all kinds")


# ---------------------------------------------------------------------- antidiagonals (XAttention)


@torch.no_grad()
def antidiagonal_scores(q: Tensor, k: Tensor, block: int, stride: int, *, scale: float, causal: bool = True) -> Tensor:
    """Estimated attention mass between blocks, from the antidiagonals of stride x stride tiles (XAttention, algorithm 1).

    The logit of a tile is the mean of q . k along its antidiagonal times `scale`, so every query and every key counts once
    per tile; a softmax over the key tiles, those the tile's last query sees, is then summed over the tiles of a key block
    and averaged over those of a query block. Tokens missing from a last tile count as zero vectors.
    Returns `[batch, heads, nq, nk]` for square blocks: rows add up to 1, -inf where not visible. `stride`: 8 or 16 in the
    paper. Raises `InputError` where `stride` does not divide `block`.
    """
    route = _antidiagonal_route(q, k, block, stride, scale=scale, causal=causal)
    if route.name == "triton":
        from foveal.ops.gpu.antidiagonals import antidiagonal_scores as kernel

        mass = kernel(q, k, block, stride, scale, causal)
    else:
        mass = _antidiagonal(q, k, block, stride, scale, causal)
    if not causal:
        return mass
    nq, nk = mass.shape[2:]
    end = seen_blocks(nq, nk, block, block, k.shape[2] - q.shape[2], q.device)
    return mass.masked_fill_(torch.arange(nk, device=q.device) >= end[:, None], -math.inf)


@routed("antidiagonal_scores")
def _antidiagonal_route(q, k, block, stride, *, scale, causal=True) -> Route:
    check(q, k, None)
    _check_size(stride)
    if block < 1 or block % stride:
        raise InputError(f"expected a block that is a multiple of the stride, got {block} and {stride}; change one")
    why, tiles = no_kernel(q) or _no_half(q, k), block // stride
    if why is None and (q.shape[3] % 16 or tiles & (tiles - 1) or tiles > 64):
        why = "the kernel takes head sizes that are multiples of 16 and 1, 2, 4 .. 64 tiles a block"
    return Route("torch", why) if why else Route("triton", "tiles, their softmax and the block sums in one pass")


def _antidiagonal(q: Tensor, k: Tensor, block: int, stride: int, scale: float, causal: bool) -> Tensor:
    batch, heads, length = q.shape[:3]
    kv_heads, total = k.shape[1:3]
    tiles, nq, nk = block // stride, -(-length // block), -(-total // block)
    # Reversed queries beside keys in order: one product of long vectors adds up the antidiagonal of a tile.
    long_q = _tiles(q, stride).flip(3).flatten(3) * (scale / stride)
    long_k = _tiles(k, stride).flatten(3)
    rows, columns = long_q.shape[2], long_k.shape[2]
    end = seen_blocks(rows, columns, stride, stride, total - length, q.device) if causal else None
    out = long_q.new_zeros(batch, heads, nq, nk)
    step = max(1, _TILE_NUMBERS // max(1, batch * heads * columns * tiles))  # query blocks at a time
    for a in range(0, nq, step):
        some = slice(a * tiles, min((a + step) * tiles, rows))
        seen = columns if end is None else min(columns, (total - length + some.stop * stride - 1) // stride + 1)
        x = long_q[:, :, some].unflatten(1, (kv_heads, -1)).flatten(2, 3) @ long_k[:, :, :seen].mT
        x = x.unflatten(2, (heads // kv_heads, -1)).flatten(1, 2)
        if end is not None:
            x.masked_fill_(torch.arange(seen, device=q.device) >= end[some, None], -math.inf)
        mass = _sum_blocks(x.softmax(-1), tiles, 3)
        count = torch.full((-(-mass.shape[2] // tiles),), tiles, device=q.device)
        count[-1] = mass.shape[2] - tiles * (len(count) - 1)
        out[:, :, a : a + step, : mass.shape[3]] = _sum_blocks(mass, tiles, 2) / count[:, None]
    return out


def _tiles(x: Tensor, stride: int) -> Tensor:
    """`[batch, heads, tiles, stride, head_dim]`, zero where the last tile lacks tokens."""
    pad = -x.shape[2] % stride
    return F.pad(x.to(wide(x.dtype)), (0, 0, 0, pad)).unflatten(2, (-1, stride))


def _sum_blocks(x: Tensor, size: int, dim: int) -> Tensor:
    pad = -x.shape[dim] % size
    x = F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, pad)) if pad else x
    return x.unflatten(dim, (-1, size)).sum(dim + 1)


# ---------------------------------------------------------------------- an observation window (MInference, FlexPrefill)


@torch.no_grad()
def window_scores(
    q: Tensor, k: Tensor, last: int, *, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """What the last `last` queries attend to, exactly: sums of their causal softmax by key and by distance.

    Returns (vertical, slash), both `[batch, heads, total]`: vertical[j] is the sum over the queries of the probability
    of key j, slash[o] that of the key o tokens before the query. Divide by `last` for means. MInference looks at 64
    queries, FlexPrefill at its last block of 128. Raises `InputError` for shapes that do not fit or another `last`.
    """
    route = _window_route(q, k, last, scale=scale, softcap=softcap)
    if route.name == "triton":
        from foveal.ops.gpu.window import window_scores as kernel

        return kernel(q, k, last, scale, softcap)
    batch, heads = q.shape[:2]
    kv_heads, total = k.shape[1:3]
    group, dtype = heads // kv_heads, wide(q.dtype)
    q = q[:, :, -last:].to(dtype).unflatten(1, (kv_heads, group)).flatten(2, 3) * scale
    later = torch.ones(last, last, dtype=torch.bool, device=q.device).triu(1)
    vertical, slash = (q.new_empty(batch, kv_heads, group, total) for _ in range(2))
    step = max(1, _TILE_NUMBERS * 4 // (batch * group * last * total))  # KV heads at a time
    for g in range(0, kv_heads, step):
        some = slice(g, g + step)
        # Rows lie `last - 1` numbers further apart than they are long: a stride of one more turns diagonals into columns.
        wider = q.new_zeros(batch, min(step, kv_heads - g), group, last, total + last - 1)
        x = q[:, some] @ k[:, some].to(dtype).mT
        x = x if softcap is None else (x / softcap).tanh_().mul_(softcap)
        x = x.unflatten(2, (group, last))
        x[..., total - last :].masked_fill_(later, -math.inf)
        p = x.softmax(-1)
        vertical[:, some] = p.sum(-2)
        wider[..., last - 1 :] = p
        strides = (*wider.stride()[:3], wider.shape[-1] + 1, 1)
        slash[:, some] = wider.as_strided((*wider.shape[:4], total), strides).sum(-2).flip(-1)
    return vertical.flatten(1, 2), slash.flatten(1, 2)


@routed("window_scores")
def _window_route(q, k, last, *, scale, softcap=None) -> Route:
    check(q, k, None)
    if not 1 <= last <= q.shape[2]:
        raise InputError(f"expected last between 1 and the {q.shape[2]} queries, got {last}; look at fewer of them")
    why = no_kernel(q) or _no_half(q, k)
    if why is None and q.shape[3] > 256:
        why = f"the kernel takes head sizes to 256, not {q.shape[3]}"
    return Route("torch", why) if why else Route("triton", "log-sum-exp first, then both sums in one pass")


# ---------------------------------------------------------------------- a few dimensions (FASA)


@torch.no_grad()
def partial_scores(q: Tensor, k: Tensor, dims: Tensor, *, scale: float = 1.0, causal: bool = True) -> Tensor:
    """Logits from some dimensions of each head only, `[batch, heads, length, total]`; -inf where not visible.

    `dims` int `[heads, m]`, or `[1, m]` for all heads, is a set of dimensions: one named twice counts once. FASA
    (section 3) ranks by 16 of 64 rotary pairs, unscaled; in the half-split layout pair m is dimensions m and
    m + head_dim / 2. All of k is read: fewer bytes need a copy of these dimensions laid out by itself.
    Raises `InputError` for shapes that do not fit, or (on a CPU, where it costs nothing) for dimensions outside head_dim.
    """
    _partial_route(q, k, dims, scale=scale, causal=causal)
    heads, length, dim = q.shape[1:]
    kv_heads, total = k.shape[1:3]
    dtype = wide(q.dtype)
    chosen = torch.zeros(dims.shape[0], dim, dtype=dtype, device=q.device).scatter_(1, dims.long(), scale)
    q = (q.to(dtype) * chosen[:, None]).unflatten(1, (kv_heads, heads // kv_heads)).flatten(2, 3)
    scores = (q @ k.to(dtype).mT).unflatten(2, (heads // kv_heads, length)).flatten(1, 2)
    if causal and length > 1:
        later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores[..., total - length :].masked_fill_(later, -math.inf)
    return scores


@routed("partial_scores")
def _partial_route(q, k, dims, *, scale=1.0, causal=True) -> Route:
    check(q, k, None)
    if dims.dim() != 2 or dims.shape[0] not in (1, q.shape[1]) or dims.is_floating_point():
        raise InputError(
            f"expected dims int [{q.shape[1]} or 1, m], got {dims.dtype} {list(dims.shape)}; give one row a head"
        )
    if dims.is_cpu and dims.numel() and not 0 <= int(dims.min()) <= int(dims.max()) < q.shape[3]:
        raise InputError(
            f"expected dimensions from 0 to {q.shape[3] - 1}, got {int(dims.min())}..{int(dims.max())}; drop those"
        )
    return Route("torch", "one matrix product with the other dimensions of q zeroed")


# ---------------------------------------------------------------------- checks


def _check_size(size: int) -> None:
    if size < 1:
        raise InputError(f"expected a size of at least 1 token, got {size}; give the tokens of a block")


def _no_half(*tensors: Tensor) -> str | None:
    """Why the kernels cannot read these; None if they can."""
    kinds = {t.dtype for t in tensors}
    if len(kinds) > 1:
        return f"the kernel wants one dtype, not {', '.join(sorted(str(d) for d in kinds))}"
    if kinds <= {torch.float16, torch.bfloat16, torch.float32}:
        return None
    return f"there is no kernel for {tensors[0].dtype}"
