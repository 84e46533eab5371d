"""Blockwise attention statistics against the full probability matrix in float64."""

import functools

import pytest
import torch

from foveal.errors import InputError
from foveal.ops import reference
from foveal.ops.dense import attend
from foveal.ops.stats import NAMES, attention_stats, log_edges

# Absolute and relative at once; distances add up to hundreds of tokens, hence relative.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-3}
HEADS = [(3, 3), (9, 3), (7, 1), (9, 1)]
LENGTHS = [(1, 1), (1, 9), (5, 9), (40, 40)]
LONG = [(dtype, heads, (i + j) % 2 == 0) for i, dtype in enumerate(TOLERANCE) for j, heads in enumerate(HEADS)]
"""Dtype, heads, extras: every pair of two of them, over several tiles."""


def problem(heads, kv_heads, length, total, dtype=torch.float32, batch=1, extras=False, seed=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    q = rand(batch, length, heads, 16).transpose(1, 2)
    k = rand(batch, total, kv_heads, 16).transpose(1, 2)
    options = {"scale": 0.3}
    if extras:
        options["softcap"] = 1.5
        options["bias"] = rand(batch, heads, length, 2), rand(batch, kv_heads, total, 2)
        options["mass"] = torch.randint(0, 4, (batch, kv_heads, total), generator=g).to(dtype)
    _, lse = attend(q, k, k, need_lse=True, **options)
    return q, k, lse, options


def expected_of(q, k, lse, *, sink=4, **options):
    """Every statistic in float64; the ones with parameters of their own at their defaults."""
    lies = reference.where_it_lies(q, k, lse, edges=log_edges(k.shape[2]), **options)
    del lies["col_low"]
    return reference.attention_stats(q, k, lse, sink=sink, **options) | lies


def agrees(found, expected, dtype):
    for name, value in found.items():
        tolerance = TOLERANCE[dtype]
        if name in ("row_argmax", "top_k_keys"):
            assert value.dtype == torch.long
        elif dtype == torch.float64:
            assert value.dtype == torch.float64
        else:
            assert value.dtype == torch.float32
        if name == "col_low" and dtype != torch.float64:
            # A probability within rounding of 1/t falls on either side; that is rare.
            assert (value.double() - expected[name]).abs().sum() <= 1 + 1e-4 * expected[name].sum()
            continue
        if name == "top_k_keys" and dtype != torch.float64:
            # Near-equal probabilities may change places: what the keys are given must be what is listed.
            close = (value == expected[name]) | (expected["top_k"] - expected["top_k"].roll(1, -1)).abs().lt(tolerance)
            close |= (expected["top_k"] - expected["top_k"].roll(-1, -1)).abs().lt(tolerance)
            assert close[..., :-1].all()
            continue
        torch.testing.assert_close(value.double(), expected[name].double(), atol=tolerance, rtol=tolerance, msg=name)


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_all_statistics(dtype, heads, lengths, extras):
    all_agree(dtype, heads, lengths, extras)


@pytest.mark.parametrize(("dtype", "heads", "extras"), LONG)
def test_all_statistics_over_several_tiles(dtype, heads, extras):
    all_agree(dtype, heads, (300, 600), extras)


def all_agree(dtype, heads, lengths, extras):
    q, k, lse, options = problem(*heads, *lengths, dtype, batch=2, extras=extras)
    found = attention_stats(q, k, lse, want=NAMES, **options)
    assert set(found) == NAMES
    agrees(found, expected_of(q, k, lse, **options), dtype)


@functools.cache
def many_tiles():
    """A problem of 4 x 7 tiles and its answers: the same for every statistic."""
    q, k, lse, options = problem(3, 1, 1000, 1700, torch.float64)
    return q, k, lse, options, expected_of(q, k, lse, sink=7, **options)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_one_statistic_over_many_tiles(name):
    q, k, lse, options, expected = many_tiles()
    found = attention_stats(q, k, lse, want={name}, sink=7, **options)
    assert set(found) == {name}
    agrees(found, expected, torch.float64)


@pytest.mark.parametrize("rows", [(0, 0), (0, 1), (270, 300), (100, 299)])
@pytest.mark.parametrize("extras", [False, True])
def test_rows(rows, extras):
    q, k, lse, options = problem(9, 3, 300, 420, torch.float64, extras=extras)
    found = attention_stats(q, k, lse, want=NAMES, rows=rows, **options)
    agrees(found, expected_of(q, k, lse, rows=rows, **options), torch.float64)


def test_probabilities_of_a_dense_row_sum_to_one():
    q, k, lse, options = problem(9, 3, 500, 500)
    found = attention_stats(q, k, lse, want={"col_mass", "sink_mass"}, sink=500, **options)
    torch.testing.assert_close(found["col_mass"].sum(-1), torch.full((1, 9), 500.0))
    torch.testing.assert_close(found["sink_mass"], torch.ones(1, 9, 500))


def test_uniform_attention():
    """With all keys equal, query i gives each of its i + 1 keys 1/(i + 1): every statistic has a closed form."""
    n = 50
    q, k = torch.randn(1, 2, n, 8, generator=torch.Generator().manual_seed(0)), torch.ones(1, 1, n, 8)
    _, lse = attend(q, k, k, scale=1.0, need_lse=True)
    found = attention_stats(q, k, lse, want=NAMES, scale=1.0, sink=1)
    seen = torch.arange(1, n + 1).float()
    expected = {
        "col_mass": (1 / seen).flip(0).cumsum(0).flip(0),
        "col_low": torch.zeros(n),
        "entropy": seen.log(),
        "sink_mass": 1 / seen,
        "mean_distance": (seen - 1) / 2,
        "row_max": 1 / seen,
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.expand(1, 2, n), atol=2e-5, rtol=2e-5, msg=name)


def test_learned_sinks_take_their_share():
    q, k, _, options = problem(3, 3, 30, 30, torch.float64)
    sinks = torch.tensor([0.0, 2.0, -3.0], dtype=torch.float64)
    _, lse = attend(q, k, k, sinks=sinks, need_lse=True, **options)
    found = attention_stats(q, k, lse, want={"sink_mass"}, sink=30, **options)["sink_mass"]
    torch.testing.assert_close(found, 1 - (sinks[None, :, None] - lse).exp())


def test_rows_and_logits_at_the_extremes():
    """Keys of mass 0 only, and logits above the diagonal whose exp overflows, leave no NaN and no infinity."""
    q, k, _, _ = problem(2, 2, 40, 40)
    mass = torch.ones(1, 2, 40)
    mass[:, :, :10] = 0
    k = k.clone()
    k[:, :, 20:] *= 300
    _, lse = attend(q, k, k, scale=1.0, mass=mass, need_lse=True)
    found = attention_stats(q, k, lse, want=NAMES, scale=1.0, mass=mass)
    expected = reference.attention_stats(q, k, lse, scale=1.0, mass=mass)
    assert all(t.isfinite().all() for t in found.values())
    for name in ("col_mass", "col_low", "sink_mass", "row_max"):
        assert found[name][..., :10].abs().max() == 0
    assert found["row_max"][..., 10:].min() > 0
    torch.testing.assert_close(found["row_argmax"], expected["row_argmax"])


def test_requests_that_cannot_be_met():
    q, k, lse, options = problem(3, 3, 8, 8)
    with pytest.raises(InputError, match="col_maas"):
        attention_stats(q, k, lse, want={"col_maas"}, **options)
    for rows in ((-1, 4), (5, 4), (0, 9)):
        with pytest.raises(InputError, match="rows"):
            attention_stats(q, k, lse, want={"entropy"}, rows=rows, **options)
    with pytest.raises(InputError, match="lse"):
        attention_stats(q, k, lse[:, :, 1:], want={"entropy"}, **options)


WHERE = {"offset_histogram", "block_map", "top_k", "top_k_keys"}


@pytest.mark.parametrize("rows", [(0, 300), (37, 41), (100, 299)])
@pytest.mark.parametrize(("edges", "block", "top"), [([0], 1, 1), ([0, 3, 4, 90, 700], 100, 5), ([0, 1000], 700, 600)])
def test_bins_blocks_and_lists(rows, edges, block, top):
    q, k, lse, options = problem(6, 3, 300, 420, torch.float64, extras=True)
    more = {"rows": rows, "edges": edges, "block": block, "top": top}
    found = attention_stats(q, k, lse, want=WHERE, **more, **options)
    agrees(found, reference.where_it_lies(q, k, lse, **more, **options), torch.float64)


def test_a_threshold():
    q, k, lse, options = problem(6, 3, 300, 420, torch.float64, extras=True)
    found = attention_stats(q, k, lse, want={"col_low"}, threshold=0.004, **options)
    expected = reference.where_it_lies(q, k, lse, edges=[0], threshold=0.004, **options)["col_low"]
    expected = expected.masked_fill(options["mass"].repeat_interleave(2, 1) == 0, 0.0)
    assert torch.equal(found["col_low"], expected) and expected.sum() > 0


def test_maps_and_bins_share_out_the_whole_probability():
    q, k, lse, options = problem(9, 3, 500, 500)
    found = attention_stats(q, k, lse, want={"offset_histogram", "block_map"}, block=100, **options)
    torch.testing.assert_close(found["offset_histogram"].sum(-1), torch.full((1, 9), 500.0))
    torch.testing.assert_close(found["block_map"].sum(-1), torch.full((1, 9, 5), 100.0))


def test_default_bins_double():
    assert log_edges(1) == [0] and log_edges(2) == [0, 1] and log_edges(9) == [0, 1, 2, 4, 8]


def test_parameters_out_of_range():
    q, k, lse, options = problem(3, 3, 8, 8)
    wrong = ({"edges": [1, 2]}, {"edges": [0, 2, 2]}, {"edges": []}, {"block": 0}, {"top": 0}, {"threshold": 0.0})
    for parameters in wrong:
        with pytest.raises(InputError, match=next(iter(parameters))):
            attention_stats(q, k, lse, want={"col_low"}, **parameters, **options)


def test_the_route_is_told_with_its_reason(monkeypatch):
    from foveal.ops import stats, which

    q, k, lse, options = problem(3, 3, 8, 8)
    assert which("attention_stats", q, k, lse, want={"entropy"}, **options) == ("torch", "the tensors are on cpu")
    monkeypatch.setattr(stats, "no_kernel", lambda x: None)
    q, k = q.bfloat16(), k.bfloat16()
    ask = {"want": {"entropy", "block_map", "top_k", "offset_histogram"}, **options}
    assert which("attention_stats", q, k, lse, **ask).name == "triton"
    rank = torch.zeros(1, 3, 8, 11), torch.zeros(1, 3, 8, 11)
    for changed, why in (
        ({"block": 48}, "multiples of 64"), ({"top": 33}, "32 keys"), ({"bias": rank}, "rank 10"),
        ({"edges": range(200)}, "128 bins"), ({"rows": (3, 3)}, "nothing to compute"),
    ):  # fmt: skip
        route = which("attention_stats", q, k, lse, **{**ask, **changed})
        assert route.name == "torch" and why in route.why
    assert "float16" in which("attention_stats", q.float(), k.float(), lse, **ask).why
    assert "head sizes" in which("attention_stats", q[..., :12], k[..., :12], lse, **ask).why
