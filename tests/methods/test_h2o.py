"""H2O against a simulation that masks columns of explicit attention weights instead of dropping keys."""

# The authors' cache with real dropping (FMInference/H2O, utils_real_drop/modify_llama.py, H2OKVCache_LayerWise) was
# run on the CPU with queries and keys of the tiny model with as many KV heads as query heads, heavy + recent = 8 + 8,
# 6 + 10 and 10 + 2: after the prompt and after each of eight steps the same keys are held.

import math

import pytest
import torch
from models import tiny
from reference import attend, causal, close, simulate_h2o, watch

from foveal.methods.keep.h2o import H2O

N, PROMPT, KV = 72, 60, 2


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    ("budget", "recent", "pads"),
    [(16, 0.5, None), (16, 0.25, None), (17, 0.0, None), (0.3, 0.5, None), (0.3, 0.5, (0, 9)), (40, 0.1, None)],
)
def test_dropping_is_masking(budget, recent, pads, model, ids):
    seen = watch(model, H2O(budget, recent), ids, (PROMPT,), pads)
    for b, layer, s in seen.each():
        n = s.q.shape[1]
        prompt = n - (N - PROMPT)
        visible, kept, mass = simulate_h2o(s, prompt, budget, recent)
        assert close(s.out, attend(s, visible))
        for call, heads in enumerate(kept):
            assert seen.kept[call][layer][b] == heads
        token, plane = seen.planes["token"][layer][b], seen.planes["h2o"][layer][b]
        for g, held in enumerate(kept[-1]):
            got = plane[g, token[g].argsort()[: len(held)]]  # sums are gathered with the keys that stay
            assert close(got, mass[g, held], 1e-4)


def test_sums_of_all_keys_are_heads_times_queries(model, ids):
    seen = watch(model, H2O(1.0), ids, (25, 35))
    for b, layer, s in seen.each():
        assert close(s.out, attend(s, causal(N)[None]))
        total = seen.planes["h2o"][layer][b].sum(-1)
        assert close(total, torch.full((KV,), 3.0 * N), 1e-3)


def test_chunks_of_a_prompt_count_like_the_whole(model, ids):
    whole, chunks = (watch(model, H2O(16), ids, c) for c in ((PROMPT,), (25, 20, 15)))
    assert whole.kept[-1] == chunks.kept[-1]
    assert whole.kept[0] == chunks.kept[2]


@pytest.mark.parametrize("budget", [16, 0.3])
def test_rolling_drops_after_each_chunk(budget, model, ids):
    chunks = (25, 20, 15)
    seen = watch(model, H2O(budget, rolling=True), ids, chunks)
    for b, layer, s in seen.each():
        visible, kept, _mass = simulate_h2o(s, chunks, budget, 0.5)
        assert [call[layer][b] for call in seen.kept] == kept
        assert close(s.out, attend(s, visible))


@pytest.mark.parametrize("budget", [16, 0.3])
def test_recent_one_is_a_window(budget, model, ids):
    seen = watch(model, H2O(budget, recent=1.0), ids, (PROMPT,))
    for call, layers in enumerate(seen.kept):
        n = PROMPT + call
        size = budget if budget == 16 else math.ceil(budget * n)
        assert all(row == list(range(n - size, n)) for batch in layers for heads in batch for row in heads)


def test_heavy_hitters_stay_where_a_window_loses_them(model, ids):
    """With nothing protected, the keys with the largest sums stay, wherever they are."""
    seen = watch(model, H2O(12, recent=0.0), ids, (PROMPT,))
    for b, layer, s in seen.each():
        sums = simulate_h2o(s, PROMPT, N, 0.0)[0]  # nothing dropped
        w = (s.q[:, :PROMPT] @ s.k.repeat_interleave(3, 0)[:, :PROMPT].mT / 4).masked_fill(~causal(PROMPT), -torch.inf)
        mass = w.softmax(-1).sum(1).unflatten(0, (KV, 3)).sum(1)
        assert sums.all(0).equal(causal(N))
        for g in range(KV):
            assert seen.kept[0][layer][b][g] == sorted(mass[g].topk(12).indices.tolist())


def test_nothing_is_kept_beyond_the_budget(model, ids):
    seen = watch(model, H2O(16), ids, (PROMPT,))
    assert (seen.cache.lengths == 16).all()
    short = watch(model, H2O(66), ids, (PROMPT,))
    assert [len(c[0][0][0]) for c in short.kept] == [min(66, PROMPT + i) for i in range(N - PROMPT + 1)]
