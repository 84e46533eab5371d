"""What a lens is: a small frozen dataclass that makes a probe for one text; and what a probe gets to see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError, suggest
from ..model_info import ModelInfo
from ..ops import attention_stats, ragged
from ..ops.dense import spread
from ..ops.ragged import Logit
from .result import Measure

SINK = 4
"""First tokens counted as sinks (StreamingLLM's number)."""


@dataclass
class Reading:
    """One text on its way through one model.

    ids: its tokens.  columns: layer -> attention each key got so far, summed over queries, [heads, length]; whole after the last
    piece of a layer, then on the CPU, and only where a lens asks for "col_mass".
    """

    info: ModelInfo
    tokenizer: Any
    ids: list[int]
    device: torch.device
    columns: dict[int, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.ids)

    @cached_property
    def words(self) -> list[str]:
        """The text, token by token, with the spaces between words."""
        seen = {i: _word(self.tokenizer, i) for i in set(self.ids)}
        return [seen[i] for i in self.ids]

    def importance(self, layer: int) -> Tensor:
        """Mean attention a key gets from the queries that see it, [heads, length], after the reading (Gu et al. 2024)."""
        return self.columns[layer] / torch.arange(self.length, 0, -1)

    def table(self, rows: dict[int, Tensor]) -> Tensor:
        """[layers, ...] of what was measured for some layers, NaN in the others."""
        like = next(iter(rows.values())).float().cpu()
        out = like.new_full((self.info.n_layers, *like.shape), float("nan"))
        for layer, x in rows.items():
            out[layer] = x.float().cpu()
        return out


@dataclass
class Piece:
    """What one layer did with the queries first .. first + L - 1 of a text whose earlier keys are all there.

    q [1, heads, L, head_dim], k [1, kv_heads, first + L, head_dim], k_new and v_new [1, kv_heads, L, head_dim], lse [1, heads, L].
    stats: what the lenses named, of these queries, as `foveal.ops.attention_stats` returns it, batch of one.
    """

    layer: int
    first: int
    q: Tensor
    k: Tensor
    k_new: Tensor
    v_new: Tensor
    lse: Tensor
    logit: Logit
    stats: dict[str, Tensor] = field(default_factory=dict)

    @property
    def row_sum(self) -> Tensor:
        """What the keys share of each query's attention, [heads, L]: one, less where a learned sink takes some."""
        if self.logit.sinks is None:
            return torch.ones_like(self.lse[0])
        return 1 - (self.logit.sinks[:, None].to(self.lse.dtype) - self.lse[0]).exp()

    def measure(
        self, want: frozenset[str], weigh: Tensor | None = None, *, rows: tuple[int, int] | None = None, **sizes: int
    ) -> dict[str, Tensor]:
        """Statistics of these queries, or of rows[0] .. rows[1] - 1 of them.

        weigh: a positive weight for each query, [L], multiplied into its attention.  sizes: `block` and `top` of
        `foveal.ops.attention_stats`, where its defaults do not do.
        """
        lse = self.lse if weigh is None else self.lse - weigh.log()
        how = {"scale": self.logit.scale, "softcap": self.logit.softcap, "sink": SINK, **sizes}
        return attention_stats(self.q, self.k, lse, want=want, rows=rows, **how)

    def weights(self, start: int, stop: int, left: int, right: int) -> Tensor:
        """Attention of the queries start:stop of this piece to the keys left:right, [heads, stop - start, right - left].

        Explicit: ask for small tiles only.
        """
        groups, dim, dtype = self.k.shape[1], self.q.shape[3], self.lse.dtype
        query = self.q[0, :, start:stop].to(dtype).reshape(groups, -1, dim)
        z = ragged.logits(query, self.k[0, :, left:right].to(dtype), self.logit).view(self.q.shape[1], stop - start, -1)
        p = (z - self.lse[0, :, start:stop, None]).exp()
        return p.tril(self.first + start - left)

    def near(self, width: int) -> Tensor:
        """Attention of each query to the keys 0 .. width - 1 places before it, [heads, L, width]; 0 before the text."""
        heads, length = self.q.shape[1:3]
        tile = 256 if self.q.is_cpu else 512
        out = self.q.new_zeros(heads, length, width, dtype=self.lse.dtype)
        back = torch.arange(width, device=self.q.device)
        for start in range(0, length, tile):
            stop = min(start + tile, length)
            left = max(0, self.first + start - width + 1)
            p = self.weights(start, stop, left, self.first + stop)
            at = torch.arange(self.first + start - left, self.first + stop - left, device=back.device)[:, None] - back
            found = p.gather(2, at.clamp(min=0).expand(heads, -1, -1))
            out[:, start:stop] = found.masked_fill(at < 0, 0.0)
        return out

    def per_head(self, x: Tensor) -> Tensor:
        """[1, kv_heads, ...] to [1, heads, ...]."""
        return spread(x, self.q.shape[1])


def _word(tokenizer, token: int) -> str:
    word = tokenizer.decode([token])
    mark = tokenizer.convert_ids_to_tokens(token)
    # A token decoded alone loses the space that SentencePiece marks at its front.
    return f" {word.lstrip()}" if isinstance(mark, str) and mark.startswith("\u2581") and word[:1] != " " else word


class Unsuited(InputError):
    """A text or a call lacks what a lens needs; where no lens was named, it is left out and the look says so."""


class Probe:
    """Collects what one lens wants to know during one reading. Override what it looks at."""

    def attention(self, piece: Piece) -> None:
        """One managed layer, one piece of the text."""

    def hidden(self, layer: int, first: int, h: Tensor) -> None:
        """The residual stream after block `layer`, [queries, width], of the tokens from `first` on; any kind of layer."""

    def results(self) -> list[Measure]:
        """What was found, after the whole text."""
        raise NotImplementedError


@dataclass(frozen=True)
class Lens:
    """Base of all lenses: parameters as fields, with the paper's defaults."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    stats: ClassVar[frozenset[str]] = frozenset()
    """Statistics of `foveal.ops.attention_stats` it wants of every piece; "col_mass" is added up in `Reading.columns`."""

    def sizes(self, reading: Reading) -> dict[str, int]:
        """`block` and `top` its statistics need for this text, where the defaults of `foveal.ops.attention_stats` do not do."""
        return {}

    def probe(self, reading: Reading) -> Probe:
        """A fresh probe for one text. Raises `Unsuited` where the text or the call does not suit."""
        raise NotImplementedError


_LENSES: dict[str, type[Lens]] = {}


def lens(name: str, *, paper: str) -> Callable[[type[Lens]], type[Lens]]:
    """Class decorator: defining a lens registers it."""

    def register(cls: type[Lens]) -> type[Lens]:
        cls.name, cls.paper = name, paper
        _LENSES[name] = cls
        return cls

    return register


def lenses() -> dict[str, type[Lens]]:
    """All lenses that read along with one forward pass, by name."""
    return dict(_LENSES)


def choose(wanted: Sequence[str | Lens] | None) -> list[Lens]:
    """Lenses by name or as they are; None: all of them. Raises InputError for unknown names and for none or one twice."""
    if wanted is None:
        return [cls() for cls in _LENSES.values()]
    if isinstance(wanted, (str, Lens)):
        wanted = [wanted]
    chosen = []
    for w in wanted:
        if isinstance(w, Lens):
            chosen.append(w)
        elif w in _LENSES:
            chosen.append(_LENSES[w]())
        else:
            raise InputError(f"no lens called '{w}': {suggest(w, _LENSES)}")
    names = [x.name for x in chosen]
    if not names:
        raise InputError(f"no lens was named: choose from {', '.join(_LENSES)}, or give None for all")
    if twice := {n for n in names if names.count(n) > 1}:
        raise InputError(f"lens '{min(twice)}' is named twice: name it once")
    return chosen
