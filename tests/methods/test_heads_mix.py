"""Scaled and ablated heads against the outputs written out."""

import pytest
import torch
from models import tiny
from reference import attend, causal, close, over_heads, role_file, thin, thinned, watch

import foveal
from foveal.methods.mix.heads import Ablate, ScaleHeads

N, PROMPT, HEADS, KV = 50, 40, 6, 2


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(9))


def mean_of_visible(s, visible):
    """Uniform attention, [heads, n, head_dim]; visible [1 or kv_heads or heads, n, n]."""
    w = over_heads(visible, HEADS).double()
    return w / w.sum(-1, keepdim=True) @ over_heads(s.v, HEADS)


@pytest.mark.parametrize("chunks", [(40,), (13, 27)])
def test_scaled_heads_are_proportional(chunks, model, ids):
    heads = ((0, 1), (0, 5), (2, 0))
    for _, layer, s in watch(model, ScaleHeads(heads, 0.25), ids, chunks).each():
        gain = torch.ones(HEADS, 1, 1).double()
        gain[[h for i, h in heads if i == layer]] = 0.25
        assert close(s.out, gain * attend(s, causal(N)[None]))


def test_a_gain_of_zero_is_ablation_to_zero(model, ids):
    heads = ((0, 1), (1, 3))
    a, b = (watch(model, m, ids, (PROMPT,)) for m in (ScaleHeads(heads, 0.0), Ablate(heads, "zero")))
    for (_, layer, s), (_, _, t) in zip(a.each(), b.each(), strict=True):
        assert torch.equal(s.out, t.out)
        gone = [h for i, h in heads if i == layer]
        assert (t.out[gone] == 0).all() and (t.out[[0, 4]] != 0).all()


@pytest.mark.parametrize("how", ["whole", "padded", "chunks", "ragged"])
def test_uniform_is_the_mean_of_the_values_it_can_see(how, model, ids):
    heads = ((0, 0), (0, 4), (2, 5))
    method, chunks = Ablate(heads), (13, 27) if how in ("chunks", "ragged") else (40,)
    pads = (0, 9) if how == "padded" else None
    for _, layer, s in watch(model, thin() | method if how == "ragged" else method, ids, chunks, pads).each():
        n = s.q.shape[1]
        visible = thinned(n, chunks, KV) if how == "ragged" else causal(n)[None]
        expected, mean = attend(s, visible), mean_of_visible(s, visible)
        for h in (h for i, h in heads if i == layer):
            assert not close(expected[h], mean[h], 1e-2)
            expected[h] = mean[h]
        assert close(s.out, expected)


@pytest.mark.parametrize("chunks", [(40,), (13, 27)])
def test_uniform_sees_what_a_selection_leaves(chunks, model, ids):
    every = tuple((layer, h) for layer in range(3) for h in range(HEADS))
    window = foveal.get_method("streaming-llm", budget=12, sink=3) | Ablate(every)
    age = torch.arange(N)[:, None] - torch.arange(N)
    visible = (causal(N) & ((torch.arange(N) < 3) | (age < 9)))[None]
    for *_, s in watch(model, window, ids, chunks).each():
        assert close(s.out, mean_of_visible(s, visible))


def test_uniform_counts_a_merged_key_for_all_it_stands_for(model, ids, tmp_path):
    """Uniform attention is attention with logits of zero, to which a key's mass still adds: the mean of every value seen."""
    every = tuple((layer, h) for layer in range(3) for h in range(HEADS))
    scores = torch.rand(3, HEADS, generator=torch.Generator().manual_seed(1))
    roles = role_file(model, tmp_path, echo=scores, induction=scores)
    merged = foveal.get_method("razor", least=6, compress=100.0, induction=0.05, roles=roles) | Ablate(every)
    seen = watch(model, merged, ids, (PROMPT,))
    assert seen.cache.lengths.min() == 11
    for *_, s in seen.each():
        assert close(s.out, mean_of_visible(s, causal(N)[None]))


def test_no_heads_change_nothing_at_all(model, ids):
    plain, none = (watch(model, m, ids, (PROMPT,)) for m in (None, Ablate(())))
    assert all(torch.equal(s.out, t.out) for (*_, s), (*_, t) in zip(plain.each(), none.each(), strict=True))


def test_heads_must_exist(model):
    for cls in (ScaleHeads, Ablate):
        for pair in ((0, 6), (3, 0), (-1, 0)):
            with pytest.raises(foveal.InputError, match=f"no head {pair[1]} in layer {pair[0]}.*0..5"):
                foveal.attach(model, cls((pair,)))
        for wrong in ([(0, 1)], ((0, 1, 2),), ((0, 1.5),), (("0", 1),)):
            with pytest.raises(foveal.InputError, match=r"heads = .* pairs"):
                cls(wrong)
    with pytest.raises(foveal.InputError, match="mode = 'mean': expected 'uniform' or 'zero'"):
        Ablate(((0, 1),), "mean")
    with pytest.raises(foveal.InputError, match="gain = 'big'"):
        ScaleHeads(((0, 1),), "big")
