"""Who may call, how much, and what becomes of callers that leave, wait or overrun: keys, origins, bounds, shedding, draining, death."""

# ruff: noqa: E402 - what is imported below needs the extras asked for above it

import contextlib
import json
import logging
import socket
import threading
import time

import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(extra, reason=f"{extra} is part of the extra `serve`")

from fake_worker import FakeWorker, byte_tokenizer
from http_server import running

from foveal.errors import InputError
from foveal.serve.app import Service
from foveal.serve.keys import Keys
from foveal.serve.limits import Guard, Limits, is_loopback
from foveal.serve.prompt import Prompts
from foveal.serve.schema import ApiError, ChatRequest

TOKENIZER = byte_tokenizer()
CHAT = "/v1/chat/completions"


def chat(text="hello", **more):
    return {"model": "fake", "messages": [{"role": "user", "content": text}], **more}


def service(worker=None, **more):
    return Service(worker or FakeWorker(TOKENIZER), TOKENIZER, name="fake", **more)


def get(server, path, headers=""):
    raw = server.raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n".encode())
    top, _, body = raw.partition(b"\r\n\r\n")
    return int(top.split()[1]), top.decode().lower(), body


def request_bytes(body, headers=""):
    data = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}Content-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


@contextlib.contextmanager
def hanging(server, body):
    """A request that is being worked on, on a socket that is still open."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as link:
        before = len(server.worker.requests)
        link.sendall(request_bytes(body))
        end = time.monotonic() + 10
        while len(server.worker.requests) == before:
            assert time.monotonic() < end, "the request was not taken"
            time.sleep(0.005)
        yield link


def test_keys_cover_every_route_but_health():
    keys = Keys.read(["first-key-1,second-key"])
    with running(service(keys=keys)) as server:
        for path in ("/", "/metrics", "/openapi.json", "/v1/models", "/v1/models/fake", "/nope"):
            status, head, body = get(server, path)
            assert status == 401, path
            assert json.loads(body)["error"]["code"] == "invalid_api_key"
            assert ("basic" in head) == (path == "/")
        assert get(server, "/health")[0] == 200
        for good in ("Authorization: Bearer first-key-1", "authorization: bearer second-key", "X-Api-Key: second-key"):
            assert get(server, "/v1/models", good + "\r\n")[0] == 200
        assert get(server, "/", "Authorization: Basic bWU6Zmlyc3Qta2V5LTE=\r\n")[0] == 200
        for bad in (
            "Authorization: Bearer first-key-",
            "X-Api-Key: ",
            "Authorization: Basic !!",
            "Authorization: first-key-1",
        ):
            assert get(server, "/v1/models", bad + "\r\n")[0] == 401
        assert server.post(CHAT, chat(), "X-Api-Key: second-key\r\n")[0] == 200
        assert server.worker.requests[-1].key == "key-2"
    with running(service(keys=keys, open_metrics=True)) as server:
        assert (get(server, "/metrics")[0], get(server, "/v1/models")[0]) == (200, 401)


def test_keys_that_are_no_keys_are_refused(tmp_path):
    for wrong in (["short"], ["with a space in it"], ["ключ-ключ-ключ"], ["same-key-1", "same-key-1"]):
        with pytest.raises(InputError):
            Keys(wrong)
    (tmp_path / "keys").write_text("# ours\nfile-key-1\n\n")
    assert Keys.read(["given-key"], tmp_path / "keys").who({"x-api-key": "file-key-1"}) == "key-2"
    for content in ("", "# none\n"):
        (tmp_path / "empty").write_text(content)
        with pytest.raises(InputError, match="holds no API key"):
            Keys.read(file=tmp_path / "empty")
    with pytest.raises(InputError, match="cannot read"):
        Keys.read(file=tmp_path / "nothing")


def test_hosts_and_origins():
    local = Guard("127.0.0.1")
    for host in ("localhost", "127.0.0.1:8000", "[::1]:80", "LOCALHOST:1"):
        local.check({"host": host})
        local.check({"host": host, "origin": f"http://{host}".lower()})
    wrong = [{"host": "evil.example"}, {"host": "127.0.0.1.evil.example"}, {}, {"host": "["}]
    wrong += [
        {"host": "localhost", "origin": o}
        for o in ("null", "http://evil.example", "http://localhost:1", "file://localhost")
    ]
    wrong += [{"host": "localhost", "sec-fetch-site": "cross-site"}]
    for headers in wrong:
        with pytest.raises(ApiError) as caught:
            local.check(headers)
        assert caught.value.status == 403
    Guard("0.0.0.0").check({"host": "any.example"})
    with pytest.raises(ApiError):
        Guard("0.0.0.0", ("mine.example",)).check({"host": "other.example"})
    assert (
        is_loopback("::1")
        and is_loopback("127.1.2.3")
        and not is_loopback("0.0.0.0")
        and not is_loopback("example.com")
    )


def test_no_cross_origin_headers_and_a_closed_page():
    with running(service()) as server:
        status, head, _ = get(server, "/", "Origin: http://evil.example\r\n")
        assert status == 403 and "access-control" not in head
        _, head, _ = get(server, "/")
        assert "default-src 'none'" in head and "unsafe" not in head and "frame-ancestors 'none'" in head


def test_bodies_are_bounded():
    with running(service(limits=Limits(body=1000, body_time=0.3))) as server:
        assert server.post(CHAT, b"x" * 1001)[1]["error"]["code"] == "body_too_large"
        # Refused by what it announces, before it is sent; and by what it sends where it announces nothing.
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        assert b" 413 " in server.raw(f"{head}Content-Length: 99999999\r\n\r\n".encode())
        chunks = b"".join(b"190\r\n" + b"x" * 400 + b"\r\n" for _ in range(4))
        assert b" 413 " in server.raw(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks)
        assert b" 408 " in server.raw(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert server.post(CHAT, chat())[0] == 200


def test_slow_headers_and_many_connections_are_cut():
    with running(service(limits=Limits(header_time=0.5, connections=5))) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as link:
            began = time.monotonic()
            link.sendall(b"GET /health HT")
            time.sleep(0.3)
            link.sendall(b"TP/1.1\r\nX: y")  # more bytes are no more time
            with contextlib.suppress(ConnectionError):
                assert link.recv(100) == b""
            assert time.monotonic() - began < 1.5
        with contextlib.ExitStack() as stack:
            links = [
                stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5)) for _ in range(5)
            ]
            time.sleep(0.1)
            assert b" 503 " in server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            del links
        time.sleep(0.2)
        assert get(server, "/health")[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_everything(stream):
    with running(service(FakeWorker(TOKENIZER, step=0.02))) as server:
        with hanging(server, chat("x" * 400, stream=stream)):
            assert server.worker.stats().bytes_used > 0
        assert server.idle(2.0)
        time.sleep(0.1)
        metrics = get(server, "/metrics")[2].decode()
        assert 'foveal_requests_total{route="/v1/chat/completions",status="499"} 1.0' in metrics
        assert 'foveal_generations_total{reason="cancelled"} 1.0' in metrics


def test_a_reader_that_stops_reading_is_cut_off():
    def endless(request):
        while True:
            yield 65

    tokens = FakeWorker(TOKENIZER, endless, context=10**6, step=0.0005)
    tokens.tokenizer = byte_tokenizer()
    with running(service(tokens, limits=Limits(send_time=0.5))) as server:
        with socket.socket() as link:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            link.connect(("127.0.0.1", server.port))
            link.sendall(request_bytes(chat("x", stream=True, n=8, max_tokens=10**6, logprobs=True, top_logprobs=20)))
            end = time.monotonic() + 60
            while not server.worker.requests:
                time.sleep(0.01)
            while server.worker.stats().running and time.monotonic() < end:
                time.sleep(0.05)
        assert server.idle(1.0)


def test_overload_is_refused_at_once_and_first_come_is_first_served():
    worker = FakeWorker(TOKENIZER, step=0.02, max_running=1, max_waiting=3)
    with running(service(worker, max_waiting=3)) as server:
        done, results = [], {}

        def one(index):
            results[index] = server.post(CHAT, chat(f"{index}" * 10), wait=30)[0]
            done.append(index)

        threads = []
        for index in range(4):
            threads.append(threading.Thread(target=one, args=(index,)))
            threads[-1].start()
            while len(worker.requests) <= index:
                time.sleep(0.005)
        began = time.monotonic()
        raw = server.raw(request_bytes(chat(), "Connection: close\r\n"))
        assert time.monotonic() - began < 0.5  # one tenth on an idle machine
        assert b" 429 " in raw and b"retry-after: " in raw.lower() and b"queue_full" in raw
        for thread in threads:
            thread.join()
        assert done == [0, 1, 2, 3] and set(results.values()) == {200}


def test_how_many_may_wait_is_for_the_worker_to_say():
    """As on a cluster, whose replicas hold more together than one engine."""
    worker = FakeWorker(TOKENIZER, step=0.02, max_running=1, max_waiting=9)
    with running(service(worker, max_waiting=1)) as server, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(hanging(server, chat("x" * 20)))
        assert worker.stats().waiting > 0
        assert server.post(CHAT, chat(), wait=30)[0] == 200


def test_one_key_cannot_take_the_whole_queue():
    worker = FakeWorker(TOKENIZER, step=0.02, max_per_key=1)
    with running(service(worker, keys=Keys(["key-number-1", "key-number-2"]))) as server:
        slow = threading.Thread(target=server.post, args=(CHAT, chat("x" * 100), "X-Api-Key: key-number-1\r\n"))
        slow.start()
        while not worker.requests:
            time.sleep(0.005)
        assert server.post(CHAT, chat(), "X-Api-Key: key-number-1\r\n")[0] == 429
        assert server.post(CHAT, chat(), "X-Api-Key: key-number-2\r\n")[0] == 200
        slow.join()


def test_death_of_the_engine_is_seen_told_and_mended():
    class Slow(FakeWorker):
        mend = threading.Event()

        def restart(self) -> None:
            if hasattr(self, "_thread"):  # not the first start
                self.mend.wait(10)
            super().restart()

    with running(service(Slow(TOKENIZER, step=0.05))) as server:
        with hanging(server, chat("x" * 300, stream=True)) as link:
            status, body = server.post(CHAT, chat("DIE"))
            assert (status, body["error"]["code"]) == (500, "engine_error")
            assert get(server, "/health")[0] == 503
            Slow.mend.set()
            rest = b""
            with contextlib.suppress(TimeoutError):
                while b"[DONE]" not in rest:
                    rest += link.recv(65536)
        assert rest.index(b'"engine_error"') < rest.index(b"[DONE]")
        end = time.monotonic() + 5
        while get(server, "/health")[0] != 200 and time.monotonic() < end:
            time.sleep(0.05)
        assert server.post(CHAT, chat("back"))[1]["choices"][0]["message"]["content"] == "back"
        assert b"foveal_engine_restarts_total 1.0" in get(server, "/metrics")[2]


def test_draining_finishes_what_was_accepted_and_takes_no_more():
    with running(service(FakeWorker(TOKENIZER, step=0.02))) as server:
        answers = []
        slow = threading.Thread(target=lambda: answers.append(server.post(CHAT, chat("y" * 60), wait=30)))
        slow.start()
        while not server.worker.requests:
            time.sleep(0.005)
        server.http.handle_exit(15, None)
        status, body = server.post(CHAT, chat())
        assert (status, body["error"]["code"]) == (503, "draining")
        assert get(server, "/health")[0] == 503
        slow.join()
        assert answers[0][0] == 200 and answers[0][1]["choices"][0]["message"]["content"] == "y" * 60
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", server.port), timeout=1).close()
            except OSError:
                break
            time.sleep(0.05)
        else:
            pytest.fail("it still listens")


def test_logs_hold_ids_and_counts_but_no_words_of_callers(caplog):
    caplog.set_level(logging.INFO, "foveal.serve")
    with running(service(keys=Keys(["secret-key-9"]))) as server:
        key = "X-Api-Key: secret-key-9\r\n"
        assert server.post(CHAT, chat("my private words"), key + "X-Request-Id: mine-1\r\n")[0] == 200
        server.post(CHAT, chat("private", tools=["private"]), key)
        get(server, "/v1/private%0d%0aFAKE?q=private", key + "X-Request-Id: a b\r\n")
        get(server, "/v1/models", "X-Api-Key: private-wrong-key\r\n")
        server.post(CHAT, chat("private BREAK"), key)
        raw = server.raw(request_bytes(chat(), key + "X-Request-Id: own.id-1\r\nConnection: close\r\n"))
        assert b"x-request-id: own.id-1\r\n" in raw.lower()
    text = caplog.text
    assert "mine-1 key-1 POST /v1/chat/completions 200" in text and "prompt=33 generated=16" in text
    assert not any(word in text for word in ("private", "secret", "FAKE", "a b"))


def test_a_clock_that_jumps_changes_nothing(monkeypatch):
    with running(service(FakeWorker(TOKENIZER, step=0.01))) as server:
        now = time.time
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(server.post(CHAT, chat("z" * 40, foveal={"deadline": 20})))
        )
        thread.start()
        for jump in (1e7, -1e7, 0.0):
            time.sleep(0.1)
            monkeypatch.setattr(time, "time", lambda jump=jump: now() + jump)
        thread.join()
        assert answers[0][0] == 200 and answers[0][1]["choices"][0]["message"]["content"] == "z" * 40


def test_a_template_that_runs_away_is_stopped():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer_fast = byte_tokenizer()
    prompts = Prompts(tokenizer_fast, seconds=0.3)
    prompts.tokenizer = tokenizer
    began = time.thread_time()
    with pytest.raises(ApiError, match="took too long"):
        prompts.chat(ChatRequest(messages=[{"role": "user", "content": "x"}]))
    assert time.thread_time() - began < 3
