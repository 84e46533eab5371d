"""The tables of the pages on long prompts and on patterns."""

import importlib.util
import json
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
META = {"gpu": "H100", "cpu": "x", "versions": {"torch": "2"}, "date": "2026-01-02"}


@pytest.fixture(scope="module")
def made():
    spec = importlib.util.spec_from_file_location("select_table", DOCS / "select_table.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_markers_become_tables_of_the_newest_results(made, tmp_path):
    page = (DOCS / "select.md").read_text("utf-8")
    empty = made.filled(page, tmp_path)
    assert "<!-- table" in page and "<!-- table" not in empty and empty.count("Not measured yet") == 5
    rows = [
        {"tokens": 32768, "method": "dense", "density": 1.0, "attention_ms": 10.0, "prefill_s": 2.0},
        {"tokens": 32768, "method": "a | b", "density": 0.25, "attention_ms": 4.0, "prefill_s": 1.6, "attention_faster": 2.5,
         "prefill_faster": 1.25, "claim": "3x"},
        {"tokens": 65536, "method": "c", "skipped": "no time"},
    ]  # fmt: skip
    found = [{"tokens": 32768, "flat_ms": 8.0, "two_stages_ms": 4.0, "faster": 2.0, "same_tokens": 0.995, "queries": 9}]
    for day, result in (
        ("01", {"meta": META, "rows": [], "indexers": []}),
        ("02", {"meta": META, "layers": 4, "rows": rows, "indexers": found}),
    ):
        (tmp_path / f"select-h100-2026-01-{day}.json").write_text(json.dumps(result))
    text = made.filled(page, tmp_path)
    assert "| 32k | a \\| b | 25% | 4.0 | 2.50 | 1.60 | 1.25 | 3x |" in text
    assert "| 64k | c | no time |" in text and "| 32k | 8.0 | 4.0 | 2.00 | 99.5% |" in text
    score = {"method": "m", "tokens": 2048, "task": "vt", "score": 0.5, "n": 2, "density": 0.1, "values": [0, 1]}
    quality = {
        "meta": META,
        "model": {"name": "small"},
        "samples": 2,
        "rows": [score, score | {"task": "needle", "score": 1.0}],
    }
    (tmp_path / "select-quality-h100-2026-01-01.json").write_text(json.dumps(quality))
    assert "| `m` | 2,048 | 10% | 0.50 | 1.00 |" in made.filled(page, tmp_path)


def test_claims_say_which_baseline_they_need(made, tmp_path):
    """Dense takes 0.4 of its 1.0 s for attention: a prefill of 0.4 s would be three times as fast if that took 0.6."""
    dense = {"method": "dense, cuDNN", "density": 1.0, "attention_ms": 100.0, "prefill_s": 1.0}
    power = {"method": "power-attention", "density": 0.04, "attention_ms": 5.0, "prefill_s": 0.4}
    power |= {"attention_faster": 20.0, "prefill_faster": 2.5}
    rows = [{"tokens": n, **row} for n in (65536, 131072) for row in (dense, power)]
    rows[1] |= {"attention_faster": 1.0, "prefill_faster": 1.0}  # the shorter text is not the paper's
    rows.append({"tokens": 131072, "method": "flux, sparse layers", "skipped": "no time"})
    found = [{"tokens": n, "queries": 1024, "faster": 3.0, "same_tokens": 0.6} for n in (32768, 65536, 131072)]
    found = [r | {"flat_ms": 3.0, "two_stages_ms": 1.0} for r in found]
    result = {"meta": META, "layers": 4, "rows": rows, "indexers": found}
    (tmp_path / "select-h100-2026-01-01.json").write_text(json.dumps(result))
    text = made.filled("<!-- table: prompt claims -->", tmp_path)
    head = "| `power-attention` at 128k, reads 4% |"
    assert f"{head} attention 20.00x | 21.6x needs dense attention 1.08 times as slow. |" in text
    assert f"{head} prefill 2.50x | 3x needs dense attention 1.50 times as slow." in text
    assert "| Flux: prefill up to 2.8x | `flux, sparse layers`, not measured yet |" in text
    assert (
        "indexer 2x at 32k, over 99 % the same tokens |" in text
        and "3.0x, 60% the same tokens | The speed holds." in text
    )
    assert (
        "indexer 4x at 128k" in text
        and "4x needs the flat indexer 1.33 times as slow." in text
        and "at 64k, over" not in text
    )


def test_claims_of_patterns(made, tmp_path):
    time = lambda ms: {"ms": ms, "least": ms, "largest": ms}
    grid = {"grid": [512, 512], "density": 0.0625, "density, grat, surrounding": 0.009, "dense": time(1000.0)}
    grid |= {"grat, criss-cross": time(100.0), "grat, surrounding": time(20.0)}
    hood = {"shape": [256, 256], "stride": [16, 16], "bound": 10.24, "neighborhood": time(10.0), "dense": time(90.0)}
    bias = {"length": 4096, "factors": time(2.0), "bias as a tensor": time(1.0)}
    result = {"meta": META, "grids": [grid], "neighborhood": [hood], "bias": [bias]}
    (tmp_path / "patterns-h100-2026-01-01.json").write_text(json.dumps(result))
    page = (DOCS / "patterns.md").read_text("utf-8")
    text = made.filled(page, tmp_path)
    assert "512 x 512 tokens, reads 6.2% | 10.00x | 35.8x needs dense attention 3.58 times as slow." in text
    assert "512 x 512 tokens, reads 0.9% | 50.00x | The speed holds." in text
    assert "256 x 256 tokens, reads 9.8% | 9.00x | 9.2x needs dense attention 1.02 times as slow." in text
    assert "4,096 tokens | 0.50x | 1.5x needs its baseline 3.00 times as slow." in text
    assert "<!-- table" in page and "<!-- table" not in text


def test_the_table_of_what_is_found(made, tmp_path):
    row = {"method": "m | k", "tokens": 992, "density": 0.25, "layers": 3, "recall": 0.5, "weight": 0.8, "best": 0.96}
    dense = {"method": "n", "tokens": 992, "density": 1.0, "layers": 0, "recall": None, "weight": None, "best": None}
    result = {"meta": META, "model": {"name": "small"}, "queries": 24, "rows": [row, dense]}
    (tmp_path / "select-recall-cpu-2026-01-01.json").write_text(json.dumps(result))
    text = made.filled("<!-- table: recall -->", tmp_path)
    assert "| `m | k` | 25% | 3 | 50% | 0.800 | 0.960 |" in text and "| `n` | 100% | 0 |  |  |  |" in text
    assert "992 tokens of a prompt, small, H100" in text
