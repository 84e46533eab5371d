"""HiP against its search written out with lists, and what the search can find."""

import math

import pytest
import torch
from models import tiny
from reference import attend, causal, close, stays, thin, thinned, watch

import foveal
from foveal.methods.select.hip import HiP
from foveal.ops.tree import halve

N, PROMPT, KV = 75, 66, 2


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(8))


def found(q, k, newest, m, size, held=lambda t: True):
    """Keys a search finds for queries q [rows, head_dim] of which the first is token `newest`, among the tokens that are held."""
    wanted = max(1, (size - m.sink - m.recent) // m.key_block)
    stop = newest + 1 - m.recent
    count = max(0, math.ceil((stop - m.sink) / m.key_block))

    def tokens(b):
        return [t for t in range(m.sink + b * m.key_block, m.sink + (b + 1) * m.key_block) if t < stop and held(t)]

    def best(node):
        stands = node[0] if m.representative == "first" else sum(node) // 2
        return max([-math.inf, *(q @ k[tokens(stands)].T).flatten().tolist()])

    nodes = [(i * count // wanted, (i + 1) * count // wanted) for i in range(wanted)]
    while any(r - l > 1 for l, r in nodes):
        halves = [x for l, r in nodes for x in ((l, (l + r) // 2), ((l + r) // 2, r)) if x[0] < x[1]]
        nodes = sorted(halves, key=best, reverse=True)[:wanted]
    return {t for l, r in nodes if l < r for t in tokens(l)}


def chosen(s, m, size):
    """[KV, N, N]: what each query reads."""
    n, group = s.q.shape[1], s.q.shape[0] // KV
    index = torch.arange(n)
    seen = torch.zeros(KV, n, n, dtype=torch.bool)
    for g in range(KV):
        q = s.q[g * group : (g + 1) * group]
        for a in range(0, PROMPT, m.query_block):
            rows = torch.arange(a, a + m.query_block, m.stride).clamp(max=PROMPT - 1)
            keys = found(q[:, rows].flatten(0, 1), s.k[g], a, m, size)
            keys |= {*range(m.sink), *range(a + 1 - m.recent, a + m.query_block)}
            seen[g, a : min(a + m.query_block, PROMPT)] = torch.tensor([j in keys for j in range(n)])
        for i in range(PROMPT, n):
            keys = found(q[:, i], s.k[g], i, m, size) | {*range(m.sink), *range(i + 1 - m.recent, i + 1)}
            seen[g, i] = torch.tensor([j in keys for j in range(n)])
    return seen & (index[:, None] >= index)


METHODS = [
    HiP(24, 2, 4, 8, 2, dense=1),
    HiP(20, 0, 1, 1, 1, "middle", dense=0),
    HiP(30, 5, 9, 16, 3, "middle", stride=2, dense=0),
    HiP(8, 4, 6, 8, 4, dense=1),  # too small for both ends: one block
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_queries_read_what_the_search_finds(method, model, ids):
    unread = 0
    for _, layer, s in watch(model, method, ids, (PROMPT,)).each():
        visible = causal(N).expand(KV, -1, -1) if layer < method.dense else chosen(s, method, method.budget)
        assert close(s.out, attend(s, visible))
        unread += int((causal(N) & ~visible).sum())
    assert unread > 1000


def test_rows_that_lost_keys_are_searched_by_token(model, ids):
    method = HiP(20, 2, 4, 8, 2, dense=0)  # every block of 2 still holds a key
    for _, _, s in watch(model, thin() | method, ids, (PROMPT,)).each():
        visible = thinned(N, (PROMPT,), KV)
        for g in range(KV):
            here = lambda t, g=g: t >= PROMPT or bool(stays(torch.tensor(t), g))
            for i in range(PROMPT, N):
                keys = found(s.q[3 * g : 3 * g + 3, i], s.k[g], i, method, 20, here)
                keys |= {0, 1, *range(i - 3, i + 1)}
                visible[g, i] &= torch.tensor([j in keys for j in range(N)])
        assert close(s.out[:, PROMPT:], attend(s, visible)[:, PROMPT:])


@pytest.mark.parametrize("representative", ["first", "middle", "random"])
@pytest.mark.parametrize(("count", "wanted"), [(37, 4), (64, 8), (5, 7), (1, 1), (0, 3)])
def test_every_block_can_be_found(representative, count, wanted):
    """A block wins where all that stands for its groups is preferred: force each in turn."""
    for goal in range(count):

        def score(blocks, goal=goal):  # nearness to the goal: what locality of attention promises
            return -(blocks - goal).abs().double()

        got = halve(torch.tensor([count]), wanted, wanted, max(count, 1), score, "middle")[0].tolist()
        assert goal in got
        exact = halve(
            torch.tensor([count]), wanted, wanted, max(count, 1), lambda b: torch.rand(b.shape), representative
        )
        valid = [b for b in exact[0].tolist() if b >= 0]
        assert len(valid) == len(set(valid)) == min(wanted, count) and valid == sorted(valid)
        assert all(0 <= b < count for b in valid)


def test_a_smooth_peak_is_found_as_exactly_as_by_top_k():
    z = -((torch.arange(200.0) - 71.3) ** 2)
    got = halve(torch.tensor([200]), 16, 16, 200, lambda b: z[b.clamp(min=0)], "middle")[0]
    assert got.tolist() == z.topk(16).indices.sort().values.tolist()


def test_lists_may_want_different_numbers():
    z = torch.rand(300, generator=torch.Generator().manual_seed(1))
    count, wanted = torch.tensor([300, 120, 3, 0]), torch.tensor([9, 4, 6, 2])
    got = halve(count, wanted, 9, 300, lambda b: z[b.clamp(min=0)])
    for row, n, w in zip(got, count.tolist(), wanted.tolist(), strict=True):
        alone = halve(torch.tensor([n]), w, w, 300, lambda b: z[b.clamp(min=0)])[0]
        assert row[row >= 0].tolist() == alone[alone >= 0].tolist()


def test_only_a_logarithm_of_the_blocks_is_scored():
    scored = []

    def score(blocks):
        scored.append(blocks.shape[-1])
        return torch.rand(blocks.shape)

    halve(torch.tensor([1 << 16]), 64, 64, 1 << 16, score)
    assert sum(scored) == 2 * 64 * 10


def test_a_budget_for_everything_is_dense(model, ids):
    for _, _, s in watch(model, HiP(1.0, 2, 4, 8, 2, dense=0), ids, (PROMPT,)).each():
        assert close(s.out, attend(s, causal(N)[None]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"recent": 0}, "recent = 0"),
        ({"key_block": 0}, "key_block = 0"),
        ({"representative": "last"}, "representative = 'last': expected one of first, middle, random"),
        ({"budget": 0.0}, "budget = 0.0"),
    ],
)
def test_bad_values(wrong, message):
    with pytest.raises(foveal.InputError, match=message):
        HiP(**wrong)
