"""The statistics kernels, run by Triton's interpreter, against the full probability matrix in float64."""

import pytest
import torch

from foveal.ops import reference, stats
from foveal.ops.dense import attend
from foveal.ops.gpu import stats as gpu
from foveal.ops.route import Route
from foveal.ops.stats import COLUMNS, NAMES, attention_stats, log_edges

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-4}
# (heads, kv_heads, head_dim, length, total): groups of 1, 3, 4, 7 and 9
SHAPES = [(2, 2, 64, 1, 1), (3, 1, 96, 1, 70), (4, 1, 128, 130, 130), (7, 1, 64, 33, 150), (9, 1, 64, 70, 75)]
LISTS = {"top_k", "top_k_keys"}  # slow to interpret: in tests of their own
OPTIONS = ["plain", "softcap", "bias", "head_bias", "mass", "head_mass", "all"]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(stats, "_route", lambda *args, **kwargs: Route("triton", "tested here"))


def problem(heads, kv_heads, head_dim, length, total, dtype, option="plain", batch=1, seed=0):
    g = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    q = rand(batch, length, heads, head_dim).transpose(1, 2)
    k = rand(batch, total, kv_heads, head_dim).transpose(1, 2)
    options = {"scale": head_dim**-0.5}
    if option in ("softcap", "all"):
        options["softcap"] = 1.5
    if option in ("bias", "head_bias", "all"):
        phi_k = rand(batch, heads if option == "head_bias" else kv_heads, total, 3)
        options["bias"] = rand(batch, heads, length, 3), phi_k
    if option in ("mass", "head_mass", "all"):
        mass_heads = heads if option == "head_mass" else kv_heads
        options["mass"] = torch.randint(0, 4, (batch, mass_heads, total), generator=g).float()
    _, lse = reference.attend(q, k, k, **options)
    return q, k, lse.float(), options


def compare(q, k, lse, options, want=NAMES, **more):
    """Run the kernels and compare; parameters that the reference needs too are in `more`."""
    parameters = {n: more[n] for n in ("block", "top", "edges") if n in more}
    found = attention_stats(q, k, lse, want=want, **options, **more)
    assert set(found) == set(want)
    rows = {"rows": more["rows"]} if "rows" in more else {}
    lies = {"edges": log_edges(k.shape[2])} | parameters | rows
    expected = reference.where_it_lies(q, k, lse, threshold=more.get("threshold", 0.01), **lies, **options)
    sink = {"sink": more["sink"]} if "sink" in more else {}
    exact = reference.attention_stats(q, k, lse, **options, **rows, **sink)
    expected = exact | expected | ({} if "threshold" in more else {"col_low": exact["col_low"]})
    for name, value in found.items():
        right = expected[name].double()
        assert value.shape == right.shape, name
        if name == "col_low":  # a probability within rounding of the threshold falls on either side
            assert (value.double() - right).abs().sum() <= 1 + 1e-3 * right.sum()
        elif name in ("row_argmax", "top_k_keys"):
            check_keys(q, k, lse, options, value, expected["row_max" if name == "row_argmax" else "top_k"], rows)
        else:
            tolerance = TOLERANCE[q.dtype]
            torch.testing.assert_close(
                value.double(), right, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


def check_keys(q, k, lse, options, keys, largest, rows):
    """The keys named have the largest probabilities, in their order, and no key is named twice."""
    start, stop = rows.get("rows", (0, q.shape[2]))
    p = reference.probabilities(reference.logits(q, k, **options), lse.double())[:, :, start:stop]
    assert keys.dtype == torch.int64
    keys, largest = (t if t.dim() == 4 else t[..., None] for t in (keys, largest))
    given = p.gather(-1, keys.clamp(min=0)).masked_fill(keys < 0, 0.0)
    torch.testing.assert_close(given, largest, atol=1e-5, rtol=1e-5)
    named = torch.zeros_like(p).scatter_add_(-1, keys.clamp(min=0), (keys >= 0).double())
    assert named.max() <= 1


@pytest.mark.parametrize(
    ("shape", "dtype"), [(s, torch.bfloat16) for s in SHAPES] + [(s, torch.float32) for s in SHAPES[1::2]]
)
def test_shapes(shape, dtype):
    compare(*problem(*shape, dtype), want=NAMES - LISTS)


@pytest.mark.parametrize(
    ("option", "dtype"), [(o, torch.bfloat16) for o in OPTIONS[1:]] + [(o, torch.float32) for o in OPTIONS[2::2]]
)
def test_options(option, dtype):
    want = {"col_mass", "col_low", "entropy", "sink_mass", "row_argmax"}
    compare(*problem(2, 1, 64, 20, 100, dtype, option, batch=2), want=want)


def test_all_at_once():
    compare(*problem(3, 1, 64, 20, 90, torch.bfloat16, "all"))


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_alone(name):
    """Every statistic is a kernel of its own; 250 keys are several tiles before the diagonal."""
    compare(*problem(1, 1, 64, 20, 250, torch.bfloat16, "mass"), want={name}, sink=70)


@pytest.mark.parametrize("rows", [(0, 1), (60, 75), (3, 70)])
def test_rows(rows):
    compare(*problem(2, 1, 64, 75, 200, torch.bfloat16, "all"), want=NAMES - LISTS, rows=rows)


@pytest.mark.parametrize("head_dim", [80, 256])
def test_head_sizes(head_dim):
    compare(*problem(2, 1, head_dim, 70, 150, torch.bfloat16), want=NAMES - LISTS)


@pytest.mark.parametrize("block", [64, 128, 192, 256])
def test_blocks(block):
    compare(*problem(1, 1, 64, 300, 450, torch.bfloat16), want={"block_map"}, block=block)


@pytest.mark.parametrize("top", [1, 3, 32])
def test_tops(top):
    compare(*problem(1, 1, 64, 20, 130, torch.bfloat16), want={"top_k", "top_k_keys"}, top=top)


@pytest.mark.parametrize("edges", [[0], [0, 1], [0, 5, 6, 7, 90, 91], [0, 1000], list(range(120))])
def test_edges(edges):
    compare(*problem(1, 1, 64, 140, 220, torch.bfloat16), want={"offset_histogram"}, edges=edges)


def test_a_threshold():
    compare(*problem(2, 1, 64, 140, 220, torch.bfloat16), want={"col_low"}, threshold=0.004)


def test_strided_and_misaligned_inputs():
    q, k, lse, options = problem(4, 2, 64, 33, 90, torch.bfloat16)
    wide_q, wide_k = (torch.cat([t, t + 1], -1)[..., :64] for t in (q, k))
    odd_q, odd_k = (torch.cat([t[..., :1], t], -1)[..., 1:] for t in (q, k))
    one = k[:, :1].expand(-1, 2, -1, -1)
    for q_, k_ in ((wide_q, wide_k), (odd_q, odd_k), (q, one)):
        _, lse = attend(q_.float(), k_.float(), k_.float(), need_lse=True, **options)
        compare(q_, k_, lse, options, want={"col_mass", "entropy"})


def test_rows_and_logits_at_the_extremes():
    """Keys of mass 0 only, and logits above the diagonal whose exp overflows, leave no NaN and no infinity."""
    q, k, _, _ = problem(1, 1, 64, 70, 70, torch.bfloat16)
    mass = torch.ones(1, 1, 70)
    mass[:, :, :10] = 0
    k = k.clone()
    k[:, :, 20:] *= 300
    _, lse = reference.attend(q, k, k, scale=1.0, mass=mass)
    found = attention_stats(q, k, lse.float(), want=NAMES, scale=1.0, mass=mass)
    assert all(t.isfinite().all() for t in found.values())
    for name in ("col_mass", "col_low", "sink_mass", "row_max", "row_argmax"):
        assert found[name][..., :10].abs().max() == 0
    assert (found["top_k_keys"][:, :, :10] == -1).all()
    assert found["row_max"][..., 10:].min() > 0


def test_learned_sinks_take_their_share():
    q, k, lse, options = problem(4, 2, 64, 40, 40, torch.bfloat16)
    sinks = torch.tensor([0.0, 2.0, -3.0, 1.0])
    joint = torch.logaddexp(lse, sinks[None, :, None].expand_as(lse))
    found = attention_stats(q, k, joint, want={"sink_mass"}, sink=40, **options)["sink_mass"]
    torch.testing.assert_close(found, 1 - (sinks[None, :, None] - joint).exp(), atol=1e-4, rtol=1e-4)


def test_the_operators_are_declared_rightly():
    q, k, lse, _ = problem(2, 1, 64, 20, 40, torch.bfloat16)
    low, edges = torch.full((1, 1, 20), -5.0), torch.tensor([0, 4], dtype=torch.int32)
    inputs = q, k, lse * gpu.LOG2E, None, None, None
    torch.library.opcheck(gpu.columns, (*inputs, low, 20, 0.1, None, "col_low,col_mass"))
    want = ",".join(sorted(NAMES - COLUMNS))
    torch.library.opcheck(gpu.rows, (*inputs, edges, 20, 0.1, 30.0, 4, 64, 2, want))
