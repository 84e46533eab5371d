"""The table and the page of a comparison, on made-up results."""

import html
import io
import json
import math
import random
import re
import stat
from html.parser import HTMLParser

import pytest
from rich.console import Console

from foveal.compare.report import headline, render, write_report
from foveal.compare.rows import summary_rows
from foveal.compare.table import markdown_table, rich_table
from foveal.compare.words import percent
from foveal.errors import InputError
from foveal.webpage import inert

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
# method -> (what it keeps of dense's score at half, a quarter and a tenth of the cache, share of decode speed gained)
QUALITY = {
    "h2o": (0.93, 0.8, 0.45),
    "snapkv": (1.0, 0.97, 0.8),
    "streaming_llm": (0.6, 0.35, 0.2),
    "pyramidkv": (1.0, 0.96, 0.85),
    "tova": (0.95, 0.84, 0.5),
    "quest": (1.0, 1.0, 0.93),
}


def wilson(score, n):
    centre, half = score + 1.92 / n, 1.96 * math.sqrt(score * (1 - score) / n + 0.96 / n**2)
    return max(0.0, (centre - half) / (1 + 3.84 / n)), min(1.0, (centre + half) / (1 + 3.84 / n))


def record(method, budget, task, length, score, low, high, n, *, rng=None, **more):
    """One record; memory and speed follow from the budget."""
    dense_bytes = length * 46080
    kept = 1.0 if method in ("dense", "quest") else budget
    jitter = rng.uniform(0.96, 1.04) if rng else 1.0
    return {
        "method": method,
        "params": {} if method == "dense" else {"budget": budget, "window": 32},
        "task": task,
        "length": length,
        "budget": budget,
        "score": score,
        "score_low": low,
        "score_high": high,
        "better": "lower" if task == "perplexity" else "higher",
        "n": n,
        "kv_bytes": int(dense_bytes * kept),
        "kv_bytes_dense": dense_bytes,
        "peak_bytes": int(6.1e8 + dense_bytes * (1.2 + kept)),
        "prefill_s": length * 0.0023 * jitter,
        "decode_tok_s": 17.5 * (1 + 0.55 * (1 - budget) * (0.4 if method == "quest" else 1)) * jitter,
        "status": "ok",
        "error": None,
        **more,
    }


def plausible(interrupted=True):
    """Seven methods, three budgets, three tasks, two lengths; one cell failed."""
    rng, records = random.Random(0), []
    plan = [("dense", 1.0, 1.0)]
    plan += [(m, b, q) for m, kept in QUALITY.items() for b, q in zip((0.5, 0.25, 0.1), kept, strict=True)]
    for method, budget, kept in plan:
        for length in (2048, 4096):
            for task, best in (("passkey", 0.98), ("needle", 0.85)):
                depths, each = [i / 9 for i in range(10)], 4
                hits = [sum(rng.random() < best * kept for _ in range(each)) for _ in depths]
                n = each * len(depths)
                more = {"grid": [{"depth": d, "score": h / each, "n": each} for d, h in zip(depths, hits, strict=True)]}
                if method == "quest":
                    more["kv_read_share"] = budget
                score = sum(hits) / n
                records.append(record(method, budget, task, length, score, *wilson(score, n), n, rng=rng, **more))
            ppl = 14.2 * (1 + 0.25 * (1 - kept)) - length / 4096
            more = {"kv_read_share": budget} if method == "quest" else {}
            records.append(
                record(method, budget, "perplexity", length, ppl, ppl * 0.97, ppl * 1.03, 4000, rng=rng, **more)
            )
    failed = next(r for r in records if r["method"] == "tova" and r["budget"] == 0.1 and r["length"] == 4096)
    failed.update(status="error", score=None, error="ran out of memory in layer 12: 3.2 GB asked, 0.4 GB free")
    return {
        "meta": {
            "command": "foveal compare --methods h2o,snapkv,streaming_llm,pyramidkv,tova,quest --budgets 0.5,0.25,0.1"
            " --tasks passkey,needle,perplexity --lengths 2048,4096 --html compare.html",
            "date": "2026-03-04T05:06:07+00:00",
            "model": "SmolLM2-135M-Instruct",
            "model_identity": {"layers": 30, "heads": 9, "kv_heads": 3, "sha256": "b179c9523d0e6a0f"},
            "device": "cpu",
            "hardware": {"cpu": "Example CPU", "cores": 8, "threads": 4, "memory_gb": 31.2, "gpu": None},
            "versions": {"foveal": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.12.3"},
            "dtype": "float32",
            "seed": 0,
            "elapsed_s": 1834.0,
            "interrupted": interrupted,
            "notes": ["Speed and memory come from one machine in one run."],
        },
        "records": records,
    }


def small():
    """Dense and one method on two tasks, with values that can be worked out by hand."""
    return {
        "meta": {},
        "records": [
            record("dense", 1.0, "needle", 1000, 0.8, 0.7, 0.9, 10),
            record("dense", 1.0, "needle", 2000, 0.6, 0.5, 0.7, 30),
            record("dense", 1.0, "perplexity", 1000, 9.0, 8.0, 10.0, 5),
            record("dense", 1.0, "perplexity", 2000, 4.0, 3.0, 5.0, 5),
            record("h2o", 0.25, "needle", 1000, 0.4, 0.2, 0.7, 10),
            record("h2o", 0.25, "needle", 2000, 0.6, 0.5, 0.8, 30),
            record("h2o", 0.25, "perplexity", 1000, 10.0, 9.0, 11.0, 5),
            record("h2o", 0.25, "perplexity", 2000, 10.0, 9.0, 11.0, 5),
        ],
    }


def names(folder):
    return [path.name for path in folder.iterdir()]


class Page(HTMLParser):
    """Attributes and script bodies of a page, as a browser's parser would find them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, text):
        if self.inside == "script":
            self.scripts[-1] += text

    def handle_endtag(self, tag):
        self.inside = None

    @property
    def data(self):
        return json.loads(self.scripts[0])


def test_aggregates_weigh_lengths_by_samples_and_tasks_the_same():
    dense, h2o = summary_rows(small())
    assert (dense.label, h2o.label) == ("dense", "h2o at 25%")
    needle, perplexity = h2o.tasks["needle"], h2o.tasks["perplexity"]
    assert needle.value == pytest.approx((10 * 0.4 + 30 * 0.6) / 40) and needle.n == 40
    assert needle.low == pytest.approx(0.55 - math.hypot(0.25 * 0.2, 0.75 * 0.1))
    assert needle.high == pytest.approx(0.55 + math.hypot(0.25 * 0.3, 0.75 * 0.2))
    assert dense.tasks["perplexity"].value == pytest.approx(6.0)  # the geometric mean of 9 and 4
    assert needle.share == pytest.approx(0.55 / 0.65)
    assert perplexity.share == pytest.approx(6 / 10)
    assert perplexity.share_low == pytest.approx(6 / perplexity.high)
    assert h2o.quality == pytest.approx((0.55 / 0.65 + 0.6) / 2)
    assert h2o.quality_low < h2o.quality < h2o.quality_high
    assert dense.quality == pytest.approx(1) and dense.kv_share == 1
    assert h2o.kv_share == pytest.approx(0.25)
    assert h2o.prefill_s == pytest.approx(4.6) and h2o.speed_length == 2000  # only the longest length is timed
    assert h2o.complete and not h2o.problems


def test_one_length_alone():
    _, h2o = summary_rows(small(), 1000)
    assert h2o.tasks["needle"].share == pytest.approx(0.5)
    assert h2o.prefill_s == pytest.approx(2.3)


def test_shares_compare_only_lengths_both_finished():
    results = small()
    results["records"][5].update(status="error", score=None, error="out of memory")
    _, h2o = summary_rows(results)
    assert h2o.tasks["needle"].share == pytest.approx(0.4 / 0.8)
    assert (h2o.done, h2o.planned, h2o.complete) == (3, 4, False)
    assert h2o.problems == ["needle at 2000: error, out of memory"]


def test_a_missing_task_leaves_no_mean():
    results = small()
    for r in results["records"][6:]:
        r.update(status="skipped", score=None, error="perplexity is not defined here")
    _, h2o = summary_rows(results)
    assert h2o.quality is None and h2o.tasks["needle"].share is not None


def test_scores_that_are_not_finite_count_as_failed():
    results = small()
    results["records"][7]["score"] = math.inf
    _, h2o = summary_rows(results)
    assert h2o.problems == ["perplexity at 2000: error, score is inf, not a finite number"]
    assert h2o.tasks["perplexity"].value == pytest.approx(10.0)


def test_a_task_in_which_dense_scores_nothing_is_left_out_and_said():
    results = small()
    for r in results["records"][:2]:
        r["score"] = 0.0
    _, h2o = summary_rows(results)
    assert h2o.tasks["needle"].share is None
    assert h2o.quality == h2o.tasks["perplexity"].share is not None
    assert "Dense scores nothing in needle, which is left out of its shares." in markdown_table(results)
    for r in results["records"][2:4]:
        r["score"] = 0.0
    _, h2o = summary_rows(results)
    assert h2o.quality is None
    assert headline(results).startswith("The dense model itself scores nothing here")
    assert "in needle, perplexity, which are left out" in markdown_table(results)
    results["records"][3] |= {"status": "skipped", "score": None}
    assert headline(results).startswith("The dense model scores nothing in what it finished so far")


def test_settings_that_differ_name_the_series():
    results = small()
    wide = [dict(r, params={"budget": 0.25, "window": 64}) for r in results["records"][4:]]
    results["records"] += wide
    assert [r.series for r in summary_rows(results)] == ["dense", "h2o window=32", "h2o window=64"]


def test_headline_names_the_best_and_its_interval():
    text = headline(plausible())
    assert re.match(
        r"At 25% of the cache, (snapkv|pyramidkv) keeps \d+% \(95% interval \d+% to \d+%\) of dense's", text
    )
    assert "too close to call" in text
    assert re.search(r"quest reads \d+% of the keys and keeps \d+%", text)
    _, h2o = summary_rows(small())
    assert f"At 25% of the cache, h2o keeps {percent(h2o.quality)}" in headline(small())
    assert "No method kept 95%" in headline(small())


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "no results yet"),
        (small()["records"][4:], "no finished dense baseline"),
        (small()["records"][:4], "No method"),
    ],
)
def test_headline_without_an_answer_says_so(records, words):
    assert words in headline({"meta": {}, "records": records})


def test_markdown_table():
    results = small()
    results["records"][6].update(n=10)
    results["records"][7].update(status="error", score=None, error="a|b\n<b>")
    lines = markdown_table(results).splitlines()
    assert lines[0] == (
        "| method | budget | of dense and 95% | needle ↑ n=40 | perplexity ↓ n=10 "
        "| KV kept | peak MB | prefill s | decode tok/s |"
    )
    assert lines[1] == "| --- |" + " ---: |" * 8
    assert lines[2].startswith("| **dense** | **100%** | **100%** | **0.65** | **6.00** | **100%** |")
    assert lines[3].startswith("| h2o\\* | 25% | ") and " | 0.55 | 10.0 | 25% | " in lines[3]
    assert lines[-1] == r"- h2o at 25%: perplexity at 2000: error, a\|b \<b\>"


def test_terminal_table_fits_and_is_not_steered_by_names():
    results = plausible()
    results["records"][-1]["method"] = "e\x1b[b]"
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(rich_table(results))
    text = console.export_text()
    assert "\x1b" not in text and "e [b]" in text
    assert re.search(r"snapkv +25% +\d+% \d+-\d+% ", text)
    assert "tova at 10%: passkey at 4096: error, ran out of memory" in " ".join(text.split())


def test_page_fetches_nothing():
    text = render(plausible())
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form", "a"}
        assert not {"src", "href", "srcset", "action", "data", "style"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    for pattern in (
        r"@import",
        r"url\((?!#)",
        r"\bfetch\(",
        r"XMLHttpRequest",
        r"\bimport\(",
        r"WebSocket",
        r"sendBeacon",
    ):
        assert not re.search(pattern, text), pattern
    addresses = set(re.findall(r"https?://([^/\s\"'`)>]+)", "".join(page.scripts)))
    assert addresses <= {"www.w3.org"}  # the names of SVG's and XML's namespaces
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split("style-src")[0]


def test_page_is_small():
    assert len(render(plausible()).encode()) < 1_300_000
    assert len(render({"meta": {}, "records": []}).encode()) < 700_000


def test_hostile_strings_stay_data():
    results = plausible()
    results["meta"].update(model=HOSTILE, command=HOSTILE, notes=[HOSTILE], versions={HOSTILE: HOSTILE})
    for r in results["records"]:
        if r["method"] == "h2o":
            r.update(method=HOSTILE, error=HOSTILE, status="error")
        if r["task"] == "needle":
            r["task"] = HOSTILE + "{{SCRIPT}}"
    text = render(results)
    calm, page = Page(render(plausible())), Page(text)
    assert [t for t, _ in page.tags] == [t for t, _ in calm.tags]
    assert page.scripts[1:] == calm.scripts[1:]
    assert page.data["meta"]["command"] == HOSTILE
    assert html.escape(HOSTILE) in text and HOSTILE not in text
    assert page.data["meta"]["notes"] == [HOSTILE]


def test_json_is_inert_and_valid():
    text = inert({"a": "<!--</script>&\u2028\ud800", "b": [math.nan, math.inf, 1.5]})
    assert not set("<>&\u2028\ud800") & set(text)
    assert json.loads(text) == {"a": "<!--</script>&\u2028?", "b": [None, None, 1.5]}


def test_script_never_parses_strings_as_markup():
    script = Page(render(small())).scripts[2]
    for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert name not in script


def test_page_carries_rows_to_sort_and_one_view_a_length():
    data = Page(render(plausible())).data
    assert set(data["views"]) == {"all", "2048", "4096"}
    rows = data["views"]["all"]
    assert len(rows) == 19 and rows[0]["baseline"]
    for key in ("quality", "kv_share", "peak_bytes", "prefill_s", "decode_tok_s", "budget"):
        assert all(isinstance(row[key], int | float) for row in rows), key
    assert rows[1]["series"] == "h2o" and [r["budget"] for r in rows[1:4]] == [0.1, 0.25, 0.5]
    assert next(r for r in rows if r["method"] == "quest")["read_share"] == pytest.approx(0.1)
    panel = data["grids"][0]
    assert (panel["series"], panel["task"], len(panel["cells"])) == ("dense", "passkey", 20)
    assert len(data["grids"]) == 19 * 2


def test_empty_and_interrupted_runs_render():
    data = Page(render({"meta": {"interrupted": True}, "records": []})).data
    assert data["views"] == {"all": []} and data["meta"]["interrupted"] is True
    assert "no results yet" in data["answer"]


@pytest.mark.parametrize(
    "wrong", [None, [], {}, {"records": {}}, {"records": ["x"]}, {"records": [{"task": "needle"}]}]
)
def test_other_input_is_refused(wrong):
    with pytest.raises(InputError, match="expected"):
        render(wrong)


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "compare.html"
    write_report(small(), target)
    assert target.read_text(encoding="utf-8") == render(small())
    assert names(tmp_path) == ["compare.html"]
    assert stat.S_IMODE(target.stat().st_mode) & stat.S_IRUSR

    def full(*_):
        raise OSError(28, "No space left on device")

    before = target.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_report(plausible(), target)
    assert target.read_bytes() == before and names(tmp_path) == ["compare.html"]


def test_a_folder_that_is_not_there_or_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "none" / "compare.html", tmp_path / "file" / "compare.html", tmp_path):
        with pytest.raises(InputError, match="writable"):
            write_report(small(), path)
    assert names(tmp_path) == ["file"]
