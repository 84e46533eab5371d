"""The plots of the page in a real browser: names lie neither on each other nor beyond the edge."""

import shutil

import pytest

from foveal.compare.report import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium on the path")

WORDS = """id => [...document.querySelectorAll(`#${id} text`)].map(t => {
  const [word, plot] = [t.getBoundingClientRect(), document.getElementById(id).getBoundingClientRect()];
  return { said: t.textContent, left: word.left, right: word.right, top: word.top, bottom: word.bottom, end: plot.right };
})"""


def results():
    """The dense model is the best and the slowest, so its point stands in the corner where the axis has its name."""
    records = []
    for i, (method, budget) in enumerate(
        [("dense", 1.0), *((m, b) for m in ("h2o", "a-method-with-a-long-name") for b in (0.5, 0.25, 0.125))]
    ):
        shared = {"method": method, "params": {}, "budget": budget, "length": 1024, "n": 40, "status": "ok"}
        shared |= {
            "kv_bytes": 100 if "a-" in method else int(100 * budget),
            "kv_bytes_dense": 100,
            "decode_tok_s": 20 + i,
        }
        shared["params"] = {} if method == "dense" else {"budget": budget}
        for task, score, better in (("passkey", 1 - i / 40, "higher"), ("perplexity", 18 + i, "lower")):
            ends = {"score_low": 0.95 * score, "score_high": min(1.05 * score, 1.0 if better == "higher" else 99.0)}
            records.append(shared | ends | {"task": task, "score": score, "better": better, "kind": "generate"})
    return {"meta": {}, "records": records}


@pytest.mark.parametrize("width", [1280, 480])
@pytest.mark.parametrize("quality", ["Mean", "perplexity"])
def test_the_names_in_the_plots_can_be_read(quality, width, tmp_path):
    write_report(results(), tmp_path / "report.html")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.goto(f"file://{tmp_path / 'report.html'}")
        page.get_by_role("group", name="Quality shown").get_by_role("button", name=quality).click()
        page.wait_for_timeout(800)  # the plots move there
        plots = {id: page.evaluate(WORDS, id) for id in ("memory", "speed")}
        browser.close()
    for words in plots.values():
        names = [
            w for w in words if w["said"] in ("dense", "h2o") or w["said"].startswith("a-method")
        ]  # cut where it is long
        assert len(names) == 3 and any("is better" in w["said"] or "mean score" in w["said"] for w in words)
        for name in names:
            assert name["right"] <= name["end"]
            assert [w["said"] for w in words if w is not name and _overlap(w, name)] == []


def _overlap(a, b):
    across = min(a["right"], b["right"]) - max(a["left"], b["left"])
    down = min(a["bottom"], b["bottom"]) - max(a["top"], b["top"])
    return across > 1 and down > 3  # boxes of text have some air above and below
