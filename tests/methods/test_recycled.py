"""Recycled Attention against its two caches written out token by token."""

import math

import pytest
import torch
from models import tiny
from reference import attend, causal, close, over_heads, thin, thinned, watch, weights

import foveal
from foveal.methods.select.recycled import Recycled
from foveal.store import Layout

N, PROMPT, HEADS, KV = 84, 60, 6, 2


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(8))


def size(budget, n):
    return budget if isinstance(budget, int) else math.ceil(budget * n - 1e-9)


def simulate(s, base, method, prompt):
    """What each query sees, [kv_heads, n, n]; how many decode steps read everything."""
    visible, n, fulls = base.clone(), base.shape[-1], 0
    share = (lambda w: w.amax(0)) if method.share == "max" else (lambda w: w.mean(0))
    marked, last = [set()] * KV, None
    for i in range(prompt - 1, n):
        everything = size(method.budget, i + 1) >= base[:, i].sum(-1).max() or i == prompt - 1
        due = (i + 1) % method.stride == 0
        if due and method.similar is not None and not everything:
            due = torch.cosine_similarity(s.q[:, i].flatten(), last, 0) < method.similar
        full, room = everything or due, size(method.budget, i + 2) - 1
        fulls += full and i >= prompt
        for g in range(KV):
            held = set(base[g, i].nonzero().flatten().tolist())
            if not full:
                visible[g, i] = torch.tensor([t in marked[g] or t == i for t in range(n)]) & base[g, i]
            w = share(weights(s, visible).unflatten(0, (KV, -1))[g, :, i])
            now = held if full else (marked[g] & held) | {i}
            order = sorted(now, key=lambda t: -w[t].item())
            marked[g] = set(order[:room] if full else order[:-1] if len(order) > room else order)
        if full:
            last = s.q[:, i].flatten()
    return visible, fulls


METHODS = [
    Recycled(12, 8),
    Recycled(30, 1000, share="mean"),
    Recycled(0.25, 5),
    Recycled(62, 6),
    Recycled(12, 2, similar=0.05),
    Recycled(20, 1, similar=-0.05),
]


CASES = [(how, m) for how in ("whole", "padded", "ragged") for m in METHODS if how != "ragged" or m.similar is None]


@pytest.mark.parametrize(("how", "method"), CASES, ids=str)
def test_it_reads_what_the_last_full_step_looked_at(how, method, model, ids):
    pads = (0, 13) if how == "padded" else None
    seen = watch(model, thin() | method if how == "ragged" else method, ids, (PROMPT,), pads)
    read, fulls = 0, []
    for _, _, s in seen.each():
        n = s.q.shape[1]
        base = thinned(n, (PROMPT,), KV) if how == "ragged" else causal(n).expand(KV, -1, -1)
        visible, count = simulate(s, base, method, n - (N - PROMPT))
        assert close(s.out, attend(s, visible))
        read += int((base & ~visible).sum())
        fulls.append(count)
    assert read > 0
    if method.similar is not None:  # some steps were alike and some were not
        assert min(fulls) > 0 and max(fulls) < (N - PROMPT) // method.stride
    assert seen.cache.lengths.max() == (64 if how == "ragged" else N)  # nothing leaves the cache


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_pages_read_the_same(method, model, ids):
    """Where keys lie in pages one operation marks and drops, and one chooses after a full step."""

    def run(layout, rows):
        with torch.no_grad(), foveal.attach(model, method, layout=layout):
            cache = model(ids[rows, :PROMPT]).past_key_values
            out = [model(ids[rows, i : i + 1], past_key_values=cache).logits for i in range(PROMPT, N)]
        return torch.cat(out, 1), cache.rows[0].plane("recycled")

    for rows in (slice(0, 1), slice(0, 2)):
        (a, marks), (b, expected) = run(Layout(paged=True), rows), run(Layout(paged=False), rows)
        assert close(a, b) and torch.equal(marks, expected)


@pytest.mark.parametrize("method", [Recycled(12, 1), Recycled(12, 1, similar=2), Recycled(N, 50)], ids=str)
def test_full_steps_only_are_dense(method, model, ids):
    for _, _, s in watch(model, method, ids, (PROMPT,)).each():
        assert close(s.out, attend(s, over_heads(causal(N)[None], HEADS)))


def test_after_a_full_step_the_marked_keys_are_its_largest(model, ids):
    seen = watch(model, Recycled(12, 42), ids, (PROMPT,))  # the last token is number 84
    for b, layer, s in seen.each():
        w = weights(s, causal(N)[None])[:, -1].unflatten(0, (KV, -1)).amax(1)
        best = torch.zeros(KV, N, dtype=torch.bool).scatter_(1, w.topk(11).indices, True)
        assert torch.equal(seen.planes["recycled"][layer][b], best)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stride": 0}, "stride = 0: .*at least 1"),
        ({"similar": 3}, "similar = 3: expected a number from -1 to 2"),
        ({"share": "sum"}, "share = 'sum': expected 'max' or 'mean'"),
    ],
)
def test_bad_values(wrong, message):
    with pytest.raises(foveal.InputError, match=message):
        Recycled(**wrong)


def test_a_full_step_is_told_before_the_pass(model, ids):
    """A captured step serves those with the same answer only."""
    answers = []

    class Told(Recycled):
        def begin(self, pass_):
            answers.append(super().begin(pass_))
            return answers[-1]

    watch(model, Told(12, 8), ids[:1, :74], (70,))
    assert answers == [(), (False,), (True,), (False,), (False,)]  # the 72nd token is due
