"""What a server offers and lets in: methods by name and budget, what they take of memory, requests that can run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from ..attach import Session
from ..errors import InputError, suggest
from ..method import Budget, Method, check_budget, iterate
from ..ops.formats import WIDTHS
from ..profile import single, with_budget
from ..spec import written
from ..store import Layout
from .request import NotAllowed, Request, TooLong
from .scheduler import AHEAD

DEFAULT = "default"


class Menu:
    """The server's own method and those a request may name. Parameters as in `Worker`; raises InputError for what does not exist."""

    def __init__(
        self, method: str | Method | None, budget: Budget | None, allow: Mapping[str, str], budgets: Sequence[Budget]
    ):
        self.found: dict[tuple[str, Budget | None], Method | None] = {}
        for b in budgets:
            check_budget(b, "budgets")
        for name, spec in {DEFAULT: method, **allow}.items():
            base = self.found[name, None] = single(spec, budget if name == DEFAULT else None)
            for b in budgets:
                if base is not None and "budget" in base.params:
                    self.found[name, b] = with_budget(base, b)
        if budgets and len(self.found) == len(self.specs):
            raise InputError("budgets are offered, but no method that takes one: offer one, or leave the budgets out")

    def __iter__(self) -> Iterator[Method | None]:
        yield from self.found.values()

    @property
    def specs(self) -> dict[str, str]:
        """The specification behind each name."""
        return {name: written(m) for (name, b), m in self.found.items() if b is None}

    def pick(self, name: str | None, budget: Budget | None) -> Method | None:
        """What a request asks for; raises NotAllowed with what there is."""
        name = name or DEFAULT
        if (name, budget) in self.found:
            return self.found[name, budget]
        if (name, None) not in self.found:
            raise NotAllowed(f"this server does not offer the method '{name[:40]}': {suggest(name[:40], self.specs)}")
        budgets = [str(b) for n, b in self.found if n == name and b is not None]
        hint = f"choose from {', '.join(budgets)}" if budgets else "leave it out"
        raise NotAllowed(f"this server does not offer '{name}' with budget {budget!r:.20}: {hint}")


class Gate:
    """What can run at all: tokens of the model, a prompt that fits context and memory, a method that is offered.

    usable: bytes of all caches. context: positions offered, None for the model's. Raises InputError where not one short request fits.
    """

    def __init__(self, session: Session, menu: Menu, usable: int, context: int | None):
        self.session, self.menu, self.usable = session, menu, usable
        limit = session.info.max_positions
        if context is not None and (context < 2 or (limit is not None and context > limit)):
            raise InputError(f"context = {context}: expected from 2 to the model's {limit} positions")
        self.context = context or limit or 2**31
        self.vocabulary = session.model.get_input_embeddings().num_embeddings
        least = max(token_bytes(session, m) for m in menu) * (AHEAD + 2)
        if least > usable:
            raise InputError(
                f"{usable:,} usable bytes of cache cannot hold one short request ({least:,} bytes): give the server more memory"
            )

    def check(self, request: Request) -> tuple[Method | None, int]:
        """The method of a request and the most tokens it can generate; raises for what can never run. From any thread."""
        method, prompt = self.menu.pick(request.method, request.budget), request.prompt_ids
        if not prompt:
            raise InputError("the prompt is empty: give at least one token")
        if min(prompt) < 0 or max(prompt) >= self.vocabulary:
            raise InputError(f"prompt_ids must be tokens of the model, 0 to {self.vocabulary - 1}")
        # while it is read, a prompt may need all of its keys
        limit = min(self.context, self.usable // token_bytes(self.session, method) - AHEAD)
        if len(prompt) >= limit:
            raise TooLong(len(prompt), limit)
        evicts = method is not None and bool({"keep", "end"} & set(method.asks))
        return method, min(request.sampling.max_tokens, (self.context if evicts else limit) - len(prompt))


def token_bytes(session: Session, method: Method | None) -> int:
    """Bytes the cache takes for one token as long as nothing is let go."""
    info, format = session.info, (session.layout or Layout()).format
    width = session.model.dtype.itemsize if format is None else (0.5 if format == "int4" else 1)
    scales = 0 if format is None else 2 * 2 * WIDTHS[format]
    planes = {k: p for m in iterate(method) for k, p in m.planes.items()}
    extra = sum(torch.Size(p.width).numel() * p.dtype.itemsize for p in planes.values())
    return len(info.layers) * info.kv_heads * int(2 * info.head_dim * width + scales + 4 + extra)


def end_tokens(model: PreTrainedModel, tokenizer) -> set[int]:
    """The tokens that end an answer, by the model's generation settings and its tokenizer."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = own if isinstance(own, list) else [own]
    return {i for i in (*ids, getattr(tokenizer, "eos_token_id", None)) if i is not None}
