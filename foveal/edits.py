"""What a method returns when it changes how keys count (Bias, Reweigh) or what stays in memory (Keep, Leave)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import InputError

if TYPE_CHECKING:
    from .step import Step


@dataclass(frozen=True)
class Plane:
    """Per-key state a method asks the store to carry: it grows, shrinks, merges and moves together with the keys.

    fill: value of a new key.  dtype: storage type.  width: extra trailing dimensions, so a plane is [batch, kv_heads, T, *width].
    """

    fill: float = 0.0
    dtype: torch.dtype = torch.float32
    width: tuple[int, ...] = ()


@dataclass(frozen=True)
class Bias:
    """A low-rank term added to the logits before the softmax: logit[h, i, j] += sum_r query[h, i, r] * key[h, j, r].

    query: [batch, heads, 1 or length, rank].  key: [batch, kv_heads or heads, T, rank], one row per stored slot.
    """

    query: Tensor
    key: Tensor

    @staticmethod
    def at(step: Step, token: int, value: Tensor) -> Bias:
        """The bias `value` [heads] on the key of one token id, in every row that still holds that token."""
        query = value.to(step.q.device, torch.float32).view(1, -1, 1, 1)
        return Bias(query.expand(step.q.shape[0], -1, 1, 1), (step.token == token).float().unsqueeze(-1))

    def __add__(self, other: Bias) -> Bias:
        """Biases add; as factors, their ranks are concatenated."""
        length = max(self.query.shape[2], other.query.shape[2])
        heads = max(self.key.shape[1], other.key.shape[1])
        queries = [x.query.expand(-1, -1, length, -1) for x in (self, other)]
        keys = [x.key if x.key.shape[1] == heads else x.key.repeat_interleave(heads // x.key.shape[1], 1)
                for x in (self, other)]  # fmt: skip
        return Bias(torch.cat(queries, -1), torch.cat(keys, -1))

    def dense(self, heads: int) -> Tensor:
        """The term itself, [batch, heads, 1 or length, T]; meant for decode, where there is one query."""
        key = self.key if self.key.shape[1] == heads else self.key.repeat_interleave(heads // self.key.shape[1], 1)
        return self.query @ key.mT


@dataclass(frozen=True)
class Reweigh:
    """Scale the attention weights of some keys after the softmax.

    keys: bool [batch, kv_heads or heads, T].  gain: the factor, a float or [batch, heads] or [batch, heads, length].
    to: who receives what is taken (or pays what is given): None = every other key, in proportion, so that rows still
    sum to one; a bool tensor like `keys` = those keys alone; False = nobody, the row sum changes.
    """

    keys: Tensor
    gain: Tensor | float
    to: Tensor | bool | None = None


@dataclass(frozen=True)
class Keep:
    """What stays in the store after attention; exactly one of `mask`, `slots` and `drop` is given.

    mask: bool [batch, kv_heads, T], True = stays. Order is kept, rows are packed again, memory is freed. For many keys at once.
    slots: the same where every row keeps equally many keys, [batch, kv_heads, n] ascending slots; the host need not ask how many.
    drop: [batch, kv_heads] slots, one key a row leaves at constant cost (the last key moves into its place).
      `heads` limits this to some KV heads; with `optional`, slot -1 means that the row loses nothing.
    into: [batch, kv_heads] slots of kept keys that absorb what leaves their row as a mean weighted by the plane `mass`.
    renumber: positions inside the cache: keys older than what leaves move forward by as many places (StreamingLLM, 113).
      0 = original positions; n = renumber, where only the first n slots can be older than what leaves.
    """

    mask: Tensor | None = None
    drop: Tensor | None = None
    slots: Tensor | None = None
    into: Tensor | None = None
    heads: tuple[int, ...] | None = None
    optional: bool = False
    renumber: int = 0

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.mask, self.slots, self.drop)) != 1:
            raise InputError(
                "Keep takes either `mask` or `slots` (many keys) or `drop` (one key a row): give exactly one of them"
            )
        if self.slots is not None and (self.into is not None or self.heads is not None or self.renumber):
            raise InputError("Keep(slots=...) says only which keys stay: use `mask` with `into`, `heads` or `renumber`")


@dataclass(frozen=True)
class Leave:
    """Decode: one key leaves each row that holds more than `allowed`; on a GPU one launch finds and removes it.

    allowed: a number, or [batch, 1 or kv_heads] where sequences or heads differ.
    score: a plane, the key with its least value leaves; None: the oldest.  Of equals the first slot.
    after: keys with token ids below it stay.  recent: so many newest tokens stay, the step's own among them, a number or [batch, 1].
    heads: only these KV heads let go.
    fold: the oldest key from `after` on stays and takes the next one in, as a mean weighted by the plane `mass`.
    by_token: [batch, tokens], what each token id is worth, in the place of a plane; then all heads hold the same tokens.
    gone: int32 [batch], a token id that leaves before any other, in any row that holds it; -1 for none.
    """

    allowed: int | Tensor
    score: str | None = None
    after: int = 0
    recent: int | Tensor = 1
    heads: tuple[int, ...] | None = None
    fold: bool = False
    by_token: Tensor | None = None
    gone: Tensor | None = None
