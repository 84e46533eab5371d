"""The engine: what a request comes to never depends on who else is there, when it came, or whether it had to step back."""

import pickle
import random
import time
from collections import Counter

import pytest
import torch
from models import MAX_POSITIONS, tiny
from serve_engines import CHUNK, METHODS, Letters, engine, events, finish, model, prompt, put, solo, tokens

from foveal.errors import InputError
from foveal.serve.engine import Engine
from foveal.serve.request import Full, NotAllowed, Request, Sampling, Stream, TooLong
from foveal.store import Layout

LAYOUTS = [None, Layout(paged=True)]
CLOSE = {"rtol": 0, "atol": 1e-4}  # of log-probabilities; products over batches of other sizes round differently


def generated(ids: list[int], count: int, of=None) -> list[int]:
    """What transformers itself generates."""
    x = torch.tensor([ids])
    got = (of or model()).generate(x, attention_mask=torch.ones_like(x), max_new_tokens=count, do_sample=False)
    return got[0, len(ids) :].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_budget_is_generate_of_transformers(layout):
    lengths = (1, 2, 31, 33, 34, 65, 150)
    wanted = {n: generated(prompt(n), 10) for n in lengths}
    e = engine(allow={"dense": "dense", "snapkv": "snapkv(budget=1.0)", "h2o": "h2o(budget=1.0)"}, layout=layout)
    with e.session:
        for method in ("dense", "snapkv", "h2o"):
            streams = {n: put(e, f"{method}{n}", prompt(n), 10, method) for n in lengths}
            finish(e)
            for n, stream in streams.items():
                last = events(stream)[-1]
                assert (last.kind, last.finish, last.usage.prompt, last.usage.completion) == ("end", "length", n, 10)
                assert last.usage.kept == n + 9  # the last token is never read
        again = {n: put(e, f"again{n}", prompt(n), 10) for n in lengths}
        finish(e)
        assert {n: tokens(s) for n, s in again.items()} == wanted


def test_sequences_of_a_model_with_windows_decode_each_by_itself():
    """Their window layers are the model's own and take nobody in; answers, again with a known prefix, are those of `generate`."""
    hybrid = tiny("gemma2")
    lengths = (20, 70, 100)
    wanted = [generated(prompt(n), 6, hybrid) for n in lengths]
    e = Engine(hybrid, Letters(), chunk=CHUNK)
    with e.session:
        for turn in range(2):
            streams = [put(e, f"{turn}{n}", prompt(n), 6, None) for n in lengths]
            finish(e)
            assert [tokens(s) for s in streams] == wanted
        assert e.prefixes.hits == 2 and e.used == e.prefixes.nbytes


def step_back(e: Engine) -> None:
    """The youngest gives up its memory, as where that is short."""
    if (victim := e.schedule.victim()) is not None:
        e._leave([victim])
        e.schedule.back(victim)


class Mixed:
    """Ten requests of many kinds and the engine they come to: who comes when, and who is cancelled or has to step back at which step."""

    def __init__(self, seed: int):
        rng = random.Random(seed)
        self.memory, layout = rng.choice((350_000, 600_000, 2 << 20)), LAYOUTS[seed % 2]
        self.engine = engine(memory=self.memory, layout=layout)
        self.arrivals = [
            (
                rng.randint(0, 20),  # the step it comes at
                rng.choice((1, 2, 34, 66, 120, 120)),  # tokens of its prompt
                rng.randint(0, 1),  # which prompt of that length, and whose
                rng.randint(1, 14),  # tokens to generate
                rng.choice(sorted(METHODS)),
                rng.choice((None, None, rng.randint(1, 30))),  # steps after which it is cancelled
            )
            for _ in range(10)
        ]
        self.backs = rng.sample(range(3, 40), 3)  # whether or not memory is short

    def run(self) -> list[Stream]:
        e, streams, ends = self.engine, {}, {}
        with e.session:
            for step in range(400):
                for i, (at, n, seed, count, method, stop) in enumerate(self.arrivals):
                    if at == step:
                        streams[i] = put(e, str(i), prompt(n, seed), count, method, key=str(seed), logprobs=0)
                        ends[i] = None if stop is None else step + stop
                    if ends.get(i) == step:
                        streams[i].cancel()
                e.step()
                if step in self.backs:
                    step_back(e)
                assert e.used <= self.memory
                if len(streams) == len(self.arrivals) and not e.schedule.busy:
                    break
            assert not e.schedule.busy and e.held == 0 and not e.batches
            while e.prefixes.drop_oldest():
                pass
            e._count()
            assert e.used == 0 and not e.prefixes.index
        return [streams[i] for i in range(len(self.arrivals))]


def test_whoever_comes_when_each_gets_what_it_gets_alone():
    """Two hundred requests, ten at a time."""
    seen = Counter()
    for times in range(20):
        mixed = Mixed(times)
        for stream, (_, n, seed, count, method, _) in zip(mixed.run(), mixed.arrivals, strict=True):
            got = events(stream)
            end, made = got[-1], [x for x in got if x.kind == "token"]
            ids, logs = solo(method, n, seed, 14)
            assert end.kind == "end" and end.finish == ("length" if len(made) == count else "cancelled"), times
            assert [x.token for x in made] == ids[: len(made)], times
            log = torch.tensor([x.logprob for x in made])
            torch.testing.assert_close(log, torch.tensor(logs[: len(made)]), **CLOSE)
        seen += mixed.engine.finished + Counter(
            back=mixed.engine.schedule.preemptions, known=mixed.engine.prefixes.hits, all=len(mixed.arrivals)
        )
    assert seen["all"] == 200 and min(seen["cancelled"], seen["back"]) > 20 and seen["known"] > 3, seen


@pytest.mark.parametrize(
    ("method", "layout"), [*((m, None) for m in METHODS), ("h2o", LAYOUTS[1]), ("dense", LAYOUTS[1])]
)
def test_stepping_back_changes_nothing(method, layout):
    """Some step back in the middle of their answers, under methods that drop keys meanwhile too."""
    lengths = (97, 100, 66)
    e = engine(memory=600_000, layout=layout, prefix=False)
    with e.session:
        streams = [put(e, str(i), prompt(n, i), 24, method) for i, n in enumerate(lengths)]
        steps = 0
        while e.schedule.busy:
            e.step()
            steps += 1
            if steps in (15, 24):
                step_back(e)
            assert steps < 2000
        assert e.schedule.preemptions > 0 and e.used == 0
    for i, n in enumerate(lengths):
        assert tokens(streams[i]) == solo(method, n, i, 24)[0]


def test_memory_alone_makes_the_youngest_step_back():
    """Dense caches grow beyond what was there when they were let in."""
    e = engine(memory=700_000, prefix=False)
    with e.session:
        streams = [put(e, str(i), prompt(60, i), 80) for i in range(4)]
        finish(e)
        assert e.schedule.preemptions > 0
    for i, stream in enumerate(streams):
        assert tokens(stream) == solo("dense", 60, i, 80)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_who_is_cancelled_or_late_is_gone_within_a_step(layout):
    e = engine(layout=layout, prefix=False)
    with e.session:
        reading = put(e, "reading", prompt(120), 50)
        e.step()
        assert e.used > 0 and e.schedule.reading is not None
        reading.cancel()
        e.step()
        assert e.used == 0 and events(reading)[-1].finish == "cancelled"

        a, b = put(e, "a", prompt(40), 50), put(e, "b", prompt(97), 50, "h2o", deadline=time.monotonic() + 1000)
        for _ in range(10):
            e.step()
        assert e.stats().running == 2
        before = e.used
        a.cancel()
        e.step()
        assert 0 < e.used < before and events(a)[-1].finish == "cancelled"
        object.__setattr__(e.schedule.running[0].request, "deadline", time.monotonic() - 1)
        e.step()
        assert e.used == 0 and events(b)[-1].finish == "deadline"
        waiting = put(e, "w", prompt(40), deadline=time.monotonic() - 1)
        e.step()
        assert events(waiting)[-1].finish == "deadline" and e.finished == {"cancelled": 2, "deadline": 2}


def test_a_seed_gives_the_same_tokens_in_any_company():
    def run(company):
        e = engine()
        with e.session:
            mine = put(e, "mine", prompt(33), 20, temperature=1.5, top_p=0.9, seed=7)
            for i in range(company):
                put(e, str(i), prompt(20 + i, i), 20, temperature=1.5, seed=i)
            finish(e)
        return tokens(mine)

    alone = run(0)
    assert alone == run(0) == run(4)
    e = engine()
    with e.session:
        other = put(e, "mine", prompt(33), 20, temperature=1.5, top_p=0.9, seed=8)
        finish(e)
    assert tokens(other) != alone


def test_a_step_that_fails_is_done_again_and_only_the_guilty_fail(caplog):
    e = engine()
    real, calls = e._forward, []

    def forward(store, **inputs):
        calls.append(inputs["input_ids"].shape)
        if len(calls) == 12 or inputs["input_ids"][0, 0] == 99:
            raise RuntimeError("words of a prompt")
        return real(store, **inputs)

    e._forward = e.reader.forward = forward
    with e.session:
        good = [put(e, str(i), prompt(40, i), 12, "h2o") for i in range(3)]
        bad = put(e, "bad", [99, 5, 6], 12, "h2o")
        finish(e)
        assert e.used == e.prefixes.nbytes
    assert [tokens(s) for s in good] == [solo("h2o", 40, i, 14)[0][:12] for i in range(3)]
    (last,) = events(bad)
    assert last.kind == "error" and "RuntimeError" in last.text
    assert e.finished == {"length": 3, "error": 1}
    assert "RuntimeError in " in caplog.text and "engine.py:" in caplog.text and "words" not in caplog.text


def test_a_stop_string_ends_the_answer_and_is_not_in_it():
    ids, _ = solo("dense", 40, 0, 14)
    whole = "".join(chr(97 + i % 26) for i in ids)
    stop = whole[5:8]
    cut = whole.index(stop)
    e = engine()
    with e.session:
        stream = put(e, "x", prompt(40), 14, stop=(stop,))
        finish(e)
    got = events(stream)
    assert "".join(x.text for x in got) == whole[:cut] and got[-1].finish == "stop"
    assert got[-1].usage.completion == cut + len(stop)


def test_an_end_token_ends_the_answer():
    ids, _ = solo("dense", 40, 0, 14)
    at = next(i for i in range(3, 14) if ids[i] not in ids[:i])
    e = engine()
    e.ends = {ids[at]}
    with e.session:
        stream = put(e, "x", prompt(40), 14)
        finish(e)
    got = events(stream)
    assert [x.token for x in got[:-1]] == ids[:at]
    assert got[-1].finish == "stop" and got[-1].usage.completion == at + 1


def test_kept_keys_are_told_per_layer_and_head():
    e = engine(prefix=False)
    with e.session:
        put(e, "s", prompt(97), 30, "snapkv")
        put(e, "d", prompt(50), 30)
        for _ in range(8):
            e.step()
        kept, dense = e.kept("s"), e.kept("d")
        assert [len(layer) for layer in kept] == [2, 2, 2] and e.kept("nobody") is None
        live = next(x for x in e.schedule.running if x.request.id == "d")
        assert dense == [[50 + live.fed] * 2] * 3
        assert all(35 <= n <= 50 for layer in kept for n in layer)  # 0.4 of 97, and what came since
        assert 0 < e.held < e.stats().dense_bytes
        finish(e)


def test_requests_that_can_never_run_are_refused_with_reasons():
    e = engine(memory=250_000, budgets=(0.5,))
    with e.session:
        for request, error, words in [
            (Request("a", []), InputError, "empty"),
            (Request("a", [5, 128]), InputError, "0 to 127"),
            (Request("a", [5] * MAX_POSITIONS), TooLong, "context has"),
            (Request("a", [5, 6], method="h20"), NotAllowed, "h2o"),
            (Request("a", [5, 6], method="../../etc"), NotAllowed, "does not offer"),
            (Request("a", [5, 6], method="h2o", budget=0.3), NotAllowed, "0.5"),
            (Request("a", [5, 6], method="dense", budget=0.5), NotAllowed, "leave it out"),
        ]:
            with pytest.raises(error, match=words):
                e.gate.check(request)
        assert e.gate.check(Request("a", [5, 6], method="h2o", budget=0.5))[0].budget == 0.5
        with pytest.raises(TooLong) as caught:
            e.gate.check(Request("a", [5] * 400))  # the positions are there, the memory is not
        assert caught.value.prompt == 400 and 100 < caught.value.limit < 400
        assert e.gate.check(Request("a", [5] * 100, Sampling(max_tokens=10_000)))[1] == caught.value.limit - 100
    back = pickle.loads(pickle.dumps(caught.value))  # as between machines
    assert (type(back), str(back), back.limit) == (TooLong, str(caught.value), caught.value.limit)
    assert pickle.loads(pickle.dumps(Full("full", 7))).retry_after == 7
    for bad in ({"temperature": float("nan")}, {"top_p": 0}, {"max_tokens": 0}, {"seed": 2**63}, {"stop": ("",)},
                {"logprobs": 21}, {"stop": ("a",) * 5}, {"temperature": True}):  # fmt: skip
        with pytest.raises(InputError):
            Sampling(**bad)


def test_text_that_no_other_process_could_be_told_is_refused():
    for made in (
        lambda: Sampling(stop=("\ud800",)),
        lambda: Request("\ud800", [1]),
        lambda: Request("x", [1], key="\udfff"),
    ):
        with pytest.raises(InputError, match="UTF-8"):
            made()
    assert Sampling(stop=("\U0001f600 ä",)).stop and Request("ä", [1]).id


def test_a_server_that_cannot_work_says_so_and_leaves_the_model_alone():
    before = model().config._attn_implementation
    for bad, words in [
        ({"memory": 1000}, "cannot hold one short request"),
        ({"method": "h20"}, "did you mean"),
        ({"method": None, "budget": 0.5}, "takes no budget"),
        ({"method": "h2o", "budget": 1.5}, "share of the tokens"),
        ({"context": 100_000}, "positions"),
    ]:
        with pytest.raises(InputError, match=words):
            engine(**bad)
        assert model().config._attn_implementation == before


def test_the_time_in_the_queue_is_told():
    """Until the prompt is first read: not the reading, not a step back, and for who ends before, until then."""
    e = engine(max_running=1)
    with e.session:
        first, second = (put(e, str(i), prompt(150), 20) for i in range(2))
        third = put(e, "3", prompt(40), 20)
        time.sleep(0.2)
        begun = time.monotonic()
        e.step()
        e._leave([live := e.schedule.reading])
        e.schedule.back(live)  # as for want of memory
        third.cancel()
        finish(e)
        whole = time.monotonic() - begun
    waits = [events(stream)[-1].usage.queued for stream in (first, second, third)]
    assert 0.2 <= waits[0] < 0.2 + whole / 2
    assert waits[0] < waits[1] < 0.3 + whole and 0.2 <= waits[2] < waits[1]
