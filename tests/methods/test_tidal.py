"""TidalDecode against votes of explicit attention weights, layer by layer."""

# The authors' attention (DerrickYLJ/TidalDecode, src/tidal_build/modify_llama.py) was run on the CPU beside a tiny
# model of one head, nothing forced, 8, 16 and 24 tokens: the same outputs wherever its set holds the newest token,
# which here is always read. With more heads it has a set for each.

import math

import pytest
import torch
from models import tiny
from reference import attend, causal, close, thin, thinned, watch, weights

import foveal
from foveal.methods.select.tidal import Tidal

N, PROMPT, KV, LAYERS = 66, 60, 2, 6


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(8))


def chosen(s, base, method, prompt):
    """The token ids that layers after this one read: {query: set}."""
    votes, out = weights(s, base).sum(0), {}
    for i in range(prompt, votes.shape[0]):
        size = method.budget if isinstance(method.budget, int) else math.ceil(method.budget * (i + 1) - 1e-9)
        forced = [t for t in range(i) if t < method.sink or t >= i - method.recent]
        rest = sorted((t for t in range(i) if t not in forced), key=lambda t: -votes[i, t].item())
        out[i] = set([*forced, *rest][: size - 1]) | {i} if size <= i else set(range(i + 1))
    return out


@pytest.mark.parametrize(
    "method",
    [Tidal(12, (1, 3), 2, 3), Tidal(20, (0,), 0, 0), Tidal(0.3, (1, 3), 4, 2), Tidal(25, (1, 3, 4), 1, 0)],
)
@pytest.mark.parametrize("how", ["whole", "padded", "ragged"])
def test_layers_read_what_the_last_picking_layer_chose(how, method, model, ids):
    pads = (0, 13) if how == "padded" else None
    seen = watch(model, thin() | method if how == "ragged" else method, ids, (PROMPT,), pads)
    read = 0
    for layers in seen.seqs:
        n = layers[0].q.shape[1]
        prompt, sets = n - (N - PROMPT), {}
        base = thinned(n, (PROMPT,), KV) if how == "ragged" else causal(n).expand(KV, -1, -1)
        for layer, s in enumerate(layers):
            visible = base.clone()
            if layer in method.pick:
                sets = chosen(s, base, method, prompt)
            else:
                for i, some in sets.items():
                    visible[:, i] &= torch.tensor([t in some for t in range(n)])
            assert close(s.out, attend(s, visible)), layer
            read += int((base & ~visible).sum())
    assert read > 0


def test_the_budget_touches_no_layer_up_to_the_first_pick(model, ids):
    runs = [watch(model, Tidal(budget, (2,), 2, 2), ids, (PROMPT,)).seqs for budget in (8, 30)]
    for few, many in zip(*runs, strict=True):
        same = [close(a.out, b.out, 1e-6) for a, b in zip(few, many, strict=True)]
        assert same == [True] * 3 + [False] * 3


def test_default_layers_follow_the_depth():
    def picks(layers, method=None):
        info = foveal.attach(tiny("llama", num_hidden_layers=layers, hidden_size=96)).info
        foveal.detach(info.model)
        return (method or Tidal()).setup(info)

    assert picks(32) == (2, 12) and picks(6) == (2, 3) and picks(2) == ()
    info = foveal.attach(tiny("gemma2")).info
    foveal.detach(info.model)
    assert Tidal(pick=(0, 1)).setup(info) == (1, 3)  # among the layers with full attention
    with pytest.raises(foveal.InputError, match=r"pick = \(2, 12\): expected indices below 6"):
        picks(6, Tidal(pick=(2, 12)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pick": ()}, "pick = .*expected a tuple"),
        ({"pick": 3}, "pick = 3: expected a tuple"),
        ({"pick": (1, -1)}, "pick = -1: expected a whole number"),
        ({"sink": -1}, "sink = -1"),
        ({"budget": 0}, "budget = 0: expected"),
    ],
)
def test_bad_values(wrong, message):
    with pytest.raises(foveal.InputError, match=message):
        Tidal(**wrong)
