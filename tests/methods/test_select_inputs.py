"""Methods that choose keys of a prompt beside what keeps fewer, on texts that are too short, and selections that ask too much."""

import pytest
import torch
from models import tiny
from reference import attend, causal, close, hook, watch

import foveal
from foveal.selection import All, Band, Blocks, Lists

N = 40


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (1, N), generator=torch.Generator().manual_seed(8))


METHODS = [
    "minference", "flex-prefill", "xattention", "pooled-blocks", "power-attention", "token-sparse", "hip", "hisa",
    "dhsa(boundaries='even')", "flux(decision='sparse')",
]  # fmt: skip


@pytest.mark.parametrize("length", [1, 3, N - 2])
@pytest.mark.parametrize("method", METHODS)
def test_texts_shorter_than_a_block_are_dense(method, length, model, ids):
    for _, _, s in watch(model, foveal.get_method(method), ids, (length,)).each():
        assert close(s.out, attend(s, causal(N)[None]))


def chosen(model, ids, selection):
    """Outputs of a prompt's heads under a selection, [1, heads, N, head_dim] for each layer."""
    found = []

    def note(step, out):
        if not step.decode:
            found.append(out)
        return out

    with torch.no_grad(), foveal.attach(model, hook(select=lambda step: All() if step.decode else selection, mix=note)):
        got = model(ids)
        after = model(ids[:, :1], past_key_values=got.past_key_values).logits
    assert got.logits.isfinite().all() and after.isfinite().all()
    return found


FULL = torch.ones(1, 6, 5, 5, dtype=torch.bool)
SLOTS = torch.arange(N).expand(1, 2, 5, -1)


@pytest.mark.parametrize(
    ("ahead", "cut"),
    [
        (Blocks(FULL, 8), Blocks(FULL.tril(), 8)),
        (Lists(SLOTS, 8), Lists(SLOTS.masked_fill(torch.arange(7, N, 8)[:, None] < SLOTS, -1), 8)),
    ],
    ids=["blocks", "lists"],
)
def test_what_lies_after_a_query_is_never_read(ahead, cut, model, ids):
    for a, b in zip(chosen(model, ids, ahead), chosen(model, ids, cut), strict=True):
        assert close(a, b)
    for a, b in zip(chosen(model, ids, ahead), chosen(model, ids, Band(0, N)), strict=True):
        assert close(a, b)


EMPTY = FULL.tril().clone()
EMPTY[:, :, 3] = False


@pytest.mark.parametrize(
    ("selection", "lost"),
    [
        (Blocks(EMPTY, 8), range(24, 32)),
        (Blocks(FULL.triu(1), 8), range(N)),  # all it shows lies ahead
        (Lists(SLOTS.masked_fill(torch.arange(5)[:, None] == 2, -1), 8), range(16, 24)),
        (Lists(SLOTS + N, 8), range(N)),
    ],
    ids=["blocks", "blocks ahead", "lists", "lists beyond"],
)
def test_queries_without_keys_give_zero(selection, lost, model, ids):
    for out in chosen(model, ids, selection):
        empty = (out == 0).all(-1)[0].all(0)
        assert empty.nonzero()[:, 0].tolist() == [*lost]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Blocks(FULL[..., :4], 8), "expected a bool block map"),
        (Blocks(FULL[:, :4], 8), "expected a bool block map"),
        (Blocks(FULL.int(), 8), "expected a bool block map"),
        (Blocks(FULL, 0), "block size of at least 1"),
        (Lists(SLOTS[:, :, :3], 8), "one list for each block"),
    ],
)
def test_maps_and_lists_of_other_prompts_are_refused(selection, message, model, ids):
    with pytest.raises(foveal.InputError, match=message):
        chosen(model, ids, selection)


def test_a_window_without_the_query_is_refused():
    with pytest.raises(foveal.InputError, match="every query sees itself"):
        Band(4, 0)


@pytest.mark.parametrize("pattern", ["grat", "draft", "neighborhood"])
def test_patterns_without_an_order_are_no_methods(pattern, model):
    with pytest.raises(foveal.InputError, match=f"'{pattern}'"):
        foveal.attach(model, pattern)


# ---------------------------------------------------------------------- beside methods that keep fewer keys


CHOICES = [
    "minference(budget=0.3, last=8, sink=4, recent=8, block=8)",
    "flex-prefill(gamma=0.5, tau=0.07, least=8, block=8)",
    "xattention(threshold=0.5, block=8, stride=4)",
    "pooled-blocks(budget=0.4, block=8)",
    "token-sparse(drop=0.3, least=8, window=8, kernel=3, layers=(0, 1))",
    "dhsa(budget=0.4, block=8, chunks=2, first=2, local=8, last=4, boundaries='even')",
]


@pytest.mark.parametrize("keep", ["snapkv(budget=12, window=4, kernel=3)", "h2o(budget=12)"])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_prompt_read_sparsely_may_be_kept_in_part(choice, keep, model, ids):
    """The prompt as under the choice alone; then every head attends to what its cache still holds."""
    prompt = N - 5
    alone = watch(model, foveal.get_method(choice), ids, (prompt,))
    dense = watch(model, None, ids, (prompt,))
    both = watch(model, foveal.get_method(f"{choice} | {keep}"), ids, (prompt,))
    assert both.cache.nbytes < 0.8 * alone.cache.nbytes
    for (_, layer, s), (_, _, a), (_, _, d) in zip(both.each(), alone.each(), dense.each(), strict=True):
        assert close(s.out[:, :prompt], a.out[:, :prompt]) and not close(a.out[:, :prompt], d.out[:, :prompt], 1e-3)
        held = [[*both.kept[call][layer][0]] for call in range(5)]
        seen = torch.zeros(2, N, N, dtype=torch.bool)
        for call, rows in enumerate(held):
            for g, tokens in enumerate(rows):
                assert len(tokens) < prompt // 2
                seen[g, prompt + call, [*tokens, prompt + call]] = True
        assert close(s.out[:, prompt:], attend(s, seen)[:, prompt:])
