"""Pages: what only they can do. That they agree with length classes is checked in test_store.py and test_identities.py."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from models import tiny
from test_decode_launches import VIEWS, Launches

import foveal
from foveal import ops
from foveal.edits import Keep
from foveal.errors import InputError
from foveal.once import Once
from foveal.ops.ragged import Logit
from foveal.store import LayerStore, Layout

PAGES = Layout(paged=True)


def filled(length, heads=8, dim=128, layout=PAGES, dtype=torch.bfloat16) -> LayerStore:
    store = LayerStore(None, layout)
    key, value = torch.randn(2, 1, heads, length, dim).to(dtype)
    store.append(key, value, 0)
    return store


@pytest.mark.parametrize(("share", "times"), [(0.25, 3.8), (0.1, 9.0)])
def test_how_many_more_prompts_of_32k_fit(share, times):
    """Resident bytes after some decoding, room to grow included, against dense keys and values."""
    tokens = 32_768
    store = filled(int(share * tokens))
    store.apply(Keep(mask=store.token < int(share * tokens) - 1))
    for i in range(8):
        new = torch.zeros(1, 8, 1, 128, dtype=torch.bfloat16)
        store.append(new, new, tokens + i)
    assert tokens * 8 * 2 * 128 * 2 / store.nbytes >= times


def test_a_head_with_few_keys_takes_few_pages():
    store = filled(4096)
    few = torch.tensor([4096, 4096, 64, 64, 64, 64, 64, 64]).view(1, 8, 1)
    store.apply(Keep(mask=store.token < few))
    rows = store.classes[0]
    assert rows.pool.key.shape[0] == 2 * 128 + 6 * 2
    assert store.len.tolist() == [few.flatten().tolist()]


def test_pages_that_became_free_are_used_before_memory_grows():
    store = filled(64, heads=2, dim=8)
    for step in range(200):  # one in, one out
        new = torch.randn(1, 2, 1, 8).bfloat16()
        store.append(new, new, 64 + step)
        store.apply(Keep(drop=store.token.argmin(-1), optional=True))
    assert store.len.tolist() == [[64, 64]]
    assert store.classes[0].pool.key.shape[0] <= 2 * 2 + 2 * 4  # what it started with, and one growth


def test_a_step_done_by_a_graph_is_not_taken_for_one_the_host_saw():
    store = filled(64, heads=2, dim=8)
    rows = store.classes[0]
    assert rows.lengths() == [64, 64]
    rows.pool.length.copy_(torch.tensor([64, 65], dtype=torch.int32))  # one row lost a key for the one it gained
    rows.advance(1, seen=False)
    assert store.uniform is None and store.len.tolist() == [[64, 65]]
    assert rows.lengths() == [64, 65] and rows.bound == 65


@pytest.mark.parametrize(("format", "error", "share"), [("fp8", 0.04, 0.54), ("int8", 0.01, 0.54), ("int4", 0.1, 0.34)])
@pytest.mark.parametrize("method", [None, "h2o(budget=0.5)", "streaming-llm(budget=40)"])
def test_codes_go_with_any_method(format, error, share, method):
    model = tiny("llama", head_dim=64)
    ids = torch.randint(1, 120, (2, 110), generator=torch.Generator().manual_seed(2))

    def run(layout):
        with torch.no_grad(), foveal.attach(model, method, layout=layout):
            cache = model(ids[:, :100]).past_key_values
            logits = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(100, 110)]
        rows = cache.rows[0].classes[0].pool
        return torch.cat(logits, 1), sum(x.nbytes for x in ops.pages.pools(rows))

    (plain, bytes_), (coded, fewer) = run(PAGES), run(Layout(format=format))
    assert 0 < (coded - plain).norm() / plain.norm() < error
    assert fewer < share / 2 * bytes_  # the tiny model computes in 32 bits


@pytest.mark.parametrize("method", [None, "h2o(budget=0.5)", "streaming-llm(budget=40)", "snapkv(budget=0.5)"])
def test_the_newest_tokens_stay_as_they_came(method):
    """Whatever a method lets go, and however its slots move: the tokens of the residual window are exact, older ones are codes."""
    model, window = tiny("llama", head_dim=64), 32
    ids = torch.randint(1, 120, (2, 140), generator=torch.Generator().manual_seed(2))

    def run(layout):
        with torch.no_grad(), foveal.attach(model, method, layout=layout):
            cache = model(ids[:, :80]).past_key_values
            for i in range(80, 130):
                cache = model(ids[:, i : i + 1], past_key_values=cache).past_key_values
        rows = cache.rows[0]
        return rows.take([1]), rows

    # the first layer's keys and values are made from tokens alone, so both runs have the same ones
    for exact, coded in zip(run(PAGES), run(Layout(format="int4", residual=window)), strict=True):
        for name in ("keys", "values"):
            for b in range(exact.batch):
                for h in range(exact.heads):
                    truth = dict(zip(exact.token[b, h].tolist(), getattr(exact, name)()[b, h], strict=True))
                    found = zip(coded.token[b, h].tolist(), getattr(coded, name)()[b, h], strict=True)
                    found = {t: x for t, x in found if t < 130}
                    recent = [t for t in found if t >= 130 - window and t in truth]
                    older = [t for t in found if t < 130 - window and t in truth]
                    assert len(recent) > 4 and older
                    assert all(torch.equal(found[t], truth[t]) for t in recent)
                    assert all(not torch.equal(found[t], truth[t]) for t in older)


def test_a_residual_window_brings_attention_nearer():
    model = tiny("llama", head_dim=64)
    ids = torch.randint(1, 120, (2, 110), generator=torch.Generator().manual_seed(2))

    def run(layout):
        with torch.no_grad(), foveal.attach(model, layout=layout):
            cache = model(ids[:, :100]).past_key_values
            return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(100, 110)], 1)

    plain, coded, better = (
        run(layout) for layout in (PAGES, Layout(format="int4"), Layout(format="int4", residual=64))
    )
    assert 0 < (better - plain).norm() < 0.8 * (coded - plain).norm()
    assert torch.allclose(run(Layout(format="int4", residual=128)), plain, atol=1e-5)  # all of them are new


def test_layouts_that_cannot_be_are_refused():
    model = tiny("llama")
    with pytest.raises(InputError, match="there is no format"):
        foveal.attach(model, layout=Layout(residual=64))
    with pytest.raises(InputError, match="power of two from 32"):
        foveal.attach(model, layout=Layout(format="int4", residual=48))
    with pytest.raises(InputError, match="no storage format 'int3'"):
        foveal.attach(model, layout=Layout(format="int3"))
    with pytest.raises(InputError, match="stored in pages"):
        foveal.attach(model, layout=Layout(paged=False, format="int8"))


def test_bad_arguments_of_ragged_attention_are_named():
    pages = filled(40, heads=2, dim=16, dtype=torch.float32).classes[0].view
    q = torch.randn(2, 3, 16)
    with pytest.raises(InputError, match="expected q"):
        ops.attend_ragged(q[:, :, :8], pages, Logit(1.0))
    with pytest.raises(InputError, match="expected extra"):
        ops.attend_ragged(q, pages, Logit(1.0), extra=torch.zeros(2, 3, 7))
    with pytest.raises(InputError, match="last >= 1"):
        ops.attend_ragged(q, pages, Logit(1.0), window=(4, 0))
    with pytest.raises(InputError, match="want = 'all'"):
        ops.attend_ragged(q, pages, Logit(1.0), want="all")


def test_which_says_what_runs_and_why():
    pages = filled(40, heads=2, dim=16, dtype=torch.float32).classes[0].view
    route = ops.which("attend_ragged", torch.randn(2, 3, 16), pages, Logit(1.0))
    assert route.name == "torch" and "cpu" in route.why
    with pytest.raises(InputError, match="attend_blocks"):
        ops.which("attend_block")


def test_what_all_layers_share_is_computed_in_the_first():
    """A second layer that begins copies four tensors; one that keeps some keys gathers and copies, and asks no list of pages."""
    once, generator = Once(), torch.Generator().manual_seed(0)
    layers = [LayerStore(None, Layout(paged=True)) for _ in range(2)]
    seen, asked = [], VIEWS - {"empty"}
    for store in layers:
        key, value = torch.randn(2, 1, 3, 70, 16, generator=generator)
        slots = torch.stack([torch.randperm(70, generator=generator)[:41].sort().values for _ in range(3)])[None]
        with Launches(asked) as begun:
            store.append(key, value, 0, once)
        with Launches(asked) as kept:
            store.apply(Keep(slots=slots), once)
        at = slots[..., None].expand(-1, -1, -1, 16)
        assert torch.equal(store.keys(), key.gather(2, at)) and torch.equal(store.values(), value.gather(2, at))
        assert torch.equal(store.token, slots.int())
        key, value = torch.randn(2, 1, 3, 40, 16, generator=generator)
        with Launches(asked) as went_on:
            store.append(key, value, 70, once)
        assert torch.equal(store.keys()[:, :, 41:], key) and torch.equal(store.values()[:, :, 41:], value)
        assert torch.equal(store.token[0, 0, 41:], torch.arange(70, 110, dtype=torch.int32))
        seen = [Counter(x.seen) for x in (begun, kept, went_on)]
    assert seen[0] == Counter(cat=2, clone=2, split_with_sizes=1, empty=1)
    assert seen[1] == Counter(gather=1, arange=1, add=1, index_select=2, cat=3, clone=1, split_with_sizes=1, empty=1)
    grown = Counter(constant_pad_nd=4, arange=1, full_like=1)
    assert seen[2] == grown + Counter(copy_=2, fill_=1, index_select=1, add=1, index_put_=2, add_=1)


@pytest.mark.parametrize("length", [2, 31, 32, 33, 70, 96])
def test_pages_in_order_are_read_as_their_lists_say(length):
    """As long as no page was taken since; then the lists count."""
    store = LayerStore(None, Layout(paged=True))
    key, value = torch.randn(2, 2, 3, length, 16)
    store.append(key, value, 0)
    rows = store.classes[0]
    for _ in range(40):
        view, plain = rows.view, replace(rows.view, ordered=False)
        slots = torch.randint(0, rows.bound, (6, 9))
        assert torch.equal(view.read("key", key.dtype), plain.read("key", key.dtype))
        assert torch.equal(view.gather("value", slots, key.dtype), plain.gather("value", slots, key.dtype))
        assert rows.ordered == (rows.bound == length)
        store.append(*torch.randn(2, 2, 3, 1, 16), rows.bound)


@pytest.mark.parametrize(("length", "drops"), [(33, 1), (33, 2), (66, 2), (64, 3)])
def test_a_page_that_comes_back_may_go_to_another_row(length, drops):
    """Pages were in order; rows gave some up, and take them again in another order."""
    stores = [LayerStore(None, Layout(paged=paged)) for paged in (True, False)]
    generator = torch.Generator().manual_seed(length)
    key, value = torch.randn(2, 2, 3, length, 16, generator=generator)
    slot = torch.randint(0, length - 4, (2, 3), generator=generator)
    new = torch.randn(3, 2, 2, 3, 1, 16, generator=generator)
    for store in stores:
        store.append(key, value, 0)
        for _ in range(drops):
            store.apply(Keep(drop=slot))
        for i, (k, v) in enumerate(new):
            store.append(k, v, length + i)
    pages, plain = stores
    assert torch.equal(pages.token, plain.token)
    assert torch.equal(pages.keys(), plain.keys()) and torch.equal(pages.values(), plain.values())
