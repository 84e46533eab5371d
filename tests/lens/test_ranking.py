"""Heads in order, random controls, and what a text costs without some of them."""

import pytest
import torch
import torch.nn.functional as F
from lens_reference import Whole, close, importance
from models import tiny
from test_tasks import characters

import foveal
from foveal.errors import InputError
from foveal.heads import HeadRoles
from foveal.hub import model_identity
from foveal.lens import HeadRanking, active_dormant, dormancy, influence, look, rankings

IDS = torch.randint(2, 120, (40,), generator=torch.Generator().manual_seed(5)).tolist()
SCORES = torch.tensor([[0.1, 0.9, 0.1], [0.0, 0.0, 0.0], [0.5, 0.9, 0.2]])


def ranking(scores=SCORES, ascending=False, weights="a"):
    names = {
        "name": "m",
        "architecture": "A",
        "layers": 3,
        "heads": 3,
        "kv_heads": 3,
        "head_dim": 4,
        "weights": weights,
    }
    return HeadRanking(HeadRoles(names, {"s": scores}, measured=(0, 2)), "s", ascending)


def test_order_ties_and_thresholds():
    assert ranking().top(4) == ((0, 1), (2, 1), (2, 0), (2, 2))
    assert ranking(ascending=True).top(3) == ((0, 0), (0, 2), (2, 2))
    assert ranking().above(0.5) == ((0, 1), (2, 1), (2, 0))
    assert ranking(ascending=True).above(0.2) == ((0, 0), (0, 2), (2, 2))
    assert len(ranking()) == 6
    for n in (0, 7, 1.5):
        with pytest.raises(InputError):
            ranking().top(n)


def test_controls_are_others_of_the_measured_layers():
    drawn = [ranking().control(2, seed) for seed in range(20)]
    assert all(len(set(d)) == 2 and not set(d) & set(ranking().top(2)) for d in drawn)
    assert {pair for d in drawn for pair in d} == {(0, 0), (0, 2), (2, 0), (2, 2)}
    assert all({i for i, _ in ranking().control(2, seed, per_layer=True)} == {0, 2} for seed in range(5))
    assert ranking().control(2, 3) == ranking().control(2, 3)
    with pytest.raises(InputError, match="at least 4 heads to draw from"):
        ranking().control(4, 0)


def test_overlap_and_correlation():
    other = torch.tensor([[0.0, 5.0, 4.0], [9.0, 9.0, 9.0], [3.0, 2.0, 1.0]])
    assert ranking().overlap(ranking(other), 2) == (0.5, 2 / 6)
    # ranks 1.5 5.5 1.5 4 5.5 3 and 1 6 5 4 3 2
    a, b = torch.tensor([[1.5, 5.5, 1.5, 4, 5.5, 3], [1, 6, 5, 4, 3, 2]]).double()
    expected = float(((a - 3.5) * (b - 3.5)).sum() / ((a - 3.5).norm() * (b - 3.5).norm()))
    assert ranking().correlation(ranking(other)) == pytest.approx(expected)
    assert ranking().correlation(ranking(other, ascending=True)) == pytest.approx(-expected)
    with pytest.raises(InputError, match="two different models"):
        ranking().overlap(ranking(weights="b"), 2)


def test_a_look_and_known_roles_are_ranked(tmp_path, monkeypatch):
    monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path))
    model = tiny("llama")
    seen = look(model, None, IDS, ["sinks", "distance"])
    found = rankings(model, seen)
    best = divmod(int(seen["sinks.first"].argmax()), 6)
    assert found["sinks.first"].top(1) == (best,)
    assert "retrieval" not in found
    scores = torch.arange(18.0).view(3, 6)
    for kind, name in (("heads", "retrieval"), ("compress_kv", "semantic")):
        HeadRoles(model_identity(model), {name: scores}).save(
            tmp_path / kind / f"{model_identity(model)['weights']}.json"
        )
    found = rankings(model)
    assert found["retrieval"].top(1) == found["semantic"].top(1) == ((2, 5),)
    with pytest.raises(InputError, match="measured on"):
        rankings(tiny("qwen3"), seen)


def loss(model, ids, method=None):
    x = torch.tensor([ids])
    with torch.no_grad(), foveal.attach(model, method):
        logits = model(x).logits[0]
    return sum(-F.log_softmax(logits[i].double(), -1)[ids[i + 1]] for i in range(len(ids) - 1)) / (len(ids) - 1)


def uniform_loss(model, ids, heads):
    """The loss with weights 1 / (i + 1) in the heads, written into transformers' own eager attention."""
    whole = Whole(model, ids)
    net = whole.model
    averages = torch.ones(len(ids), len(ids)).tril() / torch.arange(1, len(ids) + 1)[:, None]
    for layer, block in enumerate(net.model.layers):
        mine = [h for i, h in heads if i == layer]

        def replace(module, args, kwargs=None, mine=mine, block=block):
            hidden = block.self_attn.foveal_input
            v = block.self_attn.v_proj(hidden)[0].view(len(ids), 2, 16)
            z = args[0].clone()
            for h in mine:
                z[0, :, h * 16 : h * 16 + 16] = averages @ v[:, h // 3]
            return (z,)

        def note(module, args, kwargs):
            module.foveal_input = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        block.self_attn.register_forward_pre_hook(note, with_kwargs=True)
        block.self_attn.o_proj.register_forward_pre_hook(replace)
    with torch.no_grad():
        logits = net(torch.tensor([ids])).logits[0]
    return F.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]))


def test_influence_is_the_relative_rise_of_the_loss():
    model = tiny("llama")
    order = HeadRanking.of(look(model, None, IDS, "distance"), "distance.span")
    texts = [IDS, IDS[:17]]
    found = influence(model, None, texts, order, 3, controls=2, seed=4)
    assert found.heads == order.top(3)
    close(found.base, torch.stack([loss(model, t) for t in texts]))
    masked = torch.stack([uniform_loss(model, t, order.top(3)) for t in texts])
    close(found.masked, masked)
    close(found.score, (masked - found.base) / found.base, 1e-4)
    control = torch.stack([uniform_loss(model, IDS, order.control(3, seed)) for seed in (4, 5)])
    close(found.control[:, 0], control)
    assert found.control_score.shape == (2, 2)
    zero = influence(model, None, [IDS], order, 3, mode="zero", controls=0)
    close(zero.masked[0], loss(model, IDS, foveal.get_method("ablate", heads=order.top(3), mode="zero")))
    assert abs(float(zero.masked[0] - found.masked[0])) > 1e-3
    assert influence(model, None, [IDS], order, controls=0).heads == order.top(1)  # 5 % of 18


def test_influence_refuses_what_says_nothing():
    model = tiny("llama")
    order = HeadRanking.of(look(model, None, IDS, "distance"), "distance.span")
    for texts in ([], [[5]]):
        with pytest.raises(InputError, match="at least two tokens"):
            influence(model, None, texts, order)
    with pytest.raises(InputError, match="measured on"):
        influence(tiny("qwen3"), None, [IDS], order)


def test_dormancy_is_first_token_attention_by_domain():
    model, tokenizer = tiny("llama", vocab_size=257), characters(None)
    texts = {"code": "def f(x): return x + 1", "prose": "It was a dark and stormy night."}
    looks = dormancy(model, tokenizer, texts)
    first = [Whole(model, tokenizer(t)["input_ids"]).table(lambda w: importance(w)[:, 0]) for t in texts.values()]
    close(active_dormant(looks).value, (first[0] - first[1]).abs())
    with pytest.raises(InputError, match="two domains"):
        dormancy(model, tokenizer, {"one": "text"})
