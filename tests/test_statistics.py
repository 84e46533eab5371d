"""Statistics a step offers equal those of explicit attention weights, on every path and in slots of the store."""

import pytest
import torch
from models import tiny
from reference import causal, hook, logits, over_heads, thin, thinned, watch, weights

import foveal
from foveal.edits import Bias
from foveal.selection import Band
from foveal.store import FAR

N, HEADS, KV = 43, 6, 2
NEEDS = ("col_mass", "col_low", "entropy", "sink_mass", "lse", "row_argmax")
HOW = {"padded": (40,), "chunks": (17, 23), "ragged": (17, 23)}
PADS = (0, 7)


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(2))


def spy(needs, **hooks):
    """A method that writes down what it is told: [(first token, stats, token of each slot)] for each sequence of a step."""
    log = []

    def after(step):
        token = step.per_head(step.token)
        for b in range(step.q.shape[0]):
            stats = {name: x[b].clone() for name, x in step.stats.items()}
            log.append((int(step.q_token[b, 0]), step.L, stats, token[b].clone()))

    return log, hook(needs=needs, after=after, **hooks)


def run(model, ids, how, needs, before=None, **hooks):
    """For each forward pass of each sequence: queries from, to, statistics, slots, weights [heads, n, n], logits, seen."""
    log, method = spy(needs, **hooks)
    method = method if before is None else before | method
    seen = watch(
        model, thin() | method if how == "ragged" else method, ids, HOW[how], PADS if how == "padded" else None
    )
    calls = len(HOW[how]) + N - 40
    for c in range(calls):
        for b, (s,) in enumerate(seen.seqs):
            n = s.q.shape[1]
            visible = thinned(n, HOW[how], KV) if how == "ragged" else causal(n)[None]
            first, length, stats, token = log[c * len(ids) + b]
            yield s, over_heads(visible, HEADS), slice(first, first + length), stats, token


def in_slots(x, token):
    """[heads, tokens] as [heads, slots]; zero in empty slots."""
    return x.gather(1, token.clamp(max=x.shape[1] - 1).long()).where(token != FAR, 0)


def low(w, seen):
    """Weights below uniform: what is as large as uniform is not low."""
    return (w < (1 - 1e-6) / seen.sum(-1, keepdim=True)) & seen


def same(got, expected, tolerance=1e-5):
    assert got.shape == expected.shape
    assert (got.double() - expected.double()).abs().max() <= tolerance


@pytest.mark.parametrize("how", HOW)
def test_columns(how, model, ids):
    for s, seen, rows, stats, token in run(model, ids, how, NEEDS):
        w = weights(s, seen)[:, rows]
        same(stats["col_mass"], in_slots(w.sum(1), token), 1e-4)
        same(stats["col_low"], in_slots(low(w, seen[:, rows]).sum(1), token), 0)


@pytest.mark.parametrize("how", HOW)
def test_rows(how, model, ids):
    for s, seen, rows, stats, token in run(model, ids, how, NEEDS):
        w = weights(s, seen)[:, rows]
        same(stats["entropy"], -torch.special.xlogy(w, w).sum(-1))
        same(stats["lse"], logits(s).masked_fill(~seen, -torch.inf)[:, rows].logsumexp(-1))
        same(stats["sink_mass"], w[:, :, :4].sum(-1))
        assert torch.equal(token.gather(1, stats["row_argmax"]), w.argmax(-1).to(token.dtype))


@pytest.mark.parametrize("how", HOW)
def test_only_what_was_named_is_there(how, model, ids):
    for *_, stats, _ in run(model, ids, how, ("col_mass",)):
        assert "col_low" not in stats and "entropy" not in stats


@pytest.mark.parametrize("how", HOW)
def test_a_window_looks_at_the_last_queries_of_a_prompt(how, model, ids):
    for s, seen, rows, stats, token in run(model, ids, how, ("col_low:5", "col_mass:5")):
        last = slice(max(rows.start, rows.stop - 5), rows.stop)
        w = weights(s, seen)[:, last]
        same(stats["col_mass"], in_slots(w.sum(1), token), 1e-4)
        same(stats["col_low"], in_slots(low(w, seen[:, last]).sum(1), token), 0)


@pytest.mark.parametrize("how", HOW)
def test_under_a_selection(how, model, ids):
    band = hook(select=lambda step: Band(2, [9, 3, 30, 1, 12, 5]))
    for s, seen, rows, stats, token in run(model, ids, how, NEEDS, before=band):
        at = torch.arange(s.q.shape[1])
        age = at[:, None] - at
        seen = seen & torch.stack([(at < 2) | (age < r) for r in (9, 3, 30, 1, 12, 5)])
        w = weights(s, seen)[:, rows]
        same(stats["col_mass"], in_slots(w.sum(1), token), 1e-4)
        same(stats["col_low"], in_slots(low(w, seen[:, rows]).sum(1), token), 0)
        same(stats["lse"], logits(s).masked_fill(~seen, -torch.inf)[:, rows].logsumexp(-1))
        same(stats["entropy"], -torch.special.xlogy(w, w).sum(-1))
        same(stats["sink_mass"], w[:, :, :4].sum(-1))
        assert torch.equal(token.gather(1, stats["row_argmax"]), w.argmax(-1).to(token.dtype))


@pytest.mark.parametrize("how", HOW)
def test_a_bias_counts(how, model, ids):
    value = torch.linspace(-2, 4, HEADS)
    for s, seen, rows, stats, token in run(
        model, ids, how, ("col_mass", "col_low", "lse"), weigh=lambda step: Bias.at(step, 3, value)
    ):
        bias = torch.zeros(HEADS, s.q.shape[1], s.q.shape[1]).double()
        bias[:, :, 3] = value.double()[:, None]
        w = weights(s, seen, bias)[:, rows]
        same(stats["col_mass"], in_slots(w.sum(1), token), 1e-4)
        same(stats["col_low"], in_slots(low(w, seen[:, rows]).sum(1), token), 0)
        same(stats["lse"], (logits(s) + bias).masked_fill(~seen, -torch.inf)[:, rows].logsumexp(-1))


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_a_soft_cap_and_learned_sinks_count(family, ids):
    model = tiny(family)
    log, method = spy(("col_mass", "lse", "entropy"))
    (layers,) = watch(model, method, ids[:1], (40,)).seqs
    full = [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
    assert len(full) == len(layers) > 1
    for c, (first, length, stats, _) in enumerate(log):
        s, layer = layers[c % len(full)], model.model.layers[full[c % len(full)]]
        z, rows = logits(s), slice(first, first + length)
        if family == "gemma2":
            z = 5 * (z / 5).tanh()
        z = z.masked_fill(~causal(N), -torch.inf)[:, rows]
        lse = z.logsumexp(-1)
        if family == "gpt_oss":
            lse = torch.logaddexp(lse, layer.self_attn.sinks[:, None].double())
        w = (z - lse[..., None]).exp()
        same(stats["lse"], lse)
        same(stats["col_mass"], w.sum(1)[:, : rows.stop], 1e-4)
        same(stats["entropy"], -torch.special.xlogy(w, w).sum(-1))


def test_what_was_not_named_is_refused(model, ids):
    asked = hook(after=lambda step: step.require("entropy"))
    with pytest.raises(foveal.InputError, match="no statistic 'entropy'"):
        watch(model, asked, ids, (40,))


def test_an_unknown_need_is_refused_when_attached():
    model = tiny("llama")
    with pytest.raises(foveal.InputError, match="needs 'col_mas': did you mean 'col_mass'"):
        foveal.attach(model, hook(needs={"col_mas"}))
    assert foveal.attach(model).close() is None  # and nothing was left behind
