"""Shared by methods that rest on measurements of one model beyond its head roles: where these are kept, and how they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ...attach import Session
from ...command import Command, run
from ...errors import InputError
from ...heads import HeadRoles, known_roles
from ...hub import model_identity
from ...known import own_file


def profile_for(model, kind: str, path: str | Path | None = None, made_by: str = "profile") -> HeadRoles:
    """The `kind` profile of this model: that in `path`, else the one that ships with Foveal, else the user's own.

    made_by: the end of the name of the command that makes one.

    Raises InputError where `path` is of another model, or where nothing was measured yet.
    """
    if path is None:
        path = known_roles(model, kind)
    if path is not None:
        return HeadRoles.load(path).for_model(model)
    identity = model_identity(model)
    name = identity["name"] or identity["architecture"]
    raise InputError(
        f"no {kind} profile is known for {name}: make it once with `python -m foveal.methods.keep.{kind}_{made_by} --model {name}`"
    )


def profile_path(model, kind: str) -> Path:
    """Where the profiles a user has measured are kept."""
    return own_file(model, kind, ".json")


def greedy(session: Session, tokenizer, prompt: list[int], most: int) -> Iterator[int]:
    """Tokens of a greedy answer up to the end of its line; while one is handed out, probes hold the step that made it."""
    model = session.model
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    session.decoder(input_ids=torch.tensor([prompt[:-1]], device=model.device))
    store, token = session.store, prompt[-1]
    for _ in range(most):
        ids = torch.tensor([[token]], device=model.device)
        token = int(model(input_ids=ids, past_key_values=store).logits[0, -1].argmax())
        yield token
        if token in ends or "\n" in tokenizer.decode([token]):
            return


def command(kind: str, about: str, measure: Callable[..., HeadRoles]) -> None:
    """The command line of a profile: load the model, measure, write the file. measure(model, tokenizer, progress) makes it."""

    def main() -> None:
        place, _ = Command(f"foveal.methods.keep.{kind}_profile", about).read()
        model, tokenizer = place.load()
        profile = measure(model, tokenizer, lambda line: print(line, flush=True))
        print("wrote", profile.save(place.out or profile_path(model, kind)))

    run(main)
