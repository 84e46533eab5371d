"""What edits mean: biases and re-weighted attention equal the same thing written out, on every path."""

import pytest
import torch
from models import tiny
from reference import attend, causal, close, hook, over_heads, thin, thinned, watch, weights

import foveal
from foveal.edits import Bias, Keep, Reweigh
from foveal.method import Out
from foveal.selection import Band

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


def each(model, ids, how, method):
    """(Seq, what its queries see [heads, n, n]) of a run."""
    settings = HOW[how]
    seen = watch(model, thin() | method if how == "ragged" else method, ids, **settings)
    for *_, s in seen.each():
        n = s.q.shape[1]
        base = thinned(n, settings["chunks"], KV) if how == "ragged" else causal(n)[None]
        yield s, over_heads(base, HEADS)


# ---------------------------------------------------------------------- bias


def query_factor(token, r):
    """[..., heads, tokens]"""
    return torch.sin(token * (0.3 + r) + torch.arange(HEADS)[:, None])


def key_factor(token, heads, r):
    return torch.cos(token * (0.7 - 0.2 * r) + 2 * torch.arange(heads)[:, None])


def low_rank(ranks, heads):
    def weigh(step):
        token = step.token.clamp(max=N).repeat_interleave(heads // step.G, 1)
        query = torch.stack([query_factor(step.q_token[:, None], r) for r in ranks], -1)
        return Bias(query, torch.stack([key_factor(token, heads, r) for r in ranks], -1))

    return hook(weigh=weigh)


def dense_bias(n, ranks, heads):
    token = torch.arange(n)
    terms = [
        query_factor(token, r)[:, :, None] * over_heads(key_factor(token, heads, r), HEADS)[:, None] for r in ranks
    ]
    return sum(terms).double()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("heads", [KV, HEADS])
def test_a_bias_is_added_to_the_logits(how, heads, model, ids):
    for s, seen in each(model, ids, how, low_rank((1, 2), heads)):
        assert close(s.out, attend(s, seen, dense_bias(s.q.shape[1], (1, 2), heads)))
        assert not close(s.out, attend(s, seen), 1e-2)


@pytest.mark.parametrize("how", HOW)
def test_biases_add(how, model, ids):
    at = hook(weigh=lambda step: Bias.at(step, 5, torch.linspace(-3, 3, HEADS)))
    for s, seen in each(model, ids, how, low_rank((0,), HEADS) | at | low_rank((1, 2, 3), KV)):
        n = s.q.shape[1]
        total = dense_bias(n, (0,), HEADS) + dense_bias(n, (1, 2, 3), KV)
        total[:, :, 5] += torch.linspace(-3, 3, HEADS)[:, None].double()
        assert close(s.out, attend(s, seen, total))


@pytest.mark.parametrize("how", HOW)
def test_a_bias_counts_under_a_selection(how, model, ids):
    band = hook(select=lambda step: Band(2, 9))
    for s, seen in each(model, ids, how, band | low_rank((1,), KV)):
        token = torch.arange(s.q.shape[1])
        seen = seen & ((token < 2) | (token[:, None] - token < 9))
        assert close(s.out, attend(s, seen, dense_bias(len(token), (1,), KV)))


def test_a_bias_on_a_token_that_left_does_nothing(model, ids):
    gone = hook(weigh=lambda step: Bias.at(step, 1, torch.full((HEADS,), 9.0)))
    for s, seen in each(model, ids, "ragged", gone):  # token 1 leaves every row after the first chunk
        bias = torch.zeros(N, N)
        bias[:17, 1] = 9.0
        assert close(s.out, attend(s, seen, bias))


def test_the_sum_of_two_biases_is_one_bias():
    a = Bias(torch.randn(1, HEADS, 1, 2), torch.randn(1, KV, 7, 2))
    b = Bias(torch.randn(1, HEADS, 4, 3), torch.randn(1, HEADS, 7, 3))
    for total in (a + b, b + a):
        assert close(total.dense(HEADS), a.dense(HEADS) + b.dense(HEADS), 1e-6)


# ---------------------------------------------------------------------- weights after the softmax


def some(token, heads, remainder):
    return (token + torch.arange(heads)[:, None]) % 4 == remainder


def edited(w, keys, gain, to):
    """One edit of weights [heads, queries, keys], row by row."""
    out = w.clone()
    for h in range(HEADS):
        for i in range(w.shape[1]):
            row, mine = w[h, i], keys[h]
            others = ~mine if to is None else to[h] & ~mine if to is not False else None
            if others is None:
                out[h, i, mine] *= gain[h, i]
                continue
            paid = row[others].sum()
            if paid == 0:
                continue
            freed = (row[mine] * (1 - gain[h, i])).sum()
            out[h, i, mine] *= gain[h, i]
            out[h, i, others] *= 1 + freed / paid
    return out


GAINS = {
    "one": lambda step: 0.25,
    "for each head": lambda step: torch.linspace(0, 1.2, HEADS).expand(step.q.shape[0], -1),
    "for each query": lambda step: (step.q_token[:, None] % 5 / 4).expand(-1, HEADS, -1),
}


def dense_gain(kind, n):
    if kind == "one":
        return torch.full((HEADS, n), 0.25)
    if kind == "for each head":
        return torch.linspace(0, 1.2, HEADS)[:, None].expand(-1, n)
    return (torch.arange(n) % 5 / 4).expand(HEADS, -1)


def edit(remainder, gain, to, heads):
    def reweigh(step):
        token = step.token.clamp(max=N).repeat_interleave(heads // step.G, 1)
        receivers = some(token, heads, 2) if to == "some" else to
        return Reweigh(some(token, heads, remainder), GAINS[gain](step), receivers)

    return hook(reweigh=reweigh)


def keys_of(remainder, n, heads):
    return over_heads(some(torch.arange(n), heads, remainder), HEADS)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("gain", "to"), [("one", None), ("for each query", None), ("for each head", False), ("for each query", "some")]
)
def test_reweigh(how, gain, to, model, ids):
    heads = HEADS if gain == "one" else KV
    for s, seen in each(model, ids, how, edit(1, gain, to, heads)):
        n, before = s.q.shape[1], weights(s, seen)
        after = edited(before, keys_of(1, n, heads), dense_gain(gain, n), keys_of(2, n, heads) if to == "some" else to)
        assert close(s.out, after @ over_heads(s.v, HEADS))
        assert not close(after, before, 1e-2)
        assert close(after.sum(-1), before.sum(-1), 1e-9) == (to is not False)


@pytest.mark.parametrize("how", HOW)
def test_edits_chain(how, model, ids):
    method = edit(1, "for each head", None, HEADS) | low_rank((1,), KV) | edit(3, "one", "some", KV)
    for s, seen in each(model, ids, how, method):
        n = s.q.shape[1]
        w = weights(s, seen, dense_bias(n, (1,), KV))
        w = edited(w, keys_of(1, n, HEADS), dense_gain("for each head", n), None)
        w = edited(w, keys_of(3, n, KV), dense_gain("one", n), keys_of(2, n, KV))
        assert close(s.out, w @ over_heads(s.v, HEADS))


def test_a_gain_of_one_changes_nothing_and_a_row_of_one_key_cannot_pay(model, ids):
    everything = hook(reweigh=lambda step: Reweigh(step.token >= 0, 0.0))
    for s, seen in each(model, ids, "chunks", everything):
        assert close(s.out, attend(s, seen))  # nobody is left to receive
    same = hook(reweigh=lambda step: Reweigh(step.token % 2 == 0, 1.0))
    for s, seen in each(model, ids, "chunks", same):
        assert close(s.out, attend(s, seen))


# ---------------------------------------------------------------------- keep, attend


def test_keep_takes_a_mask_or_a_slot():
    for wrong in ({}, {"mask": torch.ones(1, 2, 3).bool(), "drop": torch.zeros(1, 2).long()}):
        with pytest.raises(foveal.InputError, match="exactly one"):
            Keep(**wrong)


@pytest.mark.parametrize("how", HOW)
def test_keep_takes_effect_after_the_step(how, model, ids):
    """One key leaves KV head 1 in every decode step, the oldest: its last query has still seen it."""

    def keep(step):
        return Keep(drop=step.oldest(), heads=(1,)) if step.decode else None

    for s, seen in each(model, ids, how, hook(keep=keep)):
        n, seen = s.q.shape[1], seen.clone()
        for i in range(n - 3, n):
            for h in (3, 4, 5):
                held = seen[h, i].nonzero().flatten()
                seen[h, i, held[: i - (n - 3)]] = False
        assert close(s.out, attend(s, seen))


@pytest.mark.parametrize("how", HOW)
def test_attend_replaces_the_softmax(how, model, ids):
    """Sigmoid attention, with what an earlier method selected."""

    def sigmoid(step, selection, bias):
        step.visible = selection
        return Out(step.scores().sigmoid() @ step.per_head(step.store.values()))

    for s, seen in each(model, ids, how, hook(select=lambda step: Band(1, 8)) | hook(attend=sigmoid)):
        token = torch.arange(s.q.shape[1])
        seen = seen & ((token < 1) | (token[:, None] - token < 8))
        z = (s.q @ over_heads(s.k, HEADS).mT / 4).masked_fill(~seen, -torch.inf)
        assert close(s.out, z.sigmoid() @ over_heads(s.v, HEADS))


def test_attend_may_decline(model, ids):
    def only_decode(step, selection, bias):
        return Out(torch.full_like(step.q, 2.0)) if step.decode else None

    for s, seen in each(model, ids, "chunks", hook(attend=only_decode)):
        assert (s.out[:, 40:] == 2).all() and close(s.out[:, :40], attend(s, seen)[:, :40])
