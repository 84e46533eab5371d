"""Methods together, methods as text, and what is refused: each error names what was wrong and what is possible."""

import dataclasses

import pytest
import torch
from models import tiny
from reference import attend, causal, close, hook, simulate_h2o, thin, watch

import foveal
from foveal.edits import Bias, Keep, Plane
from foveal.method import _REGISTRY, Chain, Method, check_budget, check_count, check_range, tokens_of
from foveal.selection import Band
from foveal.spec import parse, written
from foveal.verify import Claim

N, PROMPT, HEADS, KV = 66, 60, 6, 2


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(3))


# ---------------------------------------------------------------------- refused when written


def named(name, **hooks):
    method = hook(**hooks)
    type(method).name = name
    return method


def test_what_cannot_compose_is_refused_with_the_names():
    replaces = [named(n, attend=lambda step, selection, bias: None) for n in ("one", "two")]
    with pytest.raises(foveal.CompositionError, match=r"replace the attention itself in one \| two"):
        replaces[0] | replaces[1]
    for weigher in ({"weigh": lambda step: None}, {"reweigh": lambda step: None}):
        with pytest.raises(foveal.CompositionError, match="no other can weigh it"):
            replaces[0] | named("biased", **weigher)
    window = foveal.get_method("streaming-llm", positions="cache")
    with pytest.raises(foveal.CompositionError, match=r"renumber positions in streaming-llm \| streaming-llm"):
        window | foveal.get_method("streaming-llm", positions="cache", budget=20)
    with pytest.raises(foveal.CompositionError, match=r"two methods of hook \| hook keep a plane called 'age'"):
        hook(planes={"age": Plane(0.0)}) | hook(planes={"age": Plane(0.0)})
    with pytest.raises(foveal.CompositionError, match=r"streaming-llm \| h2o: statistics per key .* first"):
        foveal.get_method("streaming-llm") | foveal.get_method("h2o")


def test_one_statistic_has_one_window():
    with pytest.raises(foveal.CompositionError, match=r"'col_low:4' and 'col_low:400'.*same window"):
        hook(needs=["col_low:4"]) | foveal.get_method("scissorhands")
    assert hook(needs=["col_low:400", "lse"]) | foveal.get_method("scissorhands")


def test_the_third_of_three_is_checked_too():
    a, b = foveal.get_method("h2o"), foveal.get_method("zero-tuning")
    with pytest.raises(foveal.CompositionError, match=r"h2o \| h2o: statistics per key"):
        a | b | a
    with pytest.raises(foveal.CompositionError, match=r"h2o \| h2o: statistics per key"):
        (b | a) | (b | a)


def test_masses_may_be_shared():
    masses = [hook(planes={"mass": Plane(1.0)}, keep=lambda step: None) for _ in range(2)]
    assert (masses[0] | masses[1]).asks == ("keep",)


def test_a_chain_answers_what_its_parts_answer():
    chain = foveal.get_method("quest") | foveal.get_method("zero-tuning") | foveal.get_method("h2o")
    assert isinstance(chain, Chain) and [m.name for m in chain.parts] == ["quest", "zero-tuning", "h2o"]
    assert chain.asks == ("select", "weigh", "keep")
    assert chain.params["quest"]["page"] == 16
    assert chain == foveal.get_method("quest | zero-tuning | h2o") != foveal.get_method("quest | h2o")


# ---------------------------------------------------------------------- equal to a reference, step by step


@pytest.mark.parametrize("order", ["select first", "keep first"])
def test_select_and_keep(order, model, ids):
    """The statistics H2O gathers are those under the selection, and what it drops stays hidden."""
    band, h2o = hook(select=lambda step: Band(3, [20, 9, 30, 14, 5, 60])), foveal.get_method("h2o", budget=24)
    age = torch.arange(N)[:, None] - torch.arange(N)
    allowed = torch.stack([(torch.arange(N) < 3) | (age < r) for r in (20, 9, 30, 14, 5, 60)])
    seen = watch(model, band | h2o if order == "select first" else h2o | band, ids, (PROMPT,))
    for b, layer, s in seen.each():
        visible, kept, _ = simulate_h2o(s, PROMPT, 24, 0.5, seen=allowed)
        assert [call[layer][b] for call in seen.kept] == kept
        assert close(s.out, attend(s, visible.repeat_interleave(3, 0) & allowed))


@pytest.mark.parametrize("order", ["weigh first", "keep first"])
def test_weigh_and_keep(order, model, ids):
    value = torch.tensor([3.0, -2.0, 0.0, 1.0, 5.0, -4.0])
    biased, h2o = hook(weigh=lambda step: Bias.at(step, 7, value)), foveal.get_method("h2o", budget=16)
    bias = torch.zeros(HEADS, N, N).double()
    bias[:, :, 7] = value.double()[:, None]
    seen = watch(model, biased | h2o if order == "weigh first" else h2o | biased, ids, (PROMPT,))
    for b, layer, s in seen.each():
        visible, kept, _mass = simulate_h2o(s, PROMPT, 16, 0.5, bias=bias)
        assert [call[layer][b] for call in seen.kept] == kept
        assert kept != simulate_h2o(s, PROMPT, 16, 0.5)[1]
        assert close(s.out, attend(s, visible, bias))


def test_two_selections_narrow(model, ids):
    band, window = hook(select=lambda step: Band(9, 12)), foveal.get_method("streaming-llm", budget=30, sink=4)
    token = torch.arange(N)
    age = token[:, None] - token
    visible = causal(N) & ((token < 9) | (age < 12)) & ((token < 4) | (age < 26))
    for *_, s in watch(model, band | window, ids, (PROMPT,)).each():
        assert close(s.out, attend(s, visible[None]))


def test_two_keepers_take_turns(model, ids):
    """The second finds what the first has left, in slots of its own."""
    seen_by_second = []

    def drop_even(step):
        seen_by_second.append(sorted(step.token[0, 0].tolist()))
        return None if step.decode else Keep(mask=step.token % 2 == 1)

    for *_, s in watch(model, thin() | hook(keep=drop_even), ids[:1], (PROMPT,)).each():
        token = torch.arange(N)
        stay = torch.stack(
            [torch.zeros(N).bool(), (token % 3 != 1) & (token % 2 == 1)]
        )  # KV head 0 had kept the even ones
        visible = causal(N) & (stay[:, None] | (token >= PROMPT) | (token[:, None] < PROMPT))
        assert close(s.out, attend(s, visible))
    assert [t for t in seen_by_second[0] if t < PROMPT] == list(range(0, PROMPT, 2))


# ---------------------------------------------------------------------- as text


@pytest.mark.parametrize(
    "text",
    [
        "h2o",
        "h2o(budget=0.25)",
        "quest(budget=256, page=4) | h2o(budget=0.5, recent=0.25)",
        "zero-tuning(gamma=0.5, heads=(1, 4))",
        "ablate(heads=((0, 1), (2, 3)), mode='zero')",
        "streaming-llm(budget=32, positions='cache') | zero-tuning(gamma=3.0)",
        "duo(roles='some folder/roles.json')",
    ],
)
def test_text_and_method_are_one(text):
    method = foveal.get_method(text)
    assert written(method) == text
    assert parse(written(method)) == method
    assert parse(text.replace(" ", "") if "folder" not in text else text) == method


def test_every_example_survives_being_written():
    for name, cls in foveal.methods().items():
        for params in (cls.example, cls.neutral):
            method = foveal.get_method(name, **params)
            assert foveal.get_method(written(method)) == method
    assert written(None) == "dense"
    assert written(foveal.get_method("h2o", budget=0.2)) == "h2o"  # a default is not written


@pytest.mark.parametrize(
    "text",
    [
        "h2o(0.5)",
        "h2o(budget=)",
        "h2o(budget=0.5",
        "h2o budget=0.5)",
        "h2o(budget=f())",
        "h2o(**{})",
        "| h2o",
        "quest |",
        "(budget=1)",
    ],
)
def test_unreadable_text_shows_how_to_write_it(text):
    with pytest.raises(foveal.InputError, match=r"h2o\(budget=0.25\)|no method called"):
        parse(text)


def test_parameters_belong_in_one_place():
    with pytest.raises(foveal.InputError, match=r"inside the brackets .* not both"):
        foveal.get_method("h2o(budget=0.5)", recent=0.1)


# ---------------------------------------------------------------------- the registry


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(foveal.InputError, match="no method called 'h20': did you mean 'h2o'"):
        foveal.get_method("h20")
    with pytest.raises(foveal.InputError, match="no method called 'streaming_llm': did you mean 'streaming-llm'"):
        foveal.get_method("h2o | streaming_llm")
    with pytest.raises(foveal.InputError, match=r"no method called 'zzzz': choose from .*h2o.*quest"):
        foveal.get_method("zzzz")
    with pytest.raises(foveal.InputError, match="method 'h2o' has no parameter 'budgt': did you mean 'budget'"):
        foveal.get_method("h2o", budgt=0.5)
    with pytest.raises(foveal.InputError, match="'quest' has no parameter 'zzzz': choose from budget, page, skip"):
        foveal.get_method("quest(zzzz=1)")


def test_a_name_is_taken_once():
    with pytest.raises(foveal.InputError, match=r"'h2o' exists already: foveal\.methods\.keep\.h2o"):
        foveal.method("h2o", paper="p", claim=Claim("c", untestable="a test"))(type("Another", (Method,), {}))
    assert foveal.methods()["h2o"].__module__ == "foveal.methods.keep.h2o"


def test_defining_a_method_registers_it():
    try:

        @foveal.method("of-a-test", paper="p", claim=Claim("c", untestable="a test"))
        @dataclasses.dataclass(frozen=True)
        class OfATest(Method):
            width: int = 3

        assert foveal.get_method("of-a-test(width=5)") == OfATest(5)
        assert (OfATest.name, OfATest.paper, str(OfATest.claim)) == ("of-a-test", "p", "c")
    finally:
        _REGISTRY.pop("of-a-test", None)


def test_every_method_says_what_it_is():
    for name, cls in foveal.methods().items():
        assert cls.name == name and cls.paper and cls.claim and cls.__doc__
        assert cls(**cls.example).asks, f"{name} answers no question"


# ---------------------------------------------------------------------- bad values


@pytest.mark.parametrize("wrong", [0, -1, 0.0, 1.01, -0.5, True, "a", None, float("nan")])
def test_budgets(wrong):
    with pytest.raises(
        foveal.InputError, match=r"budget = .*share of the tokens seen \(a float above 0 and up to 1.0\).*int from 1"
    ):
        check_budget(wrong)
    for name in ("h2o", "quest", "top-k", "scissorhands", "streaming-llm"):
        with pytest.raises(foveal.InputError, match=r"^budget = "):
            foveal.get_method(name, budget=wrong)


def test_a_budget_in_tokens():
    assert [tokens_of(b, 60) for b in (0.25, 0.26, 1.0, 0.001, 7, 100)] == [15, 16, 60, 1, 7, 100]
    assert tokens_of(0.1, 30) == 3 and tokens_of(0.7, 10) == 7  # 0.1 * 30 is 3.0000000000000004


def test_ranges_and_counts():
    check_range("x", 2, 2, 2)
    check_count("n", 0)
    for value in (1.9, 3.1, "2", True, None, float("nan")):
        with pytest.raises(foveal.InputError, match=r"x = .*: expected a number from 2 to 3"):
            check_range("x", value, 2, 3)
    with pytest.raises(foveal.InputError, match=r"x = -1: expected a number of at least 0"):
        check_range("x", -1, 0)
    for value in (1, 2.0, True, "3"):
        with pytest.raises(foveal.InputError, match=r"n = .*: expected a whole number of at least 2"):
            check_count("n", value, 2)


NUMBERS = [
    (name, f.name, type(f.default))
    for name, cls in foveal.methods().items()
    for f in dataclasses.fields(cls)
    if type(f.default) in (int, float)
]


@pytest.mark.parametrize(("name", "field", "kind"), NUMBERS)
def test_every_number_is_checked_before_anything_is_computed(name, field, kind):
    for wrong in ("x", None, [], *((-3, 1.5) if kind is int else ())):
        if wrong is None and foveal.methods()[name].__dataclass_fields__[field].default is None:
            continue
        with pytest.raises(foveal.InputError) as caught:
            foveal.get_method(name, **{field: wrong})
        assert str(caught.value).startswith(f"{field} = {wrong!r}") and "expected" in str(caught.value)


def test_a_refused_method_leaves_the_model_as_it_was(model, ids):
    before = model(ids[:, :8]).logits
    for wrong in ("ablate(heads=((9, 0),))", "zero-tuning(heads=(77,))"):
        with pytest.raises(foveal.InputError):
            foveal.attach(model, wrong)
        assert model.config._attn_implementation != "foveal"
    with foveal.attach(model, "h2o"):
        pass
    assert torch.equal(model(ids[:, :8]).logits, before)
