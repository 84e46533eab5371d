"""Quest against pages, bounds and a masked softmax written out."""

# The authors' choice of pages (mit-han-lab/Quest, evaluation/quest_attention.py) was run on the CPU with queries and
# keys of the tiny model with as many KV heads as query heads: the same outputs wherever it holds the newest page,
# which here is always read and there only if its bound is large enough.

import math

import pytest
import torch
from models import tiny
from reference import attend, causal, close, hook, logits, over_heads, thin, thinned, watch

import foveal
from foveal.methods.select.quest import Quest

N, PROMPT, HEADS, KV = 66, 60, 6, 2


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(8))


def chosen_keys(s, i, g, held, page, count):
    """Token ids read by KV head g for query i: the newest page and the pages with the largest bounds."""
    pages = [held[a : a + page] for a in range(0, len(held), page)]
    bounds = []
    for tokens in pages:
        k = s.k[g, tokens]
        low, high = k.min(0).values, k.max(0).values
        q = s.q[g * 3 : g * 3 + 3, i]
        bounds.append((q * torch.where(q > 0, high, low)).sum(-1).max().item())
    older = sorted(range(len(pages) - 1), key=lambda p: -bounds[p])[: max(0, count - 1)]
    return [t for p in [*older, len(pages) - 1] for t in pages[p]]


def selected(s, base, prompt, method, layer):
    """What each query sees, [kv_heads, n, n], of what `base` leaves."""
    visible = base.clone()
    n = s.q.shape[1]
    for i in range(prompt, n) if layer >= method.skip else ():
        budget = method.budget if isinstance(method.budget, int) else math.ceil(method.budget * (i + 1) - 1e-9)
        for g in range(KV):
            held = base[g, i].nonzero().flatten().tolist()
            visible[g, i] = False
            visible[g, i, chosen_keys(s, i, g, held, method.page, max(1, budget // method.page))] = True
    return visible


@pytest.mark.parametrize(
    "method", [Quest(16, 4, 0), Quest(21, 5, 1), Quest(8, 8, 0), Quest(3, 8, 0), Quest(0.3, 4, 0), Quest(12, 1, 0)]
)
@pytest.mark.parametrize("how", ["whole", "padded", "ragged"])
def test_it_reads_the_pages_with_the_largest_bounds(how, method, model, ids):
    pads = (0, 13) if how == "padded" else None
    seen = watch(model, thin() | method if how == "ragged" else method, ids, (PROMPT,), pads)
    read = 0
    for _, layer, s in seen.each():
        n = s.q.shape[1]
        base = thinned(n, (PROMPT,), KV) if how == "ragged" else causal(n).expand(KV, -1, -1)
        visible = selected(s, base, n - (N - PROMPT), method, layer)
        assert close(s.out, attend(s, visible))
        read += (base & ~visible).sum()
        if layer >= method.skip:
            assert visible[:, -1].sum(-1).max() <= max(method.page, tokens(method.budget, n))
            assert visible[:, range(n), range(n)].all()  # the newest key is always read
    assert read > 0
    assert (seen.cache.lengths.amax((0, 1)) == (torch.tensor([36, 46]) if how == "ragged" else N)).all()


def tokens(budget, n):
    return budget if isinstance(budget, int) else math.ceil(budget * n)


@pytest.mark.parametrize("how", ["whole", "ragged"])
def test_the_bound_is_never_below_a_logit_of_the_page(how, model, ids):
    method, gaps = Quest(8, 4, 0), []

    def after(step):
        if step.decode:
            bound = method._bounds(step) * step.scale
            z = step.group(step.scores()[:, :, 0], "max")
            pages = torch.arange(step.T) // 4
            gaps.append((bound.gather(2, pages.expand_as(z)) - z)[z > -torch.inf])

    look = hook(after=after)
    watch(model, thin() | look if how == "ragged" else look, ids, (PROMPT,))
    assert len(gaps) == 2 * (N - PROMPT)
    gaps = torch.cat(gaps)
    assert gaps.min() >= -1e-5 and gaps.median() < 10


def test_a_page_of_one_key_is_exact_top_k(model, ids):
    """The bound of a page with one key is its logit: of a KV head with one query head it picks the largest logits."""
    single = tiny("llama", num_hidden_layers=1, num_key_value_heads=6)
    seen = watch(single, Quest(10, 1, 0), ids, (PROMPT,))
    for _, _, s in seen.each():
        z = logits(s).masked_fill(~causal(N), -torch.inf)
        best = z.clone()
        best[:, range(N), range(N)] = torch.inf
        visible = causal(N) & (best >= best.topk(10, -1).values[..., -1:])
        visible[:, :PROMPT] = causal(N)[:PROMPT]
        assert close(s.out, attend(s, visible))


def test_a_budget_of_everything_is_dense(model, ids):
    for _, _, s in watch(model, Quest(N, 16, 0), ids, (PROMPT,)).each():
        assert close(s.out, attend(s, over_heads(causal(N)[None], HEADS)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"page": 0}, "page = 0: .*at least 1"),
        ({"skip": -1}, "skip = -1: .*at least 0"),
        ({"budget": 0}, "budget = 0: expected"),
    ],
)
def test_bad_values(wrong, message):
    with pytest.raises(foveal.InputError, match=message):
        Quest(**wrong)
