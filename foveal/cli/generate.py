"""`foveal generate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import InputError
from .shared import (
    BudgetText,
    Device,
    Dtype,
    MethodName,
    ProfileFile,
    app,
    budget_value,
    check_fits,
    errors,
    load_model,
)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads it from standard input.")],
    model: Annotated[str | None, typer.Option(help="Hugging Face id or local folder.")] = None,
    method: MethodName = None,
    budget: BudgetText = None,
    profile: ProfileFile = None,
    tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    plain: Annotated[
        bool, typer.Option("--plain", help="Give the prompt as it is, without the chat template.")
    ] = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Generate greedily with a method, and say what the cache came to."""
    from .. import attach
    from ..profile import chosen
    from ..tasks.task import encode

    found, keeper = chosen(method, budget_value(budget, "--budget"), profile)
    if tokens < 1:
        raise InputError(f"--tokens {tokens}: ask for at least one token")
    text = sys.stdin.buffer.read().decode(errors="replace") if prompt == "-" else prompt
    if not text.strip():
        raise InputError("the prompt is empty: give at least one word")
    network, tokenizer = load_model(found.model.get("name") if found and model is None else model, device, dtype)
    import torch
    from transformers import TextStreamer

    if tokenizer.chat_template and not plain:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        ids = encode(tokenizer, text)
    else:
        ids = encode(tokenizer, text, special=True)
    check_fits(network, keeper, len(ids), tokens)
    with found.attach(network) if found else attach(network, keeper) as session:
        network.generate(
            torch.tensor([ids], device=network.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=network.device),
            max_new_tokens=tokens,
            do_sample=False,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        store = session.store
    share = store.nbytes / max(1, store.dense_nbytes)
    errors.print(
        f"[dim]{int(store.seen[0]):,} tokens seen, cache {store.nbytes / 2**20:.1f} MiB, {share:.0%} of dense[/]",
        highlight=False,
    )
