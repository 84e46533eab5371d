"""The one attention call: store, select, weigh, attend, reweigh, mix, keep.

Prefill runs once for each sequence, without padding, so that a method never meets a pad; decode runs the whole batch.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import ops
from .cache import ACTIVE, StoreLayer
from .edits import Bias, Reweigh
from .errors import FovealError, InputError, UnsupportedModel
from .method import STATISTICS, Method
from .ops import ragged
from .ops.ragged import Logit
from .selection import All, And, Band, Blocks, Nothing, Selection, TokenIds, Tokens
from .step import Pass, Step
from .store import LayerStore, Rows

TILE = 1 << 22  # weights of one query tile, so that explicit rows stay within megabytes


class Part(NamedTuple):
    """A method on an attached model, with what its setup returned."""

    method: Method
    plan: object

    def on(self, step: Step) -> Step:
        step.plan = self.plan
        return step


def foveal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """The function registered with transformers: query [batch, heads, length, head_dim], key and value per KV head."""
    pass_ = ACTIVE.get()
    if pass_ is None:
        raise FovealError("this model is set to attention 'foveal' but is not attached: use `with foveal.attach(model, method):`")
    layer, pass_.pending = pass_.pending, None
    if layer is None:
        return _model_own(pass_, module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux, kwargs)
    _refuse(module, kwargs, dropout)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = run(pass_, layer, query, key, value, Logit(scale, softcap, s_aux))
    return out.transpose(1, 2), None


def _model_own(pass_, module, query, key, value, mask, scaling, dropout, softcap, s_aux, kwargs):
    """Layers Foveal leaves alone (sliding windows) run the model's own implementation."""
    name = pass_.session.original
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    fn = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    extra = {k: v for k, v in (("softcap", softcap), ("s_aux", s_aux)) if v is not None}
    return fn(module, query, key, value, mask, scaling=scaling, dropout=dropout, **extra, **kwargs)


def _refuse(module: nn.Module, kwargs: dict, dropout: float) -> None:
    if kwargs.get("output_attentions"):
        raise InputError("attention weights are never held whole here: detach to use output_attentions, or ask a lens")
    if kwargs.get("position_bias") is not None or kwargs.get("is_causal") is False:
        raise UnsupportedModel(f"{type(module).__name__} uses a position bias or attends both ways: only causal attention can be attached")
    if dropout > 0:
        raise InputError(f"attention dropout is {dropout} in training mode: set the model's attention_dropout to 0 before attaching")


# ---------------------------------------------------------------------- the path


def run(pass_: Pass, layer: StoreLayer, q: Tensor, k: Tensor, v: Tensor, logit: Logit) -> Tensor:
    """One layer of one forward pass; returns [batch, heads, length, value_dim]."""
    parts = pass_.session.active[layer.index]
    rows = layer.rows
    if pass_.decode:
        out = _decode(pass_, layer.index, rows, parts, q, k, v, logit)
        return _NoBackward.apply(out, q) if torch.is_grad_enabled() and q.requires_grad else out
    cached = not rows.empty
    if not parts and _batch_is_plain(pass_, rows):
        out = _plain_prefill(pass_, rows, q, k, v, logit)
    else:
        out = _each_sequence(pass_, layer.index, rows, parts, q, k, v, logit)
    return _NoBackward.apply(out, q) if cached and torch.is_grad_enabled() and q.requires_grad else out


def _batch_is_plain(pass_: Pass, rows: LayerStore) -> bool:
    """No padding, equal counts, nothing ever let go: the whole batch can be read at once."""
    return pass_.same and all(c is None for c in pass_.columns) and (rows.empty or rows.uniform == pass_.counts[0])


def _plain_prefill(pass_: Pass, rows: LayerStore, q: Tensor, k: Tensor, v: Tensor, logit: Logit) -> Tensor:
    fresh = rows.empty
    rows.append(k, v, pass_.counts[0])
    keys, values = (k, v) if fresh else (rows.keys(), rows.values())
    return ops.attend(q, keys, values, scale=logit.scale, softcap=logit.softcap, sinks=logit.sinks)[0]


def _each_sequence(
    pass_: Pass, index: int, rows: LayerStore, parts: Sequence[Part], q: Tensor, k: Tensor, v: Tensor, logit: Logit
) -> Tensor:
    batch = q.shape[0]
    if batch == 1 and pass_.columns[0] is None:
        return _prefill(pass_.parts[0], index, rows, parts, q, k, v, logit)
    pieces = [LayerStore(rows.specs) for _ in range(batch)] if rows.empty else [rows.take([b]) for b in range(batch)]
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    for b, (sub, columns) in enumerate(zip(pass_.parts, pass_.columns, strict=True)):
        at = slice(None) if columns is None else columns
        one = [x[b : b + 1, :, at] for x in (q, k, v)]
        out[b, :, at] = _prefill(sub, index, pieces[b], parts, *one, logit)[0].to(out.dtype)
    rows.become(pieces)
    return out


# ---------------------------------------------------------------------- prefill, one sequence


def _prefill(
    pass_: Pass, index: int, rows: LayerStore, parts: Sequence[Part], q: Tensor, k: Tensor, v: Tensor, logit: Logit
) -> Tensor:
    before = None if rows.empty else (_read_keys(pass_, index, rows), rows.values(), _past_mass(rows))
    past_whole = rows.empty or rows.uniform == pass_.counts[0]
    rows.append(k, v, pass_.counts[0])
    step = Step(pass_, index, rows, q, k, v, logit)
    selection, out, lse = All(), None, None
    for part in parts:
        selection = selection & part.method.select(part.on(step))
        step.visible = selection
    step.bias = _sum(part.method.weigh(part.on(step)) for part in parts)
    for part in parts:
        replaced = part.method.attend(part.on(step), selection, step.bias)
        out, lse = replaced if replaced is not None else (out, lse)
    needs = frozenset().union(*(p.method.needs for p in parts)) if parts else frozenset()
    layout = _layout(step, before, past_whole)
    if out is None:
        want_lse = bool(needs) or any("reweigh" in p.method.asks for p in parts)
        out, lse = _attend(step, selection, layout, want_lse)
    _statistics(step, needs, selection, layout, lse)
    out = _reweigh(step, parts, selection, lse, out)
    return _finish(step, parts, out)


class Layout(NamedTuple):
    """Keys as one block in which query i sees everything before column T - L and then causally: [1, kv_heads, T, head_dim].

    whole: nothing was ever let go, so column = slot = token id.
    """

    key: Tensor
    value: Tensor
    mass: Tensor | None
    whole: bool


def _layout(step: Step, before: tuple[Tensor, Tensor, Tensor] | None, past_whole: bool) -> Layout:
    if before is None:
        return Layout(step.k_new, step.v_new, None, True)
    if past_whole:
        return Layout(step.store.keys(), step.store.values(), None, True)
    key, value, mass = before
    new = mass.new_ones(1, step.G, step.L)
    return Layout(
        torch.cat([key, step.k_new], 2), torch.cat([value, step.v_new], 2), torch.cat([mass, new], 2), False
    )


def _past_mass(rows: LayerStore) -> Tensor:
    """How much each stored key counts, [1, kv_heads, T]: zero where a slot is empty."""
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
        return ops.attend_masked(step.q, keys, values, lambda a, b: step.visible_mask(a, b, selection), **how)
    if isinstance(selection, All) and step.bias is None:
        return ops.attend(step.q, layout.key, layout.value, mass=layout.mass, **how)
    return _by_rows(step, selection, need_lse)


def _factors(bias: Bias | None, length: int) -> tuple[Tensor, Tensor] | None:
    return None if bias is None else (bias.query.expand(-1, -1, length, -1), bias.key)


def _tiles(step: Step, selection: Selection, first: int = 0) -> Iterator[tuple[int, int, Tensor]]:
    """Exact logits of query tiles over all slots, [1, heads, tile, T]: the general path, dense in time, bounded in memory."""
    step.visible = selection
    size = max(1, TILE // (step.H * step.T))
    for start in range(first, step.L, size):
        stop = min(start + size, step.L)
        yield start, stop, step.scores(start=start, stop=stop)


def _by_rows(step: Step, selection: Selection, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    values = step.per_head(step.store.values())
    out = step.q.new_empty(*step.q.shape[:3], values.shape[3])
    lse = torch.empty(step.q.shape[:3], dtype=ragged.wide(step.q.dtype), device=step.device)
    for start, stop, z in _tiles(step, selection):
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
        if name not in ops.stats.NAMES:
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
        _of_weights(step, name, _weights(z, lse[:, :, start:stop]), z > -math.inf)
        for start, stop, z in _tiles(step, selection, first)
    )
    return sum(tiles) if name.startswith("col_") else torch.cat(list(tiles), 2)


def _of_weights(step: Step, name: str, weights: Tensor, seen: Tensor | None) -> Tensor:
    """A statistic of explicit weights [batch, heads, queries, T]: [batch, heads, T] for columns, else [batch, heads, queries]."""
    if name == "col_mass":
        return weights.sum(2)
    if name == "col_low":  # a tie with uniform attention is not low
        uniform = 1 / seen.sum(-1, keepdim=True).clamp(min=1)
        return ((weights < uniform * (1 - 1e-5)) & seen).sum(2).to(weights.dtype)
    if name == "entropy":
        return -torch.special.xlogy(weights, weights).sum(-1)
    if name == "sink_mass":
        return (weights * step.per_head(step.token < 4)[:, :, None]).sum(-1)
    if name == "row_argmax":
        return weights.argmax(-1)
    raise InputError(f"'{name}' is no statistic a method can name: choose from {', '.join(STATISTICS)}")


def _to_slots(step: Step, x: Tensor) -> Tensor:
    """Column statistics [1, heads, columns] of a padded layout, in slots: a row's new keys follow its own past."""
    columns, total = x.shape[2] - step.L, step.T
    past = step.store.len - step.L  # [1, G]
    slot = torch.arange(total, device=step.device).expand(1, step.G, -1)
    column = torch.where(slot < past[..., None], slot, slot - past[..., None] + columns).clamp(max=x.shape[2] - 1)
    return x.gather(2, step.per_head(column)).masked_fill(~step.per_head(step.store.valid), 0.0)


# ---------------------------------------------------------------------- decode, the batch


def _decode(
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
    selection, out, lse = All(), None, None
    for part in parts:
        selection = selection & part.method.select(part.on(step))
        step.visible = selection
    step.bias = _sum(part.method.weigh(part.on(step)) for part in parts)
    for part in parts:
        replaced = part.method.attend(part.on(step), selection, step.bias)
        out, lse = replaced if replaced is not None else (out, lse)
    if out is None:
        needs = frozenset().union(*(p.method.needs for p in parts)) if parts else frozenset()
        edits = any("reweigh" in p.method.asks for p in parts)
        out, weights = _attend_decode(step, selection, needs, edits)
        if edits:
            out = _combine(step, _edited(step, parts, weights))
    return _finish(step, parts, out)


def _attend_decode(step: Step, selection: Selection, needs: frozenset[str], edits: bool) -> tuple[Tensor, Tensor | None]:
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
    out = q.new_empty(B * G, H // G, rows.classes[0].planes["value"].shape[2])
    weights = torch.zeros(B * G, H // G, rows.T, dtype=ragged.wide(q.dtype), device=q.device)
    lse = weights.new_empty(B * G, H // G)
    for c in rows.classes:
        attended = _attend_class(step, c, q, extra, hidden)
        if c.index is None:
            out, lse, weights = attended
        else:
            out[c.index], lse[c.index], weights[c.index, :, : c.bound] = attended
    out, weights = out.view(B, H, 1, -1), weights.view(B, H, 1, -1)
    _decode_statistics(step, needs, weights, lse.view(B, H, 1), selection)
    return out, weights


def _attend_class(step: Step, c: Rows, q: Tensor, extra: Tensor | None, hidden: Tensor | None) -> ragged.Attended:
    extra, hidden = (_per_row(step, c, x) for x in (extra, hidden))
    sinks = step.logit.sinks
    if sinks is not None:
        sinks = c.pick(sinks.view(1, step.G, -1).expand(step.q.shape[0], -1, -1).flatten(0, 1))
    logit = step.logit._replace(sinks=sinks)
    return ragged.attend_ragged(c.pick(q), step.row_keys(c), c.read("value"), logit, extra=extra, hidden=hidden)


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
    out = None
    for c in step.store.classes:
        mine = c.pick(at)
        here = (c.arange[:, None], mine)
        key, value = step.row_keys(c)[here], c.planes["value"][here]
        more = _per_row(step, c, extra)
        if more is not None:
            more = more.expand(-1, q.shape[1], -1).gather(2, mine[:, None].expand(-1, q.shape[1], -1))
        sinks = step.logit.sinks
        if sinks is not None:
            sinks = c.pick(sinks.view(1, step.G, -1).expand(step.q.shape[0], -1, -1).flatten(0, 1))
        logit = step.logit._replace(sinks=sinks)
        got = ragged.attend_ragged(c.pick(q), key, value, logit, extra=more, hidden=c.pick(hidden)).out
        if c.index is None:
            out = got
        else:
            out = got.new_empty(q.shape[0], q.shape[1], got.shape[2]) if out is None else out
            out[c.index] = got
    return out.view(step.q.shape[0], step.H, 1, -1)


def _decode_statistics(step: Step, needs: frozenset[str], weights: Tensor, lse: Tensor, selection: Selection) -> None:
    """From the weights of one query; everything is already at hand."""
    if not needs:
        return
    needs = {n.partition(":")[0] for n in needs}
    row = weights[:, :, 0]
    step.stats["lse"] = lse
    if "col_mass" in needs:
        step.stats["col_mass"] = row
    if "col_low" in needs:
        hidden = step.hidden(selection)
        seen = None if hidden is None else ~step.per_head_like(hidden, step.H)[:, :, 0]
        t = row.shape[2] if seen is None else seen.sum(-1, keepdim=True).clamp(min=1)
        low = row < (1 - 1e-5) / t
        step.stats["col_low"] = (low if seen is None else low & seen).to(row.dtype)
    for name in needs & {"entropy", "sink_mass", "row_argmax"}:
        step.stats[name] = _of_weights(step, name, weights, None)


# ---------------------------------------------------------------------- edits and the end of a step


def _edited(step: Step, parts: Sequence[Part], weights: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """Apply the methods' post-softmax edits, one after the other, to weights [batch, heads, queries, T]."""
    for part in parts:
        edit = part.method.reweigh(part.on(step)) if "reweigh" in part.method.asks else None
        if edit is not None:
            weights = _apply_reweigh(step, edit, weights, start, stop)
    return weights


def _apply_reweigh(step: Step, edit: Reweigh, weights: Tensor, start: int, stop: int | None) -> Tensor:
    keys = step.per_head_like(edit.keys, step.H)[:, :, None]
    gain = edit.gain
    if isinstance(gain, Tensor):
        gain = gain[:, :, start:stop, None] if gain.ndim == 3 else gain[:, :, None, None]
    changed = torch.where(keys, weights * gain, weights)
    if edit.to is False:
        return changed
    others = ~keys if edit.to is None else step.per_head_like(edit.to, step.H)[:, :, None] & ~keys
    freed = weights.sum(-1, keepdim=True) - changed.sum(-1, keepdim=True)
    payers = (weights * others).sum(-1, keepdim=True)
    # a row with nobody to receive keeps its weights: there is nothing to redistribute to
    share = torch.where(payers > 0, 1 + freed / payers.clamp(min=1e-30), 1.0)
    return torch.where(payers > 0, torch.where(others, changed * share, changed), weights)


def _combine(step: Step, weights: Tensor) -> Tensor:
    """Decode: weights [batch, heads, 1, T] times the values of each length class."""
    B, rows = step.q.shape[0], step.store
    flat = weights.reshape(B * step.G, step.group_size, -1)
    out = step.q.new_empty(B * step.G, step.group_size, rows.classes[0].planes["value"].shape[2])
    for c in rows.classes:
        got = torch.bmm(c.pick(flat)[..., : c.bound].to(out.dtype), c.read("value"))
        if c.index is None:
            out = got
        else:
            out[c.index] = got
    return out.view(B, step.H, 1, -1)


def _reweigh(step: Step, parts: Sequence[Part], selection: Selection, lse: Tensor | None, out: Tensor) -> Tensor:
    """Prefill: rows whose weights are edited are recomputed tile by tile from the log-sum-exp."""
    if not any("reweigh" in p.method.asks for p in parts):
        return out
    values = step.per_head(step.store.values())
    tiles = []
    for start, stop, z in _tiles(step, selection):
        weights = _edited(step, parts, _weights(z, lse[:, :, start:stop]), start, stop)
        tiles.append((weights.to(values.dtype) @ values).to(out.dtype))
    return torch.cat(tiles, 2)


def _finish(step: Step, parts: Sequence[Part], out: Tensor) -> Tensor:
    for part in parts:
        out = part.method.mix(part.on(step), out)
    let_go(step, parts)
    return out


def let_go(step: Step, parts: Sequence[Part]) -> None:
    """The end of a step: everybody looks, then each method in turn keeps, seeing what those before it left.

    (A chain refuses a second keeper that needs statistics per key: they belong to the slots before the first one.)
    """
    for part in parts:
        part.method.after(part.on(step))
    for part in parts:
        keep = part.method.keep(part.on(step)) if "keep" in part.method.asks else None
        if keep is not None:
            step.store.apply(keep)


def _sum(biases: Iterator[Bias | None]) -> Bias | None:
    total = None
    for b in biases:
        if b is not None:
            total = b if total is None else total + b
    return total


class _NoBackward(torch.autograd.Function):
    """Keys in the store carry no gradient, so a backward pass through them must not look as if it worked."""

    @staticmethod
    def forward(ctx, out: Tensor, q: Tensor) -> Tensor:
        return out.detach().view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise FovealError(
            "no gradient flows through cached keys: for training, run the whole text in one forward pass with an empty cache"
        )
