"""The committed table of a comparison, and the pages made of it and of the run beside kvpress, say what was measured."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

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
    assert data["meta"] == {k: v for k, v in META.items() if k != "elapsed_s"} | {
        "date": "2026-11-22",
        "model": "Model",
    }
    rows = {r["method"]: r for r in data["rows"]}
    assert len(rows) == len(data["rows"]) == 7
    assert rows["dense"]["score"] == 0.7 and "gain" not in rows["dense"]
    snap = rows["snapkv"]
    half = lambda x: math.hypot(x, x) / 2
    assert snap["score"] == 0.65
    assert snap["gain"] == pytest.approx([-0.05, -0.05 - half(0.03), -0.05 + half(0.04)], rel=1e-3)
    assert snap["tasks"] == {"niah": [0.8, -0.13, -0.06], "vt": [0.5, -0.03, 0.04]}
    assert (snap["kept"], snap["bytes"], snap["decode_tok_s"]) == (0.25, 250, 250.4)
    assert rows["quest"]["read"] == 0.26
    assert rows["duo"]["missing"] == {"niah": "40 of 100 samples", "vt": "no gates"} and "score" not in rows["duo"]


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


def test_the_pages_show_the_table_and_read_it(results, tmp_path):
    (tmp_path / "compare-ruler-2026-11-22.json").write_text(written(published(results)))
    text = page().filled("<!-- results: compare-ruler -->", tmp_path)
    assert "### 2,048 tokens\n\nDense: 70.0." in text
    assert "| `snapkv` | 65.0 | -5.0 [-7.1, -2.2] | 25 % |" in text
    assert "| `quest` | 70.0 | +0.0 [-2.1, +2.8] | 102 %, 26 % |" in text
    assert "| `duo` |  |  |  |" in text
    assert "- duo at 25 %, 2,048 tokens, vt: no gates" in text
    assert "| `streaming-llm` | 30.0 | 40.0 |" in text
    assert "| `snapkv` | 25 % | 12 | 250 | 512 |" in text
    assert "One H100, torch 2.11, 2026-11-22; `compare-ruler-2026-11-22.json`, `foveal compare --methods all`." in text
    told = page().filled("<!-- reading: compare-ruler -->", tmp_path)
    assert told.startswith(
        "**2,048 tokens**\n\n- At 25 %: not told from dense: `quest`; of those that free memory `snapkv` "
    )
    assert "leads with 65.0 (-5.0 [-7.1, -2.2]), too close to call with `h2o`" in told
    assert "`streaming-llm`, which looks at nothing, has 35.0, and these are not above it: `scissorhands`" in told
    assert told.endswith("more bytes than the budget says: `h2o` (40 %).")
    assert "duo" not in told


def test_the_page_on_kvpress_shows_both_sides(tmp_path):
    score = {"mean": 0.95, "low": 0.9, "high": 0.98, "n": 200}
    row = {
        "method": "snapkv",
        "budget": 0.125,
        "side": "foveal",
        "score": score,
        "over_kvpress": {"mean": 0.02, "low": -0.01, "high": 0.05, "n": 200},
        "bytes_of_dense": 0.13,
        "peak_mb": 400.0,
        "read_s": 0.0304,
        "token_ms": 4.04,
    }
    other = row | {"side": "kvpress", "over_kvpress": None, "score": score | {"mean": 0.93}, "read_s": None}
    alone = row | {"method": "ada-kv", "over_kvpress": None}
    meta = {
        "date": "2026-11-22",
        "model": "M",
        "dtype": "bfloat16",
        "tasks": ["passkey"],
        "length": 2048,
        "samples": 100,
        "answer_tokens": 32,
        "timed": {"prompts": 4, "tokens": 64},
        "failed": [["kvpress", "ada-kv", 0.125, "3 of 200 prompts: ValueError"]],
        "hardware": {"cpu": "c", "gpu": "H100"},
        "versions": {
            "foveal": {"foveal": "0.1", "transformers": "5.17", "torch": "2.11"},
            "kvpress": {"kvpress": "0.5.5", "transformers": "5.2"},
        },
    }
    (tmp_path / "kvpress-2026-11-22.json").write_text(json.dumps({"meta": meta, "rows": [row, other, alone]}))
    text = page().filled((DOCS / "kvpress.md").read_text("utf-8"), tmp_path)
    assert (
        "| snapkv | 12.5 % | 95.0 / 93.0 | +2.0 [-1.0, +5.0] | 0.130 / 0.130 | 400 / 400 | 30 / - | 4.0 / 4.0 |" in text
    )
    assert "| ada-kv | 12.5 % | 95.0 / - |  | 0.130 / - |" in text
    assert "- kvpress, ada-kv at 12.5 %: 3 of 200 prompts: ValueError" in text
    assert "kvpress 0.5.5, transformers 5.2." in text and "One H100, torch 2.11" in text


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
