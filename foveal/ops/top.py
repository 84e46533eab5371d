"""Choosing by score: maps of key blocks, and lists of slots.

The larger score wins, and of equal scores the earlier position. A score of -inf marks what is not visible; it is never
chosen for its score. Choices carry no gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveal.errors import InputError
from foveal.ops.route import Route, no_kernel, routed
from foveal.ops.scores import seen_blocks

_SCOPES = ("row", "head", "map")
_NORMS = ("softmax", "sum")


# ---------------------------------------------------------------------- maps of blocks


@torch.no_grad()
def top_blocks(
    scores: Tensor,
    *,
    k: int | Tensor | None = None,
    mass: float | None = None,
    threshold: float | None = None,
    per: str = "row",
    normalize: str = "softmax",
    size: int | tuple[int, int] = 1,
    past: int = 0,
    keep_first: int = 0,
    keep_last: int = 0,
    diagonal: bool = True,
    causal: bool = True,
) -> Tensor:
    """Which key blocks each query block reads: bool `[batch, heads, nq, nk]`, like `scores`. Exactly one rule is given:

    - `k`: the k best blocks; a number, or an int tensor with one for each list.
    - `mass`: the fewest whose mass reaches this share, from 0 to 1; 1 takes every visible block. The masses of a row are
      softmax(scores), or, with `normalize="sum"`, scores >= 0 over their sum (FlexPrefill, XAttention).
    - `threshold`: those with scores >= threshold.

    `per` says what one list is: "row" a query block `[batch, heads, nq]`, "head" the whole map of a head
    `[batch, heads]` (DraftAttention; the mass is then a share of all rows together), "map" all heads of a sequence `[batch]`.

    Forced blocks are always read, whatever their score, and count towards k and mass: the `keep_first` first, the
    `keep_last` newest that the row sees, and with `diagonal` those that hold the row's own tokens. A row is never empty:
    one without any gets its best block, or its newest if all scores are -inf.

    `size` in tokens, one number or (query block, key block), and `past`, the tokens before the first query, say where
    the diagonal lies; with `causal` no later block is chosen. FlexPrefill excludes the block that crosses the mass; here
    it is included. For "at least n blocks and at least this mass" join two maps by |.
    Raises `InputError` unless one rule is given, or if sizes and past do not give a map of this shape.
    """
    route = _top_blocks_route(
        scores, k=k, mass=mass, threshold=threshold, per=per, normalize=normalize, size=size, past=past,
        keep_first=keep_first, keep_last=keep_last, diagonal=diagonal, causal=causal,
    )  # fmt: skip
    sizes = size if isinstance(size, tuple) else (size, size)
    if route.name == "triton":
        from foveal.ops.gpu.top_blocks import top_blocks as kernel

        rule = mass if k is None else k
        shape = (*sizes, past, keep_first, keep_last, diagonal, causal)
        return kernel(scores, rule, normalize, *shape)
    allowed, forced, newest = _shape_of_map(scores, *sizes, past, keep_first, keep_last, diagonal, causal)
    x = scores.masked_fill(~allowed, -math.inf)
    if threshold is not None:
        picked = x >= threshold
    elif mass is not None and mass >= 1:
        picked = x > -math.inf
    else:
        flat = {"row": 3, "head": 2, "map": 1}[per]
        shares = None if mass is None else _masses(x, normalize).masked_fill(x == -math.inf, -math.inf)
        ranked = (x if shares is None else shares).masked_fill(forced, math.inf).flatten(flat)
        if shares is not None:
            count = _count_for_mass(shares.clamp(min=0).flatten(flat), ranked, mass)
        else:
            count = k if isinstance(k, int) else k.to(scores.device).expand(ranked.shape[:-1])
        picked = largest(ranked, count).view(scores.shape)
    picked = (picked & (x > -math.inf)) | forced
    empty = ~picked.any(-1, keepdim=True)
    best = x.argmax(-1, keepdim=True)
    best = torch.where(x.gather(-1, best) > -math.inf, best, newest[:, None])
    return picked | (empty & (torch.arange(scores.shape[3], device=scores.device) == best))


@routed("top_blocks")
def _top_blocks_route(
    scores, *, k=None, mass=None, threshold=None, per="row", normalize="softmax", size=1, past=0, keep_first=0,
    keep_last=0, diagonal=True, causal=True,
) -> Route:  # fmt: skip
    if scores.dim() != 4 or not scores.is_floating_point() or scores.shape[3] == 0:
        raise InputError(
            f"expected float scores [batch, heads, nq, nk], got {scores.dtype} {list(scores.shape)}; score blocks"
        )
    if sum(rule is not None for rule in (k, mass, threshold)) != 1:
        raise InputError(
            f"expected one of k, mass and threshold, got k={k}, mass={mass}, threshold={threshold}; give one"
        )
    if per not in _SCOPES or normalize not in _NORMS:
        raise InputError(
            f"expected per in {_SCOPES} and normalize in {_NORMS}, got '{per}' and '{normalize}'; choose those"
        )
    if isinstance(k, int) and k < 1:
        raise InputError(f"expected k of at least 1 block, got {k}; every query reads something")
    if isinstance(k, Tensor) and (k.is_floating_point() or k.dim() > _SCOPES[::-1].index(per) + 1):
        raise InputError(
            f"expected an int k that fits one number for each {per}, got {k.dtype} {list(k.shape)}; reshape it"
        )
    if mass is not None and not 0 < mass <= 1:
        raise InputError(f"expected a mass above 0 and up to 1, got {mass}; give the share of attention to cover")
    if min(keep_first, keep_last) < 0:
        raise InputError(f"expected blocks to keep from 0 up, got {keep_first} and {keep_last}; give counts")
    _check_map(scores.shape[2], scores.shape[3], size, past, causal)
    why = no_kernel(scores)
    if why is None and threshold is not None:
        why = "a threshold is one comparison"
    if why is None and (per != "row" or mass == 1):
        why = f"a list per {per} is sorted as a whole" if per != "row" else "every visible block is taken"
    if why is None and (scores.shape[3] > 8192 or scores.dtype == torch.float64):
        why = f"the kernel takes rows to 8192 blocks in float32, not {scores.shape[3]} in {scores.dtype}"
    return Route("torch", why) if why else Route("triton", "a row in registers, bisected by an integer key")


def _check_map(nq: int, nk: int, size: int | tuple[int, int], past: int, causal: bool) -> None:
    query_block, key_block = size if isinstance(size, tuple) else (size, size)
    if min(query_block, key_block) < 1 or past < 0:
        raise InputError(f"expected sizes from 1 and past from 0 up, got {size} and {past}; give them in tokens")
    least, most = past + (nq - 1) * query_block + 1, past + nq * query_block
    if causal and nq and (-(-most // key_block) < nk or -(-least // key_block) > nk):
        raise InputError(
            f"expected the key blocks of {least} to {most} tokens for {nq} query blocks of {query_block} after {past} tokens, "
            f"got {nk} of {key_block}; give the sizes and the tokens before the first query"
        )


def _shape_of_map(
    scores: Tensor, query_block: int, key_block: int, past: int, first: int, last: int, diagonal: bool, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(blocks a row may read, blocks it must, bool `[nq, nk]` both; its newest block, `[nq]`)."""
    nq, nk = scores.shape[2:]
    block = torch.arange(nk, device=scores.device)
    end = seen_blocks(nq, nk, query_block, key_block, past, scores.device)
    stop = (end if causal else torch.full_like(end, nk))[:, None]
    allowed = (block < stop).expand(nq, nk)
    forced = (block < first) | (block >= stop - last)
    if diagonal:
        own = (past + torch.arange(nq, device=scores.device) * query_block) // key_block
        forced = forced | ((block >= own[:, None]) & (block < end[:, None]))
    return allowed, forced & allowed, end - 1


def _masses(x: Tensor, normalize: str) -> Tensor:
    """Shares of each row of scores, adding up to 1, or to 0 where nothing is visible."""
    x = x.double()
    if normalize == "sum":
        x = x.clamp(min=0)
        return x / x.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.where(x.amax(-1, keepdim=True) > -math.inf, x.softmax(-1), 0.0)


def _count_for_mass(shares: Tensor, ranked: Tensor, mass: float) -> Tensor:
    """How many of each ranked list `[..., n]` to take until their shares reach `mass` of the whole; all that are forced."""
    order = ranked.argsort(dim=-1, descending=True)
    reached = shares.gather(-1, order).cumsum(-1)
    # Rounding must not add a block where the target is met exactly.
    goal = mass * (1 - 1e-6) * reached[..., -1:]
    before = torch.nn.functional.pad(reached[..., :-1], (1, 0))
    return torch.maximum((before < goal).sum(-1), (ranked == math.inf).sum(-1))


def largest(x: Tensor, count: int | Tensor) -> Tensor:
    """Mask of the `count` largest of each list `[..., n]` (all if it is shorter): ties by position, -inf like any number."""
    n = x.shape[-1]
    if isinstance(count, int):
        count = min(count, n)
        least = x.topk(count, -1, sorted=False).values.amin(-1, keepdim=True)
    else:
        count = count.clamp(0, n)[..., None]
        least = x.sort(-1, descending=True).values.gather(-1, (count - 1).clamp(min=0))
    above, level = x > least, x == least
    room = count - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1) <= room))


# ---------------------------------------------------------------------- lists of slots


@torch.no_grad()
def top_slots(
    scores: Tensor, k: int, forced: Tensor | None = None, *, count: Tensor | None = None, unit: int = 1
) -> Tensor:
    """The k best slots of each row in ascending order: int32 `[rows, k]`, -1 at the end where a row has fewer.

    `scores` `[rows, n]`; `forced` bool `[rows, n]` come first, as far as they are visible; `count` int `[rows]` on the
    scores' device says how many a row takes, at most k. `unit`: the slots of a score, of which the first is named: score i
    stands for slot i * unit. Nothing is read back from the device. Raises `InputError` for other shapes, k < 1 or unit < 1.
    """
    route = _top_slots_route(scores, k, forced, count=count, unit=unit)
    if route.name == "triton":
        from foveal.ops.gpu.top import top_slots as kernel

        return kernel(scores, k, forced, count, unit)
    rows, n = scores.shape
    if n == 0:
        return torch.full((rows, k), -1, dtype=torch.int32, device=scores.device)
    x = scores if forced is None else scores.masked_fill(forced & (scores > -math.inf), math.inf)
    picked = largest(x, min(k, n) if count is None else count.clamp(max=k)) & (x > -math.inf)
    # Every picked slot goes to its rank, all others to a column that is cut off.
    rank = torch.where(picked, picked.cumsum(-1) - 1, k)
    slots = torch.full((rows, k + 1), -1, dtype=torch.int32, device=scores.device)
    place = torch.arange(0, n * unit, unit, dtype=torch.int32, device=scores.device).expand(rows, n)
    return slots.scatter_(1, rank, place)[:, :k]


@routed("top_slots")
def _top_slots_route(scores, k, forced=None, *, count=None, unit=1) -> Route:
    if scores.dim() != 2 or not scores.is_floating_point():
        raise InputError(
            f"expected float scores [rows, n], got {scores.dtype} {list(scores.shape)}; flatten batch and heads"
        )
    if k < 1:
        raise InputError(f"expected k of at least 1 slot, got {k}; every query reads something")
    if unit < 1:
        raise InputError(f"expected a unit of at least 1 slot, got {unit}; give the slots of a score")
    if forced is not None and (forced.dtype != torch.bool or forced.shape != scores.shape):
        raise InputError(
            f"expected forced bool {list(scores.shape)}, got {forced.dtype} {list(forced.shape)}; match the scores"
        )
    if count is not None and (count.is_floating_point() or count.shape != scores.shape[:1]):
        raise InputError(
            f"expected count int [{scores.shape[0]}], got {count.dtype} {list(count.shape)}; one for each row"
        )
    why = no_kernel(scores)
    if why is None and (scores.dtype == torch.float64 or scores.shape[1] == 0):
        why = f"there is no kernel for {scores.shape[1]} scores in {scores.dtype}"
    return (
        Route("torch", why)
        if why
        else Route("triton", "an integer key, its k-th value, compaction: one kernel, or digit by digit for long rows")
    )


@torch.no_grad()
def marked_slots(mask: Tensor, k: int) -> Tensor:
    """The slots where mask bool `[rows, n]` is true, in order, the first k of each row: int32 `[rows, k]`, -1 at the end.

    Raises `InputError` for other shapes or k < 1.
    """
    if _marked_slots_route(mask, k).name == "triton":
        from foveal.ops.gpu.top import marked_slots as kernel

        return kernel(mask, k)
    return top_slots(torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -math.inf), k)


@routed("marked_slots")
def _marked_slots_route(mask, k) -> Route:
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise InputError(
            f"expected a mask bool [rows, n], got {mask.dtype} {list(mask.shape)}; flatten batch and heads"
        )
    if k < 1:
        raise InputError(f"expected k of at least 1 slot, got {k}; every query reads something")
    why = no_kernel(mask)
    return Route("torch", why) if why else Route("triton", "one kernel; each program counts the marks before its own")
