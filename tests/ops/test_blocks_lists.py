"""Block lists, and attention over them in PyTorch: unequal blocks, packed sequences, entropy, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.errors import InputError
from foveal.ops import reference, which
from foveal.ops.block_lists import BlockLists
from foveal.ops.blocks import attend_blocks

SCALE = 0.2


def problem(heads=3, kv_heads=1, length=70, total=100, dim=16, dtype=torch.float32, batch=1):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, length, dim, generator=g, dtype=torch.float64).to(dtype)
    k, v = (torch.randn(batch, kv_heads, total, dim, generator=g, dtype=torch.float64).to(dtype) for _ in "kv")
    return q, k, v


def random_map(q, k, query_block, key_block, density=0.5):
    shape = *q.shape[:2], -(-q.shape[2] // query_block), -(-k.shape[2] // key_block)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density


def seen_by(block_map, query_block, key_block, length, total):
    full = block_map.repeat_interleave(query_block, -2).repeat_interleave(key_block, -1)
    return full[..., :length, :total]


def entropy_of(q, k, lse, visible, **options):
    p = reference.probabilities(reference.logits(q, k, scale=SCALE, visible=visible, **options), lse)
    return -torch.special.xlogy(p, p).sum(-1)


def close(got, expected, tolerance=3e-5):
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
def test_lists_and_map_are_inverse(rows, columns, density, seed):
    block_map = torch.rand(2, 3, rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    lists = BlockLists.of(block_map, 16, 16)
    assert lists.counts.dtype == lists.indices.dtype == torch.int32
    for place in [(0, 0, 0), (1, 2, rows - 1)]:
        expected = block_map[place].nonzero()[:, 0].tolist()
        assert lists.indices[place].tolist() == expected + [columns] * (columns - len(expected))
        assert lists.counts[place] == len(expected)
    assert torch.equal(lists.map(columns), block_map)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_band_lists_hold_just_the_blocks_a_band_touches(data):
    draw = data.draw
    total = draw(st.integers(1, 150))
    length = draw(st.integers(1, total))
    sizes = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    sink = draw(st.lists(st.integers(0, 170), min_size=2, max_size=2))
    recent = draw(st.lists(st.one_of(st.integers(0, 170), st.just(2**31 - 1)), min_size=2, max_size=2))
    lists = BlockLists.band(length, total, sink, recent, sizes, 2, batch=2)
    visible = reference.band(length, total, sink, [min(r, total) for r in recent])
    nq, nk = -(-length // sizes[0]), -(-total // sizes[1])
    padded = torch.zeros(2, nq * sizes[0], nk * sizes[1], dtype=torch.bool)
    padded[:, :length, :total] = visible
    touched = padded.unflatten(1, (nq, sizes[0])).unflatten(3, (nk, sizes[1])).any(4).any(2)
    assert torch.equal(lists.map(nk), touched[None].expand(2, -1, -1, -1))
    assert int(lists.counts.max()) <= lists.indices.shape[3] <= nk
    assert bool((lists.map(nk).sum(-1) == lists.counts).all())


@pytest.mark.parametrize("sizes", [(16, 16), (16, 32), (32, 16), (12, 8), (7, 5), (128, 64)])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 100), (70, 100), (100, 100)])
def test_unequal_blocks_as_map_and_as_lists(lengths, sizes):
    q, k, v = problem(3, 1, *lengths, batch=2)
    block_map = random_map(q, k, *sizes)
    visible = seen_by(block_map, *sizes, *lengths)
    expected, expected_lse = reference.attend(q, k, v, scale=SCALE, visible=visible)
    out, lse, entropy = attend_blocks(q, k, v, block_map, sizes, scale=SCALE, need_lse=True, need_entropy=True)
    close(out, expected)
    close(lse, expected_lse)
    close(entropy, entropy_of(q, k, expected_lse, visible), 1e-4)
    by_lists, none = attend_blocks(q, k, v, BlockLists.of(block_map, *sizes), scale=SCALE)
    assert none is None and torch.equal(by_lists, out)


def test_entropy_with_sinks_bias_and_mass():
    q, k, v = problem(4, 2)
    g = torch.Generator().manual_seed(3)
    options = {
        "sinks": torch.randn(4, generator=g),
        "bias": (torch.randn(1, 4, 70, 2, generator=g), torch.randn(1, 2, 100, 2, generator=g)),
        "mass": torch.randint(0, 4, (1, 2, 100), generator=g).float(),
    }
    block_map = random_map(q, k, 16, 16, 0.3)
    visible = seen_by(block_map, 16, 16, 70, 100)
    out, lse, entropy = attend_blocks(q, k, v, block_map, 16, scale=SCALE, need_lse=True, need_entropy=True, **options)
    expected, expected_lse = reference.attend(q, k, v, scale=SCALE, visible=visible, **options)
    close(out, expected)
    close(lse, expected_lse)
    del options["sinks"]
    close(entropy, entropy_of(q, k, expected_lse, visible, **options), 2e-4)


def test_entropy_of_bfloat16_is_as_good_as_its_inputs():
    q, k, v = problem(dtype=torch.bfloat16)
    block_map = random_map(q, k, 16, 16)
    visible = seen_by(block_map, 16, 16, 70, 100)
    _, expected_lse = reference.attend(q, k, v, scale=SCALE, visible=visible)
    _, lse, entropy = attend_blocks(q, k, v, block_map, 16, scale=SCALE, need_entropy=True)
    assert lse is None and not entropy.requires_grad
    close(entropy, entropy_of(q, k, expected_lse, visible), 1e-4)


@pytest.mark.parametrize("lengths", [(100, 100), (40, 100)])
def test_packed_sequences(lengths):
    q, k, v = problem(3, 1, *lengths)
    starts = torch.tensor([0, 1, 37, 64, 64, 100], dtype=torch.int32)
    number = torch.searchsorted(starts, torch.arange(100, dtype=torch.int32), right=True)
    block_map = random_map(q, k, 32, 16, 0.7)
    visible = seen_by(block_map, 32, 16, *lengths) & (number[100 - lengths[0] :, None] == number)
    how = {"scale": SCALE, "starts": starts, "need_lse": True, "need_entropy": True}
    out, lse, entropy = attend_blocks(q, k, v, block_map, (32, 16), **how)
    expected, expected_lse = reference.attend(q, k, v, scale=SCALE, visible=visible)
    close(out, expected)
    close(lse, expected_lse)
    close(entropy, entropy_of(q, k, expected_lse, visible), 1e-4)


def test_gradients_of_unequal_blocks_and_packed_sequences():
    q, k, v = problem(dtype=torch.float64)
    block_map = random_map(q, k, 32, 16)
    block_map[..., 0] = True
    for starts in (None, torch.tensor([0, 100])):
        slopes = []
        for op in ("ours", "reference"):
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            if op == "ours":
                out, lse = attend_blocks(*leaves, block_map, (32, 16), scale=SCALE, starts=starts, need_lse=True)
            else:
                out, lse = reference.attend(*leaves, scale=SCALE, visible=seen_by(block_map, 32, 16, 70, 100))
            (out.sin().sum() + lse.cos().sum()).backward()
            slopes.append([t.grad for t in leaves])
        for got, expected in zip(*slopes, strict=True):
            close(got, expected, 1e-9)


def test_which_says_why_not_a_kernel():
    q, k, v = problem()
    assert which("attend_blocks", q, k, v, random_map(q, k, 16, 16), 16, scale=SCALE) == (
        "torch",
        "the tensors are on cpu",
    )


def test_what_is_refused():
    q, k, v = problem()
    block_map = random_map(q, k, 16, 16)
    lists = BlockLists.of(block_map, 16, 16)

    def refused(match, blocks=block_map, size=16, **options):
        with pytest.raises(InputError, match=match):
            attend_blocks(q, k, v, blocks, size, **{"scale": SCALE, **options})

    refused("size of the map's blocks", size=None)
    refused("no size beside lists", lists, 32)
    refused("bool block map", size=(16, 32))
    refused("at least 1 token", size=(16, 0))
    refused("finite scale", scale=float("nan"))
    refused("attention_stats", softcap=3.0, need_entropy=True)
    refused("rise from 0 to 100", starts=torch.tensor([0, 70]))
    refused("batch of 1", starts=torch.tensor([0.0, 100.0]))
    refused("int32 lists", BlockLists(lists.counts.long(), lists.indices, 16, 16), None)
    refused("rebuild the lists", BlockLists(lists.counts[:, :1], lists.indices, 16, 16), None)
    falling = BlockLists(lists.counts, lists.indices.flip(3), 16, 16)
    refused("ascending", falling, None)
    beyond = BlockLists(torch.full_like(lists.counts, 7), torch.full_like(lists.indices, 7), 16, 16)
    refused("below 7", beyond, None)
    with pytest.raises(InputError, match="bool map"):
        BlockLists.of(block_map.float(), 16, 16)
    with pytest.raises(InputError, match="from 0 up"):
        BlockLists.band(10, 10, [1, 2], 3, 4, 3)
