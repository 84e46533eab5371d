"""FlexPrefill against its steps written out head by head."""

import math

import pytest
import torch
from models import tiny
from reference import attend, causal, close, watch, weights

import foveal
from foveal.methods.select.flex_prefill import FlexPrefill

N, PROMPT, HEADS = 110, 104, 6


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(8))


def needed(mass, gamma, block, floor):
    held, tokens = 0.0, 0
    for x in sorted(mass.tolist(), reverse=True):
        held, tokens = held + x, tokens + 1
        if held >= gamma:
            break
    return max(floor, tokens // block + 1)


def divergence(p, q):
    middle = (p + q) / 2
    kl = lambda x: sum(a * math.log(a / m) for a, m in zip(x.tolist(), middle.tolist(), strict=True) if a > 0)
    return math.sqrt(max(0.0, (kl(p) + kl(q)) / 2))


def chosen(s, prompt, m):
    """[HEADS, n, n] that each query reads, and which heads trust their pooled queries."""
    n, b = s.q.shape[1], m.block
    count = math.ceil(prompt / b)
    visible, aware = causal(n).expand(HEADS, -1, -1).clone(), []
    w = weights(s, causal(n)[None])[:, prompt - b : prompt, :prompt]
    block = torch.arange(prompt) // b
    starts = range(0, prompt, b)
    for h in range(HEADS):
        vertical, slash = w[h].mean(0), torch.zeros(prompt).double()
        for i in range(b):
            for j in range(prompt - b + i + 1):
                slash[prompt - b + i - j] += w[h, i, j] / b
        v_blocks, s_blocks = (torch.tensor([x[a : a + b].sum() for a in starts]) for x in (vertical, slash))
        k = torch.stack([s.k[h // 3, a : min(a + b, prompt)].mean(0) for a in starts])
        q = torch.stack([s.q[h, a : min(a + b, prompt)].mean(0) for a in starts])
        pooled = (s.q[h, prompt - b : prompt].mean(0) @ k.T / 4).softmax(0)
        aware.append(divergence(pooled, v_blocks) < m.tau)
        floor = math.ceil(m.least / b)
        counts = [floor if aware[-1] else needed(x, m.gamma, b, floor) for x in (vertical, slash)]
        v_blocks[0] = s_blocks[0] = math.inf
        columns, diagonals = (x.argsort(descending=True)[:k] for x, k in zip((v_blocks, s_blocks), counts, strict=True))
        cells = torch.zeros(count, count, dtype=torch.bool)
        for i in range(count):
            for j in range(i + 1):
                cells[i, j] = j in columns or i - j in diagonals
        if aware[-1]:
            p = (q @ k.T / 4).masked_fill(~causal(count), -math.inf).softmax(-1)
            held = 0.0
            for at in p.flatten().argsort(descending=True).tolist():
                held += p.flatten()[at].item()
                if held > m.gamma * count:
                    break
                cells[at // count, at % count] |= at % count <= at // count
        visible[h, :prompt, :prompt] &= cells[block][:, block]
    return visible, aware


METHODS = [
    FlexPrefill(0.5, 0.07, 8, 8),
    FlexPrefill(0.9, 0.0, 16, 8),  # every head vertical-slash
    FlexPrefill(0.6, 1.0, 8, 4),  # every head query-aware
    FlexPrefill(0.4, 0.08, 10, 7),  # blocks that do not divide the prompt
]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("pads", [None, (0, 13)])
def test_heads_choose_as_the_paper_says(pads, method, model, ids):
    unread, kinds = 0, []
    for _, _, s in watch(model, method, ids, (PROMPT,), pads).each():
        n = s.q.shape[1]
        visible, aware = chosen(s, n - (N - PROMPT), method)
        assert close(s.out, attend(s, visible))
        unread += int((causal(n) & ~visible).sum())
        kinds += aware
    assert unread > 500
    assert {0.0: not any(kinds), 1.0: all(kinds)}.get(method.tau, 0 < sum(kinds) < len(kinds))


@pytest.mark.parametrize("method", [FlexPrefill(1.0, 0.1, 8, 8), FlexPrefill(0.2, 0.1, PROMPT, 8)], ids=str)
def test_everything_is_dense(method, model, ids):
    for _, _, s in watch(model, method, ids, (PROMPT,)).each():
        assert close(s.out, attend(s, causal(N)[None]))


def test_bad_values():
    for wrong in ({"gamma": 0}, {"gamma": 1.1}, {"tau": -1}, {"least": 0}, {"block": 0}):
        with pytest.raises(foveal.InputError, match=f"^{next(iter(wrong))} = "):
            FlexPrefill(**wrong)
