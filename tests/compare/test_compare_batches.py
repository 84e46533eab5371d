"""How a comparison is cut into pieces: batches by device, halves where memory runs out, whole slices first, samples by workers."""

from itertools import groupby

import pytest
import torch
from comparing import run, small, tasks

import foveal
from foveal.compare.ask import MOST, TOGETHER, TOKENS, Answers, Asker, Failed, Questions, Unmade, chunks, together
from foveal.compare.plan import configurations
from foveal.compare.run import ABREAST, _Run
from foveal.tasks import get_task

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def asked(tokenizer):
    task = get_task("needle", per_context=2, max_new_tokens=5)
    return tuple((task, s) for s in task.samples(tokenizer, 900, 8))


def test_a_gpu_answers_as_many_questions_at_once_as_memory_allows(asked):
    assert [together(CPU, n) for n in (100, 100_000)] == [TOGETHER, TOGETHER]
    assert [together(CUDA, n) for n in (100, 4000, 10 * TOKENS)] == [MOST, TOKENS // 4000, 1]
    long = [(t, type(s)(**{**vars(s), "length": TOKENS // 3})) for t, s in asked]
    assert [len(c) for c in chunks(long, CUDA)] == [4, 4]  # three, and the second question on the document of the third
    assert [len(c) for c in chunks(long, CPU)] == [8]


class Short(Asker):
    """Has memory for questions on `most` documents at a time."""

    def __init__(self, *args, most):
        super().__init__(*args)
        self.most, self.tried = most, []

    def ask(self, method, chunk, readings):
        documents = len({s.context for _, s in chunk})
        self.tried.append(documents)
        if documents > self.most:
            raise torch.OutOfMemoryError("no memory")
        return super().ask(method, chunk, readings)


@pytest.mark.parametrize("name", ["h2o", "streaming-llm"])
def test_where_memory_runs_out_half_the_questions_are_asked_at_a_time(name, asked, tokenizer):
    model, methods = small("llama"), (None, foveal.get_method(name, budget=0.5))
    wanted = Asker(model, tokenizer)(Questions(methods, asked))
    asker = Short(model, tokenizer, most=1)
    got = asker(Questions(methods, asked))
    assert [(a.scores, a.reads, a.held) for a in got] == [(a.scores, a.reads, a.held) for a in wanted]
    assert len(got[1].scores) == 8 and len(got[1].held) == 4
    assert asker.tried == [4, 2, *[1] * 8]  # two failures; then four documents for two methods
    asker.tried.clear()
    asker(Questions(methods, asked))
    assert asker.tried == [1] * 8  # it has learnt
    nothing = Short(model, tokenizer, most=0)(Questions(methods, asked))
    assert all(isinstance(x, Failed) and "out of memory" in x.why for x in nothing)


def test_a_shared_reading_for_which_memory_is_short_is_made_of_fewer_texts(asked, tokenizer, monkeypatch):
    model, methods = small("llama"), (None, foveal.get_method("h2o", budget=0.5))
    wanted = Asker(model, tokenizer)(Questions(methods, asked))
    calls, plain = [], Asker.read

    def once(self, document, wanted_by):
        calls.append(document)
        if len(calls) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return plain(self, document, wanted_by)

    monkeypatch.setattr(Asker, "read", once)
    got = Asker(model, tokenizer)(Questions(methods, asked))
    assert [a.scores for a in got] == [a.scores for a in wanted] and len(calls) == 2 + 4


def test_one_question_on_a_document_takes_its_cache_and_leaves_the_others(tokenizer, monkeypatch):
    task = get_task("passkey", max_new_tokens=4)
    samples = task.samples(tokenizer, 400, 3)
    pairs = [(task, s) for s in (*samples, samples[0])]
    forks, plain = [], foveal.Store.fork
    monkeypatch.setattr(foveal.Store, "fork", lambda self: forks.append(1) or plain(self))
    model = small("llama")
    with torch.no_grad():
        got = Asker(model, tokenizer).ask(None, pairs, {})
    assert isinstance(got, Answers) and len(forks) == 2  # only for the document that is asked about twice
    monkeypatch.undo()
    with torch.no_grad():
        assert got.scores[3] == got.scores[0] == Asker(model, tokenizer).ask(None, pairs[:1], {}).scores[0]


def plan(model, tokenizer, size, **more):
    """The pieces of a run for `size` workers: (titles, length, tasks)."""
    options = {
        "lengths": [800, 640],
        "samples": 2,
        "budgets": [0.25, 0.5],
        "methods": ["quest", "h2o", "streaming-llm"],
    }
    options |= more
    configs = configurations(options["methods"], options["budgets"])
    journal = type("Nothing", (), {"get": lambda *_: None})()
    made = _Run(
        *(model, tokenizer, configs, tasks()[:2], options["lengths"], options["samples"], 0, None, "", journal),
        *(None, None),
    )
    return [
        ([c.title for c in some], chunk[0][1].length, {t.name for t, _ in chunk})
        for some, chunk, _ in made._questions(size)
    ]


def test_several_workers_finish_a_length_and_a_budget_before_the_next(model, tokenizer):
    pieces = plan(model, tokenizer, 2)
    order = [(length, title.partition(" at ")[2]) for titles, length, _ in pieces for title in titles]
    assert [slice_ for slice_, _ in groupby(order)] == [(n, b) for n in (800, 640) for b in ("", "0.25", "0.5")]
    assert all(len(titles) == 1 for titles, *_ in pieces)
    methods = [title.partition(" at ")[0] for titles, *_ in pieces for title in titles]
    assert methods[1:4] == ["quest", "h2o", "streaming-llm"]  # who reads like dense stands before who does not


def test_pieces_for_several_workers_stay_small(model, tokenizer):
    pieces = plan(model, tokenizer, 2, samples=60, lengths=[1000], budgets=[x / 20 for x in range(1, 20)])
    assert max(len(titles) for titles, *_ in pieces) <= ABREAST
    assert sum(len(titles) for titles, *_ in pieces) == (1 + 3 * 19) * 12


def test_one_worker_asks_everyone_before_it_reads_the_next_texts(model, tokenizer):
    pieces = plan(model, tokenizer, 1)
    assert [length for _, length, _ in pieces] == [800] * 7 + [640] * 7
    assert [titles[0] for titles, *_ in pieces[:3]] == ["dense", "quest at 0.25", "quest at 0.5"]


def test_samples_made_by_a_worker_are_those_of_the_task(model, tokenizer):
    task = get_task("needle", per_context=2)
    assert Asker(model, tokenizer)(Unmade(task, 900, 5, 3, 1024)) == task.samples(tokenizer, 900, 5, 3, positions=1024)


def test_speeds_are_measured_at_once_only_by_workers_with_a_gpu_each(model, tokenizer, monkeypatch):
    def at_once(device, size, gpus, ray=None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        one = object.__new__(_Run)
        one.ray, one.model = ray, type("M", (), {"device": torch.device(device)})
        return one._undisturbed(type("Hands", (), {"size": size}))

    assert at_once("cuda", 4, 4) == at_once("cuda:0", 4, 4) == 4
    assert at_once("cuda", 3, 4) == 3
    assert (
        at_once("cuda", 5, 4) == at_once("cuda:1", 4, 4) == at_once("cpu", 4, 4) == at_once("cuda", 4, 4, "auto") == 1
    )


def test_what_is_known_of_speeds_stands_in_a_table_that_was_stopped(model, tokenizer, tmp_path):
    more = {"journal": tmp_path / "answers.jsonl", "tasks": tasks()[:1], "methods": ["h2o"], "lengths": [400]}
    first = run(model, tokenizer, samples=1, **more)

    def stop(line, share):
        raise KeyboardInterrupt

    again = run(model, tokenizer, samples=3, progress=stop, **more)
    assert again.meta["interrupted"] and [r.n for r in again.records] == [1, 1, 1]
    pace = lambda done: [(r.prefill_s, r.decode_tok_s, r.peak_bytes) for r in done.records]
    assert pace(again) == pace(first) and all(x > 0 for row in pace(first) for x in row)
