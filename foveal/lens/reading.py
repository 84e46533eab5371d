"""Read a text once with any number of lenses. No lens ever sees a length x length matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..attach import Session, attach
from ..cache import ACTIVE
from ..errors import InputError, UnsupportedModel
from ..heads import _circumstances
from ..hub import model_identity
from ..method import Method
from ..model_info import ModelInfo
from ..step import Step
from ..store import Layout
from ..tasks.task import encode
from . import by_layer
from .lens import Lens, Piece, Probe, Reading, Unsuited, choose
from .page.picture import Picture
from .result import Look

CHUNK = 4096
"""Queries read at once: what is held for them stays small beside the keys and values of a long text."""

Progress = Callable[[str, float], None]


@torch.no_grad()
def look(
    model,
    tokenizer,
    text: str | Sequence[int] | Tensor,
    lenses: Sequence[str | Lens] | None = None,
    *,
    picture: bool | Picture = False,
    chunk: int = CHUNK,
    progress: Progress | None = None,
) -> Look:
    """Measure what the attention of `model` does on one text, in one forward pass.

    text: a string, or token ids (then `tokenizer` may be None).  lenses: names or `Lens` objects; default all that suit the text, the
    others are in `source["left_out"]` with the reason.  picture: also measure what `Look.save_page` draws of every head's attention to
    the text (a `Picture` says how).  chunk: queries read at once; results do not depend on it beyond rounding.  progress: called with
    a line and the share of the work done.  Attention is measured in layers with full attention, the others are NaN; hidden states in all.
    Raises InputError for an empty text, one longer than the model has positions, unknown tokens or lenses; UnsupportedModel for a
    model without full attention layers or one that cannot be attached. Nothing was computed then.
    """
    chosen = choose(lenses)
    chosen += [picture if isinstance(picture, Picture) else Picture()] if picture else []
    if not getattr(model.config.get_text_config(decoder=True), "num_attention_heads", None):
        raise UnsupportedModel(
            f"{type(model).__name__} has no attention layers, so there is nothing to look at: use a model with some"
        )
    info = ModelInfo.of(model)
    if not info.layers:
        raise UnsupportedModel(
            f"{type(model).__name__} has no layer with full attention (sliding windows or linear layers only), so there is nothing "
            "to look at: use a model with some"
        )
    ids = tokens_of(model, tokenizer, text, info)
    if chunk < 2:
        raise InputError(f"chunk = {chunk}: expected at least 2 queries")
    reading = Reading(info, tokenizer, ids, model.device)
    probes, left_out = _probes(chosen, reading, forgiving=lenses is None)
    chosen = [x for x in chosen if x.name not in left_out]
    _run(model, reading, chosen, probes, chunk, progress)
    measures = {m.name: m for p in probes for m in p.results()}
    used = {x.name: {f.name: getattr(x, f.name) for f in dataclasses.fields(x)} for x in chosen}
    texts = ("",) * len(ids) if tokenizer is None else tuple(reading.words)
    source = {"lenses": used, "left_out": left_out, **_circumstances(model)}
    return Look(model_identity(model), tuple(ids), texts, measures, source, info.layers)


def tokens_of(model, tokenizer, text: str | Sequence[int] | Tensor, info: ModelInfo) -> list[int]:
    """Token ids of a text, checked against the model; raises InputError."""
    if isinstance(text, str):
        if not text.strip():
            raise InputError("the text is empty: give at least one word")
        if tokenizer is None:
            raise InputError("expected a tokenizer for a text, got None: give one, or give token ids")
        ids = encode(tokenizer, text, special=True)
    else:
        x = torch.as_tensor(text)
        x = x[0] if x.ndim == 2 and x.shape[0] == 1 else x
        if x.ndim != 1 or (x.numel() and (x.is_floating_point() or x.dtype == torch.bool)):
            raise InputError(f"expected a text or token ids [length], got {x.dtype} of shape {list(x.shape)}")
        ids = x.tolist()
    if not ids:
        raise InputError("the text is empty: give at least one token")
    known = model.get_input_embeddings().num_embeddings
    if not 0 <= min(ids) <= max(ids) < known:
        raise InputError(
            f"expected token ids from 0 to {known - 1}, got {min(ids)} to {max(ids)}: use the model's tokenizer"
        )
    if info.max_positions is not None and len(ids) > info.max_positions:
        raise InputError(
            f"the text is {len(ids):,} tokens long but the model has {info.max_positions:,} positions: shorten it"
        )
    return ids


def _probes(chosen: list[Lens], reading: Reading, forgiving: bool) -> tuple[list[Probe], dict[str, str]]:
    """A probe of each lens; and of those that do not suit, why: forgiven unless they were asked for."""
    probes, left_out = [], {}
    for x in chosen:
        try:
            probes.append(x.probe(reading))
        except Unsuited as error:
            if not forgiving:
                raise
            left_out[x.name] = str(error)
    return probes, left_out


class _Watcher(Method):
    """Hands every layer's queries and keys to the probes; changes nothing."""

    name = "lens"
    needs = frozenset({"lse"})

    def __init__(self, see: Callable[[Step], None]):
        object.__setattr__(self, "see", see)

    def after(self, step: Step) -> None:
        self.see(step)


def _run(
    model, reading: Reading, chosen: list[Lens], probes: list[Probe], chunk: int, progress: Progress | None
) -> None:
    want = frozenset().union(*(x.stats for x in chosen))
    sizes = {name: size for x in chosen for name, size in x.sizes(reading).items()}
    attending = [p for p in probes if type(p).attention is not Probe.attention]
    hidden = [p for p in probes if type(p).hidden is not Probe.hidden]
    done = [0.0]

    def see(step: Step) -> None:
        first = int(step.pass_.counts[0])
        if first == 0 and reading.length > step.L:
            step.store.single.reserve(reading.length - step.L)
        k = step.store.keys()
        piece = Piece(step.layer, first, step.q, k, step.k_new, step.v_new, step.stats["lse"], step.logit)
        piece.stats = piece.measure(want, **sizes) if want else {}
        if "col_mass" in want:
            _add_columns(reading, piece)
        for p in attending:
            p.attention(piece)
        if progress is not None:
            done[0] += _work(first, step.L) / (_work(0, reading.length) * len(reading.info.layers))
            progress(f"reading, layer {step.layer}", min(1.0, done[0]))

    ids, pieces = torch.tensor([reading.ids], device=reading.device), [*_pieces(reading.length, chunk)]
    with attach(model, _Watcher(see), layout=Layout(paged=False), graphs=False) as session:
        blocks = _blocks(model, reading.info.n_layers) if hidden else _listed(model, reading.info.n_layers)
        recorded = by_layer.record(session, blocks, ids, pieces) if len(pieces) > 1 else None
        with _hooked(blocks, hidden):
            if recorded is None:
                _by_piece(session, ids, pieces)
            else:
                by_layer.run(recorded[0], blocks, recorded[1])


def _by_piece(session: Session, ids: Tensor, pieces: Sequence[tuple[int, int]]) -> None:
    store = None
    for start, stop in pieces:
        # whole_prompt-like methods are not here, so a prompt in pieces reads as one
        with session.open_prompt() if stop < ids.shape[1] else nullcontext():
            session.decoder(input_ids=ids[:, start:stop], past_key_values=store, use_cache=True)
        store = session.store


def _work(first: int, length: int) -> float:
    """In logits, with what a query costs by itself counted as a thousand of them."""
    return length * (first + length / 2 + 1000)


def _pieces(length: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Even pieces of up to `chunk` queries; none of a single query, which would be a decode step, unless that is all."""
    count = -(-length // chunk)
    while count > 1 and length // count < 2:
        count -= 1
    edges = [length * i // count for i in range(count + 1)]
    return pairwise(edges)


def _add_columns(reading: Reading, piece: Piece) -> None:
    x = piece.stats["col_mass"][0]
    if piece.layer not in reading.columns:
        reading.columns[piece.layer] = x.new_zeros(x.shape[0], reading.length)
    reading.columns[piece.layer][:, : x.shape[1]] += x
    if (
        x.shape[1] == reading.length
    ):  # whole: half a gigabyte for all layers of a long text has no place beside the model
        reading.columns[piece.layer] = reading.columns[piece.layer].cpu()


@contextmanager
def _hooked(blocks: Sequence[nn.Module], probes: list[Probe]) -> Iterator[None]:
    """Inside, the probes are shown the residual stream after every block."""
    if not probes:
        yield
        return

    def show(layer: int):
        def hook(module, args, output):
            h = (output[0] if isinstance(output, tuple) else output)[0].float()
            for p in probes:
                p.hidden(layer, ACTIVE.get().counts[0], h)

        return hook

    handles = [b.register_forward_hook(show(i)) for i, b in enumerate(blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _listed(model, count: int) -> nn.ModuleList | None:
    return next((x for x in model.get_decoder().children() if isinstance(x, nn.ModuleList) and len(x) == count), None)


def _blocks(model, count: int) -> nn.ModuleList:
    """The decoder's list of blocks, whatever its name."""
    if (found := _listed(model, count)) is None:
        raise UnsupportedModel(
            f"{type(model).__name__} keeps its {count} blocks in no list of its decoder: leave out lenses of hidden states"
        )
    return found
