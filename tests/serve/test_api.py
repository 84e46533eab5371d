"""The API as the official client and bare sockets see it, over an engine that says what a script tells it."""

# ruff: noqa: E402 - what is imported below needs the extras asked for above it

import json
import re
import time

import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(extra, reason=f"{extra} is part of the extra `serve`")
openai = pytest.importorskip("openai", reason="the official client is what the API is tested with")

from fake_worker import QUEUED, FakeWorker, byte_tokenizer
from http_server import running
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from foveal.serve.app import Service
from foveal.serve.limits import Limits
from foveal.serve.text import Text

TOKENIZER = byte_tokenizer()


def chat(text="hello", **more):
    return {"model": "fake", "messages": [{"role": "user", "content": text}], **more}


@pytest.fixture(scope="module")
def server():
    worker = FakeWorker(TOKENIZER)
    with running(Service(worker, TOKENIZER, name="fake", limits=Limits(ping=0.2, send_time=1.0))) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=20) as found:
        yield found


def joined(stream):
    chunks = list(stream)
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks


def test_whole_answer_through_the_official_client(client):
    found = client.chat.completions.create(**chat("héllo 你好 🎉"))
    choice = found.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == ("héllo 你好 🎉", "assistant", "stop")
    prompt = len("<user>héllo 你好 🎉<assistant>".encode())
    answer = len("héllo 你好 🎉".encode()) + 1  # the end of text is a token
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (prompt, answer)
    assert found.usage.total_tokens == prompt + answer
    assert found.usage.prompt_tokens_details.cached_tokens == 0
    assert found.usage.kept_tokens == (prompt + answer) // 2
    assert found.usage.queued_seconds == QUEUED


@settings(max_examples=20, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30).map(str.strip).filter(bool))
def test_streamed_is_whole_byte_for_byte(client, text):
    whole = client.chat.completions.create(**chat(text)).choices[0].message.content
    streamed, _ = joined(client.chat.completions.create(**chat(text), stream=True))
    assert streamed == whole == text


def test_stream_has_one_id_role_first_finish_last_and_usage_only_when_asked(client):
    text, chunks = joined(
        client.chat.completions.create(**chat("abc"), stream=True, stream_options={"include_usage": True})
    )
    assert text == "abc"
    assert len({c.id for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(c.choices[0].delta.role is None for c in chunks[1:-1])
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 4
    assert all(c.usage is None for c in chunks[:-1])
    _, plain = joined(client.chat.completions.create(**chat("abc"), stream=True))
    assert all(c.choices and c.usage is None for c in plain)


def test_frames_of_a_stream(server):
    body = json.dumps(chat("ab", stream=True)).encode()
    raw = server.raw(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    )
    head, _, rest = raw.partition(b"\r\n\r\n")
    assert b"text/event-stream" in head.lower() and b"x-accel-buffering: no" in head.lower()
    frames = re.sub(rb"(?m)^[0-9a-f]+\r\n", b"", rest).replace(b"\r\n", b"")  # out of the transfer's own chunks
    events = frames.decode().split("\n\n")
    assert events[-2] == "data: [DONE]" and events[-1] == ""
    assert all(json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_silence_is_filled_with_comments(server):
    server.worker.step = 0.5
    try:
        body = json.dumps(chat("a", stream=True)).encode()
        raw = server.raw(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
    finally:
        server.worker.step = 0.0
    assert raw.count(b": still here") >= 2 and b"[DONE]" in raw


STOPS = [("xxabcyy", ["abc"], "xx"), ("xxabyy", ["abc"], "xxabyy"), ("a你b", ["你"], "a"), ("aab", ["ab"], "a")]


@pytest.mark.parametrize(("text", "stop", "shown"), [*STOPS, ("xay", ["y", "a"], "x"), ("end", ["end"], "")])
def test_stop_strings_never_show(client, text, stop, shown):
    whole = client.chat.completions.create(**chat(text), stop=stop).choices[0]
    streamed, chunks = joined(client.chat.completions.create(**chat(text), stop=stop, stream=True))
    assert whole.message.content == streamed == shown
    assert whole.finish_reason == chunks[-1].choices[0].finish_reason == "stop"


@settings(max_examples=200, deadline=None)
@given(st.text("ab你", max_size=24), st.lists(st.text("ab你", min_size=1, max_size=4), max_size=3))
def test_stop_strings_as_a_whole_text_would_be_cut(text, stops):
    state = Text(lambda ids: TOKENIZER.decode(ids), stops)
    shown, stopped = "", False
    for token in TOKENIZER(text)["input_ids"]:
        piece, stopped = state.add(token)
        shown += piece
        assert not any(stop in shown for stop in stops)
        if stopped:
            break
    shown += state.flush()
    # What a reader of whole characters sees: the first moment at which some stop string is complete.
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    expected = (
        text if not ends else min((text[: ends[0] - len(s)] for s in stops if text[: ends[0]].endswith(s)), key=len)
    )
    assert (shown, stopped) == (expected, bool(ends))


def test_length_and_clamping(client, server):
    choice = client.chat.completions.create(**chat("abcdef"), max_tokens=3).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("abc", "length")
    choice = client.chat.completions.create(**chat("abcdef"), max_completion_tokens=2).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("ab", "length")
    # Half of a character is not shown while it may become whole, and is at the end.
    assert client.chat.completions.create(**chat("你"), max_tokens=2).choices[0].message.content == "\ufffd"
    room = server.worker.context - len("<user><assistant>")
    choice = client.chat.completions.create(**chat("x" * (room - 10)), max_tokens=10**9).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("x" * 10, "length")


def test_prompt_past_the_context_is_refused_before_the_stream(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**chat("x" * 2000), stream=True)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "messages" and "2,017" in str(caught.value) and "1,000" in str(caught.value)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake", prompt="x" * 2000)
    assert caught.value.param == "prompt"


def test_logprobs_add_up_to_the_text(client):
    options = {"logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**chat("a你b🎉"), **options).choices[0]
    entries = whole.logprobs.content
    assert "".join(e.token for e in entries) == "a你b🎉" and len(entries) == len("a你b🎉".encode())
    assert all(e.logprob == -0.5 and [t.logprob for t in e.top_logprobs] == [-1.0, -2.0] for e in entries)
    assert b"".join(bytes(e.bytes) for e in entries).decode() == "a你b🎉"
    _, chunks = joined(client.chat.completions.create(**chat("a你b🎉"), **options, stream=True))
    streamed = [e for c in chunks if c.choices and c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert [e.token for e in streamed] == [e.token for e in entries]
    # Text that is held back to the end belongs to the last token.
    cut = client.chat.completions.create(**chat("你"), **options, max_tokens=2).choices[0]
    assert "".join(e.token for e in cut.logprobs.content) == cut.message.content == "\ufffd"


def test_completions_with_several_prompts_and_logprobs(client, server):
    found = client.completions.create(model="fake", prompt=["<user>ab", "<user>cd"], n=2, logprobs=1, max_tokens=9)
    assert [c.text for c in found.choices] == ["ab", "ab", "cd", "cd"]
    assert [c.index for c in found.choices] == [0, 1, 2, 3]
    assert found.usage.prompt_tokens == 16  # each prompt once
    assert found.usage.completion_tokens == 4 * 3
    assert found.choices[0].logprobs.tokens == ["a", "b"] and found.choices[0].logprobs.text_offset == [0, 1]
    ids = TOKENIZER("<user>xyz")["input_ids"]
    assert client.completions.create(model="fake", prompt=ids).choices[0].text == "xyz"
    streamed = client.completions.create(model="fake", prompt=ids, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == "xyz"


def test_choices_have_their_own_seeds(client, server):
    client.chat.completions.create(**chat(), n=3, seed=2**63 - 2)
    assert [r.sampling.seed for r in server.worker.requests[-3:]] == [2**63 - 2, 2**63 - 1, 0]


def test_what_a_request_says_reaches_the_engine(client, server):
    options = {"temperature": 0.25, "top_p": 0.5, "frequency_penalty": -1.0, "presence_penalty": 1.5, "stop": "q"}
    extra = {"foveal": {"method": "half", "budget": 0.25, "deadline": 5}}
    client.chat.completions.create(**chat(), **options, extra_body=extra)
    request = server.worker.requests[-1]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.stop) == (0.25, 0.5, ("q",))
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.logprobs) == (-1.0, 1.5, None)
    assert (request.method, request.budget) == ("half", 0.25)
    assert 0 < request.deadline - time.monotonic() < 5
    client.chat.completions.create(**chat())
    assert server.worker.requests[-1].sampling.temperature == 1.0  # OpenAI's default


def test_roles_and_parts_become_the_template_s_text(client, server):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None},
        {"role": "user", "content": "d"},
    ]
    client.chat.completions.create(model="fake", messages=messages)
    assert (
        TOKENIZER.decode(server.worker.requests[-1].prompt_ids)
        == "<system>be brief<user>ab<assistant>c<user>d<assistant>"
    )


REFUSED = [
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"n": 5_000_000}, "n"),
    ({"n": 1.5}, "n"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": True}, "best_of"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs.chat_template"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": "yes"}, "stream"),
    ({"foveal": {"method": "nope"}}, "foveal"),
    ({"foveal": {"budget": 0.3}}, "foveal"),
    ({"foveal": {"path": "/etc/passwd"}}, "foveal.path"),
    ({"foveal": {"deadline": 0}}, "foveal.deadline"),
    ({"generation_config": "x/y"}, "generation_config"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages.0.name"),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}
            ]
        },
        None,
    ),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}, "messages"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda v: json.dumps(v)[:40])
def test_every_field_is_honoured_or_refused_by_name(server, fields, param):
    before = len(server.worker.requests)
    status, body = server.post("/v1/chat/completions", chat() | fields)
    assert status == 400 and set(body["error"]) == {"message", "type", "param", "code"}
    assert param is None or body["error"]["param"] == param
    assert body["error"]["code"] and body["error"]["type"] == "invalid_request_error"
    assert len(server.worker.requests) == before


def test_fields_that_say_nothing_are_taken(server):
    neutral = {
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "logit_bias": None,
        "store": False,
    }
    ignored = {"user": "someone", "metadata": {"a": "b"}}
    assert server.post("/v1/chat/completions", chat() | neutral | ignored | {"n": None, "seed": None})[0] == 200


def test_errors_of_routes_models_and_methods(client, server):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(**(chat() | {"model": "meta/other"}))
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert client.models.retrieve("fake").foveal["methods"]["half"] == "h2o(budget=0.5)"
    assert [m.id for m in client.models.list()] == ["fake"]
    assert server.post("/v1/nope", {})[0] == 404
    assert server.post("/v1/models", {})[0] == 405
    assert server.post("/v1/chat/completions", b"{}", "", 5)[1]["error"]["code"] == "missing_required_parameter"


def test_one_request_that_breaks_hurts_no_other(client):
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(**chat("BREAK"))
    assert caught.value.code == "engine_error"
    with pytest.raises(openai.APIError):
        list(client.chat.completions.create(**chat("BREAK"), stream=True))
    assert client.chat.completions.create(**chat("fine")).choices[0].message.content == "fine"


def test_deadline(server):
    server.worker.step = 0.05
    try:
        status, body = server.post("/v1/chat/completions", chat("x" * 200, foveal={"deadline": 0.2}))
    finally:
        server.worker.step = 0.0
    assert (status, body["error"]["code"]) == (504, "deadline_exceeded")
    assert server.idle()


def test_pictures_of_kept_keys_come_with_a_stream_that_asks(client, server):
    server.worker.step = 0.02
    try:
        stream = client.chat.completions.create(**chat("x" * 40), stream=True, extra_body={"foveal": {"picture": True}})
        pictures = [c.foveal for c in stream if getattr(c, "foveal", None)]
    finally:
        server.worker.step = 0.0
    assert pictures and len(pictures[0]["kept"]) == 12 and len(pictures[0]["kept"][0]) == 3
    assert pictures[-1]["tokens"] > pictures[0]["tokens"]


def numbers(server):
    from urllib.request import urlopen

    text = urlopen(server.url + "/metrics").read().decode()
    return {
        (s.name, *sorted(s.labels.items())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_metrics_are_exact_after_ten_requests():
    with running(Service(FakeWorker(TOKENIZER), TOKENIZER, name="fake")) as server:
        for _ in range(8):
            assert server.post("/v1/chat/completions", chat("abc"))[0] == 200
        assert server.post("/v1/chat/completions", chat("BREAK"))[0] == 500
        assert server.post("/v1/chat/completions", chat(n=0))[0] == 400
        found = numbers(server)
    route = ("route", "/v1/chat/completions")
    assert found["foveal_requests_total", route, ("status", "200")] == 8
    assert found["foveal_requests_total", route, ("status", "500")] == 1
    assert found["foveal_requests_total", route, ("status", "400")] == 1
    assert found["foveal_generations_total", ("reason", "stop")] == 8
    assert found["foveal_generations_total", ("reason", "error")] == 1
    assert found["foveal_generation_tokens_total",] == 8 * 4
    assert found["foveal_prompt_tokens_total",] == 8 * len("<user>abc<assistant>")
    assert found["foveal_time_to_first_token_seconds_count",] == 8
    assert found["foveal_inter_token_latency_seconds_count",] == 8 * 2
    assert found["foveal_e2e_request_latency_seconds_count",] == 8
    assert found["foveal_queue_time_seconds_sum",] == pytest.approx(8 * QUEUED)
    assert found["foveal_queue_time_seconds_bucket", ("le", "0.25")] == 0
    assert found["foveal_queue_time_seconds_bucket", ("le", "0.5")] == 8
    assert found["foveal_requests_running",] == found["foveal_requests_waiting",] == 0
    assert found["foveal_kv_bytes", ("kind", "allocated")] == 0
    assert found["foveal_engine_up",] == 1
