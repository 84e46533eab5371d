"""The load script in short form: its clients against a scripted engine, and the counts they come back with."""

# ruff: noqa: E402 - what is imported below needs the extras asked for above it

import argparse
import asyncio
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

for extra in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(extra, reason=f"{extra} is part of the extra `serve`")
pytest.importorskip("httpx", reason="the load script's clients use httpx")

from fake_worker import BYTES, FakeWorker, byte_tokenizer
from http_server import running

sys.path.insert(0, str(Path(__file__).parents[2]))  # the scripts are no part of the package
from benchmarks.serve_clients import Load, drive, memory, metrics, quantiles
from benchmarks.serve_load import Watch, main, measure, of_foveal
from benchmarks.serve_load_held import fill
from foveal.serve.app import Service

TOKENIZER = byte_tokenizer()


def test_load_counts_what_the_server_counts():
    worker = FakeWorker(TOKENIZER, step=0.01, context=10_000, max_running=4, max_waiting=2)
    with running(Service(worker, TOKENIZER, name="fake", max_waiting=64)) as server:
        load = asyncio.run(drive(server.url, "fake", clients=12, seconds=3.0, lengths=[20, 60], answer=5))
        found = metrics(server.url)
        assert load.errors == {} and load.done > 4
        assert load.refused > 0  # six places for twelve clients
        assert found['foveal_requests_total{route="/v1/chat/completions",status="429"}'] == load.refused
        assert found['foveal_requests_total{route="/v1/chat/completions",status="200"}'] == load.done
        assert found["foveal_generation_tokens_total"] == load.tokens == load.chunks == 5 * load.done
        assert len(load.first) == len(load.each) == load.done and len(load.between) == 4 * load.done
        assert server.idle()


def test_what_ends_before_the_window_is_not_counted():
    with running(Service(FakeWorker(TOKENIZER, step=0.01, context=10_000), TOKENIZER, name="fake")) as server:
        load = Load(begin=time.monotonic() + 1.0)
        asyncio.run(drive(server.url, "fake", clients=2, seconds=3.0, lengths=[20], answer=5, load=load))
        answered = metrics(server.url)['foveal_requests_total{route="/v1/chat/completions",status="200"}']
    assert 0 < load.done < answered
    assert load.tokens == 5 * load.done and load.errors == {}


def test_a_row_of_the_table():
    options = argparse.Namespace(clients=3, lengths=[100], answer=40, warmup=0.3, seconds=4.0, sample=0.1, foveal=True)
    written = []
    worker = FakeWorker(TOKENIZER, step=0.02, context=10_000)
    with running(Service(worker, TOKENIZER, name="fake")) as server:
        row = measure(server.url, "fake", os.getpid(), options, written.append)
        row |= of_foveal(server.url, 100, 10**6)
        assert (worker.stats().running, worker.stats().bytes_used) == (0, 0)
    assert row["errors"] == {} and row["requests"] > 0 and row["hung_up_at_the_end"] > 0
    assert row["back_to_zero"] and row["kv_bytes_when_idle"] == 0 and row["seconds_to_idle"] < 10
    assert row["first_token_s"]["p99"] >= row["first_token_s"]["p50"] > 0
    assert 0.015 < row["between_chunks_s"]["p50"] < 2 and 0.015 < row["per_token_s"]["p50"] < 2
    assert row["most"]["running"] == 3 and row["resident_bytes"]["flat"] and row["mean_answer_tokens"] == 40
    assert len(written) > 2 and written[0]["requests"] < row["requests"]
    held = row["bytes_held"]
    assert row["conversation_tokens"] > row["mean_prompt_tokens"]
    assert BYTES * (row["conversation_tokens"] - 48) < held <= BYTES * row["conversation_tokens"]
    assert row["conversations_in_cache"] == int(1 + (10**6 * 15 / 16 - row["bytes_while_read"]) / held)


def test_growing_memory_is_not_flat():
    watch = Watch("", 0, 0.0)
    watch.rows = [[float(i), 1000 + 10 * max(0, i - 30), i, 2, 1] for i in range(-5, 60)]
    found = watch.found()
    assert found["resident_bytes"]["growth"] > 0.1 and not found["resident_bytes"]["flat"]
    watch.rows = [[float(i), 1000 + 10 * min(i, 15), i, 2, 1] for i in range(60)]  # grows, then stays
    assert watch.found()["resident_bytes"]["flat"] and watch.found()["most"]["kv_bytes"] == 59


def test_memory_counts_children():
    code = "import time; x = bytearray(60_000_000); time.sleep(20)"
    before = memory(os.getpid())
    assert before > 10**7
    child = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"]
    )
    try:
        end = time.monotonic() + 15
        while memory(os.getpid()) < before + 60_000_000:
            assert time.monotonic() < end
            time.sleep(0.1)
    finally:
        child.kill()


def test_errors_are_told_apart():
    with running(Service(FakeWorker(TOKENIZER, context=30), TOKENIZER, name="fake")) as server:
        load = asyncio.run(drive(server.url, "fake", clients=1, seconds=0.7, lengths=[100], answer=4))
        assert set(load.errors) == {"400"} and load.done == 0
    assert quantiles([1.0]) is None and quantiles([1.0, 3.0])["p50"] == 2.0 and Load().tokens == 0


def test_runs_are_gathered_into_one_file(tmp_path):
    def file(arm, clients):
        row = {"requests_per_minute": 6.0, "tokens_per_second": 7.5, "errors": {"500": 2}, "conversations_in_cache": 27}
        row |= {"first_token_s": {"p50": 1.0, "p99": 2.0}, "resident_bytes": {"flat": False}}
        path = tmp_path / f"{arm}.json"
        path.write_text(
            json.dumps(
                {"meta": {"versions": {}}, "arm": arm, "settings": {"clients": clients}, "complete": True, "row": row}
            )
        )
        return str(path)

    out = tmp_path / "all.json"
    main(["gather", file("transformers", 64), file("dense", 64), "--out", str(out)])
    assert list(json.loads(out.read_text())["servers"]) == ["dense", "transformers"]
    with pytest.raises(SystemExit, match="same settings"):
        main(["gather", file("dense", 64), file("half", 8), "--out", str(out)])


def test_a_full_server_holds_who_is_answered():
    """Three places; the second conversation ends, and another takes its place."""
    texts = [TOKENIZER(f"{i} and a text")["input_ids"] for i in range(5)]

    def script(request):
        return [65] * 4 if request.prompt_ids == texts[1] else itertools.repeat(65)

    worker = FakeWorker(TOKENIZER, script, step=0.02, context=10_000, max_running=3)
    with running(Service(worker, TOKENIZER, name="model")) as server:
        found = asyncio.run(fill(server.url, texts, settle=8, seconds=30))
        assert (found["held"], found["running"], found["most_running"], found["waiting"]) == (3, 3, 3, 1)
        assert found["ended"] == 1 and found["stepped_back"] == 0
        assert found["kv_bytes"] >= BYTES * 3 * len(texts[0])
        assert server.idle()
        with pytest.raises(RuntimeError, match="not full with 3 of 3"):
            asyncio.run(fill(server.url, [texts[0], *texts[2:4]], settle=8, seconds=30))
        with pytest.raises(RuntimeError, match="status 400"):
            asyncio.run(fill(server.url, [[10**6]], seconds=30))
