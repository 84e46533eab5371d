"""What ranks say to each other arrives as it was said, and nothing but that: no pickle, no other JSON, no endless frame."""

import json
import math
import os
import pickle
import socket
import struct
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

pytest.importorskip("pydantic", reason="pydantic comes with the extra `serve`")

from hypothesis import given
from hypothesis import strategies as st

import foveal
from foveal.serve.ranks import _FOLLOW
from foveal.serve.request import Request, Sampling
from foveal.serve.sampling import Choice
from foveal.serve.together import JOB, Job
from foveal.serve.wire import ALL_BROUGHT, BROUGHT, CHOSEN, LARGEST, ORDER, Failed, Garbled, Wire
from foveal.store import Layout

FORMS = {"order": ORDER, "chosen": CHOSEN, "brought": BROUGHT, "all brought": ALL_BROUGHT, "job": JOB}
WARM = Sampling(1.3, 0.9, 2**63 - 1, 7, ("é\n", '"', "\u2028"), 20, -2.0, 1.0)
ASKED = Request("a-1", [0, 1, 2**31], WARM, "h2o", 0.5, "key", 12.25)
LINES = {"method": "h2o(budget=0.5)", "budgets": [0.25, 512, 1.0], "context": None, "prefix": True}

SAID = [
    (ORDER, ("step", [ASKED, Request("b", [5], budget=512)], [("c", "cancelled"), ("d", "deadline")])),
    (ORDER, ("step", [], [])),
    (ORDER, ("kept", "a-1")),
    (ORDER, ("close",)),
    (CHOSEN, [Choice(3), Choice(5, -math.inf, ((5, -0.1), (7, -math.inf)))]),
    (BROUGHT, 3 << 40),
    (BROUGHT, "ready"),
    (BROUGHT, [[1, 2], [3, 4]]),
    (BROUGHT, None),
    (BROUGHT, Failed("it cannot: say so")),
    (ALL_BROUGHT, [True, False]),
    (ALL_BROUGHT, [None, [[1]]]),
    (JOB, (Job(None, "cpu", "bfloat16", {"name": "x", "layers": 3}, Layout(True, "int8", 32), LINES),)),
    (JOB, (Job("folder", "cuda", None, None, None, {}),)),
]


@pytest.fixture
def ends():
    """A wire's end to hear, and a connection to send it anything."""
    here, there = socket.socketpair()
    hearing, sending = Wire(here.detach()), Connection(there.detach())
    yield hearing, sending
    hearing.close()
    sending.close()


@pytest.fixture
def evil(tmp_path):
    """Something whose pickle makes a file when it is loaded, and that file."""
    trace = tmp_path / "it ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    pickle.loads(pickle.dumps(Evil()))
    assert trace.exists()  # it would
    trace.rmdir()
    return Evil(), trace


def said_and_heard(form, message):
    here, there = map(Wire, (end.detach() for end in socket.socketpair()))
    try:
        there.say(message)
        return here.hear(form)
    finally:
        here.close()
        there.close()


@pytest.mark.parametrize(("form", "message"), SAID, ids=lambda x: repr(x)[:30] if not hasattr(x, "kind") else "")
def test_what_is_said_is_heard(form, message):
    found = said_and_heard(form, message)
    assert found == message and repr(found) == repr(message)  # the kinds of numbers, tuples and classes as well


NUMBERS = st.floats(allow_nan=False) | st.none()
TOPS = st.lists(st.tuples(st.integers(0, 2**31), st.floats(allow_nan=False)), max_size=3).map(tuple)


@given(st.lists(st.builds(Choice, st.integers(0, 2**31), NUMBERS, TOPS), max_size=5))
def test_choices_arrive_to_the_last_bit(choices):
    assert repr(said_and_heard(CHOSEN, choices)) == repr(choices)


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_a_pickle_is_refused_and_nothing_in_it_runs(form, ends, evil):
    hearing, sending = ends
    thing, trace = evil
    sending.send(thing)  # as multiprocessing writes it
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        sending.send_bytes(pickle.dumps(thing, protocol))
        sending.send_bytes(json.dumps(pickle.dumps(thing, protocol).decode("latin-1")).encode())
    for _ in range(1 + 2 * (pickle.HIGHEST_PROTOCOL + 1)):
        with pytest.raises(Garbled):
            hearing.hear(form)
    assert not hearing.waits(0) and not trace.exists()


def step(**request):
    return ["step", [{"id": "a", "prompt_ids": [1]} | request], []]


@pytest.mark.parametrize(
    ("form", "frame", "kind"),
    [
        (ORDER, b"", "json_invalid"),
        (ORDER, b"\xff\xfe", "json_invalid"),
        (ORDER, b"[" * 60_000, "json_invalid"),
        (ORDER, b'["kept", "\\ud800"]', "json_invalid"),
        (ORDER, ["run", "secret"], "literal_error"),
        (ORDER, ["close", "secret"], "too_long"),
        (ORDER, {"step": "secret"}, "tuple_type"),
        (ORDER, step(secret="secret"), "unexpected_keyword_argument"),
        (ORDER, step(prompt_ids=["1"]), "int_type"),
        (ORDER, step(prompt_ids=[True]), "int_type"),
        (ORDER, step(sampling={"temperature": 9}), "value_error"),  # by its own check
        (ORDER, ["step", [], [["a", "secret"]]], "literal_error"),
        (CHOSEN, ["secret"], "type"),
        (CHOSEN, [["1", None, []]], "int_type"),
        (BROUGHT, "secret", "literal_error"),
        (BROUGHT, 1.5, "int_type"),
        (ALL_BROUGHT, [{"sentence": "secret"}], "literal_error"),
        (JOB, [{"source": "secret"}], "missing"),
    ],
    ids=lambda x: repr(x)[:40] if isinstance(x, bytes | list | dict) else "",
)
def test_what_is_no_message_is_refused_without_a_word_of_it(form, frame, kind, ends, caplog):
    hearing, sending = ends
    sending.send_bytes(frame if isinstance(frame, bytes) else json.dumps(frame).encode())
    with pytest.raises(Garbled, match=kind) as found:
        hearing.hear(form)
    (line,) = caplog.messages
    assert line.startswith("a message between ranks cannot be read") and kind in line and "\n" not in line
    assert "secret" not in line + str(found.value) and found.value.__context__ is None


@pytest.mark.parametrize("length", [LARGEST + 1, 1 << 62])
def test_a_frame_that_is_too_large_is_not_waited_for(length, ends):
    hearing, sending = ends
    os.write(sending.fileno(), struct.pack("!i", length) if length < 1 << 31 else struct.pack("!iQ", -1, length))
    sending.close()
    with pytest.raises(Garbled, match="length"):
        hearing.hear(ORDER)


def test_a_line_that_is_cut_is_no_message(ends):
    hearing, sending = ends
    sending.close()
    with pytest.raises(EOFError):
        hearing.hear(ORDER)


def test_a_rank_that_is_sent_a_pickle_ends_with_a_line_in_the_log(evil, tmp_path):
    thing, trace = evil
    (mine, its), (reading, writing) = socket.socketpair(), os.pipe()
    numbers = (its.fileno(), reading)
    with Connection(mine.detach()) as sending, its:
        sending.send((thing,))
        rank = subprocess.run(
            [sys.executable, "-c", _FOLLOW, "1", "2", *map(str, numbers), str(tmp_path / "folder")],
            pass_fds=numbers,
            env=os.environ | {"PYTHONPATH": str(Path(foveal.__file__).parents[1])},
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    os.close(reading)
    os.close(writing)
    assert rank.returncode == 1 and not trace.exists()
    assert (
        rank.stderr.strip().splitlines()[-1] == "a message between ranks cannot be read (json_invalid): this one stops"
    )
    assert "Traceback" not in rank.stderr
