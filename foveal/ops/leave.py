"""Decode: in every row the key that matters least leaves, found and removed where the keys lie.

What `leave_page_keys` does in one launch is, written out: `leaver` names a slot, `drop_page_keys` moves the last key into its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .pages import Pages
from .route import Route, no_kernel, routed

MOST_PLANES = 2


@dataclass(frozen=True)
class Leaving:
    """Who leaves the rows of a layer, at most one key each.

    pages, free, top: the keys and the stack of unused pages, as `drop_page_keys` takes them.  token: int32 [rows, slots]; the key in the
    last slot of a row is its newest.  planes: what else moves with the keys, [rows, slots] float32 with its fill; the first is the mass
    where `fold`.  kv_heads: rows of a sequence.

    allowed: rows with more keys lose one, a number or int64 [batch, 1 or kv_heads].  Who: of the keys with token ids from `after` on
    without the newest `recent` (a number or int64 [batch, 1], by id) the one with the least `score` [rows, slots], or `by_token`
    [batch, tokens] of its token id, or the oldest; of equals the first slot.
    heads: bool [kv_heads], the others keep all.  fold: the oldest stays instead, and the next leaves into it as a mean weighted by mass.
    gone: int32 [batch], a token id that leaves before any other where it is held, -1 for none.
    """

    pages: Pages
    free: Tensor
    top: Tensor
    token: Tensor
    planes: Sequence[tuple[Tensor, float]]
    kv_heads: int
    allowed: int | Tensor
    after: int = 0
    recent: int | Tensor = 1
    score: Tensor | None = None
    by_token: Tensor | None = None
    heads: Tensor | None = None
    fold: bool = False
    gone: Tensor | None = None


def leave_page_keys(x: Leaving) -> Tensor | None:
    """Remove at most one key a row, in place; with `by_token` the token id that left each sequence, int32 [batch], -1 for none.

    With `by_token` all rows of a sequence hold the same tokens in the same slots. Only where `which("leave_page_keys", x)` is "triton".
    """
    from .gpu.leave import launch

    return launch(x)


@routed("leave_page_keys")
def leave_route(x: Leaving) -> Route:
    why = no_kernel(x.token)
    if why is None and any(
        p.dtype != torch.float32 or p.dim() != 2 or p.stride() != x.token.stride() for p, _ in x.planes
    ):
        why = "a plane is not one float32 a key"
    if why is None and len(x.planes) > MOST_PLANES:
        why = f"the kernel moves {MOST_PLANES} planes and {len(x.planes)} ride on the keys"
    if why is None and x.fold and (x.pages.format is not None or x.pages.key.dtype == torch.float64):
        why = "means are taken of keys as they came, not of codes"
    return Route("torch", why) if why else Route("triton", "search and removal in one launch")


def leaver(
    token: Tensor,
    newest: Tensor,
    *,
    after: int = 0,
    recent: int | Tensor = 1,
    score: Tensor | None = None,
    fold: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The slot that leaves and, with `fold`, the one that takes it in, both [batch, kv_heads].

    token, score: [batch, kv_heads, slots], ids as large as can be in empty slots.  newest: the newest token id, [batch, 1].  The rest as
    in `Leaving`; where nobody may leave, the slot means nothing.
    """
    far = torch.iinfo(token.dtype).max
    recent = recent[..., None] if isinstance(recent, Tensor) else recent
    may = (token >= after) & (token <= newest[..., None] - recent)
    into = None
    if fold:
        into = token.masked_fill(~may, far).argmin(-1)
        may &= token > token.gather(2, into[..., None])
    value, most = (token, far) if score is None else (score, float("inf"))
    return value.masked_fill(~may, most).argmin(-1), into


def add_by_token(total: Tensor, mass: Tensor, token: Tensor, length: Tensor, kv_heads: int) -> None:
    """total [batch, tokens] += mass [rows, slots] of the keys of each token id [rows, slots], in place, summed over a sequence's rows.

    All rows of a sequence hold the same tokens in the same slots, `length` [rows] of them; masses past that are not read.
    """
    if no_kernel(mass) is None:
        from .gpu.leave import add_by_token as kernel

        kernel(total, mass, token, length, kv_heads)
        return
    token = token[::kv_heads, : mass.shape[1]]
    held = torch.arange(mass.shape[1], device=token.device) < length[::kv_heads, None]
    mass = mass.unflatten(0, (-1, kv_heads)).sum(1).masked_fill(~held, 0.0)
    total.scatter_add_(1, token.masked_fill(~held, 0).long(), mass)
