"""StreamingLLM against masks written out, and its positions inside the cache against keys rotated to their slots."""

# The authors' cache (mit-han-lab/streaming-llm, kv_cache.py, StartRecentKVCache of 4 + 20) was run on the CPU beside
# both position policies, token by token: the same tokens are held after each. There a query sees the 24 that are held
# and itself, which here is a budget of 25.

import math

import pytest
import torch
from models import tiny
from reference import Seq, attend, causal, close, watch

import foveal
from foveal.methods.keep.streaming_llm import StreamingLLM

N, PROMPT = 70, 60


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(4))


def band(n, sink, recent):
    token = torch.arange(n)
    return causal(n) & ((token < sink) | (token[:, None] - token < recent))


@pytest.mark.parametrize("chunks", [(60,), (9, 31, 20), (3, 57)])
@pytest.mark.parametrize(("budget", "sink"), [(20, 4), (20, 0), (6, 4), (5, 4), (2, 0), (1, 4)])
def test_prompt_and_decode_see_the_same_band(budget, sink, chunks, model, ids):
    seen = watch(model, StreamingLLM(budget, sink), ids, chunks)
    recent = max(2, budget - sink)  # the newest key and the query itself, whatever the budget
    for *_, s in seen.each():
        assert close(s.out, attend(s, band(N, sink, recent)[None]))


def test_the_window_of_a_share_grows_with_the_text(model, ids):
    seen = watch(model, StreamingLLM(0.3), ids, (PROMPT,))
    sizes = [math.ceil(0.3 * PROMPT)] * PROMPT + [math.ceil(0.3 * n) for n in range(PROMPT + 1, N + 1)]
    token = torch.arange(N)
    visible = causal(N) & ((token < 4) | (token[:, None] - token < torch.tensor(sizes)[:, None] - 4))
    for *_, s in seen.each():
        assert close(s.out, attend(s, visible[None]))


@pytest.mark.parametrize("positions", ["original", "cache"])
def test_the_cache_is_sinks_and_the_newest_at_constant_length(positions, model, ids):
    seen = watch(model, StreamingLLM(20, positions=positions), ids, (30, 30))
    for call, layers in enumerate(seen.kept):
        last = [30, 60, *range(61, N + 1)][call]
        expected = [0, 1, 2, 3, *range(last - 15, last)]  # the query that comes is the twentieth
        assert all(row == expected for batch in layers for heads in batch for row in heads)
    assert (seen.cache.lengths == 19).all()


@pytest.mark.parametrize("positions", ["original", "cache"])
def test_while_nothing_leaves_it_is_dense(positions, model, ids):
    seen = watch(model, StreamingLLM(N, positions=positions), ids, (PROMPT,))
    for *_, s in seen.each():
        assert close(s.out, attend(s, causal(N)[None]))
    assert (seen.cache.lengths == N - 1).all()


# ---------------------------------------------------------------------- positions inside the cache


def rotate(x, position):
    """The rotary embedding of Llama, theta 10,000: x [heads, tokens, head_dim], position [tokens] (may be negative)."""
    half = x.shape[-1] // 2
    angle = position.double()[:, None] * 10_000 ** (-torch.arange(half).double() / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def in_slots(s, calls, budget, sink=4):
    """Outputs when every key stands at its slot of the cache, call after call: the original positions play no part."""
    n = s.q.shape[1]
    bare_q, bare_k = rotate(s.q, -torch.arange(n)), rotate(s.k, -torch.arange(n))
    held, out, first = [], [], 0
    for length in calls:
        new = list(range(first, first + length))
        keys = held + new
        slot = torch.arange(len(keys))
        q, k = rotate(bare_q[:, new], slot[len(held) :]), rotate(bare_k[:, keys], slot)
        at = torch.tensor(keys)
        visible = (at <= torch.tensor(new)[:, None]) & ((at < sink) | (torch.tensor(new)[:, None] - at < budget - sink))
        out.append(attend(Seq(q, k, s.v[:, keys], s.out), visible[None]))
        first += length
        held = [t for t in keys if t < sink or first - 1 - t < budget - sink - 1]
    return torch.cat(out, 1)


@pytest.mark.parametrize("chunks", [(60,), (24, 16, 20)])
def test_positions_are_those_inside_the_cache(chunks, model, ids):
    seen = watch(model, StreamingLLM(20, positions="cache"), ids, chunks)
    calls = [*chunks, *[1] * (N - PROMPT)]
    for *_, s in seen.each():
        assert close(s.out, in_slots(s, calls, 20), 2e-5)
        assert not close(s.out, attend(s, band(N, 4, 16)[None]), 1e-2)


@pytest.mark.parametrize("sink", [0, 1])
def test_positions_with_few_sinks(sink, model, ids):
    seen = watch(model, StreamingLLM(12, sink, positions="cache"), ids[:1], (30, 30))
    for *_, s in seen.each():
        assert close(s.out, in_slots(s, [30, 30, *[1] * 10], 12, sink), 2e-5)


def test_text_may_outgrow_the_positions_only_inside_the_cache():
    short = tiny("llama", num_hidden_layers=1, max_position_embeddings=48)
    text = torch.randint(1, 120, (1, 130), generator=torch.Generator().manual_seed(4))
    chunks = (24, 24, 24, 24, 24)
    seen = watch(short, StreamingLLM(24, positions="cache"), text, chunks)
    (s,) = seen.seqs[0]
    assert close(s.out, in_slots(s, [*chunks, *[1] * 10], 24), 1e-4)
    for method in (StreamingLLM(24), None):
        with pytest.raises(foveal.InputError, match="72 tokens long but the model has 48 positions"):
            watch(short, method, text, chunks)
    with pytest.raises(foveal.InputError, match=r"0 keys in the cache and 60 new tokens .* 48 positions"):
        watch(short, StreamingLLM(24, positions="cache"), text, (60, 60))
    with pytest.raises(foveal.InputError, match=r"48 keys in the cache and 24 new tokens .* smaller budget"):
        watch(short, StreamingLLM(50, positions="cache"), text, chunks)


def test_models_whose_keys_cannot_be_moved_are_refused():
    with pytest.raises(foveal.UnsupportedModel):
        foveal.attach(tiny("hunyuan"), StreamingLLM(positions="cache"))
    with foveal.attach(tiny("hunyuan"), StreamingLLM()):
        pass


# ---------------------------------------------------------------------- a sink of its own


@pytest.mark.parametrize("chunks", [(60,), (25, 35)])
def test_a_zero_sink_is_one_more_key_without_a_value(chunks, model, ids):
    """softmax1: as attention over a key more, whose logit and value are zero."""
    seen = watch(model, StreamingLLM(20, 0, zero_sink=True), ids, chunks)
    visible = band(N, 0, 20)
    for *_, s in seen.each():
        z = (s.q @ s.k.repeat_interleave(3, 0).mT / 4).masked_fill(~visible, -math.inf)
        w = torch.cat([torch.zeros(*z.shape[:2], 1), z], -1).softmax(-1)[..., 1:]
        assert close(s.out, w @ s.v.repeat_interleave(3, 0))
        assert not close(s.out, attend(s, visible[None]), 1e-2)


def test_a_zero_sink_is_yes_or_no():
    with pytest.raises(foveal.InputError, match="zero_sink = 2"):
        StreamingLLM(zero_sink=2)


@pytest.mark.parametrize("positions", ["original", "cache"])
def test_later_pieces_of_a_prompt_are_read_as_a_band(positions, model, ids, monkeypatch):
    read = lambda: watch(model, StreamingLLM(20, positions=positions), ids, (30, 30))
    monkeypatch.setattr(foveal.prefill, "_band_of_columns", lambda *_: False)
    by_rows = [s.out for *_, s in read().each()]
    monkeypatch.undo()
    monkeypatch.setattr(foveal.prefill, "_by_rows", None)  # not called
    for out, (*_, s) in zip(by_rows, read().each(), strict=True):
        assert close(s.out, out)
