"""Attributions that draw at random, against closed forms where the score is a sum over tokens, and against their own identities."""

import numpy
import pytest
import torch
from lens_reference import close
from models import tiny

from foveal.errors import InputError
from foveal.lens.attribution import Question, explain
from foveal.lens.attribution.explain import ask
from foveal.lens.attribution.scores import DRAWN

IDS = list(range(7, 21))


@pytest.fixture(autouse=True)
def captum():
    pytest.importorskip("captum")


def additive() -> tuple[Question, torch.Tensor]:
    """A question whose score is a sum of what each token adds, and these parts."""
    question = Question.of(tiny("llama"), None, IDS, 7, 5)
    direction = torch.randn(question.embeds.shape[-1], generator=torch.Generator().manual_seed(2))
    question.score = lambda x: ((x - question.baseline) @ direction).sum(-1)
    return question, ((question.embeds - question.baseline) @ direction)[0].detach()


@pytest.mark.parametrize("method", ["gradient-shap", "shapley"])
def test_parts_of_a_sum_are_found_exactly(method):
    question, parts = additive()
    close(ask(question, method, samples=3).values, parts, 1e-4)


def test_lime_finds_them_up_to_its_penalty():
    question, parts = additive()
    found = ask(question, "lime", samples=2000).values
    assert float((found - parts).abs().max()) < 0.05 * float(parts.abs().max())


def test_lime_is_the_weighted_ridge_of_its_own_samples():
    """Many more samples than tokens on a score that is no sum: the coefficients are those of a direct solution over all subsets."""
    model, ids = tiny("llama"), IDS[:6]
    question = Question.of(model, None, ids, 7, 5)
    keep = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6).bool()  # captum draws each of them as often
    with torch.no_grad():
        x = torch.where(keep[..., None], question.embeds, question.baseline)
        near = torch.cosine_similarity(x.flatten(1), question.embeds.flatten(1))
        y, w = question.score(x).double(), (-((1 - near) ** 2) / 2).exp().double()
    samples = 3000
    z = torch.cat([keep.double(), torch.ones(64, 1, dtype=torch.double)], 1)
    penalty = torch.diag(torch.tensor([1.0] * 6 + [0.0], dtype=torch.double)) * 64 / samples
    expected = torch.linalg.solve(z.T @ (w[:, None] * z) + penalty, z.T @ (w * y))[:6]
    found = explain(model, None, ids, "lime", target=7, baseline=5, samples=samples).values
    assert float((found - expected).abs().max()) < 0.12 * float(expected.abs().max())


@pytest.mark.parametrize(("method", "samples", "off"), [("shapley", 2, 1e-4), ("gradient-shap", 600, 0.1)])
def test_values_add_up_to_what_the_text_adds(method, samples, off):
    model = tiny("llama")
    question = Question.of(model, None, IDS, 7, 5)
    with torch.no_grad():
        empty = float(question.score(question.baseline.expand_as(question.embeds))[0])
    found = explain(model, None, IDS, method, target=7, baseline=5, samples=samples).values
    assert float(found.sum()) == pytest.approx(question.whole - empty, abs=off)


@pytest.mark.parametrize("method", sorted(DRAWN))
def test_a_seed_gives_the_same_numbers_and_leaves_the_callers_alone(method):
    model = tiny("llama")
    torch.manual_seed(3)
    numpy.random.seed(3)
    expected = torch.rand(2), numpy.random.rand(2)
    torch.manual_seed(3)
    numpy.random.seed(3)
    one, two, other = (explain(model, None, IDS[:5], method, samples=4, seed=s).values for s in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.rand(2), expected[0])
    assert (numpy.random.rand(2) == expected[1]).all()


def test_bad_options_are_refused():
    model = tiny("llama")
    with pytest.raises(InputError, match="samples"):
        explain(model, None, IDS, "lime", samples=0)
    with pytest.raises(InputError, match="no option 'samples'"):
        explain(model, None, IDS, "perturbation", samples=5)


@pytest.mark.parametrize("method", sorted(DRAWN))
def test_without_captum_they_say_so(method, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "captum.attr", None)
    with pytest.raises(InputError, match=r"foveal\[captum\]"):
        explain(tiny("llama"), None, IDS, method)
