"""How much each layer changes the hidden states of a long text: measured once for a model, kept in a file.

`python -m foveal.methods.select.drift [--model M] [--length N] [--out FILE]` measures a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...command import Command, run
from ...data import book
from ...errors import InputError
from ...heads import HeadRoles, known_roles
from ...hub import model_identity
from ...known import own_file

QUANTILE = 0.5
"""Layers with at most this quantile of the drift are stable (paper: 0.5)."""


@torch.no_grad()
def measure(model, tokenizer, length: int) -> HeadRoles:
    """The score "drift": the mean over tokens of |out - in| / |in| of each decoder layer, of all layers together 1; the same number for
    all heads of a layer, [layers, heads].

    length: tokens of prose. Raises InputError where the model has fewer positions.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise InputError(f"length = {length}: the model has {limit} positions, ask for fewer tokens")
    ids = tokenizer(book()[: length * 8], return_tensors="pt", verbose=False).input_ids[:, :length].to(model.device)
    states, handles = [], []
    layers = model.get_decoder().layers

    def note(module, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        change = (after.float() - before.float()).norm(dim=-1) / before.float().norm(dim=-1).clamp(min=1e-20)
        states.append(change.mean())

    try:
        handles += [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
        model.get_decoder()(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    drift = torch.stack(states).cpu()
    drift = (drift / drift.sum())[:, None].expand(-1, model_identity(model)["heads"])
    source = {"text": "moby dick", "length": int(ids.shape[1])}
    return HeadRoles(model_identity(model), {"drift": drift.contiguous().round(decimals=6)}, source)


def stable_layers(drift: Tensor, layers: Sequence[int], quantile: float = QUANTILE) -> tuple[int, ...]:
    """Of these layers those whose drift [all layers] is at most the quantile over all layers."""
    line = drift.quantile(quantile)
    return tuple(i for i in layers if drift[i] <= line)


def drift_for(model) -> Tensor:
    """The drift of each layer of this model, [layers]: what ships with Foveal, else the user's own; raises InputError without."""
    path = known_roles(model, "drift")
    if path is not None:
        return HeadRoles.load(path).for_model(model).scores["drift"][:, 0]
    identity = model_identity(model)
    name = identity["name"] or identity["architecture"]
    raise InputError(
        f"the drift of {name}'s layers is not known: measure it once with `python -m foveal.methods.select.drift --model {name}`, or "
        "name the layers"
    )


def drift_path(model) -> Path:
    """Where a user's own measurement is kept."""
    return own_file(model, "drift", ".json")


def main() -> None:
    command = Command(__spec__.name, measure.__doc__)
    command.add_argument("--length", type=int, default=4096, help="tokens of text (the paper: 128k)")
    place, chosen = command.read()
    model, tokenizer = place.load()
    print("wrote", measure(model, tokenizer, chosen.length).save(place.out or drift_path(model)))


if __name__ == "__main__":
    run(main)
