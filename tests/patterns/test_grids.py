"""Blocks of a grid, DraftAttention and GRAT against masks written out token by token."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from foveal.errors import InputError
from foveal.patterns.blocks import attend_grid, attend_map, tile_blocks
from foveal.patterns.draft import draft_attention, draft_map, draft_scores, patch_blocks
from foveal.patterns.grat import criss_cross, grat_attention, group_blocks, surrounding


def draw(n, heads=4, kv_heads=2, batch=2):
    return [torch.randn(batch, h, n, 8, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)]


def dense(q, k, v, mask=True):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    x = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~torch.as_tensor(mask), -math.inf)
    return x.softmax(-1) @ v, x.logsumexp(-1)


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("shape", "tile"), [((7,), (3,)), ((4, 6), (2, 3)), ((5, 7), (2, 3)), ((2, 5, 4), (2, 2, 4))])
def test_tiles_hold_their_cells_and_come_back(shape, tile):
    blocks = tile_blocks(shape, tile)
    cells = list(itertools.product(*map(range, shape)))
    expected = {}
    for token, cell in enumerate(cells):
        expected.setdefault(tuple(x // t for x, t in zip(cell, tile, strict=True)), []).append(token)
    rows = [[t for t in row if t >= 0] for row in blocks.tokens.tolist()]
    assert rows == [expected[key] for key in sorted(expected)]
    assert [tuple(c) for c in blocks.coordinates.tolist()] == sorted(expected)
    x = torch.randn(2, 3, len(cells), 4)
    assert torch.equal(blocks.restore(blocks.permute(x)), x)
    torch.testing.assert_close(blocks.mean(x)[:, :, -1], x[:, :, rows[-1]].mean(2))


@pytest.mark.parametrize(("length", "total", "size"), [(10, 7, (4, 4)), (5, 13, (4, 2)), (8, 8, (2, 3))])
def test_maps_without_order(length, total, size):
    q, k, v = draw(length)[0], *draw(total)[1:]
    block_map = torch.rand(2, 4, -(-length // size[0]), -(-total // size[1])) < 0.6
    block_map[..., 0] = True
    block_map[1, 2, 0] = False
    valid = torch.rand(2, total) < 0.8
    valid[:, 0] = True
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = attend_map(q, k, v, block_map, size, valid=valid)
    mask = block_map.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)[:, :, :length, :total]
    mask = mask & valid[:, None, None]
    blind = ~mask.any(-1)
    assert blind.any()
    assert (out[blind] == 0).all()
    assert lse[blind].isneginf().all()
    expected = dense(q, k, v, mask | blind[..., None])
    same((out[~blind], lse[~blind]), (expected[0][~blind], expected[1][~blind]))
    got = torch.autograd.grad(out[~blind].square().sum(), leaves)
    same(got, torch.autograd.grad(expected[0][~blind].square().sum(), leaves))


# ---------------------------------------------------------------------- DraftAttention


def test_draft_is_the_softmax_of_pooled_frames():
    q, k, _ = draw(3 * 5 * 6)
    found = draft_scores(q, k, patch_blocks((3, 5, 6), (2, 4)))

    def pool(x):
        frames = x.transpose(2, 3).reshape(-1, 3, 5, 6)
        return F.avg_pool2d(frames, (2, 4), ceil_mode=True).view(*x.shape[:2], 8, 18).transpose(2, 3)

    torch.testing.assert_close(found, (pool(q) @ pool(k).repeat_interleave(2, 1).mT / math.sqrt(8)).softmax(-1))


def test_the_threshold_is_over_the_whole_map_of_a_head():
    scores = torch.rand(2, 3, 20, 20).square().softmax(-1)
    chosen = draft_map(scores, sparsity=0.75, text=1)
    least = scores.flatten(2).topk(100).values[..., -1]
    assert torch.equal(
        chosen | ~chosen.any(-1, keepdim=True), (scores >= least[..., None, None]) | ~chosen.any(-1, keepdim=True)
    )
    assert (chosen.sum(-1).float().std(-1) > 0).all()
    alone = draft_map(scores, sparsity=0.94)
    assert alone.diagonal(dim1=2, dim2=3).all()
    assert (alone.sum((2, 3)) == 24).all()


@pytest.mark.parametrize("text", [0, 5])
def test_draft_attention_equals_its_mask(text):
    grid, patch = (3, 5, 6), (2, 3)
    q, k, v = draw(90 + text)
    chosen = draft_map(draft_scores(q, k, patch_blocks(grid, patch)), sparsity=0.7, text=text)
    cells = list(itertools.product(*map(range, grid)))
    home = torch.tensor([t * 6 + y // 2 * 2 + x // 3 for t, y, x in cells])
    mask = F.pad(chosen[:, :, home][:, :, :, home].int(), (0, text, 0, text), value=1).bool()
    same(draft_attention(q, k, v, grid, patch=patch, sparsity=0.7, text=text), dense(q, k, v, mask))
    same(draft_attention(q, k, v, grid, patch=patch, sparsity=0.0, text=text), dense(q, k, v))


# ---------------------------------------------------------------------- GRAT


@pytest.mark.parametrize(("grid", "group"), [((8, 12), (2, 4)), ((4, 6, 5), (2, 2, 2))])
@pytest.mark.parametrize("region", ["cross", "around"])
def test_grat_equals_its_mask(grid, group, region):
    cells = [tuple(x // g for x, g in zip(c, group, strict=True)) for c in itertools.product(*map(range, grid))]
    counts = [-(-n // g) for n, g in zip(grid, group, strict=True)]

    def seen(a, b):
        if region == "cross":
            return any(x == y for x, y in zip(a, b, strict=True))
        starts = [min(max(x - 1, 0), max(n - 3, 0)) for x, n in zip(a, counts, strict=True)]
        return all(s <= y < s + 3 for s, y in zip(starts, b, strict=True))

    n, text = len(cells), 6
    mask = torch.ones(2, 1, n + text, n + text, dtype=torch.bool)
    mask[:, :, :n, :n] = torch.tensor([[seen(a, b) for b in cells] for a in cells])
    real = torch.tensor([4, 6])
    mask[0, :, :, n + 4 :] = False
    q, k, v = draw(n + text)
    found = grat_attention(q, k, v, grid, region=region, group=group, text=text, text_keys=real)
    same(found, dense(q, k, v, mask))


def test_regions():
    blocks = group_blocks((32, 48, 80))
    assert blocks.size == 256
    density = criss_cross(blocks).float().mean().item()
    assert density == pytest.approx(1 - (1 - 1 / 8) * (1 - 1 / 6) * (1 - 1 / 10))
    assert (surrounding(blocks, (1, 1, 2)).sum(-1) == 3 * 3 * 5).all()
    assert surrounding(blocks, 9).all()
    assert criss_cross(group_blocks((4, 4, 4), (4, 4, 4))).all()


def test_bad_input_is_refused():
    q, k, v = draw(16)
    with pytest.raises(InputError, match="tile"):
        draft_attention(q, k, v, (1, 4, 4))  # a frame smaller than the patch of 8 x 16
    with pytest.raises(InputError, match="sparsity"):
        draft_attention(q, k, v, (1, 4, 4), patch=(2, 2), sparsity=1.0)
    with pytest.raises(InputError, match="text"):
        grat_attention(q, k, v, (4, 4), group=(2, 2), text=3)
    with pytest.raises(InputError, match="tiles"):
        grat_attention(q, k, v, (4, 4), group=(2, 8))
    with pytest.raises(InputError, match="region"):
        grat_attention(q, k, v, (4, 4), region="star")
    with pytest.raises(InputError, match="radius"):
        surrounding(group_blocks((4, 4), (2, 2)), -1)
    every = torch.ones(4, 4, dtype=torch.bool)
    for block_map in (every[:1, :1], every.float(), every.expand(3, 1, 4, 4)):
        with pytest.raises(InputError, match="map"):
            attend_map(q, k, v, block_map, (4, 4))
        with pytest.raises(InputError, match="map"):
            attend_grid(q, k, v, tile_blocks((4, 4), (2, 2)), block_map)
    with pytest.raises(InputError, match="at least 1 token"):
        attend_map(q, k, v, every, (0, 4))
    with pytest.raises(InputError, match="valid bool"):
        attend_map(q, k, v, every, (4, 4), valid=torch.ones(3, dtype=torch.bool))
    with pytest.raises(InputError, match="dtype"):
        attend_map(q.float(), k, v, every, (4, 4))
    with pytest.raises(InputError, match="whole radius"):
        grat_attention(q, k, v, (4, 4), group=(2, 2), region="around", radius=1.5)
    with pytest.raises(InputError, match="tiles"):
        tile_blocks((4, 4), (2.0, 2))


@pytest.mark.parametrize("keys", [-1, 5, torch.tensor([1, 2, 3]), torch.tensor([0.5, 1.0])], ids=str)
def test_text_that_cannot_be_counted_is_refused(keys):
    q, k, v = draw(16)
    for call in (draft_attention, grat_attention):
        size = {"patch": (2, 2)} if call is draft_attention else {"group": (2, 2)}
        with pytest.raises(InputError, match="text"):
            call(q, k, v, (3, 4), text=4, text_keys=keys, **size)


def test_every_patch_reads_something_even_where_no_word_is_real():
    """A threshold over a whole map leaves rows without a patch; these get their best."""
    q, k, v = draw(36 + 4)
    scores = draft_scores(q, k, patch_blocks((6, 6), (2, 2)))
    over = scores >= scores.flatten(2).topk(4).values[..., -1:, None]
    lost = ~over.any(-1)
    assert lost.any()
    chosen = over | lost[..., None] & (scores == scores.amax(-1, keepdim=True))
    home = torch.tensor([y // 2 * 3 + x // 2 for y in range(6) for x in range(6)])
    mask = F.pad(chosen[:, :, home][:, :, :, home].int(), (0, 4, 0, 4), value=1).bool()
    mask[..., 36:] = False
    found = draft_attention(q, k, v, (6, 6), patch=(2, 2), sparsity=0.95, text=4, text_keys=0)
    mask[:, :, 36:, :36] = True
    same(found, dense(q, k, v, mask))


def test_a_row_without_keys_is_refused_unless_text_holds_it_up():
    q, k, v = draw(16)
    none = torch.eye(4, dtype=torch.bool)
    none[2, 2] = False
    with pytest.raises(InputError, match="without any"):
        attend_grid(q, k, v, tile_blocks((16,), (4,)), none)
    none = none[:3, :3]
    with pytest.raises(InputError, match="without any"):
        attend_grid(q, k, v, tile_blocks((12,), (4,)), none, text=4, text_keys=torch.tensor([2, 0]))
    assert attend_grid(q, k, v, tile_blocks((12,), (4,)), none, text=4, text_keys=2)[0].isfinite().all()
