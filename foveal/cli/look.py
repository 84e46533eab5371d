"""`foveal look`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..command import check_writable
from ..errors import InputError
from .shared import (
    Device,
    Dtype,
    Model,
    app,
    console,
    load_model,
    progress_bar,
    read_text,
    split_values,
)

if TYPE_CHECKING:
    from ..lens import Look

EXPORTS = ("headvis",)


@app.command()
def look(
    model: Model = None,
    text: Annotated[Path | None, typer.Option(help="Text file to read; '-' reads standard input.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The text itself, in place of --text.")] = None,
    lens: Annotated[
        str | None, typer.Option(help="Comma-separated names of lenses; default: all that suit the text.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Read at most so many tokens of the text.")] = None,
    out: Annotated[
        Path,
        typer.Option(help="Where to write what was measured, with numbers (.safetensors) and page (.html) beside it."),
    ] = Path("lens.json"),
    page: Annotated[bool, typer.Option(help="Write the page; without it, only the numbers.")] = True,
    heads: Annotated[
        str | None,
        typer.Option(help="Heads whose rows the page holds exactly before others: layer.head, as in 18.6,23.2."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help='Also show which keys this method keeps of the text, as in "snapkv(budget=0.2)".')
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="A lens.json to put beside this one on the page.")] = None,
    show: Annotated[
        Path | None, typer.Option(help="A lens.json to make a page of, in place of a text; no model is loaded.")
    ] = None,
    export: Annotated[
        str | None,
        typer.Option(help="headvis: also write the static format of that viewer, into a folder of that name."),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """What does attention do on a text: sinks, distances, head roles and the residual stream behind them, in one pass and on one page."""
    from ..lens import Look

    if (text is not None) + (prompt is not None) + (show is not None) != 1:
        raise InputError(
            "name one text to look at: a file with --text FILE, or the text itself with --prompt, or a lens.json with --show"
        )
    if export is not None and export not in EXPORTS:
        raise InputError(f"--export {export}: expected one of {', '.join(EXPORTS)}")
    other = None if compare is None else Look.load(compare)
    if show is not None:
        if unused := [
            name for name, x in (("--method", method), ("--export", export), ("--heads", heads)) if x is not None
        ]:
            raise InputError(f"{unused[0]} needs the model: look at a text with it, not at a file with --show")
        found = Look.load(show)
        out = show
        check_writable(out.with_suffix(".html"), "--show")
    else:
        if length is not None and length < 1:
            raise InputError(f"--length {length}: ask for at least one token")
        check_writable(out, "--out")
        if out.suffix in (".html", ".safetensors"):
            raise InputError(f"--out {out}: that name is for the file beside it; end it in .json")
        found = _read(model, text, prompt, lens, length, _pairs(heads), method, export, page, device, dtype)
        console.print(found)
        written = found.without("picture").save(out)
        _say(f"wrote {written} and {written.with_suffix('.safetensors')}")
        if export is not None:
            from ..lens.headvis import export_headvis

            _say(f"wrote {export_headvis(found, out.parent / 'headvis')}")
    if page:
        file = found.save_page(out.with_suffix(".html"), other)
        _say(f"wrote {file}, {file.stat().st_size / 1e6:.1f} MB: open it in a browser")


def _read(model, text, prompt, lens, length, heads, method, export, page, device, dtype) -> Look:
    """Load the model and look at the text; what is wrong is said before either."""
    from .. import get_method
    from ..lens import look as run
    from ..lens.lens import choose
    from ..lens.page import Picture
    from ..lens.page.kept import with_kept
    from ..tasks.task import encode

    chosen = split_values(lens, "lens") or None
    choose(chosen)
    keeper = None if method is None else get_method(method)
    words = read_text(text) if prompt is None else prompt
    if not words.strip():
        raise InputError("the text is empty: give at least one word")
    network, tokenizer = load_model(model, device, dtype)
    ids = encode(tokenizer, words, special=True)[:length]
    if export is not None and not heads:
        config = network.config.get_text_config()
        heads = tuple((i, h) for i in range(config.num_hidden_layers) for h in range(config.num_attention_heads))
    with progress_bar("reading") as progress:
        found = run(
            network,
            tokenizer,
            ids,
            chosen,
            picture=Picture(heads=heads) if page or export else False,
            progress=progress,
        )
    return found if keeper is None else with_kept(found, network, keeper)


def _pairs(text: str | None) -> tuple[tuple[int, int], ...]:
    pairs = []
    for piece in split_values(text, "heads"):
        layer, dot, head = piece.partition(".")
        if not (dot and layer.isdecimal() and head.isdecimal()):
            raise InputError(f"--heads {text}: expected layer.head pairs, as in 18.6,23.2")
        pairs.append((int(layer), int(head)))
    return tuple(pairs)


def _say(words: str) -> None:
    console.print(words, highlight=False, markup=False, soft_wrap=True)
