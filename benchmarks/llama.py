"""A model of the shape of Llama 3 8B with random weights, on the GPU, and caches of any length filled without reading a text."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foveal.edits import Keep

LAYERS, HEADS, KV_HEADS, DIM = 32, 32, 8, 128


def llama_8b(positions: int = 262_144, layers: int = LAYERS) -> LlamaForCausalLM:
    """16 GB of bfloat16 weights, drawn on the device."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        max_position_embeddings=positions,
        rope_theta=500_000.0,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model = model.to_empty(device="cuda").eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
    for p in model.parameters():
        p.normal_(std=0.02) if p.ndim > 1 else p.fill_(1.0)
    rotary = model.model.rotary_emb
    fresh = type(rotary)(config=config, device="cuda")
    rotary.inv_freq, rotary.original_inv_freq = fresh.inv_freq, fresh.original_inv_freq
    return model


def weight_bytes(model: LlamaForCausalLM) -> int:
    """Bytes a decode step reads of the weights: all but the rows of the embedding it does not look up."""
    return sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes


def fill(session, batch: int, tokens: int, kept: torch.Tensor | None = None):
    """A store as if `batch` sequences of `tokens` tokens had been read; kept: how many keys each head holds, [layers, kv_heads]."""
    store = session.new_store()
    for i, rows in enumerate(store.rows):
        parts = []
        for _ in range(batch):  # one sequence at a time, so that the dense keys of only one are ever there
            key, value = torch.randn(2, 1, KV_HEADS, tokens, DIM, device="cuda", dtype=torch.bfloat16)
            part = rows.fresh()
            if kept is not None:
                most = int(kept[i].max())
                part.append(key[:, :, :most], value[:, :, :most], tokens - most)
                part.apply(Keep(mask=(part.token - (tokens - most)) < kept[i].cuda().view(1, -1, 1)))
            else:
                part.append(key, value, 0)
            parts.append(part)
        rows.become(parts)
        store.layers[session.info.layers[i]].columns = tokens
        store.layers[session.info.layers[i]].is_initialized = True
    store.counts = [tokens] * batch
    return store
