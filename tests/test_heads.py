"""Head roles: what the scores mean, what a file of them refuses, and what they say about the default model."""

import json
import math

import pytest
import torch
from models import tiny
from rich.console import Console
from test_tasks import characters

import foveal
from foveal.errors import InputError
from foveal.head_scores import (
    COPIES,
    CopyProbe,
    Password,
    answer_span,
    copy_scores,
    copying,
    offset_mass,
    random_texts,
    repeat_scores,
    repetition,
)
from foveal.heads import RETRIEVAL, HeadRoles, calibrate, heat_map, roles_for, roles_path
from foveal.hub import model_identity
from foveal.ops.ragged import Logit

IDENTITY = {
    "name": "made-up",
    "architecture": "LlamaForCausalLM",
    "layers": 3,
    "heads": 6,
    "kv_heads": 2,
    "head_dim": 16,
    "weights": "0123456789abcdef",
}


def roles(layers=3, heads=6, **more):
    """Scores 0/n, 1/n, ... in a shuffled order, all different."""
    n = layers * heads
    scores = torch.randperm(n, generator=torch.Generator().manual_seed(1)).float().view(layers, heads) / n
    return HeadRoles(IDENTITY | {"layers": layers, "heads": heads}, {"retrieval": scores, "echo": 1 - scores}, **more)


# ---------------------------------------------------------------------- scores of records


def test_the_head_that_looks_at_the_copied_token_scores_one():
    prompt, answer = [5, 9, 20, 21, 22, 23, 7, 8], [20, 21, 22, 23, 1]
    oracle = torch.tensor([2, 3, 4, 5, 0])
    half = torch.tensor([2, 0, 4, 0, 0])
    ahead = torch.tensor([3, 4, 5, 6, 0])  # in the needle, but not at what is copied
    stuck = torch.tensor([2, 2, 2, 2, 2])  # one token, however often
    looked = torch.stack([oracle, half, ahead, stuck], 1).view(5, 2, 2)
    assert copy_scores(looked, prompt, (2, 6), answer).tolist() == [[1.0, 0.5], [0.0, 0.25]]


def test_a_head_that_repeats_itself_stays_within_one():
    looked = torch.tensor([1, 2, 1, 2]).view(4, 1, 1)
    assert copy_scores(looked, [0, 8, 9], (1, 3), [8, 9, 8, 9]).item() == 1.0


def test_equal_tokens_elsewhere_do_not_count():
    # the head looks at a 9 outside the needle while a 9 is copied
    assert copy_scores(torch.tensor([0]).view(1, 1, 1), [9, 8, 9], (1, 3), [9]).item() == 0.0


def test_the_answer_is_found_exactly_or_nearly():
    prompt = [1, 2, 3, 9, 4, 5, 6, 7]
    assert answer_span(prompt, [[4, 5, 6], [1, 2]]) == (4, 7)
    assert answer_span(prompt, [[8, 8], [1, 2]]) == (0, 2)
    assert answer_span([1, 5, 4, 9], [[4, 5]]) == (1, 3)
    assert answer_span(prompt, [[4, 5, 8]]) is None


def one_hot_attention(queries, keys, strength=12.0):
    """q, k and lse [1, 1, length, ...] of a causal head whose query i attends where keys[j] == queries[i]."""
    size = int(max(queries.max(), keys.max())) + 1
    q, k = (torch.nn.functional.one_hot(x, size).float()[None, None] for x in (queries, keys))
    z = strength * q @ k.mT
    causal = torch.ones(z.shape[-2:]).tril().bool()
    return q, k, z.masked_fill(~causal, -math.inf).logsumexp(-1), Logit(strength)


@pytest.mark.parametrize("first", [0, 1])
def test_a_hand_built_induction_head_scores_one(first):
    period = 16
    tokens = torch.cat([torch.full((first,), 16), (torch.randperm(16)).repeat(COPIES)])
    before = torch.cat([torch.tensor([17]), tokens[:-1]])  # each key says which token stood before it
    echo, induction = repeat_scores(*one_hot_attention(tokens, before)[:3], first, period, Logit(12.0))
    assert induction.item() == pytest.approx(1, abs=1e-3)
    assert echo.item() == pytest.approx(0, abs=1e-3)


def test_a_hand_built_echo_head_shares_with_the_query_itself():
    period = 16
    tokens = torch.randperm(16).repeat(COPIES)
    q, k, lse, logit = one_hot_attention(tokens, tokens, strength=20.0)
    echo, induction = repeat_scores(q, k, lse, 0, period, logit)
    # in copy c, c - 1 earlier copies and the token itself hold equal weights
    assert echo.item() == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3, abs=1e-3)
    assert induction.item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_offset_mass_is_the_diagonal_of_the_attention_matrix(softcap):
    q, k = torch.randn(1, 6, 11, 8), torch.randn(1, 2, 11, 8)
    z = q @ k.repeat_interleave(3, 1).mT * 0.7
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z.masked_fill(~torch.ones(11, 11).tril().bool(), -math.inf)
    for offset in (0, 1, 4):
        want = z.softmax(-1)[0].diagonal(-offset, 1, 2)
        got = offset_mass(q, k, z.logsumexp(-1), offset, Logit(0.7, softcap))
        torch.testing.assert_close(got, want)


# ---------------------------------------------------------------------- measured through the core


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_copy_probe_sees_the_models_own_attention(family):
    model, ids = tiny(family), torch.randint(0, 128, (1, 40))
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    probe = CopyProbe()
    with foveal.attach(model, probe) as session:
        session.decoder(input_ids=ids[:, :-1])
        assert not probe.record  # nothing to see before decoding
        model(input_ids=ids[:, -1:], past_key_values=session.store)
    for layer, weights in enumerate(attentions):
        assert probe.record[layer].tolist() == weights[0, :, -1].argmax(-1).tolist()


def test_repetition_agrees_with_the_models_own_attention():
    model, tokenizer, period = tiny("llama", vocab_size=257), characters(), 20
    texts = random_texts(tokenizer, period, 0, 512)
    assert all(len(set(t[1:])) == period and t[1:21] == t[21:41] == t[61:] for t in texts)
    scores = repetition(model, texts, period)
    model.set_attn_implementation("eager")
    attentions = torch.stack(model(torch.tensor(texts), output_attentions=True).attentions).mean(
        1
    )  # [layers, heads, n, n]
    model.set_attn_implementation("sdpa")
    echo, induction = torch.zeros(2, 3, 6)
    for i in range(1 + period, 1 + COPIES * period):
        for j in range(i - period, 0, -period):
            echo += attentions[:, :, i, j]
            induction += attentions[:, :, i, j + 1]
    torch.testing.assert_close(scores["echo"], echo / (3 * period))
    torch.testing.assert_close(scores["induction"], induction / (3 * period))


def test_the_password_is_in_the_document_and_scored_by_its_words():
    task, tokenizer = Password(), characters()
    samples = task.samples(tokenizer, 1200, 6, seed=3)
    for sample in samples:
        assert tokenizer.decode(sample.context).count(sample.target) == 1
        assert sample.target not in tokenizer.decode(sample.question)
    words = samples[0].target.split()
    assert task.score(samples[0], f" {samples[0].target}.") == 1.0
    assert task.score(samples[0], f"{words[3]} and {words[0]}") == 0.5
    assert task.score(samples[0], "I do not know") == 0.0
    assert len({s.target for s in samples}) == 6


def small():
    return tiny("llama", vocab_size=257, max_position_embeddings=1024)


def test_calibrate_through_the_core(monkeypatch):
    monkeypatch.setattr(Password, "score", lambda self, sample, answer: 1.0)
    model, seen = small(), []
    measured = calibrate(model, characters(), lengths=[700], samples=2, period=30, progress=lambda *x: seen.append(x))
    assert seen == [(1, 2), (2, 2)]
    assert set(measured.scores) == {"retrieval", "activation", "induction", "echo"}
    assert all(float(x.min()) >= 0 and float(x.max()) <= 1 for x in measured.scores.values())
    assert measured["induction"].min() > 0  # a softmax leaves something everywhere
    assert measured.source["copying"] == {"lengths": [700], "samples": 2, "kept": [2]}
    assert measured.identity == model_identity(model)


def test_only_runs_answered_right_count(monkeypatch):
    model, tokenizer, task = small(), characters(), Password()
    runs = task.samples(tokenizer, 700, 3)
    monkeypatch.setattr(Password, "score", lambda self, sample, answer: 0.5 + 0.1 * (sample.index == 1))
    assert [found is not None for found in copying(model, tokenizer, task, runs)] == [False, True, False]


def test_layers_without_full_attention_are_not_measured(monkeypatch):
    monkeypatch.setattr(Password, "score", lambda self, sample, answer: 1.0)
    model = tiny("gemma2", vocab_size=257, max_position_embeddings=1024)
    measured = calibrate(model, characters(), lengths=[700], samples=1, period=30)
    assert measured.measured == (1, 3)
    assert measured["induction"][[0, 2]].eq(0).all() and measured["induction"][[1, 3]].gt(0).all()
    assert measured.top_share("echo", 1.0).sum(1).tolist() == [0, 6, 0, 6]
    assert measured.random_like(torch.ones(4, 6).bool() & torch.tensor([[0], [1], [0], [1]]).bool(), 0).sum() == 12


def test_a_model_that_answers_nothing_is_told_so():
    with pytest.raises(InputError, match="answered none of 1 questions right"):
        calibrate(small(), characters(), lengths=[700], samples=1, period=30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": []}, "at least one prompt length, up to the model's 1,024 positions"),
        ({"lengths": [4096]}, "at most 1,024"),
        ({"lengths": [100]}, "needs at least"),
        ({"samples": 0}, "n to be a positive whole number"),
        ({"period": 1}, "period = 1: expected a number from 2 to 255"),
        ({"period": 256}, "from 2 to 255"),
    ],
)
def test_bad_calibrations_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        calibrate(small(), characters(), **{"lengths": [700], "samples": 1, "period": 30} | options)


# ---------------------------------------------------------------------- reading roles


def test_kv_is_the_maximum_over_the_query_group():
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.3, 0.0, 0.4]]).repeat(3, 1)
    assert HeadRoles(IDENTITY, {"x": scores}).kv("x")[0].tolist() == pytest.approx([0.9, 0.4])
    assert HeadRoles(IDENTITY, {"x": scores}).kv("x", 3)[0].tolist() == pytest.approx([0.9, 0.3, 0.4])
    with pytest.raises(InputError, match="divides 6 heads, got 4"):
        roles().kv("retrieval", 4)


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (1 / 18, 1), (0.25, 5), (0.5, 9), (1.0, 18), (1, 18)])
def test_top_share_takes_the_best_of_all_layers_together(share, count):
    found, scores = roles().top_share("retrieval", share), roles()["retrieval"]
    assert int(found.sum()) == count
    assert scores[found].min() * 18 == pytest.approx(18 - count)


def test_top_share_of_kv_heads_and_of_equal_scores():
    scores = torch.zeros(3, 6)
    scores[2, 4] = 1
    found = HeadRoles(IDENTITY, {"x": scores}).top_share("x", 0.5, kv_heads=2)
    assert found.tolist() == [[True, True], [False, False], [False, True]]  # ties: the earlier ones


@pytest.mark.parametrize("share", [0, 0.0, -0.1, 1.5, True, "half", math.nan])
def test_bad_shares_are_refused(share):
    with pytest.raises(InputError, match="share"):
        roles().top_share("retrieval", share)


def test_unknown_scores_come_with_a_suggestion():
    with pytest.raises(InputError, match="no head score 'retreival': did you mean 'retrieval'"):
        roles().kv("retreival")
    with pytest.raises(InputError, match="choose from retrieval, echo"):
        heat_map(roles(), "zzz")


def test_random_controls_have_as_many_heads():
    measured, mask = roles(), roles().top_share("retrieval", 0.3)
    control = measured.random_like(mask, seed=0)
    assert control.shape == mask.shape and control.sum() == mask.sum() == 6
    assert torch.equal(control, measured.random_like(mask, seed=0))
    assert len({tuple(measured.random_like(mask, seed=s).flatten().tolist()) for s in range(20)}) > 15
    assert torch.stack([measured.random_like(mask, seed=s) for s in range(200)]).any(0).all()
    for seed in range(5):
        assert torch.equal(measured.random_like(mask, seed, per_layer=True).sum(1), mask.sum(1))
        assert not (measured.random_like(mask, seed, outside=mask) & mask).any()
    with pytest.raises(InputError, match="at least 10 heads to draw from, got 8"):
        measured.random_like(
            measured.top_share("retrieval", 10 / 18), 0, outside=measured.top_share("retrieval", 10 / 18)
        )


def test_the_best_heads_are_named_in_order():
    scores = torch.zeros(3, 6)
    scores[1, 4], scores[2, 0] = 0.5, 0.75
    assert HeadRoles(IDENTITY, {"x": scores}).best("x", 2) == [(2, 0, 0.75), (1, 4, 0.5)]


# ---------------------------------------------------------------------- files


def test_a_round_trip_is_exact(tmp_path):
    x = torch.rand(3, 6) ** 9
    x[0, 0], x[0, 1], x[0, 2] = 1 / 3, 1e-30, 16777217 / 2
    written = HeadRoles(IDENTITY, {"x": x, "y": 1 - x}, {"date": "2025-01-01", "seed": 3}, (0, 2))
    read = HeadRoles.load(written.save(tmp_path / "new" / "roles.json"))
    assert (read.identity, read.source, read.measured) == (written.identity, written.source, written.measured)
    assert list(read.scores) == ["x", "y"]
    assert all(torch.equal(read[name], written[name]) for name in "xy")


def test_roles_of_another_model_are_refused_with_both_names(tmp_path):
    model = tiny("llama")
    identity = model_identity(model) | {"name": "theirs", "weights": "f" * 16}
    path = HeadRoles(identity, {"x": torch.zeros(3, 6)}).save(tmp_path / "theirs.json")
    with pytest.raises(InputError, match=r"measured on theirs, but the model is LlamaForCausalLM \(weights differ\)"):
        roles_for(model, path)
    # the same weights under another name are the same model
    path = HeadRoles(model_identity(model) | {"name": "/copy"}, {"x": torch.ones(3, 6)}).save(tmp_path / "copy.json")
    assert roles_for(model, path)["x"].sum() == 18


def test_roles_are_found_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path))
    model = tiny("llama")
    with pytest.raises(InputError, match="measure them once with `foveal heads"):
        roles_for(model)
    HeadRoles(model_identity(model), {"x": torch.ones(3, 6)}).save(roles_path(model))
    assert roles_for(model)["x"].sum() == 18


def written(tmp_path, **changes):
    path = roles().save(tmp_path / "roles.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "something"}, "does not say 'foveal head roles 1'"),
        (
            {"scores": {"x": [[0.0] * 6] * 2}},
            r"finite 'x' scores \[3, 6\], the layers and heads of made-up, got \[2, 6\]",
        ),
        ({"scores": {"x": [[math.nan] * 6] * 3}}, "finite 'x' scores"),
        ({"scores": {"x": [[0.0] * 6, [0.0] * 5, [0.0] * 6]}}, "is damaged"),
        ({"scores": [1, 2]}, "is damaged"),
        ({"identity": {"name": "x"}}, "is damaged"),
        ({"measured": [7]}, "measured layers below 3"),
    ],
)
def test_damaged_files_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        HeadRoles.load(written(tmp_path, **changes))
    assert "roles.json" in str(error.value)


@pytest.mark.parametrize(("content", "message"), [("{ not json", "is not JSON"), ("[1, 2]", "does not say")])
def test_files_that_are_something_else_are_refused(tmp_path, content, message):
    (tmp_path / "roles.json").write_text(content)
    with pytest.raises(InputError, match=message):
        HeadRoles.load(tmp_path / "roles.json")
    with pytest.raises(InputError, match="cannot be read"):
        HeadRoles.load(tmp_path / "none.json")


# ---------------------------------------------------------------------- drawing


def drawn(measured, name, width):
    console = Console(width=width, no_color=True, legacy_windows=False)
    with console.capture() as capture:
        console.print(heat_map(measured, name))
    return capture.get().splitlines()


def test_the_map_shows_numbers_in_brackets():
    lines = drawn(HeadRoles(IDENTITY, {"x": torch.arange(18).view(3, 6) / 18}, measured=(0, 1)), "x", 80)
    assert lines[0] == "x of made-up, in percent"
    assert [line.rstrip() for line in lines[1:]] == [
        "layer     0   1   2     3   4   5",
        "    0 [   0   6  11][  17  22  28]",
        "    1 [  33  39  44][  50  56  61]",
        "    2 [   -   -   -][   -   -   -]",
    ]


def test_wide_maps_come_in_parts_that_fit():
    lines = drawn(HeadRoles(IDENTITY | {"heads": 64, "kv_heads": 8}, {"x": torch.rand(3, 64)}), "x", 80)
    assert max(map(len, lines)) <= 80
    assert sum(line.count("[") for line in lines) == 3 * 8
    assert sum(line.startswith("layer") for line in lines) == 4


# ---------------------------------------------------------------------- the default model


@pytest.mark.model
def test_the_shipped_roles_are_the_default_models(default_model):
    found = roles_for(default_model[0])
    share = (found["retrieval"] >= RETRIEVAL).float().mean()
    assert 0.01 < share < 0.10
    assert {(18, 6), (23, 2)} <= {(layer, head) for layer, head, _ in found.best("retrieval", 5)}
    assert sum(found.source["copying"]["kept"]) >= 10
    assert found["induction"].max() > 0.8 and found["induction"].median() < 0.01


@pytest.mark.model
def test_repetition_gives_the_shipped_scores_again(default_model):
    model, tokenizer = default_model
    found = roles_for(model)
    period = found.source["repetition"]["tokens"]
    again = repetition(model, random_texts(tokenizer, period, found.source["seed"], 8192), period)
    for name, x in again.items():
        torch.testing.assert_close(x, found[name], atol=1e-3, rtol=0)
