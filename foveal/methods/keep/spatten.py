"""SpAtten: keys and heads that mattered little in earlier layers are dropped for all later ones; coarse keys where attention is peaked."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...edits import Keep, Leave, Plane
from ...errors import InputError
from ...method import Method, Out, check_budget, check_count, check_range, method
from ...selection import All, Selection
from ...store import FAR
from ...verify import Beats, Claim, StaysNear

SPARED, SPARED_HEADS = 0.15, 0.3
"""Shares of the layers, from the first on, in which no token and no head is dropped."""
LEAST = 0.01  # of the tokens, in any layer


class Schedule(NamedTuple):
    """Share of the tokens and number of the heads that each layer works on; `shares` is the first on the device, [layers, 1]."""

    tokens: dict[int, float]
    heads: dict[int, int]
    shares: Tensor
    first: int
    last: int


def falling(mean: float, layers: int, spared: float) -> list[float]:
    """Shares kept by each of `layers` layers, `mean` on average: all of it in the first `spared` ones, then falling in a straight line.

    Where the mean is too small for that, fewer layers are spared, though never none.
    """
    whole = min(math.ceil(spared * layers - 1e-9), max(1, math.floor(mean * layers / 2)))
    rest = layers - whole
    if mean >= 1 or rest == 0:
        return [1.0] * layers
    middle = max(LEAST, (mean * layers - whole) / rest)
    width = min(1 - middle, middle - LEAST, (1 - middle) / 2)
    slope = [1 - 2 * i / (rest - 1) if rest > 1 else 0.0 for i in range(rest)]
    return [1.0] * whole + [middle + width * s for s in slope]


@method(
    "spatten",
    paper="SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning (2020) [136]",
    claim=Claim(
        "Tokens chosen by the attention they gathered over layers and heads can be dropped for good, nearly three in four on average.",
        number="30 benchmarks: 10x less traffic to memory without loss; on GPT-2 tokens 3.8x, heads about 1.1x",
        experiments=(
            StaysNear("spatten(budget=0.5)", "perplexity", within=0.1),
            Beats("spatten(budget=0.5)", "random-keep(budget=0.5)", "perplexity", by=0.1),
            StaysNear("spatten(budget=1.0, high=6, low=4)", "perplexity", within=0.02),
        ),
        setting="next tokens of a novel; half of the tokens kept, on average over layers; precision costs no traffic here",
    ),
)
@dataclass(frozen=True)
class SpAtten(Method):
    """A token's importance is the attention it has received so far, over layers, heads and generated tokens; after each layer the least
    important leave all later layers, for good. The layers keep `budget` of the tokens on average: all in the first 15 %, then fewer and
    fewer. The newest token always stays. A head's importance is the size of its outputs so far in this forward pass; after 30 % of the
    layers `heads` of them go on, on average over all layers: the others give zero from then on, and their votes no longer count.

    While a prompt is read, a dropped token neither asks nor answers in later layers: its own output there is zero. In decode a key that an
    earlier layer has just dropped is read once more, then let go.

    values: in decode each head reads the values of its `values` share of most probable keys only; the weights stay as they are.
    high: in decode keys and queries are read in high + low bits (linear, symmetric, a scale for each vector): first the high ones, and
    the low ones too where no key gets `threshold` of the attention. That is the arithmetic of it; it saves no time on a GPU. Chunks of a
    prompt are dense, and pruning begins with the last.
    """

    budget: float = 0.5
    heads: float = 1.0
    values: float = 1.0
    high: int | None = None
    low: int = 4
    threshold: float = 0.1

    needs = frozenset({"col_mass"})
    planes = {"importance": Plane(0.0)}

    @property
    def columns(self) -> bool:
        """Votes need not be told apart by head where every head goes on."""
        return self.heads == 1

    def __post_init__(self) -> None:
        check_budget(self.budget)
        if isinstance(self.budget, int):
            raise InputError(
                f"budget = {self.budget}: layers of 'spatten' keep different shares of the text, so its budget is a share, not a count"
            )
        check_range("heads", self.heads, 0.05, 1)
        check_range("values", self.values, 0.001, 1)
        check_range("threshold", self.threshold, 0, 2)
        check_count("low", self.low, 1)
        if self.high is not None:
            check_count("high", self.high, 2)
            if self.high + self.low > 16:
                raise InputError(f"high + low = {self.high + self.low}: expected at most 16 bits")

    def setup(self, model) -> Schedule:
        layers, n = model.layers, len(model.layers)
        heads = [max(1, round(x * model.heads)) for x in falling(self.heads, n, SPARED_HEADS)]
        shares = falling(self.budget, n, SPARED)
        on_device = torch.tensor(shares, dtype=torch.float64)[:, None].to(model.model.device)
        tokens, heads = (dict(zip(layers, x, strict=True)) for x in (shares, heads))
        return Schedule(tokens, heads, on_device, layers[0], layers[-1])

    # ------------------------------------------------------------------ the layers so far

    def select(self, step) -> Selection:
        if step.layer == step.plan.first:
            self._begin(step)
        return All()

    @staticmethod
    def _of(alive: Tensor, token: Tensor) -> Tensor:
        """What is said of token ids, bool [1, tokens], of the slots that hold them, [1, kv_heads, T]."""
        return alive[0, token.clamp(max=alive.shape[1] - 1).long()]

    def _begin(self, step) -> None:
        """Importance by token id, [batch, tokens], as the step before left it; sizes of head outputs, [batch, heads]."""
        rows = step.store
        total = rows.plane("importance").new_zeros(step.q.shape[0], step.most(1.0) + 1)
        token = step.token[:, 0].clamp(max=total.shape[1] - 1).long()
        step.state["spatten.tokens"] = total.scatter(1, token, rows.plane("importance")[:, 0])
        step.state["spatten.heads"] = total.new_zeros(step.q.shape[0], step.H)

    def attend(self, step, selection, bias) -> Out | None:
        if not step.decode:
            return self._among_alive(step)
        if self.values == 1 and self.high is None:
            return None
        weights = self._weights(step)
        step.scratch["mass"] = weights[:, :, 0]
        if self.values < 1:
            held = step.per_head(step.store.len)  # no more than what is held, which the host may not know
            last = (self.values * held - 1e-9).ceil().long().clamp(min=1) - 1
            least = weights.sort(dim=-1, descending=True).values.gather(3, last[..., None, None])
            weights = weights.where(weights >= least, 0.0)
        value = step.per_head(step.store.values())
        return Out((weights.to(value.dtype) @ value).to(step.q.dtype))

    def _among_alive(self, step) -> Out | None:
        """A prompt in a layer after others dropped tokens: what is left is a shorter text. None where nothing was dropped."""
        alive = step.state.get("spatten.alive")
        if alive is None:
            return None
        if _by_id(step):
            slots = asking = alive
        else:
            token = step.token[0, 0]
            slots = (self._of(alive, token) & (token != FAR)).nonzero()[:, 0]
            slots = slots[token[slots].argsort()]
            asking = self._of(alive, step.q_token[0]).nonzero()[:, 0]
        q, k, v = (
            x.index_select(2, at)
            for x, at in ((step.q, asking), (step.store.keys(), slots), (step.store.values(), slots))
        )
        how = {"scale": step.logit.scale, "softcap": step.logit.softcap, "sinks": step.logit.sinks}
        out, lse = ops.attend(q, k, v, need_lse=True, **how)
        every = lse.new_full(step.q.shape[:3], math.inf)  # who does not ask gives no key any weight
        return Out(
            torch.zeros_like(step.q).index_copy(2, asking, out.to(step.q.dtype)), every.index_copy(2, asking, lse)
        )

    def _weights(self, step) -> Tensor:
        """Attention weights in decode, [batch, heads, 1, T], with keys as precise as each head needs them."""
        hidden = ~step.per_head(step.store.valid)[:, :, None]
        if self.high is None:
            return step.scores().softmax(-1)
        bits = self.high + self.low
        q, key = quantised(step.q, bits), step.per_head(step.store.keys())
        fine, coarse = quantised(key, bits), quantised(key, bits, self.high)
        rough, sharp = (
            (q.float() @ k.float().mT * step.scale).masked_fill(hidden, -math.inf).softmax(-1) for k in (coarse, fine)
        )
        return torch.where(rough.amax(-1, keepdim=True) < self.threshold, sharp, rough)

    def mix(self, step, out: Tensor) -> Tensor:
        if self.heads == 1:
            return out
        sizes, count = step.state["spatten.heads"], step.plan.heads[step.layer]
        if count < step.H:
            best = sizes.topk(count, dim=1).indices
            going = torch.zeros_like(sizes, dtype=torch.bool).scatter(1, best, True)
            step.scratch["going"] = going
            out = out * going[..., None, None].to(out.dtype)
        step.state["spatten.heads"] = sizes + out.float().abs().sum((2, 3))
        return out

    # ------------------------------------------------------------------ who leaves

    def keep(self, step) -> Keep | None:
        if step.decode:
            return self._drop_one(step)
        mass = step.stats["col_mass"]
        if "going" in step.scratch:
            mass = mass * step.scratch["going"][..., None]
        total, alive = step.state["spatten.tokens"], step.state.get("spatten.alive")
        if by_id := _by_id(step):
            self._vote_by_id(total, mass.sum(1).float(), alive)
        else:
            token = step.token[:, 0]
            if alive is not None:
                mass = mass * self._of(alive, token)
            place = token.clamp(max=total.shape[1] - 1).long()
            mass = mass.sum(1).float().masked_fill(token == FAR, 0.0)
            total = step.state["spatten.tokens"] = total.scatter_add(1, place, mass)
        if not step.prompt_done:
            return None
        return self._drop_by_id(step, total, alive) if by_id else self._drop_many(step, total)

    def end(self, pass_) -> None:
        """The layers of a prompt are still apart in a batch, so importances are written when they are not."""
        if not pass_.decode:
            self._remember(pass_.store.rows[0], pass_.state["spatten.tokens"])

    @staticmethod
    def _remember(rows, total: Tensor) -> None:
        """The first layer, which holds every token, carries the importances to the next step."""
        token = rows.token.clamp(max=total.shape[1] - 1).long()
        rows.set("importance", total[:, None].expand(-1, rows.heads, -1).gather(2, token))

    @staticmethod
    def _vote_by_id(total: Tensor, mass: Tensor, alive: Tensor | None) -> None:
        """Add what the keys received in a prompt, [1, tokens], where slots are token ids."""
        if alive is None:
            total[:, : mass.shape[1]].add_(mass)
        else:
            total.index_add_(1, alive, mass.index_select(1, alive))

    def _drop_by_id(self, step, total: Tensor, alive: Tensor | None) -> Keep | None:
        """As `_drop_many`, where slots are token ids: how many go on is known, so the host waits for nothing."""
        if (count := self._count_after(step)) is not None:
            score, seen = total.clone(), step.L
            if alive is not None:
                score.fill_(-math.inf).index_copy_(1, alive, total.index_select(1, alive))
            score[:, seen:].fill_(-math.inf)
            score[:, seen - 1].fill_(math.inf)
            step.state["spatten.alive"] = score.topk(count, dim=1).indices[0].sort().values
        return None if alive is None else Keep(slots=alive.expand(1, step.G, -1))

    def _drop_many(self, step, total: Tensor) -> Keep | None:
        """Prompt: let go of what the layers before dropped, and choose who goes on to the next layer."""
        seen, alive = step.seen(), step.state.get("spatten.alive")
        held = torch.zeros_like(total, dtype=torch.bool).scatter(1, step.token[:, 0].clamp(max=seen).long(), True)
        held[:, seen:] = False
        here = held if alive is None else held & alive
        if (count := self._count_after(step)) is not None:
            score = total.masked_fill(~here, -math.inf)
            score[:, seen - 1] = math.inf
            best = score.topk(count, dim=1)
            step.state["spatten.alive"] = torch.zeros_like(here).scatter(1, best.indices, best.values > -math.inf)
        if alive is None:
            return None
        return Keep(mask=self._of(alive, step.token) & step.store.valid)

    @staticmethod
    def _count_after(step) -> int | None:
        """How many tokens the layer after this one works on; None where it may work on all, or there is none."""
        if step.layer == step.plan.last:
            return None
        order = [*step.plan.tokens]
        count = step.budget(step.plan.tokens[order[order.index(step.layer) + 1]])
        return count if count < step.seen() else None

    def _drop_one(self, step) -> None:
        """Decode: what the layer before has dropped leaves this one too; else, where it holds too many, its least important key."""
        total, gone = step.state["spatten.tokens"], step.state.get("spatten.gone")
        step.add_by_token(total, self._votes(step))
        if step.layer == step.plan.last:
            self._remember(step.pass_.store.layers[step.plan.first].rows, total)
        share = step.plan.tokens[step.layer]
        if gone is None and share == 1:
            return
        allowed = FAR if share == 1 else self._allowed(step)
        left = step.let_one_go(Leave(allowed, by_token=total, gone=gone))
        step.state["spatten.gone"] = left if left is not None else gone

    @staticmethod
    def _allowed(step) -> int | Tensor:
        """Keys this layer may hold: a number, or [batch, 1] for all layers at once where only the device knows how many were seen."""
        seen, share = step.seen(), step.plan.tokens[step.layer]
        if isinstance(seen, int):
            return step.budget(share)
        share = step.plan.shares
        every = step.once(
            "spatten.allowed", lambda: (seen.double() * share - 1e-9).ceil().clamp(min=1).long()[..., None]
        )
        return every[step.model.layers.index(step.layer)]

    @staticmethod
    def _votes(step) -> Tensor:
        """What the keys received in this step, [batch, kv_heads, T]."""
        if "mass" not in step.scratch and "going" not in step.scratch:
            return step.column("col_mass")
        mass = step.scratch["mass"] if "mass" in step.scratch else step.stats["col_mass"]
        if "going" in step.scratch:
            mass = mass * step.scratch["going"][..., None]
        return step.group(mass, "sum")


def _by_id(step) -> bool:
    """A prompt read at once, so that slots are token ids: those alive are a list of ids in order, and the host knows how many.

    Where something was read before and may be gone, they are a mask over token ids, bool [1, tokens].
    """
    return step.whole and step.T == step.L


def quantised(x: Tensor, bits: int, read: int | None = None) -> Tensor:
    """x [..., head_dim] as `bits` bits of a linear symmetric code with one scale a vector; `read`: from its highest bits only."""
    top = 2 ** (bits - 1) - 1
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / top
    code = (x.float() / scale).round()
    if read is not None:
        unit = 2 ** (bits - read)
        code = (code / unit).floor() * unit + unit / 2  # the middle of what the missing bits may say
    return (code * scale).to(x.dtype)
