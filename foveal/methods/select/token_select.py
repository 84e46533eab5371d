"""TokenSelect: every chunk of a prompt and every decode step reads the few tokens that its heads vote for, renumbered."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import ops
from ...edits import Plane
from ...errors import CompositionError, InputError
from ...method import Budget, Method, Out, check_budget, check_count, check_range, method, tokens_of
from ...ops.pages import Pages
from ...ops.ragged import Logit
from ...ops.votes import Kept, Turn
from ...selection import All
from ...verify import Beats, Claim, StaysNear
from .lists import (
    WIDTH,
    by_id,
    each_list,
    gather,
    in_order,
    packed,
    plain_pages,
    remember,
    similarity,
    slots_of_ids,
    top_ids,
)


@method(
    "token-select",
    paper="TokenSelect: Efficient Long-Context Inference and Length Extrapolation via Dynamic Token-Level KV Cache Selection (2024) [134]",
    claim=Claim(
        "Reading 2,688 of up to a million tokens, chosen by soft vote, works beyond the trained length; up to 2.28x faster end to end.",
        number="Qwen2 7B and Llama 3 8B, InfiniteBench, RULER and LongBench: ahead of InfLLM and SnapKV; 2.28 times as fast (A100)",
        experiments=(
            StaysNear("token-select(budget=0.25, chunk=128)", "needle", within=0.1),
            Beats("token-select(budget=0.25, chunk=128)", "streaming-llm(budget=0.25)", "needle", by=0.3, at="reads"),
        ),
        setting="inside the trained length: a quarter of 1,024 tokens, read by prompt and decode alike; accuracy alone",
    ),
)
@dataclass(frozen=True)
class TokenSelect(Method):
    """Of each layer, `sink` first tokens, the newest `recent` and the best of the rest are read, `budget` in all (paper: 128, 512 and
    2,048): one set for all heads, for each chunk of `chunk` tokens of a prompt and for each decode step. The whole cache stays.

    Vote: queries stand at position `recent` and candidates at 0, so that all are equally far; the mean query of a chunk gives each head
    a softmax over the candidates, without the model's scale as in the released code, and the heads' weights are summed. Votes are
    compared in bfloat16; of equals the earlier token wins.
    Sinks and window take at most a quarter of a small budget, in their proportion. In a prompt a query also sees its own chunk.

    positions: "cache" numbers what is read 0, 1, 2 .. so that text may outgrow the model's positions (the paper's way); "original"
    leaves keys where they were. Up to `budget` tokens everything is dense.
    reuse: in decode keep the chosen tokens while the cosine to the query that chose them is at least this (paper: 0.9; None, as
    released: choose at each step).
    """

    budget: Budget = 2688
    sink: int = 128
    recent: int = 512
    chunk: int = 512
    positions: str = "cache"
    reuse: float | None = None

    example = {"budget": 0.4, "sink": 2, "recent": 4, "chunk": 16}

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_count("sink", self.sink)
        check_count("recent", self.recent, 1)
        check_count("chunk", self.chunk, 1)
        if self.positions not in ("original", "cache"):
            raise InputError(f"positions = {self.positions!r}: expected 'original' or 'cache'")
        if self.reuse is not None:
            check_range("reuse", self.reuse, -1, 2)

    @property
    def renumber(self) -> bool:
        return self.positions == "cache"

    @property
    def unbounded(self) -> bool:
        return self.renumber

    @property
    def planes(self) -> dict[str, Plane]:
        if self.reuse is None:
            return {}
        return {"token_select": Plane(0, torch.bool), "token_select_query": Plane(0.0, width=(WIDTH,))}

    def setup(self, model) -> None:
        _ = model.rope  # raises now where keys cannot be moved

    def begin(self, pass_) -> None:
        """Refuse what would reach beyond the model's positions even renumbered."""
        limit = pass_.session.info.max_positions
        if not self.renumber or limit is None:
            return
        for n in pass_.counts:
            total = n + pass_.length
            size = tokens_of(self.budget, total)
            reach = total if size >= total else size + min(self.chunk, pass_.length)
            if reach > limit:
                raise InputError(
                    f"a budget of {size} tokens with chunks of {self.chunk} reaches beyond the model's {limit} positions: "
                    "give a smaller budget or chunk"
                )

    def attend(self, step, selection, bias) -> Out | None:
        if not isinstance(selection, All) or {"shift", "mass"} & set(step.store.specs):
            raise CompositionError(
                "token-select reads a list and positions of its own: it goes with methods that drop keys, "
                "not with others that select, renumber or merge them"
            )
        return self._decode(step) if step.decode else self._prefill(step)

    def _ends(self, size: int | Tensor) -> tuple[int | Tensor, int | Tensor]:
        """Sinks and recent tokens, the step's own included, of a budget."""
        quarter, total = size // 4, self.sink + self.recent
        if isinstance(size, int):
            return min(self.sink, quarter * self.sink // total), max(
                1, min(self.recent, quarter * self.recent // total)
            )
        recent = (quarter * self.recent // total).clamp(1, self.recent)
        return (quarter * self.sink // total).clamp(max=self.sink), recent

    # ------------------------------------------------------------------ prompt

    def _prefill(self, step) -> Out | None:
        first = step.pass_.counts[0]
        stops = [*range((first // self.chunk + 1) * self.chunk, first + step.L, self.chunk), first + step.L]
        pieces = list(zip([first, *stops[:-1]], stops, strict=True))
        chosen = [self._room(a, b) for a, b in pieces]
        if not any(chosen):
            return None
        fresh = step.T == step.L  # what was just made may want gradients
        keys, values = (step.k_new, step.v_new) if fresh else (step.store.keys(), step.store.values())
        raw = self._unrotated(step, keys)
        out = []
        for (a, b), k in zip(pieces, chosen, strict=True):
            q = step.q[:, :, a - first : b - first]
            own = torch.arange(a, b, device=step.device)[None]
            ids = torch.arange(a, device=step.device)[None]
            if k:
                query, sink, recent = self._mean_query(step, q, own), *self._ends(tokens_of(self.budget, b))
                score = self._votes(step, query, raw, sink, b - max(recent, b - a))
                score = self._forced(score, a, sink, b - recent)
                ids = top_ids(step, score, k, k, before=a)
            slots = slots_of_ids(step, torch.cat([ids, own], 1))
            at = slots.clamp(min=0)[..., None]
            read = [x.gather(2, at.expand(-1, -1, -1, x.shape[3])) for x in (keys, values)]
            mass = None if step.whole else (slots >= 0).float()
            out.append(self._read(step, q, *read, torch.cat([ids, own], 1), slots, mass, self.renumber and k > 0))
        return Out(torch.cat(out, 2))

    def _room(self, a: int, b: int) -> int:
        """How many past tokens the chunk a..b reads; 0 where it reads all of them."""
        size = tokens_of(self.budget, b)
        k = size - min(self._ends(size)[1], b - a)
        return k if size < b and k < a else 0

    # ------------------------------------------------------------------ decode

    def _decode(self, step) -> Out | None:
        most = max(2, step.most(self.budget))
        if most >= step.T:
            return None
        size, own = step.budget(self.budget, least=2), step.q_token
        sink, recent = self._ends(size)
        pages = plain_pages(step) if in_order(step) else None
        frequency = None if pages is None else step.model.rope.frequencies(step.q, step.layer)
        if frequency is not None:
            return self._by_pages(step, pages, frequency, most, size, sink, recent)
        query = self._mean_query(step, step.q, own)
        score = self._decode_score(step, query, own, sink, recent)
        ids = top_ids(step, self._forced(score, own, sink, own + 1 - recent), most - 1, size - 1)
        if self.reuse is not None:
            self._mark(step, ids, own, sink, recent)
        read = torch.cat([ids, own], 1)
        slots = slots_of_ids(step, read)
        step.pass_.count_keys(most, step.T)
        mass = None if step.whole and self.reuse is None else (slots >= 0).to(step.q.dtype)
        key, value = gather(step, "key", slots), gather(step, "value", slots)
        return Out(self._read(step, step.q, key, value, read, slots, mass, self.renumber))

    def _by_pages(self, step, pages: Pages, frequency: Tensor, most: int, size, sink, recent) -> Out:
        """The same where slots are positions and keys lie in pages: neither keys nor votes are ever gathered."""
        q, kept, ends = packed(step), None, (sink, recent)
        if isinstance(sink, Tensor):
            ends = sink[:, 0], recent[:, 0]
        if self.reuse is not None:
            query, marked = self._mean_query(step, step.q, step.q_token), step.store.plane("token_select")
            again = (similarity(step, "token_select_query", query) >= self.reuse) & marked[:, 0].any(-1)
            step.scratch["token_select"] = query, ~again
            kept = Kept(again, marked.flatten(0, 1))
        how = {"count": each_list(size - 1), "kept": kept, "turn": Turn(frequency, self.recent), "kv_heads": step.G}
        how |= {"sink": ends[0], "recent": ends[1], "middle": True, "coarse": True}
        ids, found = ops.vote_slots(q, pages, Logit(1.0), most - 1, **how)
        if self.reuse is not None:
            self._mark(step, ids.long(), step.q_token, sink, recent)
        step.pass_.count_keys(most, step.T)
        sinks = step.logit.sinks
        if sinks is not None:
            sinks = sinks.view(1, step.G, -1).expand(step.q.shape[0], -1, -1).flatten(0, 1)
        logit = step.logit._replace(sinks=sinks)
        if self.renumber:
            out = ops.attend_renumbered(q, pages, logit, ids, found, frequency, kv_heads=step.G)
        else:
            slots = slots_of_ids(step, ids).flatten(0, 1)
            out = ops.attend_ragged(q, pages, logit, slots=slots, own=True).out
        return Out(out.view(step.q.shape[0], step.H, 1, -1))

    def _decode_score(self, step, query: Tensor, own: Tensor, sink, recent) -> Tensor:
        """Votes by token id, [batch, tokens]; of sequences whose query is as before, the tokens chosen then."""
        if self.reuse is None:
            return self._votes(step, query, self._unrotated(step, step.store.plane("key")), sink, own + 1 - recent)
        marked = step.store.plane("token_select")
        kept = by_id(step, marked.float())
        alike = (similarity(step, "token_select_query", query) >= self.reuse) & (kept.sum(-1) > 0)
        step.scratch["token_select"] = query, ~alike
        kept = kept.masked_fill(kept == 0, float("-inf"))
        if step.device.type == "cpu" and bool(alike.all()):
            return kept
        raw = self._unrotated(step, step.store.plane("key"))
        return torch.where(alike[:, None], kept, self._votes(step, query, raw, sink, own + 1 - recent))

    def _mark(self, step, ids: Tensor, own: Tensor, sink, recent) -> None:
        """Remember the query and the chosen tokens, without sinks and window, of the sequences that chose anew."""
        query, changed = step.scratch["token_select"]
        middle = ids.where((ids >= sink) & (ids < own + 1 - recent), -1)
        slots = slots_of_ids(step, middle)
        marks = torch.zeros(*slots.shape[:2], step.T + 1, dtype=torch.bool, device=step.device)
        marks.scatter_(2, slots.where(slots >= 0, step.T), True)
        old = step.store.plane("token_select")
        step.store.set("token_select", torch.where(changed[:, None, None], marks[..., : step.T], old))
        remember(step, "token_select_query", query, changed)

    # ------------------------------------------------------------------ both

    def _mean_query(self, step, q: Tensor, own: Tensor) -> Tensor:
        """Queries q [batch, heads, length, head_dim] of tokens own [batch, length], moved to position `recent` on, and their mean."""
        places = self.recent + torch.arange(q.shape[2], device=q.device)
        return step.model.rope.rotate(q, (places - own)[:, None].expand(-1, q.shape[1], -1), step.layer).mean(2)

    def _unrotated(self, step, keys: Tensor) -> Tensor:
        """All keys at position 0."""
        token = torch.arange(keys.shape[2], device=keys.device) if step.whole else step.token.where(step.store.valid, 0)
        return step.model.rope.rotate(keys.detach(), -token, step.layer)

    def _votes(self, step, query: Tensor, raw: Tensor, start: int | Tensor, stop: int | Tensor) -> Tensor:
        """Summed weights of all heads by token id, [batch, tokens], of the tokens from start up to stop ([batch, 1] or numbers)."""
        z = (query.detach().unflatten(1, (step.G, -1)) @ raw.mT).float()  # [batch, kv_heads, group, T]
        start, stop = (x[:, None] if isinstance(x, Tensor) else x for x in (start, stop))
        token = step.token
        outside = (token < start) | (token >= stop) | ~step.store.valid
        weights = z.masked_fill(outside[:, :, None], float("-inf")).softmax(-1)
        votes = by_id(step, weights.nan_to_num(0.0).sum(2))  # a row may hold no candidate
        return (
            votes.bfloat16().float()
        )  # in the first layer equal words have equal votes: not rounding but age decides then

    def _forced(self, score: Tensor, before: int | Tensor, sink: int | Tensor, recent: int | Tensor) -> Tensor:
        """Sinks and the tokens from `recent` up to `before` come first."""
        index = torch.arange(score.shape[1], device=score.device)
        return score.masked_fill((index < sink) | ((index >= recent) & (index < before)), float("inf"))

    def _read(self, step, q, key, value, ids, slots, mass, renumber: bool) -> Tensor:
        """Attention of the queries, the last of `ids`, over keys and values gathered at `slots`, in order."""
        if renumber:
            rank = (slots >= 0).long().cumsum(-1) - 1  # [batch, kv_heads, keys]
            move, rope = rank - ids[:, None], step.model.rope
            key = rope.rotate(key, move.where(slots >= 0, 0), step.layer)
            q = rope.rotate(q, step.per_head(move[..., -q.shape[2] :]), step.layer)
        logit = step.logit
        return ops.attend(q, key, value, scale=logit.scale, softcap=logit.softcap, sinks=logit.sinks, mass=mass)[0]
