"""ZeroTuning in its three equal forms: a logit bias, scaled weights, and a merge by the log-sum-exp."""

import math

import pytest
import torch
from models import tiny
from reference import attend, causal, close, over_heads, watch, weights

import foveal
from foveal.methods.weigh.zero_tuning import ZeroTuning

N, PROMPT, HEADS = 50, 40, 6


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(9))


def tuned(s, gamma):
    """(weight form, bias form, merge form) of outputs [heads, n, head_dim]; gamma [heads]."""
    n = s.q.shape[1]
    w, v, gamma = weights(s, causal(n)[None]), over_heads(s.v, HEADS), gamma.double()[:, None]
    scaled = w.clone()
    scaled[:, :, 0] *= gamma
    scaled = scaled / (1 + (gamma - 1) * w[:, :, 0])[..., None]
    bias = torch.zeros(HEADS, n, n).double()
    bias[:, :, 0] = gamma.log()
    extra = ((gamma - 1) * w[:, :, 0])[..., None]
    return scaled @ v, attend(s, causal(n)[None], bias), (w @ v + extra * v[:, :1]) / (1 + extra)


@pytest.mark.parametrize("pads", [None, (0, 9)])
@pytest.mark.parametrize("gamma", [3.0, 0.4, 1.0])
def test_three_forms_are_one(gamma, pads, model, ids):
    """With padding, token 0 is the first real token of each sequence."""
    for *_, s in watch(model, ZeroTuning(gamma), ids, (PROMPT,), pads).each():
        forms = tuned(s, torch.full((HEADS,), gamma))
        assert all(close(s.out, form, 1e-5) for form in forms)
        assert close(forms[0], forms[1], 1e-9) and close(forms[0], forms[2], 1e-9)


@pytest.mark.parametrize("chunks", [(40,), (13, 27)])
def test_only_the_chosen_heads_and_layers(chunks, model, ids):
    gamma = torch.tensor([1.0, 4.0, 1.0, 1.0, 4.0, 1.0])
    for _, layer, s in watch(model, ZeroTuning(4.0, heads=(1, 4), layers=(0, 2)), ids, chunks).each():
        assert close(s.out, tuned(s, gamma if layer != 1 else torch.ones(HEADS))[0])


def test_the_first_row_never_changes(model, ids):
    for *_, s in watch(model, ZeroTuning(5.0), ids, (PROMPT,)).each():
        assert close(s.out[:, 0], over_heads(s.v, HEADS)[:, 0])


def test_limits(model, ids):
    """Large: every query returns the value of token 0. Small: as if its key were hidden, but for the first query."""
    for *_, s in watch(model, ZeroTuning(1e8), ids, (PROMPT,)).each():
        assert close(s.out, over_heads(s.v, HEADS)[:, :1].expand_as(s.out), 1e-4)
    for *_, s in watch(model, ZeroTuning(1e-9), ids, (PROMPT,)).each():
        hidden = causal(N).clone()
        hidden[1:, 0] = False
        assert close(s.out, attend(s, hidden[None]))


def test_the_other_keys_keep_their_ratios(model, ids):
    """The output is a blend of token 0 and of what the other keys give without it."""
    for *_, s in watch(model, ZeroTuning(3.0), ids, (PROMPT,)).each():
        rest = causal(N).clone()
        rest[1:, 0] = False
        a = weights(s, causal(N)[None])[:, :, :1]
        share = 3 * a / (1 + 2 * a)
        v = over_heads(s.v, HEADS)
        assert close(s.out, share * v[:, :1] + (1 - share) * attend(s, rest[None]))
        assert math.isclose(share[0, 0, 0], 1.0)


def test_a_dropped_first_token_has_no_weight(model, ids):
    window = foveal.get_method("streaming-llm(budget=12, sink=0) | zero-tuning(gamma=9.0)")
    age = torch.arange(N)[:, None] - torch.arange(N)
    for *_, s in watch(model, window, ids, (PROMPT,)).each():
        bias = torch.zeros(N, N)
        bias[:, 0] = math.log(9.0)
        assert close(s.out, attend(s, (causal(N) & (age < 12))[None], bias))


@pytest.mark.parametrize(
    ("wrong", "message"), [({"gamma": 0}, "gamma = 0 "), ({"gamma": -1.0}, "gamma = -1.0: .*at least 0")]
)
def test_bad_values(wrong, message):
    with pytest.raises(foveal.InputError, match=message):
        ZeroTuning(**wrong)


def test_heads_and_layers_must_exist(model):
    for params, message in (
        ({"heads": (6,)}, r"heads = \(6,\).* heads 0..5"),
        ({"layers": (-1, 1)}, r"layers = .* layers 0..2"),
    ):
        with pytest.raises(foveal.InputError, match=message):
            foveal.attach(model, ZeroTuning(**params))
