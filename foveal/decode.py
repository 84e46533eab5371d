"""Decode: the whole batch, one query each, over the rows of the store as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import ops
from .method import STATISTICS
from .ops import ragged
from .ops.ragged import Attended, Logit
from .parts import Part, choose, edited, edits_weights, finish, needs_of, statistic
from .selection import All, Selection, TokenIds, Tokens
from .step import Pass, Step
from .store import LayerStore, Rows

_COLUMNS = {"col_mass": "mass", "col_low": "low"}  # what decode attention returns summed over a group


def decode(
    pass_: Pass, index: int, rows: LayerStore, parts: Sequence[Part], q: Tensor, k: Tensor, v: Tensor, logit: Logit
) -> Tensor:
    """One layer of a decode step: [batch, heads, 1, value_dim]."""
    rows.append(k, v, pass_.token(q.device))
    c = rows.single
    plain = not parts and c is not None and logit.softcap is None and logit.sinks is None
    if plain and c.paged:
        pass_.count_keys(c.bound, c.bound)
        q = q.reshape(c.arange.shape[0], -1, q.shape[3])
        return ops.attend_ragged(q, c.view, logit).out.view(k.shape[0], -1, 1, v.shape[3])
    if plain and c.length is None:
        pass_.count_keys(c.bound, c.bound)
        q = q.reshape(c.arange.shape[0], -1, q.shape[3])
        return ragged.attend_rows(q, c.read("key"), c.read("value"), logit.scale).view(k.shape[0], -1, 1, v.shape[3])
    step = Step(pass_, index, rows, q, k, v, logit)
    selection, replaced = choose(step, parts)
    if replaced is not None:
        return finish(step, parts, replaced.out)
    edits = edits_weights(parts)
    columns = not edits and all(part.method.columns for part in parts if part.method.needs)
    out, weights = _attend(step, selection, needs_of(parts), edits, columns)
    if edits:
        out = _combine(step, edited(step, parts, weights))
    return finish(step, parts, out)


def _attend(
    step: Step, selection: Selection, needs: frozenset[str], edits: bool, columns: bool
) -> tuple[Tensor, Tensor | None]:
    """Out [batch, heads, 1, value_dim]; weights [batch, heads, 1, T] where someone needs them.

    columns: of statistics per key, only sums over the query heads of a KV head are wanted.
    """
    if isinstance(selection, TokenIds):
        selection = selection.resolve(step)
    B, H, G, rows = step.q.shape[0], step.H, step.G, step.store
    q = step.q.reshape(B * G, H // G, -1)
    explicit = bool(needs) or edits
    if isinstance(selection, Tokens) and not explicit and _worth_listing(step, selection):
        return _attend_tokens(step, selection, q), None
    step.pass_.count_keys(rows.T, rows.T)
    unseen = None if isinstance(selection, All) else ~selection.mask(step, 0, 1)
    bias = None if step.bias is None else step.bias.dense(H)
    need_lse = "lse" in needs
    names = {need.partition(":")[0] for need in needs} & set(STATISTICS)
    if columns and unseen is None and len(names) == 1 and names <= _COLUMNS.keys() and rows.classes[0].paged:
        return _attend_columns(step, q, bias, *names), None
    got = [_attend_class(step, c, q, bias, unseen, need_lse, explicit) for c in rows.classes]
    out = _all_rows(step, [a.out for a in got]).view(B, H, 1, -1)
    if not explicit:
        return out, None
    weights = _all_rows(step, [a.weights for a in got], rows.T).view(B, H, 1, -1)
    lse = _all_rows(step, [a.lse for a in got]).view(B, H, 1) if need_lse else None
    seen = None if unseen is None and rows.uniform is not None else step.seen_slots(selection)
    for name in names:
        step.stats[name] = lse if name == "lse" else statistic(step, name, weights, seen)
    return out, weights


def _attend_columns(step: Step, q: Tensor, bias: Tensor | None, name: str) -> Tensor:
    """Over pages, with a statistic per key summed over the query heads of each KV head."""
    c, B = step.store.classes[0], step.q.shape[0]
    how = {"extra": step.row_extra(c, bias), "moved": step.moved_keys(c), "want": _COLUMNS[name]}
    got = ops.attend_ragged(q, c.view, _row_logit(step, c), **how)
    step.summed[name] = got.weights.unflatten(0, (B, step.G))
    return got.out.view(B, step.H, 1, -1)


def _attend_class(
    step: Step, c: Rows, q: Tensor, bias: Tensor | None, unseen: Tensor | None, need_lse: bool, explicit: bool
) -> Attended:
    q, logit, extra, hidden = c.pick(q), _row_logit(step, c), step.row_extra(c, bias), step.row(c, unseen)
    if c.paged:
        how = {"extra": extra, "hidden": hidden, "moved": step.moved_keys(c), "want": "weights" if explicit else ""}
        return ops.attend_ragged(q, c.view, logit, **how)
    key, value, hidden = (
        step.row_keys(c),
        c.read("value"),
        _or(hidden, None if c.length is None else ~c.used()[:, None]),
    )
    plain = extra is None and hidden is None and logit.softcap is None and logit.sinks is None
    if plain and not explicit:
        return Attended(ragged.attend_rows(q, key, value, logit.scale), None, None)
    how = {"extra": extra, "hidden": hidden, "need_lse": need_lse, "may_be_blind": unseen is not None}
    return ragged.attend_padded(q, key, value, logit, **how)


def _or(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a | b


def _row_logit(step: Step, c: Rows) -> Logit:
    """The model's logit with its sinks laid out for the rows of a class, [rows, group]."""
    sinks = step.logit.sinks
    if sinks is None:
        return step.logit
    return step.logit._replace(sinks=c.pick(sinks.view(1, step.G, -1).expand(step.q.shape[0], -1, -1).flatten(0, 1)))


def _worth_listing(step: Step, selection: Tokens) -> bool:
    """Whether reading lists costs less than reading all keys with a mask: query heads with lists of their own read a key once each."""
    each, c = selection.slots.shape[1] // step.G, step.store.classes[0]
    if each == 1:
        return True
    read = each * selection.slots.shape[2] * selection.size
    return read < step.T and c.pool.recent is None if c.paged else 2 * read < step.T  # on a CPU a list is copied first


def _attend_tokens(step: Step, selection: Tokens, q: Tensor) -> Tensor:
    """Gather the chosen keys of each KV head, or of each query head, and the step's own, and attend over the short lists."""
    if step.store.classes[0].paged:
        return _attend_listed(step, step.store.classes[0], selection, q)
    past, heads = step.past, selection.slots.shape[1]
    past = past if isinstance(past, int) else step.per_head_like(past, heads)
    slots = selection.expanded(past if isinstance(past, int) else past[..., None, None])
    newest = slots.new_full((*slots.shape[:2], 1), past) if isinstance(past, int) else past[..., None]
    slots = torch.cat([slots, newest], -1)
    width, each = slots.shape[2], heads // step.G
    slots = slots.view(-1, each * width)  # the lists of a KV head
    step.pass_.count_keys(min(each * width, step.T), step.T)
    bias = None if step.bias is None else step.bias.dense(step.H)
    split = lambda x: x.reshape(x.shape[0] * each, -1, *x.shape[2:])  # a row for each list
    got = []
    for c in step.store.classes:
        extra, listed, logit = step.row_extra(c, bias), c.pick(slots), _row_logit(step, c)
        at = listed.clamp(min=0)
        if extra is not None:
            extra = split(extra.expand(-1, q.shape[1], -1))
            extra = extra.gather(2, split(at)[:, None].expand(-1, extra.shape[1], -1))
        key = c.gather("key", at) if step.store.shift_bound == 0 else step.row_keys(c)[c.arange[:, None], at]
        logit = logit if logit.sinks is None else logit._replace(sinks=split(logit.sinks))
        how = {"extra": extra, "hidden": split(listed < 0)[:, None]}
        out = ragged.attend_padded(split(c.pick(q)), split(key), split(c.gather("value", at)), logit, **how).out
        got.append(out.view(len(at), -1, out.shape[2]))
    return _all_rows(step, got).view(step.q.shape[0], step.H, 1, -1)


def _attend_listed(step: Step, c: Rows, selection: Tokens, q: Tensor) -> Tensor:
    """The same over pages, where nothing is gathered."""
    slots, view, logit = selection.slots.flatten(0, 1), c.view, _row_logit(step, c)
    extra, moved = step.row_extra(c, None if step.bias is None else step.bias.dense(step.H)), step.moved_keys(c)
    each = len(slots) // len(q)
    step.pass_.count_keys(min(each * (slots.shape[1] * selection.size + 1), step.T), step.T)
    if each > 1:  # a row for each query head, all of a group over the same pages
        table, length = (x.repeat_interleave(each, 0) for x in (view.table, view.length))
        view = replace(view, table=table, length=length)
        extra = None if extra is None else extra.expand(-1, each, -1).reshape(-1, 1, extra.shape[2])
        moved = None if moved is None else moved.repeat_interleave(each, 0)
        logit = logit if logit.sinks is None else logit._replace(sinks=logit.sinks.view(-1, 1))
        q = q.reshape(len(slots), 1, -1)
    how = {"extra": extra, "moved": moved, "slots": slots, "run": selection.size, "own": True}
    out = ops.attend_ragged(q, view, logit, **how).out
    return out.view(step.q.shape[0], step.H, 1, -1)


def _combine(step: Step, weights: Tensor) -> Tensor:
    """Weights [batch, heads, 1, T] times the values of each length class."""
    B, rows = step.q.shape[0], step.store
    flat = weights.reshape(B * step.G, step.group_size, -1)
    got = []
    for c in rows.classes:
        value = c.read("value")
        got.append(torch.bmm(c.pick(flat)[..., : c.bound].to(value.dtype), value))
    return _all_rows(step, got).view(B, step.H, 1, -1)


def _all_rows(step: Step, parts: Sequence[Tensor], width: int | None = None) -> Tensor:
    """Results of the length classes [rows of the class, group, ...] over all rows; short ones are padded with zeros to `width`."""
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
