"""The tables of the page on keeping say what the results say."""

import importlib.util
import json
import math
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
META = {
    "gpu": "H100",
    "cpu": "x",
    "versions": {"torch": "2.11"},
    "date": "2026-11-22",
    "command": "python -m benchmarks.keep",
}


def page():
    spec = importlib.util.spec_from_file_location("keep_page", DOCS / "keep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables(tmp_path):
    rows = [
        {"method": "window read anew, 1024 tokens", "tokens": 1024, "decode_ms": 80.0},
        {"method": "dense", "tokens": 32768, "decode_ms": 12.0, "reading_s": 2.0},
        {
            "method": "duo()",
            "tokens": 32768,
            "decode_ms": 8.0,
            "decode_speedup": 1.5,
            "of_dense_bytes": 0.52,
            "reading_of_dense": 0.8,
        },
        {"method": "razor()", "tokens": 32768, "decode_ms": 7.0, "decode_speedup": 1.71, "of_dense_bytes": 0.3},
        {
            "method": "streaming-llm(budget=1024)",
            "tokens": 32768,
            "decode_ms": 10.0,
            "decode_speedup": 1.2,
            "of_dense_bytes": 0.03,
        },
        {"method": "h2o(budget=0.2)", "tokens": 32768, "error": "not reached in the time given"},
    ]
    (tmp_path / "keep-h100-2026-11-22.json").write_text(json.dumps({"meta": META, "rows": rows}))
    points = [{"tokens": t, "nats": n, "bytes": 7000, "keys": 9} for t, n in ((10, 2.0), (20, 30.0), (30, 2.5))]
    stream = {"reads": "window", "points": points, "tokens_per_s": 9.6}
    stream = {"meta": META, "settings": {"tokens_of_the_novel": 5, "chunk": 2}, "rows": [stream]}
    (tmp_path / "stream-h100-2026-11-22.json").write_text(json.dumps(stream))
    text = page().filled((DOCS / "keep.md").read_text("utf-8"), tmp_path)
    assert "| `dense` | 12.00 | 1.00 | 1.000 | 1.00 |" in text
    assert "| `duo()` | 8.00 | 1.50 | 0.520 | 0.80 |" in text
    assert "| `h2o(budget=0.2)` | not reached in the time given |  |  |  |" in text
    assert "| `duo()` | cache, smaller | 1.67x, half of the heads whole | 1.9x |" in text
    assert (
        "| `duo()` | a step, faster | 1.50x | 1.50x |" in text
        and "| `duo()` | prompt, faster | 1.63x | 1.25x |" in text
    )
    assert "| `razor()` | cache, less by | over 70 % | 70% |" in text
    assert (
        "| `streaming-llm(budget=1024)` | a token, faster | up to 22.2x than reading the window anew | 8.0x |" in text
    )
    assert (
        "| `streaming-llm(budget=4096)` | a token, faster | up to 22.2x than reading the window anew | not measured |"
        in text
    )
    assert "| `h2o(budget=0.2)` | cache, smaller | 5x | not measured |" in text
    assert "At 32,768 tokens a step over 3.0% of the cache takes 10.0 ms where dense takes 12.0, 1.20x." in text
    assert "Window read anew, 1024 tokens: 80.0 ms a token." in text
    assert f"| window | 30 | {math.exp(2):.2f} | {math.exp(2.5):.2f} | e^30 | 7,000 | 10 |" in text
    assert text.count("One H100") == 2 and "<!-- results" not in text


def test_without_results_it_says_how_to_get_them(tmp_path):
    assert (
        page()
        .filled("<!-- results: keep-h100 -->", tmp_path)
        .startswith("Not measured yet: `python -m benchmarks.keep`")
    )
