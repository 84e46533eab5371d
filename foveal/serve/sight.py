"""How a model sees: what its own forward pass hands its decoder where a prompt has images, computed once an image.

No model is rebuilt here. A forward pass with an image is run as it is and stopped at the door of the decoder; the embeddings that stand
there in the image's places are kept. A prompt is then read from embeddings, in any pieces. That is right where an image's embeddings
depend on nothing else and the decoder is told nothing else, which is tried out before a model is served.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attach import Session
from ..errors import InputError, UnsupportedModel
from ..method import Method
from ..spec import written

if TYPE_CHECKING:
    from transformers import ProcessorMixin

# What a decoder of text alone is told too. Anything else that holds numbers (rotary positions of rows and columns, features for
# deeper layers, masks that look ahead) would be lost where a prompt is read in pieces.
_KNOWN = {"attention_mask", "position_ids", "cache_position", "past_key_values"}
_POSITIONS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")
_TRIED = 16  # tokens of the text on which methods are tried
_CLOSE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Picture:
    """One image of a prompt. digest: of its bytes. inputs: what its processor made of it, with the token ids of a text that has this
    image alone; let go when `rows` [tokens, hidden] are there."""

    def __init__(self, digest: bytes, inputs: Mapping[str, Tensor], tokens: int):
        self.digest, self.inputs, self.tokens = digest, dict(inputs), tokens
        self.rows: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of what is held now."""
        held = self.inputs.values() if self.rows is None else [self.rows]
        return sum(x.nbytes for x in held)


class Pictures:
    """The images of one prompt, shared by the choices of a request. ids: the prompt's; image: the token that stands in an image's places.

    `join` and `leave` count who uses them: with the last one they are let go.
    """

    def __init__(self, ids: Sequence[int], pictures: Sequence[Picture], image: int):
        self.pictures, self.image = list(pictures), image
        self.spans: list[tuple[int, int]] = []  # of each image, how many places of all images are before and after it
        total = 0
        for picture in self.pictures:
            self.spans.append((total, total + picture.tokens))
            total += picture.tokens
        self.places = [at for at, token in enumerate(ids) if token == image]
        if len(self.places) != total:
            raise InputError(f"the images fill {total} places, but the prompt has {len(self.places)}")
        self.marked = list(ids)
        for (first, last), picture in zip(self.spans, self.pictures, strict=True):
            words = [int.from_bytes(picture.digest[i : i + 8], signed=True) for i in range(0, len(picture.digest), 8)]
            for n, at in enumerate(self.places[first:last]):
                self.marked[at] = words[n % len(words)]
        self._held, self._give = 0, lambda nbytes: None
        self._users, self._lock = 1, threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of what is held now."""
        return sum(p.nbytes for p in self.pictures)

    def lend(self, nbytes: int, give: Callable[[int], None]) -> None:
        """Bytes taken for these images: `give` hears how many of them are free again."""
        self._held, self._give = nbytes, give

    def _settle(self) -> None:
        """Give back what is no longer needed."""
        with self._lock:
            free = max(0, self._held - self.nbytes)
            self._held -= free
        self._give(free)

    def join(self) -> None:
        """One more user."""
        with self._lock:
            self._users += 1

    def leave(self) -> None:
        """One user less."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self.pictures.clear()
        self._settle()

    @torch.no_grad()
    def embeds(self, model: PreTrainedModel, ids: Sequence[int], start: int, end: int) -> Tensor:
        """What the decoder reads for the tokens from `start` to `end` of the prompt, [1, end - start, hidden]."""
        piece = torch.tensor([ids[start:end]], device=model.device)
        there = piece[0] == self.image
        found = model.get_input_embeddings()(piece.masked_fill(piece == self.image, 0))
        places = [n for n, at in enumerate(self.places) if start <= at < end]
        if not places:
            return found
        first, last = places[0], places[-1] + 1
        rows = [
            seen(model, picture, self.image)[max(first - a, 0) : last - a]
            for (a, b), picture in zip(self.spans, self.pictures, strict=True)
            if a < last and first < b
        ]
        found[0, there] = torch.cat(rows).to(found.device, found.dtype)
        self._settle()
        return found


def seen(model: PreTrainedModel, picture: Picture, image: int) -> Tensor:
    """The embeddings of an image [tokens, hidden], in the main memory, computed the first time."""
    if picture.rows is None:
        inputs = {name: x.to(model.device) for name, x in picture.inputs.items()}
        embeds, _ = at_decoder(model, inputs)
        picture.rows = embeds[0, inputs["input_ids"][0] == image].cpu()
        picture.inputs = {}
    return picture.rows


class _AtTheDoor(Exception):
    """The decoder was called."""


@torch.no_grad()
def at_decoder(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    """What a model's forward pass hands its decoder: the embeddings [1, length, hidden] and all the rest; the decoder does not run."""
    found: dict[str, Any] = {}

    def stop(module, args, kwargs):
        found.update(zip(_POSITIONS, args, strict=False), **kwargs)
        raise _AtTheDoor

    inputs = {n: x.to(model.dtype) if x.is_floating_point() else x for n, x in inputs.items() if n != "attention_mask"}
    hook = model.get_decoder().register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        with suppress(_AtTheDoor):
            model(**inputs, use_cache=False)
    finally:
        hook.remove()
    embeds = found.pop("inputs_embeds", None)
    if embeds is None:
        raise UnsupportedModel(f"{type(model).__name__} does not give its decoder images as embeddings")
    return embeds, found


class Sight:
    """A model's processor, known to fit the engine. Raises UnsupportedModel with the reason where it does not.

    processor: the model's own, with an image processor. image: the id of the token that stands in an image's places; mark: its text.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin):
        self.processor, self.name = processor, type(model).__name__
        config = model.config
        found = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
        self.image: int = next((i for i in [*found, getattr(processor, "image_token_id", None)] if i is not None), -1)
        if not 0 <= self.image < model.get_input_embeddings().num_embeddings:
            raise self._refusal("it has no token of its vocabulary that stands for an image")
        self.mark: str = processor.tokenizer.convert_ids_to_tokens(self.image)
        self.template: str | None = processor.chat_template or processor.tokenizer.chat_template
        if self.template is None:
            raise self._refusal("it has no chat template, which would say where images stand")
        _refuse_positions(self, config.get_text_config(decoder=True))
        self._try(model)

    def _refusal(self, why: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.name} cannot be served with images: {why}")

    @torch.no_grad()
    def _try(self, model: PreTrainedModel) -> None:
        """Two images in one prompt, and the second by itself: its embeddings must be the same, and those of text the table's."""
        try:
            first, second = _probes()
            ask = [{"type": "image"}, {"type": "text", "text": "Which?"}]
            both = self.prepare(self.render([{"role": "user", "content": [*ask, *ask]}]), [first, second])
            alone = self.prepare(self.render([{"role": "user", "content": ask}]), [second])
        except Exception as error:
            raise self._refusal(f"its processor fails ({type(error).__name__})") from error
        ids, single = both["input_ids"][0].tolist(), alone["input_ids"][0].tolist()
        own = single.count(self.image)
        try:
            wanted, rest = at_decoder(model, {n: x.to(model.device) for n, x in both.items()})
        except UnsupportedModel:
            raise
        except Exception as error:
            raise self._refusal(f"its forward pass fails ({type(error).__name__})") from error
        self._check_plain(rest, len(ids))
        places = [at for at, token in enumerate(ids) if token == self.image]
        if not 0 < own < len(places):
            raise self._refusal("an image does not stand in places of its own")
        before = Picture(b"0" * 8, {}, len(places) - own)
        before.rows = wanted[0, places[:-own]].cpu()
        pictures = Pictures(ids, [before, Picture(b"1" * 8, alone, own)], self.image)
        found = pictures.embeds(model, ids, 0, len(ids))
        far = (found.float() - wanted.float()).norm(dim=-1) > _CLOSE[model.dtype] * wanted.float().norm(dim=-1)
        if bool(far.any()):
            raise self._refusal("what it makes of an image depends on what else is in the prompt")
        if bool(
            (found[0, places] == model.get_input_embeddings()(both["input_ids"][:1, places].to(model.device))).all()
        ):
            raise self._refusal("an image changes nothing that its decoder reads")

    def _check_plain(self, rest: Mapping[str, Any], length: int) -> None:
        mask, positions = rest.get("attention_mask"), rest.get("position_ids")
        if not (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask != 0).all()))):
            raise self._refusal("where it reads an image it also looks ahead")
        if positions is not None and positions.flatten().tolist() != [*range(length)]:
            raise self._refusal("the places of an image have positions of several dimensions")
        more = [n for n, x in rest.items() if n not in _KNOWN and _holds_numbers(x)]
        if more:
            raise self._refusal(f"beside embeddings its decoder reads '{more[0]}'")

    def render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The conversation as the model's template writes it. Content is lists of parts of type "text" or "image"."""
        return self.processor.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=True, **options
        )

    def prepare(self, text: str, images: Sequence[Any]) -> dict[str, Tensor]:
        """What the processor makes of a rendered text and its images (none: token ids alone)."""
        # As transformers' own `apply_chat_template`: a template may write the first token itself.
        bos = self.processor.tokenizer.bos_token
        special = {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}
        if not images:
            ids = self.processor.tokenizer(text, verbose=False, **special)["input_ids"]
            return {"input_ids": torch.tensor([ids])}
        made = self.processor(text=[text], images=[list(images)], return_tensors="pt", **special)
        return {name: x for name, x in made.items() if isinstance(x, Tensor)}


@torch.no_grad()
def try_methods(session: Session, methods: Iterable[Method | None]) -> None:
    """Raise InputError for a method that looks at token ids: a model that reads images hands its decoder embeddings alone."""
    model = session.model
    embeds = model.get_input_embeddings()(torch.zeros(1, _TRIED, dtype=torch.long, device=model.device))
    for method in methods:
        session.use(method)
        try:
            model(inputs_embeds=embeds, past_key_values=session.new_store(), use_cache=True)
        except InputError as error:
            raise InputError(
                f"'{written(method)}' cannot be served with a model that reads images, whose decoder is given no token ids: "
                f"{str(error).partition(', but')[0]}; leave it out"
            ) from None


def _probes() -> list[Any]:
    """Two images of different sizes, by which a model is tried."""
    from PIL import Image

    return [Image.linear_gradient("L").resize(size).convert("RGB") for size in ((64, 48), (40, 56))]


def _refuse_positions(sight: Sight, text: Any) -> None:
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope, *(r for r in rope.values() if isinstance(r, dict))]
    if any("mrope_section" in r for r in kinds):
        raise sight._refusal("its rotary positions have several dimensions, which the cache does not keep")


def _holds_numbers(x: Any) -> bool:
    if isinstance(x, Mapping):
        x = list(x.values())
    return isinstance(x, Tensor) or (isinstance(x, (list, tuple)) and any(map(_holds_numbers, x)))
