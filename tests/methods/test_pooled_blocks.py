"""Pooled block top-k against means, products and sorting written out."""

import math

import pytest
import torch
from models import tiny
from reference import attend, causal, close, watch

import foveal
from foveal.methods.select.pooled_blocks import PooledBlocks

N, PROMPT, HEADS = 75, 70, 6


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(8))


def chosen(s, prompt, method):
    """[HEADS, n, n]: what each query of the prompt reads."""
    n, b = s.q.shape[1], method.block
    visible = causal(n).expand(HEADS, -1, -1).clone()
    for h in range(HEADS):
        k = s.k[h // 3, :prompt]
        for start in range(0, prompt, b):
            stop = min(start + b, prompt)
            budget = method.budget if isinstance(method.budget, int) else math.ceil(method.budget * stop - 1e-9)
            mean = s.q[h, start:stop].mean(0)
            scores = [(mean @ k[a : min(a + b, prompt)].mean(0)).item() for a in range(0, stop, b)]
            best = sorted(range(len(scores)), key=lambda a: (a not in (0, start // b), -scores[a]))
            read = torch.zeros(n, dtype=torch.bool)
            for a in best[: max(math.ceil(budget / b), len({0, start // b}))]:
                read[a * b : a * b + b] = True
            visible[h, start:stop] &= read
    return visible


@pytest.mark.parametrize(
    "method", [PooledBlocks(0.3, 8), PooledBlocks(24, 8), PooledBlocks(0.5, 5), PooledBlocks(1, 4)], ids=str
)
@pytest.mark.parametrize("pads", [None, (0, 13)])
def test_each_block_reads_the_blocks_that_fit_its_mean_query(pads, method, model, ids):
    unread = 0
    for _, _, s in watch(model, method, ids, (PROMPT,), pads).each():
        n = s.q.shape[1]
        visible = chosen(s, n - (N - PROMPT), method)
        assert close(s.out, attend(s, visible))
        assert visible[:, n - (N - PROMPT) :].sum() == causal(n)[n - (N - PROMPT) :].sum() * HEADS  # decode is dense
        unread += int((causal(n) & ~visible).sum())
    assert unread > 1000


def test_short_prompts_and_continued_texts_are_dense(model, ids):
    method = PooledBlocks(8, 16)
    for n in (32, 33):
        dense = [close(s.out, attend(s, causal(n)[None])) for _, _, s in watch(model, method, ids[:, :n], (n,)).each()]
        assert dense == [n == 32] * 4
    with torch.no_grad(), foveal.attach(model, method):
        cache = model(ids[:, :16]).past_key_values
        again = model(ids[:, 16:], past_key_values=cache).logits
    assert close(again, model(ids).logits[:, 16:], 1e-4)


def test_a_prompt_in_chunks_is_refused(model, ids):
    with (
        pytest.raises(foveal.InputError, match="needs the whole prompt"),
        foveal.attach(model, PooledBlocks()) as session,
        session.open_prompt(),
    ):
        model(ids)
