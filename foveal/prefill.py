"""Prefill: one sequence without padding, so that a method never meets a pad."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .edits import Bias, Reweigh
from .errors import InputError
from .excerpt import Excerpt
from .ops import ragged
from .ops.ragged import Logit
from .parts import Part, choose, edited, edits_of, edits_weights, finish, needs_of, statistic
from .selection import All, Band, Blocks, Lists, Selection
from .step import Pass, Step
from .store import LayerStore

TILE = {
    "cpu": 1 << 22,
    "cuda": 1 << 25,
}  # weights of a tile of queries: explicit rows stay within some times 16 and 128 MB
FEW = 64  # edited keys a head that are always few beside the rest; else a sixteenth of all


def prefill(
    pass_: Pass, index: int, rows: LayerStore, parts: Sequence[Part], q: Tensor, k: Tensor, v: Tensor, logit: Logit
) -> Tensor:
    fresh = rows.empty
    past_whole = fresh or rows.uniform == pass_.counts[0]
    before = None
    if not (past_whole or _lies_as_columns(rows)):
        before = _read_keys(pass_, index, rows), rows.values(), _past_mass(rows)
    rows.append(k, v, pass_.counts[0], pass_.once)
    step = Step(pass_, index, rows, q, k, v, logit)
    selection, replaced = choose(step, parts)
    needs, edits = needs_of(parts), edits_weights(parts)
    layout = Layout(step.k_new, step.v_new, None, True) if fresh else _layout(step, before, past_whole)
    few = _few_edited(step, parts, selection, layout) if edits and replaced is None else None
    if few is not None and not needs:
        return finish(step, parts, _reweigh_few(step, few, layout))
    out, lse = replaced or _attend(step, selection, layout, bool(needs) or edits)
    if lse is None and (needs or edits):
        raise InputError("statistics need the log-sum-exp, which the method that replaces the softmax did not return")
    _statistics(step, needs, selection, layout, lse)
    if edits:
        out = _reweigh(step, parts, lse, out.dtype) if few is None else _reweigh_few(step, few, layout)
    return finish(step, parts, out)


class Layout(NamedTuple):
    """Keys as one block in which query i sees everything before column T - L and then causally: [1, kv_heads, T, head_dim].

    whole: nothing was ever let go, so column = slot = token id.
    """

    key: Tensor
    value: Tensor
    mass: Tensor | None
    whole: bool


def _layout(step: Step, before: tuple[Tensor, Tensor, Tensor | None] | None, past_whole: bool) -> Layout:
    if before is None:
        return Layout(step.store.keys(), step.store.values(), None, past_whole)
    key, value, mass = before
    if mass is not None:
        mass = torch.cat([mass, mass.new_ones(1, step.G, step.L)], 2)
    return Layout(torch.cat([key, step.k_new], 2), torch.cat([value, step.v_new], 2), mass, False)


def _lies_as_columns(rows: LayerStore) -> bool:
    """Whether slots, once the new keys are appended, are the columns of a layout: no gaps, masses, moves or codes."""
    return (
        rows.uniform is not None and "mass" not in rows.specs and rows.shift_bound == 0 and rows.layout.format is None
    )


def _past_mass(rows: LayerStore) -> Tensor | None:
    """How much each stored key counts, [1, kv_heads, T]: zero where a slot is empty; None where each counts once."""
    if rows.uniform is not None and "mass" not in rows.specs:
        return None
    valid = rows.valid
    return rows.plane("mass").where(valid, 0.0) if "mass" in rows.specs else valid.float()


def _read_keys(pass_: Pass, index: int, rows: LayerStore) -> Tensor:
    """Keys as attention reads them: positions inside the cache applied."""
    key, m = rows.keys(), min(rows.shift_bound, rows.T)
    if m == 0:
        return key
    moved = pass_.session.info.rope.rotate(key[:, :, :m], rows.plane("shift")[:, :, :m], index)
    return torch.cat([moved, key[:, :, m:]], 2)


def _attend(step: Step, selection: Selection, layout: Layout, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """The fastest operation that does exactly what the selection says."""
    how = {"scale": step.logit.scale, "softcap": step.logit.softcap, "sinks": step.logit.sinks, "need_lse": need_lse}
    if layout.whole:
        how["bias"] = _factors(step.bias, step.L)
        keys, values = layout.key, layout.value
        if isinstance(selection, All):
            return ops.attend(step.q, keys, values, **how)
        if isinstance(selection, Band):
            sink, recent = selection.per_head(step.H)
            return ops.attend_band(step.q, keys, values, sink=sink, recent=recent, **how)
        if isinstance(selection, Blocks) and keys.shape[2] == step.L:
            return ops.attend_blocks(step.q, keys, values, selection.map, selection.size, **how)
        if isinstance(selection, Lists):
            return _by_lists(step, selection, keys, values, how)
        if isinstance(selection, Excerpt):
            text = selection.text_with(step.bias)
            return selection.spread(
                step, *_attend(text, selection.within, Layout(text.k_new, text.v_new, None, True), need_lse)
            )
        return ops.attend_masked(step.q, keys, values, step.visible_mask, **how)
    if isinstance(selection, All) and step.bias is None:
        return ops.attend(step.q, layout.key, layout.value, mass=layout.mass, **how)
    if isinstance(selection, Band) and step.bias is None and _band_of_columns(step, selection):
        sink, recent = selection.per_head(step.H)
        return ops.attend_band(step.q, layout.key, layout.value, sink=sink, recent=recent, **how)
    return _by_rows(step, need_lse)


def _band_of_columns(step: Step, band: Band) -> bool:
    """Whether a band sees of the columns what it sees of their tokens, though tokens are gone: the first ones and a window are left.

    Looks at the device once.
    """
    sinks = set(band.per_head(step.H)[0])
    if len(sinks) > 1 or step.store.uniform is None or "mass" in step.store.specs:
        return False
    token, sink = step.token[..., : step.store.uniform], sinks.pop()
    column = torch.arange(token.shape[2], device=step.device)
    return bool(torch.where(column < sink, token < sink, token - column == token[..., -1:] - column[-1]).all())


def _by_lists(step: Step, lists: Lists, keys: Tensor, values: Tensor, how: dict) -> tuple[Tensor, Tensor | None]:
    """Each run of queries over its list of keys; the last `dense` queries over all of them."""
    rest = max(0, step.L - lists.dense)
    if rest == step.L:
        return ops.attend_tokens(step.q, keys, values, lists.slots, size=lists.size, **how)
    listed = (torch.arange(step.L, device=step.device) < rest).view(1, 1, -1)
    out, lse = ops.attend_tokens(step.q, keys, values, lists.slots, size=lists.size, queries=listed, **how)
    tail = how | {"bias": how["bias"] and (how["bias"][0][:, :, rest:], how["bias"][1])}
    last, last_lse = ops.attend(step.q[:, :, rest:], keys, values, **tail)
    return torch.cat([out[:, :, :rest], last], 2), None if lse is None else torch.cat([lse[:, :, :rest], last_lse], 2)


def _factors(bias: Bias | None, length: int) -> tuple[Tensor, Tensor] | None:
    return None if bias is None else (bias.query.expand(-1, -1, length, -1), bias.key)


def _tiles(step: Step, first: int = 0) -> Iterator[tuple[int, int, Tensor]]:
    """Exact logits of query tiles over all slots, [1, heads, tile, T], -inf where not selected: dense in time, bounded in memory."""
    size = max(1, TILE.get(step.device.type, TILE["cpu"]) // (step.H * step.T))
    for start in range(first, step.L, size):
        stop = min(start + size, step.L)
        yield start, stop, step.scores(start=start, stop=stop)


def _by_rows(step: Step, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    values = step.per_head(step.store.values())
    out = step.q.new_empty(*step.q.shape[:3], values.shape[3])
    lse = torch.empty(step.q.shape[:3], dtype=ragged.wide(step.q.dtype), device=step.device)
    for start, stop, z in _tiles(step):
        lse[:, :, start:stop] = _logsumexp(step, z)
        out[:, :, start:stop] = (_weights(z, lse[:, :, start:stop]).to(values.dtype) @ values).to(out.dtype)
    return out, lse if need_lse else None


def _logsumexp(step: Step, z: Tensor) -> Tensor:
    lse = z.logsumexp(-1)
    return lse if step.logit.sinks is None else torch.logaddexp(lse, step.logit.sinks.view(1, -1, 1).to(lse.dtype))


def _weights(z: Tensor, lse: Tensor) -> Tensor:
    return (z - lse.masked_fill(lse == -math.inf, 0.0)[..., None]).exp()


# ---------------------------------------------------------------------- statistics


def _statistics(step: Step, needs: frozenset[str], selection: Selection, layout: Layout, lse: Tensor | None) -> None:
    """Fill step.stats with what was named, in slots of the store."""
    if "lse" in needs:
        step.stats["lse"] = step.named_stats["lse"] = lse
    for need in needs:
        name, _, window = need.partition(":")  # "col_low:400" looks at the last 400 queries, "col_low" at all
        if name in ("lse", "whole_prompt"):
            continue
        start = time.perf_counter()
        first = max(0, step.L - int(window)) if window else 0
        step.stats[name] = step.named_stats[need] = _measure(step, name, first, selection, layout, lse)
        step.seconds[need] = time.perf_counter() - start


def _measure(step: Step, name: str, first: int, selection: Selection, layout: Layout, lse: Tensor) -> Tensor:
    # columns of a layout with gaps are neither slots nor token ids
    by_column = layout.whole or (step.bias is None and name not in ("sink_mass", "row_argmax"))
    if isinstance(selection, All) and by_column:
        bias = _factors(step.bias, step.L)
        how = {"scale": step.logit.scale, "softcap": step.logit.softcap, "bias": bias, "mass": layout.mass}
        x = ops.attention_stats(step.q, layout.key, lse, want={name}, rows=(first, step.L), **how)[name]
        return _to_slots(step, x) if name.startswith("col_") and not layout.whole else x
    tiles = (
        statistic(step, name, _weights(z, lse[:, :, start:stop]), z > -math.inf)
        for start, stop, z in _tiles(step, first)
    )
    return sum(tiles) if name.startswith("col_") else torch.cat(list(tiles), 2)


def _to_slots(step: Step, x: Tensor) -> Tensor:
    """Column statistics [1, heads, columns] of a padded layout, in slots: a row's new keys follow its own past."""
    columns, total = x.shape[2] - step.L, step.T
    past = step.store.len - step.L  # [1, G]
    slot = torch.arange(total, device=step.device).expand(1, step.G, -1)
    column = torch.where(slot < past[..., None], slot, slot - past[..., None] + columns).clamp(max=x.shape[2] - 1)
    return x.gather(2, step.per_head(column)).masked_fill(~step.per_head(step.store.valid), 0.0)


def _reweigh(step: Step, parts: Sequence[Part], lse: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows many of whose weights are edited, tile by tile from the log-sum-exp."""
    values = step.per_head(step.store.values())
    tiles = []
    for start, stop, z in _tiles(step):
        weights = edited(step, parts, _weights(z, lse[:, :, start:stop]), start, stop)
        tiles.append((weights.to(values.dtype) @ values).to(dtype))
    return torch.cat(tiles, 2)


class Few(NamedTuple):
    """The only edit of a layer, and the few keys of each head that it touches, `[1, kv_heads or heads, n]`, -1 = none."""

    edit: Reweigh
    index: Tensor


def _few_edited(step: Step, parts: Sequence[Part], selection: Selection, layout: Layout) -> Few | None:
    """What `reweigh_small` takes, if that is all this layer asks for: its cost follows the keys edited, not all of them."""
    if not (layout.whole and isinstance(selection, All)):
        return None
    found = [e for e in edits_of(step, parts) if e is not None]
    if len(found) != 1 or not (found[0].to is None or found[0].to is False):
        return None
    keys = found[0].keys
    most = int(keys.sum(-1).max())  # waits for the device once a layer of a prompt
    if most > max(FEW, step.T // 16):
        return None
    listed, index = keys.to(torch.uint8).topk(max(most, 1), -1)
    return Few(found[0], index.masked_fill(listed == 0, -1))


def _reweigh_few(step: Step, few: Few, layout: Layout) -> Tensor:
    """Attention to all other keys by the fastest operation, then the edited ones beside it."""
    how = {"scale": step.logit.scale, "softcap": step.logit.softcap, "sinks": step.logit.sinks}
    how["bias"] = _factors(step.bias, step.L)
    others = (~few.edit.keys).float()
    out, lse = ops.attend(step.q, layout.key, layout.value, mass=others, need_lse=True, **how)
    edit = (few.index, few.edit.gain)
    return ops.reweigh_small(step.q, layout.key, layout.value, lse, out, *edit, to=few.edit.to, hidden=True, **how)
