"""DuoAttention against masks written out: streaming heads see a band, the others everything."""

# The authors' mask and choice of heads (mit-han-lab/duo-attention, streaming_attn.py and utils.py) were run on the
# CPU: for shares of 1/2, 1/3 and 1/5 the same heads stay whole, and outputs are those of attention under their
# training mask, in the prompt and in decode.

import math

import pytest
import torch
from models import tiny
from reference import attend, causal, close, role_file, watch

import foveal
from foveal.methods.keep.duo import Duo

N, PROMPT, HEADS, KV, LAYERS = 70, 60, 6, 2, 2
WHOLE = {(0, 1), (1, 0)}


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def roles(model, tmp_path_factory):
    scores = torch.rand(LAYERS, HEADS, generator=torch.Generator().manual_seed(1)) / 2
    scores[0, 4] = scores[1, 1] = 0.9  # so KV head 1 of layer 0 and KV head 0 of layer 1 are the better half
    return role_file(model, tmp_path_factory.mktemp("roles"), retrieval=scores)


def visible(n, layer, sink, recent):
    """recent: a number, or one for each query."""
    token = torch.arange(n)
    band = (token < sink) | (token[:, None] - token < torch.as_tensor(recent).view(-1, 1))
    return causal(n) & torch.stack([torch.ones_like(band) if (layer, g) in WHOLE else band for g in range(KV)])


@pytest.mark.parametrize("chunks", [(60,), (9, 31, 20)])
@pytest.mark.parametrize(("sink", "recent"), [(4, 16), (0, 8), (3, 2)])
def test_streaming_heads_see_the_same_band_in_prompt_and_decode(sink, recent, chunks, model, ids, roles):
    seen = watch(model, Duo(sink=sink, recent=recent, roles=roles), ids, chunks)
    for _, layer, s in seen.each():
        assert close(s.out, attend(s, visible(N, layer, sink, recent)))


def test_padded_rows(model, ids, roles):
    seen = watch(model, Duo(sink=2, recent=9, roles=roles), ids, (PROMPT,), pads=(0, 11))
    for _, layer, s in seen.each():
        assert close(s.out, attend(s, visible(s.q.shape[1], layer, 2, 9)))


@pytest.mark.parametrize("pads", [None, (0, 11)])
def test_the_windows_of_a_share_grow_with_the_text(pads, model, ids, roles):
    method = Duo(0.6, whole=0.5, roles=roles)
    share = (
        0.6 - 0.5
    ) / 0.5  # 0.3 of the heads, rounded up, are two of four: what is left goes to the windows of the others
    seen = watch(model, method, ids, (PROMPT,), pads)
    for _, layer, s in seen.each():
        n = s.q.shape[1]
        prompt = n - (N - PROMPT)
        sizes = [max(2, math.ceil(share * max(prompt, i + 1) - 1e-9) - 4) for i in range(n)]
        assert close(s.out, attend(s, visible(n, layer, 4, sizes)))


def test_a_tiny_share_still_shows_the_newest_key(model, ids, roles):
    seen = watch(model, Duo(0.02, whole=0.9, roles=roles), ids, (PROMPT,))
    only = torch.tensor([g for g in range(KV) for _ in range(3)])
    for _, _layer, s in seen.each():
        dense, band = attend(s, causal(N)[None]), attend(s, causal(N) & ((torch.arange(N) < 4) | (_ages(N) < 2))[None])
        for g in range(KV):
            got = s.out[only == g]
            assert close(got, band[only == g]) or close(got, dense[only == g])


def _ages(n):
    return torch.arange(n)[:, None] - torch.arange(n)


def test_a_window_of_everything_is_dense(model, ids, roles):
    seen = watch(model, Duo(sink=4, recent=N, roles=roles), ids, (PROMPT,))
    for _, _, s in seen.each():
        assert close(s.out, attend(s, causal(N)[None]))


def test_what_is_held_and_what_it_costs(model, ids, roles):
    seen = watch(model, Duo(sink=4, recent=8, roles=roles), ids, (PROMPT,))
    for call, layers in enumerate(seen.kept):
        n = PROMPT + call
        for layer, batch in enumerate(layers):
            for heads in batch:
                for g, row in enumerate(heads):
                    assert row == (list(range(n)) if (layer, g) in WHOLE else [0, 1, 2, 3, *range(n - 7, n)])
    rows = 2 * LAYERS * KV
    key = (16 + 16) * 4 + 4  # key and value in float32, and the token id
    held = rows // 2 * (N + 11) * key
    assert held <= seen.cache.nbytes < held * 1.5 and seen.cache.nbytes < 0.75 * seen.cache.dense_nbytes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"budget": 100}, "budget = 100: 'duo' .*share of the tokens"),
        ({"whole": 1.0}, r"whole = 1.0: expected a number from 0 to 0.999"),
        ({"recent": 1}, "recent = 1: .*at least 2"),
        ({"sink": -1}, "sink = -1: .*at least 0"),
    ],
)
def test_bad_values(wrong, message):
    with pytest.raises(foveal.InputError, match=message):
        Duo(**wrong)


def test_roles_are_needed_and_must_fit(model, roles, tmp_path):
    with pytest.raises(foveal.InputError, match="no head score 'retrival': did you mean 'retrieval'"):
        foveal.attach(model, Duo(score="retrival", roles=roles))
    with pytest.raises(foveal.InputError, match="measured on"):
        foveal.attach(tiny("llama"), Duo(roles=roles))
    with pytest.raises(foveal.InputError, match="check the path"):
        foveal.attach(model, Duo(roles=str(tmp_path / "none.json")))
    with foveal.attach(model, Duo(roles=roles)):
        pass
