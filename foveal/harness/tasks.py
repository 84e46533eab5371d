"""Foveal's generated tasks as tasks of the harness: a YAML file each, whose samples are made for the model's tokenizer when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import yaml
from transformers import AutoTokenizer

from ..default_model import DEFAULT_MODEL, default_folder
from ..errors import InputError
from ..tasks import Sample, get_task, tasks

EXPORTED = tuple(name for name, task in tasks().items() if task.kind == "generate" and not task.needs_data)
"""Tasks with a written answer and without a data set of their own. Scores over given tokens (perplexity) depend on where exactly a text is
cut into tokens, which the harness decides by itself."""

LENGTH, SAMPLES = 2048, 100
_HEAD = "# Written by `python -m foveal.harness tasks`. Change length and samples here or with --metadata.\n"


def write_tasks(folder: str | Path) -> list[Path]:
    """Write a file for each exported task into a folder for `lm_eval --include_path`: tasks foveal_NAME, all with the tag `foveal`.

    The harness gives the whole prompt at once, so the question is part of what a method may compress by. Length in tokens, number of
    samples and seed are `text_length`, `samples` and `text_seed` of `--metadata` (default 2,048, 100 and 0).
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [_write(folder, name) for name in EXPORTED]
    except OSError as error:
        raise InputError(f"cannot write tasks to {folder}: {error.strerror or error}; choose another folder") from error


def _write(folder: Path, name: str) -> Path:
    config = {
        "task": f"foveal_{name}",
        "tag": "foveal",
        "output_type": "generate_until",
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"do_sample": False, "until": [], "max_gen_toks": get_task(name).max_new_tokens},
        "metadata": {"version": 1, "foveal_task": name, "text_length": LENGTH, "samples": SAMPLES, "text_seed": 0},
    }
    functions = "custom_dataset: !function foveal.harness.tasks.dataset\nprocess_results: !function foveal.harness.tasks.score\n"
    file = folder / f"foveal_{name}.yaml"
    file.write_text(_HEAD + yaml.safe_dump(config, sort_keys=False) + functions, encoding="utf-8")
    return file


def dataset(
    foveal_task: str,
    text_length: int = LENGTH,
    samples: int = SAMPLES,
    text_seed: int = 0,
    pretrained: str | None = None,
    tokenizer: str | None = None,
    **_: Any,
) -> dict[str, datasets.Dataset]:
    """The samples of a task for the model that is evaluated, whose arguments the harness passes on. Raises InputError for bad lengths."""
    source = tokenizer or pretrained or DEFAULT_MODEL
    if not isinstance(source, str):
        raise InputError("expected the model or its tokenizer by name: add tokenizer=NAME to the model's arguments")
    used = AutoTokenizer.from_pretrained(str(default_folder()) if source == DEFAULT_MODEL else source)
    made = get_task(foveal_task).samples(used, text_length, samples, text_seed, query_aware=True)
    return {"test": datasets.Dataset.from_list([_document(foveal_task, used, s) for s in made])}


def _document(name: str, tokenizer, sample: Sample) -> dict[str, Any]:
    golds = [sample.target] if isinstance(sample.target, str) else list(sample.target)
    ids = [*sample.context, *sample.question]
    return {
        "foveal_task": name,
        "prompt": tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        "answer": golds[0],
        "targets": golds,
        "several": not isinstance(sample.target, str),
        "extra": list(sample.extra),
        "length": sample.length,
        "depth": sample.depth,
        "index": sample.index,
        "seed": sample.seed,
        "turn": sample.turn,
    }


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The task's own score of one answer."""
    sample = Sample(
        context=(),
        question=(),
        target=tuple(doc["targets"]) if doc["several"] else doc["targets"][0],
        length=doc["length"],
        depth=doc["depth"],
        index=doc["index"],
        seed=doc["seed"],
        turn=doc["turn"],
        extra=tuple(doc["extra"]),
    )
    return {"score": float(get_task(doc["foveal_task"]).score(sample, results[0]))}
