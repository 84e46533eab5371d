"""LongGen: which layers are full, and that what the others let go is what no later query sees."""

import math

import pytest
import torch
from models import tiny
from reference import attend, causal, close, watch

import foveal
from foveal.methods.keep.long_gen import LongGen

N, PROMPT, KV, LAYERS = 76, 60, 2, 6
FULL = (2, 3)


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(19))


@pytest.mark.parametrize(("chunks", "pads"), [((PROMPT,), None), ((PROMPT,), (0, 9)), ((13, 30, 17), None)])
def test_evicting_is_masking(chunks, pads, model, ids):
    """With windows in tokens the mask is the same however the text comes, so chunks bound memory and change nothing."""
    seen = watch(model, LongGen(sink=3, recent=12), ids, chunks, pads)
    for _, layer, s in seen.each():
        n = s.q.shape[1]
        i, j = torch.arange(n)[:, None], torch.arange(n)
        visible = causal(n) & ((j < 3) | (i - j < 12)) if layer not in FULL else causal(n)
        assert close(s.out, attend(s, visible[None]))
    for call, at in enumerate([*torch.tensor(chunks).cumsum(0).tolist(), *range(PROMPT + 1, N + 1)]):
        for layer in range(LAYERS):
            for b, heads in enumerate(seen.kept[call][layer]):
                n = at - (0 if pads is None else pads[b])
                held = list(range(n)) if layer in FULL else [*range(min(3, n)), *range(max(3, n - 11), n)]
                assert heads == [held] * KV


@pytest.mark.parametrize("budget", [0.5, 0.25])
def test_a_budget_is_a_share_of_all_layers_together(budget, ids):
    model = tiny("llama", num_hidden_layers=12)
    seen = watch(model, LongGen(budget), ids, (PROMPT,))
    full = {0.5: (4, 5, 6), 0.25: (5,)}[budget]  # half of the budget, at most a third of the layers
    share = (budget - len(full) / 12) / (1 - len(full) / 12)
    for layer, lengths in enumerate(seen.cache.lengths.tolist()):
        expected = N if layer in full else math.ceil(share * (N + 1) - 1e-9) - 1  # and the next token itself
        assert lengths == [[expected] * KV] * 2
    for _, layer, s in seen.each():
        if layer in full:
            assert close(s.out, attend(s, causal(N)[None]))


def test_the_paper_s_plan():
    layers = tuple(range(32))
    assert LongGen().full_layers(layers) == tuple(range(10, 21))
    assert LongGen(full=12 / 32).full_layers(layers) == tuple(range(10, 22))
    assert LongGen(full=0).full_layers(layers) == () and LongGen(full=1).full_layers(layers) == layers
    # 20 layers of 32 hold 2,048 of 128k tokens: the 38 % of the cache that the paper reports
    share = (12 + 20 * 2048 / 131_072) / 32
    assert share == pytest.approx(0.38, abs=0.01)


def test_bad_values():
    with pytest.raises(foveal.InputError, match="'long-gen' keeps some heads whole, so its budget is a share"):
        LongGen(512)
    with pytest.raises(foveal.InputError, match="recent = 1"):
        LongGen(recent=1)
