"""HiP's search as a kernel, under Triton's interpreter, against the search written out and against the PyTorch path."""

import math

import pytest
import torch

from foveal.ops import tree

gpu = pytest.importorskip("foveal.ops.gpu.tree", reason="needs triton")

DTYPES = [torch.float32, torch.bfloat16]


def drawn(heads, kv_heads, length, total, dim, dtype, whole, seed=0):
    """As models hand it over. Whole numbers make every product exact, so that equal scores are equal in any order of addition."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, n, h, dim, generator=g) for n, h in ((length, heads), (total, kv_heads)))
    return ((x * 1.5).round() if whole else x for x in (q.to(dtype).transpose(1, 2), k.to(dtype).transpose(1, 2)))


def written_out(q, k, wanted, query_block, key_block, sink, recent, kind, stride):
    """One list after another, groups in a Python list; of equal scores the earlier group."""
    (heads, length), (kv_heads, total) = q.shape[1:3], k.shape[1:3]
    group, out = heads // kv_heads, []
    z = q[0].double().unflatten(0, (kv_heads, group)) @ k[0].double()[:, None].mT  # [kv_heads, group, length, total]
    for g in range(kv_heads):
        for a in range(0, length, query_block):
            stop = max(sink, total - length + a + 1 - recent)
            rows = [min(i, length - 1) for i in range(a, a + query_block, stride)]
            best = z[g][:, rows].amax((0, 1))
            count = -(-(stop - sink) // key_block)

            def tokens(b, stop=stop):
                return [t for t in range(sink + b * key_block, sink + (b + 1) * key_block) if t < stop]

            def value(node, best=best, tokens=tokens):
                stands = node[0]
                if kind == "middle":
                    stands = (node[0] + node[1]) // 2
                if kind == "random":
                    stands += ((node[0] * 2654435761 + node[1] * 40503) >> 7) % (node[1] - node[0])
                return max(best[t].item() for t in tokens(stands))

            n = min(count, wanted)
            nodes = [(i * count // n, (i + 1) * count // n) for i in range(n)]
            while any(r - l > 1 for l, r in nodes):
                halves = [x for l, r in nodes for x in ((l, (l + r) // 2), ((l + r) // 2, r)) if x[0] < x[1]]
                order = sorted(range(len(halves)), key=lambda i: -value(halves[i]))[:wanted]
                nodes = [halves[i] for i in sorted(order)]
            found = [t for l, _ in nodes for t in tokens(l)]
            row = torch.full((wanted * key_block,), -1, dtype=torch.int32)
            row[: len(found)] = torch.tensor(found, dtype=torch.int32)
            out.append(row)
    return torch.stack(out).view(1, kv_heads, -1, wanted * key_block)


CASES = [  # heads, KV heads; queries, tokens before them; blocks wanted; query and key block; sinks, window; kind, stride
    (6, 2, 25, 0, 3, (8, 2), (3, 6), "first", 2),
    (7, 1, 20, 37, 8, (16, 3), (0, 1), "middle", 1),
    (9, 1, 8, 60, 1, (5, 8), (3, 6), "random", 1),  # one block is wanted
    (2, 2, 40, 37, 40, (32, 1), (0, 1), "first", 3),
    (6, 2, 45, 0, 5, (32, 4), (16, 40), "first", 1),  # sinks and window leave nothing
    (3, 1, 1, 50, 4, (8, 2), (1, 3), "first", 2),
    (3, 1, 30, 90, 7, (16, 2), (2, 5), "random", 2),
    (4, 4, 20, 1, 30, (8, 5), (0, 2), "middle", 1),  # more blocks are wanted than there are
    (6, 2, 24, 40, 2, (4, 8), (1, 5), "middle", 1),  # of the last block a part is searched
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_search(case, dtype):
    """Scores of whole numbers are exact and often equal: kernel, PyTorch and the search written out agree to the token."""
    heads, kv_heads, length, past, wanted, blocks, ends, kind, stride = case
    q, k = drawn(heads, kv_heads, length, length + past, 24 if wanted % 2 else 16, dtype, whole=True, seed=length)
    names = {"query_block": blocks[0], "key_block": blocks[1], "sink": ends[0], "recent": ends[1]}
    plain = tree.tree_search(q, k, wanted, **names, representative=kind, stride=stride)
    assert torch.equal(plain, written_out(q, k, wanted, *blocks, *ends, kind, stride))
    found = gpu.launch(q, k, wanted, *blocks, *ends, tree.REPRESENTATIVES.index(kind), stride)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_numbers_and_rows_of_several_tiles(dtype):
    """256 rows are more than a tile of queries; the levels are many."""
    q, k = drawn(8, 2, 64, 400, 24, dtype, whole=False)
    found = gpu.launch(q, k, 20, 64, 4, 4, 100, 0, 1)
    plain = tree.tree_search(q, k, 20, query_block=64, key_block=4, sink=4, recent=100)
    assert torch.equal(found, plain) and (found >= 0).float().mean() > 0.9


def test_the_operator_describes_its_result_and_is_taken(monkeypatch):
    q, k = drawn(6, 2, 9, 30, 16, torch.float32, whole=True)
    torch.library.opcheck(gpu.tree_search, (q, k, 3, 8, 2, 1, 4, 1, 2), test_utils=("test_schema", "test_faketensor"))
    how = {"query_block": 8, "key_block": 2, "sink": 1, "recent": 4, "representative": "middle", "stride": 2}
    plain, taken = tree.tree_search(q, k, 3, **how), []
    monkeypatch.setattr(tree, "no_kernel", lambda x: taken.append(1))
    assert torch.equal(tree.tree_search(q, k, 3, **how), plain) and taken
    assert math.prod(plain.shape) == 2 * 2 * 6
