"""Rectification against attention written out, and against its own steps with loops."""

import math

import pytest
import torch

from foveal.errors import InputError
from foveal.patterns.blocks import attend_grid, tile_blocks
from foveal.patterns.rectified import (
    critical_blocks,
    hilbert_blocks,
    implicit_attention,
    neighbour_blocks,
    rectified_attention,
)


def draw(n, heads=2, kv_heads=2, batch=1):
    return [torch.randn(batch, h, n, 8, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)]


def weights(q, k):
    return (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT / math.sqrt(q.shape[-1])).softmax(-1)


def constant(x, blocks):
    """The same vector in a whole block."""
    return blocks.mean(x)[:, :, blocks.block_of]


def test_nothing_dropped_is_dense():
    q, k, v = draw(22, heads=4)
    blocks = tile_blocks((18,), (4,))
    out = rectified_attention(q, k, v, blocks, torch.ones(5, 5, dtype=torch.bool), text=4)
    torch.testing.assert_close(out, weights(q, k) @ v.repeat_interleave(2, 1))


@pytest.mark.parametrize("text", [0, 3])
def test_constant_blocks_are_estimated_exactly_and_corrected_to_dense(text):
    blocks = tile_blocks((18,), (4,))
    q, k, v = draw(18 + text)
    q, k = (torch.cat([constant(x[:, :, :18], blocks), x[:, :, 18:]], 2) for x in (q, k))
    p = weights(q, k)
    shares = implicit_attention(q, k, blocks, text=text)
    for a in range(5):
        for b in range(5):
            cells = p[:, :, 4 * a, 4 * b : min(4 * b + 4, 18)].sum(-1)
            torch.testing.assert_close(shares.blocks[:, :, a, b], cells)
    torch.testing.assert_close(shares.text, p[:, :, [0, 4, 8, 12, 16], 18:].sum(-1))
    out = rectified_attention(q, k, v, blocks, torch.eye(5, dtype=torch.bool), text=text)
    torch.testing.assert_close(out, p @ v)


def test_each_step_by_loops():
    q, k, v = draw(15)
    k[:, :, 4:8] = 0.1 * k[:, :, 4:8] + 2  # one block that pooling describes well, so that the test sees both answers
    q = 0.2 * q + 1
    blocks, chosen = tile_blocks((12,), (4,)), torch.eye(3, dtype=torch.bool).expand(1, 2, 3, 3).clone()
    chosen[0, 1, 0, 2] = True
    out = rectified_attention(q, k, v, blocks, chosen, text=3)
    seen_back = set()
    for h in range(2):
        for a in range(3):
            qa = q[0, h, 4 * a : 4 * a + 4]
            qp, logits, back = qa.mean(0), [], []
            for b in range(3):
                kb = k[0, h, 4 * b : 4 * b + 4]
                kp = kb.mean(0)
                error = abs((qa - qp).abs().mean(0) @ kp) + abs(qp @ (kb - kp).abs().mean(0))
                back.append(not chosen[0, h, a, b] and abs(qp @ kp) > error)
                logits += [qp @ kp / math.sqrt(8)]
            logits += [qp @ k[0, h, 12 + t] / math.sqrt(8) for t in range(3)]
            p = torch.stack(logits).softmax(0)
            p = p * torch.tensor([4.0, 4, 4, 1, 1, 1])
            p = p / p.sum()
            kept = sum(p[b] for b in range(3) if not back[b]) + p[3:].sum()
            keys = [j for b in range(3) if chosen[0, h, a, b] for j in range(4 * b, 4 * b + 4)] + [12, 13, 14]
            sparse = (qa @ k[0, h, keys].T / math.sqrt(8)).softmax(-1) @ v[0, h, keys]
            added = sum((p[b] * v[0, h, 4 * b : 4 * b + 4].mean(0) for b in range(3) if back[b]), torch.zeros(8))
            seen_back.update(bool(back[b]) for b in range(3) if not chosen[0, h, a, b])
            torch.testing.assert_close(out[0, h, 4 * a : 4 * a + 4], kept * sparse + added)
    assert len(seen_back) == 2  # some dropped blocks came back and some did not
    torch.testing.assert_close(out[:, :, 12:], (weights(q, k) @ v)[:, :, 12:])


def test_nearer_to_dense_than_sparse_alone():
    field = torch.randn(1, 2, 8, 8, 8, dtype=torch.float64).cumsum(2).cumsum(3) / 6
    q, k, v = field.flatten(2, 3), field.flatten(2, 3).flip(1), torch.randn(1, 2, 64, 8, dtype=torch.float64)
    blocks = hilbert_blocks((8, 8), 4)
    chosen = critical_blocks(implicit_attention(q, k, blocks), drop=0.8)
    exact = weights(q, k) @ v
    error = [
        (out - exact).square().mean()
        for out in (attend_grid(q, k, v, blocks, chosen)[0], rectified_attention(q, k, v, blocks, chosen))
    ]
    assert error[1] < 0.7 * error[0]


def test_selection_by_loops():
    q, k, _ = draw(40)
    blocks = tile_blocks((40,), (4,))
    shares = implicit_attention(3 * q, k, blocks)
    chosen = critical_blocks(shares, drop=0.75, mass=0.6)
    counts = set()
    for row, found in zip(shares.blocks.flatten(0, 2), chosen.flatten(0, 2), strict=True):
        total, expected = 0.0, set()
        for b in row.argsort(descending=True).tolist():
            if total > 0.6 and len(expected) >= 2:
                break
            total += row[b].item()
            expected.add(b)
        assert set(found.nonzero()[:, 0].tolist()) == expected
        counts.add(len(expected))
    assert len(counts) > 1
    near = torch.zeros(10, 10, dtype=torch.bool)
    near[3, 7] = True
    assert critical_blocks(shares, neighbours=near)[..., 3, 7].all()


@pytest.mark.parametrize("shape", [(16, 16), (8, 8, 8), (4, 4)])
def test_hilbert_curve_steps_to_a_neighbour(shape):
    path = hilbert_blocks(shape, 4).tokens.flatten()
    assert sorted(path.tolist()) == list(range(math.prod(shape)))
    cells = torch.stack(torch.unravel_index(path, shape), -1)
    assert (cells.diff(dim=0).abs().sum(-1) == 1).all()


def test_hilbert_blocks_of_any_grid_and_their_neighbours():
    blocks = hilbert_blocks((3, 5), 4)
    assert sorted(t for t in blocks.tokens.flatten().tolist() if t >= 0) == list(range(15))
    x = torch.randn(2, 3, 15, 4)
    assert torch.equal(blocks.restore(blocks.permute(x)), x)
    home = {t: b for b, row in enumerate(blocks.tokens.tolist()) for t in row}
    touch = neighbour_blocks((3, 5), blocks)
    for a in range(4):
        for b in range(4):
            cells = [(divmod(s, 5), divmod(t, 5)) for s in range(15) for t in range(15) if (home[s], home[t]) == (a, b)]
            assert touch[a, b] == any(abs(s[0] - t[0]) + abs(s[1] - t[1]) <= 1 for s, t in cells)


def test_bad_input_is_refused():
    q, k, v = draw(8)
    blocks = tile_blocks((8,), (4,))
    with pytest.raises(InputError, match="without any"):
        rectified_attention(q, k, v, blocks, torch.zeros(2, 2, dtype=torch.bool), text=0)
    with pytest.raises(InputError, match="text"):
        rectified_attention(q, k, v, blocks, torch.ones(2, 2, dtype=torch.bool), text=1)
    with pytest.raises(InputError, match="smaller blocks"):
        hilbert_blocks((2, 3), 128)
    shares = implicit_attention(q, k, blocks)
    with pytest.raises(InputError, match="drop"):
        critical_blocks(shares, drop=1.0)
    with pytest.raises(InputError, match="map"):
        critical_blocks(shares, neighbours=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="map"):
        rectified_attention(q, k, v, blocks, torch.ones(2, 2))
    with pytest.raises(InputError, match="shares"):
        other = implicit_attention(q, k, tile_blocks((8,), (2,)))
        rectified_attention(q, k, v, blocks, torch.ones(2, 2, dtype=torch.bool), shares=other)
    with pytest.raises(InputError, match="of one grid"):
        neighbour_blocks((3, 3), blocks)
