"""A thousand and more malformed or hostile requests: the server answers each as it should, stays up, and its counts stay exact."""

# ruff: noqa: E402 - what is imported below needs the extras asked for above it

import asyncio
import contextlib
import json
import random
import socket
import time

import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(extra, reason=f"{extra} is part of the extra `serve`")

from fake_worker import FakeWorker, byte_tokenizer
from http_server import running

from foveal.serve.app import Service
from foveal.serve.limits import Limits
from foveal.serve.schema import ApiError, ChatRequest, parse_body

TOKENIZER = byte_tokenizer()
CHAT = "/v1/chat/completions"
GOOD = {"model": "fake", "messages": [{"role": "user", "content": "still here"}]}


@pytest.fixture(scope="module")
def server():
    limits = Limits(body=1 << 20, body_time=1.0, header_time=1.0, send_time=1.0)
    with running(Service(FakeWorker(TOKENIZER), TOKENIZER, name="fake", limits=limits)) as found:
        yield found


@pytest.fixture(autouse=True)
def _unhurt(server):
    """After every test: it serves, holds nothing, and has the counts of what was asked of it and no other."""
    yield
    status, body = server.post(CHAT, GOOD)
    assert status == 200 and body["choices"][0]["message"]["content"] == "still here"
    assert server.idle()


def counted(server, status):
    # An answer is counted right after it was sent: let the server's loop come round first.
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), server.http._loop).result(10)
    label = server.service.metrics._requests.labels(CHAT, str(status))
    return label._value.get()


def post_many(server, bodies):
    """Statuses and bodies of many requests on one kept-alive connection each time it stays open."""
    import httpx

    with httpx.Client(base_url=server.url, timeout=20) as client:
        for body in bodies:
            found = client.post(CHAT, content=body, headers={"content-type": "application/json"})
            yield found.status_code, found.json()


HOSTILE = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"\xff\xfe\x00",
    b'{"model": "\xc3\x28"}',
    b'{"a": "\\ud800"}',
    b"[" * 60_000,
    b"[" * 60_000 + b"]" * 60_000,
    b'{"a":' * 60_000 + b"1" + b"}" * 60_000,
    b'{"messages": ' + b"[" * 500 + b"]" * 500 + b"}",
    b'{"temperature": NaN}',
    b'{"temperature": Infinity}',
    b'{"temperature": -Infinity}',
    b'{"temperature": 1e999}',
    b'{"seed": 1' + b"0" * 5000 + b"}",
    b'{"n": 1e400}',
    b'{"logit_bias": {' + b",".join(b'"%d": 1' % i for i in range(60_000)) + b"}}",
    b'{"messages": [' + b",".join([b'{"role": "user", "content": "x"}'] * 5000) + b"]}",
    b'{"stop": [' + b",".join([b'"s"'] * 50_000) + b"]}",
    b'{"model": "' + b"m" * 100_000 + b'"}',
    b'{"' + b"k" * 100_000 + b'": 1}',
    b"\x00" * 1000,
    b"\x1f\x8b\x08\x00 gzip?",
    b"a=1&b=2",
]


def test_bodies_that_are_no_requests(server):
    before = counted(server, 400)
    for status, body in post_many(server, HOSTILE):
        assert status == 400, body
        assert set(body["error"]) == {"message", "type", "param", "code"} and len(body["error"]["message"]) < 400
    assert counted(server, 400) - before == len(HOSTILE)
    assert server.post(CHAT, b"x" * (1 << 20 | 1))[0] == 413


VALUES = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    2**64,
    -(2**70),
    1.5,
    1e308,
    -1e308,
    "",
    "x",
    "\x00",
    "\r\nX-Evil: 1",
    "é" * 300,
]
VALUES += [
    [],
    [[]],
    {},
    {"a": {}},
    [None],
    ["", ""],
    [0, -1],
    {"type": "text"},
    "{{ 7*7 }}",
    "../../etc/passwd",
    "http://169.254.169.254/",
]
FIELDS = [
    *ChatRequest.model_fields,
    "logit_bias",
    "tools",
    "best_of",
    "chat_template",
    "path",
    "__class__",
    "response_format",
    "echo",
]


def test_a_thousand_requests_with_one_field_gone_wrong(server):
    rng = random.Random(0)
    cases = [{**GOOD, field: value} for field in FIELDS for value in VALUES]
    for _ in range(400):
        message = {"role": rng.choice([*VALUES[9:], "user"]), "content": rng.choice(VALUES)}
        cases.append({**GOOD, rng.choice(FIELDS): rng.choice(VALUES), "messages": [message] * rng.choice((1, 2, 9))})
    assert len(cases) >= 1000
    before = {status: counted(server, status) for status in (200, 400, 404)}
    seen = dict.fromkeys(before, 0)
    import httpx

    with httpx.Client(base_url=server.url, timeout=20) as client:
        for case in cases:
            found = client.post(CHAT, json=case)
            seen[found.status_code] += 1  # a KeyError is a status that should not be
            if found.status_code == 200 and case.get("stream") is not True:
                assert found.json()["choices"]
            elif found.status_code != 200:
                assert found.json()["error"]["message"]
            assert "x-evil" not in found.headers
    # 400 and 404 as well as 200 occur, and the metrics have each of them.
    assert min(seen.values()) > 5
    assert {status: counted(server, status) - before[status] for status in before} == seen


RAW = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",  # a TLS hello
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET\r\n\r\n",
    b"\r\n\r\n\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nBad Header: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: \x00\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(20_000)) + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    b"GET /%00%ff/../..//etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    b"HEAD /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
]


@pytest.mark.parametrize("data", RAW, ids=lambda d: repr(d[:30]))
def test_bytes_that_are_no_http(server, data):
    answer = server.raw(data, wait=4.0)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
    assert b" 500 " not in answer.split(b"\r\n")[0] and b"passwd" not in answer and b"Traceback" not in answer


def test_ids_and_paths_cannot_forge_headers_or_log_lines(server, caplog):
    caplog.set_level("INFO", "foveal.serve")
    for value in (b"a\tb", b"x" * 5000, b"\xff\xfe", b"%0d%0aX-Evil: 1", b'"><script>', b"a b"):
        raw = server.raw(
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Request-Id: " + value + b"\r\n\r\n"
        )
        assert raw.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400")) and value not in raw
    raw = server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: a\r\n X-Evil: 1\r\n\r\n", wait=2)
    assert b"x-evil" not in raw.lower()
    server.raw(b"GET /v1/%0d%0aFORGED HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert "FORGED" not in caplog.text and all("\n" not in r.getMessage() for r in caplog.records)


def test_connections_that_are_dropped_half_way(server):
    """Cut at any byte: in the headers, in the body, while the answer streams."""
    data = json.dumps({**GOOD, "stream": True}).encode()
    whole = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (
        CHAT.encode(),
        len(data),
    )
    whole += data
    rng = random.Random(1)
    for cut in [*rng.sample(range(len(whole)), 60), len(whole)]:
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as link:
            link.sendall(whole[:cut])
            if cut % 2:  # half closed: no more will come, and an answer may still be read
                link.shutdown(socket.SHUT_WR)
                with contextlib.suppress(OSError):
                    link.recv(100)
    time.sleep(0.1)


def test_many_pipelined_requests(server):
    data = json.dumps(GOOD).encode()
    one = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
        CHAT.encode(),
        len(data),
        data,
    )
    raw = server.raw(one * 20, wait=3.0)
    assert raw.count(b"HTTP/1.1 200") == 20


def test_parser_never_raises_anything_else():
    """Random bytes and mutated requests: a request, or ApiError 400."""
    rng = random.Random(2)
    text = json.dumps({**GOOD, "n": 2, "stop": ["a"], "foveal": {"budget": 0.5}}).encode()
    for _ in range(3000):
        body = bytearray(text)
        for _ in range(rng.randint(1, 6)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        try:
            parse_body(bytes(body), ChatRequest)
        except ApiError as error:
            assert error.status == 400 and str(error)


def test_schemathesis_finds_no_answer_that_the_description_forbids(server):
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis makes requests from the API's description")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable

    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    count = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode:
            if mode.is_negative and operation.method.upper() == "GET" and "{" not in operation.path:
                continue

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=40,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            def check(case):
                nonlocal count
                count += 1
                response = case.call(timeout=20)
                assert response.status_code < 500 or response.status_code == 504, response.text
                if response.status_code >= 400:
                    assert set(response.json()["error"]) == {"message", "type", "param", "code"}

            # No wrong request can be made where every one is right.
            with contextlib.suppress(schemathesis.errors.SerializationNotPossible, Unsatisfiable):
                check()
    assert count > 100
