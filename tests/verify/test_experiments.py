"""Experiments against arms whose values are given: what is compared, which line decides, when a comparison is void."""

from types import SimpleNamespace

import pytest
import torch

from foveal.errors import InputError
from foveal.verify import Beats, BytesAtMost, Chosen, Claim, Falls, HeadsCarry, Same, StaysNear
from foveal.verify.lab import Arm
from foveal.verify.run import together


def recall(right, n=20, share=1.0, reads=1.0):
    return Arm([1.0] * right + [0.0] * (n - right), 1, True, share, reads, 5)


def nats(value, n=64):
    return Arm([value + 0.01 * (i % 3) for i in range(n)], -1, False, 1.0, 1.0, 1)


class Given:
    """A lab that gives what it was given: scores by arm, or by (arm, draw)."""

    seed = 0

    def __init__(self, logits=None, **arms):
        self.arms, self._logits = arms, logits or {}
        config = SimpleNamespace(vocab_size=49_152)
        self.model = SimpleNamespace(dtype=torch.float32, config=SimpleNamespace(get_text_config=lambda: config))

    def scores(self, arm, cell):
        return self.arms.get(f"{arm}_{cell.draw}", self.arms.get(arm))

    def ablations(self, score, count, draws, mode):
        assert (score, count, mode) == ("retrieval", 5, "uniform")
        return ["top", *(f"random{i}" for i in range(draws))]

    def logits(self, arm):
        return self._logits[arm]


def one(experiment, **arms):
    (finding,) = experiment.run(Given(**arms))
    return finding


@pytest.mark.parametrize(
    ("right", "verdict", "measured"), [(20, "holds", 0.0), (18, "holds", -0.1), (17, "does not hold", -0.15)]
)
def test_near_dense_on_the_same_answers(right, verdict, measured):
    found = one(StaysNear("a", "needle", within=0.1), dense=recall(20), a=recall(right))
    assert (found.verdict, found.condition, found.line) == (verdict, "at least", -0.1)
    assert found.measured == pytest.approx(measured) and found.n == 20
    assert found.arms == {"dense": 1.0, "a": right / 20}


def test_a_verdict_is_sure_where_the_whole_interval_is_on_its_side():
    assert one(StaysNear("a", "needle", within=0.1), dense=recall(20), a=recall(2)).sure
    assert not one(StaysNear("a", "needle", within=0.1), dense=recall(20), a=recall(17)).sure
    assert not one(StaysNear("a", "needle", within=0.1), dense=recall(20), a=recall(20)).sure  # 3 of 20 may be unseen
    assert one(StaysNear("a", "needle", within=0.2), dense=recall(20), a=recall(20)).sure


def test_for_perplexity_fewer_nats_are_better():
    near = StaysNear("a", "perplexity", within=0.1)
    assert one(near, dense=nats(3.0), a=nats(3.05)).measured == pytest.approx(-0.05)
    assert one(near, dense=nats(3.0), a=nats(3.05)).verdict == "holds"
    assert one(near, dense=nats(3.0), a=nats(3.2)).verdict == "does not hold"
    assert one(near, dense=nats(3.0), a=nats(2.0)).verdict == "holds"


def test_what_should_fail_is_asked_to_fail():
    assert one(Falls("a", "perplexity", by=1.0), dense=nats(3.0), a=nats(4.5)).verdict == "holds"
    assert one(Falls("a", "perplexity", by=1.0), dense=nats(3.0), a=nats(3.9)).verdict == "does not hold"
    assert one(Falls("a", "needle", by=0.5), dense=recall(20), a=recall(8)).measured == pytest.approx(0.6)


def test_a_dense_model_that_cannot_do_the_task_makes_it_void():
    found = one(StaysNear("a", "needle", within=0.1), dense=recall(11), a=recall(11))
    assert (
        found.verdict == "void" and not found.sure and found.why == "the dense model itself scores 0.55 here, below 0.6"
    )
    found = one(StaysNear("a", "perplexity", within=0.1), dense=nats(7.0), a=nats(7.0))  # of ln(49,152) = 10.8 nats
    assert found.verdict == "void" and "7.01 nats per token here, above 6.48" in found.why


def test_a_better_arm_must_not_cost_more():
    beats = Beats("a", "b", "needle", by=0.3)
    assert one(beats, dense=recall(20), a=recall(15, share=0.251), b=recall(8, share=0.25)).verdict == "holds"
    assert one(beats, dense=recall(20), a=recall(13, share=0.25), b=recall(8, share=0.25)).verdict == "does not hold"
    found = one(beats, dense=recall(20), a=recall(15, share=0.3), b=recall(8, share=0.25))
    assert found.verdict == "void" and "a costs 30.0% of dense in bytes and b 25.0%" in found.why


def test_cost_may_be_counted_in_keys_read():
    beats = Beats("a", "b", "needle", by=0.3, at="reads")
    a, b = recall(15, share=1.0, reads=0.25), recall(8, share=0.25, reads=0.25)
    assert one(beats, dense=recall(20), a=a, b=b).verdict == "holds"
    assert one(beats, dense=recall(20), a=recall(15, reads=0.5), b=b).verdict == "void"


def test_bytes_are_held_against_a_share():
    assert one(BytesAtMost("a", 0.3), a=recall(0, share=0.3)).verdict == "holds"
    found = one(BytesAtMost("a", 0.3), a=recall(0, share=0.31))
    assert (found.verdict, found.measured, found.sure, found.condition) == ("does not hold", 0.31, True, "at most")


def test_heads_carry_what_random_heads_do_not():
    carry = HeadsCarry("needle", by=0.4, count=5, draws=2)
    lab = Given(dense=recall(20), top=recall(4), random0=recall(20), random1=recall(16))
    dense, control = carry.run(lab)
    assert (dense.measured, control.measured) == (pytest.approx(0.8), pytest.approx(0.7))
    assert [dense.verdict, control.verdict] == ["holds", "holds"]
    lab = Given(dense=recall(20), top=recall(4), random0=recall(8), random1=recall(8))
    assert [f.verdict for f in carry.run(lab)] == ["holds", "does not hold"]
    lab = Given(dense=recall(10), top=recall(0), random0=recall(10), random1=recall(10))
    assert [f.verdict for f in carry.run(lab)] == ["void", "void"]


def test_what_is_chosen_on_one_draw_is_tested_on_another():
    chosen = Chosen(("a", "b"), "needle", by=0.1)
    arms = {"a_1": recall(9), "b_1": recall(12), "a_0": recall(20), "b_0": recall(15), "dense": recall(14)}
    found = one(chosen, **arms)
    assert found.settings["chosen"] == "b" and found.settings["tried"] == {"a": 0.45, "b": 0.6}
    assert found.measured == pytest.approx(0.05) and found.verdict == "does not hold"


def test_among_nats_the_fewest_are_chosen():
    arms = {"a_1": nats(3.0), "b_1": nats(2.0), "a_0": nats(3.0), "b_0": nats(2.9), "dense": nats(3.0)}
    assert one(Chosen(("a", "b"), "perplexity", by=0.05), **arms).settings["chosen"] == "b"


def test_logits_are_the_same_only_where_something_else_is_not():
    want = torch.tensor([[1.0, -4.0]])
    same = Same("a", unlike="b")
    found = one(same, logits={"dense": want, "a": want + 1e-5, "b": want + 1})
    assert found.verdict == "holds" and found.measured == pytest.approx(1e-5 / 4, rel=0.1)
    assert one(same, logits={"dense": want, "a": want + 0.01, "b": want + 1}).verdict == "does not hold"
    found = one(same, logits={"dense": want, "a": want, "b": want})
    assert found.verdict == "void" and "b gives the same logits too" in found.why


def test_a_claim_holds_when_all_of_it_holds():
    assert together([("holds", "x"), ("holds", "y")]) == ("holds", "")
    assert together([("holds", "x"), ("void", "why"), ("void", "why")]) == ("void", "why")
    assert together([("void", "why"), ("does not hold", "x stays")]) == ("does not hold", "not so: x stays")
    assert together([]) is None


NEAR = (StaysNear("h2o", "needle", within=0.1),)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"words": " "}, "without words"),
        ({"words": 3}, "the words of a claim as text, got 3"),
        ({"words": "w"}, "either experiments or the reason"),
        ({"words": "w", "experiments": NEAR, "untestable": "too large"}, "either experiments or the reason"),
        ({"words": "w", "experiments": list(NEAR)}, "as a tuple"),
        ({"words": "w", "experiments": ("h2o",)}, "as a tuple"),
    ],
)
def test_half_a_claim_is_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        Claim(**wrong)


def test_a_claim_reads_as_its_words():
    assert str(Claim("It is so.", experiments=NEAR)) == "It is so."
