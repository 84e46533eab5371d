"""The engine in its thread: streams, limits, draining, death and what comes after."""

import asyncio
import threading
import time

import pytest
from serve_engines import CHUNK, METHODS, Letters, model, prompt, solo

from foveal.errors import InputError
from foveal.serve import Full, Request, Sampling, Unavailable, Worker


@pytest.fixture
def worker():
    with Worker(model(), Letters(), chunk=CHUNK, allow=METHODS, max_waiting=4, max_running=2, max_per_key=5) as w:
        yield w


def ask(w, id: str, length: int = 40, tokens: int = 8, key: str = "", method: str = "dense", **more):
    return w.submit(Request(id, prompt(length), Sampling(max_tokens=tokens, **more), method, key=key))


def gone(w, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        s = w.stats()
        if (s.running, s.waiting, s.bytes_used) == (0, 0, 0):
            return True
        time.sleep(0.01)
    return False


def test_streams_are_read_from_a_loop_and_from_a_thread(worker):
    async def read(stream):
        return [e async for e in stream]

    async def both():
        streams = [ask(worker, f"a{i}", 33 + i, method=m) for i, m in enumerate(("dense", "h2o"))]
        return await asyncio.gather(*map(read, streams))

    got = asyncio.run(both())
    for i, (method, events) in enumerate(zip(("dense", "h2o"), got, strict=True)):
        assert [e.token for e in events[:-1]] == solo(method, 33 + i, 0, 8)[0]
        assert events[-1].finish == "length" and events[-1].usage.completion == 8
    assert [e.token for e in ask(worker, "b", 33)][:-1] == solo("dense", 33, 0, 8)[0]
    assert list(ask(worker, "b", 33))[-1].kind == "end"  # the id is free again
    assert gone(worker)
    stats = worker.stats()
    assert stats.finished == {"length": 4} and stats.completion_tokens == 32
    assert stats.prompt_tokens == 33 + 34 + 33 + 33 and stats.alive and stats.bytes_limit == 2 << 30


def test_the_queue_and_a_keys_share_are_bounded(worker):
    hold = [ask(worker, f"r{i}", tokens=400) for i in range(2)]
    while worker.stats().running < 2:
        time.sleep(0.005)
    hold += [ask(worker, f"w{i}", tokens=400) for i in range(3)]
    with pytest.raises(Full, match="this key has 5"):
        ask(worker, "one too many")
    assert not worker.full
    hold.append(ask(worker, "w3", tokens=400, key="other"))
    assert worker.full
    start = time.perf_counter()
    with pytest.raises(Full, match="4 requests are waiting") as caught:
        ask(worker, "x", key="third")
    assert time.perf_counter() - start < 0.1 and 1 <= caught.value.retry_after <= 60
    with pytest.raises(InputError, match="is running"):
        ask(worker, "r0", key="third")
    for stream in hold:
        stream.cancel()
    assert all(list(s)[-1].finish == "cancelled" for s in hold)
    assert gone(worker) and list(ask(worker, "x"))[-1].finish == "length"


def test_kept_keys_can_be_asked_for_while_it_runs(worker):
    stream = ask(worker, "k", 97, 300, method="snapkv")
    while not (kept := worker.kept("k")):
        time.sleep(0.005)
    assert [len(layer) for layer in kept] == [2, 2, 2] and worker.kept("nobody") is None
    stream.cancel()
    assert list(stream)[-1].usage.kept < 97 + 300


def test_draining_ends_what_was_accepted_and_takes_no_more(worker):
    streams = [ask(worker, str(i), tokens=30) for i in range(3)]
    assert not worker.drain(timeout=0.0)
    with pytest.raises(Unavailable, match="shutting down"):
        ask(worker, "late")
    assert worker.stats().draining and worker.drain(timeout=20)
    assert all(list(s)[-1].finish == "length" for s in streams)


def test_death_is_visible_told_to_everybody_and_can_be_mended(worker):
    streams = [ask(worker, str(i), tokens=400) for i in range(4)]
    next(streams[0])

    def die():
        raise MemoryError("gone")

    worker._engine.step = die
    ends = [list(s)[-1] for s in streams]
    assert all(e.kind == "error" and "MemoryError: gone" in e.text for e in ends)
    worker._thread.join(5)
    stats = worker.stats()
    assert not worker.alive and not stats.alive and "MemoryError" in stats.why
    assert (stats.running, stats.waiting, stats.bytes_used) == (0, 0, 0)
    assert worker.kept("0") is None and not worker.drain(0.1)
    assert model().config._attn_implementation != "foveal"
    with pytest.raises(Unavailable, match="MemoryError"):
        ask(worker, "x")
    worker.restart()
    assert worker.alive and worker.stats().why is None
    assert [e.token for e in ask(worker, "x")][:-1] == solo("dense", 40, 0, 8)[0]
    with pytest.raises(Unavailable, match="is alive"):
        worker.restart()
    worker.close()
    assert model().config._attn_implementation != "foveal" and not worker.alive


def test_closing_tells_those_who_still_wait():
    w = Worker(model(), Letters(), chunk=CHUNK)
    stream = w.submit(Request("a", prompt(40), Sampling(max_tokens=400)))
    w.close()
    assert list(stream)[-1].kind == "error" and not w.alive
    with pytest.raises(Unavailable):
        w.submit(Request("b", prompt(40)))


def test_many_threads_may_ask_at_once():
    with Worker(model(), Letters(), chunk=CHUNK, max_waiting=64) as w:
        got = {}

        def run(i):
            got[i] = [e.token for e in w.submit(Request(str(i), prompt(20 + i % 3), Sampling(max_tokens=6)))][:-1]

        threads = [threading.Thread(target=run, args=(i,)) for i in range(16)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        assert all(got[i] == solo("dense", 20 + i % 3, 0, 6)[0] for i in range(16)) and gone(w)


def test_bad_settings_are_named():
    with pytest.raises(InputError, match="at least 1"):
        Worker(model(), Letters(), max_waiting=0)
