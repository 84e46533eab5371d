"""Rectified attention with a causal order: against dense where blocks are constant, and against its steps written out."""

import math

import pytest
import torch
from models import tiny
from reference import attend, causal, close, hook, watch

import foveal
from foveal.methods.select.rectified import Rectified
from foveal.selection import Band, Blocks

N, PROMPT, HEADS, KV = 62, 58, 6, 2


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(8))


def own_map(s, m):
    """[HEADS, n, n] of the paper's choice."""
    n = math.ceil(PROMPT / m.block)
    found = torch.zeros(HEADS, n, n, dtype=torch.bool)
    blocks = [slice(a, min(a + m.block, PROMPT)) for a in range(0, PROMPT, m.block)]
    for h in range(HEADS):
        for i in range(n):
            z = [
                s.q[h, blocks[i]].mean(0) @ s.k[h // 3, b].mean(0) / 4 + math.log(b.stop - b.start)
                for b in blocks[: i + 1]
            ]
            p = torch.stack(z).softmax(0)
            held, least = 0.0, max(1, int((1 - m.drop) * (i + 1) + 1e-6))
            for count, j in enumerate(p.argsort(descending=True).tolist()):
                if held > m.mass and count >= least:
                    break
                found[h, i, j] = True
                held += p[j].item()
            found[h, i, 0] = found[h, i, i] = True
    return found


def rectified(s, chosen, b):
    """Outputs over the chosen blocks [HEADS, n, n], corrected query by query; how many blocks came back and how many did not."""
    n, back, lost = chosen.shape[1], 0, 0
    home = torch.arange(N).clamp(max=PROMPT - 1) // b
    seen = causal(N).expand(HEADS, -1, -1).clone()
    seen[:, :PROMPT, :PROMPT] &= chosen[:, home[:PROMPT]][:, :, home[:PROMPT]]
    sparse = attend(s, seen)
    out = sparse.clone()
    blocks = [slice(a, min(a + b, PROMPT)) for a in range(0, PROMPT, b)]
    for h in range(HEADS):
        for i in range(n):
            q, given = s.q[h, blocks[i]], []
            qp = q.mean(0)
            for j in range(i):
                k = s.k[h // 3, blocks[j]]
                kp = k.mean(0)
                error = abs((q - qp).abs().mean(0) @ kp) + abs(qp @ (k - kp).abs().mean(0))
                if not chosen[h, i, j] and abs(qp @ kp) > error:
                    given.append(((qp @ kp / 4).exp() * len(k), s.v[h // 3, blocks[j]].mean(0)))
                elif not chosen[h, i, j]:
                    lost += 1
            back += len(given)
            for t in range(blocks[i].start, blocks[i].stop):
                kept = (s.q[h, t] @ s.k[h // 3].T / 4)[seen[h, t]].exp().sum()
                total = kept + sum(w for w, _ in given)
                out[h, t] = (kept * sparse[h, t] + sum((w * v for w, v in given), torch.zeros(16).double())) / total
    return out, back, lost


@pytest.mark.parametrize("method", [Rectified(0.8, 0.3, 4), Rectified(0.6, 0.9, 5), Rectified(1.0, 0.0, 7)], ids=str)
def test_its_own_choice_by_loops(method, model, ids):
    came, stayed = 0, 0
    for _, _, s in watch(model, method, ids, (PROMPT,)).each():
        want, back, lost = rectified(s, own_map(s, method), method.block)
        assert close(s.out, want)
        came, stayed = came + back, stayed + lost
    assert came > 20 and stayed > 20


@pytest.mark.parametrize(
    "choice",
    [
        "pooled-blocks(budget=0.3, block=8)",
        "power-attention(window=1, block=4)",
        "xattention(threshold=0.5, block=8, stride=4)",
    ],
)
def test_it_corrects_the_choice_of_another(choice, model, ids):
    maps = []
    note = hook(after=lambda step: maps.append(step.visible) if isinstance(step.visible, Blocks) else None)
    both = watch(model, foveal.get_method(f"{choice} | rectified(block=16)") | note, ids[:1], (PROMPT,))
    plain = watch(model, foveal.get_method(choice), ids[:1], (PROMPT,))
    for (_, layer, s), (_, _, p) in zip(both.each(), plain.each(), strict=True):
        want, back, _ = rectified(s, maps[layer].map[0], maps[layer].size)
        assert back and close(s.out[:, :PROMPT], want[:, :PROMPT])
        assert layer or not close(s.out[:, :PROMPT], p.out[:, :PROMPT], 1e-3)


def test_constant_blocks_are_dense_whatever_was_dropped(model, ids):
    """Every value differs; queries and keys are one in a block of 4 each."""

    def flat(step):
        if not step.decode:
            step.q, step.k_new = (x[:, :, ::4].repeat_interleave(4, 2)[:, :, : step.L] for x in (step.q, step.k_new))
        return step.visible

    for text in ("rectified(drop=1.0, mass=0.0, block=4)", "power-attention(window=1, block=4) | rectified"):
        for _, _, s in watch(model, hook(select=flat) | foveal.get_method(text), ids[:1], (PROMPT,)).each():
            assert close(s.out[:, :PROMPT], attend(s, causal(N)[None])[:, :PROMPT])


def test_learned_sinks_take_their_share(ids):
    model, note = tiny("gpt_oss"), []

    def look(step, out):
        note.append((step.visible, step.q, step.k_new, step.v_new, step.logit, out))
        return out

    def flat(step):
        step.q, step.k_new = (x[:, :, ::4].repeat_interleave(4, 2)[:, :, : step.L] for x in (step.q, step.k_new))
        return step.visible

    method = hook(select=flat) | foveal.get_method("rectified(drop=1.0, mass=0.0, block=4)") | hook(mix=look)
    with torch.no_grad(), foveal.attach(model, method):
        model(ids[:1, :PROMPT])
    _, q, k, v, logit, out = next(x for x in note if isinstance(x[0], Blocks))
    group = q.shape[1] // k.shape[1]
    z = (q[0] @ k[0].repeat_interleave(group, 0).mT).double() * logit.scale
    z = z.masked_fill(~causal(PROMPT), -math.inf)
    z = torch.cat([z, logit.sinks.double().view(-1, 1, 1).expand(-1, PROMPT, 1)], -1).softmax(-1)[..., :-1]
    assert close(out[0], z @ v[0].double().repeat_interleave(group, 0))


def test_short_prompts_and_nothing_dropped_are_dense(model, ids):
    for method, n in ((Rectified(block=32), N - 4), (Rectified(0.0, 1.0, 4), PROMPT)):
        for _, _, s in watch(model, method, ids, (n,)).each():
            assert close(s.out, attend(s, causal(N)[None]))


@pytest.mark.parametrize(
    "choice", [hook(select=lambda step: Band(2, 8)), foveal.get_method("hip(budget=0.3, sink=2, recent=4, dense=0)")]
)
def test_what_is_no_choice_of_blocks_is_refused(choice, model, ids):
    with pytest.raises(foveal.InputError, match="corrects a choice of blocks"):
        watch(model, choice | Rectified(), ids, (PROMPT,))


def test_bad_values():
    for wrong in ({"drop": 1.5}, {"mass": -1}, {"block": 0}):
        with pytest.raises(foveal.InputError, match=f"^{next(iter(wrong))} = "):
            Rectified(**wrong)
