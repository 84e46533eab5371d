"""The tuner: which candidates it tries, what it measures, how it goes on after a stop, and what it answers."""

import json
import math

import pytest
import torch
from models import tiny
from test_tasks import characters

import foveal
from foveal.compare.ask import Asker
from foveal.compare.plan import Config
from foveal.compare.report import render
from foveal.compare.rows import Row, Score, front
from foveal.errors import InputError
from foveal.profile import load_profile
from foveal.spec import written
from foveal.tasks import get_task
from foveal.tune import tune
from foveal.tune.answer import decide
from foveal.tune.prompts import read_prompts
from foveal.tune.search import candidates

METHODS = ["h2o", "streaming-llm", "snapkv"]


@pytest.fixture(scope="module")
def tokenizer():
    return characters(chat_template=None)


@pytest.fixture(scope="module")
def model():
    return tiny("llama", vocab_size=257, max_position_embeddings=1024)


def lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


TEXTS = [f"Chapter {i}. " + "The whale swam on and the ship came after it. " * (3 + i % 3) for i in range(8)]


@pytest.fixture
def prompts(tmp_path):
    return lines(tmp_path / "prompts.jsonl", [{"prompt": text} for text in TEXTS])


def search(model, tokenizer, data, out, **more):
    options = {"names": METHODS, "memory": 0.5, "max_drop": 0.5, "new_tokens": 6, "out": out}
    with torch.no_grad():
        return tune(model, tokenizer, data, **options | more)


# ---------------------------------------------------------------------- prompts


def test_prompts_without_answers_are_scored_against_what_dense_says(model, tokenizer, prompts):
    task = read_prompts(prompts, max_new_tokens=6)
    assert task.kind == "nll"
    samples = task.prepare(model, task.samples(tokenizer, 1024, 8))
    assert sorted(s.index for s in samples) == list(range(8))
    for s in samples[:2]:
        ids = torch.tensor([[*s.context, *s.question]])
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == TEXTS[s.index]
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert list(s.target) == wanted[0, ids.shape[1] :].tolist()[: len(s.target)]
        assert s.target
    assert [s.index for s in task.samples(tokenizer, 1024, 3)] == [s.index for s in samples[:3]]


def test_answers_are_scored_by_the_words_that_are_said(tmp_path, tokenizer):
    data = lines(tmp_path / "a.jsonl", [{"prompt": "Who?", "answer": ["Captain Ahab of Nantucket", "Ishmael"]}])
    task = read_prompts(data)
    (sample,) = task.samples(tokenizer, 1024, 1)
    assert task.score(sample, "It was Ahab, the captain.") == 0.5
    assert task.score(sample, "ishmael!") == 1.0
    assert task.score(sample, "ahab ahab ahab") == 0.25
    assert task.score(sample, "Queequeg") == 0.0


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a b"}, '{"prompt": "c'], "line 2"),
        ([{"prompt": "a b"}, "[1]"], "JSON object on line 2"),
        ([{"prompt": "a b"}, "", {"text": "c"}], '"prompt" on line 3'),
        ([{"prompt": "a b"}, {"prompt": 5}], "line 2 .* got 5"),
        ([{"prompt": "a", "answer": "b"}, {"prompt": "c"}], "line 2 has none"),
        ([{"prompt": "a", "answer": []}], '"answer" on line 1'),
        ([{"prompt": "a", "answer": "the"}], '"answer" on line 1'),
        ([], "empty file"),
    ],
)
def test_bad_lines_are_named(rows, said, tmp_path):
    with pytest.raises(InputError, match=said):
        read_prompts(lines(tmp_path / "bad.jsonl", rows))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*none\.jsonl"):
        read_prompts(tmp_path / "none.jsonl")


def refused(model, monkeypatch):
    def computed(*args, **kwargs):
        raise AssertionError("the model was run")

    monkeypatch.setattr(type(model), "forward", computed)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"memory": 0}, "memory = 0: expected a share"),
        ({"memory": 1.5}, "memory = 1.5: expected a share"),
        ({"memory": float("nan")}, "memory = nan"),
        ({"max_drop": -0.1}, "max_drop = -0.1"),
        ({"max_drop": 1}, "max_drop = 1"),
        ({"names": ["h20"]}, r"did you mean 'h2o'\?"),
        ({"names": ["dense"]}, "at least one method besides dense"),
        ({"samples": 0}, "samples = 0"),
        ({"tasks": ["passkey"]}, "not both"),
        ({"new_tokens": 900}, "prompt on line . of .* has .* tokens; with 900 new ones expected up to 1,024"),
    ],
)
def test_bad_values_are_told_before_any_work(change, said, model, tokenizer, prompts, tmp_path, monkeypatch):
    refused(model, monkeypatch)
    with pytest.raises(InputError, match=said):
        search(model, tokenizer, prompts, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- candidates


def test_every_method_that_lets_keys_go_is_tried_below_the_limit_and_once_beyond():
    found = {written(c.method) for c in candidates(0.25)}
    for name in ("h2o", "snapkv", "duo", "razor"):
        budgets = {c.budget for c in candidates(0.25) if c.name == name}
        assert budgets == {0.125, 0.1875, 0.2375, 0.5}
    assert {"duo(budget=0.2375)", "duo(budget=0.2375, score='induction')"} <= found
    assert not any("quest" in text or "random" in text for text in found)
    assert {c.budget for c in candidates(1.0, ["h2o"])} == {0.5, 0.75, 0.95}
    fixed = candidates(0.25, ["h2o(budget=0.1)|quest(budget=64)"])
    assert [written(c.method) for c in fixed] == ["h2o(budget=0.1) | quest(budget=64)"]


# ---------------------------------------------------------------------- searching


@pytest.fixture(scope="module")
def found(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("found")
    data = lines(folder / "prompts.jsonl", [{"prompt": text} for text in TEXTS])
    shares = []
    result = search(model, tokenizer, data, folder / "out", progress=lambda line, share: shares.append(share))
    return result, shares, folder


def test_candidates_are_halved_while_samples_double(found):
    result, shares, _ = found
    n = {}
    for r in result.comparison.records:
        n[r.method, r.budget] = r.n
    assert len(n) == 1 + 3 * 3  # at 0.5 a budget beyond the limit would be the whole cache
    assert n["dense", 1.0] == 8
    assert sorted(n.values()) == [3] * 4 + [6] + [8] * 5
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_scores_are_those_of_teacher_forcing_dense_words(found, model, tokenizer):
    result, _, folder = found
    task = read_prompts(folder / "prompts.jsonl", max_new_tokens=6)
    samples = task.prepare(model, task.samples(tokenizer, 1024, 8))
    chosen = next(r for r in result.comparison.records if r.n == 8 and r.method == "h2o")
    means = []
    for s in samples:
        with torch.no_grad(), foveal.attach(model, foveal.get_method("h2o", **chosen.params)):
            store = model(torch.tensor([s.context])).past_key_values
            rows = [
                model(torch.tensor([[t]]), past_key_values=store).logits[0, -1].log_softmax(-1)
                for t in (*s.question, *s.target[:-1])
            ]
        means.append(-sum(row[t].item() for row, t in zip(rows, s.target, strict=True)) / len(s.target))
    assert chosen.score == pytest.approx(math.exp(sum(means) / 8), rel=1e-4)
    assert chosen.gain == pytest.approx(math.log(chosen.score / chosen.dense_score))


def test_the_answer_meets_both_limits_and_becomes_a_profile(found, model):
    result, _, folder = found
    row = result.row
    assert row.kv_share <= 0.5
    assert row.quality >= 0.5
    assert result.sentence.startswith(f"Use {written(result.config.method)}: it keeps ")
    assert "times its speed" in result.sentence
    profile = load_profile(result.profile.save(folder / "foveal.toml"))
    assert profile.method == result.config.method
    assert profile.evidence["samples"] == 8
    assert profile.evidence["of_dense"] == pytest.approx(row.quality)
    page = render(result.comparison.to_dict())
    assert '"limits":{"memory":0.5,"max_drop":0.5}' in page
    assert '"front":true' in page
    assert result.sentence.split(":")[0] in page
    with profile.attach(model) as session:
        assert session.method == profile.method


def test_the_same_call_asks_nothing_again(found, model, tokenizer, monkeypatch):
    result, _, folder = found
    asked = []
    told = Asker._told
    spy = lambda self, method, work: told(self, method, work) if work.alone else asked.append(work)  # speeds are new
    monkeypatch.setattr(Asker, "_told", spy)
    again = search(model, tokenizer, folder / "prompts.jsonl", folder / "out")
    assert not asked
    assert again.config.method == result.config.method
    assert [r.score for r in again.comparison.records] == [r.score for r in result.comparison.records]


def test_a_stopped_search_goes_on_where_it_was(found, model, tokenizer, prompts, tmp_path):
    result, _, _ = found
    steps = []

    def stop(line, share):
        steps.append(line)
        if len(steps) == 25:
            raise KeyboardInterrupt

    halted = search(model, tokenizer, prompts, tmp_path / "out", progress=stop)
    assert halted.interrupted
    assert halted.config is halted.profile is None
    first = list(steps)
    rest = search(model, tokenizer, prompts, tmp_path / "out", progress=lambda line, share: steps.append(line))
    done = set(first[:-1])
    assert not done & set(steps[25:])
    assert rest.config.method == result.config.method
    same = {(r.method, r.budget): r.score for r in result.comparison.records}
    assert {(r.method, r.budget): r.score for r in rest.comparison.records} == pytest.approx(same)


def test_another_search_in_the_same_folder_is_refused(found, model, tokenizer, tmp_path):
    _, _, folder = found
    other = lines(tmp_path / "prompts.jsonl", [{"prompt": text + "!"} for text in TEXTS])
    kept = (folder / "out" / "answers.jsonl").read_text()
    with pytest.raises(InputError, match=r"holds answers under other conditions \(files, tasks differ\)"):
        search(model, tokenizer, other, folder / "out")
    with pytest.raises(InputError, match="seed differ"):
        search(model, tokenizer, folder / "prompts.jsonl", folder / "out", seed=1)
    assert (folder / "out" / "answers.jsonl").read_text() == kept
    (tmp_path / "answers.jsonl").write_text('{"format": \n')
    with pytest.raises(InputError, match="is not what Foveal wrote"):
        search(model, tokenizer, folder / "prompts.jsonl", tmp_path)


def test_generated_tasks_are_searched_too_and_failures_are_told(model, tokenizer, tmp_path):
    tasks = [get_task("perplexity", max_new_tokens=4)]
    result = search(model, tokenizer, None, tmp_path, tasks=tasks, length=300, samples=2, names=["h2o", "moa"])
    broken = [r for r in result.comparison.records if r.method == "moa"]
    assert {r.status for r in broken} == {"error"}
    assert "profile" in broken[0].error
    assert result.config.name == "h2o"


def test_a_dense_model_that_answers_nothing_right_stops_the_search(model, tokenizer, tmp_path):
    data = lines(tmp_path / "p.jsonl", [{"prompt": t, "answer": "zzyzx"} for t in TEXTS])
    with pytest.raises(InputError, match="dense model scores nothing on 8 samples of 'prompts'"):
        search(model, tokenizer, data, tmp_path / "out")


def test_dense_is_asked_more_until_it_answers_something_and_the_candidates_start_there(
    model, tokenizer, tmp_path, monkeypatch
):
    data = lines(tmp_path / "p.jsonl", [{"prompt": t, "answer": "zzyzx"} for t in TEXTS])
    asked = []
    monkeypatch.setattr(Asker, "_told", None)  # prompts with answers are not gone on with before the end
    ask = Asker.ask
    monkeypatch.setattr(Asker, "ask", lambda self, method, *more: asked.append(method) or ask(self, method, *more))
    with pytest.raises(InputError, match="scores nothing on 8 samples"):
        search(model, tokenizer, data, tmp_path / "out")
    assert set(asked) == {None}  # no candidate is asked what dense cannot do

    fifth = read_prompts(data).samples(tokenizer, 1024, 8)[4].index
    right = lambda self, sample, answer: float(sample.index == fifth)
    monkeypatch.undo()
    monkeypatch.setattr("foveal.tune.prompts.Answered.score", right)
    found = search(model, tokenizer, data, tmp_path / "other")
    counts = [r.n for r in found.comparison.records]
    assert min(counts) == 6 and max(counts) == 8  # three samples more, then all


def test_prompts_of_two_tokens_have_a_pace_too_and_those_of_one_are_named(model, tokenizer, tmp_path):
    bare = characters(chat_template=None)
    bare.bos_token = None
    two = lines(tmp_path / "two.jsonl", [{"prompt": "ab"}])
    found = search(model, bare, two, tmp_path / "out", plain=True, names=["streaming-llm"], memory=1.0)
    assert found.comparison.records[0].decode_tok_s > 0
    one = lines(tmp_path / "one.jsonl", [{"prompt": "ab"}, {"prompt": "a"}])
    with pytest.raises(InputError, match=r"line 2 of .* has 1 tokens, expected at least 2"):
        search(model, bare, one, tmp_path / "other", plain=True)


# ---------------------------------------------------------------------- deciding


def row(quality, share, low=None, high=None, n=24):
    score = Score(quality, None, None, n, "higher")
    return Row("h2o", "", "", {}, 0.2, False, {"t": score}, quality, low, high, share)


def decided(numbers, memory=0.25, drop=0.02):
    from foveal.compare.records import Comparison

    configs = [
        Config("h2o", foveal.get_method("h2o", budget=0.01 * (i + 1)), 0.01 * (i + 1)) for i in range(len(numbers))
    ]
    rows = {c: row(*args) for c, args in zip(configs, numbers, strict=True)}
    order = sorted(configs, key=lambda c: (rows[c].kv_share > memory, -rows[c].quality))
    result = decide(Comparison({}, []), rows, order, memory, drop, {})
    return result, configs


def test_the_best_within_both_limits_is_chosen_and_said_to_be_sure_or_not():
    result, configs = decided([(0.97, 0.1), (0.99, 0.24, 0.985, 0.995), (1.0, 0.26), (0.9899, 0.23, 0.97, 1.0)])
    assert result.config is configs[3]  # a ten-thousandth worse, with fewer bytes
    assert "not sure" in result.sentence
    result, configs = decided([(0.97, 0.1), (0.99, 0.24, 0.985, 0.995)])
    assert result.config is configs[1]
    assert "whole 95% interval is within the limit" in result.sentence
    assert "99.0% (95%: 98.5% to 99.5%, n=24) of dense in 24% of its cache" in result.sentence


def test_where_nothing_meets_the_limits_the_nearest_is_shown():
    result, _ = decided([(0.9, 0.24), (0.8, 0.12), (0.99, 0.5, None, None, 3)])
    assert result.config is None
    assert result.sentence == (
        "Nothing tried keeps 98% of dense in 25% of the cache; nearest is h2o(budget=0.01), which keeps 90.0% (n=24) in 24%. "
        "The least memory that kept enough was 50%, by h2o(budget=0.03) (n=3)."
    )
    assert "No candidate kept enough with more memory" in decided([(0.9, 0.24)])[0].sentence


def test_limits_are_said_as_they_were_given():
    result, _ = decided([(0.9, 0.1251)], memory=0.125, drop=0.005)
    assert result.sentence.startswith("Nothing tried keeps 99.5% of dense in 12.5% of the cache; ")
    assert "in 12.5% (more than asked for)" in result.sentence


def test_the_front_holds_what_nothing_beats():
    rows = [row(0.9, 0.3), row(0.8, 0.2), row(0.7, 0.25), row(0.9, 0.4), row(1.0, 1.0), row(None, 0.1)]
    assert [(r.kv_share, r.quality) for r in front(rows)] == [(0.2, 0.8), (0.3, 0.9), (1.0, 1.0)]
