"""Votes, renumbered attention, the least of a list and the newest page, under Triton's interpreter, against the PyTorch paths."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.ops import pages as page_op
from foveal.ops import scores, votes
from foveal.ops.ragged import Logit
from foveal.ops.route import Route
from foveal.ops.votes import Kept, Turn

gpu = pytest.importorskip("foveal.ops.gpu.votes", reason="needs triton")
gpu_renumbered = pytest.importorskip("foveal.ops.gpu.renumbered", reason="needs triton")
gpu_pooled = pytest.importorskip("foveal.ops.gpu.pooled", reason="needs triton")

KV = 2


def make(lengths, group, dim, *, dtype=torch.float32, seed=0, bound=None):
    """Rows of sequences of these lengths, `KV` each, in shuffled pages of 8; some keys differ by much."""
    g = torch.Generator().manual_seed(seed)
    lengths = [n for n in lengths for _ in range(KV)]
    bound = bound or max(lengths)
    counts = [-(-bound // 8)] * len(lengths)
    order = torch.randperm(sum(counts), generator=g).to(torch.int32)
    key, value = (torch.randn(sum(counts), 8, d, generator=g).to(dtype) for d in (dim, dim + 8))
    length = torch.tensor(lengths, dtype=torch.int32)
    pages = page_op.Pages(key, value, order.view(len(lengths), -1), length, bound)
    return torch.randn(len(lengths), group, dim, generator=g).to(dtype), pages


def frequencies(dim):
    return 10000.0 ** (-torch.arange(dim // 2) / (dim // 2))


@pytest.fixture
def kernels(monkeypatch):
    """Operations take the kernels, as they would on a GPU."""

    def on():
        monkeypatch.setattr(votes, "_route", lambda *_: Route("triton", "tested"))
        monkeypatch.setattr(scores, "_pool_newest_route", lambda *_, **__: Route("triton", "tested"))

    return on


CHOICES = {
    "tidal": {"sink": 3, "recent": 5},
    "token-select": {"sink": 3, "recent": 5, "middle": True, "coarse": True, "turn": 16},
    "each": {"sink": torch.tensor([2, 0]), "recent": torch.tensor([4, 1]), "middle": True, "turn": 4, "count": torch.tensor([20, 9])},
    "rows": {"whole": False, "own": True, "share": "max"},
    "mean": {"whole": False, "own": True, "share": "mean", "count": torch.tensor([20, 9, 3, 30])},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CHOICES)
def test_vote_slots(name, dtype, kernels):
    how = CHOICES[name] | {"kv_heads": KV}
    for group, dim, k, logit in ((3, 48, 30, Logit(0.2)), (1, 16, 12, Logit(0.5, 3.0))):
        q, pages = make([100, 41], group, dim, dtype=dtype, bound=104)
        turn = {"turn": Turn(frequencies(dim), how["turn"])} if "turn" in how else {}
        expected, found = votes._torch(
            q, pages, logit, k, KV, how.get("whole", True), how.get("share", "sum"), (how.get("sink", 0), how.get("recent", 0)),
            how.get("middle", False), how.get("own", False), False, how.get("count"), turn.get("turn"), None,
        )  # fmt: skip
        kernels()
        got, many = votes.vote_slots(q, pages, logit, k, **how | turn | {"coarse": False})
        assert torch.equal(many, found)
        if dtype == torch.float32 or not turn:
            assert torch.equal(got, expected)
        else:  # turned keys are rounded: what lies at the edge may differ
            same = [len(set(a) & set(b)) for a, b in zip(got.tolist(), expected.tolist(), strict=True)]
            assert all(n >= 0.85 * len(set(b)) for n, b in zip(same, expected.tolist(), strict=True))
            assert torch.equal(got, got.where(got < 0, got.sort().values)) or (got.diff() > 0)[got[:, 1:] >= 0].all()


def test_votes_compared_in_bfloat16(kernels):
    """Keys whose votes agree to eight bits are equals, and then the earlier wins."""
    q, pages = make([64], 2, 16)
    pages.key[pages.table[:, 1:].flatten().long()] = pages.key[pages.table[:, :1].flatten().long()].repeat_interleave(
        7, 0
    )
    pages.key[pages.table[:, 3].long()] *= 1 + 1e-5  # a little more, or a little less, than its equals
    how = {"kv_heads": KV}
    fine, coarse = (votes.vote_slots(q, pages, Logit(0.1), 3, coarse=c, **how)[0] for c in (False, True))
    assert (coarse % 8 == coarse[0, 0]).all() and (coarse < 24).all() and not (fine < 24).all()
    kernels()
    assert torch.equal(votes.vote_slots(q, pages, Logit(0.1), 3, coarse=True, **how)[0], coarse)
    assert torch.equal(votes.vote_slots(q, pages, Logit(0.1), 3, **how)[0], fine)


def test_choices_are_repeated_for_sequences_alike(kernels):
    q, pages = make([50, 37], 2, 16)
    marks = torch.rand(2 * KV, 56, generator=torch.Generator().manual_seed(1)) < 0.2
    marks = marks[::KV].repeat_interleave(KV, 0)
    how = {"kv_heads": KV, "sink": 1, "recent": 2, "turn": Turn(frequencies(16), 4)}
    for again in ([True, False], [True, True]):
        kept = Kept(torch.tensor(again), marks[:, : pages.bound])
        expected = votes.vote_slots(q, pages, Logit(0.3), 9, kept=kept, **how)
        assert not torch.equal(expected[0], votes.vote_slots(q, pages, Logit(0.3), 9, **how)[0])
    kernels()
    got = votes.vote_slots(q, pages, Logit(0.3), 9, kept=kept, **how)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(1, 60), (9, 16), (4, 33)]), st.sampled_from([1, 7, 63]))
def test_any_lengths(seed, lengths, k):
    q, pages = make(lengths, 2, 16, seed=seed, bound=64)
    how = {"kv_heads": KV, "sink": 2, "recent": 3, "middle": True}
    expected = votes.vote_slots(q, pages, Logit(0.4), k, **how)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(votes, "_route", lambda *_: Route("triton", "tested"))
        got = votes.vote_slots(q, pages, Logit(0.4), k, **how)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attend_renumbered(dtype, kernels):
    for group, dim, m in ((3, 48, 40), (1, 16, 3)):
        q, pages = make([90, 60], group, dim, dtype=dtype)
        slots = torch.stack([torch.randperm(n, generator=torch.Generator().manual_seed(n))[:m] for n in (89, 59)])
        slots, found = slots.sort(-1).values.int(), torch.tensor([m, m // 2], dtype=torch.int32)
        slots[1, m // 2 :] = -1
        for logit in (Logit(0.3), Logit(0.3, 2.0, torch.randn(2 * KV, group))):
            how = (slots, found, frequencies(dim))
            expected = votes.attend_renumbered(q, pages, logit, *how, kv_heads=KV)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(votes, "_route", lambda *_: Route("triton", "tested"))
                got = votes.attend_renumbered(q, pages, logit, *how, kv_heads=KV)
            tolerance = 1e-4 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("share", ["max", "mean"])
def test_drop_least(share):
    q, pages = make([70, 40], 3, 16, bound=72)
    g = torch.Generator().manual_seed(3)
    marks = torch.rand(2 * KV, 80, generator=g)[:, :72] < 0.3
    marks &= torch.arange(72) < pages.length[:, None] - 1
    marks[2] = False
    slots = votes.top_slots(torch.zeros(marks.shape).masked_fill(~marks, -math.inf), 40)
    for allowed in (int(marks[0].sum()) + 1, 40, torch.tensor([15, 3])):  # one row is just full
        how = {"kv_heads": KV, "share": share}
        expected, got = marks.clone(), torch.zeros(2 * KV, 80, dtype=torch.bool)[:, :72]
        got.copy_(marks)
        votes.drop_least(q, pages, Logit(0.5), slots, expected, allowed, **how)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(votes, "_route", lambda *_: Route("triton", "tested"))
            votes.drop_least(q, pages, Logit(0.5), slots, got, allowed, **how)
        assert torch.equal(got, expected) and not torch.equal(got, marks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_newest(dtype, kernels):
    _, pages = make([24, 33, 1], 1, 20, dtype=dtype)
    pages.length[0] = 0
    for size in (4, 12):
        pooled = {kind: torch.full((2 * 3, 9, 40), 7.0, dtype=dtype)[..., :20] for kind in ("min", "max", "mean")}
        expected = {kind: x.clone() for kind, x in pooled.items()}
        scores.pool_newest(pages, "key", size, expected)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scores, "_pool_newest_route", lambda *_, **__: Route("triton", "tested"))
            scores.pool_newest(pages, "key", size, pooled)
        for kind, x in pooled.items():
            torch.testing.assert_close(x, expected[kind], atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=0)
        assert (expected["min"][0] == 7).all() and (expected["max"][1] != 7).sum() == 20


def test_angles_far_out():
    """The kernel's own sine against double precision, up to a million positions."""
    import triton
    import triton.language as tl

    @triton.jit
    def both(X, C, S, N: tl.constexpr):
        i = tl.arange(0, N)
        c, s = gpu._cos_sin(tl.load(X + i))
        tl.store(C + i, c)
        tl.store(S + i, s)

    x = torch.cat([torch.linspace(-7, 7, 512), torch.linspace(-1e5, 1e5, 512)]).float()
    c, s = torch.empty(2, 1024)
    both[(1,)](x, c, s, N=1024)
    torch.testing.assert_close(c, x.double().cos().float(), atol=2e-6, rtol=0)
    torch.testing.assert_close(s, x.double().sin().float(), atol=2e-6, rtol=0)


def test_operators_describe_their_results():
    q, pages = make([30, 20], 2, 16)
    rest = (pages.table, pages.length, pages.bound)
    checks = ("test_schema", "test_faketensor")
    args = (
        q,
        pages.key,
        *rest,
        KV,
        0.3,
        None,
        5,
        None,
        1,
        2,
        None,
        True,
        False,
        "sum",
        True,
        True,
        frequencies(16),
        3,
        None,
        None,
    )
    torch.library.opcheck(gpu.vote_slots, args, test_utils=checks)
    slots, found = torch.arange(4, dtype=torch.int32).repeat(2, 1), torch.tensor([4, 3], dtype=torch.int32)
    args = (q, pages.key, pages.value, pages.table, pages.length, slots, found, frequencies(16), KV, 0.3, None, None)
    torch.library.opcheck(gpu_renumbered.attend_renumbered, args, test_utils=checks)
    marks = torch.zeros(4, 30, dtype=torch.bool)
    args = (q, pages.key, pages.value, *rest, 0.3, None, slots.repeat(2, 1), marks, 3, None, KV, False)
    torch.library.opcheck(gpu.drop_least, args, test_utils=checks)
    args = (pages.key, pages.table, pages.length, 4, torch.zeros(4, 9, 16), torch.zeros(4, 9, 16), None)
    torch.library.opcheck(gpu_pooled.pool_newest, args, test_utils=checks)
