"""The journal of a comparison: what was answered is not asked again, by one process or by several."""

import json

import pytest
import torch
from comparing import cells, run, tasks
from models import tiny

from foveal.compare.ask import Asker
from foveal.compare.journal import Answer, Journal, conditions, sample_key
from foveal.errors import InputError
from foveal.tasks import Sample, get_task

ABOUT = {"model": {"weights": "abc"}, "seed": 0}


def sample(index, turn=0):
    return Sample((1,), (2,), "x", 100, None, index, 0, turn)


@pytest.fixture
def asked(monkeypatch):
    """What was asked of a model: (methods, samples) of each piece of work."""
    found, plain = [], Asker.__call__

    def spy(self, work):
        found.append(work)
        return plain(self, work)

    monkeypatch.setattr(Asker, "__call__", spy)
    return found


def told(result):
    numbers = [(r.score, r.gain, r.kv_bytes, r.kv_read_share, r.n, r.status) for r in result.records]
    return list(zip(cells(result.records), numbers, strict=True))


def test_answers_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    first = Journal(path, ABOUT)
    first.add(
        "h2o(budget=0.5)", "t", [(sample(0), Answer([0.5, 1 / 3], (10, 20), 0.25)), (sample(0, 1), Answer([], (3, 4)))]
    )
    first.add("dense", "t", [(sample(7), Answer([1.0], (20, 20), None))])
    again = Journal(path, ABOUT)
    assert again.get("h2o(budget=0.5)", "t", sample(0)) == ([0.5, 1 / 3], [10, 20], 0.25)
    assert again.get("h2o(budget=0.5)", "t", sample(0, 1)).scores == []
    assert again.get("dense", "t", sample(7)).held == [20, 20]
    assert again.get("dense", "t", sample(0)) is again.get("dense", "u", sample(7)) is None
    assert sample_key(sample(4, 2)) == (4, 2)


def test_a_line_that_was_cut_off_is_dropped_and_written_over(tmp_path):
    path = tmp_path / "answers.jsonl"
    Journal(path, ABOUT).add("dense", "t", [(sample(i), Answer([1.0], (1, 1))) for i in range(3)])
    path.write_bytes(path.read_bytes()[:-9])
    cut = Journal(path, ABOUT)
    assert [cut.get("dense", "t", sample(i)) is None for i in range(3)] == [False, False, True]
    cut.add("dense", "t", [(sample(5), Answer([0.0], (1, 1)))])
    assert [json.loads(x).get("sample") for x in path.read_text().splitlines()] == [None, [0, 0], [1, 0], [5, 0]]
    path.write_text('{"format"')  # not even the first line was whole
    with pytest.raises(InputError, match="is not what Foveal wrote"):
        Journal(path, ABOUT)


def test_a_run_that_begins_anew_sets_aside_what_stands_there_and_only_with_its_first_answer(model, tokenizer, tmp_path):
    path, old = tmp_path / "answers.jsonl", tmp_path / "answers.old.jsonl"
    path.write_text("what cost hours\n")
    with pytest.raises(InputError, match="positions"):
        run(model, tokenizer, journal=path, fresh=True, lengths=(100_000,))
    assert path.read_text() == "what cost hours\n" and not old.exists()
    plan = {"methods": ("h2o",), "budgets": (0.5,), "lengths": (640,), "samples": 1, "journal": path}
    first = run(model, tokenizer, **plan, fresh=True)
    assert old.read_text() == "what cost hours\n"
    again = Journal(path, conditions(model, tasks(), 0))
    assert {method.split("(")[0] for method, _, _ in again.answers} == {"dense", "h2o"}
    assert told(run(model, tokenizer, **plan)) == told(first)


@pytest.mark.parametrize("text", ["[]\n", '{"format": "other", "about": {}}\n', "hello\n", '{"about": {}}\n'])
def test_files_of_others_are_refused(text, tmp_path):
    (tmp_path / "a").write_text(text)
    with pytest.raises(InputError, match="is not what Foveal wrote"):
        Journal(tmp_path / "a", ABOUT)


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "a"
    Journal(path, ABOUT).add("dense", "t", [(sample(0), Answer([1.0], (1, 1)))])
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(InputError, match="line 3, KeyError: 'method'"):
        Journal(path, ABOUT)


def test_answers_under_other_conditions_are_refused(tmp_path, model):
    about = conditions(model, tasks(), 0)
    path = tmp_path / "a"
    Journal(path, about).add("dense", "t", [(sample(0), Answer([1.0], (1, 1)))])
    Journal(path, conditions(model, [], 0))
    for other, what in ((conditions(model, [], 1), "seed"), (conditions(tiny("qwen2"), [], 0), "model")):
        with pytest.raises(InputError, match=f"other conditions .*{what}.* differ"):
            Journal(path, other)


def test_answers_on_other_data_are_refused_also_where_the_data_stands_in_a_folder(tmp_path, model):
    row = {"context": "c", "input": "q", "answers": ["a"]}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(row))
    (tmp_path / "dataset2prompt.json").write_text('{"qasper": "{context} {input}"}')
    task = get_task("longbench:qasper", data=tmp_path, prompts=tmp_path)
    path = tmp_path / "a"
    Journal(path, conditions(model, [task], 0)).add("dense", "t", [(sample(0), Answer([1.0], (1, 1)))])
    Journal(path, conditions(model, [task], 0))
    for name, text in (("qasper.jsonl", json.dumps(row | {"input": "p"})), ("dataset2prompt.json", "{}")):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=r"other conditions \(files differ\)"):
            Journal(path, conditions(model, [task], 0))
        (tmp_path / name).write_text(before)


def test_samples_of_every_generated_task_have_keys_of_their_own(tokenizer):
    for name, options in (("needle", {"per_context": 2}), ("multi-turn", {}), ("passkey", {}), ("niah", {})):
        made = get_task(name, **options).samples(tokenizer, 2000, 5)
        assert len({sample_key(s) for s in made}) == len(made)


def test_a_stopped_run_goes_on_and_more_may_be_asked(model, tokenizer, result, asked, tmp_path):
    calls, journal = [], tmp_path / "answers.jsonl"

    def stop(line, share):
        calls.append(line)
        if len(calls) == 14:  # ten pieces of questions, then speeds
            raise KeyboardInterrupt

    assert run(model, tokenizer, journal=journal, progress=stop).meta["interrupted"]
    before = len(asked)
    assert told(run(model, tokenizer, journal=journal)) == told(result)
    again = [type(w).__name__ for w in asked[before:]]
    assert again == ["Unready", "Texts", "Texts"]
    asked.clear()
    assert told(run(model, tokenizer, journal=journal)) == told(result)
    assert [type(w).__name__ for w in asked] == ["Unready"]
    asked.clear()
    more = run(model, tokenizer, journal=journal, samples=3)
    assert {r.n for r in more.records if r.task != "perplexity"} == {3}
    questions = [w for w in asked if type(w).__name__ == "Questions"]
    assert {s.index for w in questions for _, s in w.asked} == {2} and len(questions) == 10
    asked.clear()
    more = run(model, tokenizer, journal=journal, methods=("h2o", "quest", "streaming-llm"), samples=3)
    questions = [w for w in asked if type(w).__name__ == "Questions"]
    assert {r.n for r in more.records if r.task != "perplexity"} == {3}
    assert {m.name for w in questions for m in w.methods} == {"streaming-llm"}
    assert len(questions) == 4 and all(s.length in (640, 800) for w in questions for _, s in w.asked)
    assert all(torch.isfinite(torch.tensor(r.score)) for r in more.records)


def test_methods_and_samples_added_at_once_ask_nothing_twice(model, tokenizer, tmp_path):
    journal, first = tmp_path / "answers.jsonl", {"methods": ("h2o",), "budgets": (0.5,), "lengths": (800,)}
    run(model, tokenizer, journal=journal, **first, samples=4)
    run(model, tokenizer, journal=journal, **first | {"methods": ("h2o", "quest")}, samples=8)
    rows = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    keys = [(row["method"], row["task"], tuple(row["sample"])) for row in rows]
    assert len(set(keys)) == len(keys) == 3 * (2 * 8 + 2 + 1)  # questions, texts, a speed


def test_several_processes_give_the_same(model, tokenizer, result):
    done = run(model, tokenizer, workers=2)
    assert told(done) == told(result)
    assert done.meta["workers"] == {"count": 2, "on": "processes"} and done.meta["machines"][0]["device"] == "cpu"
    assert all(r.prefill_s > 0 for r in done.records if r.length == 800)
