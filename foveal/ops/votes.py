"""Choosing by exact weights in decode: query heads vote for cached keys in pages, and what they choose is read.

Rows (sequence, KV head) are packed as in `foveal.ops.attend_ragged`; the rows of a sequence lie side by side. Choices carry no
gradients. A softmax over all keys reads the keys once, and never their values.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from foveal.errors import InputError
from foveal.ops.dense import wide
from foveal.ops.paged_attention import MOST_QUERIES, attend_ragged
from foveal.ops.pages import Pages, choosing_misfit
from foveal.ops.ragged import Logit, attend_padded, logits
from foveal.ops.route import Route, routed
from foveal.ops.top import top_slots

SHARES = ("sum", "mean", "max")


class Turn(NamedTuple):
    """Positions to vote at: keys at 0 and the query at `stand`, wherever they are.

    frequency: float32 [head_dim / 2], radians a position of dimensions i and i + head_dim / 2 (`Rope.frequencies`). Slots are positions.
    """

    frequency: Tensor
    stand: int


class Kept(NamedTuple):
    """Choices to repeat: sequences where `again` bool [batch] says so vote for what `marks` bool [rows, bound] marks, unread."""

    again: Tensor
    marks: Tensor


@torch.no_grad()
def vote_slots(
    q: Tensor,
    pages: Pages,
    logit: Logit,
    k: int,
    *,
    kv_heads: int,
    whole: bool = True,
    share: str = "sum",
    sink: int | Tensor = 0,
    recent: int | Tensor = 0,
    middle: bool = False,
    own: bool = False,
    coarse: bool = False,
    count: Tensor | None = None,
    turn: Turn | None = None,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """The k keys with the largest weights, slots int32 `[lists, k]` in order (-1 at the end), and how many each list has `[lists]`.

    q: `[rows, group, head_dim]`, one query a head. Each head's softmax over the keys of its row is its vote; `share` ("sum", "mean",
    "max") joins the heads of a list: all heads of a sequence (`whole`; its rows must hold the same tokens), or those of one row.
    sink, recent: the first slots, and the newest (each row's newest key among them), that come before all others: numbers, or both
    int `[batch]`. middle: only the keys between them are voted on. own: the newest key may be chosen; else it never is, even as recent.
    coarse: votes are compared in bfloat16. Of equals the earlier wins. count: int `[lists]`, at most that many. Soft-cap and scale of
    `logit` count, its sinks do not. Raises InputError for shapes and combinations that do not fit.
    """
    ends = (sink, recent)
    _check(q, pages, k, kv_heads, share, ends, whole, turn, kept)
    if _route(q, pages, turn).name == "torch":
        return _torch(q, pages, logit, k, kv_heads, whole, share, ends, middle, own, coarse, count, turn, kept)
    from .gpu import votes as gpu

    each = isinstance(sink, Tensor)
    return gpu.vote_slots(
        q, pages.key, pages.table, pages.length, pages.bound, kv_heads, logit.scale, logit.softcap, k, count, 0 if each else sink,
        0 if each else recent, torch.stack(ends, 1).to(torch.int32) if each else None, middle, own, share, whole, coarse,
        *((None, 0) if turn is None else turn), *(kept or (None, None)),
    )  # fmt: skip


@routed("vote_slots")
def _vote_route(q, pages, logit, k, *, kv_heads, turn=None, **_) -> Route:
    return _route(q, pages, turn)


def _route(q: Tensor, pages: Pages, turn: object) -> Route:
    why = choosing_misfit(q, pages)
    if why is None and (q.shape[1] > MOST_QUERIES or q.shape[2] > 256):
        why = f"the kernel takes groups to {MOST_QUERIES} and head sizes to 256, not {q.shape[1]} and {q.shape[2]}"
    if why is None:
        return Route("triton", "keys are read once in their pages" + ("" if turn is None else ", turned on the way"))
    return Route("torch", why)


def _check(q, pages, k, kv_heads, share, ends, whole, turn, kept) -> None:
    if q.dim() != 3 or q.shape[0] != pages.rows or q.shape[0] % kv_heads:
        raise InputError(f"expected q [{pages.rows} rows of {kv_heads} KV heads, group, head_dim], got {list(q.shape)}")
    if k < 1 or share not in SHARES:
        raise InputError(f"expected k of at least 1 and share in {SHARES}, got {k} and '{share}'; choose those")
    if isinstance(ends[0], Tensor) != isinstance(ends[1], Tensor):
        raise InputError("sink and recent are both numbers or both tensors [batch]; give them alike")
    if turn is not None and turn.frequency.shape != (q.shape[2] // 2,):
        raise InputError(
            f"expected frequencies [{q.shape[2] // 2}] for heads of {q.shape[2]}, got {list(turn.frequency.shape)}"
        )
    if kept is not None and not whole:
        raise InputError("choices are repeated for whole sequences: give `kept` with whole=True")


def _torch(
    q, pages, logit, k, kv_heads, whole, share, ends, middle, own, coarse, count, turn, kept
) -> tuple[Tensor, Tensor]:
    """Gather, softmax, sort: what the kernels mean, and the path where there are none."""
    slot = torch.arange(pages.bound, device=q.device)
    length = pages.length[:, None].long()
    key = pages.gather("key", slot * (slot < length), q.dtype)
    if turn is not None:
        key = turned(key, -slot, turn.frequency)
        q = turned(q, (turn.stand - length + 1), turn.frequency)
    z = logits(q.to(wide(q.dtype)), key.to(wide(q.dtype)), logit._replace(sinks=None))
    sink, recent = (e.repeat_interleave(kv_heads)[:, None] if isinstance(e, Tensor) else e for e in ends)
    forced = (slot < sink) | (slot >= length - recent)
    offered = slot < length
    hidden = ~offered | forced if middle else ~offered
    weight = z.masked_fill(hidden[:, None], -math.inf).softmax(-1).nan_to_num(0.0)
    if whole:
        weight = weight.unflatten(0, (-1, kv_heads)).flatten(1, 2)
        forced, offered, length = (x.expand(q.shape[0], -1)[::kv_heads] for x in (forced, offered, length))
    vote = weight.amax(1) if share == "max" else getattr(weight, share)(1)
    if kept is not None:
        repeated = torch.where(kept.marks[::kv_heads, : pages.bound], 1.0, -math.inf)
        vote = torch.where(kept.again[:, None], repeated, vote)
    vote = vote.masked_fill(forced, math.inf).masked_fill(~offered | (slot >= length - int(not own)), -math.inf)
    chosen = top_slots(vote.bfloat16() if coarse else vote, k, count=count)
    return chosen, (chosen >= 0).sum(1, dtype=torch.int32)


def turned(x: Tensor, by: Tensor, frequency: Tensor) -> Tensor:
    """x [..., n, head_dim] turned by positions [..., n], first and second half paired; in float32, rounded to the dtype of x."""
    angle = by[..., None] * frequency
    cos, sin = angle.cos(), angle.sin()
    low, high = x.float().chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).to(x.dtype)


# ---------------------------------------------------------------------- reading by rank


def attend_renumbered(
    q: Tensor, pages: Pages, logit: Logit, slots: Tensor, found: Tensor, frequency: Tensor, *, kv_heads: int
) -> Tensor:
    """Decode attention over listed keys and each row's newest, at positions 0, 1, 2 .. in that order: `[rows, group, value_dim]`.

    q: `[rows, group, head_dim]`.  slots: int32 `[batch, m]`, one list for the KV heads of a sequence, ascending, of which the first `found`
    `[batch]` count; the newest key comes after them and the query stands where it does. Slots are the positions that keys and query carry;
    frequency as in `Turn`.  logit.sinks: `[rows, group]`. Raises InputError for lists of another shape.
    """
    if slots.dim() != 2 or slots.shape[0] * kv_heads != pages.rows or found.shape != slots.shape[:1]:
        raise InputError(
            f"expected slots [{pages.rows // kv_heads}, m] and how many count, got {list(slots.shape)}, {list(found.shape)}"
        )
    if _renumbered_route(q, pages, logit, slots, found, frequency, kv_heads=kv_heads).name == "triton":
        from .gpu import renumbered as gpu

        sinks = None if logit.sinks is None else logit.sinks.contiguous()
        return gpu.attend_renumbered(
            q, pages.key, pages.value, pages.table, pages.length, slots, found, frequency, kv_heads, logit.scale, logit.softcap, sinks
        )  # fmt: skip
    newest = pages.length.long()[:, None] - 1
    rank = torch.arange(slots.shape[1] + 1, device=q.device)
    each, count = (x.repeat_interleave(kv_heads, 0) for x in (slots.long(), found.long()[:, None]))
    each = torch.nn.functional.pad(each, (0, 1))
    at = torch.where(rank == count, newest, each).clamp(min=0)
    key, value = (pages.gather(name, at * (rank <= count), q.dtype) for name in ("key", "value"))
    key, q = turned(key, rank - at, frequency), turned(q, count - newest, frequency)
    wider, how = (
        [x.to(wide(q.dtype)) for x in (q, key, value)],
        {"hidden": (rank > count)[:, None], "may_be_blind": True},
    )
    return attend_padded(*wider, logit, **how).out.to(q.dtype)


@routed("attend_renumbered")
def _renumbered_route(q, pages, logit, slots, found, frequency, *, kv_heads) -> Route:
    route = _route(q, pages, frequency)
    if route.name == "triton" and pages.value.shape[2] > 256:
        return Route("torch", "the kernel takes values of up to 256 dimensions")
    return route


# ---------------------------------------------------------------------- the least of a list


@torch.no_grad()
def drop_least(
    q: Tensor,
    pages: Pages,
    logit: Logit,
    slots: Tensor,
    marks: Tensor,
    allowed: int | Tensor,
    *,
    kv_heads: int,
    share: str = "max",
) -> None:
    """Mark each row's newest key, and where more than `allowed` are marked take the mark from the one of least weight; in place.

    q: `[rows, group, head_dim]`.  slots: int32 `[rows, m]` ascending, the marked keys before this step, -1 for none.  marks: bool
    `[rows, bound]`.  allowed: a number, or int `[batch]`.  share: "max" or "mean" of the group's weights, over the listed keys and the
    newest. Of equals the earlier leaves. Raises InputError for other words or shapes.
    """
    if share not in ("max", "mean") or marks.dtype != torch.bool or slots.shape[0] != pages.rows:
        raise InputError(
            f"expected share 'max' or 'mean', marks bool and slots [{pages.rows}, m], got '{share}', {marks.dtype}, {list(slots.shape)}"
        )
    if _least_route(q, pages, logit, slots, marks, allowed, kv_heads=kv_heads, share=share).name == "triton":
        from .gpu import votes as gpu

        number, each = (0, allowed) if isinstance(allowed, Tensor) else (allowed, None)
        gpu.drop_least(
            q, pages.key, pages.value, pages.table, pages.length, pages.bound, logit.scale, logit.softcap, slots, marks, number, each,
            kv_heads, share == "mean",
        )  # fmt: skip
        return
    how = {"slots": slots, "own": True, "want": "weights"}
    weight = attend_ragged(q, pages, logit._replace(sinks=None), **how).weights
    weight = weight.amax(1) if share == "max" else weight.mean(1)
    newest = pages.length.long()[:, None] - 1
    each = torch.cat([slots.long(), newest], 1)
    place = weight.masked_fill(each < 0, math.inf).argmin(1, keepdim=True)
    limit = allowed.repeat_interleave(kv_heads)[:, None] if isinstance(allowed, Tensor) else allowed
    lost = each.gather(1, place)
    over = (each >= 0).sum(1, keepdim=True) > limit
    marks.scatter_(1, newest, True)
    marks.scatter_(1, lost, marks.gather(1, lost) & ~over)


@routed("drop_least")
def _least_route(q, pages, logit, slots, marks, allowed, *, kv_heads, share="max") -> Route:
    return _route(q, pages, None)
