"""Key tokens against log-probabilities worked out position by position, and MQAR against its definition."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from models import tiny
from test_tasks import characters

from foveal.errors import InputError
from foveal.tasks import get_task, mqar, mqar_accuracy


@pytest.fixture(scope="module")
def model():
    """A tiny model whose logits differ enough for its choices to depend on the context."""
    torch.manual_seed(3)
    model = tiny("llama", fresh=True, vocab_size=300)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


def expected(model, task, sample):
    ids = [*sample.context, *sample.question, *sample.target]
    first, short = len(ids) - len(sample.target), int(task.short * sample.length)
    stride, out = max(1, short // 4), []

    def nat(before, token):
        with torch.no_grad():
            logits = model(torch.tensor([before])).logits[0, -1].double()
        return -logits.log_softmax(-1)[token].item()

    for i in range(first, len(ids)):
        start = first + (i - first) // stride * stride - short
        long, little = nat(ids[:i], ids[i]), nat(ids[start:i], ids[i])
        out.append(little - long > task.gain and long < task.floor)
    return tuple(out)


def test_key_tokens_gain_from_the_long_context_and_are_predicted(model):
    # Thresholds that a random model passes on some targets and not on others.
    task = get_task("key-perplexity", max_new_tokens=40, gain=0.3, floor=7.0, short=0.1)
    samples = task.samples(characters(), 200, 2)
    marked = task.prepare(model, samples)
    assert [sample.counted for sample in marked] == [expected(model, task, sample) for sample in samples]
    assert {True, False} == {yes for sample in marked for yes in sample.counted}


def test_only_key_tokens_are_scored(model):
    task = get_task("key-perplexity", max_new_tokens=3)
    sample = get_task("perplexity", max_new_tokens=3).samples(characters(), 50, 1)[0]
    losses = [math.log(2), math.log(100), math.log(8)]
    with pytest.raises(InputError, match="call its `prepare` first"):
        task.score(sample, losses)
    sample = dataclasses.replace(sample, counted=(True, False, True))
    assert task.counted(sample, losses) == [losses[0], losses[2]]
    assert task.score(sample, losses) == pytest.approx(math.log(4))
    with pytest.raises(InputError, match="each of 3 target tokens, got 2"):
        task.counted(sample, losses[:2])
    with pytest.raises(InputError, match="without any key token"):
        task.score(dataclasses.replace(sample, counted=(False,) * 3), losses)


def test_other_tasks_count_everything_and_prepare_nothing(model):
    task = get_task("perplexity", max_new_tokens=3)
    samples = task.samples(characters(), 50, 1)
    assert task.prepare(model, samples) is samples
    assert task.counted(samples[0], [1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]


def test_no_key_token_at_all_is_told(model):
    task = get_task("key-perplexity", max_new_tokens=20, gain=1e6)
    with pytest.raises(InputError, match="found no key token among 20 targets of 100 tokens"):
        task.prepare(model, task.samples(characters(), 100, 1))
    with pytest.raises(InputError, match="short to be a share of the length between 0 and 1, got 4096"):
        get_task("key-perplexity", short=4096)
    with pytest.raises(InputError, match="gain to be a positive number of nats, got 0"):
        get_task("key-perplexity", gain=0)
    short = get_task("key-perplexity", max_new_tokens=60, short=0.9)
    with pytest.raises(InputError, match="a context longer than the short one of 90 tokens, got 40"):
        short.prepare(model, short.samples(characters(), 100, 1))


# ---------------------------------------------------------------------------- MQAR


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (64, 16), (128, 8)])
def test_mqar_pairs_return_as_queries(length, pairs):
    inputs, labels = mqar(16, length, pairs, seed=5)
    assert inputs.shape == labels.shape == (16, length) and inputs.dtype == labels.dtype == torch.int64
    for row, gold in zip(inputs.tolist(), labels.tolist(), strict=True):
        table = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(table) == len(set(table.values())) == pairs
        assert all(1 <= key < 4096 for key in table) and all(4096 <= value < 8192 for value in table.values())
        asked = [i for i, value in enumerate(gold) if value != -100]
        assert len(asked) == pairs and all(i >= 2 * pairs and i % 2 == 0 for i in asked)
        assert {row[i] for i in asked} == set(table) and all(gold[i] == table[row[i]] for i in asked)


def test_mqar_gaps_follow_the_power_law():
    _, labels = mqar(4_000, 128, 1, seed=0)
    gaps = np.nonzero((labels != -100).numpy())[1] // 2 - 1
    weights = np.arange(1, 64) ** (0.01 - 1.0)
    assert np.bincount(gaps, minlength=63) / 4_000 == pytest.approx(weights / weights.sum(), abs=0.03)
    assert np.bincount(gaps)[0] / 4_000 > 0.15


def test_mqar_depends_on_the_seed_and_scores_queries_alone():
    inputs, labels = mqar(4, 64, 4, vocab=256, seed=1)
    assert torch.equal(inputs, mqar(4, 64, 4, vocab=256, seed=1)[0])
    assert not torch.equal(inputs, mqar(4, 64, 4, vocab=256, seed=2)[0])
    perfect = torch.nn.functional.one_hot(labels.clamp(min=0), 256).float()
    assert mqar_accuracy(perfect, labels) == 1.0
    asked = (labels[0] != -100).nonzero()[:2, 0]
    perfect[0, asked] = 0
    assert mqar_accuracy(perfect, labels) == 14 / 16
    assert mqar_accuracy(torch.randn(4, 64, 256), labels) < 0.2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pairs": 17}, r"4 \* pairs <= length"),
        ({"vocab": 64}, "length < vocab"),
        ({"pairs": 0}, "pairs to be a positive whole number"),
        ({"batch": 1.5}, "batch to be a positive whole number"),
    ],
)
def test_mqar_refuses_what_does_not_fit(options, said):
    with pytest.raises(InputError, match=said):
        mqar(**{"batch": 2, "length": 64, "pairs": 4} | options)
    with pytest.raises(InputError, match=r"Expected logits \[batch, length, vocab\]"):
        mqar_accuracy(torch.zeros(2, 3, 5), torch.zeros(2, 4))
