"""RazorAttention against a simulation with the mean of the dropped keys and values and the logarithm of their number."""

import math

import pytest
import torch
from models import tiny
from reference import attend, causal, close, logits, over_heads, role_file, watch

import foveal
from foveal.methods.keep.razor import Razor

N, PROMPT, HEADS, KV, LAYERS = 72, 60, 6, 2, 2
SMALL = {"echo": 0.05, "induction": 0.05, "least": 12, "compress": 100.0}  # one head each


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(6))


@pytest.fixture(scope="module")
def roles(model, tmp_path_factory):
    echo, induction = torch.zeros(LAYERS, HEADS), torch.zeros(LAYERS, HEADS)
    echo[0, 4] = induction[1, 1] = 0.9  # so KV head 1 of layer 0 and KV head 0 of layer 1 stay whole
    return role_file(model, tmp_path_factory.mktemp("roles"), echo=echo, induction=induction)


WHOLE = {(0, 1), (1, 0)}


def compensated(s, prompt, buffer, sink=4, count=True):
    """Outputs of heads whose dropped span is one key: the dense formula, query by query. buffer(n) keys are kept of n tokens."""
    n, group = s.q.shape[1], HEADS // KV
    out = attend(s, causal(n)[None])
    z = logits(s)
    for i in range(prompt, n):
        end = max(sink, i - buffer(i))  # keys sink .. end - 1 are one by now
        rows = [t for t in range(i + 1) if t < sink or t >= end]
        for h in range(HEADS):
            g = h // group
            logit, value = z[h, i, rows], s.v[g, rows]
            if end > sink:
                mean = s.k[g, sink:end].mean(0)
                extra = (s.q[h, i] @ mean / math.sqrt(s.q.shape[-1])) + (math.log(end - sink) if count else 0)
                logit, value = torch.cat([logit, extra[None]]), torch.cat([value, s.v[g, sink:end].mean(0)[None]])
            out[h, i] = logit.softmax(-1) @ value
    return out


@pytest.mark.parametrize("pads", [None, (0, 9)])
@pytest.mark.parametrize(
    ("params", "buffer"),
    [({}, lambda n: 12), ({"least": 1, "compress": 3.0}, lambda n: math.ceil(n / 3)), ({"sink": 0}, lambda n: 12)],
)
def test_the_dropped_span_is_one_key_that_counts_for_all(params, buffer, pads, model, ids, roles):
    method = Razor(**SMALL | params, roles=roles)
    seen = watch(model, method, ids, (PROMPT,), pads)
    for _b, layer, s in seen.each():
        n = s.q.shape[1]
        prompt = n - (N - PROMPT)
        expected = compensated(s, prompt, buffer, method.sink)
        dense = attend(s, causal(n)[None])
        wrong = compensated(s, prompt, buffer, method.sink, count=False)
        for g in range(KV):
            heads = slice(g * 3, g * 3 + 3)
            whole = (layer, g) in WHOLE
            assert close(s.out[heads], (dense if whole else expected)[heads])
            assert whole or not close(s.out[heads], wrong[heads], 1e-3)  # without log N it is something else
            assert whole or not close(s.out[heads], dense[heads], 1e-3)


def test_the_compensation_is_the_mean_of_all_that_left(model, ids, roles):
    """Folded in key by key over the decode steps, it is still the plain mean; its mass is their number."""
    seen = watch(model, Razor(**SMALL, roles=roles), ids, (PROMPT,))
    gone = range(4, N - 12)
    for b, layer, s in seen.each():
        for g in range(KV):
            token, mass = seen.planes["token"][layer][b, g], seen.planes["mass"][layer][b, g]
            if (layer, g) in WHOLE:
                assert seen.kept[-1][layer][b][g] == list(range(N)) and (mass == 1).all()
                continue
            assert seen.kept[-1][layer][b][g] == [0, 1, 2, 3, 4, *range(N - 12, N)]
            slot = int((token == 4).nonzero())
            assert mass[slot] == len(gone) and mass.sum() == N + (mass == 1).sum() - 16
            for name, x in (("key", s.k), ("value", s.v)):
                assert close(seen.planes[name][layer][b, g, slot], x[g, gone.start : gone.stop].mean(0))


def test_a_prompt_that_fits_has_no_extra_key(model, ids, roles):
    seen = watch(model, Razor(**SMALL, roles=roles), ids[:, :26], (14,))
    for call, layers in enumerate(seen.kept):
        n = 14 + call
        for layer, batch in enumerate(layers):
            for heads in batch:
                assert [len(r) for r in heads] == [n if (layer, g) in WHOLE else min(n, 17) for g in range(KV)]
    for _, _, s in seen.each():
        dense = attend(s, causal(26)[None])
        assert close(s.out[:, :18], dense[:, :18])  # 4 sinks, 12 in the buffer, one that stands for itself, the query


def test_all_heads_whole_is_dense(model, ids, roles):
    seen = watch(model, Razor(**SMALL | {"induction": 1.0}, roles=roles), ids, (PROMPT,))
    for _, _, s in seen.each():
        assert close(s.out, attend(s, causal(N)[None]))
    assert (seen.cache.lengths == N).all()


def test_equal_keys_and_values_lose_nothing(tmp_path):
    """In a model without positions, one token repeated gives equal keys in layer 0: one key then stands for all exactly."""
    model = tiny("gpt2", fresh=True, num_hidden_layers=1)
    model.transformer.wpe.weight.data.zero_()
    zero = torch.zeros(1, HEADS)
    zero[0, 0] = 1.0
    path = role_file(model, tmp_path, echo=zero, induction=zero)
    ids = torch.full((1, 50), 7)
    ids[0, :4], ids[0, 28:] = torch.tensor([1, 2, 3, 4]), torch.arange(20, 42)
    # 16 in the buffer: when decode ends at 44, the keys 4..27 are one
    seen = watch(model, Razor(**SMALL | {"least": 16}, roles=path), ids[:, :44], (40,))
    (s,) = seen.seqs[0]
    assert close(s.k[:, 4:28], s.k[:, 4:5].expand(-1, 24, -1), 1e-6)
    assert close(s.out, attend(s, causal(44)[None]))
    assert {len(r) for r in seen.kept[-1][0][0]} == {44, 21}


def test_the_compensated_mass_is_never_more_than_the_true_mass(model, ids, roles):
    """Jensen: N exp(mean logit) <= sum of exp(logit)."""
    for _, _, s in watch(model, Razor(**SMALL, roles=roles), ids, (PROMPT,)).each():
        z = logits(s)[:, PROMPT:, 4 : PROMPT - 12]
        mean = (s.q[:, PROMPT:] @ over_heads(s.k[:, 4 : PROMPT - 12].mean(1, keepdim=True), HEADS).mT / 4)[..., 0]
        assert (mean + math.log(z.shape[-1]) <= z.logsumexp(-1) + 1e-9).all()


@pytest.mark.parametrize("budget", [0.25, 0.5])
def test_a_budget_is_the_share_of_all_keys_held(budget, tmp_path):
    many = tiny("llama", num_key_value_heads=6)  # 18 KV heads, so that whole heads are small change
    scores = torch.rand(3, HEADS, generator=torch.Generator().manual_seed(1))
    method = Razor(budget, roles=role_file(many, tmp_path, echo=scores, induction=scores))
    seen = watch(many, method, torch.randint(1, 120, (1, 402)), (400,))
    assert abs(seen.cache.lengths.sum().item() / (18 * 402) - budget) < 0.03
    assert (seen.cache.lengths == 402).sum() == {0.25: 2, 0.5: 3}[budget]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"budget": 100}, "budget = 100: 'razor' .*share of the tokens"),
        ({"budget": 1.5}, "budget = 1.5: expected"),
        ({"echo": 2}, "echo = 2: expected a number from 0 to 1"),
        ({"compress": 0.5}, "compress = 0.5: .*at least 1"),
    ],
)
def test_bad_values(wrong, message):
    with pytest.raises(foveal.InputError, match=message):
        Razor(**wrong)
