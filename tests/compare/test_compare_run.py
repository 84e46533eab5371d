"""A comparison measures what it says."""

import json
import math

import pytest
import torch
from comparing import BUDGETS, FIELDS, LENGTHS, METHODS, cells, run, small, tasks
from models import tiny

import foveal
from foveal.compare.drive import answer, follow
from foveal.compare.plan import configurations
from foveal.compare.rows import summary_rows
from foveal.compare.table import markdown_table
from foveal.errors import UnsupportedModel
from foveal.tasks import get_task


def test_every_configuration_on_every_task_and_length(result):
    configs = [("dense", 1.0), *((m, b) for m in METHODS for b in BUDGETS)]
    asked = [(t, n) for t in ("passkey", "needle") for n in LENGTHS] + [("perplexity", LENGTHS[-1])]
    assert sorted(cells(result.records)) == sorted((*c, *a) for c in configs for a in asked)
    for r in result.records:
        assert set(vars(r)) >= FIELDS
        assert (r.status, r.error) == ("ok", None)
        assert r.n == (8 if r.task == "perplexity" else 2)
        assert r.params.get("budget", 1.0) == r.budget
        assert math.isfinite(r.score)
        assert r.score_low <= r.score <= r.score_high
        if r.length == LENGTHS[-1]:
            assert r.prefill_s > 0
            assert r.decode_tok_s > 0
            assert r.peak_bytes > 10_000_000


def test_progress_goes_from_nothing_to_all(result):
    shares = [share for _, share in result.progress]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert all(line for line, _ in result.progress)
    assert any("h2o at 0.25: 4 questions at 800 tokens" in line for line, _ in result.progress)


def test_bytes_are_what_the_methods_hold(model, result):
    head_dim = model.config.head_dim
    for r in result.records:
        context = r.kv_bytes_dense / (model.config.num_hidden_layers * model.config.num_key_value_heads * head_dim * 8)
        assert context == int(context)
        assert r.length / 2 < context < r.length
        # beside key and value (8 bytes a dimension) a row holds token ids and at most one statistic, 4 bytes each
        extra = 8 / (8 * head_dim)
        if r.method == "h2o":
            assert r.kv_bytes <= (r.budget + 0.02) * (1 + extra) * r.kv_bytes_dense
            assert r.kv_bytes >= r.budget * r.kv_bytes_dense
        else:
            assert r.kv_bytes_dense < r.kv_bytes <= 1.35 * r.kv_bytes_dense  # page summaries come on top


def test_quest_reads_its_budget_and_dense_reads_all(result):
    shares = {(r.method, r.budget): r.kv_read_share for r in result.records if r.task == "perplexity"}
    assert shares["dense", 1.0] in (None, 1.0)
    assert shares["quest", 0.25] < shares["quest", 0.5] < 1


def test_perplexity_of_dense_is_the_models_own(model, tokenizer, result):
    (sample,) = get_task("perplexity", max_new_tokens=8).samples(tokenizer, LENGTHS[-1], 1)
    ids = torch.tensor([[*sample.context, *sample.question, *sample.target]])
    with torch.no_grad():
        logits = model(ids).logits[0].log_softmax(-1)
    targets = ids[0, len(sample.context) + 1 :]
    losses = -logits[len(sample.context) : -1].gather(-1, targets[:, None])
    found = next(r for r in result.records if (r.method, r.task) == ("dense", "perplexity"))
    assert found.n == 8
    assert math.isclose(found.score, losses.mean().exp().item(), rel_tol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_answers_are_those_of_greedy_generate(family):
    model = tiny(family)
    contexts = [torch.arange(1, 1 + n) * 7 % 120 + 1 for n in (40, 40, 33)]
    questions = [[5, 9, 3], [17], [8, 4, 4, 90, 2]]
    expected = []
    for context, question in zip(contexts, questions, strict=True):
        ids = torch.cat([context, torch.tensor(question)])[None]
        expected.append(model.generate(ids, max_new_tokens=6)[0, ids.shape[1] :].tolist())
    stop = expected[0][3]
    until_stop = [row[: row.index(stop)] if stop in row else row for row in expected]
    with torch.no_grad(), foveal.attach(model):
        for stops, wanted in (({None}, expected), ({stop}, until_stop)):
            stores = [model(c[None]).past_key_values for c in contexts]
            alone = [answer(model, s.fork(), [q], 6, stops)[0] for s, q in zip(stores, questions, strict=True)]
            assert alone == wanted
            if family == "llama":
                assert answer(model, foveal.Store.join(stores), questions, 6, stops) == wanted
            else:
                with pytest.raises(UnsupportedModel, match="one by one"):
                    answer(model, foveal.Store.join(stores), questions, 6, stops)


def test_following_a_text_gives_the_nats_of_its_tokens(model):
    ids = torch.arange(1, 41)[None] * 5 % 250
    with torch.no_grad(), foveal.attach(model):
        store = model(ids[:, :30]).past_key_values
        losses, times, _ = follow(model, store, ids[0, 30:].tolist(), model.device)
    with torch.no_grad():
        logits = model(ids).logits[0, 30:-1].log_softmax(-1)
    expected = -logits.gather(-1, ids[0, 31:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(losses), expected, atol=1e-4, rtol=1e-4)
    assert len(times) == 9
    assert min(times) > 0


def test_the_same_call_gives_the_same_scores(model, tokenizer, result):
    again = run(model, tokenizer)

    def pick(done):
        return [(r.score, r.score_low, r.score_high, r.n, r.kv_bytes, r.grid) for r in done.records]

    assert cells(again.records) == cells(result.records)
    assert pick(again) == pick(result)


def test_what_is_asked_twice_is_measured_once(model, tokenizer):
    done = run(
        model, tokenizer, methods=["h2o", "h2o", "dense"], budgets=[0.5, 0.5], lengths=[400, 400], tasks=tasks()[:1]
    )
    assert cells(done.records) == [("dense", 1.0, "passkey", 400), ("h2o", 0.5, "passkey", 400)]
    assert [r.n for r in done.records] == [2, 2]


def test_shares_and_token_counts_are_different_budgets():
    one, all_, many = configurations(["h2o"], [1, 1.0, 512])[1:]
    assert [type(c.method.budget) for c in (one, all_, many)] == [int, float, int]
    assert len({one, all_, many}) == 3


def test_a_count_of_tokens_is_shown_as_tokens(model, tokenizer):
    done = run(model, tokenizer, methods=["h2o"], budgets=[64], lengths=[400], tasks=tasks()[:1]).to_dict()
    assert [r.label for r in summary_rows(done)] == ["dense", "h2o at 64 tokens"]
    assert "| h2o | 64 tokens |" in markdown_table(done)
    assert done["records"][1]["kv_bytes"] < 0.3 * done["records"][1]["kv_bytes_dense"]


def test_compositions_and_instances_take_part(model, tokenizer):
    plan = ["quest(budget=64,skip=0)|h2o(budget=0.5)", foveal.get_method("streaming-llm", budget=0.5)]
    done = run(model, tokenizer, methods=plan, lengths=[400], tasks=tasks()[:1])
    assert [(r.method, r.status) for r in done.records] == [
        ("dense", "ok"),
        ("quest(budget=64,skip=0)|h2o(budget=0.5)", "ok"),
        ("streaming-llm", "ok"),
    ]
    json.dumps(done.to_dict(), allow_nan=False)


def test_one_scored_token_tells_no_speed(model, tokenizer):
    done = run(model, tokenizer, methods=[], lengths=[400], tasks=[get_task("perplexity", max_new_tokens=1)])
    (dense,) = done.records
    assert (dense.status, dense.n) == ("ok", 1)
    assert dense.score > 1
    assert dense.decode_tok_s is None


def test_hybrid_models_compare_too(tokenizer):
    done = run(small("gemma2"), tokenizer, lengths=[700])
    assert {(r.status, r.error) for r in done.records} == {("ok", None)}
    for r in done.records:
        assert r.kv_bytes < r.kv_bytes_dense if r.method == "h2o" else r.kv_bytes >= r.kv_bytes_dense
