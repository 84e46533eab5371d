"""Milliseconds of attention: all that a method does in a step is in them, and nothing else is; tables of a CPU begin with them."""

import io
import json
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from comparing import run, small, tasks
from models import tiny
from rich.console import Console
from test_published import META, compare_table, page, record
from test_report import plausible, render

from foveal import attach
from foveal.compare import measure
from foveal.compare.ask import Asker
from foveal.compare.drive import follow
from foveal.compare.journal import Journal, conditions
from foveal.compare.measure import Clock
from foveal.compare.rows import summary_rows
from foveal.compare.table import markdown_table, rich_table
from foveal.method import Method
from foveal.tasks import Sample

TICK = 2.0**-20  # what it takes to look at the watch


class Watch:
    """Time that passes only where a test says so, and a little when it is looked at; sums of such numbers are exact."""

    def __init__(self):
        self.at = 0.0

    def perf_counter(self):
        self.at += TICK
        return self.at

    def takes(self, seconds):
        self.at += seconds


@pytest.fixture
def watch(monkeypatch):
    found = Watch()
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=found.perf_counter))
    return found


WATCH = SimpleNamespace(takes=lambda seconds: None)


@dataclass(frozen=True)
class Slow(Method):
    """Takes its time in each of its hooks, and only in decode."""

    name = "slow-for-a-test"
    begins: float = 0.0
    selects: float = 0.0
    mixes: float = 0.0
    keeps: float = 0.0
    ends: float = 0.0

    def begin(self, pass_):
        WATCH.takes(self.begins * pass_.decode)

    def select(self, step):
        WATCH.takes(self.selects * step.decode)
        return super().select(step)

    def mix(self, step, out):
        WATCH.takes(self.mixes * step.decode)
        return out

    def keep(self, step):
        WATCH.takes(self.keeps * step.decode)

    def end(self, pass_):
        WATCH.takes(self.ends * pass_.decode)


@pytest.fixture
def slow(watch, monkeypatch):
    monkeypatch.setitem(globals(), "WATCH", watch)
    return Slow


def told(model, method, tokens=8):
    """Seconds of each step and of attention in it, as `compare` takes them."""
    ids = [1 + 7 * i % 100 for i in range(30 + tokens)]
    sample = Sample(tuple(ids[:30]), (ids[30],), "", 30, None, 0, 0)
    with torch.no_grad():
        got = Asker(model, None).predict(method, sample, ids[31:])
    assert len(got.steps_s) == len(got.attention_s) == tokens - 1
    return got.steps_s, got.attention_s


def test_of_several_readings_the_median_counts_and_the_last_is_gone_on_with(watch, slow):
    """As on a GPU; one stray tells nothing."""

    class Stray(slow):
        def end(self, pass_):
            WATCH.takes(next(waits) * (not pass_.decode))

    asker, ids = Asker(tiny("llama"), None), list(range(1, 40))
    waits = iter([2.0, 0.5, 0.25, *[0.0] * 99])
    sample = Sample(tuple(ids[:30]), (ids[30],), "", 30, None, 0, 0)
    with torch.no_grad():
        got = asker.predict(Stray(), sample, ids[31:], times=3)
    assert got.prefill_s == pytest.approx(0.5, abs=0.01)
    with torch.no_grad():
        assert got.losses == asker.predict(None, sample, ids[31:]).losses


def test_all_hooks_of_a_step_are_in_it_and_all_layers(watch, slow):
    model = tiny("llama")
    layers = model.config.num_hidden_layers
    assert layers > 1
    _, attention = told(model, None)
    assert set(attention) == {(layers + 1) * TICK}  # begin, and each layer
    plain = attention[0]
    for hook, times in {"begins": 1, "selects": layers, "mixes": layers, "keeps": layers, "ends": 1}.items():
        slower, spent = told(model, slow(**{hook: 5 / 1024}))
        ticks = plain + TICK  # `end` is one more place that is timed
        assert set(spent) == {times * 5 / 1024 + ticks}, hook
        assert {a - b for a, b in zip(slower, spent, strict=True)} == {slower[0] - spent[0]}
        assert slower[0] - spent[0] < 100 * TICK  # nothing of it is in the rest


def test_what_is_not_attention_is_not_in_it(watch, slow):
    model = tiny("llama")
    hooks = []
    for layer in model.model.layers:
        for module, seconds in ((layer.mlp, 3 / 1024), (layer.self_attn.o_proj, 1 / 1024)):
            hooks.append(module.register_forward_hook(lambda *_, seconds=seconds: watch.takes(seconds)))
    steps, attention = told(model, slow(selects=5 / 1024))
    for hook in hooks:  # other tests have the same model
        hook.remove()
    layers = model.config.num_hidden_layers
    assert attention[0] == layers * 5 / 1024 + (layers + 2) * TICK
    assert layers * 9 / 1024 < steps[0] < layers * 9 / 1024 + 100 * TICK


def test_layers_with_a_window_count_too(watch, slow):
    model = tiny("gemma2")
    _, attention = told(model, None)
    assert set(attention) == {(model.config.num_hidden_layers + 1) * TICK}


def test_a_clock_inside_itself_counts_once(watch):
    clock = Clock()
    with clock:
        watch.takes(1.0)
        with clock:
            watch.takes(2.0)
    with pytest.raises(ValueError, match="inside"), clock:
        watch.takes(4.0)
        raise ValueError("inside")
    assert clock.seconds == 7.0 + 2 * TICK


def test_nobody_who_does_not_ask_is_timed(watch):
    model = tiny("llama")
    ids = torch.arange(1, 31)[None]
    with torch.no_grad(), attach(model):
        store = model(ids[:, :20]).past_key_values
        before = watch.at
        _, times, counted = follow(model, store, ids[0, 20:].tolist(), model.device)
    assert counted == [] and watch.at - before == 2 * len(times) * TICK


def test_a_run_tells_medians_and_shares_of_dense(watch, slow, tokenizer):
    model, n = small("llama"), small("llama").config.num_hidden_layers
    plan = {"methods": [slow(selects=7 * TICK)], "lengths": (400, 640), "tasks": tasks(), "samples": 1}
    done = run(model, tokenizer, **plan).to_dict()
    json.dumps(done, allow_nan=False)
    found = {(r["method"], r["task"], r["length"]): r["attention_ms"] for r in done["records"]}
    dense, mine = 1e3 * (n + 1) * TICK, 1e3 * (n + 2 + 7 * n) * TICK
    for task in ("passkey", "needle", "perplexity"):
        assert found["dense", task, 640] == pytest.approx(dense)
        assert found["slow-for-a-test", task, 640] == pytest.approx(mine)
    assert found["dense", "passkey", 400] is None  # only the longest length is timed
    rows = summary_rows(done)
    assert rows[0].attention_share == 1.0
    assert rows[1].attention_share == pytest.approx(mine / dense)
    held = [r["kv_bytes"] for r in done["records"] if r["method"] == "slow-for-a-test" and r["length"] == 640]
    assert rows[1].kv_bytes == sorted(held)[1] > 10_000
    assert any("Attention is its part of a decode step" in note for note in done["meta"]["notes"])


def test_answers_of_an_older_run_go_on_without_it(model, tokenizer, tmp_path):
    path, plan = tmp_path / "a.jsonl", {"methods": ("h2o",), "budgets": (0.5,), "lengths": (400,), "samples": 1}
    first = run(model, tokenizer, journal=path, **plan)
    assert all(r.attention_ms > 0 for r in first.records)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    speeds = [line for line in lines[1:] if line["task"].startswith("speed on")]
    assert len(speeds) == 2
    for line in speeds:
        assert len(line["scores"]) == 4
        line["scores"].pop()
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = run(model, tokenizer, journal=path, **plan)
    assert [r.decode_tok_s for r in again.records] == [r.decode_tok_s for r in first.records]
    assert {r.attention_ms for r in again.records} == {None}
    assert len(Journal(path, conditions(model, tasks(), 0)).answers) == len(lines) - 1  # nothing was asked again
    assert "attn." not in markdown_table(again.to_dict())


# ---------------------------------------------------------------------- where it is shown


def timed():
    """Made-up results of a CPU: dense spends 12 ms, a method that times its budget more than a quarter of it."""
    results = plausible()
    for r in results["records"]:
        if r["length"] == 4096:
            r["attention_ms"] = 12.0 * (0.25 + 0.75 * r["budget"])
    return results


def test_tables_of_a_cpu_begin_with_bytes_and_attention():
    lines = markdown_table(timed()).splitlines()
    assert lines[0].startswith(
        "| method | budget | KV MB and kept | attn. ms of dense | of dense and 95% | passkey ↑ |"
    )
    assert lines[0].endswith("| perplexity ↓ n=8000 | KV read | peak MB | prefill s | decode tok/s |")
    assert lines[2].startswith("| **dense** | **100%** | **189 100%** | **12.0 100%** | **100%** | ")
    assert lines[4].startswith("| h2o | 25% | 47.2 25% | 5.25 44% | ")
    assert "- MB, attention, peak memory, prefill and decode speed at 4,096 tokens." in lines


def test_attention_without_denses_has_no_share():
    results = timed()
    results["records"] = [r for r in results["records"] if r["method"] != "dense"]
    rows = summary_rows(results)
    assert rows[0].attention_ms and all(r.attention_share is None for r in rows)
    assert " 3.90 - |" in markdown_table(results)


def test_tables_without_it_are_as_before_and_those_of_a_gpu_say_why():
    head, why = "| method | budget | of dense and 95% | passkey ↑ |", "on a GPU a decode step is one captured graph"
    results = plausible()
    assert markdown_table(results).startswith(head) and why not in markdown_table(results)
    results["meta"]["device"] = "cuda:0"
    for r in results["records"]:
        r["attention_ms"] = None
    assert markdown_table(results).startswith(head) and why in markdown_table(results)


@pytest.mark.parametrize(("width", "gone"), [(74, "peak MB, prefill s"), (80, "peak MB"), (90, ""), (None, "")])
def test_a_narrow_terminal_loses_spare_columns_and_no_others(width, gone):
    results = timed()
    console = Console(width=width or 200, record=True, file=io.StringIO())
    console.print(rich_table(results, width))
    text = console.export_text()
    words = text.split("Too narrow")[0].split("\nMB, attention")[0].split()
    for column in ("peak", "prefill", "decode", "read"):
        assert (column in words) == (column not in gone)
    assert "1,025" in text or "peak" in gone
    assert "17.3" in text and "tok/s" in text  # dense's in the last column, whole
    assert (f"Too narrow here for {gone}." in text) == bool(gone)


def test_the_page_carries_it():
    text = render(timed())
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    dense, h2o = data["views"]["all"][:2]
    assert (dense["attention_ms"], dense["attention_share"]) == (12.0, 1.0)
    assert h2o["attention_share"] == pytest.approx(0.325) and h2o["kv_bytes"] == 4096 * 4608
    assert {row["attention_ms"] for row in data["views"]["2048"]} == {None}


def test_committed_tables_of_a_cpu_show_it_first_and_those_of_a_gpu_as_before(tmp_path):
    speed = {"prefill_s": 2.5, "decode_tok_s": 12.34, "peak_bytes": 512_000_000}

    def written(meta, **more):
        records = [
            record("dense", 1.0, "niah", 0.9, **speed, **more),
            record("snapkv", 0.25, "niah", 0.8, -0.1, **speed, **{k: v / 4 for k, v in more.items()}),
        ]
        data = compare_table.published({"meta": META | meta, "records": records})
        (tmp_path / "compare-ruler-2026-11-22.json").write_text(compare_table.written(data))
        return data["rows"], page().filled("<!-- results: compare-ruler -->", tmp_path)

    rows, text = written({"device": "cpu", "hardware": {"cpu": "c", "gpu": None}}, attention_ms=12.0)
    assert [r["attention_ms"] for r in rows] == [12.0, 3.0]
    assert "| `dense` |  | 0.0 | 100 % | 12.00 | 100 % | 12.3 | 2,500 | 512 |" in text
    assert "| `snapkv` | 25 % | 0.0 | 25 % | 3.00 | 25 % | 12.3 | 2,500 | 512 |" in text
    assert text.index("### Memory and attention") < text.index("### 2,048 tokens") and "on a GPU" not in text
    rows, text = written({})
    assert all("attention_ms" not in r for r in rows)
    assert "### Speed and memory" in text and "ttention" not in text


def test_a_number_of_the_model_itself_is_whole(model):
    """With the machine's own watch: attention is a part of the step, and not nothing."""
    steps, attention = told(model, None)
    assert all(0 < a < s and math.isfinite(a) for a, s in zip(attention, steps, strict=True))
