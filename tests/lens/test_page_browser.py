"""The page in a real browser, with the network off: every interaction, light and dark, small and large models."""

import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from page_looks import made

from foveal.lens import Look, Measure
from foveal.lens.page import frame

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium on the path")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pages by name: one head with exact rows, compared with another text and with kept keys."""
    folder = tmp_path_factory.mktemp("pages")
    look, p = made(layers=6, heads=4, kv_heads=2, n=120, block=6, exact=2)
    look = look.with_measures(
        Measure.of("kept.keys", torch.full((6, 2), 30.0), ("layer", "kv_head"), "keys", "held"),
        Measure.of("kept.by_position", torch.full((120,), 0.25), ("position",), "share", "of KV heads"),
        Measure.of("kept.bytes", 4096, (), "bytes", "all"),
        kept="snapkv(budget=0.25)",
    )
    other, _ = made(layers=6, heads=4, kv_heads=2, n=50, seed=3)
    (folder / "frame.html").write_text(
        f"<!doctype html><title>notebook</title><script>secret = 1</script>{frame(look)}"
    )
    return {"page": look.save_page(folder / "page.html", other), "frame": folder / "frame.html", "look": look, "p": p}


@pytest.fixture
def open_page(browser):
    """Open a file without network in a theme; at the end nothing may have been complained about or asked of the network."""
    opened = []

    def call(file, scheme="light", width=1280, suffix=""):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        page, said = context.new_page(), []
        page.on("console", lambda m: said.append(m.text))
        page.on("pageerror", lambda e: said.append(str(e)))
        page.on("request", lambda r: said.append(r.url) if not r.url.startswith(("file:", "about:")) else None)
        page.goto(Path(file).as_uri() + suffix)
        opened.append((context, said))
        if "frame" not in str(file):
            page.locator("html[data-ready=yes]").wait_for(state="attached", timeout=60_000)
        return page

    yield call
    for context, said in opened:
        context.close()
        assert said == []


def number(text):
    return float(re.search(r"[\d.]+(e-\d+)?", text).group(0))


def test_a_head_is_picked_with_the_pointer_and_with_keys(files, open_page):
    page = open_page(files["page"])
    first = files["look"]["sinks.first"]
    page.select_option("#measure", "sinks.first")
    canvas = page.locator("#heads-box canvas").first
    box = canvas.bounding_box()
    width = (box["width"] - 76) / 4
    page.mouse.move(box["x"] + 30 + 2.5 * width, box["y"] + 20 + 3.5 * 21)
    read = page.locator("#heads-box .read")
    assert read.inner_text().startswith("Layer 3, head 2:")
    assert number(read.inner_text().split(":")[1]) == pytest.approx(float(first[3, 2]), rel=6e-3)
    page.mouse.click(box["x"] + 30 + 2.5 * width, box["y"] + 20 + 3.5 * 21)
    page.get_by_role("heading", name="Head 3.2", exact=True).wait_for()
    page.get_by_role("heading", name="Where head 3.2 looks").wait_for()
    canvas.focus()
    for key in ("ArrowDown", "ArrowLeft", "Enter"):
        page.keyboard.press(key)
    page.get_by_role("heading", name="Head 4.1", exact=True).wait_for()
    assert page.evaluate("location.hash") == "#4.1"
    row = page.locator("#card tr", has_text="sinks.first").inner_text().split()
    assert float(row[1]) == pytest.approx(float(first[4, 1]), rel=6e-3)
    assert int(row[2]) == 1 + int((first > first[4, 1]).sum())


def test_the_views_of_all_heads(files, open_page):
    page = open_page(files["page"])
    page.select_option("#measure", "distance.span")
    page.get_by_role("button", name="List").click()
    rows = page.locator("#heads-box tbody tr")
    span = files["look"]["distance.span"]
    best = int(span.argmax())
    assert rows.first.inner_text().split()[1] == f"{best // 4}.{best % 4}"
    page.get_by_role("button", name="Smallest").click()
    least = int(span.argmin())
    assert rows.first.inner_text().split()[1] == f"{least // 4}.{least % 4}"
    second = rows.nth(1).inner_text().split()[1]
    rows.nth(1).get_by_role("button").click()
    page.get_by_role("heading", name=f"Head {second}", exact=True).wait_for()
    page.get_by_role("button", name="Scatter").click()
    page.select_option("#across", "profile.entropy")
    page.locator("#heads-box canvas").first.focus()
    for key in ("ArrowRight", "Enter"):
        page.keyboard.press(key)
    said = page.locator("#heads-box .read").inner_text()
    layer, head = (int(x) for x in re.match(r"Head (\d+)\.(\d+):", said).groups())
    assert f"profile.entropy {float(files['look']['profile.entropy'][layer, head]):.3g}" in said
    page.get_by_role("heading", name=f"Head {layer}.{head}", exact=True).wait_for()


def test_zooming_in_shows_exact_weights(files, open_page):
    page = open_page(files["page"], suffix="#0.1")
    assert "head 0.1 looks" in page.locator("#one-title").inner_text()
    matrix, read, p = page.locator("#matrix"), page.locator("#matrix-read"), files["p"][0, 1]
    matrix.focus()
    best = int(p[60, 1:].argmax()) + 1
    for key in ["ArrowRight"] * best:
        page.keyboard.press(key)
    said = []
    for key in ("+", "+", "+", "ArrowDown", "ArrowUp"):
        page.keyboard.press(key)
        said.append(read.inner_text())
    assert said[0] == said[2] == said[4] != said[3]
    q, k = (int(x) for x in re.match(r"Query (\d+) “.*” to key (\d+) “", said[0], re.S).groups())
    assert (q, k) == (60, best)
    assert number(said[0].rpartition(": ")[2]) == pytest.approx(float(p[60, best]), abs=6e-5)
    least = int(p[60, 1:60].argmin()) + 1
    page.keyboard.press("0")
    for key in ["ArrowRight" if least > best else "ArrowLeft"] * abs(least - best):
        page.keyboard.press(key)
    weight = read.inner_text().rpartition(": ")[2]
    assert weight.startswith("under") and float(p[60, least]) < number(weight)
    page.keyboard.press("Enter")
    page.locator("#picked h3", has_text="Token 60").wait_for()


def test_heads_without_exact_rows_show_blocks_and_say_so(files, open_page):
    page = open_page(files["page"], suffix="#5.3")
    assert "--heads 5.3" in page.locator("#matrix-note").inner_text()
    matrix, look = page.locator("#matrix"), files["look"]
    matrix.focus()
    page.keyboard.press("ArrowDown")
    said = page.locator("#matrix-read").inner_text()
    q, k = (int(x) for x in re.match(r"Queries (\d+)\D\d+ to keys (\d+)\D", said).groups())
    true = float(look["picture.blocks"][5, 3, q // 6, k // 6])
    assert number(said.partition(": ")[2]) == pytest.approx(true, rel=0.06, abs=2e-4)
    page.keyboard.press("Enter")
    page.locator("#picked h4", has_text="Its block of queries looks at").wait_for()


def test_the_first_token_is_apart_until_it_is_asked_for(files, open_page):
    page = open_page(files["page"], suffix="#5.0")
    share = float(files["look"]["picture.first"][5, 0].mean())
    assert page.locator("#without").get_attribute("aria-pressed") == "true"
    note = page.locator("#sink-note").inner_text()
    assert "left out" in note
    assert number(note.partition("takes ")[2]) == pytest.approx(100 * share, abs=0.6)
    before = page.locator("#matrix").evaluate("c => c.toDataURL()")
    page.locator("#without").press("Enter")
    assert page.locator("#without").get_attribute("aria-pressed") == "false"
    assert "is in" in page.locator("#sink-note").inner_text()
    assert page.locator("#matrix").evaluate("c => c.toDataURL()") != before


def test_a_token_says_what_it_looks_at_and_which_heads_look_at_it(files, open_page):
    page, p = open_page(files["page"], suffix="#0.1"), files["p"]
    page.locator("#t70").click()
    page.locator("#picked .chips button").first.wait_for()
    row = page.locator("#picked table").first.locator("tbody tr").first.locator("td")
    best = int(p[0, 1, 70, 1:].argmax()) + 1
    assert row.first.inner_text() == str(best)
    assert float(row.last.inner_text()) == pytest.approx(float(p[0, 1, 70, best]), abs=6e-4)
    look_at = (p.sum(2) / torch.arange(120, 0, -1))[..., 70]
    chip = page.locator("#picked .chips button").first.inner_text().split()
    layer, head = (int(x) for x in chip[0].split("."))
    assert float(look_at[layer, head]) == pytest.approx(float(look_at.max()), rel=0.06)
    assert float(chip[1]) == pytest.approx(float(look_at[layer, head]), rel=0.06)
    sync_api.expect(page.locator("#measure")).to_have_value("attention to token 70")
    assert "mean attention" in page.locator("#meaning").inner_text()
    assert page.locator("#t70").get_attribute("aria-selected") == "true"
    shades = page.locator("#tokens").inner_html()
    page.get_by_role("button", name="Is looked at by").click()
    assert page.locator("#tokens").inner_html() != shades
    page.locator("#t70").focus()
    for key in ("ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    page.locator("#picked h3", has_text="Token 72").wait_for()
    page.locator("#picked .chips button").first.click()
    sync_api.expect(page).to_have_url(re.compile(r"@72$"))


def test_strip_curve_kept_keys_and_two_looks(files, open_page):
    page = open_page(files["page"])
    page.locator("#strip").focus()
    for key in ("ArrowRight", "ArrowUp"):
        page.keyboard.press(key)
    assert re.match(r"Queries 6\D11, 6 tokens and more back: [\d.]+", page.locator("#strip-read").inner_text())
    page.keyboard.press("Enter")
    page.locator("#curve").focus()
    page.keyboard.press("ArrowRight")
    said = page.locator("#curve-read").inner_text()
    rate = float(files["look"]["sinks.rate_by_position"][1])
    assert said.startswith("Token 1 “") and number(said.rpartition(": ")[2]) == pytest.approx(rate, rel=6e-3)
    assert (
        page.locator("#kept-note").inner_text()
        == "snapkv(budget=0.25) kept 360 of 1,440 keys (25 %), 30 of 120 a KV head, in 4,096 bytes."
    )
    assert page.locator("#compare-box canvas[role=application]").count() == 3
    page.select_option("#common", "profile.entropy")
    assert (
        page.locator("#compare-note").inner_text().startswith("profile.entropy: entropy; nats. Correlation over heads")
    )
    page.locator("#compare-box canvas[role=application]").nth(2).hover(position={"x": 40, "y": 30})
    assert page.locator("#compare-box .read").nth(2).inner_text().startswith("Layer 0, head 0:")


def test_everything_can_be_reached_with_the_keyboard(files, open_page):
    page = open_page(files["page"])
    reached = set()
    for _ in range(90):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "(e => e.id || e.parentElement?.id || e.parentElement?.parentElement?.id || '')(document.activeElement)"
            )
        )
    assert reached >= {
        "theme",
        "measure",
        "view",
        "heads-box",
        "without",
        "closer",
        "matrix",
        "strip",
        "curve",
        "mode",
        "t0",
    } - {"t0"}
    assert any(x.startswith("t") and x[1:].isdigit() for x in reached)


def test_the_text_is_shown_and_never_run(files, open_page):
    page = open_page(files["page"])
    assert "<b>bold</b>" in page.locator("#tokens").inner_text()
    assert page.locator("#tokens b").count() == 0


def shape(layers, heads):
    draw = torch.Generator().manual_seed(1)
    name = Measure.of("made.up", torch.rand(layers, heads, generator=draw), ("layer", "head"), "share", "made up")
    identity = {"name": "wide", "architecture": "Made", "layers": layers, "heads": heads, "kv_heads": heads}
    return Look(identity, (1, 2), ("a", "b"), {"made.up": name}, {}, tuple(range(layers)))


@pytest.mark.parametrize(("layers", "heads"), [(30, 9), (80, 64)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_maps_fit_and_keep_their_contrast(open_page, tmp_path, layers, heads, scheme):
    page = open_page(shape(layers, heads).save_page(tmp_path / "shape.html"), scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    box = page.locator("#heads-box canvas").first.bounding_box()
    assert (
        box["x"] + box["width"]
        <= page.locator("#heads-box").bounding_box()["x"] + page.locator("#heads-box").bounding_box()["width"]
    )
    assert (box["width"] - 76) / heads >= 8 and (box["height"] - 24) / layers >= 11
    lightness = page.evaluate("""() => {  // along the legend, as sRGB luma: falls or rises all the way, so it reads without colour vision
        const c = document.querySelector('#heads-box .legend-row canvas'), x = c.getContext('2d').getImageData(0, 5, c.width, 1).data;
        const luma = (p) => 0.299 * x[p] + 0.587 * x[p + 1] + 0.114 * x[p + 2];
        return Array.from({length: 9}, (_, i) => luma(4 * Math.round(i * (c.width - 2) / 8)));
    }""")  # fmt: skip
    steps = [b - a for a, b in pairwise(lightness)]
    assert all(s < -5 for s in steps) if scheme == "light" else all(s > 5 for s in steps)


def test_the_theme_can_be_changed(files, open_page):
    page = open_page(files["page"])
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Dark").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != back
    assert page.locator("#theme").inner_text() == "Light"


def test_in_a_notebook_it_is_shut_in(files, open_page):
    page = open_page(files["frame"])
    inner = page.frame_locator("iframe")
    inner.locator("html[data-ready=yes]").wait_for(timeout=60_000)
    inner.locator("#t5").click()
    inner.locator("#picked h3", has_text="Token 5").wait_for()
    handle = page.query_selector("iframe").content_frame()
    assert handle.evaluate("(() => { try { return parent.secret } catch { return 'no' } })()") == "no"


def test_a_notebook_can_pick_and_is_told(files, open_page):
    page = open_page(files["frame"])
    page.frame_locator("iframe").locator("html[data-ready=yes]").wait_for(timeout=60_000)
    page.evaluate("""() => { window.told = []; addEventListener('message', (e) => told.push(e.data.foveal));
        document.querySelector('iframe').contentWindow.postMessage({foveal: {head: [3, 2], token: 7}}, '*'); }""")
    page.frame_locator("iframe").get_by_role("heading", name="Head 3.2", exact=True).wait_for()
    page.wait_for_timeout(300)
    assert {"head": [3, 2], "token": 7} in page.evaluate("told")
