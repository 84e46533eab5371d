"""One model held by two processes: what it says is what one process says, and it ends as a whole."""

import asyncio
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import tiny

pytest.importorskip("accelerate", reason="transformers cuts weights with accelerate")
pytest.importorskip("pydantic", reason="pydantic comes with the extra `serve`")

from fake_worker import byte_tokenizer
from serve_engines import engine, finish, put, tokens
from serve_engines import prompt as letters
from transformers import AutoConfig

import foveal
from foveal.errors import InputError
from foveal.hub import model_identity
from foveal.method import get_method
from foveal.profile import Profile
from foveal.serve import Request, Sampling, Unavailable, Worker
from foveal.serve.ranks import Alone
from foveal.serve.shards import check_apart, check_shards
from foveal.serve.together import start

CPU = torch.device("cpu")
METHODS = {
    "dense": "dense",
    "snapkv": "snapkv(budget=0.4, window=8)",
    "streaming": "streaming-llm(budget=24)",
    "h2o": "h2o(budget=0.5)",
}
MEMORY = 380_000  # bytes: too few for all that are asked at once
SETTINGS = {"allow": METHODS, "chunk": 32, "memory": MEMORY}
ASKED = [("dense", 40), ("dense", 130), ("snapkv", 97), ("streaming", 60), ("h2o", 70), (None, 80)]


def model(**more):
    return tiny("llama", vocab_size=300, num_attention_heads=12, num_key_value_heads=4, head_dim=8, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("tiny")
    model().save_pretrained(found)
    byte_tokenizer().save_pretrained(found)
    return found


@pytest.fixture(scope="module", autouse=True)
def environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(foveal.__file__).parents[1]))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def prompt(length):
    return torch.randint(2, 250, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def ask(worker, id, length, tokens=24, method=None, **more):
    return worker.submit(Request(id, prompt(length), Sampling(max_tokens=tokens, **more), method))


def answer(stream):
    found = list(stream)
    assert found[-1].kind == "end", found[-1]
    usage = found[-1].usage
    return [(e.token, e.text) for e in found[:-1]], found[-1].finish, usage.completion, usage.kept, usage.cached


def answers(worker):
    """Greedy answers of all methods at once, one that is drawn, and one to a prompt whose beginning is known."""
    streams = [ask(worker, str(i), n, method=m) for i, (m, n) in enumerate(ASKED)]
    streams.append(ask(worker, "drawn", 50, temperature=1.0, seed=7))
    found = [answer(s) for s in streams]
    return found + [answer(ask(worker, "again", 130, method="dense")) for _ in range(2)]


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def others():
    """Processes that this one has started and that still run."""
    found = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    ids = {int(p) for f in found for p in f.read_text().split()}
    return {p for p in ids if b"together" in Path(f"/proc/{p}/cmdline").read_bytes()}


def test_two_processes_say_what_one_says_until_one_is_killed(folder, tmp_path):
    profile = Profile(get_method("streaming-llm", budget=0.5), model_identity(model()))
    with Worker(*foveal.load(folder, device="cpu"), method="streaming-llm", budget=0.5, **SETTINGS) as one:
        wanted = answers(one)
    two, _ = start(folder, 2, device="cpu", profile=profile, **SETTINGS)
    try:
        (other,) = others()
        assert answers(two) == wanted and wanted[-1][-1] == 96  # tokens that were known
        stats = two.stats()
        assert stats.preemptions > 0 and stats.prefix_hits > 0 and stats.bytes_limit == MEMORY
        _drawn_in_step(two)
        _cancelled_and_seen(two)
        streams = [ask(two, f"last {i}", 40, 400) for i in range(3)]
        next(streams[0])
        os.kill(other, signal.SIGKILL)
        assert [list(s)[-1].text for s in streams] == ["the engine stopped (rank 1 of 2 ended with exit code -9)"] * 3
        assert not two.alive and two.stats().finished["error"] == 3
        with pytest.raises(Unavailable, match="rank 1 of 2"):
            ask(two, "late", 40)
        with pytest.raises(Unavailable, match="start the server anew"):
            two.restart()
    finally:
        two.close()
    assert until(lambda: not others())


def test_a_pickle_among_the_messages_ends_the_whole_and_does_not_run(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)

    two, _ = start(folder, 2, device="cpu", **SETTINGS)
    try:
        assert answer(ask(two, "first", 40))
        (wire,) = two.ranks._links
        wire._line.send(Evil())  # while the other rank waits for an order
        assert until(lambda: not two.alive)
        assert two.stats().why == "rank 1 of 2 ended with exit code 1"
    finally:
        two.close()
    assert until(lambda: not others()) and not (tmp_path / "it ran").exists()


def _drawn_in_step(two):
    """Without a seed only rank 0 knows what was drawn, and the others must go on with just that: else log-probabilities are off."""
    found = list(ask(two, "hot", 40, method="dense", temperature=1.5, logprobs=0))[:-1]
    ids = torch.tensor([prompt(40) + [e.token for e in found]])
    with torch.no_grad():
        logs = model()(ids).logits[0, 39:-1].log_softmax(-1).gather(1, ids[0, 40:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([e.logprob for e in found]), logs, atol=1e-3, rtol=0)


def _cancelled_and_seen(two):
    stream = ask(two, "k", 90, 400, "h2o")
    next(stream)
    kept = two.kept("k")
    assert [len(layer) for layer in kept] == [4, 4, 4]  # the heads of both
    stream.cancel()
    assert list(stream)[-1].finish == "cancelled"
    assert until(lambda: two.stats().bytes_used == 0) and two.kept("k") is None
    before = two.stats().finished
    expired = two.submit(Request("d", prompt(40), Sampling(max_tokens=400), deadline=time.monotonic() + 0.2))
    assert list(expired)[-1].finish == "deadline"
    assert two.stats().finished == before | {"deadline": 1}


def test_a_profile_of_another_model_is_refused_and_nobody_is_left(folder):
    profile = Profile(get_method("streaming-llm", budget=0.5), model_identity(tiny("llama")))
    with pytest.raises(InputError, match="was made for"):
        start(folder, 2, device="cpu", profile=profile, **SETTINGS)
    assert until(lambda: not others())


def test_models_whose_heads_cannot_be_shared_are_refused(folder):
    config = AutoConfig.from_pretrained(folder)
    check_shards(config, 2, CPU)
    check_shards(config, 4, CPU)
    with pytest.raises(InputError, match="4 KV heads, which 3 processes cannot share evenly: choose 2 or 4"):
        start(folder, 3, device="cpu")
    with pytest.raises(InputError, match="ships no plan that cuts the attention of 'phi3'"):
        check_shards(tiny("phi3").config, 2, CPU)
    with pytest.raises(InputError, match="leave the number out"):
        check_shards(config, 2, torch.device("cuda:1") if torch.cuda.device_count() > 1 else torch.device("cpu:1"))
    assert not others()


@pytest.mark.parametrize("spec", ["ada-kv(budget=0.5)", "tidal(budget=0.5)", "duo", "moa"])
def test_methods_that_look_across_heads_or_know_their_numbers_are_refused(spec):
    with pytest.raises(InputError, match=f"'{spec.partition('(')[0]}.*--tensor-parallel out"):
        check_apart([None, get_method("streaming-llm"), get_method(spec)], model().config)


def test_methods_that_judge_every_head_by_itself_are_not():
    check_apart(map(get_method, ("snapkv(budget=512)", "h2o", "quest | streaming-llm(budget=64)")), model().config)


def test_what_the_fullest_process_holds_decides_for_all():
    class Fuller(Alone):
        """Another process holds three times as much."""

        def most(self, number):
            return 3 * number

    found = {}
    for ranks in (Alone(), Fuller()):
        e = engine(memory=1_100_000, ranks=ranks)
        try:
            streams = [put(e, str(i), letters(100, i), 30) for i in range(3)]
            finish(e)
            found[type(ranks)] = [tokens(s) for s in streams]
            assert (e.schedule.preemptions > 0) == isinstance(ranks, Fuller)
            assert e.used == sum(x.store.nbytes for x in e.prefixes.entries.values()) * ranks.most(1)
        finally:
            e.close()
    assert found[Alone] == found[Fuller]


def test_a_server_process_ends_when_its_engine_died_and_not_before(monkeypatch):
    for extra in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(extra, reason=f"{extra} is part of the extra `serve`")
    from foveal.serve.run import end_with

    states, ended = [None, None, "rank 1 of 2 ended"], []
    worker = SimpleNamespace(stats=lambda: SimpleNamespace(why=states.pop(0)))
    monkeypatch.setattr(os, "_exit", ended.append)
    asyncio.run(end_with(worker, every=0.001, grace=0.001))
    assert ended == [1] and not states
