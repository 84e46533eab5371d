"""Every GPU kernel compiles for Hopper on a machine without a GPU, and none spills registers."""

from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("triton")

import foveal.ops.gpu as gpu
from foveal.ops.gpu.variants import compile_variant

FILES = sorted(
    p.stem
    for p in Path(gpu.__file__).parent.glob("*.py")
    if "\ndef variants(" in p.read_text("utf-8") and p.stem != "variants"
)


@pytest.mark.parametrize("file", FILES)
def test_no_variant_spills(file):
    found = import_module(f"foveal.ops.gpu.{file}").variants()
    assert found
    assert not [v.name for v in found if compile_variant(v).spills]


def test_every_kernel_file_is_compiled():
    assert {
        "ragged",
        "pages",
        "blocks",
        "blocks_backward",
        "blocks_hopper",
        "stats",
        "pooled",
        "window",
        "antidiagonals",
        "top",
        "top_blocks",
        "tokens",
        "merge",
        "lists",
        "columns",
        "reweigh",
        "tree",
        "index",
        "renumbered",
        "votes",
        "few",
        "leave",
    } == set(FILES)
