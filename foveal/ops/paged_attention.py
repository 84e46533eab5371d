"""Decode attention over pages: every row (sequence, KV head) has its own length and its own list of pages."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveal.errors import InputError

from .dense import last_dense, wide
from .formats import code_like
from .merge import merge
from .pages import Pages
from .ragged import Attended, Logit, attend_padded, logits
from .recent import PAGE, Recent
from .route import Route, no_kernel, routed

MOST_QUERIES = 16  # of one KV head; one tile of the kernel


def attend_ragged(
    q: Tensor,
    pages: Pages,
    logit: Logit,
    *,
    extra: Tensor | None = None,
    hidden: Tensor | None = None,
    slots: Tensor | None = None,
    run: int = 1,
    own: bool = False,
    moved: Tensor | None = None,
    window: tuple[int, int] | None = None,
    want: str = "",
) -> Attended:
    """Decode attention of packed rows over their pages.

    q: [rows, group, head_dim].
    extra: added to the logits after scaling and soft-cap, [rows, 1 or group, bound], 0 for none.
    hidden: bool, broadcast to [rows, group, bound], True where a key is not seen.
    slots: int [rows, m], attend to these keys alone, -1 for none; with `run` > 1 each is the first of so many consecutive
    slots.  own: the newest key of each row is seen too, as the last of the list, and runs end before it.
    moved: [rows, n, head_dim], keys that stand in the place of the first n slots.
    window = (first, last): only the first and the last so many slots of a row are seen.
    logit.sinks: [rows, group].
    want: "" for the output, "weights" for [rows, group, width], "mass" for their sum over the group, [rows, width], "low" for how many
    of the group are below uniform, 1 / keys of the row (a tie is not), [rows, width]; width is m * run (+ 1 for `own`) with `slots`,
    else `bound`. "low" goes with whole rows only.

    The log-sum-exp [rows, group] (natural) always comes along. Rows that see nothing return 0 and -inf.
    Raises InputError for shapes and combinations that do not fit.
    """
    _check(q, pages, logit, extra, hidden, slots, moved, window, want)
    if hidden is not None:
        shape = torch.broadcast_shapes(hidden.shape, (pages.rows, 1, pages.bound))
        base = torch.zeros((), device=q.device) if extra is None else extra.float()
        extra = base.expand(torch.broadcast_shapes(shape, base.shape)).masked_fill(hidden, -math.inf)
    if _route(q, pages, logit).name == "torch":
        return _torch(q, pages, logit, extra, (slots, run, own), moved, window, want)
    if pages.overlaid(moved):
        return _with_overlay(q, pages, logit, extra, (slots, run, own), moved, window, want)
    return _by_kernel(q, pages, logit, extra, (slots, run, own), moved, window, want)


def _by_kernel(q, pages: Pages, logit: Logit, extra, listed, moved, window, want: str) -> Attended:
    slots, run, own = listed
    out, lse, weights = _KERNEL(
        q.contiguous(), pages.key, pages.value, pages.table, pages.length, pages.bound, logit.scale, logit.softcap,
        None if logit.sinks is None else logit.sinks.contiguous(), None if extra is None else last_dense(extra.float()),
        None if slots is None else slots.to(torch.int32).contiguous(), run, own, None if moved is None else moved.contiguous(),
        None if window is None else list(window), pages.key_scale, pages.value_scale, pages.format, want,
    )  # fmt: skip
    return Attended(out, weights if want else None, lse)


def _with_overlay(q, pages: Pages, logit: Logit, extra, listed, moved, window, want: str) -> Attended:
    """The codes without those keys that are known better, those keys, and both together."""
    recent, bound = _overlay(pages, moved), pages.bound
    hidden, place = recent.hidden[:, None, :bound], recent.slot.long()
    live = place >= 0
    if listed[0] is not None or window is not None:
        picked, seen = _slots(pages, *listed, window)
        where = place.new_full((pages.rows, bound + 1), -1)
        count = torch.arange(picked.shape[1], device=q.device).expand_as(picked)
        where.scatter_(1, torch.where(seen, picked, bound), count)
        slot, place = place, where.gather(1, place.clamp(0, bound - 1))
        live &= place >= 0
    else:
        slot = place
    unseen = torch.where(live, 0.0, -math.inf)[:, None]
    if extra is not None:
        hidden = hidden + extra
        each = slot.clamp(0, bound - 1)[:, None].expand(-1, extra.shape[1], -1)
        unseen = unseen + extra.expand(pages.rows, -1, -1).gather(2, each)
    ask = "weights" if want else ""  # not their sum: the parts' shares differ from query to query
    old = _by_kernel(q, pages, logit, hidden, listed, None, window, ask)
    new = _by_kernel(q, recent_pages(recent), logit._replace(sinks=None), unseen, (None, 1, False), None, None, ask)
    out, lse = merge(old.out, old.lse, new.out, new.lse)
    out = out.to(q.dtype)
    if not want:
        return Attended(out, None, lse)
    base = lse.masked_fill(lse.isneginf(), 0.0)
    weights = old.weights * (old.lse - base).exp()[..., None]
    fresh = (new.weights * (new.lse - base).exp()[..., None]).masked_fill(~live[:, None], 0.0)
    weights = weights.scatter_add(2, place.clamp(min=0)[:, None].expand_as(fresh), fresh)
    return Attended(out, _of_weights(weights, want, pages), lse)


def _overlay(pages: Pages, moved: Tensor | None) -> Recent:
    """What is read in the place of codes: the newest keys, and those of the first slots that were moved."""
    recent = pages.recent
    if moved is None:
        return recent
    first = torch.arange(moved.shape[1], device=moved.device).expand(pages.rows, -1)
    value = pages.gather("value", first, moved.dtype)
    slot = torch.where(first < pages.length[:, None], first, -1).to(torch.int32)
    pad = -moved.shape[1] % PAGE
    key, value = (torch.nn.functional.pad(x, (0, 0, 0, pad)) for x in (moved, value))
    slot = torch.nn.functional.pad(slot, (0, pad), value=-1)
    if recent is None:
        hidden = torch.zeros(pages.rows, pages.bound, device=moved.device)
    else:
        mine = recent.slot.masked_fill(recent.slot < moved.shape[1], -1)
        key, value = torch.cat([recent.key, key.to(recent.key.dtype)], 1), torch.cat([recent.value, value], 1)
        slot, hidden = torch.cat([mine, slot], 1), recent.hidden.clone()
    hidden[:, : moved.shape[1]] = -math.inf
    return Recent.of(key, value, slot, hidden)


def recent_pages(recent: Recent) -> Pages:
    """The newest keys as pages of their own, one run of pages a row."""
    key, value = (x.view(-1, PAGE, x.shape[2]) for x in (recent.key, recent.value))
    return Pages(key, value, recent.table, recent.full, recent.window)


@routed("attend_ragged")
def _route(q: Tensor, pages: Pages, logit: Logit, **_) -> Route:
    why = no_kernel(q)
    if why is None and q.dtype == torch.float64:
        why = "the kernel has no float64"
    if why is None and q.shape[1] > MOST_QUERIES:
        why = f"{q.shape[1]} query heads share a KV head and the kernel packs {MOST_QUERIES}"
    if why is None and max(q.shape[2], pages.value.shape[2]) > 256:
        why = "the kernel takes heads of up to 256 dimensions"
    if why is None:
        return Route("triton", "pages on a CUDA device")
    return Route("torch", why)


def _check(q, pages, logit, extra, hidden, slots, moved, window, want) -> None:
    _, width = code_like(q, pages.format)
    if q.dim() != 3 or q.shape[0] != pages.rows or pages.key.shape[2] != width:
        raise InputError(
            f"expected q [{pages.rows} rows, group, head_dim] for pages with keys of width {pages.key.shape[2]}, got {list(q.shape)}"
        )
    if want not in ("", "weights", "mass", "low"):
        raise InputError(f"want = {want!r}: expected '', 'weights', 'mass' or 'low'")
    if want == "low" and not (slots is None and hidden is None and window is None):
        raise InputError("want = 'low' counts against all keys of a row: leave out slots, hidden and window")
    if (pages.format is None) != (pages.key_scale is None):
        raise InputError("pages of codes need key_scale and value_scale, and plain pages must not have them")
    for name, x in (("extra", extra), ("hidden", hidden)):
        if x is not None and (x.dim() != 3 or x.shape[2] != pages.bound or x.shape[1] not in (1, q.shape[1])):
            raise InputError(f"expected {name} [{pages.rows}, 1 or {q.shape[1]}, {pages.bound}], got {list(x.shape)}")
    if slots is not None and (slots.dim() != 2 or slots.shape[0] != pages.rows):
        raise InputError(f"expected slots [{pages.rows} rows, m], got {list(slots.shape)}")
    if window is not None and (slots is not None or moved is not None or min(window) < 0 or window[1] < 1):
        raise InputError("window = (first, last) takes last >= 1 and goes with neither `slots` nor `moved`")
    if logit.sinks is not None and logit.sinks.shape != q.shape[:2]:
        raise InputError(f"expected sinks {list(q.shape[:2])}, got {list(logit.sinks.shape)}")


def _torch(q, pages: Pages, logit: Logit, extra, listed, moved, window, want: str) -> Attended:
    """Gather and attend: what the kernel means, and the path where there is none."""
    picked, seen = _slots(pages, *listed, window)
    out_of = {name: pages.gather(name, picked, wide(q.dtype)) for name in ("key", "value")}
    if moved is not None:
        m = moved.shape[1]
        own = (picked < m)[..., None]
        at = picked.clamp(max=m - 1)[..., None].expand(-1, -1, moved.shape[2])
        out_of["key"] = torch.where(own, moved.to(wide(q.dtype)).gather(1, at), out_of["key"])
    if extra is not None:
        at = picked[:, None].expand(-1, extra.shape[1], -1)
        extra = extra.expand(pages.rows, -1, -1).gather(2, at)
    how = {"extra": extra, "hidden": ~seen[:, None], "need_lse": True, "may_be_blind": True}
    got = attend_padded(q.to(wide(q.dtype)), out_of["key"], out_of["value"], logit, **how)
    return Attended(got.out.to(q.dtype), _of_weights(got.weights, want, pages), got.lse)


def _of_weights(weights: Tensor, want: str, pages: Pages) -> Tensor | None:
    """What `want` says of weights [rows, group, width]."""
    if want == "low":
        held = pages.length[:, None, None]
        slot = torch.arange(weights.shape[2], device=weights.device)
        return ((weights < (1 - 1e-5) / held) & (slot < held)).sum(1).to(weights.dtype)
    return {"": None, "weights": weights, "mass": weights.sum(1)}[want]


def _slots(
    pages: Pages, slots: Tensor | None, run: int, own: bool, window: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """The slots that are read, int64 [rows, m], and which of them hold a key."""
    length = pages.length[:, None]
    if slots is not None:
        first = slots.long()[..., None]
        each = (first + torch.arange(run, device=slots.device)).flatten(1)
        seen = (first >= 0).expand(-1, -1, run).flatten(1) & (each < length - int(own))
        if own:
            each, seen = torch.cat([each, length - 1], 1), torch.cat([seen, length > 0], 1)
        return each * seen, seen
    n = torch.arange(pages.bound, device=pages.table.device).expand(pages.rows, -1)
    if window is None:
        return n * (n < length), n < length
    first, last = window
    n = n[:, : first + last]
    skipped = (length - first - last).clamp(min=0)
    slot = torch.where(n < first, n, n + skipped)
    return slot * (slot < length), slot < length


def page_logits(q: Tensor, pages: Pages, logit: Logit, *, moved: Tensor | None = None) -> Tensor:
    """Scaled and soft-capped logits of packed queries, float32 [rows, group, bound]; what stands past a row's length means nothing."""
    if _route(q, pages, logit).name == "torch":
        picked, _ = _slots(pages, None, 1, False, None)
        key = pages.gather("key", picked, wide(q.dtype))
        if moved is not None:
            key = torch.cat([moved.to(key.dtype), key[:, moved.shape[1] :]], 1)[:, : pages.bound]
        return logits(q.to(wide(q.dtype)), key, logit._replace(sinks=None))
    over = pages.overlaid(moved)
    _, _, x = _KERNEL(
        q.contiguous(), pages.key, pages.value, pages.table, pages.length, pages.bound, logit.scale, logit.softcap,
        None, None, None, 1, False, None if moved is None or over else moved.contiguous(), None, pages.key_scale,
        pages.value_scale, pages.format, "logits",
    )  # fmt: skip
    if not over:
        return x
    better = _overlay(pages, moved)
    fresh = page_logits(q, recent_pages(better), logit)
    at = torch.where(better.slot >= 0, better.slot, pages.bound).long()[:, None].expand_as(fresh)
    return torch.nn.functional.pad(x, (0, 1)).scatter_(2, at, fresh)[..., : pages.bound]


def _kernel(
    q: Tensor, key: Tensor, value: Tensor, table: Tensor, length: Tensor, bound: int, scale: float,
    softcap: float | None, sinks: Tensor | None, extra: Tensor | None, slots: Tensor | None, run: int, own: bool,
    moved: Tensor | None, window: list[int] | None, key_scale: Tensor | None, value_scale: Tensor | None, format: str | None, want: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from .gpu.launch import LN2
    from .gpu.ragged import Wanted, launch

    wanted = Wanted(want == "weights", want == "mass", want == "logits", want == "low")
    out, lse, x = launch(
        q, key, value, table, length, bound, scale, softcap=softcap, sinks=sinks, extra=extra, slots=slots, run=run, own=own,
        moved=moved, window=None if window is None else tuple(window), format=format,
        scales=None if key_scale is None else (key_scale, value_scale), want=wanted,
    )  # fmt: skip
    if want == "logits":
        return out, lse, x.mul_(LN2).transpose(1, 2)
    return out, lse, x if want else q.new_empty(0, dtype=torch.float32)


_KERNEL = torch.library.custom_op("foveal::attend_ragged", _kernel, mutates_args=(), schema=(
    "(Tensor q, Tensor key, Tensor value, Tensor table, Tensor length, SymInt bound, float scale, float? softcap, "
    "Tensor? sinks, Tensor? extra, Tensor? slots, SymInt run, bool own, Tensor? moved, SymInt[]? window, Tensor? key_scale, "
    "Tensor? value_scale, str? format, str want) -> (Tensor, Tensor, Tensor)"
))  # fmt: skip


@_KERNEL.register_fake
def _(q, key, value, table, length, bound, scale, softcap, sinks, extra, slots, run, own, moved, window, key_scale,
      value_scale, format, want):  # fmt: skip
    rows, group, _ = q.shape
    width = slots.shape[1] * run + own if slots is not None else bound if window is None else min(bound, sum(window))
    whole, keys = (rows, group, width), (rows, width)
    shape = {"": (0,), "weights": whole, "mass": keys, "low": keys, "logits": whole}[want]
    value_dim = value.shape[2] * (2 if format == "int4" else 1)
    return q.new_empty(rows, group, value_dim), *(q.new_empty(s, dtype=torch.float32) for s in ((rows, group), shape))
