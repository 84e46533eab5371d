"""The API over the real engine, on a tiny model: what only both together can show."""

# ruff: noqa: E402 - what is imported below needs the extras asked for above it

import json
import random
import re
import socket
import threading
import time

import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(extra, reason=f"{extra} is part of the extra `serve`")

from fake_worker import byte_tokenizer
from http_server import running, tiny_model

from foveal.serve.app import Service
from foveal.serve.keys import Keys
from foveal.serve.worker import Worker

TOKENIZER = byte_tokenizer()
CHAT = "/v1/chat/completions"
KEYS = ("X-Api-Key: key-number-1\r\n", "X-Api-Key: key-number-2\r\n")


def chat(text, **more):
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12, **more}


@pytest.fixture(scope="module")
def server():
    worker = Worker(tiny_model(), TOKENIZER, memory=8 << 20, allow={"half": "h2o(budget=0.5)"}, chunk=32)
    with running(Service(worker, TOKENIZER, name="tiny", keys=Keys(["key-number-1", "key-number-2"]))) as found:
        yield found


def said(server, body, key=KEYS[0]):
    status, answer = server.post(CHAT, body, key, wait=60)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"], answer["usage"]


def test_answers_together_are_answers_alone(server):
    rng = random.Random(0)
    bodies = []
    for index in range(32):
        text = "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(5, 150)))
        bodies.append(chat(f"{index} {text}", foveal={"method": "half"} if index % 2 else {}))
    alone = [said(server, body)[0] for body in bodies]
    together = {}

    def one(index):
        together[index] = said(server, bodies[index], KEYS[1])[0]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(len(bodies))] == alone
    assert len(set(alone)) > 5  # not all the same, or the test could not fail


def test_streamed_is_whole(server):
    body = chat("tell me", stream=True, stream_options={"include_usage": True})
    data = json.dumps(body).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n{KEYS[0]}"
    )
    raw = server.raw(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data, wait=60)
    events = [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: {")]
    text = "".join(c["delta"].get("content", "") for e in events for c in e["choices"])
    whole, usage = said(server, chat("tell me"))
    assert text == whole and events[-1]["usage"]["completion_tokens"] == usage["completion_tokens"]


def test_usage_says_what_was_stored(server):
    text = "one two three four five six seven eight nine ten " * 4
    _, dense = said(server, chat(text))
    _, half = said(server, chat(text, foveal={"method": "half"}))
    assert dense["prompt_tokens"] == half["prompt_tokens"] == len(f"<user>{text}<assistant>")
    assert dense["kept_tokens"] >= dense["prompt_tokens"]
    assert half["kept_tokens"] < 0.7 * dense["kept_tokens"]


def prefix_counts(server):
    """What /metrics says of the prefix cache: queries, hits, prompt tokens taken from it."""
    page = server.raw(
        f"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{KEYS[0]}\r\n".encode()
    ).decode()
    names = ("prefix_cache_queries", "prefix_cache_hits", "cached_tokens")
    return [float(re.search(rf"(?m)^foveal_{name}_total (\S+)$", page)[1]) for name in names]


def test_prefixes_are_reused_within_a_key_and_never_across(server):
    text = "a beginning that is long enough to be kept as a prefix of several chunks, and then some more of it " * 2
    before = prefix_counts(server)
    first, second, other = (
        said(server, chat(text), key)[1]["prompt_tokens_details"]["cached_tokens"]
        for key in (KEYS[0], KEYS[0], KEYS[1])
    )
    assert (first, other) == (0, 0) and second > 0
    after = prefix_counts(server)
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 1, second]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(server, stream):
    data = json.dumps(chat("x" * 100, max_tokens=390, stream=stream)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{KEYS[0]}Content-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as link:
        link.sendall(head.encode() + data)
        end = time.monotonic() + 30
        while not server.worker.stats().bytes_used and time.monotonic() < end:
            time.sleep(0.002)
        assert server.worker.stats().running == 1
    before = server.worker.stats().completion_tokens
    assert server.idle(20)
    assert server.worker.stats().completion_tokens - before < 380


def test_what_cannot_run_is_refused_with_both_numbers(server):
    status, body = server.post(CHAT, chat("x" * 600), KEYS[0])
    assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
    assert "617" in body["error"]["message"] and "512" in body["error"]["message"]
    text, usage = said(server, chat("x" * 480, max_tokens=10**6))
    assert usage["total_tokens"] <= 513 and isinstance(text, str)
