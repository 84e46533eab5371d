"""`look` as a whole: results as objects, files, tables; what it refuses; a model as it was found."""

import io
import json
import sys
import types

import pytest
import torch
from lens_reference import close
from models import tiny
from rich.console import Console
from test_tasks import characters
from transformers import MambaConfig, MambaForCausalLM

import foveal
from foveal.errors import InputError, UnsupportedModel
from foveal.lens import Look, Measure, lenses, look
from foveal.lens.reading import _pieces
from foveal.lens.sinks import Sinks

TEXT = "One. Two is here. Three? Four! Five it is. Six. Seven too. Eight. Nine, ten. Eleven."


@pytest.fixture(scope="module")
def model():
    return tiny("llama", vocab_size=257, max_position_embeddings=128)


@pytest.fixture(scope="module")
def tokenizer():
    return characters(None)


@pytest.fixture(scope="module")
def seen(model, tokenizer):
    return look(model, tokenizer, TEXT)


def test_every_lens_reads_along_and_names_its_measures(seen):
    assert seen.source["left_out"] == {}
    assert {m.name.partition(".")[0] for m in seen} == set(lenses()) == set(seen.source["lenses"])
    assert "".join(seen.texts) == "<s>" + TEXT
    for m in seen:
        assert m.meaning
        assert m.unit
        assert m.value.dtype in (torch.float32, torch.int64)


def test_a_reading_changes_nothing(model, tokenizer):
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        before = model(ids).logits
        look(model, tokenizer, TEXT, chunk=20)
        after = model(ids).logits
    assert torch.equal(before, after)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_are_removed_after_an_error(model, tokenizer):
    def stop(line, share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look(model, tokenizer, TEXT, progress=stop)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    look(model, tokenizer, TEXT, "sinks")  # and it can be attached again


def test_progress_rises_to_one(model, tokenizer):
    shares = []
    look(model, tokenizer, TEXT, "sinks", chunk=20, progress=lambda line, share: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert len(shares) == 3 * 5  # layers, pieces


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 8, 9, 100])
@pytest.mark.parametrize("chunk", [2, 3, 8])
def test_pieces_cover_the_text_and_none_is_a_decode_step(length, chunk):
    pieces = [*_pieces(length, chunk)]
    assert [i for a, b in pieces for i in range(a, b)] == list(range(length))
    assert all(b - a >= 2 for a, b in pieces) or length == 1
    assert max(b - a for a, b in pieces) <= max(chunk, 3)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_the_shortest_texts_can_be_looked_at(model, length):
    found = look(model, None, list(range(5, 5 + length)))
    assert found["sinks.first"].shape == (3, 6)
    if length == 1:
        close(found["sinks.first"], torch.ones(3, 6))


# ---------------------------------------------------------------------- files and tables


def test_files_give_the_same_look_again(seen, tmp_path):
    path = seen.save(tmp_path / "deep" / "lens.json")
    again = Look.load(path)
    assert (again.tokens, again.texts, again.measured) == (seen.tokens, seen.texts, seen.measured)
    assert again.identity == seen.identity
    assert again.source["lenses"]["sinks"]["threshold"] == 0.3
    assert [m.name for m in again] == [m.name for m in seen]
    for a, b in zip(again, seen, strict=True):
        assert (a.axes, a.unit, a.meaning, a.value.dtype) == (b.axes, b.unit, b.meaning, b.value.dtype)
        assert torch.equal(a.value.nan_to_num(-7), b.value.nan_to_num(-7))


def test_damaged_files_are_refused(seen, tmp_path):
    path = seen.save(tmp_path / "lens.json")
    numbers = path.with_suffix(".safetensors")
    whole = numbers.read_bytes()
    numbers.write_bytes(whole[:100])
    with pytest.raises(InputError, match="damaged"):
        Look.load(path)
    numbers.unlink()
    with pytest.raises(InputError, match="numbers beside it"):
        Look.load(path)
    path.write_text(json.dumps({"format": "something else"}))
    with pytest.raises(InputError, match="does not say"):
        Look.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        Look.load(tmp_path / "nothing.json")


def test_pandas_gets_one_row_a_head(seen, monkeypatch):
    frames = []
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=lambda x: frames.append(x) or x))
    heads = seen.to_pandas()
    assert heads["layer"] == [i for i in range(3) for _ in range(6)]
    assert heads["head"] == [*range(6)] * 3
    assert heads["sinks.first"] == seen["sinks.first"].flatten().tolist()
    assert "sinks.rate" not in heads
    long = seen.measure("profile.distance").to_pandas()
    x, row = seen["profile.distance"], 29
    assert long["profile.distance"][row] == float(x[long["layer"][row], long["head"][row], long["bin"][row]])
    assert len(long["bin"]) == x.numel()
    assert seen.measure("sinks.rate").to_pandas() == {"sinks.rate": [float(seen["sinks.rate"])]}
    assert seen.measure("sinks.rate_by_layer").to_pandas()["layer"] == [0, 1, 2]


def test_without_pandas_it_says_what_to_install(seen, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="pip install pandas"):
        seen.to_pandas()


def test_the_summary_names_the_strongest_heads(seen):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(seen)
    text = console.export_text()
    x = seen["sinks.first"]
    layer, head = divmod(int(x.argmax()), 6)
    line = next(line for line in text.splitlines() if line.startswith("sinks.first"))
    assert f"{layer}.{head} ({float(x.max()):.3g})" in line
    assert f"{float(x.mean()):.3g}" in line


def test_measures_of_heads_become_head_roles(seen):
    roles = seen.roles("sinks.first", "distance.span")
    assert roles.best("sinks.first", 1)[0][2] == pytest.approx(float(seen["sinks.first"].max()))
    with pytest.raises(InputError, match=r"finite measure \[layer, head\]"):
        seen.roles("profile.distance")


def test_layers_without_full_attention_are_not_measured(tokenizer):
    found = look(tiny("gemma2", vocab_size=257), tokenizer, TEXT, ["sinks", "massive-activations"])
    assert found.measured == (1, 3)
    assert found["sinks.first"].isnan().all(-1).tolist() == [True, False, True, False]
    assert found["massive-activations.residual_peak"].isfinite().all()
    assert found.roles().measured == (1, 3)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the text is empty"),
        (" \n", "the text is empty"),
        ([], "the text is empty"),
        (torch.zeros(2, 3, dtype=torch.long), "token ids"),
        ([0.5], "token ids"),
        ([3, 257], "from 0 to 256, got 3 to 257"),
        ("x" * 200, "201 tokens long but the model has 128 positions"),
    ],
)
def test_bad_texts(model, tokenizer, text, message):
    with pytest.raises(InputError, match=message):
        look(model, tokenizer, text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["sink"], "did you mean 'sinks'"),
        ([], "no lens was named"),
        (["sinks", Sinks(threshold=0.1)], "named twice"),
    ],
)
def test_bad_lenses(model, tokenizer, given, message):
    with pytest.raises(InputError, match=message):
        look(model, tokenizer, TEXT, given)


def test_bad_parameters(model, tokenizer):
    for make in (lambda: Sinks(threshold=2), lambda: Sinks(top=0), lambda: look(model, tokenizer, TEXT, chunk=1)):
        with pytest.raises(InputError):
            make()
    with pytest.raises(InputError, match=r"no measure 'sinks\.frist': did you mean 'sinks\.first'"):
        look(model, tokenizer, TEXT, "sinks")["sinks.frist"]
    with pytest.raises(InputError, match="axes"):
        Measure.of("x", torch.zeros(2), (), "1", "")


def test_a_model_without_attention_is_refused():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    with pytest.raises(UnsupportedModel, match=r"Mamba.*no attention layers"):
        look(mamba, None, [1, 2, 3])


def test_a_model_with_windows_only_is_refused():
    with pytest.raises(UnsupportedModel, match="no layer with full attention"):
        look(tiny("mistral-sliding"), None, [1, 2, 3])


def test_an_attached_model_is_refused(model, tokenizer):
    with foveal.attach(model), pytest.raises(foveal.FovealError, match="attached already"):
        look(model, tokenizer, TEXT, "sinks")
