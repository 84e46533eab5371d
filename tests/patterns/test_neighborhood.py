"""Neighborhoods against masks written out query by query, and the simulator against the tiles of those masks."""

import itertools
import math

import pytest
import torch

from foveal.errors import InputError
from foveal.ops import attend_boxes
from foveal.ops.boxes import Boxes
from foveal.patterns.blocks import tile_blocks
from foveal.patterns.neighborhood import Neighborhood, best_stride, neighborhood_attention, simulate


def seen_on_axis(n, w, s, d, causal, x, y):
    """Whether the query at x sees the key at y, by the definition alone."""
    if x % d != y % d:
        return False
    members, x, y = len(range(x % d, n, d)), x // d, y // d
    if causal:
        leader = min(x // s * s + s - 1, members - 1)
        return max(leader - w + 1, 0) <= y <= x
    leader = min(x // s * s + s // 2, members - 1)
    first = min(max(leader - w // 2, 0), members - w)
    return first <= y < first + w


def brute(hood):
    cells = list(itertools.product(*map(range, hood.shape)))
    fields = list(zip(hood.shape, hood.window, hood.stride, hood.dilation, hood.causal, strict=True))
    return torch.tensor(
        [[all(seen_on_axis(*f, x, y) for f, x, y in zip(fields, q, k, strict=True)) for k in cells] for q in cells]
    )


def dense(q, k, v, mask):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    x = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    return x.softmax(-1) @ v, x.logsumexp(-1)


def draw(n, heads=4, kv_heads=2, batch=1):
    return [torch.randn(batch, h, n, 8, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)]


HOODS = {
    "sliding": (Neighborhood((37,), 7), (8,)),
    "sliding, causal": (Neighborhood((37,), 8, causal=True), (8,)),
    "strided": (Neighborhood((40,), 12, 5), (4,)),
    "strided, causal": (Neighborhood((41,), 9, 4, causal=True), (8,)),
    "blocked": (Neighborhood((32,), 8, 8), (4,)),
    "dilated unevenly": (Neighborhood((23,), 3, 2, 4), (2,)),
    "plane": (Neighborhood((9, 11), (4, 5), (2, 3)), (2, 4)),
    "plane, dilated": (Neighborhood((9, 10), (3, 2), 1, (3, 4)), (2, 4)),
    "space, causal in time": (
        Neighborhood((4, 5, 6), (2, 3, 4), (1, 3, 2), (2, 1, 1), (True, False, False)),
        (2, 2, 2),
    ),
    "everything": (Neighborhood((5, 6), (5, 6)), (2, 3)),
}


@pytest.mark.parametrize("name", HOODS)
def test_equals_its_mask(name):
    hood, tile = HOODS[name]
    mask = brute(hood)
    if not any(hood.causal):
        assert (mask.sum(-1) == math.prod(hood.window)).all()
    q, k, v = draw(math.prod(hood.shape), batch=2)
    out, lse = neighborhood_attention(q, k, v, hood, tile=tile)
    expected = dense(q, k, v, mask)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])


def test_text_beside_the_grid_and_gradients():
    hood, tile = HOODS["plane"]
    (q, k, v), text = draw(99), [torch.randn(1, 2, 5, 8, dtype=torch.float64) for _ in range(2)]
    leaves = [t.requires_grad_() for t in (q, k, v, *text)]
    out, lse = neighborhood_attention(q, k, v, hood, tile=tile, extra=tuple(text))
    mask = torch.cat([brute(hood), torch.ones(99, 5, dtype=torch.bool)], -1)
    expected = dense(q, torch.cat([k, text[0]], 2), torch.cat([v, text[1]], 2), mask)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])
    aim = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad((out * aim).sum(), leaves),
        torch.autograd.grad((expected[0] * aim).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", HOODS)
def test_simulator_counts_the_tiles_of_the_mask(name):
    hood, tile = HOODS[name]
    mask, total = brute(hood), math.prod((-(-n // t)) ** 2 for n, t in zip(hood.shape, tile, strict=True))
    visited = whole = 0
    index = torch.arange(math.prod(hood.shape)).view(hood.shape)
    for residues in itertools.product(*map(range, hood.dilation)):
        part = index[tuple(slice(r, None, d) for r, d in zip(residues, hood.dilation, strict=True))]
        rows = tile_blocks(part.shape, [min(t, n) for t, n in zip(tile, part.shape, strict=True)]).tokens
        tiles = [part.flatten()[row[row >= 0]] for row in rows]
        for a, b in itertools.product(tiles, tiles):
            cell = mask[a][:, b]
            visited, whole = visited + bool(cell.any()), whole + bool(cell.all())
    work = simulate(hood, tile, tile)
    assert (work.total, work.visited, work.whole) == (total, visited, whole)
    assert work.bound == pytest.approx(mask.numel() / mask.sum().item())


def test_published_shapes():
    one = simulate(Neighborhood((32768,), 2048, 256), (128,), (128,))
    assert one.block_sparse and one.speedup == one.bound == 16
    assert simulate(Neighborhood((32768,), 2048), (128,), (128,)).speedup < 16
    best = best_stride(Neighborhood((4096,), 512), (64,), (64,))
    assert simulate(best, (64,), (64,)).speedup == 8
    video = Neighborhood((30, 48, 80), (18, 24, 24), (16, 8, 8))
    assert simulate(video, (2, 8, 8), (2, 8, 8)).speedup == pytest.approx(simulate(video).bound, rel=1e-9)
    assert simulate(Neighborhood((30, 48, 80), (18, 24, 24))).speedup < 0.6 * simulate(video).speedup


def test_best_stride_is_the_smallest_of_the_best():
    hood = Neighborhood((64, 48), (16, 12))
    work = {
        s: simulate(Neighborhood((64, 48), (16, 12), s), (8, 4), (8, 4)).visited
        for s in itertools.product(range(1, 17), range(1, 13))
    }
    least = min(work.values())
    assert best_stride(hood, (8, 4), (8, 4)).stride == min(s for s, n in work.items() if n == least)


def test_bad_input_is_refused():
    for fields, word in [
        (((8,), 9), "window"), (((8,), 3, 4), "stride"), (((8,), 3, 0), "stride"), (((8,), 3, 1, 3), "dilation"),
        (((8,), 0), "window"), (((2, 2, 2, 2), 1), "axes"), (((8, 8), (3,)), "window"), (((8,), 3.0), "window"),
        (((8,), (3.5,)), "window"), (((8,), 3, 1, 0), "dilation"), (((8,), 3, 1, 1, 2), "causal"), (((8.0,), 3), "axes"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=word):
            Neighborhood(*fields)
    q = torch.zeros(1, 1, 8, 4)
    with pytest.raises(InputError, match="grid"):
        neighborhood_attention(q, q, q, Neighborhood((9,), 3))
    with pytest.raises(InputError, match="tile"):
        neighborhood_attention(q, q, q, Neighborhood((8,), 3), tile=(9,))
    for count in (simulate, best_stride):
        for tile in ((0,), (2, 2), (2.5,)):
            with pytest.raises(InputError, match="tiles of whole numbers"):
                count(Neighborhood((8,), 3), tile)


def test_a_shape_may_be_any_sequence():
    q, k, v = draw(12)
    expected = neighborhood_attention(q, k, v, Neighborhood((12,), 3), tile=(4,))
    for shape in ([12], 12):
        torch.testing.assert_close(neighborhood_attention(q, k, v, Neighborhood(shape, 3), tile=(4,)), expected)


def test_boxes_of_another_grid_are_refused():
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    boxes = Boxes(torch.zeros(2, 1, 8, dtype=torch.int32), torch.zeros(1, 8, dtype=torch.int32))
    block_map = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(InputError, match="multiples of 3"):
        attend_boxes(q, k, v, block_map, 3, boxes, scale=1.0)
    with pytest.raises(InputError, match="one of each query and key"):
        attend_boxes(q, k, v, block_map, 4, Boxes(boxes.bounds[..., :4], boxes.at), scale=1.0)
    with pytest.raises(InputError, match="int32"):
        attend_boxes(q, k, v, block_map, 4, Boxes(boxes.bounds.float(), boxes.at), scale=1.0)
