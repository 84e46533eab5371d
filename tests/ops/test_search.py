"""What searches by halving and indexers ask of their arguments, and how a long search is cut."""

import pytest
import torch

import foveal
from foveal.ops import index, index_flat, index_two_stage, tree, tree_search, which

Q, K = torch.randn(1, 6, 70, 16), torch.randn(1, 2, 90, 16)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"wanted": 0}, "expected wanted of at least 1, got 0"),
        ({"recent": 0}, "expected recent of at least 1, got 0"),
        ({"representative": "last"}, "one of first, middle, random, got 0 and 'last'"),
        ({"q": Q[:, :5]}, "."),
    ],
)
def test_a_search_that_cannot_be(wrong, message):
    with pytest.raises(foveal.InputError, match=message):
        tree_search(**{"q": Q, "k": K, "wanted": 3, "query_block": 8, "key_block": 2} | wrong)


def test_a_search_in_parts_is_the_whole(monkeypatch):
    how = {"wanted": 5, "query_block": 8, "key_block": 2, "sink": 3, "recent": 6, "stride": 3}
    whole = tree_search(Q, K, **how)
    monkeypatch.setattr(tree, "_TILE_NUMBERS", 1)
    assert torch.equal(tree_search(Q, K, **how), whole) and (whole >= 0).any()
    assert which("tree_search", Q, K, **how).name == "torch"


def test_a_batch_is_searched_row_by_row():
    q, k = torch.cat([Q, Q.flip(2)]), torch.cat([K, K.flip(2)])
    rows = [tree_search(x[None], y[None], 4, query_block=16, key_block=3) for x, y in zip(q, k, strict=True)]
    assert torch.equal(tree_search(q, k, 4, query_block=16, key_block=3), torch.cat(rows))


@pytest.mark.parametrize("relu", [True, False])
def test_indexers_in_parts_are_the_whole(relu, monkeypatch):
    """Runs of queries do not depend on which are computed together."""
    q, w, k = Q.double(), torch.rand(1, 6, 70).double(), K[0, :1].double()
    how = {"relu": relu, "size": 4}
    flat, staged = index_flat(q, w, k, 9, **how), index_two_stage(q, w, k, 9, block=5, blocks=6, **how)
    monkeypatch.setattr(index, "_runs", lambda q, size, numbers: (range(a, min(a + 5, 18)) for a in range(0, 18, 5)))
    assert torch.equal(index_flat(q, w, k, 9, **how), flat)
    assert torch.equal(index_two_stage(q, w, k, 9, block=5, blocks=6, **how), staged)
    assert which("index_two_stage", q, w, k, 9, block=5, blocks=6).name == "torch"


def test_heads_without_a_relu_are_one():
    q, w, k = Q.double(), torch.rand(1, 6, 70).double(), K[0, :1].double()
    scores = (q[0] @ k[0].T * w[0, :, :, None]).sum(0)
    scores = scores.masked_fill(torch.arange(90) > torch.arange(20, 90)[:, None], -torch.inf)
    assert torch.equal(index_flat(q, w, k, 9, relu=False)[0].long(), scores.topk(9).indices.sort().values)
