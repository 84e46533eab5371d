"""Lenses of attention find what explicit attention weights say, in one piece and in several, on three families."""

import pytest
import torch
from lens_reference import Whole, close, distances, future, importance, vertical
from models import tiny
from test_tasks import characters

from foveal.lens import look
from foveal.lens.distance import Distance, middle_layers, roles_by_span
from foveal.lens.lens import Unsuited
from foveal.lens.receivers import Receivers, kurtosis, sentences
from foveal.lens.sinks import Sinks, sink_rate

TEXT = "Who was it? It was me. Go! No. I saw (him.) He ran... We sat. Oh. They fell. All was well. End."
FAMILIES = ["llama", "gemma2", "gpt_oss"]  # grouped heads; soft-cap and sliding layers; learned sinks


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer():
    return characters(None)


@pytest.fixture(scope="module")
def whole(family, tokenizer):
    return Whole(tiny(family, vocab_size=257), tokenizer(TEXT)["input_ids"])


@pytest.fixture(scope="module", params=[4096, 23])
def seen(request, family, tokenizer):
    lenses = [Sinks(threshold=0.02), "profile", Distance(curve_layers=None), Receivers(top=3)]
    return look(tiny(family, vocab_size=257), tokenizer, TEXT, lenses, chunk=request.param)


def test_sinks(seen, whole):
    x = whole.table(importance)
    close(seen["sinks.first"], x[..., 0])
    rate = (x[whole.layers] > 0.02).double().mean((0, 1))
    assert rate.max() > 0  # some are, some are not
    assert rate.min() < 1
    close(seen["sinks.rate_by_position"], rate, 1e-6)
    close(seen["sinks.rate"], rate[0], 1e-6)
    close(seen["sinks.importance"], x[..., :-4].topk(8).values.where(~x[..., :1].isnan(), torch.nan))
    for i in whole.layers:
        close(x[i].gather(1, seen["sinks.keys"][i]), seen["sinks.importance"][i])


def test_profile(seen, whole):
    close(seen["profile.entropy"], whole.table(lambda w: -torch.special.xlogy(w, w).sum(-1).mean(-1)))
    close(seen["profile.sink"], whole.table(lambda w: w[..., :4].sum(-1).mean(-1)))
    d, edges = distances(whole.n), seen["profile.distance_from"].tolist()
    low, high = torch.tensor(edges), torch.tensor([*edges[1:], whole.n])
    bins = whole.table(
        lambda w: torch.stack(
            [(w * ((d >= a) & (d < b))).sum((1, 2)) / whole.n for a, b in zip(low, high, strict=True)], 1
        )
    )
    close(seen["profile.distance"], bins)


def test_distances(seen, whole):
    d = distances(whole.n)
    span = whole.table(lambda w: (w * d).sum(-1).mean(-1))
    close(seen["distance.span"], span)
    late = whole.table(lambda w: (w * d)[..., 4:].sum((1, 2)) / w[..., 4:].sum((1, 2)))
    close(seen["distance.span_without_sinks"], late)
    near = (d < 64) | (torch.arange(whole.n) < 4)
    close(seen["distance.streaming"], whole.table(lambda w: (w * near).sum(-1).mean(-1)))
    waad = whole.table(lambda w: (w * d.clamp(max=10)).sum(-1))
    close(seen["distance.waad"], waad.mean(-1))
    fai = whole.table(lambda w: future(w, 10, 50))
    close(seen["distance.fai"], fai.nanmean(-1))
    role = seen["distance.role"]
    order = span[whole.layers].flatten().argsort()
    count = round(0.3 * len(order))
    measured = role[whole.layers].flatten()
    assert (measured[order[:count]] == 0).all()
    assert (measured[order[-count:]] == 2).all()
    assert (measured == 1).sum() == len(order) - 2 * count
    close(seen["distance.waad_curve"], waad[role == 0].mean(0))
    close(seen["distance.fai_curve"], fai[role == 2].mean(0))


def test_receivers(seen, whole):
    spans = sentences(["<s>", *TEXT])
    assert seen["receivers.start"].tolist() == [b for b, _ in spans]
    x = whole.table(lambda w: vertical(w, spans, 4))
    close(seen["receivers.vertical"], x, 1e-6)
    scored = x[..., :-4]
    d = scored - scored.mean(-1, keepdim=True)
    excess = d.pow(4).mean(-1) / d.pow(2).mean(-1) ** 2 - 3
    close(seen["receivers.kurtosis"], excess, 1e-3)  # a fourth power of small differences
    best = excess.flatten().nan_to_num(-9).argsort(descending=True)[:3]
    close(seen["receivers.score"], x.flatten(0, 1)[best].mean(0))


@pytest.mark.parametrize("chunk", [4096, 19])
def test_only_the_response_counts(chunk, tokenizer):
    model, ids = tiny("llama", vocab_size=257), tokenizer(TEXT)["input_ids"]
    seen, whole = look(model, None, ids, [Distance(start=40, curve_layers=None)], chunk=chunk), Whole(model, ids)
    d = distances(whole.n)
    close(seen["distance.span"], whole.table(lambda w: (w * d)[:, 40:].sum(-1).mean(-1)))
    fai = whole.table(lambda w: future(w, 10, 50, 40))
    close(seen["distance.fai"], fai.nanmean(-1))
    close(seen["distance.fai_curve"], fai[seen["distance.role"] == 2].mean(0))
    assert seen["distance.waad_curve"].isnan().tolist() == [True] * 40 + [False] * (whole.n - 40)


def test_closed_forms_of_uniform_attention():
    """All logits equal: every quantity is known on paper."""
    model = tiny("llama", fresh=True)
    for block in model.model.layers:
        block.self_attn.q_proj.weight.zero_()
    n = 60
    seen = look(model, None, list(range(2, 2 + n)), [Sinks(tail=0), "profile", "distance"])
    harmonic = [sum(1 / (i + 1) for i in range(j, n)) / (n - j) for j in range(n)]
    close(seen["sinks.first"], torch.full((3, 6), harmonic[0]))
    close(seen["profile.entropy"], torch.full((3, 6), float(torch.arange(1, n + 1).log().mean())))
    close(seen["distance.span"], torch.full((3, 6), (n - 1) / 4))
    waad = [sum(min(i - j, 10) for j in range(i + 1)) / (i + 1) for i in range(n)]
    close(seen["distance.waad_curve"], torch.tensor(waad))


def test_roles_take_equal_shares_and_skip_what_is_not_measured():
    span = torch.tensor([[5.0, 1.0, 3.0], [torch.nan] * 3, [2.0, 9.0, 4.0]])
    assert roles_by_span(span, 0.3).tolist() == [[2, 0, 1], [-1] * 3, [0, 2, 1]]
    assert middle_layers(tuple(range(30)), 30, 5) == [10, 12, 15, 18, 20]
    assert middle_layers((1, 3), 4, 5) == [1, 3]  # none in the middle third: all


def test_kurtosis_of_known_numbers():
    assert float(kurtosis(torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 1, 1, 11]))) == pytest.approx(9 + 1 / 9 - 4, abs=1e-4)
    assert float(kurtosis(torch.tensor([-1.0, 1, -1, 1]))) == pytest.approx(-2)


def test_sentences_end_where_a_reader_would_end_them():
    words = ["He", " said", ' "', "Go", '!"', " Then", " 3", ".", "5", " came", ".", "\n\n", "Part", " two", "\n"]
    text = ["".join(words[b:e]).strip() for b, e in sentences(words)]
    assert [t for t in text if t] == ['He said "Go!"', "Then 3.5 came.", "Part two"]
    assert [e - b for b, e in sentences(list("好。是吗\uff1f对"))] == [2, 3, 1]


def test_lenses_that_do_not_suit_are_refused_by_name_and_left_out_otherwise(tokenizer):
    model = tiny("llama", vocab_size=257)
    with pytest.raises(Unsuited, match="at least 8, but the text has 2"):
        look(model, tokenizer, "One. Two.", "receivers")
    seen = look(model, tokenizer, "One. Two.")
    assert "at least 8" in seen.source["left_out"]["receivers"]
    assert "sinks.first" in seen.measures


def test_the_papers_sink_rate_is_a_mean_over_texts(tokenizer):
    model = tiny("llama", vocab_size=257)
    rate = sink_rate(model, tokenizer, texts=3, length=24, threshold=0.05)
    from foveal.tasks.perplexity import Perplexity

    expected = 0
    for s in Perplexity(max_new_tokens=1).samples(tokenizer, 24, 3):
        x = Whole(model, [*s.context, *s.question, *s.target]).table(importance)
        expected = expected + (x > 0.05).double().mean((0, 1)) / 3
    close(rate.value, expected, 1e-6)
