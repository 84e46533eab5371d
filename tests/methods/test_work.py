"""Work counted from selections against masks written out and against the products that operations compute."""

import pytest
import torch
from models import tiny
from reference import hook
from torch.utils.flop_counter import FlopCounterMode

import foveal
from foveal.methods.select.work import TILE, work_of
from foveal.ops import attend_blocks, attend_tokens
from foveal.selection import All, Band, Blocks, Lists, Nothing

N, HEADS, KV, DIM = 75, 6, 2, 16
METHODS = [
    "minference(budget=0.3, last=8, sink=4, recent=8, block=8)",
    "flex-prefill(gamma=0.5, tau=0.07, least=8, block=8)",
    "xattention(threshold=0.5, block=8, stride=4)",
    "pooled-blocks(budget=0.4, block=8)",
    "power-attention(window=1, block=4)",
    "token-sparse(drop=0.3, least=8, window=8, kernel=3, layers=(0, 1))",
    "token-sparse(drop=0.3, least=8, window=8, kernel=3, layers=(0, 1)) | xattention(threshold=0.5, block=8, stride=4)",
    "hip(budget=0.3, sink=2, recent=4, query_block=8, dense=0)",
    "hisa(budget=0.3, block=4, blocks=5)",
    "hisa(budget=0.3, block=4, blocks=5, query_block=6)",
    "dhsa(budget=0.4, block=8, chunks=2, first=2, local=8, last=4, boundaries='even')",
    "flux(decision='sparse', sink=2, recent=8)",
    "pooled-blocks(budget=0.4, block=8) | power-attention(window=1, block=4)",
]


def products(q, k, v, *args, **kwargs):
    """Of the CPU's fused attention, by the shapes of its inputs; PyTorch's counter does not know it."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: products}


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (1, N), generator=torch.Generator().manual_seed(8))


def look(model, ids, method, see):
    """What `see` says of each layer's step after a method chose."""
    found = []

    def note(step, out):
        found.append(see(step))
        return out

    with torch.no_grad(), foveal.attach(model, foveal.get_method(method) | hook(mix=note)):
        model(ids)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_pairs_read_are_those_of_the_mask(method, model, ids):
    causal = torch.ones(N, N, dtype=torch.bool).tril()

    def see(step):
        seen = step.visible.mask(step, 0, N) & causal
        return work_of(step), int(seen.sum()) * (HEADS // seen.shape[1])

    for work, read in look(model, ids, method, see):
        assert work.read == read < work.dense == HEADS * N * (N + 1) // 2
        assert work.density == read / work.dense
        assert work.flops >= 4 * DIM * read


@pytest.mark.parametrize("method", METHODS[:5])
def test_products_of_blocks_are_those_computed(method, model, ids):
    """Counted by PyTorch while the blocks are attended."""

    def see(step):
        assert isinstance(step.visible, Blocks)
        q, k, v = (x.double() for x in (step.q, step.k_new, step.v_new))
        with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
            attend_blocks(q, k, v, step.visible.map, step.visible.size, scale=step.scale)
        return work_of(step), counter.get_total_flops(), int(step.visible.map.tril().sum()), step.visible.size

    for work, flops, cells, size in look(model, ids, method, see):
        assert work.flops == flops == 4 * DIM * cells * size * size
        assert work.bytes == cells * size * 2 * DIM * 4


def test_products_of_a_list_are_those_computed(model, ids):
    """One list for all queries of a run of everything."""
    slots = torch.tensor([0, 3, 9, 20, 41])

    def see(step):
        lists = Lists(slots.expand(1, KV, 1, -1), N)
        q, k, v = (x.double() for x in (step.q, step.k_new, step.v_new))
        with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
            attend_tokens(q, k, v, lists.slots, size=N, scale=step.scale)
        return work_of(step, lists), counter.get_total_flops()

    for work, flops in look(model, ids, "pooled-blocks", see):
        assert work.flops == flops == 4 * DIM * 5 * N * HEADS
        assert work.bytes == 5 * KV * 2 * DIM * 4
        assert work.read == HEADS * sum(N - t for t in slots.tolist())


def test_bands_and_everything_count_tiles(model):
    ids = torch.randint(1, 120, (1, 300), generator=torch.Generator().manual_seed(8))
    i = torch.arange(300)
    causal = i <= i[:, None]

    def see(step):
        return [work_of(step, s) for s in (All(), Band(3, 40), Band([0] * 6, [1, 5, 9, 200, 300, 400]), Nothing((1,)))]

    for every, band, bands, nothing in look(model, ids, "pooled-blocks", see):
        assert every.read == every.dense == bands.dense
        assert every.flops == 4 * DIM * HEADS * 6 * TILE * TILE  # 3 x 3 tiles below the diagonal
        assert band.read == HEADS * int((causal & ((i < 3) | (i[:, None] - i < 40))).sum())
        assert (
            band.flops == 4 * DIM * HEADS * 6 * TILE * TILE
        )  # sinks, window and own: no tile of so short a text is left out
        assert bands.read == sum(int((causal & (i[:, None] - i < r)).sum()) for r in (1, 5, 9, 200, 300, 400))
        assert bands.flops < every.flops
        assert nothing.read == every.read * 5 // 6
