"""Lists of tokens: what methods that read a chosen few of the cached keys share."""

import torch
from torch import Tensor

from ...ops import ragged
from ...ops.pages import Pages
from ...ops.top import largest, marked_slots, top_slots
from ...selection import All, Selection, Tokens


def in_order(step) -> bool:
    """Slots are token ids in every row, which a graph may not know from the lengths: nothing is ever let go."""
    return step.whole or step.pass_.store.layers[step.layer].is_croppable


def by_id(step, x: Tensor) -> Tensor:
    """Sum x [batch, kv_heads, T] over KV heads, which may hold different tokens: [batch, tokens seen by the longest sequence]."""
    if step.whole:
        return x.sum(1)
    n = tokens_seen(step.pass_)
    at = step.token.clamp(max=n).long().flatten(1)  # empty slots fall into column n
    return x.new_zeros(x.shape[0], n + 1).scatter_add_(1, at, x.flatten(1))[:, :n]


def tokens_seen(pass_) -> int:
    """By the longest sequence of a pass; while a graph replays the pass, the most that any will have seen."""
    if pass_.on_device is None:
        return max(pass_.counts) + pass_.length
    pass_.bounded = True
    return pass_.horizon


def top_ids(step, score: Tensor, k: int, allowed: int | Tensor, before: int | Tensor | None = None) -> Tensor:
    """The k best token ids by score [batch, tokens], ascending [batch, k]; -1 at the end where a sequence has or is allowed fewer.

    allowed: at most that many, a number or [batch, 1].  before: only ids below it, a number or [batch, 1]; default the step's past.
    """
    before = step.q_token[:, :1] if before is None else before
    score = score.masked_fill(torch.arange(score.shape[1], device=score.device) >= before, float("-inf"))
    if isinstance(allowed, int):
        return top_slots(score, min(k, allowed)).long()
    return top_slots(score, k, count=allowed[:, 0]).long()


def slots_of_ids(step, ids: Tensor) -> Tensor:
    """Slots of token ids [batch, m] in every row of this layer, [batch, kv_heads, m]; -1 where a row does not hold the token."""
    each = ids[:, None].expand(-1, step.G, -1)
    if step.whole or (step.decode and in_order(step)):
        return each
    n = tokens_seen(step.pass_)
    token = step.token.clamp(max=n).long()  # empty slots fall into column n, and so do ids of none
    slot = torch.arange(step.T, device=ids.device).expand_as(token)
    where = token.new_full((*token.shape[:2], n + 1), -1).scatter_(2, token, slot)
    where[..., n] = -1
    return where.gather(2, each.where((each >= 0) & (each < n), n).long())


def slots_of_mask(mask: Tensor, k: int) -> Tensor:
    """The slots where mask [batch, kv_heads, T] is true, in order, the first k of each row: int32 [batch, kv_heads, k], else -1."""
    return marked_slots(mask.flatten(0, 1), k).unflatten(0, mask.shape[:2])


def plain_pages(step, besides: Selection | None = None) -> Pages | None:
    """The pages of a layer, where a decode step sees all their keys, as they came and for what they are; else None.

    besides: a selection of the caller's own that may narrow what is seen.
    """
    c = step.store.classes[0]
    plain = step.bias is None and step.store.shift_bound == 0 and "mass" not in step.store.specs
    seen = isinstance(step.visible, All) or step.visible is besides
    return c.view if c.paged and plain and seen else None


def packed(step) -> Tensor:
    """The queries of a decode step as operations over rows take them, [rows, group, head_dim]."""
    return step.q.reshape(step.q.shape[0] * step.G, step.group_size, -1)


def lengths(step) -> Tensor | None:
    """Keys of each row, [rows], on the device; None where all rows hold as many as there are slots."""
    if step.store.uniform is not None:
        return None
    c = step.store.classes[0]
    return c.pool.length if c.paged else step.store.len.flatten()


def each_list(allowed: int | Tensor) -> Tensor | None:
    """A budget [batch, 1] as operations take it, one number for each sequence; None for a plain number."""
    return None if isinstance(allowed, int) else allowed[:, 0]


def gather(step, name: str, slots: Tensor) -> Tensor:
    """Keys or values at slots [batch, kv_heads, m]: [batch, kv_heads, m, head_dim]; anything where a slot is -1."""
    flat, store = slots.clamp(min=0).flatten(0, 1), step.store
    if store.single is not None:
        return store.single.gather(name, flat).unflatten(0, slots.shape[:2])
    got = [c.gather(name, c.pick(flat)) for c in store.classes]
    out = got[0].new_empty(*flat.shape, got[0].shape[2])
    for c, x in zip(store.classes, got, strict=True):
        out[c.index] = x
    return out.unflatten(0, slots.shape[:2])


def logits_at(step, slots: Tensor, own: Selection | None = None) -> Tensor:
    """Decode: exact logits of the keys at slots [batch, kv_heads, m], [batch, heads, m]; -inf for slot -1 and keys not visible.

    own: a selection that shows all of `slots`, so that visibility need not be looked up where nothing else narrows.
    """
    if step.store.shift_bound or "mass" in step.store.specs or step.bias is not None:
        z = step.scores()[:, :, 0]
        return z.gather(2, step.per_head(slots.clamp(min=0))).masked_fill(step.per_head(slots < 0), float("-inf"))
    rows, group = step.q.shape[0] * step.G, step.group_size
    key = gather(step, "key", slots).flatten(0, 1)
    z = ragged.logits(step.q.reshape(rows, group, -1), key, step.logit).view(step.q.shape[0], step.H, -1)
    hidden = step.per_head(slots < 0)
    if step.visible is not own and not isinstance(step.visible, All):
        seen = step.seen_slots(step.visible)[:, :, 0]
        hidden = hidden | ~step.per_head_like(seen, step.H).gather(2, step.per_head(slots.clamp(min=0)))
    return z.masked_fill(hidden, float("-inf"))


def top_mask(score: Tensor, allowed: int | Tensor) -> Tensor:
    """The `allowed` best slots of each row by score [batch, kv_heads, T] as a mask, a number or [batch, 1]; -inf is never chosen."""
    count = allowed if isinstance(allowed, int) else allowed.expand(score.shape[:2])
    return largest(score, count) & (score > float("-inf"))


# ---------------------------------------------------------------------- one vector a row

WIDTH = 4
"""Numbers of a row's vector that ride on each key: 16 bytes a key, and rows of head_dim * group / 4 keys hold all of it."""


def remember(step, plane: str, x: Tensor, change: Tensor) -> None:
    """Keep the vector x [batch, heads, head_dim] with its rows, for sequences where change [batch] says so.

    plane: declared as Plane(0.0, width=(WIDTH,)). Number n of the vector of a KV head lies at slot n // WIDTH, so that it moves with
    the row when sequences join, leave or fork. A row that lets go of keys loses some numbers until the next call: the cosine is too low
    then, and a caller that acts on a low cosine is on the safe side.
    """
    new = x.reshape(x.shape[0], step.G, -1).float()
    slots = min(step.T, -(-new.shape[2] // WIDTH))
    new = torch.nn.functional.pad(new, (0, max(0, slots * WIDTH - new.shape[2])))[..., : slots * WIDTH]
    old = step.store.plane(plane)
    change = change[:, None, None] & step.store.valid[:, :, :slots]
    new = torch.where(change[..., None], new.unflatten(2, (slots, WIDTH)), old[:, :, :slots])
    if step.store.single is not None:
        old[:, :, :slots] = new  # the plane itself
    else:
        step.store.set(plane, torch.cat([new, old[:, :, slots:]], 2))


def similarity(step, plane: str, x: Tensor) -> Tensor:
    """Cosine of x [batch, heads, head_dim] and what `remember` kept, over all heads of the layer: [batch]; 0 where nothing was kept."""
    x = x.reshape(x.shape[0], step.G, -1).float()
    kept = step.store.plane(plane)[:, :, : -(-x.shape[2] // WIDTH)].flatten(2)[..., : x.shape[2]]
    x_kept = x[..., : kept.shape[2]]
    norms = x.flatten(1).norm(dim=1) * kept.flatten(1).norm(dim=1)
    return (x_kept * kept).flatten(1).sum(1) / norms.clamp(min=1e-20)


def tokens(step, ids: Tensor) -> Tokens:
    """The selection of token ids [batch, kv_heads, m], the same for all of them, in this layer."""
    if ids.shape[1] == step.G and (step.whole or in_order(step)):
        return Tokens(ids)
    return Tokens(slots_of_ids(step, ids[:, 0]))
