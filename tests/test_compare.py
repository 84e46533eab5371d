"""A comparison measures what it says, survives what fails, and ends with files that hold all of it."""

import json
import math
import random
from dataclasses import dataclass, replace

import pytest
import torch
from models import MLA, tiny
from test_tasks import characters

import foveal
from foveal.compare import Comparison, Record, compare
from foveal.compare.ask import Asker
from foveal.compare.drive import answer, follow
from foveal.compare.measure import Memory, out_of_memory, resident, wilson
from foveal.compare.records import filled
from foveal.compare.report import headline, render
from foveal.compare.run import configurations
from foveal.compare.table import markdown_table, summary_rows
from foveal.errors import FovealError, InputError, UnsupportedModel
from foveal.method import Method
from foveal.spec import parse_task, split
from foveal.stats import paired_bootstrap
from foveal.tasks import Sample, get_task
from foveal.tasks.multi_turn import MultiTurn

FIELDS = {
    *("method", "params", "task", "length", "budget", "score", "n", "kv_bytes", "kv_bytes_dense", "peak_bytes"),
    *("prefill_s", "decode_tok_s", "status", "error"),
}
METHODS, BUDGETS, LENGTHS = ("h2o", "quest"), (0.5, 0.25), (640, 800)
VOCAB, POSITIONS = 257, 1024  # as many as the tokenizer has; it writes a token for every byte


@pytest.fixture(scope="module")
def tokenizer():
    return characters(chat_template=None)


def small(family, **more):
    return tiny(family, vocab_size=VOCAB, max_position_embeddings=POSITIONS, **more)


@pytest.fixture(scope="module")
def model():
    return small("llama")


def tasks():
    return [
        get_task("passkey", max_new_tokens=6),
        get_task("needle", per_context=1),
        get_task("perplexity", max_new_tokens=8),
    ]


def run(model, tokenizer, **more):
    plan = {"methods": METHODS, "tasks": tasks(), "budgets": BUDGETS, "lengths": LENGTHS, "samples": 2}
    return compare(model, tokenizer, **plan | more)


@pytest.fixture(scope="module")
def result(model, tokenizer):
    lines = []
    done = run(model, tokenizer, progress=lambda line, share: lines.append((line, share)))
    done.progress = lines
    return done


def cells(records):
    return [(r.method, r.budget, r.task, r.length) for r in records]


# ---------------------------------------------------------------------- what a run measures


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
        losses, times = follow(model, store, ids[0, 30:].tolist(), model.device)
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


# ---------------------------------------------------------------------- conversations, grids, pairs


@dataclass(frozen=True, kw_only=True)
class Spelled(MultiTurn):
    """Scores an answer by its letters, so that different answers have different scores."""

    per_context: int = 3
    max_new_tokens: int = 6

    def score(self, sample, answer):
        return float(sum(i * ord(ch) for i, ch in enumerate(answer, 1)) % 9973)


@pytest.mark.parametrize("method", [None, "h2o(budget=40)", "streaming-llm(budget=64)"])
def test_later_turns_go_on_in_the_cache_that_read_the_earlier_ones(method, tokenizer):
    model, task = tiny("llama", vocab_size=VOCAB, max_position_embeddings=1500), Spelled()
    talk = task.samples(tokenizer, 1400, 3)
    assert [s.turn for s in talk] == [0, 1, 2]
    assert len({s.context for s in talk}) == 1
    spell = lambda ids, s: task.score(s, tokenizer.decode(ids, skip_special_tokens=True))
    stop = model.generation_config.eos_token_id
    with torch.no_grad(), foveal.attach(model, method):
        document = model(torch.tensor([talk[0].context])).past_key_values
        afresh = [spell(answer(model, document.fork(), [s.question], 6, {stop})[0], s) for s in talk]
        going, told, expected = document.fork(), 0, []
        for s, later in zip(talk, [*talk[1:], None], strict=True):
            expected.append(spell(answer(model, going.fork(), [s.question[told:]], 6, {stop})[0], s))
            if later is not None:
                assert later.question[: len(s.question)] == s.question
                model(torch.tensor([s.question[told:]]), past_key_values=going)
                told = len(s.question)
        asker = Asker(model, tokenizer)
    with torch.no_grad():
        chosen = None if method is None else foveal.get_method(method)
        got = asker.ask(chosen, [(task, s) for s in talk], {}).scores
    assert got == expected
    assert (got == afresh) == (method != "h2o(budget=40)")  # a window forgets the same either way


def test_a_turn_that_does_not_go_on_starts_from_the_document(tokenizer):
    model, task = small("llama"), Spelled(per_context=2)
    talk = task.samples(tokenizer, 1000, 2)
    other = replace(talk[1], question=talk[1].question[-40:])
    ask = lambda *samples: Asker(model, tokenizer).ask(foveal.get_method("h2o", budget=40), samples, {}).scores
    with torch.no_grad():
        assert ask((task, talk[0]), (task, other))[1] == ask((task, replace(other, turn=0)))[0]


def test_questions_run_no_longer_than_their_own_task_allows(model, tokenizer, monkeypatch):
    seen = []

    def spy(model, store, questions, most, stops):
        seen.append((len(questions), most))
        return answer(model, store, questions, most, stops)

    monkeypatch.setattr("foveal.compare.ask.answer", spy)
    asked = [get_task("passkey", max_new_tokens=3), get_task("needle", per_context=1, max_new_tokens=7)]
    done = run(model, tokenizer, methods=[], lengths=[700], tasks=asked)
    assert sorted(seen) == [(2, 3), (2, 7)]
    assert [r.n for r in done.records] == [2, 2]


def test_key_perplexity_pools_the_key_tokens_of_the_dense_model(model, tokenizer):
    task = get_task("key-perplexity", max_new_tokens=8, gain=0.001, floor=50.0)
    samples = [task.samples(tokenizer, 500, 2)[i] for i in range(2)]
    marked = task.prepare(model, samples)
    assert 0 < sum(map(sum, (s.counted for s in marked))) < 16
    pooled = []
    for s in marked:
        ids = torch.tensor([[*s.context, *s.question, *s.target]])
        with torch.no_grad():
            rows = model(ids).logits[0, -9:-1].log_softmax(-1)
        nats = -rows.gather(-1, ids[0, -8:, None])[:, 0]
        pooled += [x for x, yes in zip(nats.tolist(), s.counted, strict=True) if yes]
    done = run(model, tokenizer, methods=["h2o"], budgets=[0.25], lengths=[500], tasks=[task], samples=8)
    dense, h2o = done.records
    assert (dense.n, h2o.n) == (len(pooled), len(pooled))
    assert dense.score == pytest.approx(math.exp(sum(pooled) / len(pooled)), rel=1e-4)
    assert h2o.dense_score == pytest.approx(dense.score)
    assert h2o.score == pytest.approx(dense.score * math.exp(h2o.gain))
    assert h2o.gain_low < h2o.gain < h2o.gain_high
    row = summary_rows(done.to_dict())[1]
    assert row.quality == pytest.approx(dense.score / h2o.score)
    assert row.quality_low == pytest.approx(math.exp(-h2o.gain_high))


def test_a_task_that_finds_nothing_to_score_does_not_stop_the_others(model, tokenizer):
    nothing = get_task("key-perplexity", max_new_tokens=4, gain=1e6)
    done = run(model, tokenizer, lengths=[400], tasks=[nothing, get_task("passkey", max_new_tokens=3)])
    for r in done.records:
        assert r.status == ("ok" if r.task == "passkey" else "error")
        assert "no key token" in (r.error or "no key token")
        assert r.prefill_s > 0


def graded(values, **more):
    return [(Sample((1,), (2,), "x", 100, index=i, seed=0, **{"depth": None} | more), v) for i, v in enumerate(values)]


def test_scores_by_depth_are_binned_only_where_depths_run_on():
    def grid(depths):
        found = [(replace(s, depth=d), v) for (s, v), d in zip(graded([d * d for d in depths]), depths, strict=True)]
        return filled(Record("h2o", {}, "t", 100, 0.5), found, None, 0).grid

    even = [i / 34 for i in range(35)]
    assert [c["depth"] for c in grid(even)] == even
    uneven = [((i * 0.618) % 1) for i in range(50)]
    cells = grid([*uneven, 1.0])
    assert [c["depth"] for c in cells] == pytest.approx([0.05 + 0.1 * i for i in range(10)])
    assert sum(c["n"] for c in cells) == 51
    first = [d * d for d in uneven if d < 0.1]
    assert cells[0]["score"] == pytest.approx(sum(first) / len(first))


def test_scores_of_conversations_are_by_turn():
    found = [(replace(s, turn=i % 3, depth=0.5), v) for i, (s, v) in enumerate(graded([1, 0.5, 0, 1, 0, 0]))]
    assert filled(Record("h2o", {}, "t", 100, 0.5), found, None, 0).grid == [
        {"turn": 0, "score": 1.0, "n": 2},
        {"turn": 1, "score": 0.25, "n": 2},
        {"turn": 2, "score": 0.0, "n": 2},
    ]


def test_gains_are_paired_with_dense_sample_by_sample():
    rng = random.Random(0)
    base = [rng.random() for _ in range(40)]
    mine = [max(0.0, x - 0.05 * rng.random()) for x in base]
    r = filled(Record("h2o", {}, "t", 100, 0.5), graded(mine), graded(base), 3)
    wanted = paired_bootstrap(mine, base, bounds=(-1, 1), seed=3)
    assert (r.gain, r.gain_low, r.gain_high) == wanted[:3]
    dense = filled(Record("dense", {}, "t", 100, 1.0), graded(base), None, 3)
    row = summary_rows(Comparison({}, [dense, r]).to_dict())[1]
    assert row.quality == pytest.approx(sum(mine) / sum(base))
    assert row.quality_low == pytest.approx(1 + r.gain_low / dense.score)
    assert row.quality_high - row.quality_low < 0.2 * (r.score_high - r.score_low) / dense.score
    others = filled(Record("h2o", {}, "t", 100, 0.5), graded(mine, turn=1), graded(base), 3)
    assert others.gain is None  # dense answered other samples
    row = summary_rows(Comparison({}, [dense, others]).to_dict())[1]
    assert row.quality_low == pytest.approx(others.score_low / dense.score)


def test_tasks_are_read_from_text(model, tokenizer):
    done = run(model, tokenizer, methods=[], lengths=[700], tasks=["needle(per_context=1, max_new_tokens=3)"])
    assert [(r.task, r.n) for r in done.records] == [("needle", 2)]
    text = "needle(per_context=2),longbench(subset='trec',data='a,(b'),passkey"
    assert split(text, ",") == ["needle(per_context=2)", "longbench(subset='trec',data='a,(b')", "passkey"]
    for text, said in (
        ("needle(1)", "cannot read the parameters of 'needle"),
        ("needle(per_context=", "cannot read the task"),
        ("needle(per_contxt=1)", r"did you mean 'per_context'\?"),
    ):
        with pytest.raises(InputError, match=said):
            parse_task(text)


# ---------------------------------------------------------------------- what fails


@dataclass(frozen=True)
class Breaks(Method):
    """Raises where it would keep."""

    error: type = RuntimeError
    dense_prefill = True
    name = "breaks"

    def keep(self, step):
        raise self.error("keep is broken here")


@pytest.mark.parametrize("spoil", [False, True])
def test_a_failing_method_is_reported_and_the_others_finish(spoil, model, tokenizer, result, monkeypatch):
    if spoil:  # the reading that methods share fails: each reads for itself

        def fail(*args):
            raise RuntimeError("no shared reading")

        monkeypatch.setattr("foveal.compare.ask.record", fail)
    done = run(model, tokenizer, methods=["h2o", Breaks()])
    broken = [r for r in done.records if r.method == "breaks"]
    assert len(broken) == 5
    for r in broken:
        assert (r.status, r.score, r.n) == ("error", None, 0)
        assert r.error == "RuntimeError: keep is broken here"
    same = {cell: r.score for cell, r in zip(cells(result.records), result.records, strict=True)}
    rest = [r for r in done.records if r.method != "breaks"]
    assert len(rest) == 15
    for cell, r in zip(cells(rest), rest, strict=True):
        assert r.status == "ok"
        assert r.score == pytest.approx(same[cell], rel=1e-4)
    results = done.to_dict()
    assert "breaks: passkey at 640: error, " in markdown_table(results)
    assert "breaks" in render(results)
    assert not any(m in headline(results) for m in ("breaks", "nan"))
    assert model.config._attn_implementation != "foveal"


def test_running_out_of_memory_is_said_in_one_sentence(model, tokenizer):
    done = run(model, tokenizer, methods=[Breaks(error=MemoryError)], lengths=[400], tasks=tasks()[:1])
    assert done.records[1].error == "out of memory: use a smaller --lengths or a smaller model"
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert out_of_memory(caught.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("shapes differ"))


@pytest.mark.parametrize("after", [0, 4, 8])
def test_stopping_midway_keeps_what_was_measured(after, model, tokenizer, result, tmp_path):
    calls = []

    def stop(line, share):
        calls.append(line)
        if len(calls) > after:
            raise KeyboardInterrupt

    done = run(model, tokenizer, progress=stop)
    assert done.meta["interrupted"] is True
    assert sorted(cells(done.records)) == sorted(cells(result.records))
    same = {cell: r.score for cell, r in zip(cells(result.records), result.records, strict=True)}
    kept = [r for r in done.records if r.status == "ok"]
    for r in done.records:
        if r.status == "ok":
            assert r.score == same[r.method, r.budget, r.task, r.length]
        else:
            assert (r.status, r.score, r.n) == ("skipped", None, 0)
            assert "stopped" in r.error
    # 4 documents are read, then each configuration answers all questions of the shorter length
    assert len(kept) == {0: 0, 4: 0, 8: 8}[after]
    done.save_json(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["meta"]["interrupted"] is True
    assert "No method finished" in headline(done.to_dict()) or not kept
    render(done.to_dict())
    assert model.config._attn_implementation != "foveal"


def test_an_endless_loss_is_still_a_number(model, tokenizer):
    wild = small("llama", fresh=True)
    wild.lm_head.weight.data *= 1e4
    done = run(wild, tokenizer, methods=[], lengths=[400], tasks=[get_task("perplexity", max_new_tokens=4)])
    assert done.records[0].score > 1e100
    json.dumps(done.to_dict(), allow_nan=False)


# ---------------------------------------------------------------------- what is refused before any work


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": ["h20"]}, r"no method called 'h20': did you mean 'h2o'\?"),
        ({"methods": [3]}, "expected the name of a method or a Method, got 3"),
        ({"methods": ["h2o(bugdet=0.5)"]}, r"no parameter 'bugdet': did you mean 'budget'\?"),
        ({"methods": ["h2o(budget="]}, "cannot read the method"),
        ({"tasks": ["paskey"]}, r"did you mean 'passkey'\?"),
        ({"tasks": []}, "at least one task"),
        ({"tasks": ["needle", get_task("needle", per_context=1)]}, "expected each task once, got needle, needle"),
        ({"budgets": [0]}, "budget = 0: expected a share"),
        ({"budgets": [0.5, 1.5]}, "budget = 1.5: expected a share"),
        ({"budgets": ["abc"]}, "budget = 'abc': expected a share"),
        ({"budgets": [True]}, "budget = True: expected a share"),
        ({"budgets": [float("nan")]}, "budget = nan: expected a share"),
        ({"budgets": []}, "at least one budget"),
        ({"lengths": []}, "at least one task and one length"),
        ({"lengths": [0]}, "lengths = 0: expected a whole number"),
        ({"lengths": ["512"]}, "lengths = '512': expected a whole number"),
        ({"lengths": [100]}, "needs at least 3.. tokens"),
        ({"lengths": [1025]}, "the model has 1,024 positions"),
        ({"samples": 0}, "samples = 0: expected a whole number"),
        ({"samples": 2.5}, "samples = 2.5: expected a whole number"),
        ({"samples": True}, "samples = True: expected a whole number"),
    ],
)
def test_bad_values_are_told_before_any_work(change, said, model, tokenizer, monkeypatch):
    def computed(*args, **kwargs):
        raise AssertionError("the model was run")

    monkeypatch.setattr(type(model), "forward", computed)
    with pytest.raises(InputError, match=said):
        run(model, tokenizer, **change)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tokenizer):
    broken = small("llama", fresh=True)
    broken.model.layers[1].self_attn.v_proj.weight.data[3, 4] = value
    with pytest.raises(InputError, match=r"'model\.layers\.1\.self_attn\.v_proj\.weight' of .* holds NaN or infinite"):
        run(broken, tokenizer)


def test_large_half_precision_weights_are_finite(tokenizer):
    large = small("llama", fresh=True).half()
    large.model.embed_tokens.weight.data.fill_(10.0)  # their sum is beyond float16
    foveal.hub.check_weights(large)


def test_models_that_cannot_be_attached_are_refused(tokenizer):
    with pytest.raises(UnsupportedModel, match="latent"):
        run(small(MLA), tokenizer)


def test_an_attached_model_is_refused(model, tokenizer):
    with foveal.attach(model), pytest.raises(FovealError, match="attached already"):
        run(model, tokenizer)


# ---------------------------------------------------------------------- files


def test_the_file_is_valid_json_and_whole(result, tmp_path, monkeypatch):
    path = tmp_path / "new" / "results.json"
    result.save_json(path)

    def refuse(word):
        raise AssertionError(word)

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read == json.loads(json.dumps(result.to_dict()))
    assert read["meta"]["model_identity"]["layers"] == 3
    assert read["meta"]["interrupted"] is False
    assert set(read["records"][0]) >= FIELDS
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
    before = path.read_text()
    result.meta["seed"] = 1
    try:
        monkeypatch.setattr(
            "pathlib.Path.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(InputError, match=r"cannot write .*results\.json: No space left"):
            result.save_json(path)
    finally:
        result.meta["seed"] = 0
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_a_path_that_cannot_be_written_is_named(result, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot write .*file/results\.json: .*; choose another folder"):
        result.save_json(tmp_path / "file" / "results.json")
    with pytest.raises(InputError, match="cannot write"):
        result.save_json(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# ---------------------------------------------------------------------- how sure a score is


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(5, 5, 0.5655, 1.0), (0, 5, 0.0, 0.4345), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_intervals_are_those_of_the_tables(successes, n, low, high):
    # 81 of 263: Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-4)


def test_peak_memory_sees_what_came_and_went():
    with Memory(torch.device("cpu")) as memory:
        before = resident()
        held = torch.ones(20_000_000)
        for _ in range(10):
            held += 1
        assert held[0] == 11
        del held
    assert before + 60_000_000 < memory.peak < before + 200_000_000
