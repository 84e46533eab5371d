"""Images that clients should not have sent: each is one error 400 that names it, in this server's words, and nothing is left behind."""

# ruff: noqa: E402 - what is imported below needs the extras asked for above it

import base64
import json
import logging
import struct
import threading
import time
import zlib

import numpy as np
import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(extra, reason=f"{extra} is part of the extra `serve`")
pytest.importorskip("PIL.Image", reason="Pillow is part of the extra `serve`")

from fake_worker import FakeWorker, byte_tokenizer
from http_server import running
from image_models import data_url, encoded, picture
from image_server import CHAT, body, generated, image, said, service
from PIL import Image

from foveal.serve import images
from foveal.serve.app import _COPIES, Service
from foveal.serve.images import ImageLimits, Place, Room
from foveal.serve.limits import Limits
from foveal.serve.schema import ApiError, ImagePart

LIMITS = ImageLimits(count=3, nbytes=200_000, pixels=300 * 200, memory=4 << 20)


@pytest.fixture(scope="module")
def server():
    with running(service("idefics3", limits=Limits(images=LIMITS, body=8000))) as found:
        yield found


def refused(server, asked, status=400):
    """The error of a request."""
    found, answer = server.post(CHAT, asked, wait=30)
    assert found == status, answer
    assert server.service.api.room.held == 0
    return answer["error"]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, pixels=b"", depth=8, kind=2, *more):
    """A PNG of any size, its pixels as they are said to be."""
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


GOOD = encoded(picture(1))
JPEG = encoded(picture(1), "JPEG")
HOSTILE = {
    "no image": b"hello",
    "an SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "a script with a picture's first bytes": GOOD[:8] + b"<?php system('id') ?>",
    "half of a PNG": GOOD[: len(GOOD) // 2],
    "half of a JPEG": JPEG[: len(JPEG) // 2],
    "no pixels": png(0, 5),
    "a bomb": png(60_000, 60_000, zlib.compress(bytes(1000))),
    "just too many pixels": png(301, 200, zlib.compress(bytes(301 * 200 * 3 + 200))),
    "pixels that are none": png(20, 20, b"not deflated"),
    "a text of many megabytes": png(
        4, 4, zlib.compress(bytes(52)), 8, 2, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80 << 20)))
    ),
    "a depth that is none": png(4, 4, zlib.compress(bytes(100)), 77),
    "a TIFF": encoded(picture(1), "TIFF"),
    "a BMP": encoded(picture(1), "BMP"),
    "an ICO": encoded(picture(1), "ICO"),
    "a PostScript file": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "a JPEG of too many scans": JPEG[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" * 200 + JPEG[-2:],
    "a GIF without frames": b"GIF89a\x10\x00\x10\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff;",
    "a JPEG of two images and too many scans": encoded(picture(1), "MPO", save_all=True, append_images=[picture(2)])
    + b"\xff\xda" * 200,
    "a strip that a processor would make huge": encoded(Image.new("L", (510, 10))),
    "a WebP cut short": encoded(picture(1), "WEBP")[:40],
    "random bytes behind a JPEG's first": JPEG[:20] + bytes(range(256)) * 4,
}


WHY = {
    "a bomb": "60,000 pixels",
    "just too many pixels": "60,000 pixels",
    "a JPEG of too many scans": "100 scans",
    "a JPEG of two images and too many scans": "100 scans",
    "a strip that a processor would make huge": "50 times",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_cannot_be_read_is_one_sentence(server, name, caplog):
    asked = body(picture(2), "and", image(data_url(HOSTILE[name])))
    with caplog.at_level(logging.DEBUG):
        error = refused(server, asked)
    assert error["message"].startswith("messages[0].content[2]: ") and error["message"].count("\n") == 0
    assert (error["param"], error["code"]) == ("messages.0.content.2", "invalid_image")
    assert WHY.get(name, "") in error["message"]
    for word in ("PIL", "Pillow", "cannot identify", "BytesIO", "Traceback", "truncated", "libpng", "decoder"):
        assert word not in error["message"]
    assert base64.b64encode(HOSTILE[name][:30]).decode()[:20] not in caplog.text


EMPTY = chunk(b"aaAa", b"") * 170_000  # two megabytes that are gone through piece by piece
ENDLESS = {
    "before the pixels": png(4, 4, zlib.compress(bytes(52)), 8, 2, EMPTY),
    "after the pixels": GOOD[:-12] + EMPTY + GOOD[-12:],
    "a JPEG that is all padding": JPEG[:2] + b"\xff" * (2 << 20) + JPEG[2:],
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_file_that_takes_too_long_is_given_up(name):
    place, limits = Place(0, 0, ImagePart.model_validate(image("data:"))), ImageLimits(seconds=0.1)
    with pytest.raises(ApiError, match="takes too long to read"):
        images.pixels(place, images.header(place, ENDLESS[name], limits), limits)


def test_sixteen_bits_of_grey_are_not_cut():
    place, limits = Place(0, 0, ImagePart.model_validate(image("data:"))), ImageLimits()
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    file = encoded(Image.fromarray(grey * 257))
    found = np.array(images.pixels(place, images.header(place, file, limits), limits))
    assert (found == grey[..., None]).all() and found.shape == (16, 16, 3)


URLS = [
    ("data:image/png;base64,", "empty"),
    ("data:image/png;base64,abc", "damaged"),
    ("data:image/png;base64,!!!!", "damaged"),
    ("data:image/png;base64,aGVs\nbG8=", "damaged"),
    ("data:image/png;base64,aGVsbG8=é", "damaged"),
    ("data:image/png,hello", "data:image/png;base64"),
    ("data:text/html;base64,aGVsbG8=", "data:image/png;base64"),
    ("data:image/svg+xml;base64,aGVsbG8=", "data:image/png;base64"),
    ("http://169.254.169.254/latest/meta-data", "--image-hosts"),
    ("https://example.org/a.png", "--image-hosts"),
    ("file:///etc/passwd", "--image-hosts"),
    ("/etc/passwd", "--image-hosts"),
    ("", "--image-hosts"),
    (data_url(bytes(200_001)), "200,000 bytes"),
    ("data:image/png;base64," + "A" * 266_672, "200,000 bytes"),
]


@pytest.mark.parametrize(("url", "why"), URLS, ids=lambda v: v[:40])
def test_a_url_that_is_not_served_is_refused(server, url, why):
    error = refused(server, body("see", image(url)))
    assert error["message"].startswith("messages[0].content[1]: ") and why in error["message"]


def test_a_request_that_is_not_served_is_refused(server):
    shown = image(picture(1))
    four = body(*[picture(i) for i in range(4)])
    assert "3 images" in refused(server, four)["message"]
    system = {"messages": [{"role": "system", "content": [shown]}, {"role": "user", "content": "x"}]}
    assert "of the user" in refused(server, system)["message"]
    for part, param in [
        ({"type": "image_url"}, "image_url"),
        ({"type": "image_url", "image_url": {"url": 3}}, "url"),
        ({"type": "image_url", "image_url": {"url": "data:", "detail": "huge"}}, "detail"),
        ({"type": "image_url", "image_url": {"url": "data:", "size": 3}}, "size"),
        ({"type": "image", "url": "/etc/passwd"}, "content"),
        ({"type": "input_audio", "input_audio": {}}, "content"),
    ]:
        error = refused(server, body(part))
        assert param in error["param"] and error["param"].startswith("messages.0.content")
    for parts in [("<image>",), (picture(1), "an <image> of"), ("<ima", "ge>")]:
        error = refused(server, body(*parts))
        assert "'<image>'" in error["message"]


def test_a_prompt_that_its_images_make_too_long_is_told_so():
    with running(service("llava", context=60)) as small:
        error = refused(small, body(*[picture(i) for i in range(4)]))
        assert error["code"] == "context_length_exceeded"


def test_what_is_good_goes_on_after_all_that(server):
    parts = (picture(1), "What is this?")
    assert said(server, body(*parts))[0] == generated("idefics3", *parts)[0]
    assert server.idle()


def test_bodies_may_be_as_large_as_images_are_and_no_larger(server):
    noise = picture(3, (240, 240))
    asked = body(noise, "?")
    assert len(json.dumps(asked)) > 8000
    assert said(server, asked)[0] == generated("idefics3", noise, "?")[0]
    assert LIMITS.body >= 3 * len(data_url(bytes(LIMITS.nbytes)))  # three of the largest fit
    padded = json.dumps(body("x")).encode().ljust(LIMITS.body + 8001)
    assert refused(server, padded, 413)["code"] == "body_too_large"
    status, _ = server.post("/v1/completions", json.dumps({"prompt": "x", "max_tokens": 1}).encode().ljust(8001))
    assert status == 413
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    chunked = f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + b"%x\r\n" % 8001 + b" " * 8001 + b"\r\n0\r\n\r\n"
    assert b" 413 " in server.raw(chunked).partition(b"\r\n")[0]  # a length must be announced, for room is taken by it


def test_the_largest_request_that_is_allowed_has_room():
    limits = ImageLimits()
    side = int(limits.pixels**0.5)
    largest = limits.body + Limits().body
    assert _COPIES * largest + images.decoded_bytes([(side, side)] * limits.count) <= limits.memory


def test_a_large_body_waits_for_room(server):
    room = server.service.api.room
    asked = json.dumps(body("a text")).encode().ljust(9000)
    with room.lent(room.most - 1000):
        status, answer = server.post(CHAT, asked)
    assert (status, answer["error"]["code"]) == (429, "images_full") and room.held == 0
    with pytest.raises(ApiError) as found:
        Room(10).take(11)
    assert found.value.status == 413


def test_decoding_keeps_nobody_waiting(server, monkeypatch):
    begun, go, where = threading.Event(), threading.Event(), []

    def slow(*args):
        where.append(threading.current_thread().name)
        begun.set()
        assert go.wait(10)
        return real(*args)

    real = images.pixels
    monkeypatch.setattr(images, "pixels", slow)
    monkeypatch.setattr(server.service.api, "max_waiting", 1)  # prompts that are read: images wait elsewhere
    monkeypatch.setattr(server.service.api, "_looking", Room(1))
    thread = threading.Thread(target=said, args=(server, body(picture(1), "?")))
    thread.start()
    assert begun.wait(10)
    began = time.monotonic()
    said(server, body("a text"))
    status, answer = server.post(CHAT, body(picture(2), "?"))
    assert (status, answer["error"]["code"]) == (429, "images_full")
    assert b" 200 " in server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert time.monotonic() - began < 5 and thread.is_alive()
    go.set()
    thread.join(20)
    assert where[0].startswith("images")


def test_a_text_model_says_that_it_reads_none():
    worker = FakeWorker(byte_tokenizer())
    with running(Service(worker, worker.tokenizer, name="text")) as found:
        error = refused(found, body("what is", picture(1)))
        assert error["message"] == "messages[0].content[1]: this model reads no images: leave it out"
        assert (error["param"], error["code"]) == ("messages.0.content.1", "images_not_supported")
        assert found.post(CHAT, body("hello"))[0] == 200
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        assert b" 413 " in found.raw(f"{head}Content-Length: {(4 << 20) + 1}\r\n\r\n".encode())
    assert worker.requests[-1] and len(worker.requests) == 1
