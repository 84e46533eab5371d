"""What each selection means: attention with it equals a softmax over exactly the keys it names, on every path."""

import pytest
import torch
from models import tiny
from reference import attend, causal, close, hook, thin, thinned, watch

import foveal
from foveal.selection import FOREVER, All, And, Band, Blocks, Nothing, Subset, TokenIds, Tokens

N, HEADS, KV = 43, 6, 2
HOW = {
    "padded": {"chunks": (40,), "pads": (0, 7)},
    "chunks": {"chunks": (17, 23)},
    "ragged": {"chunks": (17, 23)},
}


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(2))


def firsts(n, chunks):
    """The first token of the forward pass that each token came with."""
    starts = [0, *torch.tensor(chunks).cumsum(0).tolist()]
    return torch.tensor([max([s for s in starts if s <= i]) if i < starts[-1] else i for i in range(n)])


def check(model, ids, how, select, expected):
    """select(step) -> Selection; expected(visible [kv_heads, n, n], first [n]) -> what may be seen [heads, n, n]."""
    method, settings = hook(select=select), HOW[how]
    seen = watch(model, thin() | method if how == "ragged" else method, ids, **settings)
    assert len(seen.seqs) == 2
    for b, _, s in seen.each():
        n = s.q.shape[1]
        chunks = settings["chunks"] if how != "padded" else (settings["chunks"][0] - settings["pads"][b],)
        base = thinned(n, chunks, KV) if how == "ragged" else causal(n).expand(KV, -1, -1)
        base = base.repeat_interleave(HEADS // KV, 0)
        wanted = base & expected(base, firsts(n, chunks))
        assert (wanted.sum() < base.sum()) or expected is everything
        assert close(s.out, attend(s, wanted))


def everything(visible, first):
    return torch.ones_like(visible)


def ages(n):
    return torch.arange(n)[:, None] - torch.arange(n)


def own(first):
    """Keys of the same forward pass, which a choice of past keys never hides."""
    return torch.arange(len(first)) >= first[:, None]


@pytest.mark.parametrize("how", HOW)
def test_all_is_causal_attention(how, model, ids):
    check(model, ids, how, lambda step: All(), everything)


@pytest.mark.parametrize("how", HOW)
def test_band(how, model, ids):
    def expected(visible, first):
        n = visible.shape[1]
        return (torch.arange(n) < 3) | (ages(n) < 6)

    check(model, ids, how, lambda step: Band(3, 6), expected)


@pytest.mark.parametrize("how", HOW)
def test_band_with_a_size_for_each_head(how, model, ids):
    sink, recent = [0, 1, 4, 2, 0, 8], [1, 3, 5, 40, FOREVER, 2]

    def expected(visible, first):
        n = visible.shape[1]
        return torch.stack([(torch.arange(n) < s) | (ages(n) < r) for s, r in zip(sink, recent, strict=True)])

    check(model, ids, how, lambda step: Band(sink, recent), expected)


def chosen(token, head):
    """A rule that names some tokens for each head; negative where it does not apply."""
    return (token * 5 + head * 3) % 7 < 3


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("heads", [KV, HEADS])
def test_tokens_are_past_slots_and_the_steps_own_keys(how, heads, model, ids):
    def select(step):
        token = step.per_head_like(step.token, heads)
        wanted = chosen(token, torch.arange(heads)[:, None]) & (token < step.q_token[:, :1, None])
        slots = torch.arange(step.T).expand_as(token).where(wanted, -1)
        return Tokens(slots[..., torch.randperm(step.T)])  # the order says nothing

    def expected(visible, first):
        n = visible.shape[1]
        rule = torch.stack([chosen(torch.arange(n), h) for h in range(heads)]).repeat_interleave(HEADS // heads, 0)
        return rule[:, None] | own(first)

    check(model, ids, how, select, expected)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("heads", [KV, HEADS])
@pytest.mark.parametrize("size", [1, 4])
def test_tokens_in_runs_end_where_the_past_ends(how, heads, size, model, ids):
    """Slots of the step itself change nothing: its keys are visible, and count once."""

    def select(step):
        pages = -(-step.T // size)
        wanted = torch.arange(pages) % 3 != torch.arange(heads)[:, None] // (heads // KV)
        return Tokens((torch.arange(pages) * size).expand(step.q.shape[0], heads, -1).where(wanted, -1), size)

    def expected(visible, first):
        # slots are counted among the keys a row held when the forward pass began
        past = visible & (torch.arange(visible.shape[1]) < first[:, None])
        slot = past.long().cumsum(-1) - 1
        head = torch.arange(HEADS)[:, None, None] // (HEADS // KV)
        return (past & (slot // size % 3 != head)) | own(first)

    check(model, ids, how, select, expected)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("heads", [1, KV])
def test_token_ids_are_looked_up_in_each_row(how, heads, model, ids):
    wanted = torch.stack([torch.tensor([0, 3, 4, 9, 12, 13, 30, 1000]) + 2 * h for h in range(heads)])

    def expected(visible, first):
        rule = (torch.arange(visible.shape[1])[:, None] == wanted[:, None]).any(-1).repeat_interleave(HEADS // heads, 0)
        return rule[:, None] | own(first)

    check(model, ids, how, lambda step: TokenIds(wanted.expand(step.q.shape[0], -1, -1)), expected)


@pytest.mark.parametrize("how", HOW)
def test_blocks(how, model, ids):
    size, generator = 8, torch.Generator().manual_seed(3)
    table = torch.rand(HEADS, 8, 8, generator=generator) < 0.5
    table |= torch.eye(8, dtype=torch.bool)

    def select(step):
        # query blocks count from the step's first query, key blocks from token 0
        rows, columns = -(-step.L // size), int(step.q_token.max()) // size + 1
        return Blocks(table[None, :, :rows, :columns].expand(step.q.shape[0], -1, -1, -1), size)

    def expected(visible, first):
        token = torch.arange(visible.shape[1])
        return table[:, (token - first) // size][:, :, token // size]

    check(model, ids, how, select, expected)


@pytest.mark.parametrize("how", HOW)
def test_subset_of_keys_and_queries(how, model, ids):
    def select(step):
        queries = step.q_token[:, None] % 4 != torch.arange(step.H)[:, None] % 4
        return Subset(chosen(step.token, torch.arange(step.G)[:, None]), queries)

    def expected(visible, first):
        token = torch.arange(visible.shape[1])
        keys = torch.stack([chosen(token, g) for g in range(KV)]).repeat_interleave(HEADS // KV, 0)
        queries = token % 4 != torch.arange(HEADS)[:, None] % 4
        return keys[:, None] & queries[:, :, None]

    check(model, ids, how, select, expected)


@pytest.mark.parametrize("how", HOW)
def test_nothing_gives_zero(how, model, ids):
    def expected(visible, first):
        seen = torch.ones_like(visible)
        seen[[1, 4]] = False
        return seen

    check(model, ids, how, lambda step: Nothing((1, 4)), expected)
    seen = watch(model, hook(select=lambda step: Nothing((1, 4))), ids, **HOW["chunks"])
    assert all((s.out[[1, 4]] == 0).all() and (s.out[[0, 2, 3, 5]] != 0).any() for *_, s in seen.each())


@pytest.mark.parametrize("how", HOW)
def test_and_is_what_all_parts_allow(how, model, ids):
    tokens = torch.tensor([[[0, 2, 3, 6, 8, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 38]]])

    def select(step):
        both = Band(2, [9, 20, 4, FOREVER, 7, 30]) & TokenIds(tokens.expand(step.q.shape[0], -1, -1))
        return All() & both & All() & Nothing((2,))

    def expected(visible, first):
        n = visible.shape[1]
        band = torch.stack([(torch.arange(n) < 2) | (ages(n) < r) for r in (9, 20, 4, FOREVER, 7, 30)])
        seen = band & (torch.isin(torch.arange(n), tokens) | own(first))
        seen[2] = False
        return seen

    check(model, ids, how, select, expected)


def test_selections_narrow_from_left_to_right():
    a, b, c = Band(1, 2), Nothing((0,)), Band(3, 4)
    assert (All() & a) is a and (a & All()) is a
    assert (a & b & c) == And((a, b, c)) and (a & b & All()) == And((a, b))


def test_a_window_without_itself_is_refused():
    with pytest.raises(foveal.InputError, match=r"recent >= 1.*got 0"):
        Band(4, 0)
    with pytest.raises(foveal.InputError, match="got -1"):
        Band(4, [3, -1])


def test_a_band_for_the_wrong_number_of_heads_is_refused(model, ids):
    with pytest.raises(foveal.InputError, match="each of 6 query heads, got 2"):
        watch(model, hook(select=lambda step: Band(4, [3, 3])), ids, chunks=(40,))
