"""From a request's messages or prompts to token ids: the model's own template, sandboxed, within a time limit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .images import Place, Viewer
from .schema import ApiError, ChatRequest, CompletionRequest
from .sight import Pictures
from .within import within

_TEMPLATE_ERRORS = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError)


class Prompts:
    """Makes token ids of requests. Templates come from the model alone, and transformers renders them in Jinja's sandbox.

    seconds: how long a template may render before its request is refused. viewer: of a model that reads images.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seconds: float = 2.0, viewer: Viewer | None = None):
        self.tokenizer, self.seconds, self.viewer = tokenizer, seconds, viewer
        self.vocabulary = len(tokenizer)
        if viewer is None and tokenizer.chat_template:  # compiled once, and not within any request's time
            with suppress(*_TEMPLATE_ERRORS):
                self._render([{"role": "user", "content": "hello"}], {})

    def chat(self, request: ChatRequest) -> list[int]:
        """The conversation as the model expects it, ready for the assistant's turn. ApiError 400 where it does not fit."""
        text = self._text(request)
        if self.viewer is None:
            return self._encode(text, special=False)
        return self.viewer.sight.prepare(text, [])["input_ids"][0].tolist()

    def seen(self, request: ChatRequest, found: Sequence[Place], files: Sequence[bytes]) -> tuple[list[int], Pictures]:
        """As `chat`, for a conversation with images, which stand `found` and have these files."""
        return self.viewer(self._text(request), found, files)

    def _text(self, request: ChatRequest) -> str:
        if self.viewer is None and not self.tokenizer.chat_template:
            raise ApiError(400, "this model has no chat template: use /v1/completions", code="no_chat_template")
        if self.viewer is not None and any(self.viewer.sight.mark in m.text for m in request.messages):
            message = f"the text has '{self.viewer.sight.mark}', which stands for an image in this model: leave it out"
            raise ApiError(400, message, param="messages", code="invalid_value")
        roles = {"developer": "system"}
        messages = [
            {"role": roles.get(m.role, m.role), "content": m.text if self.viewer is None else m.parts}
            for m in request.messages
        ]
        try:
            return within(self.seconds, self._render, messages, request.chat_template_kwargs or {})
        except _TEMPLATE_ERRORS as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise ApiError(
                400,
                f"the messages do not fit the model's chat template: {reason}",
                param="messages",
                code="invalid_value",
            ) from None
        except TimeoutError:
            raise ApiError(
                400, "the model's chat template took too long over these messages", param="messages"
            ) from None

    def completion(self, request: CompletionRequest) -> list[list[int]]:
        """The prompts' ids. Raises ApiError 400 for ids the model does not have."""
        found = []
        for prompt in request.prompts:
            ids = self._encode(prompt, special=True) if isinstance(prompt, str) else prompt
            if not ids:
                raise ApiError(
                    400, "the prompt is empty: give at least one token", param="prompt", code="invalid_value"
                )
            if max(ids) >= self.vocabulary:
                message = f"the prompt has a token id past the vocabulary of {self.vocabulary:,}"
                raise ApiError(400, message, param="prompt", code="invalid_value")
            found.append(ids)
        return found

    def _render(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
        if self.viewer is not None:
            return self.viewer.sight.render(messages, **options)
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)

    def _encode(self, text: str, special: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
