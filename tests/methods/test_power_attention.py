"""PowerAttention against its mask, and what its hops can reach."""

import math

import pytest
import torch
from models import tiny
from reference import attend, causal, close, thin, thinned, watch

import foveal
from foveal.methods.select.power_attention import PowerAttention, kept

N, PROMPT, KV = 75, 66, 2


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(8))


def pattern(n, block, window):
    """Query i reads key j when their blocks are this far apart, one cell at a time."""
    seen = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(i + 1):
            d = i // block - j // block
            seen[i, j] = j < block or d < window or d in (1, 2, 4, 8, 16, 32, 64)
    return seen


@pytest.mark.parametrize(
    "method", [PowerAttention(4, 1), PowerAttention(3, 3), PowerAttention(1, 1), PowerAttention(5, 2)], ids=str
)
@pytest.mark.parametrize("how", ["whole", "chunks", "padded", "ragged"])
def test_it_reads_powers_of_two(how, method, model, ids):
    chunks, pads = ((30, 25, 11) if how == "chunks" else (PROMPT,)), ((0, 13) if how == "padded" else None)
    seen = watch(model, thin() | method if how == "ragged" else method, ids, chunks, pads)
    for _, _, s in seen.each():
        n = s.q.shape[1]
        base = thinned(n, (PROMPT,), KV) if how == "ragged" else causal(n)[None]
        visible = base & pattern(n, method.block, method.window)
        assert close(s.out, attend(s, visible))
        assert (base & ~visible).sum() > 200


def test_some_layers_stay_dense(ids):
    model = tiny("llama", num_hidden_layers=9)
    method = PowerAttention(4, 1, full=2)
    for _, layer, s in watch(model, method, ids, (PROMPT,)).each():
        visible = causal(N) if layer % 7 < 2 else pattern(N, 4, 1)
        assert close(s.out, attend(s, visible[None]))


def test_a_window_of_everything_is_dense(model, ids):
    for _, _, s in watch(model, PowerAttention(4, 19), ids, (PROMPT,)).each():
        assert close(s.out, attend(s, causal(N)[None]))


def test_reach_doubles_with_every_layer():
    index = torch.arange(1, 129)  # without the first block, which is read from everywhere
    step = kept(index[:, None] - index, index, 1)
    reach = torch.eye(128, dtype=torch.bool)
    for layers in range(1, 8):
        reach = (reach.float() @ step.float()) > 0
        distance = index[:, None] - index
        assert reach[(distance >= 0) & (distance < 2**layers)].all()
    assert torch.equal(reach, causal(128))
    assert step.sum(1).max() <= 1 + math.log2(128) + 1  # a logarithm of the length is read


def test_few_blocks_of_a_long_text_are_read():
    """Of 128 blocks 32k tokens fill, about ten a row: 86 % of the causal blocks are skipped, as the paper counts."""
    index = torch.arange(128)
    density = kept(index[:, None] - index, index, 5).sum() / causal(128).sum()
    assert density.item() == pytest.approx(0.14, abs=0.01)


def test_bad_values():
    for wrong in ({"block": 0}, {"window": 0}, {"full": -1}, {"full": 8}):
        with pytest.raises(foveal.InputError, match=f"^{next(iter(wrong))} = "):
            PowerAttention(**wrong)
