"""The chat page in a real browser: send, stream, stop, reload; and that it is one file that calls nobody else."""

# ruff: noqa: E402 - what is imported below needs the extras asked for above it

import re
import shutil
from importlib import resources

import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(extra, reason=f"{extra} is part of the extra `serve`")

from fake_worker import FakeWorker, byte_tokenizer
from http_server import running

from foveal.serve.app import Service
from foveal.serve.keys import Keys

TOKENIZER = byte_tokenizer()
PAGE = resources.files("foveal.serve").joinpath("static/chat.html").read_text(encoding="utf-8")


def test_page_is_one_file_without_foreign_addresses():
    assert not re.search(r"https?:|src=|@import|url\(", PAGE)
    assert (
        "innerHTML" not in PAGE and "eval(" not in PAGE and "location" not in PAGE
    )  # text stays text, nothing from the address
    assert len(PAGE) < 40_000


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright drives the page")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium here")
    with api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def server():
    worker = FakeWorker(TOKENIZER, context=4000)
    with running(Service(worker, TOKENIZER, name="fake/model", keys=Keys(["secret-key-1"]))) as found:
        yield found


@pytest.fixture
def page(browser, server):
    context = browser.new_context(
        http_credentials={"username": "me", "password": "secret-key-1"}, viewport={"width": 1280, "height": 800}
    )
    found = context.new_page()
    found.wrong = []
    found.asked = []
    found.on("pageerror", lambda error: found.wrong.append(str(error)))
    found.on("console", lambda message: found.wrong.append(message.text) if message.type == "error" else None)
    found.on("request", lambda request: found.asked.append(request.url))
    found.goto(server.url)
    yield found
    assert found.wrong == []
    assert all(url.startswith((server.url, "data:")) for url in found.asked)
    context.close()


def say(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")


def until(page, selector, pattern):
    """Wait until the last such element's text is like a pattern; the page's own policy lets no test evaluate script in it."""
    for _ in range(200):
        found = page.locator(selector)
        if found.count() and re.search(pattern, found.last.text_content()):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"{selector} never became {pattern}")


def settled(page):
    page.wait_for_selector("#send:visible")


def test_send_and_reload(page, server):
    until(page, "#model", "^fake/model$")
    assert page.locator("#method option").all_text_contents() == ["dense (the server's)", "half"]
    say(page, "<b>hé 你 🎉</b>")
    settled(page)
    said = page.locator(".said").all_text_contents()
    assert said[0] == "<b>hé 你 🎉</b>" and said[1].startswith("<b>hé 你 🎉</b>")
    assert "keys kept" in said[1] and page.locator("b").count() == 0
    page.select_option("#method", "half")
    say(page, "second")
    settled(page)
    assert server.worker.requests[-1].method == "half"
    prompt = TOKENIZER.decode(server.worker.requests[-1].prompt_ids)
    assert prompt == "<user><b>hé 你 🎉</b><assistant><b>hé 你 🎉</b><user>second<assistant>"
    before = page.locator(".said").all_text_contents()
    page.reload()
    page.wait_for_selector(".said")
    assert page.locator(".said").all_text_contents() == before
    page.click("#new")
    assert page.locator(".said").count() == 0
    page.reload()
    assert page.locator("#empty").count() == 1


def test_stream_picture_and_stop(page, server):
    server.worker.step = 0.02
    try:
        say(page, "a long answer " * 40)
        until(page, ".said.live", "^a long")
        until(page, "#cell", "^On average")
        pixels = "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
        assert page.locator("#map").evaluate(pixels) > 8  # a picture, not one colour
        page.hover("#map", position={"x": 2, "y": 2})
        assert re.match(r"Layer 0, head 0: \d+ keys of", page.text_content("#cell"))
        page.click("#stop")
        settled(page)
        assert server.idle()
    finally:
        server.worker.step = 0.0
    last = page.locator(".said").last.text_content()
    assert "stopped" in last and len(last) < 400
    say(page, "again")
    settled(page)
    assert page.locator(".said").last.text_content().startswith("again")


def test_errors_are_shown_and_the_conversation_goes_on(page, server):
    say(page, "BREAK")
    page.wait_for_selector(".wrong")
    assert "the engine failed" in page.text_content(".wrong")
    settled(page)
    say(page, "again")
    settled(page)
    # Templates want users and assistants in turn, so what was never answered is not asked again.
    assert TOKENIZER.decode(server.worker.requests[-1].prompt_ids) == "<user>again<assistant>"


def test_without_the_key_there_is_no_page(browser, server):
    context = browser.new_context()
    assert context.request.get(server.url).status == 401
    context.close()
