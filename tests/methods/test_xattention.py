"""XAttention against antidiagonals added up one by one."""

import pytest
import torch
from models import tiny
from reference import attend, causal, close, watch

import foveal
from foveal.methods.select.xattention import XAttention

N, PROMPT, HEADS = 75, 64, 6


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(8))


def chosen(s, method):
    """[HEADS, n, n]: what each query of the prompt reads."""
    n, b, t = s.q.shape[1], method.block, method.stride
    visible = causal(n).expand(HEADS, -1, -1).clone()
    for h in range(HEADS):
        z = s.q[h, :PROMPT] @ s.k[h // 3, :PROMPT].T / 4
        tiles = torch.zeros(PROMPT // t, PROMPT // t).double()
        for r in range(PROMPT // t):
            for c in range(PROMPT // t):
                tiles[r, c] = sum(z[r * t + i, c * t + t - 1 - i] for i in range(t)) / t
        p = tiles.masked_fill(~causal(PROMPT // t), -torch.inf).softmax(-1)
        mass = p.unflatten(0, (-1, b // t)).mean(1).unflatten(1, (-1, b // t)).sum(2)
        for i in range(PROMPT // b):
            order = sorted(range(i + 1), key=lambda j: (j not in (0, i), -mass[i, j].item()))
            held, read = 0.0, []
            for j in order:
                if held >= method.threshold * mass[i].sum() * (1 - 1e-6) and j not in (0, i):
                    break
                read.append(j)
                held += mass[i, j].item()
            seen = torch.tensor([a // b in read for a in range(n)])
            visible[h, i * b : i * b + b] &= seen
    return visible


@pytest.mark.parametrize("method", [XAttention(0.5, 8, 4), XAttention(0.8, 8, 2), XAttention(0.6, 16, 16)], ids=str)
def test_each_block_reads_the_fewest_blocks_that_hold_the_mass(method, model, ids):
    unread = 0
    for _, _, s in watch(model, method, ids, (PROMPT,)).each():
        visible = chosen(s, method)
        assert close(s.out, attend(s, visible))
        unread += int((causal(N) & ~visible).sum())
    assert unread > 1000


def test_all_of_the_mass_is_dense(model, ids):
    for _, _, s in watch(model, XAttention(1.0, 8, 4), ids, (PROMPT,)).each():
        assert close(s.out, attend(s, causal(N)[None]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"threshold": 0}, "threshold = 0: expected"),
        ({"stride": 48}, "stride = 48: expected a divisor of the block, 128"),
        ({"block": 0}, "block = 0"),
    ],
)
def test_bad_values(wrong, message):
    with pytest.raises(foveal.InputError, match=message):
        XAttention(**wrong)
