"""Reading data sets: local folders and files, or a data set on the Hugging Face hub; JSON, JSON lines, zip."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub

from foveal.errors import InputError


def find(data: str | Path, names: list[str], what: str, hub: tuple[str, ...] = ()) -> Path:
    """The file to read: `data` itself, the first of `names` that exists in the folder `data`, or one from the hub.

    data: a file, a folder, or the id of a data set on the hub ("owner/name"). hub: the paths to try there, by default
    `names`. Raises `InputError` where there is nothing to read.
    """
    path = Path(data).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        raise InputError(f"Expected {what} in the folder {path} as {' or '.join(names)}, found none; add the file.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(data)):
        raise InputError(f"Expected a file, a folder or a data set on the hub with {what}, got '{data}'; give one.")
    problem: Exception | None = None
    for name in hub or names:
        try:
            return Path(huggingface_hub.hf_hub_download(str(data), name, repo_type="dataset"))
        except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
            problem = error
    raise InputError(
        f"Expected {what} in '{data}', which is neither here nor could be fetched from the hub "
        f"({type(problem).__name__}); give a local copy."
    ) from problem


def read_lines(path: Path, member: str | None = None) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, empty lines aside; `member` names it inside a zip archive.

    Raises `InputError` with the number of the line that is not a JSON object.
    """
    rows = []
    for number, line in enumerate(_text(path, member).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = _loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"Expected a JSON object on line {number} of {path}, got {line!r:.60}: {_why(error)}."
            ) from None
        if not isinstance(row, dict):
            raise InputError(f"Expected a JSON object on line {number} of {path}, got {line!r:.60}; correct it.")
        rows.append(row | {"": number})
    if not rows:
        raise InputError(f"Expected samples in {path}, found an empty file; give one with a JSON object on each line.")
    return rows


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises `InputError` with the line at which it stops being JSON."""
    try:
        return _loads(_text(path, None))
    except json.JSONDecodeError as error:
        raise InputError(f"Expected JSON in {path}, got an error on line {error.lineno}: {error.msg}.") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"Expected JSON in {path} that can be used, got {_why(error)}; correct it.") from None


def wanted(row: dict[str, Any], names: tuple[str, ...], path: Path) -> list[Any]:
    """The values of a row's fields. Raises `InputError` naming the line and the field that is missing."""
    for name in names:
        if name not in row:
            raise InputError(
                f"Expected the field '{name}' on line {row['']} of {path}, found {', '.join(filter(None, row))}; add it."
            )
    return [row[name] for name in names]


def wanted_texts(row: dict[str, Any], names: tuple[str, ...], path: Path) -> list[str]:
    """As `wanted`, for fields that must hold texts."""
    values = wanted(row, names, path)
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str):
            raise InputError(f"Expected a text as '{name}' on line {row['']} of {path}, got {value!r:.40}; correct it.")
    return values


def _loads(text: str) -> Any:
    """What a JSON text holds. Raises ValueError also for halves of characters, which no tokenizer takes."""
    found = json.loads(text)
    if "\\u" in text:
        json.dumps(found, ensure_ascii=False).encode()
    return found


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    if isinstance(error, RecursionError):
        return "more brackets in brackets than can be read"
    if isinstance(error, UnicodeEncodeError):
        return "half of a character (a surrogate alone)"
    return "a number of too many digits"


def _text(path: Path, member: str | None) -> str:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                inside = [name for name in archive.namelist() if name.rsplit("/", 1)[-1] == member]
                if not inside:
                    raise InputError(f"Expected {member} in the archive {path}, found none; give another file.")
                return archive.read(inside[0]).decode("utf-8-sig")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"Expected UTF-8 text in {path}, got byte {error.start:,} that is not; convert it.") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; give another file.") from error
