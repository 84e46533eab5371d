"""What a method may look at: a `Step` is one layer's part of one forward pass.

In prefill a step is one sequence without padding (batch 1, length >= 1); in decode it is the whole batch with one query each. Slots
number the keys of a row in the store, the step's own keys included; they are valid until the next `keep`. What crosses layers
or steps are token ids, never slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import leaving, ops
from .edits import Bias, Keep, Leave
from .errors import InputError
from .method import Budget, tokens_of
from .once import Once
from .ops import leave, ragged
from .ops.ragged import Logit
from .selection import All, Selection
from .store import FAR, LayerStore, Rows

if TYPE_CHECKING:
    from .attach import Session
    from .cache import Store, StoreLayer
    from .model_info import ModelInfo


_KEPT = 1 << 22  # bytes of a mask that all layers of a pass share


class Pass:
    """One model forward: of one prefill sequence, or of one decode batch.

    store: all layers.  counts: tokens each sequence had seen before.  ids: token ids [batch, length] or None.  state: a dictionary for what
    methods share across layers during this pass (token ids, never slots).  key: what `begin` returned.
    """

    def __init__(
        self,
        session: Session,
        store: Store,
        counts: Sequence[int],
        length: int,
        decode: bool,
        done: bool,
        ids: Tensor | None,
    ):
        self.session, self.store, self.counts, self.length = session, store, list(counts), length
        self.decode, self.prompt_done, self.ids = decode, done, ids
        self.pending: StoreLayer | None = None
        self.parts: list[Pass] = []  # prefill of a batch: one pass for each sequence
        self.columns: list[Tensor | slice | None] = []  # and the columns of its real tokens (None: all)
        self.state: dict[str, Any] = {}
        self.key: dict[int, Hashable] = {}
        self.added: list[int] = [length] * len(self.counts)  # real tokens of each sequence in this pass
        self.places: list[Tensor] | None = None  # where in the caller's text stands what is read; None: everywhere
        self.asked = length  # columns of the caller's text
        self.returns_store = True  # False: the caller asked for no cache, so none is handed out
        self._token: Tensor | None = None
        # counts [batch] where a graph reads them; then the host's are not to be used
        self.on_device: Tensor | None = None
        self.horizon = 0  # what no sequence grows beyond while this graph lasts
        self.bounded = False  # whether a shape followed from it
        self.once = Once()
        self.read = self.held = 0

    def count_keys(self, read: int, held: int) -> None:
        """Decode: how many keys of the longest row were read and held, added up over layers."""
        self.read += read
        self.held += held

    @property
    def same(self) -> bool:
        """Every sequence has seen equally many tokens."""
        return self.on_device is None and len(set(self.counts)) == 1

    def token(self, device: torch.device) -> int | Tensor:
        """Token id of the first new token: a number, or [batch] when sequences differ."""
        if self.on_device is not None:
            return self.on_device
        if self.same:
            return self.counts[0]
        if self._token is None:
            self._token = torch.tensor(self.counts, dtype=torch.int32).to(device, non_blocking=True)
        return self._token


class Step:
    """One layer, one call.

    q: [batch, heads, length, head_dim].  k_new, v_new: [batch, kv_heads, length, head_dim].  stats: the statistics a method named in
    `needs`, [batch, heads, T] or [batch, heads, length].  plan: what the method's `setup` returned.  scratch: dies with the step.
    visible: what the selections before this one left.
    """

    def __init__(
        self, pass_: Pass, layer: int, store: LayerStore, q: Tensor, k_new: Tensor, v_new: Tensor, logit: Logit
    ):
        self.pass_, self.layer, self.store = pass_, layer, store
        self.q, self.k_new, self.v_new, self.logit = q, k_new, v_new, logit
        self.H, self.G, self.L = q.shape[1], k_new.shape[1], q.shape[2]
        self.decode, self.prompt_done, self.state = pass_.decode, pass_.prompt_done, pass_.state
        self.stats: dict[str, Tensor] = {}
        # statistics per key over the query heads of a KV head, where only those were computed
        self.summed: dict[str, Tensor] = {}
        self.named_stats: dict[str, Tensor] = {}  # the same by the full name of the need, "col_low:400"
        # what each cost; measured on a CPU, where work is done when the call returns
        self.seconds: dict[str, float] = {}
        self.scratch: dict[str, Any] = {}
        self.visible: Selection = All()
        self.bias: Bias | None = None
        self.plan: Any = None
        self._slots: Tensor | None = None

    # ------------------------------------------------------------------ facts

    @property
    def model(self) -> ModelInfo:
        return self.pass_.session.info

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def scale(self) -> float:
        return self.logit.scale

    @property
    def group_size(self) -> int:
        return self.H // self.G

    @property
    def T(self) -> int:
        return self.store.T

    @property
    def token(self) -> Tensor:
        """Token id of each slot, [batch, kv_heads, T]; FAR where empty."""
        if self._slots is None:
            self._slots = self.store.token
        return self._slots

    def apply(self, keep: Keep | Leave) -> None:
        """Let go of what `keep` does not keep; slots are numbered anew."""
        if isinstance(keep, Leave):
            self.let_one_go(keep)
            return
        self.store.apply(keep, self.pass_.once)
        self._slots = None

    def let_one_go(self, rule: Leave) -> Tensor | None:
        """Do what a rule says at once; with `by_token` the token id that left each sequence, int32 [batch], -1 for none."""
        held = self.store.uniform if rule.heads is None else self.store.held(rule.heads)
        known = held is not None and isinstance(rule.allowed, int) and rule.gone is None
        if known and held <= rule.allowed:
            return None
        left = leaving.let_one_go(self, rule, known)
        self._slots = None
        return left

    @property
    def q_token(self) -> Tensor:
        """Token id of each query, [batch, length]."""
        return self.once(("q_token", self.L), self._q_token)

    def _q_token(self) -> Tensor:
        first = self.pass_.token(self.device)
        first = first[:, None] if isinstance(first, Tensor) else first
        return torch.arange(self.L, device=self.device).expand(self.q.shape[0], -1) + first

    def once(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What is the same in every layer of this pass, computed in the first one that asks."""
        return self.pass_.once(self.device, key, make)

    @property
    def whole(self) -> bool:
        """Every row holds every token that was seen, so that slots are token ids."""
        return self.pass_.same and self.store.uniform == self.pass_.counts[0] + self.L

    @property
    def past(self) -> int | Tensor:
        """Keys each row held before this step: a number if all hold the same, else [batch, kv_heads]."""
        n = self.store.uniform
        return n - self.L if n is not None else self.store.len - self.L

    @property
    def new_keys(self) -> Tensor:
        """Which slots are this step's own keys, bool [batch, kv_heads, T]."""
        token = self.token
        return (token >= self.q_token[:, :1, None]) & (token != FAR)

    def seen(self) -> int | Tensor:
        """Tokens seen so far, this step's included: a number, or [batch] when sequences differ."""
        first = self.pass_.token(self.device)
        return first + self.L

    def budget(self, budget: Budget, ahead: int = 0, least: int = 1) -> int | Tensor:
        """How many keys a budget allows now, or `ahead` tokens later, but `least`: a number, or [batch, 1] when they differ."""
        if self.pass_.on_device is not None and isinstance(budget, float):
            return self.once(("budget", budget, ahead, least), lambda: self._share(budget, ahead, least))
        allowed = [max(least, n) for n in self._budgets(budget, ahead)]
        if len(set(allowed)) == 1:
            return allowed[0]
        return torch.tensor(allowed).to(self.device, non_blocking=True)[:, None]

    def _share(self, budget: float, ahead: int, least: int) -> Tensor:
        share = (self.seen() + ahead).double() * budget  # as `tokens_of` rounds
        return (share - 1e-9).ceil().clamp(min=max(1, least)).long()[:, None]

    def most(self, budget: Budget) -> int:
        """The largest number of keys a budget allows any sequence of the batch: what fixes shapes."""
        if self.pass_.on_device is not None:
            self.pass_.bounded |= isinstance(budget, float)
            return tokens_of(budget, self.pass_.horizon)
        return max(self._budgets(budget, 0))

    def _budgets(self, budget: Budget, ahead: int) -> list[int]:
        return [tokens_of(budget, n + self.L + ahead) for n in self.pass_.counts]

    def ranked(self, slots: Tensor, allowed: int | Tensor) -> Tensor:
        """Of slots [batch, kv_heads, k] in order of rank, the first `allowed` of each sequence; -1 for the rest."""
        if isinstance(allowed, int):
            return slots[..., :allowed]
        return slots.where(torch.arange(slots.shape[2], device=slots.device) < allowed[..., None], -1)

    # ------------------------------------------------------------------ heads

    def group(self, x: Tensor, how: str) -> Tensor:
        """[batch, heads, ...] to [batch, kv_heads, ...]: "sum", "mean" or "max" over the query heads that share a KV head."""
        x = x.unflatten(1, (self.G, -1))
        return x.amax(2) if how == "max" else getattr(x, how)(2)

    def per_head(self, x: Tensor) -> Tensor:
        """[batch, kv_heads, ...] to [batch, heads, ...]."""
        return x.repeat_interleave(self.group_size, 1)

    def per_head_like(self, x: Tensor, heads: int) -> Tensor:
        """`x` over 1 or kv_heads or heads, as one over `heads`."""
        return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], 1)

    # ------------------------------------------------------------------ logits: one function for all who need them

    def row(self, c: Rows, x: Tensor | None) -> Tensor | None:
        """What [batch, 1 or kv_heads or heads, 1, T] says of the rows of a class: [rows, 1 or group, bound]."""
        if x is None:
            return None
        x = x.expand(self.q.shape[0], self.G if x.shape[1] == 1 else -1, -1, -1)
        return c.pick(x.reshape(self.q.shape[0] * self.G, -1, x.shape[3]))[..., : c.bound]

    def row_extra(self, c: Rows, bias: Tensor | None) -> Tensor | None:
        """What bias [batch, heads, 1, T] and mass add to the decode logits of a class, [rows, 1 or group, bound]."""
        extra = self.row(c, bias)
        if "mass" not in c.planes:
            return extra
        mass = c.read("mass").log()[:, None]
        return mass if extra is None else extra + mass

    def seen_slots(self, selection: Selection) -> Tensor:
        """Decode: the slots that hold a key and are selected, bool [batch, kv_heads or heads, 1, T]."""
        valid = self.store.valid[:, :, None]
        if isinstance(selection, All):
            return valid
        seen = selection.mask(self, 0, 1)
        return seen & (valid if seen.shape[1] == 1 else self.per_head_like(valid, seen.shape[1]))

    def row_keys(self, c: Rows) -> Tensor:
        """Keys of one length class as attention reads them, [rows, bound, head_dim]: positions inside the cache applied."""
        key, moved = c.read("key"), self.moved_keys(c)
        return key if moved is None else torch.cat([moved, key[:, moved.shape[1] :]], 1)

    def moved_keys(self, c: Rows) -> Tensor | None:
        """The first keys of each row of a class at their positions inside the cache, [rows, m, head_dim]; None if none moved."""
        m = min(self.store.shift_bound, c.bound)
        if m == 0:
            return None
        key = c.gather("key", torch.arange(m, device=self.device).expand(c.arange.shape[0], -1))
        return self.model.rope.rotate(key, c.planes["shift"][:, :m], self.layer)

    def scores(self, q: Tensor | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """Exact logits over all slots, [batch, heads, queries, T]: bias and mass included, -inf where not visible.

        q: other queries in the place of the step's own.  start, stop: a range of queries, for prefill.
        """
        stop = self.L if stop is None else stop
        q = (self.q if q is None else q)[:, :, start:stop]
        B, D = q.shape[0], q.shape[3]
        packed = q.reshape(B * self.G, self.group_size * (stop - start), D)
        rows = self.store.classes
        if rows[0].paged and packed.shape[1] <= ops.paged_attention.MOST_QUERIES:
            z = ops.paged_attention.page_logits(packed, rows[0].view, self.logit, moved=self.moved_keys(rows[0]))
        elif self.store.single is not None:
            z = ragged.logits(packed, self.row_keys(rows[0]), self.logit)
        else:
            z = packed.new_full((B * self.G, packed.shape[1], self.T), -math.inf, dtype=ragged.wide(q.dtype))
            for c in rows:
                z[c.index, :, : c.bound] = ragged.logits(c.pick(packed), self.row_keys(c), self.logit)
        z = z.reshape(B, self.H, stop - start, self.T)
        z = self._add_extra(z, start, stop)
        if self.decode and isinstance(self.visible, All) and self.store.uniform is not None:
            return z
        newest = stop == self.L and (stop - start) * self.T <= _KEPT  # every layer asks for those
        if not self.decode and newest and isinstance(self.visible, All) and self.whole:
            later = self.once(("later", start, self.T), lambda: ~self.visible_mask(start, stop)[:, :1])
            return z.masked_fill(later, -math.inf)
        seen = self.seen_slots(self.visible) if self.decode else self.visible_mask(start, stop)
        return z.masked_fill(~self.per_head_like(seen, self.H), -math.inf)

    def _add_extra(self, z: Tensor, start: int, stop: int) -> Tensor:
        if self.bias is not None:
            query = self.bias.query if self.bias.query.shape[2] == 1 else self.bias.query[:, :, start:stop]
            z = z + query @ self.per_head_like(self.bias.key, self.H).mT
        if "mass" in self.store.specs:
            z = z + self.per_head(self.store.plane("mass")).log()[:, :, None]
        return z

    def visible_mask(self, start: int, stop: int) -> Tensor:
        """Prefill: bool [1, kv_heads or heads, stop - start, T], causality and the selection together."""
        causal = self.token[:, :, None] <= self.q_token[:, None, start:stop, None]
        if isinstance(self.visible, All):
            return causal
        seen = self.visible.mask(self, start, stop)
        heads = max(causal.shape[1], seen.shape[1])
        return self.per_head_like(causal, heads) & self.per_head_like(seen, heads)

    # ------------------------------------------------------------------ choosing

    def top(
        self, scores: Tensor, k: int, allowed: int | Tensor | None = None, keep_sinks: int = 0, keep_recent: int = 0
    ) -> Tensor:
        """The k best past slots of each row in any order, [batch, kv_heads or heads, k], -1 where a row has fewer.

        scores: [batch, kv_heads or heads, T].  allowed: fewer than k for some sequences, [batch, 1].  keep_sinks,
        keep_recent: the oldest and newest tokens that are always among the k.
        """
        token = self.per_head_like(self.token, scores.shape[1])
        first = self.pass_.token(self.device)
        first = first.view(-1, 1, 1) if isinstance(first, Tensor) else first
        scores = scores.masked_fill(token >= first, -math.inf)
        if keep_sinks or keep_recent:
            protected = (token < keep_sinks) | ((token >= first - keep_recent) & (token < first))
            scores = scores.masked_fill(protected & (scores > -math.inf), math.inf)
        by_rank = isinstance(allowed, Tensor)  # an order is needed only there, and costs as much as the choice
        best, slots = scores.topk(min(k, scores.shape[2]), dim=2, sorted=by_rank)
        slots = slots.where(best > -math.inf, -1)
        return self.ranked(slots, allowed) if by_rank else slots

    def oldest(self, after: int = 0) -> Tensor:
        """The slot of the oldest key with a token id of at least `after`, [batch, kv_heads]."""
        token = self.token
        return (token if after == 0 else token.masked_fill(token < after, FAR)).argmin(-1)

    def evict_one(self, slot: Tensor, allowed: int | Tensor, **keep: Any) -> Keep | None:
        """Drop `slot` [batch, kv_heads] in the rows that hold more than `allowed` keys."""
        held = self.store.uniform if keep.get("heads") is None else self.store.held(keep["heads"])
        if held is not None and isinstance(allowed, int):
            return Keep(drop=slot, **keep) if held > allowed else None
        return Keep(drop=slot.where(self.store.len > allowed, -1), optional=True, **keep)

    def keep_best(self, scores: Tensor, k: int, protected: Tensor | None = None) -> Keep:
        """Keep the protected keys and the best of the rest, `k` keys a row in all: scores [batch, kv_heads, T]; prefill only."""
        if protected is not None:
            scores = scores.masked_fill(protected, math.inf)
        valid = None if self.store.uniform is not None else self.store.valid
        scores = scores if valid is None else scores.masked_fill(~valid, -math.inf)
        best = scores.topk(min(k, scores.shape[2]), dim=2).indices
        if valid is None:
            return Keep(slots=best.sort(-1).values)
        return Keep(mask=torch.zeros_like(valid).scatter_(2, best, True) & valid)

    def keep_ends(self, sink: int, recent: int) -> Keep:
        """Keep the first `sink` tokens and the newest `recent`; prefill only, where a row holds more than these."""
        if self.whole:
            every = self.once("slots", lambda: torch.arange(self.T, device=self.device))
            ends = self.once(("ends", sink, recent), lambda: torch.cat([every[:sink], every[self.T - recent :]]))
            return Keep(slots=ends.expand(1, self.G, -1))
        token, last = self.token, self.q_token[:, -1, None, None]
        return Keep(mask=(token < sink) | (last - token < recent))

    def adopt(self, needs: frozenset[str], named: dict[str, Tensor]) -> None:
        """Take over statistics that another step of the same prompt computed."""
        for need in needs:
            self.stats[need.partition(":")[0]] = named[need]

    def column(self, name: str) -> Tensor:
        """A statistic per key, summed over the query heads that share a KV head: [batch, kv_heads, T]."""
        return self.summed[name] if name in self.summed else self.group(self.stats[name], "sum")

    def tally(self, plane: str, name: str) -> None:
        """Add a statistic per key, summed over the query heads of each KV head, to a plane."""
        if name in self.summed:  # nothing stands past a row's length, so nothing need be hidden
            self.store.classes[0].read(plane).add_(self.summed[name].flatten(0, 1))
        else:
            self.store.add(plane, self.column(name))

    def add_by_token(self, total: Tensor, x: Tensor) -> None:
        """total [batch, tokens] += x [batch, kv_heads, T] of the keys of each token id, in place; all heads hold the same tokens."""
        c = self.store.single
        if c is not None and c.paged:
            leave.add_by_token(total, x.flatten(0, 1).float(), c.planes["token"], c.pool.length, self.G)
            return
        token = self.token[:, 0]
        empty = token == FAR
        total.scatter_add_(1, token.masked_fill(empty, 0).long(), x.sum(1).float().masked_fill(empty, 0.0))

    def require(self, name: str) -> Tensor:
        """A statistic by name."""
        if name not in self.stats:
            raise InputError(f"no statistic '{name}' here: name it in the method's `needs`")
        return self.stats[name]
