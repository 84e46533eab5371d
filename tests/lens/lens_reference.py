"""What the lenses should find, from attention weights and hidden states that transformers itself returns, in float64."""

import copy

import torch
from torch import Tensor


class Whole:
    """One text on one model: weights[layer] [heads, n, n] for layers with full attention, hidden[layer] [n, width] after every block."""

    def __init__(self, model, ids: list[int]):
        model = copy.deepcopy(model)
        model.set_attn_implementation("eager")
        hidden = []
        for block in model.get_decoder().layers:
            block.register_forward_hook(lambda m, a, out: hidden.append(out[0] if isinstance(out, tuple) else out))
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_attentions=True, output_hidden_states=True, use_cache=True)
        kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(hidden)
        self.layers = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
        self.n, self.model = len(ids), model
        self.weights = {i: out.attentions[i][0].double() for i in self.layers}
        self.hidden = [h[0].double() for h in hidden]
        self.inputs = [h[0] for h in out.hidden_states[:-1]]
        cached = out.past_key_values.layers
        self.keys = {i: cached[i].keys[0].double() for i in self.layers}
        self.values = {i: cached[i].values[0].double() for i in self.layers}

    def table(self, f) -> Tensor:
        """[layers, ...]: f(weights) of each layer with full attention, NaN in the others."""
        found = {i: f(w) for i, w in self.weights.items()}
        like = next(iter(found.values()))
        out = torch.full((len(self.hidden), *like.shape), torch.nan, dtype=torch.double)
        for i, x in found.items():
            out[i] = x
        return out


def importance(w: Tensor) -> Tensor:
    """Mean over the queries i >= j that see key j, [heads, n]."""
    n = w.shape[1]
    return torch.stack([w[:, j:, j].mean(1) for j in range(n)], 1)


def distances(n: int) -> Tensor:
    return (torch.arange(n)[:, None] - torch.arange(n)).clamp(min=0).double()


def future(w: Tensor, low: int, high: int, start: int = 0) -> Tensor:
    """Mean attention of the queries s + low .. s + high from `start` on to key s, [heads, n]; NaN where there is none."""
    n, out = w.shape[1], torch.full(w.shape[:2], torch.nan, dtype=torch.double)
    for s in range(n):
        rows = [t for t in range(s + low, min(n - 1, s + high) + 1) if t >= start]
        if rows:
            out[:, s] = w[:, rows, s].mean(1)
    return out


def vertical(w: Tensor, spans: list[tuple[int, int]], skip: int) -> Tensor:
    """Mean over sentences i >= j + skip of the mean attention of sentence i to sentence j, [heads, sentences]."""
    out = torch.full((w.shape[0], len(spans)), torch.nan, dtype=torch.double)
    for j, (b, e) in enumerate(spans):
        means = [w[:, p:q, b:e].mean((1, 2)) for p, q in spans[j + skip :]]
        if means:
            out[:, j] = torch.stack(means).mean(0)
    return out


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got.double(), expected.double(), atol=tolerance, rtol=tolerance, equal_nan=True)
