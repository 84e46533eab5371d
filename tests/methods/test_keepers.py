"""What holds for every method that lets keys go, generated from the registry: later turns, codes, and memory between chunks."""

import functools

import pytest
import torch
from models import tiny
from reference import role_file

import foveal
from foveal.store import Layout

TURNS = (40, 1, 20, 1, 10, 1)
"""Tokens of each call: three questions, and a token after each."""
NAMES = [n for n, cls in sorted(foveal.methods().items()) if {"keep", "read", "end"} & set(cls(**cls.example).asks)]
KEEPERS = [n for n in NAMES if "keep" in foveal.methods()[n](**foveal.methods()[n].example).asks]
ROLLING = [n for n in KEEPERS if "rolling" in foveal.methods()[n].__dataclass_fields__]
WINDOWS = [
    "streaming-llm(budget=24)",
    "streaming-llm(budget=24, positions='cache')",
    "long-gen(full=0.0, sink=4, recent=20)",
]


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def texts():
    return torch.randint(1, 120, (2, sum(TURNS)), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def build(model, tmp_path_factory):
    shape = model.config.num_hidden_layers, model.config.num_attention_heads
    scores = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1))
    names = ("retrieval", "induction", "echo")
    roles = role_file(model, tmp_path_factory.mktemp("roles"), **dict(zip(names, scores, strict=True)))

    def of(name, which, **more):
        cls = foveal.methods()[name]
        given = {"roles": roles} if "roles" in cls.__dataclass_fields__ else {}
        return foveal.get_method(name, **dict(getattr(cls, which)) | given | more)

    return of


def talk(model, method, ids, layout=None):
    """Logits after each call [batch, calls, vocab], and how many keys each row held then."""
    out, held, cache, at = [], [], None, 0
    with torch.no_grad(), foveal.attach(model, method, layout=layout):
        for n in TURNS:
            result = model(ids[:, at : at + n], past_key_values=cache)
            cache, at = result.past_key_values, at + n
            out.append(result.logits[:, -1])
            held.append(cache.lengths.clone())
    return torch.stack(out, 1), torch.stack(held)


@pytest.fixture(scope="module")
def together(model, texts, build):
    return functools.cache(lambda name: talk(model, build(name, "example"), texts))


@pytest.mark.parametrize("name", NAMES)
def test_later_turns_at_full_budget_are_dense(name, model, texts, build):
    with torch.no_grad():
        ends = torch.tensor(TURNS).cumsum(0) - 1
        plain = model(texts).logits[:, ends]
    got, held = talk(model, build(name, "neutral"), texts)
    assert torch.allclose(got, plain, atol=1e-4)
    assert (held == (ends + 1)[:, None, None, None]).all()


@pytest.mark.parametrize("name", NAMES)
def test_later_turns_of_a_batch_are_those_of_each(name, model, texts, build, together):
    logits, held = together(name)
    alone, single = talk(model, build(name, "example"), texts[1:])
    assert torch.allclose(logits[1:], alone, atol=1e-4)
    assert torch.equal(held[:, :, 1], single[:, :, 0])


@pytest.mark.parametrize("name", KEEPERS)
def test_codes_change_little_and_no_count(name, model, texts, build, together):
    plain, held = together(name)
    coded, found = talk(model, build(name, "example"), texts, Layout(format="int8"))
    assert torch.equal(found, held)
    assert 0 < (coded - plain).norm() / plain.norm() < 0.1  # a code may move a key over the edge of the budget


@pytest.mark.parametrize("name", [*ROLLING, *WINDOWS])
def test_a_prompt_in_chunks_never_holds_more_than_the_budget_and_a_chunk(name, model, texts, build):
    method = foveal.get_method(name) if "(" in name else build(name, "example", budget=24, rolling=True)
    heads = model.config.num_key_value_heads
    with torch.no_grad(), foveal.attach(model, method) as session, session.open_prompt():
        cache = None
        for piece in texts[:1, :72].split(12, dim=1):
            cache = model(piece, past_key_values=cache).past_key_values
            assert all(sum(layer[0]) <= 24 * heads for layer in cache.lengths.tolist())
    assert cache.seen == 72


@pytest.mark.parametrize("name", KEEPERS)
def test_a_last_chunk_of_one_token_ends_the_prompt(name, model, texts, build):
    method = build(name, "example")
    if "whole_prompt" in method.needs:
        pytest.skip("takes prompts whole only")

    def read(first):
        with torch.no_grad(), foveal.attach(model, method) as session:
            with session.open_prompt():
                cache = model(texts[:1, :first]).past_key_values
            return model(texts[:1, first:48], past_key_values=cache).past_key_values.lengths

    assert torch.equal(read(47).sum(-1), read(40).sum(-1))
