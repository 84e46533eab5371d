"""Decode: the whole batch, one query each, over the rows of the store as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .method import STATISTICS
from .ops import ragged
from .ops.ragged import Logit
from .parts import Part, choose, edited, edits_weights, finish, needs_of, statistic
from .selection import Selection, TokenIds, Tokens
from .step import Pass, Step
from .store import LayerStore, Rows


def decode(
    pass_: Pass, index: int, rows: LayerStore, parts: Sequence[Part], q: Tensor, k: Tensor, v: Tensor, logit: Logit
) -> Tensor:
    rows.append(k, v, pass_.token(q.device))
    c = rows.single
    if not parts and c is not None and c.length is None and logit.softcap is None and logit.sinks is None:
        pass_.count_keys(c.bound, c.bound)
        out = ragged.attend_rows(
            q.reshape(c.arange.shape[0], -1, q.shape[3]), c.read("key"), c.read("value"), logit.scale
        )
        return out.view(q.shape[0], q.shape[1], 1, -1)
    step = Step(pass_, index, rows, q, k, v, logit)
    selection, replaced = choose(step, parts)
    if replaced is not None:
        return finish(step, parts, replaced.out)
    edits = edits_weights(parts)
    out, weights = _attend_decode(step, selection, needs_of(parts), edits)
    if edits:
        out = _combine(step, edited(step, parts, weights))
    return finish(step, parts, out)


def _attend_decode(
    step: Step, selection: Selection, needs: frozenset[str], edits: bool
) -> tuple[Tensor, Tensor | None]:
    """Out [batch, heads, 1, value_dim]; weights [batch, heads, 1, T] where someone needs them."""
    if isinstance(selection, TokenIds):
        selection = selection.resolve(step)
    B, H, G, rows = step.q.shape[0], step.H, step.G, step.store
    q = step.q.reshape(B * G, H // G, -1)
    if isinstance(selection, Tokens) and not needs and not edits and selection.slots.shape[1] == G:
        return _attend_tokens(step, selection, q), None
    step.pass_.count_keys(rows.T, rows.T)
    extra, hidden = step.extra(), step.hidden(selection)
    plain = extra is None and hidden is None and step.logit.softcap is None and step.logit.sinks is None
    c = rows.single
    if c is not None and plain and not needs and not edits:
        return ragged.attend_rows(q, step.row_keys(c), c.read("value"), step.logit.scale).view(B, H, 1, -1), None
    need_lse = "lse" in needs
    got = [_attend_class(step, c, q, extra, hidden, need_lse) for c in rows.classes]
    out = _all_rows(step, [a.out for a in got]).view(B, H, 1, -1)
    weights = _all_rows(step, [a.weights for a in got], rows.T).view(B, H, 1, -1)
    lse = _all_rows(step, [a.lse for a in got]).view(B, H, 1) if need_lse else None
    _decode_statistics(step, needs, weights, lse, hidden)
    return out, weights


def _all_rows(step: Step, parts: Sequence[Tensor], width: int | None = None) -> Tensor:
    """Results of the length classes [rows of the class, group, ...] as one tensor over all rows; short ones are padded with zeros to `width`."""
    if step.store.single is not None:
        return parts[0]
    shape = parts[0].shape[1:] if width is None else (*parts[0].shape[1:-1], width)
    out = parts[0].new_zeros(step.q.shape[0] * step.G, *shape)
    for c, x in zip(step.store.classes, parts, strict=True):
        if width is None:
            out[c.index] = x
        else:
            out[c.index, ..., : x.shape[-1]] = x
    return out


def _attend_class(
    step: Step, c: Rows, q: Tensor, extra: Tensor | None, hidden: Tensor | None, need_lse: bool
) -> ragged.Attended:
    extra, hidden = (_per_row(step, c, x) for x in (extra, hidden))
    key, value = step.row_keys(c), c.read("value")
    how = {"extra": extra, "hidden": hidden, "need_lse": need_lse}
    return ragged.attend_ragged(c.pick(q), key, value, _row_logit(step, c), **how)


def _row_logit(step: Step, c: Rows) -> Logit:
    """The model's logit with its sinks laid out for the rows of a class, [rows, group]."""
    sinks = step.logit.sinks
    if sinks is None:
        return step.logit
    return step.logit._replace(sinks=c.pick(sinks.view(1, step.G, -1).expand(step.q.shape[0], -1, -1).flatten(0, 1)))


def _per_row(step: Step, c: Rows, x: Tensor | None) -> Tensor | None:
    """[batch, kv_heads or heads, 1, T] for the rows of a class: [rows, 1 or group, bound]."""
    if x is None:
        return None
    x = x.expand(step.q.shape[0], step.G if x.shape[1] == 1 else -1, -1, -1)
    x = x.reshape(step.q.shape[0] * step.G, -1, x.shape[3])
    return c.pick(x)[..., : c.bound]


def _attend_tokens(step: Step, selection: Tokens, q: Tensor) -> Tensor:
    """Gather the chosen keys of each KV head and the step's own, and attend over the short list."""
    past = step.past
    limit = past if isinstance(past, int) else past[..., None, None]
    slots = selection.expanded(limit)
    newest = slots.new_full((*slots.shape[:2], 1), past) if isinstance(past, int) else past[..., None]
    slots = torch.cat([slots, newest], -1).flatten(0, 1)
    step.pass_.count_keys(slots.shape[-1], step.T)
    hidden = (slots < 0)[:, None]
    at = slots.clamp(min=0)
    extra = step.extra()
    got = []
    for c in step.store.classes:
        mine = c.pick(at)
        here = (c.arange[:, None], mine)
        more = _per_row(step, c, extra)
        if more is not None:
            more = more.expand(-1, q.shape[1], -1).gather(2, mine[:, None].expand(-1, q.shape[1], -1))
        how = {"extra": more, "hidden": c.pick(hidden)}
        got.append(
            ragged.attend_ragged(
                c.pick(q), step.row_keys(c)[here], c.planes["value"][here], _row_logit(step, c), **how
            ).out
        )
    return _all_rows(step, got).view(step.q.shape[0], step.H, 1, -1)


def _decode_statistics(
    step: Step, needs: frozenset[str], weights: Tensor, lse: Tensor | None, hidden: Tensor | None
) -> None:
    """From the weights of one query; everything is already at hand."""
    seen = None if hidden is None else ~step.per_head_like(hidden, step.H)
    for name in {need.partition(":")[0] for need in needs} & set(STATISTICS):
        step.stats[name] = lse if name == "lse" else statistic(step, name, weights, seen)


def _combine(step: Step, weights: Tensor) -> Tensor:
    """Decode: weights [batch, heads, 1, T] times the values of each length class."""
    B, rows = step.q.shape[0], step.store
    flat = weights.reshape(B * step.G, step.group_size, -1)
    got = [torch.bmm(c.pick(flat)[..., : c.bound].to(c.planes["value"].dtype), c.read("value")) for c in rows.classes]
    return _all_rows(step, got).view(B, step.H, 1, -1)
