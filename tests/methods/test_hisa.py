"""HISA and its indexers against scores written out token by token."""

import math

import pytest
import torch
from models import tiny
from reference import attend, causal, close, thin, thinned, watch

import foveal
from foveal.methods.select.hisa import Hisa
from foveal.ops import index_flat, index_two_stage

N, PROMPT, KV = 75, 66, 2


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(8))


def picked(score, position, size, m, blocks, mean):
    """Tokens chosen among 0 .. position by score [n], of the best blocks by `mean` of the keys of each block."""
    own = position // m.block
    order = sorted(range(own + 1), key=lambda b: -(math.inf if b in (0, own) else mean[b]))[:blocks]
    inside = [t for b in sorted(order) for t in range(b * m.block, min((b + 1) * m.block, position + 1))]
    return sorted(inside, key=lambda t: -score[t])[:size]


def chosen(s, m, prompt_size, decode_size):
    n, group = s.q.shape[1], s.q.shape[0] // KV
    seen = torch.zeros(KV, n, n, dtype=torch.bool)
    for g in range(KV):
        z = s.q[g * group : (g + 1) * group].sum(0) @ s.k[g].T
        for i in range(PROMPT, n) if m.query_block > 1 else range(n):
            stop = PROMPT if i < PROMPT else i + 1  # a block's mean is of all keys there are
            blocks = [s.k[g, b : min(b + m.block, stop)].mean(0) for b in range(0, stop, m.block)]
            mean = [(s.q[g * group : (g + 1) * group, i].sum(0) @ x).item() for x in blocks]
            size = prompt_size if i < PROMPT else decode_size
            if i < PROMPT:
                seen[g, i, picked(z[i].tolist(), i, size, m, m.blocks, mean)] = True
            else:  # the own key is read whatever its score
                score = z[i].tolist()
                score[i] = math.inf
                seen[g, i, picked(score, i, size, m, m.blocks, mean)] = True
    return seen


@pytest.mark.parametrize("method", [Hisa(12, 4, 5), Hisa(20, 7, 4), Hisa(9, 3, 4)], ids=str)
def test_queries_read_the_best_tokens_of_the_best_blocks(method, model, ids):
    for _, _, s in watch(model, method, ids, (PROMPT,)).each():
        visible = chosen(s, method, method.budget, method.budget)
        assert (visible.sum(-1) == (torch.arange(N) + 1).clamp(max=method.budget)).all()
        assert close(s.out, attend(s, visible))


def test_queries_of_a_block_share_the_tokens_best_for_any(model, ids):
    method = Hisa(12, 8, 9, query_block=5)  # all blocks are searched
    for _, _, s in watch(model, method, ids, (PROMPT,)).each():
        visible = chosen(s, method, 12, 12)
        z = s.q.unflatten(0, (KV, -1)).sum(1) @ s.k.mT
        z = z.masked_fill(~causal(N), -torch.inf)[:, :PROMPT]
        for a in range(0, PROMPT, 5):
            best = z[:, a : a + 5].amax(1).masked_fill(torch.arange(N) >= a + 5, -torch.inf).topk(12, -1)
            read = torch.zeros(KV, N, dtype=torch.bool).scatter_(1, best.indices, best.values > -torch.inf)
            visible[:, a : min(a + 5, PROMPT)] = read[:, None]
        visible &= causal(N)
        assert visible.any(-1).all() and close(s.out, attend(s, visible))


def test_with_blocks_for_all_tokens_it_is_top_k_of_the_summed_logits(model, ids):
    for _, _, s in watch(model, Hisa(10, 8, 10), ids, (PROMPT,)).each():
        z = s.q.unflatten(0, (KV, -1)).sum(1) @ s.k.mT
        z = z.masked_fill(~causal(N), -torch.inf)
        own = torch.eye(N, dtype=torch.bool) & (torch.arange(N) >= PROMPT)
        best = z.masked_fill(own, torch.inf).topk(10).indices
        visible = torch.zeros(KV, N, N, dtype=torch.bool).scatter_(2, best, True) & causal(N)
        assert close(s.out, attend(s, visible))


def test_rows_that_lost_keys(model, ids):
    method = Hisa(10, 64, 1)  # one block holds all there is
    for _, _, s in watch(model, thin() | method, ids, (PROMPT,)).each():
        base = thinned(N, (PROMPT,), KV)
        z = (s.q.unflatten(0, (KV, -1)).sum(1) @ s.k.mT).masked_fill(~base, -torch.inf)
        z = z.masked_fill(torch.eye(N, dtype=torch.bool), torch.inf)
        visible = torch.zeros(KV, N, N, dtype=torch.bool).scatter_(2, z.topk(10).indices, True) & base
        assert close(s.out[:, PROMPT:], attend(s, visible)[:, PROMPT:])


# ---------------------------------------------------------------------- indexers


def drawn(heads=4, length=90, total=90, dim=8, batch=2):
    g = torch.Generator().manual_seed(3)
    q = torch.randn(batch, heads, length, dim, generator=g, dtype=torch.float64)
    return (
        q,
        torch.randn(batch, heads, length, generator=g).double(),
        torch.randn(batch, total, dim, generator=g).double(),
    )


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize(("length", "relu"), [(90, True), (17, True), (90, False)])
def test_a_flat_indexer_takes_the_largest_scores(length, relu, weighed):
    q, w, k = drawn(length=length)
    got = index_flat(q, w if weighed else None, k, 7, relu=relu)
    for b in range(2):
        for t in range(length):
            position = 90 - length + t
            z = q[b, :, t] @ k[b, : position + 1].T
            z = z.clamp(min=0) if relu else z
            score = (z * w[b, :, t, None]).sum(0) if weighed else z.sum(0)
            want = sorted(score.argsort(descending=True, stable=True)[:7].tolist())
            row = [x for x in got[b, t].tolist() if x >= 0]
            assert len(row) == min(7, position + 1)
            assert row == want


@pytest.mark.parametrize("length", [90, 17])
def test_two_stages_with_all_blocks_are_flat(length):
    q, w, k = drawn(length=length)
    assert torch.equal(index_two_stage(q, w, k, 11, block=8, blocks=12), index_flat(q, w, k, 11))
    assert not torch.equal(index_two_stage(q, w, k, 11, block=8, blocks=3), index_flat(q, w, k, 11))


def test_keys_that_are_equal_inside_blocks_are_ranked_exactly():
    """The mean of a block is then its every key, so the best blocks hold the best tokens."""
    q, w, k = drawn(total=96, length=96)
    k = k[:, ::8].repeat_interleave(8, 1)
    got, want = index_two_stage(q, w, k, 16, block=8, blocks=4), index_flat(q, w, k, 16)
    scores = lambda ids: torch.stack(
        [((q[b, :, -1] @ k[b].T).relu() * w[b, :, -1, None]).sum(0)[ids[b, -1].long()].sort().values for b in range(2)]
    )
    assert close(scores(got), scores(want))


def test_local_structure_is_found_by_a_random_indexer():
    """Keys that drift slowly, as neighbours in a text do: nearly the flat indexer's tokens at a quarter of its scores."""
    g = torch.Generator().manual_seed(5)
    k = torch.randn(1, 2048, 16, generator=g).cumsum(1)
    k = (k - k.mean(1, keepdim=True)) / k.std(1, keepdim=True)
    q, w = torch.randn(1, 4, 64, 16, generator=g), torch.rand(1, 4, 64, generator=g)
    a, b = index_two_stage(q, w, k, 128, block=32, blocks=16), index_flat(q, w, k, 128)
    same = [len(set(x) & set(y)) / len(set(x) | set(y)) for x, y in zip(a[0].tolist(), b[0].tolist(), strict=True)]
    assert sum(same) / len(same) > 0.9


def test_bad_shapes_and_values():
    q, w, k = drawn()
    with pytest.raises(foveal.InputError, match="expected q "):
        index_flat(q, w[:, :2], k, 4)
    with pytest.raises(foveal.InputError, match="budget of 20 tokens, got 2 x 8"):
        index_two_stage(q, w, k, 20, block=8, blocks=2)
    with pytest.raises(foveal.InputError, match="runs of 1 to 4 queries, as many as the budget has tokens, got 5"):
        index_flat(q, w, k, 4, size=5)
    with pytest.raises(foveal.InputError, match="cannot hold a budget of 2048"):
        Hisa(blocks=4)
    with pytest.raises(foveal.InputError, match="block = 0"):
        Hisa(block=0)
    with pytest.raises(foveal.InputError, match="query_block = 17"):
        Hisa(16, 4, 4, query_block=17)
