"""The laboratory: its data, models and measures against closed forms; short trainings that must already show their direction."""

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from foveal.errors import InputError
from foveal.lens import dynamics
from foveal.lens.lab import Finding, get_lab, labs, multitask, recall
from foveal.lens.lab import backcopy as bb
from foveal.lens.lab import regression as icl
from foveal.lens.lab import scan_and_snap as snap
from foveal.lens.lab.lab import Report, logged
from foveal.lens.lab.model import NO_FIRST_VALUE, NO_HEADS, Tiny, optimiser, relu, sigmoid, softmax
from foveal.lens.lab.sinks import characters, rates, windows

# ---------------------------------------------------------------------- reports


def test_findings_and_reports(tmp_path):
    good, bad = Finding("a", 0.5, "at most", 0.5, "x"), Finding("b", 0.4, "at least", 0.5, "x")
    assert good.holds
    assert not bad.holds
    assert not Finding("c", math.nan, "at most", 1.0, "x").holds
    report = Report("n", "p", (good, bad), {"arm.step": [0.0, 1.0]}, {"steps": 3}, {"seconds": 1.0})
    assert not report.holds
    assert Report("n", "p", (good,)).holds
    data = json.loads(report.save(tmp_path / "r.json").read_text())
    assert [f["holds"] for f in data["findings"]] == [True, False]
    assert data["curves"] == {"arm.step": [0.0, 1.0]}


def test_every_lab_is_whole():
    assert len(labs()) == 11
    for name, cls in labs().items():
        made = get_lab(name, steps=5)
        assert (made.name, made.steps) == (name, 5)
        assert cls.paper
        assert cls.about
    with pytest.raises(InputError, match="no lab called"):
        get_lab("icl")
    with pytest.raises(InputError, match="no setting"):
        get_lab("scan-and-snap", width=3)
    with pytest.raises(InputError, match="steps"):
        get_lab("scan-and-snap", steps=0)


@pytest.mark.parametrize("name", sorted(labs()))
def test_a_short_run_of_every_lab(name):
    """Two runs agree, report what they should, and leave the caller's random state alone."""
    small = {"scan-and-snap": {"steps": 4}, "sink-emergence": {"steps": 2, "batch": 2, "width": 16, "length": 16}}
    small["recall"] = {"steps": 2, "batch": 2, "width": 8, "length": 12, "pairs": 3, "large": 8, "prompts": 5}
    shared = {"steps": 2, "batch": 2, "width": 8, "length": 12}
    settings = small.get(
        name, shared if name in ("bigram-backcopy", "residual-peak", "sink-variants") else {"steps": 3}
    )
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    shares = []
    report = get_lab(name, **settings).run(tick=lambda line, share: shares.append(share))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    torch.manual_seed(6)  # which must not matter
    again = get_lab(name, **settings).run()
    assert report.findings == again.findings or any(math.isnan(f.measured) for f in report.findings)
    assert report.settings["steps"] == settings["steps"]
    for key, values in report.curves.items():
        if key.endswith(".step"):
            arms = [v for k, v in report.curves.items() if k.rpartition(".")[0] == key.rpartition(".")[0]]
            assert {len(v) for v in arms} == {len(values)}
            assert values[-1] == settings["steps"]


def test_logged():
    kept = [s for s in range(1001) if logged(s, 1000)]
    assert kept[0] == 0
    assert kept[-1] == 1000
    assert len(kept) == 41
    assert [s for s in range(4) if logged(s, 3)] == [0, 1, 2, 3]


# ---------------------------------------------------------------------- the tiny transformer


def test_weights():
    z, visible = torch.randn(2, 5, 5), torch.ones(5, 5, dtype=torch.bool).tril()
    for q in range(5):
        torch.testing.assert_close(softmax(z, visible)[:, q, : q + 1], z[:, q, : q + 1].softmax(-1))
        torch.testing.assert_close(sigmoid(z, visible)[:, q, : q + 1], 1 / (1 + (-z[:, q, : q + 1]).exp()))
        torch.testing.assert_close(relu(z, visible)[:, q, : q + 1], z[:, q, : q + 1].clamp(min=0) / (q + 1))
    for f in (softmax, sigmoid, relu):
        assert f(z, visible).triu(1).abs().max() == 0
    assert relu(-z.abs(), visible).max() == 0


def make(**settings):
    torch.manual_seed(0)
    model = Tiny(20, 10, 16, 2, **settings)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def test_the_model_is_causal_and_shows_what_it_does():
    model, x = make(heads=2), torch.randint(20, (3, 10))
    logits, seen = model(x)
    other = x.clone()
    other[:, 6] = (x[:, 6] + 1) % 20
    torch.testing.assert_close(model(other)[0][:, :6], logits[:, :6])
    assert (model(other)[0][:, 6:] - logits[:, 6:]).abs().max() > 1e-3
    torch.testing.assert_close(seen[0].weights.sum(-1), torch.ones(3, 2, 10))
    block, h = model.blocks[0], model.token(x) + model.position.weight
    mixed = h + block.out((seen[0].weights @ seen[0].values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(
        seen[0].hidden, mixed + block.down(torch.nn.functional.gelu(block.up(block.norm2(mixed))))
    )
    torch.testing.assert_close(model.head(model.norm(seen[1].hidden)), logits)


def test_edits():
    model, x = make(), torch.randint(20, (3, 10))
    h = model.token(x) + model.position.weight
    for block in model.blocks:
        h = h + block.down(torch.nn.functional.gelu(block.up(block.norm2(h))))
    torch.testing.assert_close(model(x, frozenset({NO_HEADS}))[0], model.head(model.norm(h)))
    _, seen = model(x, frozenset({NO_FIRST_VALUE}))
    assert seen[0].values[:, :, 0].abs().max() == 0
    assert seen[0].values[:, :, 1].abs().min() > 0


def test_a_learned_key():
    model, x = make(key_bias=True), torch.randint(20, (3, 10))
    _, seen = model(x)
    torch.testing.assert_close(seen[0].weights.sum(-1) + seen[0].spare, torch.ones(3, 1, 10))
    block = model.blocks[0]
    q, k, _ = block.qkv(block.norm1(model.token(x) + model.position.weight)).chunk(3, -1)
    logits = torch.cat([q @ k.mT, q @ block.spare[0][None, :, None]], -1) / 4
    visible = torch.cat([torch.ones(10, 10).tril(), torch.ones(10, 1)], 1).bool()
    torch.testing.assert_close(seen[0].spare[:, 0], logits.masked_fill(~visible, -torch.inf).softmax(-1)[..., -1])
    with pytest.raises(InputError, match="softmax"):
        Tiny(5, 5, 4, 1, weights="elu")
    with pytest.raises(InputError, match="adam or sgd"):
        optimiser("lion", model.parameters(), 1.0)


# ---------------------------------------------------------------------- Bigram-Backcopy


def test_sequences_copy_after_triggers_and_follow_the_bigrams_elsewhere():
    x = bb.sequences(4000, 24)
    assert (x[:, 0] == bb.FIRST).all()
    assert (x[:, 1] >= bb.TRIGGERS).all()
    now, then, before = x[:, 1:-1], x[:, 2:], x[:, :-2]
    trigger = now < bb.TRIGGERS
    assert (then[trigger] == before[trigger]).all()
    assert 0.2 < trigger.float().mean() < 0.6
    following, marginal = bb.bigrams()
    torch.testing.assert_close(following.sum(1), torch.ones(64, dtype=torch.double))
    assert (marginal.diff() <= 0).all()
    letter = int(marginal[3:].argmax()) + 3
    seen = torch.bincount(then[now == letter], minlength=64).double()
    seen /= seen.sum()
    assert (seen - following[letter]).abs().sum() < 0.15
    # and every prediction an oracle makes is right
    assert float((-(following * following.clamp(min=1e-12).log()).sum(1) * marginal).sum()) == pytest.approx(
        2.4, abs=0.3
    )


class Oracle(torch.nn.Module):
    """Copies at triggers and gives the bigrams elsewhere, with logits a little off where asked."""

    def __init__(self, wrong=0.0):
        super().__init__()
        self.wrong = wrong

    def forward(self, x, edits=frozenset()):
        following, _ = bb.bigrams()
        logits = torch.full((*x.shape, 65), -30.0)
        inner = x < 64
        logits[inner] = torch.nn.functional.pad(following[x[inner]].clamp(min=1e-13).log().float(), (0, 1), value=-30.0)
        before = torch.cat([x[:, :1], x[:, :-1]], 1)
        copied = torch.nn.functional.one_hot(before, 65).float() * 60 - 30
        logits = torch.where((x < bb.TRIGGERS)[..., None], copied, logits)
        return logits + self.wrong * torch.nn.functional.one_hot(torch.tensor(64), 65) * 60, []


def test_losses_of_an_oracle():
    x = bb.sequences(50, 32)
    found = bb.losses(Oracle(), x)
    assert found.triggers < 1e-6
    assert abs(found.others) < 1e-4
    worse = bb.losses(Oracle(1.0), x)
    assert worse.triggers > 0.5
    assert worse.others > 10


def test_extremes_of_planted_states():
    x = bb.sequences(8, 12)

    class Planted(torch.nn.Module):
        def forward(self, x, edits=frozenset()):
            trigger = (x < bb.TRIGGERS)[:, None, :, None]
            weights = torch.zeros(8, 1, 12, 12)
            weights[..., :1] = torch.where(trigger, 0.1, 0.7)
            values, hidden = torch.ones(8, 1, 12, 4), torch.ones(8, 12, 6)
            values[:, :, 0] *= 0.25
            hidden[:, 0] *= 5
            from foveal.lens.lab.model import Seen

            return None, [Seen(weights, values, hidden, torch.zeros(8, 1, 12))]

    found = bb.extremes(Planted(), x)
    for got, expected in zip((found.sink, found.awake, found.drain, found.peak), (0.7, 0.1, 0.25, 5.0), strict=True):
        assert float(got) == pytest.approx(expected)


def test_training_learns_to_copy():
    torch.manual_seed(0)
    model = Tiny(65, 16, 32, 1)
    curves = bb.train(model, "adam", 1e-2, 150, 32, 16, lambda line, share: None, "arm")
    assert curves["arm.triggers"][0] > 3
    assert curves["arm.triggers"][-1] < 1
    assert curves["arm.others"][-1] < 0.4


# ---------------------------------------------------------------------- sinks


def test_rates_are_the_papers():
    """A head that looks at token 0 alone, and one that looks everywhere alike, whose importance has a closed form."""
    from foveal.lens.lab.model import Seen

    n = 12
    one, even = torch.zeros(n, n), torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    one[:, 0] = 1
    spare = torch.tensor([0.2, 0.6])[None, :, None].expand(3, 2, n)
    seen = Seen(torch.stack([one, even]).expand(3, 2, n, n), torch.zeros(()), torch.zeros(()), spare)

    class Fixed(torch.nn.Module):
        def forward(self, x):
            return None, [seen]

    closed = [sum(1 / (i + 1) for i in range(j, n)) / (n - j) for j in range(n)]
    for threshold in (0.1, 0.2, 0.3):
        got, key = rates(Fixed(), torch.zeros(3, n), threshold)
        expected = [((j == 0) + (closed[j] > threshold)) / 2 for j in range(n)]
        assert got.tolist() == pytest.approx(expected)
        assert key == pytest.approx(0.5 if threshold >= 0.2 else 1.0)


def test_windows_are_stretches_of_the_text():
    ids, size = characters()
    assert int(ids.max()) == size - 1
    text = ids.numpy().astype("uint8").tobytes()
    assert all(row.numpy().astype("uint8").tobytes() in text for row in windows(5, 30))


# ---------------------------------------------------------------------- in-context regression


def test_two_small_opposite_heads_are_one_debiased_step():
    x, y, query, label = icl.prompts(4000, 40, 5, 0.1)
    model = icl.Attention(5, 2)
    w, m = torch.tensor([0.05, -0.05]), torch.tensor([10.0, -10.0])
    with torch.no_grad():
        model.key_query.zero_()
        model.value.zero_()
        model.key_query[:, :5] = w[:, None, None] * torch.eye(5)
        model.value[:, -1] = m
        guess = model(x, y, query)
        step = icl.debiased_step(x, y, query)
        assert float(torch.corrcoef(torch.stack([guess, step]))[0, 1]) > 0.9999
        torch.testing.assert_close(guess, float((w * m).sum()) * step, atol=0.02, rtol=0.05)
        best = step * icl.best_rate(step, label)
    for nudge in (0.95, 1.05):
        assert (best * nudge - label).square().mean() > (best - label).square().mean()
    at = icl.structure(model)
    torch.testing.assert_close((at.w, at.m), (w, m))
    assert at.key_query == at.value == at.zero_sum == at.homogeneity == 0
    assert at.agree == 1


def test_variance_of_prompts():
    lab = get_lab("icl-preconditioning", spread=9.0)
    assert lab.variance().tolist() == pytest.approx([3 ** (i / 2 - 1) for i in range(5)], rel=1e-5)
    x = icl.prompts(5000, 40, 5, 0.1, lab.variance())[0]
    torch.testing.assert_close(x.flatten(0, 1).var(0), lab.variance(), rtol=0.03, atol=0)


def test_structure_sees_what_is_off():
    model = icl.Attention(3, 2)
    with torch.no_grad():
        model.key_query.zero_()
        model.key_query[0, :3] = torch.diag(torch.tensor([2.0, 2.0, 2.0]))
        model.key_query[1, :3] = torch.diag(torch.tensor([1.0, 1.0, 1.0]))
        model.key_query[0, 0, 1] = 1.0  # one entry off the diagonal: energy 1 of 12 + 3 + 1
        model.value.copy_(torch.tensor([[0.0, 0.0, 1.0, 3.0], [0.0, 0.0, 0.0, -1.0]]))
    at = icl.structure(model)
    assert at.key_query == pytest.approx(1 / 16)
    assert at.value == pytest.approx(1 / 11)
    assert at.zero_sum == pytest.approx(2 / 4)
    assert at.homogeneity == pytest.approx(1 / 1.5)
    assert at.agree == 0.5


def test_ridge_is_bayes():
    x, y, query, label = icl.prompts(3, 20, 4, 0.5)
    for i in range(3):
        a = x[i].double().numpy()
        beta = np.linalg.solve(a.T @ a + 0.25 * 4 * np.eye(4), a.T @ y[i].double().numpy())
        assert float(icl.ridge(x, y, query, 0.5)[i]) == pytest.approx(beta @ query[i].double().numpy(), abs=1e-4)
    x, y, query, label = icl.prompts(20000, 20, 4, 0.5)
    error = (icl.ridge(x, y, query, 0.5) - label).square().mean()
    assert all((icl.ridge(x, y, query, s) - label).square().mean() > error for s in (0.05, 2.0))


# ---------------------------------------------------------------------- several regressions


def planted(w: torch.Tensor, m: torch.Tensor) -> multitask.Attention:
    """Heads with w [heads, tasks] on the diagonal of KQ and m [heads, tasks] from each label to its own prediction."""
    heads, tasks = w.shape
    model = multitask.Attention(3, tasks, heads)
    with torch.no_grad():
        model.key_query.zero_()
        model.value.zero_()
        model.key_query[:, : 3 * tasks] = torch.diag_embed(w.repeat_interleave(3, 1))
        model.value[:, :, 3 * tasks :] = torch.diag_embed(m)
    return model


def test_a_pair_a_task_is_a_step_of_each_task():
    x, y, query, label = multitask.prompts(4000, 40, 3, 2, 0.1)
    w = torch.tensor([[0.05, 0.0], [-0.05, 0.0], [0.0, 0.05], [0.0, -0.05]])
    with torch.no_grad():
        guess = planted(w, w.sign() * 7)(x, y, query)
        best = multitask.steps_of_tasks(x, y, query, label)
    for t in (0, 1):
        step = icl.debiased_step(x[:, :, 3 * t : 3 * t + 3], y[:, :, t], query[:, 3 * t : 3 * t + 3])
        torch.testing.assert_close(guess[:, t], 0.7 * step, atol=0.02, rtol=0.05)
        torch.testing.assert_close(best[:, t], step * icl.best_rate(step, label[:, t]))


def test_three_heads_can_share_two_tasks():
    """Directions at thirds of a circle: sum m = 0 and sum m w = the identity, to first order one step of each task."""
    x, y, query, _ = multitask.prompts(4000, 40, 3, 2, 0.1)
    angle = torch.arange(3) * 2 * math.pi / 3
    w = torch.stack([angle.cos(), angle.sin()], 1)
    with torch.no_grad():
        guess = planted(0.03 * w, 2 / 3 / 0.03 * w)(x, y, query)
    for t in (0, 1):
        step = icl.debiased_step(x[:, :, 3 * t : 3 * t + 3], y[:, :, t], query[:, 3 * t : 3 * t + 3])
        assert float(torch.corrcoef(torch.stack([guess[:, t], step]))[0, 1]) > 0.999


def test_sharing_sees_who_serves_whom():
    model = planted(
        torch.tensor([[2.0, 0.0], [1.0, -1.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [-1.0, 2.0], [0.0, 2.0]])
    )
    with torch.no_grad():
        model.value[0, 1, 0] = 1.0  # off: energy 1 of 1 + 1 + 4 + 4 + 1
    at = multitask.sharing(model)
    torch.testing.assert_close(at.w, torch.tensor([[2.0, 0.0], [1.0, -1.0], [0.0, 3.0]]))
    assert at.purity.tolist() == pytest.approx([1.0, 0.5, 1.0])
    assert at.value == pytest.approx(1 / 11)
    assert at.zero_sum == pytest.approx(1.0)  # the second task's 4 of 4; the first's is 0 of 2
    assert at.m[1].diagonal().tolist() == [-1.0, 2.0]


def test_tasks_have_features_of_their_own():
    x, y, query, label = multitask.prompts(6000, 5, 3, 2, 0.0)
    assert x.shape == (6000, 5, 6)
    assert label.shape == (6000, 2)
    for t in (
        0,
        1,
    ):  # three features and five examples without noise: each task's weights follow, and the label from them
        own = slice(3 * t, 3 * t + 3)
        beta = torch.linalg.lstsq(x[:50, :, own], y[:50, :, t : t + 1]).solution[..., 0]
        torch.testing.assert_close((beta * query[:50, own]).sum(-1), label[:50, t], atol=1e-3, rtol=1e-3)
    assert float(y.var()) == pytest.approx(1.0, rel=0.05)


# ---------------------------------------------------------------------- recall


def test_recall_asks_for_the_value_after_each_key():
    tokens, at, values = recall.Recall()._data(30, 4, torch.device("cpu"))
    for row, places, due in zip(tokens.tolist(), at.tolist(), values.tolist(), strict=True):
        first = dict(zip(row[0:16:2], row[1:16:2], strict=True))
        assert sorted(row[p] for p in places) == sorted(first)
        assert [first[row[p]] for p in places] == due


def test_mixers_are_the_systems_of_the_paper():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 7, 3, generator=g, dtype=torch.double)
    gate, one = torch.randn(7, generator=g, dtype=torch.double), torch.ones(1, 1, dtype=torch.double)

    def weights(system):
        return system.operator()[..., 0, 0]

    phi = dynamics.elu_features(q), dynamics.elu_features(k)
    linear = weights(dynamics.linear_attention(*phi, one, dynamics.row_sums(*phi)))
    torch.testing.assert_close(recall.linear(q[None], k[None], gate[None])[0], linear)
    normalised = weights(dynamics.normalised_attention(q, k, one, gate))
    torch.testing.assert_close(recall.normalised(q[None], k[None], gate[None])[0], normalised)
    scores = (q @ k.T / 3**0.5).exp().tril()
    torch.testing.assert_close(recall.softmax(q[None], k[None], gate[None])[0], scores / scores.sum(1, keepdim=True))


def test_bad_sizes_of_recall_are_refused():
    with pytest.raises(InputError, match="pairs"):
        get_lab("recall", pairs=10)
    with pytest.raises(InputError, match="large"):
        get_lab("recall", small=8, large=4)


# ---------------------------------------------------------------------- scan and snap


def test_occurrence_and_composition():
    p = snap.occurrence(2, 1)
    assert p.shape == (2, 30)
    assert p[0, :10].tolist() == pytest.approx([1 / 15.5] * 10)
    assert p[1, 20:].tolist() == pytest.approx([x / 15.5 for x in np.linspace(0.1, 1, 10)])
    assert p[0, 20:].abs().sum() == p[1, 10:20].abs().sum() == 0
    torch.testing.assert_close(snap.composition(torch.zeros(2, 30), p, 1), p)
    z = torch.randn(2, 30)
    c = snap.composition(z, p, 1)
    # what a long context of tokens drawn from p gets, in the limit
    context = p[1].multinomial(400_000, replacement=True)
    got = torch.zeros(30, dtype=torch.double).index_add_(0, context, z[1, context].double().softmax(0))
    torch.testing.assert_close(got, c[1], atol=3e-3, rtol=0)
    shared = snap.composition(torch.zeros(1, 50), snap.occurrence(1, 4), 4)
    assert shared.shape == (4, 50)


def test_the_layers_gradient():
    """From zero, the output's gradient is (chance - target) times the normalised bag; the attention's is zero."""
    layer = snap.Layer(2, 30, 30, torch.device("cpu"))
    context, target = torch.randint(30, (4, 9)), torch.tensor([3, 3, 7, 1])
    layer.loss(torch.tensor([0, 1, 0, 1]), context, target).backward()
    bag = torch.nn.functional.one_hot(context, 30).float().mean(1)
    bag = bag / bag.norm(dim=1, keepdim=True)
    expected = (1 / 30 - torch.nn.functional.one_hot(target, 30).float()).T @ bag / 4
    torch.testing.assert_close(layer.y.grad, expected)
    assert layer.z.grad.abs().max() < 1e-9


def test_scan_and_snap():
    """The whole lab takes seconds; common mass falls as an independent reading of the official code found (0.645 to 0.504)."""
    report = get_lab("scan-and-snap", ratios=(1.0, 5.0)).run()
    assert report.holds
    common = report.curves["ratio 1.common"]
    assert common[0] == pytest.approx(0.645, abs=1e-3)
    assert common[-1] == pytest.approx(0.504, abs=0.01)


# ---------------------------------------------------------------------- the command


def test_the_command(tmp_path):
    from foveal.cli import app

    run = CliRunner().invoke
    listed = run(app, ["lab"])
    assert all(name in listed.output for name in labs())
    file = tmp_path / "out.json"
    done = run(app, ["lab", "head-count", "--set", "steps=3", "--device", "cpu", "--out", str(file)])
    assert done.exit_code == 0, done.output
    assert "does not hold" in done.output
    assert json.loads(file.read_text())["settings"]["steps"] == 3
    for wrong in (
        ["nothing"],
        ["head-count", "--set", "steps"],
        ["head-count", "--set", "steps=x y"],
        ["head-count", "--set", "a=1"],
    ):
        assert isinstance(run(app, ["lab", *wrong]).exception, InputError)
