"""Lenses of the residual stream and of queries and keys themselves, against transformers' own tensors and planted examples."""

import copy
import math

import pytest
import torch
from lens_reference import Whole, close, importance
from models import tiny
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from foveal.lens import look
from foveal.lens.lens import Reading
from foveal.lens.patterns import Patterns, channels, similarity
from foveal.lens.residual import MassiveActivations, SecondarySinks, active_range
from foveal.model_info import ModelInfo

IDS = torch.randint(2, 120, (70,), generator=torch.Generator().manual_seed(5)).tolist()
FAMILIES = ["llama", "gemma2"]


@pytest.fixture(scope="module", params=FAMILIES)
def whole(request):
    return Whole(tiny(request.param), IDS)


@pytest.fixture(scope="module", params=[4096, 17])
def chunk(request):
    return request.param


def test_massive_activations(whole, chunk):
    seen = look(whole.model, None, IDS, [MassiveActivations(least=3.0, ratio=3.0)], chunk=chunk)
    h = torch.stack(whole.hidden)
    typical = torch.stack([x.abs().median(-1).values.median() for x in h])
    close(seen["massive-activations.typical"], typical)
    norm = h.norm(dim=-1)
    close(seen["massive-activations.residual_peak"], norm[:, 0] / norm.median(-1).values)
    for name, kept in (("value_drain", whole.values), ("key_norm", whole.keys)):
        for i in whole.layers:
            size = kept[i].norm(dim=-1)
            close(seen[f"massive-activations.{name}"][i], size[:, 0] / size.median(-1).values)
    cosine = torch.stack([torch.nn.functional.cosine_similarity(x[1:], x[:1]) for x in h])
    close(seen["massive-activations.alignment"], cosine.square().mean(-1))
    found = torch.zeros(h.shape[2], dtype=torch.long)
    for i, x in enumerate(h):
        at = x.abs().flatten().topk(8).indices
        close(seen["massive-activations.value"][i], x.flatten()[at])
        assert seen["massive-activations.position"][i].tolist() == (at // h.shape[2]).tolist()
        assert seen["massive-activations.dimension"][i].tolist() == (at % h.shape[2]).tolist()
        bound = max(3.0, 3 * float(typical[i]))
        massive = x.flatten()[at].abs() > bound
        assert int(seen["massive-activations.count"][i]) == int(massive.sum())
        found += torch.bincount((at % h.shape[2])[massive], minlength=h.shape[2])
    assert found.sum() > 0
    assert seen["massive-activations.sink_dimensions"].tolist() == found.nonzero().flatten().tolist()
    assert seen["massive-activations.sink_dimension_entries"].tolist() == found[found > 0].tolist()


def test_secondary_sinks_of_a_model(whole, chunk):
    lens = SecondarySinks(cosine=0.12, noise=0)
    seen = look(whole.model, None, IDS, [lens], chunk=chunk)
    h = torch.stack(whole.hidden)
    norm = h.norm(dim=-1)
    primary = int(norm[:, :2].mean(0).argmax())
    assert int(seen["secondary-sinks.primary"]) == primary
    close(seen["secondary-sinks.norm"], norm[:, primary])
    start, end = active_range(norm[:, primary])
    lives = {}
    for layer in range(start, end):
        for t in range(primary + 1, len(IDS)):
            cosine = torch.nn.functional.cosine_similarity(h[layer, t], h[layer, primary], dim=0)
            if abs(float(cosine)) > 0.12:
                lives.setdefault(t, []).append(layer)
    assert lives  # the bound is low enough to find some
    assert seen["secondary-sinks.position"].tolist() == sorted(lives)
    assert seen["secondary-sinks.created"].tolist() == [lives[t][0] for t in sorted(lives)]
    assert seen["secondary-sinks.lifetime"].tolist() == [len(lives[t]) for t in sorted(lives)]
    column = whole.table(importance)
    for t, score in zip(sorted(lives), seen["secondary-sinks.score"], strict=True):
        measured = [i for i in lives[t] if i in whole.layers]
        expected = column[measured, :, t].mean() if measured else torch.tensor(torch.nan)
        close(score, expected)


def test_a_planted_secondary_sink_is_found_with_its_life(chunk):
    """Token 7 copies the sink's direction in blocks 10..20 of 30, token 9 in 3 blocks, token 11 wherever the sink is active."""
    blocks, n, width = 30, 24, 64
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(blocks, n, width, generator=generator)
    h[:, 0] *= 100  # the sink ...
    h[:2, 0] /= 99  # ... is active from block 2
    h[28:, 0] /= 90  # ... to before block 28
    for token, life in ((7, range(10, 21)), (9, range(12, 15)), (11, range(2, 28))):
        for i in life:
            h[i, token] = -0.03 * h[i, 0]  # the sign and the size do not matter
    model = tiny("llama", num_hidden_layers=30, hidden_size=96)
    probe = SecondarySinks().probe(Reading(ModelInfo.of(model), None, IDS[:n], torch.device("cpu")))
    for start in range(0, n, chunk):
        for i in range(blocks):
            probe.hidden(i, start, h[i, start : start + chunk])
    found = {m.name.partition(".")[2]: m.value for m in probe.results()}
    assert (int(found["primary"]), int(found["start"]), int(found["end"])) == (0, 2, 28)
    assert found["position"].tolist() == [7, 9, 11]
    assert found["created"].tolist() == [10, 12, 2]
    assert found["lifetime"].tolist() == [11, 3, 26]
    assert found["kind"].tolist() == [1, 0, 2]
    assert int(found["count"]) == 1
    assert found["levels"][10, 11] == found["levels"][12, 3] == found["levels"][2, 26] == 1
    assert found["levels"].sum() == 3


def test_the_range_in_which_a_sink_is_active():
    assert active_range(torch.tensor([1.0, 1, 50, 52, 51, 3, 2])) == (2, 5)
    assert active_range(torch.tensor([1.0, 2, 50])) == (2, 3)
    assert active_range(torch.tensor([7.0])) == (0, 1)


def cosines(x):
    """Mean over all pairs of different vectors, one pair after the other."""
    x = x.double()
    n = x.shape[1]
    pairs = [torch.nn.functional.cosine_similarity(x[:, s], x[:, t], dim=-1) for s in range(n) for t in range(s)]
    return torch.stack(pairs).mean(0)


def test_patterns(chunk):
    model = tiny("llama")
    seen = look(model, None, IDS, [Patterns(window=9, raw=25)], chunk=chunk)
    whole = Whole(model, IDS)
    for i, block in enumerate(whole.model.model.layers):
        x = block.input_layernorm(whole.inputs[i])
        q = block.self_attn.q_proj(x).view(len(IDS), 6, 16).transpose(0, 1)
        k = block.self_attn.k_proj(x).view(len(IDS), 2, 16).transpose(0, 1)
        tables = whole.model.model.rotary_emb(x[None], torch.arange(len(IDS))[None])
        turned_q, turned_k = (y[0] for y in apply_rotary_pos_emb(q[None], k[None], *tables))
        close(seen["patterns.query"][i], cosines(turned_q[:, -9:]))
        close(seen["patterns.key"][i], cosines(turned_k[:, -9:]))
        close(seen["patterns.query_raw"][i], cosines(q[:, :25]))
        size_q, size_k = ((y[..., :8].square() + y[..., 8:].square()).sqrt().mean(1) for y in (q, k))
        size = size_q * size_k.repeat_interleave(3, 0)  # before or after turning: a pair keeps its length
        assert seen["patterns.channel"][i].tolist() == size.argmax(-1).tolist()
        close(seen["patterns.channel_share"][i], size.amax(-1) / size.sum(-1))
        spacing = 2 * math.pi * 10_000 ** (2 * size.argmax(-1) / 16)
        close(seen["patterns.spacing"][i], spacing, 1e-3)


@pytest.mark.parametrize("family", ["llama", "cohere", "gpt_neox"])  # halves, neighbours, some dimensions only
def test_channels_are_the_pairs_that_turn_together(family):
    model = tiny(family)
    rope = ModelInfo.of(model).rope
    partner, angle = channels(rope, 1, 16, torch.device("cpu"))
    expected = {"llama": [i ^ 8 for i in range(16)], "cohere": [i ^ 1 for i in range(16)]}
    expected["gpt_neox"] = [2, 3, 0, 1, *range(4, 16)]
    assert partner.tolist() == expected[family]
    turning = 4 if family == "gpt_neox" else 16
    theta = model.config.rope_parameters["rope_theta"]
    slow = {i: theta ** (-2 * n / turning) for n, i in enumerate(i for i in range(16) if partner[i] > i)}
    for i in range(16):
        assert float(angle[i]) == pytest.approx(slow.get(min(i, int(partner[i])), 0.0), rel=1e-3)


def test_similarity_of_equal_and_of_orthogonal_vectors():
    assert float(similarity(torch.tensor([5.0, 0.0]), 5)) == pytest.approx(1)
    assert float(similarity(torch.tensor([1.0, 1.0, 1.0]), 3)) == pytest.approx(0)
    assert similarity(torch.tensor([1.0]), 1).isnan()


def test_a_model_without_rotary_embedding_has_similarities_but_no_channels():
    model = copy.deepcopy(tiny("gpt2"))
    seen = look(model, None, IDS, ["patterns"])
    assert seen["patterns.query"].isfinite().all()
    close(seen["patterns.query"], seen["patterns.query"].clamp(-1, 1))
    assert "patterns.channel" not in seen.measures
