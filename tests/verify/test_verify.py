"""Running claims: files, going on after an interruption, what cannot be tested, what breaks, the command, the docs table."""

import importlib.util
import json
from pathlib import Path

import pytest
from models import tiny
from typer.testing import CliRunner

import foveal
from foveal import cli
from foveal.default_model import DEFAULT_MODEL
from foveal.errors import InputError
from foveal.verify import Beats, BytesAtMost, Claim, Same, StaysNear
from foveal.verify import run as run_module
from foveal.verify.lab import Lab
from foveal.verify.run import check_names, claims, read, verify

BYTES = Claim("Half the bytes.", experiments=(BytesAtMost("h2o(budget=0.5)", 0.6, "perplexity", 400, 1),))
FAILING = Claim("No bytes.", number="0 of 7", experiments=(BytesAtMost("h2o(budget=0.5)", 0.1, "perplexity", 400, 1),))
LONG = Claim("Far.", experiments=(StaysNear("h2o", "perplexity", 0.1, length=100_000),))
SAME = Claim("One.", experiments=(Same("zero-tuning(gamma=1.0)", unlike="zero-tuning(gamma=2.0)"),))
WORDS = Claim("Said only.", untestable="it needs a telescope")


@pytest.fixture
def known(monkeypatch):
    """The claims there are, under the names of real methods."""
    known = {"duo": FAILING, "h2o": BYTES, "quest": LONG, "razor": WORDS, "zero-tuning": SAME}
    monkeypatch.setattr(run_module, "claims", lambda: known)
    return known


def verdicts(found):
    return {r.name: r.verdict for r in found.results}


def test_every_claim_gets_its_verdict_and_its_file(tools, known, tmp_path):
    found = verify(*tools, out=tmp_path)
    want = {
        "duo": "does not hold",
        "h2o": "holds",
        "quest": "not testable here",
        "razor": "not testable here",
        "zero-tuning": "holds",
    }
    assert verdicts(found) == want and not found.failed and not found.interrupted
    assert {f.stem for f in tmp_path.iterdir()} == set(want)
    by_name = {r.name: r for r in found.results}
    assert by_name["razor"].why == "it needs a telescope"
    assert "100,000 tokens" in by_name["quest"].why and "2,048 positions" in by_name["quest"].why
    assert by_name["duo"].why == "not so: h2o(budget=0.5) holds at most 10% of the dense bytes"
    assert all(read(tmp_path / f"{r.name}.json") == r for r in found.results)


def test_a_file_says_how_it_came_about_and_names_no_place(tools, known, tmp_path):
    model, tokenizer = tools
    old = model.name_or_path
    try:
        model.name_or_path = str(tmp_path / "models" / "mine")
        verify(model, tokenizer, ["h2o"], out=tmp_path, seed=3)
    finally:
        model.name_or_path = old
    text = (tmp_path / "h2o.json").read_text()
    data = json.loads(text)
    assert str(tmp_path) not in text
    meta = data["meta"]
    assert meta["command"] == "foveal verify h2o --model mine --seed 3"
    assert meta["model"] == "mine" and meta["seed"] == 3
    assert set(meta["versions"]) == {"foveal", "torch", "transformers", "python"} and meta["hardware"]["cores"]
    (finding,) = data["findings"]
    assert finding["n"] == 1 and finding["line"] == 0.6 and 0.5 < finding["measured"] < 0.6
    assert data["words"] == "Half the bytes." and data["paper"] == foveal.methods()["h2o"].paper


@pytest.mark.parametrize(
    ("said", "option"),
    [
        ("someone/some-model", " --model someone/some-model"),
        ("../some-model", " --model some-model"),
        (DEFAULT_MODEL, ""),
    ],
)
def test_the_command_in_a_file_names_the_model_unless_it_is_the_default(tools, known, monkeypatch, said, option):
    monkeypatch.setattr(tools[0], "name_or_path", said)
    (result,) = verify(*tools, ["h2o"]).results
    assert result.meta["command"] == f"foveal verify h2o{option}"


def test_finished_claims_are_not_repeated(tools, known, tmp_path, monkeypatch):
    first = verify(*tools, ["h2o", "duo"], out=tmp_path)
    assert sorted(first.again) == ["duo", "h2o"]
    with monkeypatch.context() as m:
        m.setattr(Lab, "scores", lambda *a: pytest.fail("asked again"))
        second = verify(*tools, ["h2o", "duo"], out=tmp_path)
    assert second.again == [] and verdicts(second) == verdicts(first)
    assert verify(*tools, ["h2o"], out=tmp_path, again=True).again == ["h2o"]
    assert verify(*tools, ["h2o"], out=tmp_path, seed=1).again == ["h2o"]
    known["duo"] = BYTES  # an experiment was changed
    assert verify(*tools, ["duo"], out=tmp_path).again == ["duo"]
    assert read(tmp_path / "duo.json").verdict == "holds"


def test_a_quick_claim_that_was_asked_less_is_asked_again(tools, known, tmp_path, monkeypatch):
    verify(*tools, ["h2o"], out=tmp_path, quick=True)
    assert verify(*tools, ["h2o"], out=tmp_path, quick=True).again == []
    monkeypatch.setattr(run_module, "QUICK", run_module.QUICK | {"length": 330})
    assert verify(*tools, ["h2o"], out=tmp_path, quick=True).again == ["h2o"]


def test_what_was_lacking_may_be_there_later(tools, known, tmp_path):
    verify(*tools, ["quest", "razor"], out=tmp_path)
    assert verify(*tools, ["quest", "razor"], out=tmp_path).again == ["quest"]  # razor's claim has no experiment at all


def test_an_interruption_loses_nothing_finished(tools, known, tmp_path, monkeypatch):
    stop = {"after": 1}

    def done(result):
        stop["after"] -= 1
        if not stop["after"]:
            raise KeyboardInterrupt

    found = verify(*tools, ["h2o", "duo", "zero-tuning"], out=tmp_path, done=done)
    assert found.interrupted and len(found.again) == 1
    finished = found.again[0]
    rest = verify(*tools, ["h2o", "duo", "zero-tuning"], out=tmp_path)
    assert sorted([finished, *rest.again]) == ["duo", "h2o", "zero-tuning"] and not rest.interrupted


def test_a_break_is_told_and_leaves_no_file(tools, known, tmp_path, monkeypatch):
    def broken(self, lab):
        raise RuntimeError("a mistake in the code")

    monkeypatch.setattr(Same, "run", broken)
    found = verify(*tools, ["zero-tuning", "h2o"], out=tmp_path)
    assert found.failed == {"zero-tuning": "RuntimeError: a mistake in the code"}
    assert verdicts(found) == {"h2o": "holds"} and not (tmp_path / "zero-tuning.json").exists()


def test_out_of_memory_is_no_verdict_on_the_claim(tools, known, monkeypatch):
    def full(self, lab):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Same, "run", full)
    (result,) = verify(*tools, ["zero-tuning"]).results
    assert (result.verdict, result.why) == ("not testable here", "out of memory")


def test_a_quick_run_has_files_of_its_own(tools, known, tmp_path):
    verify(*tools, ["h2o"], out=tmp_path)
    (result,) = verify(*tools, ["h2o"], out=tmp_path, quick=True).results
    assert {f.name for f in tmp_path.iterdir()} == {"h2o.json", "h2o.quick.json"}
    assert result.quick and result.meta["command"] == "foveal verify h2o --quick"


def test_another_models_results_are_not_mixed_in(tools, known, tmp_path):
    verify(*tools, ["h2o"], out=tmp_path)
    other = tiny("qwen2", vocab_size=257, max_position_embeddings=2048)
    with pytest.raises(InputError, match=r"h2o\.json holds the result of .*another model: choose another folder"):
        verify(other, tools[1], ["h2o"], out=tmp_path)


def test_bad_requests_are_refused_before_any_work(tools, known, tmp_path):
    with pytest.raises(InputError, match="no method called 'h2oo': did you mean 'h2o'"):
        verify(*tools, ["h2oo"])
    with pytest.raises(InputError, match="seed = -1"):
        verify(*tools, ["h2o"], seed=-1)
    known["duo"] = Claim("w", experiments=(StaysNear("h2o(bugdet=0.5)", "needle", 0.1),))
    with pytest.raises(InputError, match="no parameter 'bugdet'"):
        verify(*tools, ["duo"])
    known["duo"] = Claim("w", experiments=(StaysNear("h2o", "neddle", 0.1),))
    with pytest.raises(InputError, match="got 'neddle'"):
        verify(*tools, ["duo"])
    verify(*tools, ["razor"], out=tmp_path)
    whole = json.loads((tmp_path / "razor.json").read_text())
    torn = (
        ("{", "Expecting"),
        ("[]", "mapping"),
        (json.dumps(whole | {"meta": {"seed": 0}}), "no asked, date, dtype,"),
        (json.dumps(whole | {"meta": whole["meta"] | {"model_identity": "x"}}), "string indices"),
        (json.dumps(whole | {"meta": whole["meta"] | {"model_identity": {}}}), "weights"),
        (json.dumps(whole | {"verdict": "great"}), "no verdict is called 'great'"),
        (json.dumps(whole | {"findings": [{"says": "so"}]}), "missing 10 required"),
    )
    for text, why in torn:
        (tmp_path / "h2o.json").write_text(text)
        with pytest.raises(InputError, match=rf"h2o\.json' is not one .*{why}.*: remove it"):
            verify(*tools, ["h2o"], out=tmp_path)


def test_progress_never_goes_back_and_ends_at_one(tools, known):
    beats = Beats("h2o(budget=0.5)", "streaming-llm(budget=0.5)", "perplexity", by=0.1, length=200, n=1)
    known["duo"] = Claim("Better.", experiments=(beats, beats))
    told = []
    verify(*tools, progress=lambda line, share: told.append((line, share)))
    shares = [share for _, share in told]
    assert shares == sorted(shares) and shares[-1] == 1.0 and told[-1][0] == "done"
    assert any(line.startswith("zero-tuning: ") for line, _ in told)


# ---------------------------------------------------------------------- registry, command, docs


def test_all_registered_claims_name_what_exists():
    assert check_names(None) == list(foveal.methods())
    for name, claim in claims().items():
        arms = {arm for e in claim.experiments for arm, _ in e.arms()}
        assert not arms or name == "ablate" or any(arm.startswith(name) for arm in arms), (
            f"{name} is not tested by its claim"
        )


def test_recorded_results_still_answer_their_claims():
    files = sorted((Path(__file__).parents[2] / "claims").glob("*.json"))
    known = claims()
    assert files
    for file in files:
        assert read(file).plan == run_module._plan(known[file.stem]), f"{file.name} was measured for other experiments"
    aware = Claim("w", experiments=(StaysNear("h2o", "needle", 0.1, query_aware=True),))
    assert "query_aware=True" in run_module._plan(aware)[0]


@pytest.mark.parametrize("claim", ["", "It is so.", None, 5])
def test_a_method_without_a_claim_cannot_be_registered(claim):
    with pytest.raises(InputError, match=r"method 'of-a-test' has no claim that can be re-checked \(got "):
        foveal.method("of-a-test", paper="p", claim=claim)
    with pytest.raises(InputError, match="has no claim"):
        foveal.method("of-a-test", paper="p")


@pytest.fixture
def command(tools, known, monkeypatch, tmp_path):
    monkeypatch.setattr("foveal.cli.verify.load_for", lambda *a: tools)
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(cli.app, ["verify", *args])


def test_the_command_writes_and_tells(command, tmp_path):
    result = command("h2o", "duo")
    assert result.exit_code == 0, result.output
    assert "does not hold" in result.output and "wrote 2 to claims" in result.output
    assert sorted(f.name for f in (tmp_path / "claims").iterdir()) == ["duo.json", "h2o.json"]
    assert "wrote 0 to claims; 2 finished before" in command("h2o", "duo").output
    assert "wrote 5 to all" in command("--all", "--out", "all").output


def test_a_quick_command_says_how_little_it_asked(command):
    said = "at most 2 questions (1 of a prompt of its own) with answers of 8 tokens, or 8 tokens of 1 text, at 384 tokens. That shows"
    assert said in " ".join(command("--all", "--quick").output.split())
    assert said not in " ".join(command("--all").output.split())


def test_a_table_names_the_length_that_was_really_asked(command):
    words = [" ".join(command("h2o", *more).output.replace("\n", " ").split()) for more in ((), ("--quick",))]
    assert ["400 tokens" in w for w in words] == [True, False] and "384 tokens)" in words[1]


def test_the_command_wants_names_or_all(command):
    for args in ((), ("h2o", "--all")):
        result = command(*args)
        assert isinstance(result.exception, InputError) and "give --all" in str(result.exception)


def test_a_broken_claim_ends_in_exit_code_1(command, monkeypatch):
    monkeypatch.setattr(Same, "run", lambda self, lab: 1 / 0)
    result = command("zero-tuning")
    assert result.exit_code == 1 and "zero-tuning broke: ZeroDivisionError" in " ".join(result.output.split())


def test_the_docs_table_is_made_of_the_files(tools, known, tmp_path):
    spec = importlib.util.spec_from_file_location("docs_claims", Path(__file__).parents[2] / "docs" / "claims.py")
    docs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docs)
    verify(*tools, ["h2o", "duo", "razor"], out=tmp_path)
    page = docs.page(tmp_path)
    rows = {line.split("]")[0]: line for line in page.splitlines() if line.startswith("| [")}
    assert set(rows) == {"| [h2o", "| [duo", "| [razor"}
    assert "**holds**" in rows["| [h2o"] and "at most 0.6, n = 1: holds" in rows["| [h2o"]
    assert "No bytes.<br>Paper: 0 of 7." in rows["| [duo"] and "**does not hold**" in rows["| [duo"]
    assert "h2o(budget=0.5) holds at most 10% of the dense bytes (perplexity, 400 tokens)" in rows["| [duo"]
    assert "**not testable here: it needs a telescope**" in rows["| [razor"]
    assert "Not run yet: [quest](methods/quest.md), [zero-tuning](methods/zero-tuning.md)." in page
