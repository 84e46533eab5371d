"""Commands that train or measure once for a model: their common options, and one sentence for what is wrong."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from foveal.command import Command, Place, run
from foveal.errors import InputError


@dataclass(frozen=True)
class Recipe:
    steps: int = 5
    held_out: int = 2
    rate: float = 1e-3


def command():
    found = Command("a.module", "What it does.\n\nAnd more.")
    found.add_settings(Recipe(), "steps", "held_out", "rate")
    return found


def test_options_become_the_place_and_the_settings(tmp_path):
    place, chosen = command().read(
        ["--model", "m", "--out", str(tmp_path / "x.json"), "--held-out", "7", "--rate", "2e-4"]
    )
    assert place == Place("m", Path(tmp_path / "x.json"), None, None) and not (tmp_path / "x.json").exists()
    assert Recipe(**vars(chosen)) == Recipe(held_out=7, rate=2e-4)
    assert command().read([])[0] == Place(None, None, None, None)
    help = command().format_help()
    assert "python -m a.module" in help and "What it does." in help and "And more." not in help


def test_what_cannot_be_is_said_before_any_work(tmp_path, capsys):
    with pytest.raises(InputError, match="--out"):
        command().read(["--out", str(tmp_path)])  # a folder
    with pytest.raises(SystemExit) as caught:
        command().read(["--steps", "1.5"])
    assert caught.value.code == 2 and "--steps" in capsys.readouterr().err

    def wrong():
        raise InputError("this is wrong: do that")

    with pytest.raises(SystemExit) as caught:
        run(wrong)
    assert caught.value.code == 2 and capsys.readouterr().err == "error: this is wrong: do that\n"
