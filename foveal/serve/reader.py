"""Reading prompts, a chunk at a time, from where they differ from what is known."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..attach import Session
from ..cache import Store
from ..method import Method, iterate
from .prefix import Prefixes
from .scheduler import Live

LAST = 64  # tokens of the last piece at least: methods look at a prompt's last queries (SnapKV at 32)


class Reader:
    """chunk: tokens of a piece; pieces end at multiples of it, whatever is going on, and the last takes what is left. forward: runs
    the model on a cache, giving logits."""

    def __init__(self, session: Session, forward: Callable[..., Tensor], chunk: int, prefixes: Prefixes | None):
        self.session, self.forward, self.chunk, self.prefixes = session, forward, chunk, prefixes
        self.least = min(LAST, chunk)
        self.cached = 0  # tokens that did not have to be read

    def read(self, live: Live, room: int) -> Tensor | None:
        """Read up to the next cut; logits [1, vocabulary] after the last one. room: bytes a kept prefix may take."""
        prompt, whole = _marked(live), needs_whole(live.method)
        reuse = self.prefixes is not None and not whole
        if live.store is None:
            live.store = self._begin(live, reuse)
        end = live.read + self.chunk
        last = whole or len(prompt) - end < self.least
        if not last:
            with self.session.open_prompt():
                self._forward(live, end)
            return None
        if reuse and live.read > 0:
            self.prefixes.put(live.request.key, live.spec, prompt[: live.read], live.store, room)
        return self._forward(live, len(prompt))

    def _forward(self, live: Live, end: int) -> Tensor:
        model, ids = self.session.model, live.request.prompt_ids
        if live.pictures is not None:
            logits = self.forward(live.store, inputs_embeds=live.pictures.embeds(model, ids, live.read, end))
        else:
            logits = self.forward(live.store, input_ids=torch.tensor([ids[live.read : end]], device=model.device))
        live.read = end
        return logits

    def _begin(self, live: Live, reuse: bool) -> Store:
        """An empty cache, or one that has read how the prompt begins."""
        found = None
        if reuse:
            prompt = _marked(live)
            found = self.prefixes.find(live.request.key, live.spec, prompt, len(prompt) - self.least)
        if found is None:
            return self.session.new_store()
        store, live.read = found
        if not live.tokens:  # what stepped back is counted once
            live.cached = live.read
            self.cached += live.read
        return store


def _marked(live: Live) -> list[int]:
    """The prompt's tokens by which a beginning is known again: in the places of an image stand numbers of its own."""
    return live.request.prompt_ids if live.pictures is None else live.pictures.marked


def needs_whole(method: Method | None) -> bool:
    """Whether a prompt must not be read in pieces."""
    return any("whole_prompt" in m.needs or "read" in m.asks for m in iterate(method))
