"""Exact top-k against sorting explicit attention weights."""

import math

import pytest
import torch
from models import tiny
from reference import attend, causal, close, thin, thinned, watch, weights

from foveal.methods.select.top_k import TopK

N, PROMPT, HEADS, KV = 66, 60, 6, 2


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(8))


def best_keys(s, base, prompt, budget):
    """The newest key and the best of the rest by the mean weight over the query heads of a KV head, [kv_heads, n, n]."""
    visible, n = base.clone(), s.q.shape[1]
    mass = weights(s, base).unflatten(0, (KV, -1)).mean(1)
    for i in range(prompt, n):
        size = budget if isinstance(budget, int) else math.ceil(budget * (i + 1) - 1e-9)
        for g in range(KV):
            past = [t for t in base[g, i].nonzero().flatten().tolist() if t != i]
            order = sorted(past, key=lambda t: -mass[g, i, t].item())
            visible[g, i] = False
            visible[g, i, [i, *order[: size - 1]]] = True
    return visible


@pytest.mark.parametrize("budget", [1, 7, 25, 0.2])
@pytest.mark.parametrize("how", ["whole", "padded", "ragged"])
def test_it_reads_the_keys_with_the_largest_weights(how, budget, model, ids):
    method, pads = TopK(budget), (0, 13) if how == "padded" else None
    seen = watch(model, thin() | method if how == "ragged" else method, ids, (PROMPT,), pads)
    for _, _, s in seen.each():
        n = s.q.shape[1]
        base = thinned(n, (PROMPT,), KV) if how == "ragged" else causal(n).expand(KV, -1, -1)
        visible = best_keys(s, base, n - (N - PROMPT), budget)
        assert close(s.out, attend(s, visible))
        assert not close(s.out, attend(s, base), 1e-3)
    assert (seen.cache.lengths.amax((0, 1)) == (torch.tensor([36, 46]) if how == "ragged" else N)).all()


def test_no_other_keys_carry_more_mass(model, ids):
    """Recall: the mass of the chosen keys is at least that of a window and of random keys."""
    budget = 12
    for _, layer, s in watch(model, TopK(budget), ids, (PROMPT,)).each():
        base = causal(N).expand(KV, -1, -1)
        w = weights(s, base).unflatten(0, (KV, -1)).mean(1)[:, PROMPT:]
        ours = (w * best_keys(s, base, PROMPT, budget)[:, PROMPT:]).sum(-1)
        age = torch.arange(PROMPT, N)[:, None] - torch.arange(N)
        random = torch.rand(N, generator=torch.Generator().manual_seed(layer)).argsort() < budget - 1
        for other in ((age >= 0) & (age < budget), random & (age > 0) | (age == 0)):
            assert (ours >= (w * other).sum(-1) - 1e-12).all()


def test_a_budget_of_everything_is_dense(model, ids):
    for _, _, s in watch(model, TopK(N), ids, (PROMPT,)).each():
        assert close(s.out, attend(s, causal(N)[None]))
