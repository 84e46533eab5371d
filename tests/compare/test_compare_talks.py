"""Conversations, grids and pairs in a comparison."""

import math
import random
from dataclasses import dataclass, replace

import pytest
import torch
from comparing import VOCAB, run, small
from models import tiny

import foveal
from foveal.compare import Comparison, Record
from foveal.compare.ask import Asker
from foveal.compare.drive import answer
from foveal.compare.records import filled
from foveal.compare.rows import summary_rows
from foveal.errors import InputError
from foveal.spec import parse_task, split
from foveal.stats import paired_bootstrap
from foveal.tasks import Sample, get_task
from foveal.tasks.multi_turn import MultiTurn


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
