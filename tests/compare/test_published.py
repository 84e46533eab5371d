"""The committed table of a comparison, and the pages made of it and of the run beside kvpress, say what was measured."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from foveal.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def load(file):
    """A script, which is no part of the package."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare_table = load(ROOT / "benchmarks" / "compare_table.py")
published, written = compare_table.published, compare_table.written
META = {
    "date": "2026-11-22T01:02:03+00:00",
    "command": "foveal compare --methods all",
    "model": "/somewhere/Model",
    "device": "cuda:0",
    "dtype": "bfloat16",
    "hardware": {"cpu": "c", "gpu": "H100"},
    "versions": {"torch": "2.11", "foveal": "0.1.0"},
    "seed": 0,
    "samples": 100,
    "elapsed_s": 3.0,
}


def page():
    return load(DOCS / "keep.py")


def record(method, budget, task, score, gain=None, length=2048, kept=None, **more):
    low, high = (None, None) if gain is None else (gain - 0.03, gain + 0.04)
    return {
        "method": method,
        "params": {} if method == "dense" else {"budget": budget},
        "budget": budget,
        "task": task,
        "kind": "generate",
        "length": length,
        "status": "ok",
        "error": None,
        "n": 100,
        "score": score,
        "gain": gain,
        "gain_low": low,
        "gain_high": high,
        "kv_bytes": int(1000 * (kept or budget)),
        "kv_bytes_dense": 1000,
        "kv_read_share": None,
        "prefill_s": None,
        "decode_tok_s": None,
        "peak_bytes": None,
        **more,
    }


@pytest.fixture
def results():
    speed = {"prefill_s": 0.0123, "decode_tok_s": 250.4, "peak_bytes": 512_000_000}
    records = [
        record("dense", 1.0, "niah", 0.9, **speed),
        record("dense", 1.0, "vt", 0.5),
        record("snapkv", 0.25, "niah", 0.8, -0.1, **speed),
        record("snapkv", 0.25, "vt", 0.5, 0.0),
        record("h2o", 0.25, "niah", 0.78, -0.12, kept=0.4),
        record("h2o", 0.25, "vt", 0.48, -0.02, kept=0.4),
        record("streaming-llm", 0.25, "niah", 0.3, -0.6),
        record("streaming-llm", 0.25, "vt", 0.4, -0.1),
        record("scissorhands", 0.25, "niah", 0.3, -0.6),
        record("scissorhands", 0.25, "vt", 0.41, -0.09),
        record("quest", 0.25, "niah", 0.9, 0.0, kept=1.02, kv_read_share=0.25),
        record("quest", 0.25, "vt", 0.5, 0.0, kept=1.02, kv_read_share=0.27),
        record("duo", 0.25, "niah", 0.5, -0.4, n=40),
        record("duo", 0.25, "vt", None, status="error", error="no gates", n=0),
        record("dense", 1.0, "perplexity", 12.0, kind="nll"),
    ]
    return {"meta": META, "records": records}


def test_rows_are_means_over_whole_cells(results):
    data = json.loads(written(published(results)))
    assert data["meta"] == {k: v for k, v in META.items() if k not in ("elapsed_s", "samples")} | {
        "date": "2026-11-22",
        "model": "Model",
    }
    rows = {r["method"]: r for r in data["rows"]}
    assert len(rows) == len(data["rows"]) == 7
    assert rows["dense"]["score"] == 0.7 and "gain" not in rows["dense"]
    snap = rows["snapkv"]
    half = lambda x: math.hypot(x, x) / 2
    assert (snap["score"], snap["samples"]) == (0.65, 100)
    assert snap["gain"] == pytest.approx([-0.05, -0.05 - half(0.03), -0.05 + half(0.04)], rel=1e-3)
    assert snap["tasks"] == {"niah": [0.8, -0.13, -0.06], "vt": [0.5, -0.03, 0.04]}
    assert (snap["kept"], snap["bytes"], snap["decode_tok_s"]) == (0.25, 250, 250.4)
    assert rows["quest"]["read"] == 0.26
    assert rows["duo"]["missing"] == {"niah": "40 of 100 samples", "vt": "no gates"} and "score" not in rows["duo"]


def test_lengths_that_were_asked_differently_often_stand_in_one_table(results, tmp_path):
    few = [
        record("dense", 1.0, "niah", 0.8, length=1024, n=25),
        record("h2o", 0.25, "niah", 0.7, -0.1, length=1024, n=25),
    ]
    short = {"meta": META | {"samples": 25, "command": "foveal compare --lengths 1024"}, "records": few}
    data = published(results, short)
    assert {r["length"]: r["samples"] for r in data["rows"]} == {2048: 100, 1024: 25}
    assert data["meta"]["command"] == "foveal compare --methods all && foveal compare --lengths 1024"
    text = filled("<!-- results: compare-ruler -->", data, tmp_path)
    assert "### 1,024 tokens\n\nDense: 80.0; 25 questions a task." in text
    with pytest.raises(InputError, match="device cuda:0 and cpu: write two tables"):
        published(results, short | {"meta": short["meta"] | {"device": "cpu"}})


def test_hundreds_of_rows_stay_small(results):
    some = results["records"][2:4]
    results["records"] = [
        r | {"task": f"niah_multikey_{t}", "method": f"method-{m}", "length": n, "score": 1 / 3, "gain": -1 / 7}
        for r in some[:1]
        for m in range(80)
        for n in (1024, 2048, 4096)
        for t in range(11)
    ]
    text = written(published(results))
    assert len(json.loads(text)["rows"]) == 240 and len(text) < 250_000


def filled(mark, data, folder):
    """What a page shows at a mark, with plain spaces."""
    (folder / "compare-ruler-2026-11-22.json").write_text(written(data))
    return page().filled(mark, folder).replace("\u00a0", " ")


def test_the_pages_show_the_table(results, tmp_path):
    text = filled("<!-- results: compare-ruler -->", published(results), tmp_path)
    assert "### 2,048 tokens\n\nDense: 70.0; 100 questions a task." in text
    assert "| `snapkv` | 65.0, -5.0 [-7.1, -2.2] | 25 % |" in text
    assert "| `quest` | 70.0, +0.0 [-2.1, +2.8] | 102 %, 26 % |" in text
    assert "| `duo` |  |  |" in text
    assert "- duo at 25 %, 2,048 tokens, vt: no gates" in text
    assert "| at 25 % | niah | vt |" in text and "| `streaming-llm` | 30 | 40 |" in text
    assert "| `snapkv` | 25 % | 12 | 250 | 512 |" in text
    assert "One H100, torch 2.11, 2026-11-22; `compare-ruler-2026-11-22.json`, `foveal compare --methods all`." in text


def test_tasks_of_one_kind_share_a_column(results, tmp_path):
    scores = {"niah_single_1": 0.96, "vt": 0.072, "niah_single_2": 1.0, "cwe": 0.5}
    results["records"] = [
        record(method, budget, task, score, 0.0)
        for method, budget in (("dense", 1.0), ("h2o", 0.25))
        for task, score in scores.items()
        if (method, task) != ("h2o", "niah_single_2")
    ]
    text = filled("<!-- results: compare-ruler -->", published(results), tmp_path)
    assert "| at 25 % | niah_<wbr>single_<wbr>1 / 2 | vt | cwe |" in text
    assert "| `dense` | 96 / 100 | 7.2 | 50 |" in text and "| `h2o` | 96 / - | 7.2 | 50 |" in text


def test_the_table_is_read(results, tmp_path):
    told = filled("<!-- reading: compare-ruler -->", published(results), tmp_path)
    assert told.startswith(
        "Dense has 70.0 points. Cells are points more or less than dense's at each budget, at 2,048 tokens; "
    )
    assert "their 95 % intervals reach 2.1 to 2.8 points to either side." in told
    frees, reads = told.split("### Methods that keep every key")
    lines = [line for line in frees.splitlines() if line.startswith("| `")]
    # scissorhands is half a point above streaming-llm, which its interval of 2.8 points hides
    assert lines == [
        "| `snapkv` | -5.0 |",
        "| `h2o` | -7.0 |",
        "| `scissorhands` | *-34.5* |",
        "| `streaming-llm` | -35.0 |",
    ]
    assert "Bytes over 1.15 times the budget: `h2o` (40 %) at 25 % of 2,048 tokens." in frees
    assert "| method | 25 % | a step reads, % |" in reads and "| `quest` | **+0.0** | 26 |" in reads
    assert "duo" not in told


def test_lengths_stand_side_by_side_and_one_that_is_missing_is_a_dash(results, tmp_path):
    results["records"] += [
        record("dense", 1.0, "niah", 0.8, length=4096),
        record("snapkv", 0.25, "niah", 0.79, -0.01, length=4096),
        record("snapkv", 0.5, "niah", 0.4, -0.4, length=4096),
    ]
    told = filled("<!-- reading: compare-ruler -->", published(results), tmp_path)
    assert told.startswith("Dense has 70.0 / 80.0 points.") and "at 2,048 / 4,096 tokens" in told
    assert "| method | 50 % | 25 % |" in told
    assert "| `snapkv` | - / -40.0 | -5.0 / **-1.0** |" in told and "| `h2o` | - / - | -7.0 / - |" in told


def test_what_one_sequence_costs_names_who_is_far_from_the_others(results, tmp_path):
    def alone(method, budget, prefill_s, decode_tok_s, peak, kept=None):
        speed = {"prefill_s": prefill_s, "decode_tok_s": decode_tok_s, "peak_bytes": peak * 10**6}
        held = {"kv_bytes": int(1e8 * (kept or budget)), "kv_bytes_dense": 10**8}
        return record(method, budget, "niah", 0.5, **speed) | held

    results["records"] = [
        alone("dense", 1.0, 0.036, 400.0, 480),
        alone("snapkv", 0.5, 0.08, 340.0, 440),
        alone("snapkv", 0.25, 0.07, 342.0, 410),
        alone("h2o", 0.5, 0.09, 310.0, 445, kept=0.52),
        alone("h2o", 0.25, 0.11, 312.0, 415),
        alone("tappa", 0.5, 0.4, 345.0, 439),
        alone("tappa", 0.25, 0.7, 343.0, 416),
        alone("quest", 0.5, 0.04, 300.0, 484, kept=1.02),
        alone("hip", 0.5, 0.05, 18.0, 484, kept=1.02),
        alone("hip", 0.25, 0.05, 21.0, 600, kept=1.02),
        alone("frugal-prompt", 0.25, 0.16, 324.0, 852),
    ]
    for r in results["records"][1:]:
        r |= {"gain": -0.1, "gain_low": -0.2, "gain_high": 0.0}
    told = filled("<!-- reading: compare-ruler -->", published(results), tmp_path)
    assert told.split("### What one sequence costs")[1].split("\n\n")[1:] == [
        "Of 2,048 tokens, alone:",
        "- **Cache**, MB: dense 100, 50 to 52 at 50 %, 25 at 25 %.\n"
        "- **Peak, weights included**, MB: dense 480, methods that free memory 410 to 445, methods that keep every key 484 to 600, "
        "`frugal-prompt` 852.\n"
        "- **Reading**, ms: dense 36, methods that free memory 70 to 160, methods that keep every key 40 to 50, `tappa` 400 to 700.\n"
        "- **Decoding**, tokens a second: dense 400, methods that free memory 310 to 345, methods that keep every key 300, `hip` 18 to 21.",
    ]


def test_the_page_on_kvpress_shows_both_sides(tmp_path):
    score = {"mean": 0.95, "low": 0.9, "high": 0.98, "n": 200}
    row = {
        "method": "snapkv",
        "budget": 0.125,
        "length": 2048,
        "side": "foveal",
        "score": score,
        "over_kvpress": {"mean": 0.02, "low": -0.01, "high": 0.05, "n": 200},
        "bytes_of_dense": 0.13,
        "peak_mb": 400.0,
        "read_s": 0.0304,
        "token_ms": 4.04,
    }
    longer = row | {"length": 4096, "score": score | {"mean": 0.5}}
    other = row | {"side": "kvpress", "over_kvpress": None, "score": score | {"mean": 0.93}, "read_s": None}
    alone = row | {"method": "ada-kv", "over_kvpress": None}
    meta = {
        "date": "2026-11-22",
        "model": "M",
        "dtype": "bfloat16",
        "tasks": ["passkey"],
        "lengths": [2048],
        "samples": 100,
        "timed": {"prompts": 4, "tokens": 64},
        "failed": [["kvpress", "ada-kv", 0.125, "3 of 200 prompts: ValueError"]],
        "hardware": {"cpu": "c", "gpu": "H100"},
        "versions": {
            "foveal": {"foveal": "0.1", "transformers": "5.17", "torch": "2.11"},
            "kvpress": {"kvpress": "0.5.5", "transformers": "5.2"},
        },
    }
    (tmp_path / "kvpress-2026-11-22.json").write_text(json.dumps({"meta": meta, "rows": [row, other, alone, longer]}))
    text = page().filled((DOCS / "kvpress.md").read_text("utf-8"), tmp_path).replace("\u00a0", " ")
    assert (
        "| snapkv | 12.5 % | 95.0 / 93.0 | +2.0 [-1.0, +5.0] | 0.130 / 0.130 | 400 / 400 | 30 / - | 4.0 / 4.0 |" in text
    )
    assert "| ada-kv | 12.5 % | 95.0 / - |  | 0.130 / - |" in text
    assert text.index("### 2,048 tokens") < text.index("| ada-kv |") < text.index("### 4,096 tokens")
    assert "| snapkv | 12.5 % | 50.0 / - |" in text
    assert "- kvpress, ada-kv at 12.5 %: 3 of 200 prompts: ValueError" in text
    assert "kvpress 0.5.5, transformers 5.2." in text and "One H100, torch 2.11" in text
    assert (
        "Foveal's time as a multiple of kvpress's: a token 1.00 to 1.00." in text
    )  # reading was timed by one side alone


def test_seconds_beside_kvpress_are_ratios_within_a_row():
    def timed(method, side, read_s, token_ms):
        return {"method": method, "budget": 0.5, "length": 2048, "side": side, "read_s": read_s, "token_ms": token_ms}

    rows = [timed("a", "foveal", 0.08, 6.0), timed("a", "kvpress", 0.04, 18.0), timed("b", "kvpress", 0.02, 20.0)]
    rows += [timed("b", "foveal", 0.06, 8.0), timed("c", "foveal", 9.0, 9.0)]
    told = page().published._times(rows)
    assert told == "Foveal's time as a multiple of kvpress's: a token 0.33 to 0.40, reading 2.00 to 3.00."
    assert page().published._times(rows[-1:]) == ""


def test_every_mark_of_the_pages_is_known(tmp_path):
    for name in page().PAGES:
        text = page().filled((DOCS / name).read_text("utf-8"), tmp_path)
        assert "<!-- re" not in text and "Not measured yet" in text


def test_the_page_on_tuning_shows_the_answer_its_picture_and_the_finals(tmp_path):
    def tried(budget, score, n, kept):
        return record("snapkv", budget, "prompts", score, score - 0.8, n=n, kept=kept, dense_score=0.8)

    records = [record("dense", 1.0, "prompts", 0.8, n=96), tried(0.2, 0.76, 96, 0.21), tried(0.1, 0.4, 12, 0.11)]
    meta = META | {
        "answer": "Use snapkv.",
        "limits": {"memory": 0.25, "max_drop": 0.02},
        "command": "foveal tune --data p",
    }
    (tmp_path / "tune-2026-11-22.json").write_text(json.dumps({"meta": meta, "records": records}))
    text = page().filled((DOCS / "tune.md").read_text("utf-8"), tmp_path)
    assert "```text\n$ foveal tune --data p\nUse snapkv.\n```" in text
    assert "| `snapkv at 20%` | 95.0 | 91.2 to 100.0 | 21.0 % | 96 |" in text
    assert "| `snapkv at 10%` |" not in text and "1 other candidates left earlier" in text
    dots = [line for line in text.splitlines() if line.startswith("<circle")]
    assert len(dots) == 3 and ["opacity" in d for d in dots] == [False, True, False]
    where = {d.split("<title>")[1].split(":")[0]: float(d.split('cx="')[1].split('"')[0]) for d in dots}
    assert where["snapkv at 10%"] < where["snapkv at 20%"] < where["dense"]
    assert "One H100, torch 2.11, 2026-11-22" in text


def test_a_server_under_load_is_a_row(tmp_path):
    row = {"requests_per_minute": 6.0, "tokens_per_second": 7.5, "errors": {"500": 2}, "conversations_in_cache": 27}
    row |= {"first_token_s": {"p50": 1.2, "p99": 2.0}, "between_chunks_s": None, "resident_bytes": {"flat": False}}
    settings = {
        "clients": 64,
        "lengths": [256, 4096],
        "answer": 128,
        "seconds": 600,
        "warmup": 60,
        "cores": 2,
        "memory": 2.0,
    }
    meta = {"date": "2026-11-22", "versions": {"torch": "2.11"}, "gpu": None, "cpu": "x86_64", "cpu_model": "Fast"}
    servers = {
        "dense": row,
        "transformers-plain": row | {"errors": {}, "resident_bytes": {"flat": True}, "back_to_zero": True},
    }
    result = {"meta": meta, "settings": settings, "servers": servers}
    (tmp_path / "serve-load-cpu-2026-11-22.json").write_text(json.dumps(result), "utf-8")
    made = page().filled("<!-- results: serve-load-cpu -->", tmp_path)
    assert "64 clients, prompts of 256 to 4,096 words" in made and "10 minutes after a warm-up of 60 seconds" in made
    assert "| Foveal, dense | 6 | 7.5 | 1 / 2 | - | 27 | 2 | grows |" in made
    assert "| 0 | flat, back to zero |" in made and "One Fast, torch 2.11" in made
