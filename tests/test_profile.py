"""Profiles: what is written is read back, other models and broken files are refused, `generate` uses them."""

import pytest
from models import tiny
from test_cli import folder, foveal_cli, one_sentence  # noqa: F401

import foveal
from foveal.errors import InputError
from foveal.hub import model_identity
from foveal.profile import Profile, load_profile
from foveal.store import Layout


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        ("h2o(budget=0.25)", Layout()),
        ("h2o(budget=512)", Layout(True, "int8")),
        ("quest(budget=64, skip=0) | h2o(budget=0.5)", Layout(paged=False)),
        ("ablate(heads=((1, 2), (0, 3)))", Layout()),
    ],
)
def test_what_is_saved_is_loaded(method, layout, model, tmp_path):
    evidence = {"answer": 'say "so"\n\\ \u00e9\x7f', "samples": 3, "of_dense": 0.98, "sure": True, "lengths": [1, 2]}
    saved = Profile(foveal.get_method(method), model_identity(model), layout, evidence)
    loaded = load_profile(saved.save(tmp_path / "a" / "foveal.toml"))
    assert loaded == saved
    assert type(loaded.budget) is type(saved.budget)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["foveal.toml"]


def test_a_profile_puts_its_method_and_layout_on_its_model(model):
    profile = Profile(foveal.get_method("h2o", budget=0.5), model_identity(model), Layout(format="int8"))
    with profile.attach(model) as session:
        assert (session.method, session.layout) == (profile.method, profile.layout)
    other = tiny("llama", fresh=True)
    for weight in other.parameters():
        weight.data += 1
    for use in (profile.attach, profile.check):
        with pytest.raises(InputError, match=r"made for .*, but the model is .* \(weights differ\)"):
            use(other)


def test_a_check_touches_nothing_and_does_not_mind_the_name(model):
    here = model_identity(model)
    before = model.config._attn_implementation
    Profile(foveal.get_method("h2o", budget=0.5), here | {"name": "elsewhere/the-same"}).check(model)
    assert model.config._attn_implementation == before
    with pytest.raises(InputError, match=r"made for another model.*\(layers, heads differ\)"):
        Profile(foveal.get_method("h2o", budget=0.5), {"layers": 99, "heads": 99}).check(model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[:-3] + '"', "is not TOML"),
        (lambda text: text.replace("profile 1", "profile 9"), "expected format"),
        (lambda text: text.replace('"h2o(', '"h20('), r"did you mean 'h2o'\?"),
        (lambda text: text.replace("method =", "methods ="), "expected 'method'"),
        (lambda text: text.replace("[model]", "[models]"), "expected 'model'"),
        (lambda text: text.replace("budget = 0.25", "budget = 0.5", 1), "make them agree"),
        (lambda text: text.replace("[layout]", "[layout]\npages = 3"), "to hold only paged, format"),
    ],
)
def test_broken_profiles_are_told_apart(change, said, model, tmp_path):
    path = Profile(foveal.get_method("h2o", budget=0.25), model_identity(model), evidence={"n": 1}).save(tmp_path / "p")
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    with pytest.raises(InputError, match=said):
        load_profile(path)


def test_a_profile_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the profile .*none\.toml: no such file"):
        load_profile(tmp_path / "none.toml")


# ---------------------------------------------------------------------- the command line


def test_tune_writes_a_profile_that_generate_uses(foveal_cli, folder, tmp_path):  # noqa: F811
    text = "Call me Ishmael. Some years ago, never mind how long, "
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{i} {text * 3}"}}\n' for i in range(3)))
    plan = ["--data", "p.jsonl", "--methods", "h2o", "--memory", "0.6", "--max-drop", "0.9", "--tokens", "4"]
    result = foveal_cli("tune", folder, *plan, "--out", "found")
    assert result.code == 0, result.err
    assert result.out.startswith("Use h2o(budget=")
    assert sorted(p.name for p in (tmp_path / "found").iterdir()) == [
        *("answers.jsonl", "foveal.toml", "report.html", "results.json")
    ]
    profile = load_profile(tmp_path / "found" / "foveal.toml")
    assert profile.model["name"] == str(folder)
    with_profile = foveal_cli("generate", text * 4, "--profile", "found/foveal.toml", "--tokens", "6")
    assert with_profile.code == 0, with_profile.err
    by_hand = foveal_cli(
        *("generate", text * 4, "--model", folder, "--tokens", "6", "--method", "h2o", "--budget", profile.budget)
    )
    assert with_profile.out == by_hand.out
    assert with_profile.err.splitlines()[-1] == by_hand.err.splitlines()[-1]
    none = foveal_cli(
        "tune", folder, *plan[:-6], "--memory", "0.01", "--max-drop", "0", "--out", "found", "--tokens", "4"
    )
    assert none.code == 1
    assert none.out.startswith("Nothing tried keeps 100% of dense in 1% of the cache; nearest is h2o(budget=")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["tune", "--memory", "0"], ["memory = 0", "share"]),
        (["tune", "--max-drop", "2"], ["max_drop = 2"]),
        (["tune", "--data", "none.jsonl"], ["none.jsonl"]),
        (["tune", "--data", "bad.jsonl"], ["line 2 of bad.jsonl"]),
        (["tune", "--methods", "h20"], ["did you mean 'h2o'?"]),
        (["tune", "--tasks", "paskey"], ["did you mean 'passkey'?"]),
        (["generate", "hi", "--profile", "none.toml"], ["none.toml"]),
        (["generate", "hi", "--profile", "p.toml", "--method", "h2o"], ["--profile", "--method"]),
        (["compare", "--tasks", "needle(per_contxt=1)"], ["did you mean 'per_context'?"]),
        (["compare", "--tasks", "needle(1"], ["cannot read the task"]),
    ],
)
def test_bad_input_is_one_sentence(args, words, foveal_cli, tmp_path):  # noqa: F811
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a b"}\n{"prompt": "a\n')
    one_sentence(foveal_cli(*args), *words)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]
