"""Block attention kernels under Triton's interpreter, forward and backward, against full masks in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.ops import reference
from foveal.ops.block_lists import BlockLists
from foveal.ops.blocks import attend_band_by_blocks
from foveal.ops.boxes import Boxes
from foveal.ops.dense import HIDDEN
from foveal.ops.dense import spread as spread_heads
from foveal.ops.gpu import blocks, blocks_backward, blocks_op, lists
from foveal.ops.gpu.bias import columns
from foveal.ops.gpu.columns import launch as launch_columns

# bfloat16: the weights are rounded to 8 bits before they meet the values, and so is the output.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SCALE = 0.11


def problem(heads, kv_heads, length, total, dim, dtype=torch.float32, batch=1, seed=0):
    """q, k, v as a model's projections leave them: heads inside of positions."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, length, heads, dim, generator=g).to(dtype).transpose(1, 2)
    k, v = (torch.randn(batch, total, kv_heads, dim, generator=g).to(dtype).transpose(1, 2) for _ in "kv")
    return q, k, v


def random_map(q, k, query_block, key_block, density=0.5, seed=0):
    shape = *q.shape[:2], -(-q.shape[2] // query_block), -(-k.shape[2] // key_block)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def seen_by(block_map, query_block, key_block, length, total):
    full = block_map.repeat_interleave(query_block, -2).repeat_interleave(key_block, -1)
    return full[..., :length, :total]


def pose(q, k, v, block_map, query_block, key_block, window=None):
    counts, indices = lists.compact(block_map)
    return blocks.Problem(q, k, v, counts, indices, query_block, key_block, SCALE, window or lists.Window())


def agrees(result, q, k, v, visible):
    out, lse, entropy = result
    tolerance = TOLERANCE[q.dtype]
    expected, expected_lse = reference.attend(q, k, v, scale=SCALE, visible=visible)
    assert out.dtype == q.dtype
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-5)
    if entropy.numel():
        p = reference.probabilities(reference.logits(q, k, scale=SCALE, visible=visible), expected_lse)
        torch.testing.assert_close(entropy.double(), -torch.special.xlogy(p, p).sum(-1), atol=1e-4, rtol=1e-4)


def without_order(result, q, k, v, visible, extra=0.0):
    k, v = (spread_heads(t, q.shape[1]).double() for t in (k, v))
    logits = (q.double() @ k.mT * SCALE + extra).masked_fill(~visible, float("-inf"))
    out, lse = result[:2]
    tolerance = max(1e-4, TOLERANCE[q.dtype])
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.double(), logits.softmax(-1).nan_to_num() @ v, atol=tolerance, rtol=tolerance)


def slopes_agree(p, visible):
    """Gradients of sum(out * a) + sum(lse * b) against autograd through the reference in float64."""
    g = torch.Generator().manual_seed(5)
    out, lse, _ = blocks.forward(p, need_entropy=False)
    dout = torch.randn(out.shape, generator=g).to(out.dtype)
    dlse = torch.randn(lse.shape, generator=g)
    found = blocks_backward.backward(p, out, lse, dout, dlse)
    leaves = [t.double().requires_grad_() for t in (p.q, p.k, p.v)]
    expected, expected_lse = reference.attend(*leaves, scale=SCALE, visible=visible)
    (expected * dout.double()).sum().add((expected_lse * dlse.double()).sum()).backward()
    for got, leaf in zip(found, leaves, strict=True):
        assert got.dtype == p.q.dtype and got.shape == leaf.shape
        limit = TOLERANCE[p.q.dtype] * float(leaf.grad.abs().max().clamp(min=1.0))
        torch.testing.assert_close(got.double(), leaf.grad, atol=limit, rtol=0)


GROUPS = [(2, 2, 64), (3, 1, 128), (4, 2, 96), (4, 1, 16), (7, 1, 64), (9, 1, 16)]
GROUPS = [(*g, torch.float32) for g in GROUPS] + [(*GROUPS[i], torch.bfloat16) for i in (1, 2, 5)]


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "dtype"), GROUPS)
def test_forward_of_any_group(heads, kv_heads, dim, dtype):
    q, k, v = problem(heads, kv_heads, 65, 100, dim, dtype)
    block_map = random_map(q, k, 32, 64)
    result = blocks.forward(pose(q, k, v, block_map, 32, 64), need_entropy=True)
    agrees(result, q, k, v, seen_by(block_map, 32, 64, 65, 100))


@pytest.mark.parametrize("sizes", [(128, 128), (128, 64), (64, 128), (32, 16), (16, 256), (256, 32)])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 130), (127, 127), (128, 300), (129, 129)])
def test_forward_of_any_length_and_block(lengths, sizes):
    q, k, v = problem(2, 1, *lengths, 16)
    block_map = random_map(q, k, *sizes, seed=1)
    result = blocks.forward(pose(q, k, v, block_map, *sizes), need_entropy=True)
    agrees(result, q, k, v, seen_by(block_map, *sizes, *lengths))


def test_forward_of_a_batch_through_strided_views():
    q, k, v = problem(4, 2, 150, 300, 64, torch.float16, batch=2)
    k, v = (torch.cat([t, t], 3)[..., :64] for t in (k, v))  # rows 128 apart: read in place
    v = torch.cat([v[..., :1], v], 3)[..., 1:]  # not at 16 bytes: copied
    block_map = random_map(q, k, 128, 64)
    result = blocks.forward(pose(q, k, v, block_map, 128, 64), need_entropy=False)
    assert result[0].transpose(1, 2).is_contiguous()
    agrees(result, q, k, v, seen_by(block_map, 128, 64, 150, 300))


@pytest.mark.parametrize(
    ("rank", "massive", "spread_over", "dtype"),
    [
        (1, False, 2, torch.float32), (2, True, 6, torch.float32), (0, True, 2, torch.float32), (4, True, 2, torch.float32),
        (1, False, 2, torch.bfloat16), (2, True, 6, torch.bfloat16), (4, True, 2, torch.float16), (0, True, 2, torch.float16),
    ],
)  # fmt: skip
def test_a_bias_and_masses_count_to_the_last_digit(rank, massive, spread_over, dtype):
    q, k, v = problem(6, 2, 65, 100, 64, dtype)
    g = torch.Generator().manual_seed(7)
    bias = mass = None
    if rank:  # as large as positions are, so that three digits would show
        bias = 30 * torch.randn(1, 6, 65, rank, generator=g), 30 * torch.randn(1, spread_over, 100, rank, generator=g)
    if massive:
        mass = torch.randint(0, 5, (1, spread_over, 100), generator=g).float()
        mass[:, 0, :60] = 0  # the first queries of some heads see nothing
    block_map = random_map(q, k, 32, 64)
    p = pose(q, k, v, block_map, 32, 64)._replace(bias=columns(q, bias, mass, scale=SCALE, multiple=16))
    assert p.rank in (16, 32)
    out, lse, entropy = blocks.forward(p, need_entropy=True)
    visible = seen_by(block_map, 32, 64, 65, 100)
    how = {"scale": SCALE, "visible": visible, "bias": bias, "mass": mass}
    expected, expected_lse = reference.attend(q, k, v, **how)
    tolerance = max(TOLERANCE[dtype], 2e-4)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-3, rtol=2e-6)
    weights = reference.probabilities(reference.logits(q, k, **how), expected_lse)
    torch.testing.assert_close(entropy.double(), -torch.special.xlogy(weights, weights).sum(-1), atol=3e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("rank", "massive", "spread_over"), [(1, False, 2), (2, True, 6), (0, True, 2), (5, False, 6), (3, True, 2)]
)
def test_columns_in_one_sweep_are_the_plain_ones(rank, massive, spread_over):
    q = torch.zeros(2, 6, 70, 8)
    g = torch.Generator().manual_seed(7)
    bias = mass = None
    if rank:
        bias = (
            torch.randn(2, 6, 1, rank, generator=g).expand(-1, -1, 70, -1),
            torch.randn(2, 100, spread_over, rank).transpose(1, 2),
        )
    if massive:
        mass = torch.randint(0, 5, (2, spread_over, 100), generator=g).float()
    expected = columns(q, bias, mass, scale=SCALE, multiple=16)
    found = launch_columns(q, bias, mass, spread_over, SCALE, 16)
    assert [x.shape for x in found] == [x.shape for x in expected]
    # the interpreter cuts where bfloat16 rounds, so the parts differ and their sums do not
    got, want = (a.double() @ spread_heads(b.double(), 6).mT * SCALE for a, b in (found, expected))
    seen = want > HIDDEN / 2
    assert ((got - want)[seen].abs() <= 2e-5).all() and (got[~seen] < HIDDEN / 2).all()
    assert not seen.all() or not massive


def test_large_logits_stay_finite():
    q, k, v = problem(1, 1, 40, 40, 16)
    block_map = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    out, lse, entropy = blocks.forward(pose(q * 300, k * 300, v, block_map, 16, 16), need_entropy=True)
    expected, expected_lse = reference.attend(q * 300, k * 300, v, scale=SCALE)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=1e-3)
    torch.testing.assert_close(lse.double(), expected_lse, atol=0, rtol=1e-5)
    assert entropy.isfinite().all()


def window_of(total, starts=None, sink=None, recent=None):
    numbers = [None if x is None else torch.tensor(x, dtype=torch.int32) for x in (starts, sink, recent)]
    return lists.Window.of(total, *numbers)


def packed(length, total, starts):
    number = torch.searchsorted(torch.tensor(starts), torch.arange(total), right=True)
    return number[total - length :, None] == number[None, :]


@pytest.mark.parametrize("starts", [[0, 150], [0, 3, 60, 61, 130, 150], [0, 64, 128, 150]])
def test_packed_sequences_do_not_see_each_other(starts):
    q, k, v = problem(2, 1, 150, 150, 16)
    block_map = random_map(q, k, 64, 32, 0.7)
    p = pose(q, k, v, block_map, 64, 32, window_of(150, starts))
    visible = seen_by(block_map, 64, 32, 150, 150) & packed(150, 150, starts)
    agrees(blocks.forward(p, need_entropy=True), q, k, v, visible)


@pytest.mark.parametrize("lengths", [(200, 200), (70, 200)])
def test_bands_are_exact_to_the_token(lengths):
    sink, recent = [0, 4, 70, 0], [40, 33, 1, 200]
    q, k, v = problem(4, 2, *lengths, 16)
    block_map = torch.ones(1, 4, -(-lengths[0] // 64), 4, dtype=torch.bool)
    p = pose(q, k, v, block_map, 64, 64, window_of(lengths[1], None, sink, recent))
    agrees(blocks.forward(p, need_entropy=True), q, k, v, reference.band(*lengths, sink, recent))


def test_bands_with_their_lists_and_learned_sinks():
    sink, recent = [0, 130, 4, 0], [40, 33, 2**31 - 1, 0]
    q, k, v = problem(4, 2, 150, 300, 16)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    how = {"scale": SCALE, "sinks": sinks}
    out, lse, entropy = attend_band_by_blocks(
        q, k, v, sink=sink, recent=recent, need_lse=True, need_entropy=True, **how
    )
    visible = reference.band(150, 300, sink, recent)
    expected, expected_lse = reference.attend(q, k, v, visible=visible, **how)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-5)
    p = reference.probabilities(reference.logits(q, k, scale=SCALE, visible=visible), expected_lse)
    torch.testing.assert_close(entropy.double(), -torch.special.xlogy(p, p).sum(-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "dtype"), GROUPS)
def test_backward_of_any_group(heads, kv_heads, dim, dtype):
    q, k, v = problem(heads, kv_heads, 65, 100, dim, dtype)
    block_map = random_map(q, k, 32, 64)
    block_map[..., 0] = True
    slopes_agree(pose(q, k, v, block_map, 32, 64), seen_by(block_map, 32, 64, 65, 100))


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ((1, 1), (128, 32)), ((1, 130), (128, 128)), ((1, 130), (16, 256)), ((129, 129), (128, 32)),
        ((129, 129), (16, 256)), ((128, 200), (128, 128)), ((128, 200), (128, 32)),
    ],
)  # fmt: skip
def test_backward_of_any_length_and_block(lengths, sizes):
    q, k, v = problem(2, 1, *lengths, 16, batch=2)
    block_map = random_map(q, k, *sizes)
    block_map[:, :, :, 0] = True
    slopes_agree(pose(q, k, v, block_map, *sizes), seen_by(block_map, *sizes, *lengths))


def test_backward_of_bands_and_packed_sequences():
    sink, recent = [0, 4, 70, 0], [40, 33, 1, 150]
    q, k, v = problem(4, 2, 90, 150, 16)
    full = torch.ones(1, 4, 2, 3, dtype=torch.bool)
    band = window_of(150, None, sink, recent)
    slopes_agree(pose(q, k, v, full, 64, 64, band), reference.band(90, 150, sink, recent))
    starts = [0, 3, 60, 61, 130, 150]
    slopes_agree(pose(q, k, v, full, 64, 64, window_of(150, starts)), packed(90, 150, starts))


def test_rows_without_keys_have_no_gradient():
    q, k, v = problem(2, 1, 40, 40, 16)
    block_map = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    block_map[:, 0] = False
    p = pose(q, k, v, block_map, 16, 16)
    out, lse, entropy = blocks.forward(p, need_entropy=True)
    assert not out[:, 0].any() and lse[:, 0].isneginf().all() and not entropy[:, 0].any()
    dlse = torch.full_like(lse, float("nan")).where(lse.isneginf(), 1.0)
    dq, dk, dv = blocks_backward.backward(p, out, lse, torch.ones_like(out), dlse)
    only = pose(q[:, 1:], k, v, block_map[:, 1:], 16, 16)
    expected = blocks_backward.backward(only, out[:, 1:], lse[:, 1:], torch.ones_like(out[:, 1:]), dlse[:, 1:])
    assert not dq[:, 0].any()
    for got, want in zip((dq[:, 1:], dk, dv), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_problem(data):
    draw = data.draw
    total = draw(st.integers(1, 140))
    length = draw(st.integers(1, total))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 2)]))
    sizes = draw(st.tuples(*[st.sampled_from([16, 32, 48, 64, 128])] * 2))
    q, k, v = problem(heads, kv_heads, length, total, draw(st.sampled_from([16, 24])), seed=draw(st.integers(0, 9)))
    block_map = random_map(q, k, *sizes, draw(st.sampled_from([0.0, 0.2, 0.6, 1.0])), draw(st.integers(0, 9)))
    visible = seen_by(block_map, *sizes, length, total)
    kind = draw(st.sampled_from(["blocks", "packed", "band"]))
    window = None
    if kind == "packed":
        starts = [0, *sorted(draw(st.lists(st.integers(0, total), max_size=4))), total]
        window = window_of(total, starts)
        visible = visible & packed(length, total, starts)
    elif kind == "band":
        sink = draw(st.lists(st.integers(0, total), min_size=heads, max_size=heads))
        recent = draw(st.lists(st.integers(0, total), min_size=heads, max_size=heads))
        window = window_of(total, None, sink, recent)
        visible = visible & reference.band(length, total, sink, recent)
    agrees(blocks.forward(pose(q, k, v, block_map, *sizes, window), need_entropy=True), q, k, v, visible)


def test_one_differentiable_node():
    q, k, v = problem(2, 1, 40, 50, 16)
    block_map = random_map(q, k, 16, 32)
    block_map[..., 0] = True
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    counts, indices = blocks_op.block_lists(block_map)
    rest = (counts, indices, None, None, None, None, None, 16, 32, SCALE, True, False)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(blocks_op.block_lists, (block_map,), test_utils=checks)
    torch.library.opcheck(blocks_op.attend_blocks, (*leaves, *rest), test_utils=checks)
    out, lse, _ = blocks_op.attend_blocks(*leaves, *rest)
    (out.sin().sum() + lse.cos().sum()).backward()
    mine = [t.double().requires_grad_() for t in (q, k, v)]
    expected, expected_lse = reference.attend(*mine, scale=SCALE, visible=seen_by(block_map, 16, 32, 40, 50))
    (expected.sin().sum() + expected_lse.cos().sum()).backward()
    for got, want in zip(leaves, mine, strict=True):
        torch.testing.assert_close(got.grad.double(), want.grad, atol=2e-5, rtol=2e-5)
    alone = blocks_op.attend_blocks(*leaves, *rest)[0].sum()  # lse unused: its gradient is zero
    assert torch.autograd.grad(alone, leaves[2])[0].isfinite().all()


def test_compaction_is_the_meaning_of_lists():
    block_map = torch.rand(2, 2, 2, 270, generator=torch.Generator().manual_seed(0)) < 0.3
    block_map[0, 0, 0], block_map[0, 0, 1] = False, True
    for some in (block_map, block_map[:, :1].expand(-1, 2, -1, -1), block_map[..., :9].mT):
        expected = BlockLists.of(some, 16, 16)
        counts, indices = lists.compact(some)
        assert torch.equal(counts, expected.counts) and torch.equal(indices, expected.indices)


@pytest.mark.parametrize("length", [87, 88, 90])
@pytest.mark.parametrize("transposed", [False, True])
def test_spans_hold_what_is_visible_and_nothing_that_needs_a_mask(transposed, length):
    """Every visible pair lies within a0..a3, and every pair of a1..a2 is visible."""
    total, tile, step = 150, 32, 16
    starts, sink, recent = [0, 3, 60, 61, 130, 150], [0, 4, 70], [40, 33, 150]
    windows = [
        (lists.Window(), torch.ones(3, length, total, dtype=torch.bool).tril(total - length)),
        (window_of(total, starts), packed(length, total, starts).tril(total - length).expand(3, -1, -1)),
        (window_of(total, None, sink, recent), reference.band(length, total, sink, recent)),
    ]
    for window, visible in windows:
        visible = visible.mT if transposed else visible
        rows, columns = visible.shape[1:]
        full = torch.ones(1, 3, -(-rows // 64), -(-columns // 32), dtype=torch.bool)
        counts, indices = lists.compact(full)
        spans = lists.spans(counts, indices, 64, tile, 32, step, length, total, window, transposed=transposed)
        for head in range(3):
            for m, (a0, a1, a2, a3) in enumerate(spans[0, head].tolist()):
                part = visible[head, m * tile : (m + 1) * tile]
                assert 0 <= a0 <= a1 <= a2 <= a3 <= full.shape[3] * 2
                assert not part[:, : a0 * step].any() and not part[:, a3 * step :].any()
                assert part[:, a1 * step : a2 * step].all()
                if window.first is None and window.sink is None and part.shape[0] == tile:
                    assert a2 - a1 >= int(part.all(0).sum()) // step - 1  # masks only where they are needed


def test_heavy_tiles_come_first_and_none_is_lost():
    block_map = random_map(*problem(4, 2, 200, 200, 16)[:2], 32, 32, 0.6)
    counts, indices = lists.compact(block_map)
    items, counter = lists.work(counts, indices, 32, 32, 32, 16, 200, 200, lists.Window(), 2)
    assert counter.tolist() == [0]
    assert sorted(items[:, 0].tolist()) == list(range(4 * 7))
    for group, part in enumerate(items.view(2, 14, -1)):
        assert set((part[:, 0] // 14).tolist()) == {group}
        weight = part[:, 4] - part[:, 1]
        assert bool((weight.diff() <= 1).all())  # within a class of weight any order will do
    spans = lists.spans(counts, indices, 32, 32, 32, 16, 200, 200, lists.Window()).view(-1, 4)
    assert torch.equal(items[:, 1:5], spans[items[:, 0].long()])


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(("length", "total"), [(70, 128), (200, 64), (1, 192)])
def test_queries_behind_all_keys_see_every_key_of_their_blocks(length, total, rank):
    q, k, v = problem(4, 2, length, total, 64)
    block_map = random_map(q, k, 32, 64)
    p = pose(q, k, v, block_map, 32, 64)._replace(causal=False)
    extra = 0.0
    if rank:
        g = torch.Generator().manual_seed(2)
        bias = (torch.randn(1, 4, length, rank, generator=g), torch.randn(1, 2, total, rank, generator=g))
        p = p._replace(bias=columns(q, bias, None, scale=SCALE, multiple=16))
        extra = bias[0].double() @ spread_heads(bias[1], 4).double().mT
    without_order(blocks.forward(p, need_entropy=False), q, k, v, seen_by(block_map, 32, 64, length, total), extra)


@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float32), (96, torch.bfloat16)])
@pytest.mark.parametrize(("heads", "kv_heads", "axes"), [(3, 1, 1), (4, 2, 2), (2, 2, 3)])
def test_boxes_hide_what_lies_outside(heads, kv_heads, axes, dim, dtype):
    size, length, total = 32, 96, 128
    q, k, v = problem(heads, kv_heads, length, total, dim, dtype)
    g = torch.Generator().manual_seed(3)
    at = torch.randint(-1, 9, (axes, total), generator=g, dtype=torch.int32)
    first = torch.randint(0, 5, (axes, length), generator=g, dtype=torch.int32)
    boxes = Boxes(torch.stack([first, first + torch.randint(0, 5, (axes, length), generator=g, dtype=torch.int32)]), at)
    boxes.bounds[1, 0, 40:50] = -2  # these see nothing though their blocks are listed
    block_map = torch.rand(length // size, total // size, generator=g) < 0.6
    block_map[0] = False
    lists_of = BlockLists.of(block_map.expand(1, heads, -1, -1), size, size)
    result = blocks_op.attend_boxes(q, k, v, lists_of.counts, lists_of.indices, *boxes, size, size, SCALE)
    seen = ((at[:, None] >= boxes.bounds[0][..., None]) & (at[:, None] <= boxes.bounds[1][..., None])).all(0)
    seen = seen & block_map.repeat_interleave(size, 0).repeat_interleave(size, 1)
    without_order(result, q, k, v, seen)
