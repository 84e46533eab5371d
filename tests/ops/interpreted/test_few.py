"""Choosing by a few dimensions, in Triton's interpreter, against all keys gathered and sorted."""

import pytest
import torch

from foveal.ops import few as op
from foveal.ops.gpu.few import launch
from foveal.ops.pages import Pages
from foveal.ops.ragged import Logit

KV = 2


def make(group: int, dim: int, w: int, dtype=torch.float32):
    """Two sequences where a head is alone, so that not all has to be run twice."""
    g, lengths = torch.Generator().manual_seed(0), (150, 33, 1, 64) if group == 1 else (150, 33)
    counts = [-(-n // 32) for n in lengths]
    order, table, used = (
        torch.randperm(sum(counts) + 2, generator=g).int(),
        torch.zeros(len(lengths), max(counts)).int(),
        0,
    )
    for row, n in enumerate(counts):
        table[row, :n], used = order[used : used + n], used + n
    key = torch.randn(sum(counts) + 2, 32, dim, generator=g).to(dtype)
    pages = Pages(key, key, table, torch.tensor(lengths, dtype=torch.int32), max(lengths))
    dims = torch.stack([torch.randperm(dim, generator=g)[:w] for _ in range(KV)]).int()
    dims[1, w - w // 4 :] = -1  # the heads of this one look at fewer
    chosen = torch.rand(KV * group, w, generator=g) < 0.7
    return torch.randn(len(lengths), group, dim, generator=g).to(dtype), pages, dims, chosen


def scores(q, pages, logit, dims, chosen, each):
    """By hand, one row and one head after the other: [lists, bound], -inf for what cannot be chosen."""
    rows, group, _ = q.shape
    found = []
    for row in range(rows):
        n = int(pages.length[row])
        key = pages.gather("key", torch.arange(n).expand(rows, -1).clamp(max=n - 1), torch.float64)[row]
        z = []
        for h in range(group):
            g = row % KV
            at = dims[g][chosen[g * group + h] & (dims[g] >= 0)].long()
            x = key[:, at] @ q[row, h, at].double() * logit.scale
            z.append(x if logit.softcap is None else logit.softcap * (x / logit.softcap).tanh())
        z = torch.stack(z) if each else torch.stack(z).softmax(-1).sum(0)[None]
        full = torch.full((len(z), pages.bound), -torch.inf, dtype=torch.float64)
        full[:, : n - 1] = z[:, : n - 1]
        found.append(full)
    return torch.cat(found)


def check(got, score, k, count, slack):
    """Ascending, as many as can be, and none is worse than one left out."""
    for row, slots in enumerate(got):
        some = int(min(k, (score[row] > -torch.inf).sum(), k if count is None else count[row]))
        picked = slots[:some].long()
        assert (slots[some:] == -1).all() and (picked >= 0).all() and (picked.diff() > 0).all()
        rest = score[row].clone()
        rest[picked] = -torch.inf
        assert some == 0 or score[row, picked].min() >= rest.max() - slack


@pytest.mark.parametrize(
    ("group", "dim", "w", "dtype", "softcap", "each", "counted"),
    [
        (4, 128, 32, torch.float32, None, False, True),
        (3, 64, 16, torch.float32, 5.0, True, True),
        (1, 96, 24, torch.float32, None, False, False),
        (7, 128, 128, torch.bfloat16, None, False, False),
        (2, 64, 16, torch.float16, 20.0, True, False),
    ],
)
def test_the_best_by_a_few_dimensions(group, dim, w, dtype, softcap, each, counted):
    q, pages, dims, chosen = make(group, dim, w, dtype)
    logit, k = Logit(0.3, softcap), 20
    expected = scores(q, pages, logit, dims, chosen, each)
    slack = 1e-5 if dtype == torch.float32 else 3e-2
    g = torch.Generator().manual_seed(1)
    count = torch.randint(0, k + 1, (len(expected),), generator=g) if counted else None
    got = launch(q, pages.key, pages.table, pages.length, pages.bound, dims, chosen, *logit[:2], k, count, each)
    check(got, expected, k, count, slack)
    check(op.few_slots(q, pages, logit, dims, chosen, k, each=each, count=count), expected, k, count, slack)


def test_other_dimensions_choose_others():
    q, pages, dims, chosen = make(2, 64, 16)
    args = (q, pages, Logit(0.3))
    one, two = (op.few_slots(*args, x, chosen, 20, each=False) for x in (dims, (dims + 1).clamp(max=63)))
    assert not torch.equal(one, two)
