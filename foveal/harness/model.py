"""The harness's model class with a method on the model: contexts are read as prompts, continuations as decode steps."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from ..attach import Session, attach
from ..cache import Store
from ..default_model import DEFAULT_MODEL, default_folder
from ..errors import InputError
from ..hub import default_device
from ..method import Method, get_method
from ..spec import written

CONTINUATIONS = ("decode", "prompt")


class Row(NamedTuple):
    """One request: `whole` are context and continuation, the last `scored` of them the continuation; `prompt` is read at once."""

    index: int
    prompt: tuple[int, ...]
    whole: tuple[int, ...]
    scored: int

    @property
    def steps(self) -> int:
        """Tokens fed one by one: all after the prompt but the last, whose own continuation nobody asks for."""
        return len(self.whole) - len(self.prompt) - 1


@register_model("foveal")
class FovealLM(HFLM):
    """`--model foveal`: the harness's `hf` with a method attached; every option of `hf` is understood.

    pretrained: a Hugging Face id, a folder or a loaded model; default: Foveal's default model.  method: a name, whose parameters are
    arguments beside it (method=duo,budget=0.25), or text in brackets ("h2o(budget=0.25)"); None is `hf` itself, number for number.
    continuation: "decode" (default) reads the context without its last token as a prompt, lets the method do what it does at the end of
    one, and feeds what follows token by token, so that likelihoods are those of text generated under the method. "prompt" reads context
    and continuation at once, as the harness does: for methods that act while a prompt is read; what they drop afterwards has no effect.

    Raises InputError for unknown methods and parameters and for batch_size=auto with a method, UnsupportedModel where the model cannot
    be attached; all before any request.
    """

    def __init__(
        self,
        pretrained: Any = None,
        method: str | Method | None = None,
        continuation: str = "decode",
        batch_size: int | str = 1,
        **options: Any,
    ):
        if continuation not in CONTINUATIONS:
            raise InputError(f"continuation = {continuation!r}: expected one of {', '.join(CONTINUATIONS)}")
        self.method, options = _method(method, options)
        self.continuation = continuation
        if self.method is not None and str(batch_size).startswith("auto"):
            raise InputError("batch_size=auto measures a model without its method: give a number, like batch_size=8")
        if pretrained is None or pretrained == DEFAULT_MODEL:
            pretrained = str(default_folder())
        options["device"] = options.get("device") or str(default_device())
        super().__init__(pretrained, batch_size=batch_size, **options)
        if self.method is not None:
            attach(self.model, self.method).close()  # what cannot be attached is refused now

    def get_model_info(self) -> dict:
        return super().get_model_info() | {"foveal_method": written(self.method), "continuation": self.continuation}

    @contextmanager
    def _attached(self) -> Iterator[Session]:
        mixed = self.mixed_precision_dtype
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None),
            attach(self.model, self.method) as session,
        ):
            yield session

    # ------------------------------------------------------------------ likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each (texts, context ids, continuation ids) the continuation's log-probability and whether greedy decoding writes it."""
        if self.method is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        rows = [self._row(i, context, continuation) for i, (_, context, continuation) in enumerate(requests)]
        rows.sort(key=lambda r: (-len(r.prompt), r.prompt, -r.steps, -r.scored))
        size = override_bs or self.batch_size
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        bar = tqdm(total=len(rows), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        with self._attached(), bar:
            read: dict[tuple, tuple[Store | None, Tensor]] = {}
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                read = {r.prompt: read[r.prompt] for r in batch if r.prompt in read}
                for row in batch:
                    if row.prompt not in read:
                        read[row.prompt] = self._read(row)
                for row, answer in zip(batch, self._score(batch, read), strict=True):
                    found[row.index] = answer
                bar.update(len(batch))
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def _row(self, index: int, context: list[int], continuation: list[int]) -> Row:
        """A request cut from the left to what the model can hold, as the harness cuts it."""
        if not 0 < len(continuation) <= self.max_length:
            raise InputError(
                f"a continuation has {len(continuation)} tokens but the model reads 1 to {self.max_length}: set max_length"
            )
        whole = tuple(context + continuation)[-(self.max_length + 1) :]
        before = len(whole) - len(continuation)
        end = max(1, before - 1) if self.continuation == "decode" else len(whole) - 1
        return Row(index, whole[:end], whole, len(continuation))

    def _read(self, row: Row) -> tuple[Store | None, Tensor]:
        """The cache after a prompt and the logits of its last tokens, as many as may be needed: [tokens, vocabulary]."""
        ids = torch.tensor([row.prompt], device=self.device)
        kept = 1 if self.continuation == "decode" else row.scored
        got = self.model(ids, use_cache=True, logits_to_keep=kept)
        return (got.past_key_values if row.steps else None), got.logits[0]

    def _score(self, rows: list[Row], read: dict) -> list[tuple[float, bool]]:
        if self.continuation == "prompt":
            return [self._whole(r, read[r.prompt][1]) for r in rows]
        store = next((s for s, _ in read.values() if s is not None), None)
        # Layers with a window cannot hold prompts of different lengths: there each is continued alone.
        alone = store is not None and len(store.managed) < len(store.layers)
        out = []
        for part in [[r] for r in rows] if alone else [rows]:
            out += self._follow(part, read)
        return out

    def _whole(self, row: Row, logits: Tensor) -> tuple[float, bool]:
        gold, greedy = self._judge(logits[-row.scored :], row.whole[-row.scored :])
        return float(gold.sum()), bool(greedy.all())

    def _follow(self, rows: list[Row], read: dict) -> list[tuple[float, bool]]:
        """Feed the rows token by token as a batch out of which the finished ones leave; answers in the order of `rows`."""
        order = sorted(range(len(rows)), key=lambda i: -rows[i].steps)
        alive = [rows[i] for i in order]
        judged = [[self._judge(read[r.prompt][1][-1], r.whole[len(r.prompt)])] for r in alive]
        going = [r for r in alive if r.steps]
        store = Store.join([read[r.prompt][0].fork() for r in going]) if going else None
        for step in range(going[0].steps if going else 0):
            left = sum(r.steps > step for r in going)
            if left < len(going):
                going, store = going[:left], store.take(range(left))
            at = [len(r.prompt) + step for r in going]
            ids = torch.tensor([[r.whole[t]] for r, t in zip(going, at, strict=True)], device=self.device)
            positions = torch.tensor(at, device=self.device)[:, None]
            logits = self.model(ids, past_key_values=store, position_ids=positions, use_cache=True).logits[:, -1]
            gold, greedy = self._judge(logits, [r.whole[t + 1] for r, t in zip(going, at, strict=True)])
            for i in range(left):
                judged[i].append((gold[i], greedy[i]))
        answers: list[Any] = [None] * len(rows)
        for i, row, seen in zip(order, alive, judged, strict=True):
            gold, greedy = zip(*seen[-row.scored :], strict=True)
            answers[i] = float(torch.stack(gold).sum()), bool(torch.stack(greedy).all())
        return answers

    def _judge(self, logits: Tensor, tokens: int | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of tokens under logits [.., vocabulary], and whether each is the most likely."""
        want = torch.tensor(tokens, device=logits.device)
        chance = logits.log_softmax(-1, dtype=self.softmax_dtype)
        return chance.gather(-1, want[..., None])[..., 0], logits.argmax(-1) == want

    # ------------------------------------------------------------------ generation

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        if self.method is None:
            return super().generate_until(requests, disable_tqdm)
        with self._attached():
            return super().generate_until(requests, disable_tqdm)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """As the harness generates; a prompt is read without its last token first, so that even the first new token sees the method.

        Rows of a single token, beams and several answers are left to `generate` as they are.
        """
        mask = options.get("attention_mask")
        single = options.get("num_beams", 1) == 1 and options.get("num_return_sequences", 1) == 1
        if self.method is not None and self.continuation == "decode" and single and mask is not None:
            before = mask[:, :-1]
            if context.shape[1] > 1 and bool(before.any(1).all()):
                places = (before.cumsum(-1) - 1).clamp(min=0)  # as `generate` counts, from each text's own first token
                got = self.model(
                    context[:, :-1], attention_mask=before, position_ids=places, use_cache=True, logits_to_keep=1
                )
                options["past_key_values"] = got.past_key_values
        return super()._model_generate(context, max_length, stop, **options)


def _method(method: str | Method | None, options: dict[str, Any]) -> tuple[Method | None, dict[str, Any]]:
    """The method out of the harness's arguments, and the options that are left for its `hf`."""
    if method is None or method == "dense":
        return None, options
    if not isinstance(method, (str, Method)):
        raise InputError(f"method = {method!r}: expected a name, a specification or a Method")
    whole = isinstance(method, Method) or "|" in method or "(" in method
    found = get_method(method) if isinstance(method, str) else method
    fields = {f.name for part in found.parts for f in dataclasses.fields(part)}
    theirs = set(inspect.signature(HFLM.__init__).parameters)
    params = {k: v for k, v in options.items() if k in fields - theirs}
    if whole and params:
        raise InputError(f"give {', '.join(params)} inside the brackets of the method, like {found.parts[0].name}(...)")
    rest = {k: v for k, v in options.items() if k not in params}
    for k in rest.keys() - theirs:
        if near := difflib.get_close_matches(k, fields, 1):
            raise InputError(f"method '{found.name or method}' has no parameter '{k}': did you mean '{near[0]}'?")
    return (get_method(method, **params) if params else found), rest
