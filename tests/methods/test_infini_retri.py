"""InfiniRetri against the rounds played by hand on the stock model's attention weights."""

# The authors' scores (infini-retri 0.0.3, thoughts.py, compute_phrase_scores) were run on the CPU on random weights,
# phrases of 1, 3, 4 and 8: the same numbers.

import pytest
import torch
from models import tiny
from reference import hook

import foveal
from foveal.methods.keep.infini_retri import InfiniRetri
from foveal.prompt import Prompt

N = 150


@pytest.fixture(scope="module")
def eager():
    model = tiny("llama", fresh=True)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (1, N), generator=torch.Generator().manual_seed(7))


def read(method, ids, model=None):
    """Places of the tokens that the model reads."""
    with torch.no_grad(), foveal.attach(model or tiny("llama"), method) as session:
        chosen = method.read(Prompt(session, ids[0], method.setup(session.info)))
    return list(range(ids.shape[1])) if chosen is None else chosen.nonzero()[:, 0].tolist()


def by_hand(eager, ids, m):
    """Sentences are chunk / 8 tokens, all in one line: no tokenizer."""
    end, size = N - m.question, m.chunk // 8
    sentences = [[t for t in range(i, min(i + size, N)) if t < end] for i in range(0, end, size)]
    pieces, piece = [], []
    for s in sentences:
        if sum(map(len, piece)) + len(s) > m.chunk:
            pieces.append(piece)
            piece = []
        piece.append(s)
    pieces.append(piece)
    if len(pieces) > 1 and sum(map(len, piece)) < m.chunk / 2:
        both = pieces[-2] + pieces[-1]
        half = min(range(1, len(both)), key=lambda i: abs(2 * sum(map(len, both[:i])) - sum(map(len, both))))
        pieces[-2:] = [both[:half], both[half:]]
    memory, w = [], None
    for piece in pieces:
        now = memory + piece
        places = [t for s in now for t in s]
        text = ids[:, places + list(range(end, N))]
        with torch.no_grad():
            x = eager(text, output_attentions=True).attentions[-1][0].sum(0)[len(places) :]
        w = x[:, len(places) :].sum(1) if w is None else w
        x = x[:, : len(places)]
        score = torch.zeros(len(places))
        for j in range(len(places)):
            if m.weighted:
                a, b = max(0, j - m.phrase // 2), j + (m.phrase - 1) // 2 + 1
                score[j] = (w**2 * x[:, a:b].sum(1)).sum()
            else:
                score[j] = x[:, j].sum()
        best = {places[i] for i in score.argsort(descending=True)[: m.top].tolist()}
        memory = [s for s in now if best & set(s)]
    return [t for s in memory for t in s] + list(range(end, N))


@pytest.mark.parametrize(
    "method",
    [
        InfiniRetri(chunk=40, top=6, phrase=4, question=10),
        InfiniRetri(chunk=40, top=6, phrase=1, question=10, weighted=False),
        InfiniRetri(chunk=64, top=3, phrase=3, question=30),
        InfiniRetri(chunk=1000, top=4, phrase=8, question=20),
    ],
)
def test_rounds(method, eager, ids):
    got = read(method, ids)
    assert got == by_hand(eager, ids, method) and method.question < len(got) < N


def test_everything_is_remembered_when_every_token_is_among_the_best(ids):
    assert read(InfiniRetri(top=N), ids) == read(InfiniRetri(chunk=30, top=N, question=9), ids) == list(range(N))
    assert read(InfiniRetri(top=1, question=N), ids) == list(range(N))  # all of it is question


def test_texts_beyond_the_positions(ids):
    model = tiny("llama")  # 512 positions
    long = torch.randint(1, 120, (1, 1200), generator=torch.Generator().manual_seed(1))
    method = InfiniRetri(chunk=200, top=5, question=20)
    with torch.no_grad(), foveal.attach(model, method):
        cache = model(long).past_key_values
        got = model(long[:, :1], past_key_values=cache).logits[0, -1]
    places = read(method, long)
    with torch.no_grad():
        want = model(torch.cat([long[:, places], long[:, :1]], 1)).logits[0, -1]
    assert torch.allclose(got, want, atol=1e-4) and cache.seen.tolist() == [1201]
    with (
        torch.no_grad(),
        foveal.attach(model, InfiniRetri(chunk=600)),
        pytest.raises(foveal.InputError, match="512 positions"),
    ):
        model(long)


def test_the_question_finds_the_sentence_it_repeats():
    """A model whose last layer copies: a token looks at those that are equal to it."""
    rope = {
        "rope_type": "default",
        "rope_theta": 1e30,
    }  # all but one pair of dimensions stand still: distance plays no part
    model = tiny("llama", fresh=True, num_hidden_layers=1, num_key_value_heads=6, rope_parameters=rope)
    with torch.no_grad():
        for p in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj):
            p.weight.copy_(torch.eye(96) * 3)
        model.model.layers[0].input_layernorm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.nn.functional.normalize(torch.randn(128, 96), dim=-1))
    text = torch.randint(1, 60, (1, 400), generator=torch.Generator().manual_seed(3))
    needle = torch.arange(100, 108)
    text[0, 160:168] = needle
    text = torch.cat([text, needle[None]], 1)
    got = read(InfiniRetri(chunk=64, top=8, phrase=3, question=8), text, model)
    assert set(range(160, 168)) <= set(got) and len(got) < 100


@pytest.mark.parametrize("name", ["chunk", "top", "phrase", "question"])
def test_bad_values(name):
    with pytest.raises(foveal.InputError, match=f"{name} = 0"):
        InfiniRetri(**{name: 0})
    with pytest.raises(foveal.InputError, match="weighted = 1"):
        InfiniRetri(weighted=1)


def test_a_chat_keeps_its_opening_and_its_question(default_model):
    model, tokenizer = default_model
    filler = "The sea was calm and nothing moved. " * 12
    text = filler + "The secret number of Anna is 5318. " + filler
    chat = [{"role": "user", "content": text + "What is the secret number of Anna?"}]
    ids = tokenizer(
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True), add_special_tokens=False
    )
    ids = torch.tensor([ids["input_ids"]])
    method, seen = InfiniRetri(chunk=100, top=10, question=24), []
    with torch.no_grad(), foveal.attach(model, method | hook(after=lambda s: seen.append(s.pass_.ids[0]))):
        model(ids, logits_to_keep=1)
    told = tokenizer.decode(seen[0])
    assert told.startswith("<|im_start|>system") and "<|im_start|>user\n" in told
    assert told.endswith("What is the secret number of Anna?<|im_end|>\n<|im_start|>assistant\n")
    assert "The secret number of Anna is 5318." in told and len(seen[0]) < 0.6 * ids.shape[1]
