"""Token Sparse Attention against its steps written out, alone and with another method inside."""

import pytest
import torch
from models import tiny
from reference import attend, causal, close, hook, watch, weights

import foveal
from foveal.excerpt import Excerpt
from foveal.heads import HeadRoles
from foveal.hub import model_identity
from foveal.methods.select.drift import measure, stable_layers
from foveal.methods.select.token_sparse import TokenSparse
from foveal.selection import Band

N, PROMPT, HEADS = 75, 70, 6


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(8))


def kept(s, m):
    """Tokens of each head, ascending lists, and whether the layer is dense."""
    w = weights(s, causal(s.q.shape[1])[None])[:, PROMPT - m.window : PROMPT, : PROMPT - m.window].mean(1)
    older, half = PROMPT - m.window, m.kernel // 2
    smooth = torch.stack([w[:, max(0, j - half) : j + half + 1].sum(1) / m.kernel for j in range(older)], 1)
    smooth = smooth / smooth.sum(1, keepdim=True)
    held, below = 0.0, 0
    for x in sorted((smooth.mean(0) / smooth.mean(0).sum()).tolist()):
        held += x
        below += held < m.drop
    stay = max(m.least, older - below - 1) if below else older
    if stay >= older:
        return None
    best = smooth.argsort(dim=1, descending=True, stable=True)[:, :stay]
    return [sorted(row) + list(range(older, PROMPT)) for row in best.tolist()]


def expected(s, m, inside=None):
    """Outputs of the prompt's queries when each head attends among its tokens; inside [m, m]: what the short text may see."""
    out = attend(s, causal(s.q.shape[1])[None])
    lists = kept(s, m)
    if lists is None:
        return out, 0
    for h, tokens in enumerate(lists):
        t = torch.tensor(tokens)
        z = s.q[h, t] @ s.k[h // 3, t].T / 4
        seen = causal(len(t)) if inside is None else causal(len(t)) & inside(len(t))
        out[h, :PROMPT] = 0
        out[h, t] = z.masked_fill(~seen, -torch.inf).softmax(-1) @ s.v[h // 3, t]
    return out, PROMPT - len(lists[0])


@pytest.mark.parametrize(
    "method",
    [TokenSparse(0.1, 8, 8, 3, [0, 1, 2, 3]), TokenSparse(0.4, 4, 16, 7, [1, 3]), TokenSparse(0.9, 12, 5, 1, [0, 2])],
    ids=str,
)
def test_each_head_attends_among_its_tokens(method, model, ids):
    dropped = 0
    for _, layer, s in watch(model, method, ids, (PROMPT,)).each():
        want, gone = expected(s, method) if layer in method.layers else (attend(s, causal(N)[None]), 0)
        assert close(s.out, want)
        dropped += gone
    assert dropped > 40


def test_other_methods_read_the_shortened_text(model, ids):
    method = TokenSparse(0.3, 8, 8, 3, [1, 2])
    inner = hook(select=lambda step: step.visible if step.decode else Band(1, 9))

    def band(n):
        i = torch.arange(n)
        return (i < 1) | (i[:, None] - i < 9)

    for _, layer, s in watch(model, method | inner, ids[:1], (PROMPT,)).each():
        got = s.out[:, :PROMPT]
        if layer in method.layers:
            assert close(got, expected(s, method, band)[0][:, :PROMPT])
        else:
            assert close(got, attend(s, (causal(N) & band(N))[None])[:, :PROMPT])


def test_a_real_method_inside_works_on_all_paths_alike(model, ids):
    """Blocks chosen inside the short text, by the block operation and, where weights are asked for, by masks."""
    text = "token-sparse(drop=0.3, least=8, window=8, kernel=3, layers=(1, 2)) | xattention(threshold=0.5, block=8, stride=4)"
    method = foveal.get_method(text)
    fast = watch(model, method, ids[:1], (PROMPT,))
    seen = []
    slow = watch(
        model,
        method | hook(needs=("col_mass",), after=lambda step: seen.append(step.stats["col_mass"])),
        ids[:1],
        (PROMPT,),
    )
    alone = watch(model, foveal.get_method(text.partition(" | ")[0]), ids[:1], (PROMPT,))
    for (_, _, a), (_, layer, b), (_, _, c) in zip(fast.each(), slow.each(), alone.each(), strict=True):
        assert close(a.out, b.out)
        assert layer == 0 or not close(a.out, c.out, 1e-3)
    rows = PROMPT - sum(seen[1][0, h].sum().round().int().item() for h in range(HEADS)) / HEADS
    assert rows > 5  # dropped queries give their weight to nobody


def test_to_the_right_of_blocks_it_narrows_them(model, ids):
    """Blocks of the whole text and the excerpt: what both allow, whichever path computes it."""
    method = TokenSparse(0.3, 8, 8, 3, [1])
    left = hook(select=lambda step: Band(2, 30))
    i = torch.arange(N)
    for _, layer, s in watch(model, left | method, ids[:1], (PROMPT,)).each():
        if layer != 1:
            continue
        seen = causal(N) & ((i < 2) | (i[:, None] - i < 30))
        among = torch.zeros(HEADS, N, dtype=torch.bool)
        for h, tokens in enumerate(kept(s, method)):
            among[h, tokens] = True
        both = seen & among[:, None] & among[:, :, None]
        assert close(s.out[:, :PROMPT], attend(s, both)[:, :PROMPT])


def test_a_bias_and_learned_sinks_come_along(ids):
    model = tiny("gpt_oss")
    text = "token-sparse(drop=0.4, least=8, window=8, kernel=3, layers=(1, 3))"
    note = []

    def look(step, out):
        if not step.decode:
            note.append((step.q, step.k_new, step.v_new, step.logit, step.visible, out))
        return out

    with torch.no_grad(), foveal.attach(model, foveal.get_method(text) | hook(mix=look)):
        model(ids[:1, :PROMPT])
    q, k, v, logit, visible, out = next(x for x in note if isinstance(x[4], Excerpt))
    h = 4
    t = visible.tokens[0, h]
    z = (q[0, h, t] @ k[0, h // 3, t].T).double() * logit.scale
    z = z.masked_fill(~causal(len(t)), -torch.inf)
    z = torch.cat([z, logit.sinks[h].double().expand(len(t), 1)], 1).softmax(-1)[:, :-1]
    assert close(out[0, h, t], z @ v[0, h // 3, t].double())
    assert (out[0, h].abs().sum(-1) > 0).sum() == len(t) < PROMPT


def test_short_texts_and_no_drop_are_dense(model, ids):
    for method in (TokenSparse(0.0, 4, 8, layers=[0, 1]), TokenSparse(0.9, PROMPT - 8, 8, layers=[0, 1])):
        for _, _, s in watch(model, method, ids[:1], (PROMPT,)).each():
            assert close(s.out, attend(s, causal(N)[None]))


def test_layers_that_change_little(model, tmp_path):
    with torch.no_grad():
        tokenizer = lambda text, **_: type("E", (), {"input_ids": torch.arange(1, 101).repeat(8)[None]})
        got = measure(model, tokenizer, 64).scores["drift"]
        states = model.model(torch.arange(1, 65)[None], output_hidden_states=True).hidden_states
        layers = model.model.layers
        change = []
        for i, layer in enumerate(layers):
            rope = model.model.rotary_emb(states[i], torch.arange(64)[None])
            mask = torch.zeros(1, 1, 64, 64).masked_fill(~causal(64), -torch.inf)
            after = layer(states[i], attention_mask=mask, position_embeddings=rope)
            after = after[0] if isinstance(after, tuple) else after
            change.append(((after - states[i]).norm(dim=-1) / states[i].norm(dim=-1)).mean())
    change = torch.stack(change)
    assert close(got, (change / change.sum())[:, None].expand(-1, HEADS), 1e-4)
    best = sorted(range(4), key=lambda i: change[i])[:2]
    assert stable_layers(got[:, 0], range(4)) == tuple(sorted(best))


def test_stable_layers_come_from_the_file_of_the_model(model, monkeypatch, tmp_path):
    monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path))
    with pytest.raises(foveal.InputError, match="measure it once"):
        foveal.attach(model, TokenSparse(layers="stable"))
    drift = torch.tensor([0.1, 0.4, 0.3, 0.2])[:, None].expand(-1, HEADS)
    identity = model_identity(model)
    HeadRoles(identity, {"drift": drift}, {}).save(tmp_path / "drift" / f"{identity['weights']}.json")
    with foveal.attach(model, TokenSparse(layers="stable")) as session:
        assert [i for i, parts in session.active.items() if parts] == [0, 3]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"drop": 1.5}, "drop = 1.5"),
        ({"window": 0}, "window = 0"),
        ({"kernel": 4}, "kernel = 4"),
        ({"layers": "early"}, "layers = 'early': expected 'late'"),
        ({"layers": []}, r"layers = \(\): expected 'late'"),
    ],
)
def test_bad_values(wrong, message):
    with pytest.raises(foveal.InputError, match=message):
        TokenSparse(**wrong)


def test_layers_the_model_does_not_have(model):
    with pytest.raises(foveal.InputError, match=r"no full attention in \[9\]"):
        foveal.attach(model, TokenSparse(layers=[1, 9]))
