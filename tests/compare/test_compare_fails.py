"""A comparison survives what fails, and says it."""

import json
from dataclasses import dataclass

import pytest
import torch
from comparing import cells, run, small, tasks

from foveal.compare.measure import out_of_memory
from foveal.compare.report import headline, render
from foveal.compare.table import markdown_table
from foveal.method import Method
from foveal.tasks import get_task


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
    # five configurations answer all questions, of two tasks, of the shorter length and then of the longer
    assert len(kept) == 2 * after
    done.save_json(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["meta"]["interrupted"] is True
    told = headline(done.to_dict())  # a model of random weights may answer nothing
    assert not kept or "No method finished" in told or "scores nothing" in told
    render(done.to_dict())
    assert model.config._attn_implementation != "foveal"


def test_an_endless_loss_is_still_a_number(model, tokenizer):
    wild = small("llama", fresh=True)
    wild.lm_head.weight.data *= 1e4
    done = run(wild, tokenizer, methods=[], lengths=[400], tasks=[get_task("perplexity", max_new_tokens=4)])
    assert done.records[0].score > 1e100
    json.dumps(done.to_dict(), allow_nan=False)
