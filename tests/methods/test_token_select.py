"""TokenSelect against its votes, choices and renumbered attention written out, and against text longer than the positions."""

import math
from itertools import pairwise

import pytest
import torch
from models import tiny
from reference import causal, close, hook, thin, thinned, watch

import foveal
from foveal.edits import Plane
from foveal.methods.select.token_select import TokenSelect
from foveal.rope import Rope
from foveal.selection import Band
from foveal.store import Layout

N, PROMPT, HEADS, KV = 70, 60, 6, 2


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(8))


def turned(x, position):
    """The rotary embedding of Llama by its definition: x [..., length, head_dim] turned by position [length], pairs (m, m + D/2)."""
    half = x.shape[-1] // 2
    angle = torch.as_tensor(position).double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def ends(method, size):
    total, quarter = method.sink + method.recent, size // 4
    return min(method.sink, quarter * method.sink // total), max(
        1, min(method.recent, quarter * method.recent // total)
    )


def expected(s, base, method, prompt, chunks=None):
    """Outputs [heads, n, head_dim] and how many keys the queries did not read."""
    n, unread, memory = base.shape[-1], 0, None
    out = torch.zeros_like(s.out)
    bounds = [*range(0, prompt, method.chunk), *range(prompt, n + 1)]
    for a, b in pairwise(bounds):
        size = method.budget if isinstance(method.budget, int) else math.ceil(method.budget * b - 1e-9)
        sink, recent = ends(method, size)
        past, renumber = list(range(a)), False
        if size < b and size - min(recent, b - a) < a:
            k = size - min(recent, b - a)
            candidates = list(range(sink, b - max(recent, b - a)))
            query = turned(s.q[:, a:b], torch.arange(b - a) + method.recent - torch.arange(a, b)).mean(1)
            votes = torch.zeros(n).double()
            for h in range(HEADS):
                g = h // (HEADS // KV)
                mine = [j for j in candidates if base[g, b - 1, j]]
                raw = turned(s.k[g, mine], -torch.tensor(mine))
                votes[mine] += (raw @ query[h]).softmax(0)
            forced = [j for j in past if j < sink or j >= b - recent]
            votes = votes.bfloat16()  # sorting is stable: of equal words in the first layer the earlier ones
            chosen = sorted((j for j in candidates if j not in forced), key=lambda j: -votes[j].item())
            chosen = chosen[: k - len(forced)]
            if method.reuse is not None and a >= prompt:
                cosine = 0 if memory is None else torch.cosine_similarity(query.flatten(), memory[0], 0).item()
                if memory is not None and cosine >= method.reuse:
                    chosen = [j for j in memory[1] if j not in forced][: k - len(forced)]
                else:
                    memory = query.flatten(), chosen
            past, renumber = sorted({*forced, *chosen}), method.positions == "cache"
            unread += a - len(past)
        for h in range(HEADS):
            g = h // (HEADS // KV)
            held = [j for j in [*past, *range(a, b)] if base[g, b - 1, j]]
            where = torch.arange(len(held)) if renumber else torch.tensor(held)
            key = turned(s.k[g, held], where - torch.tensor(held))
            q = turned(s.q[h, a:b], where[-(b - a) :] - torch.arange(a, b))
            z = (q @ key.T / 4).masked_fill(torch.ones(b - a, len(held)).triu(len(held) - b + a + 1).bool(), -math.inf)
            out[h, a:b] = z.softmax(-1) @ s.v[g, held]
    return out, unread


METHODS = [
    TokenSelect(24, 2, 4, 16),
    TokenSelect(24, 2, 4, 16, positions="original"),
    TokenSelect(0.3, 3, 5, 7),
    TokenSelect(40, 8, 2, 60),
    TokenSelect(20, 0, 6, 5, reuse=0.2),
]


# a remembered query does not survive an eviction whole
CASES = [(how, m) for how in ("whole", "padded", "ragged") for m in METHODS if how != "ragged" or m.reuse is None]


@pytest.mark.parametrize(("how", "method"), CASES, ids=str)
def test_it_reads_what_the_heads_vote_for(how, method, model, ids):
    pads = (0, 13) if how == "padded" else None
    seen = watch(model, thin() | method if how == "ragged" else method, ids, (PROMPT,), pads)
    unread = 0
    for _, _, s in seen.each():
        n = s.q.shape[1]
        base = thinned(n, (PROMPT,), KV) if how == "ragged" else causal(n).expand(KV, -1, -1)
        out, count = expected(s, base, method, n - (N - PROMPT))
        assert close(s.out, out)
        unread += count
    assert unread > 0
    assert seen.cache.lengths.max() == (50 if how == "ragged" else N)  # nothing is dropped


@pytest.mark.parametrize("method", [*METHODS, TokenSelect(24, 2, 4, 16, reuse=2, positions="original")], ids=str)
def test_pages_read_the_same(method, model, ids):
    """Keys in pages are neither gathered nor turned as a whole; two sequences of different lengths, and what they remember."""
    mask = torch.ones_like(ids)
    mask[1, :13] = 0

    def run(layout):
        where = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad(), foveal.attach(model, method, layout=layout):
            cache = model(
                ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], position_ids=where[:, :PROMPT]
            ).past_key_values
            out = []
            for i in range(PROMPT, N):
                now = {"attention_mask": mask[:, : i + 1], "position_ids": where[:, i : i + 1]}
                out.append(model(ids[:, i : i + 1], past_key_values=cache, **now).logits)
        return torch.cat(out, 1)

    assert close(run(Layout(paged=True)), run(Layout(paged=False)))


def test_frequencies_are_those_of_pairs_by_halves(model):
    x = torch.zeros(1, 16)
    assert torch.allclose(Rope.of(model).frequencies(x, 0), 10000.0 ** (-torch.arange(8) / 8))
    assert Rope.of(tiny("gpt_neox")).frequencies(x, 0) is None  # a quarter of the dimensions turns
    assert Rope.of(tiny("cohere")).frequencies(x, 0) is None  # neighbours pair


def test_chunks_of_the_caller_are_chunks_of_the_prompt(model, ids):
    method = TokenSelect(24, 2, 4, 16)
    whole, chunked = (watch(model, method, ids, c).seqs for c in ((PROMPT,), (32, 16, 12)))
    for a, b in zip(whole, chunked, strict=True):
        assert all(close(x.out, y.out) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("reuse", "again"), [(2, True), (-1, False)])
def test_the_threshold_says_whether_it_chooses_again(reuse, again, model, ids):
    """Above 1 no choice is reused, so nothing changes; at -1 the first choice after the prompt serves for good."""
    plain, kept = (watch(model, TokenSelect(24, 2, 4, 16, reuse=r), ids, (PROMPT,)) for r in (None, reuse))
    same = [close(a.out, b.out, 1e-6) for (_, _, a), (_, _, b) in zip(plain.each(), kept.each(), strict=True)]
    assert all(same) if again else not any(same)
    for a, b in zip(plain.seqs, kept.seqs, strict=True):
        assert close(a[0].out[:, : PROMPT + 1], b[0].out[:, : PROMPT + 1], 1e-6)
    marks = kept.planes["token_select"][0]
    assert (marks.sum(-1) == 24 - 6).all() and (marks == marks[:, :1]).all()


def test_text_may_outgrow_the_positions_and_stays_as_good():
    """Beyond the positions the model was given, what is read lies within them: outputs equal those of the short text read."""
    short = tiny("llama", num_hidden_layers=1, max_position_embeddings=64)
    ids = torch.randint(1, 120, (1, 200), generator=torch.Generator().manual_seed(3))
    method = TokenSelect(40, 2, 4, 16)
    (seq,) = watch(short, method, ids, (190,)).seqs
    out, unread = expected(seq[0], causal(200).expand(KV, -1, -1), method, 190)
    assert close(seq[0].out, out) and unread > 1000
    with pytest.raises(foveal.InputError, match="60 tokens with chunks of 16 reaches beyond the model's 64 positions"):
        watch(short, TokenSelect(60, 2, 4, 16), ids, (190,))
    with pytest.raises(foveal.InputError, match="200 tokens long but the model has 64 positions"):
        watch(short, TokenSelect(40, 2, 4, 16, positions="original"), ids, (200,))


def test_gradients_flow_through_a_prompt(model, ids):
    x = model.get_input_embeddings()(ids[:1, :40]).detach()
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    def f(x):
        with foveal.attach(model, TokenSelect(24, 2, 4, 8)):
            return model(inputs_embeds=x).logits[0, -1, :9].sum()

    leaf = x.clone().requires_grad_()
    f(leaf).backward()
    slope = (f(x + 1e-3 * way) - f(x - 1e-3 * way)) / 2e-3
    assert torch.isclose((leaf.grad * way).sum(), slope, rtol=0.02)


def test_it_follows_no_other_selection_or_position(model, ids):
    for other in (hook(select=lambda step: Band(2, 4)), hook(planes={"mass": Plane(1.0)})):
        with pytest.raises(foveal.CompositionError, match="a list and positions of its own"):
            watch(model, other | TokenSelect(24, 2, 4, 16), ids, (PROMPT,))
    with pytest.raises(foveal.CompositionError, match="renumber positions"):
        foveal.get_method("streaming-llm", positions="cache") | TokenSelect()


def test_the_model_must_rotate():
    with pytest.raises(foveal.UnsupportedModel):
        foveal.attach(tiny("gpt2"), TokenSelect())


def test_the_rotation_here_is_the_models(model):
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    assert close(Rope.of(model).rotate(x, torch.arange(5), 0), turned(x.double(), torch.arange(5)))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"recent": 0}, "recent = 0: .*at least 1"),
        ({"chunk": 0}, "chunk = 0: .*at least 1"),
        ({"positions": "new"}, "positions = 'new': expected 'original' or 'cache'"),
        ({"reuse": 3}, "reuse = 3: expected a number from -1 to 2"),
    ],
)
def test_bad_values(wrong, message):
    with pytest.raises(foveal.InputError, match=message):
        TokenSelect(**wrong)
