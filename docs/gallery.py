"""The method gallery, made from the registry while the site is built: a new method appears by itself."""

import dataclasses
import inspect
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = {
    "select": "which keys may a query see?",
    "weigh": "how much does each key count?",
    "mix": "what happens to the head outputs?",
    "keep": "what stays in memory?",
}

INTRODUCTION = """\
# Methods

Every method answers one or more of the [four questions](../attach.md#the-four-questions); they are grouped here by the
main one. The paper and the claim are quoted from the method's file: a claim is what its authors report, not a
measurement made here. A number in brackets after a paper is its place in the list that Foveal works through. Write
`name(parameter=value)` wherever a method is asked for, and join with `|`.
"""


def registered():
    """The methods of this checkout, by folder: {"keep": {"h2o": H2O, ...}, ...}."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # this checkout is documented, also where another copy is installed
    import foveal

    groups = {question: {} for question in QUESTIONS}
    for name, cls in foveal.methods().items():
        groups.setdefault(cls.__module__.split(".")[2], {})[name] = cls
    return {question: group for question, group in groups.items() if group}


def on_config(config):
    """Put the pages into the navigation."""
    groups = [
        {question.capitalize(): [{name: page_of(name)} for name in group]} for question, group in registered().items()
    ]
    entry = next(item for item in config.nav if "Methods" in item)
    entry["Methods"] = ["methods/index.md", *groups]
    return config


def on_files(files, config):
    """Add the overview and a page for each method."""
    groups = registered()
    files.append(File.generated(config, "methods/index.md", content=overview(groups)))
    for group in groups.values():
        for name, cls in group.items():
            files.append(File.generated(config, page_of(name), content=page(cls)))
    return files


def page_of(name):
    return f"methods/{name}.md"


# ---------------------------------------------------------------------- pages


def overview(groups):
    """Tables of all methods, one for each main question."""
    lines = [INTRODUCTION]
    for question, group in groups.items():
        lines += [f"## {question.capitalize()}\n", QUESTIONS.get(question, "").capitalize() + "\n"]
        rows = [(f"[{name}]({name}.md)", paragraphs(cls)[0], cls.paper) for name, cls in group.items()]
        lines.append(table(("method", "what it does", "paper"), rows))
    return "\n".join(lines)


def page(cls):
    """Everything a reader needs to use one method, and its source."""
    method = cls()
    first, *rest = paragraphs(cls)
    path = Path(inspect.getsourcefile(cls))
    parts = [
        f"# {cls.name}",
        first,
        *(() if not cls.paper else (f"**Paper:** {cls.paper}",)),
        *(() if not cls.claim else (f"**Claim:** {cls.claim}",)),
        "## Use",
        use(cls),
        "## Parameters",
        parameters(cls),
        *rest,
        "## What it asks of the machinery",
        asks(method),
        f"## Source: `{path.relative_to(ROOT).as_posix()}`",
        "````python\n" + path.read_text(encoding="utf-8").rstrip() + "\n````",
    ]
    return "\n\n".join(parts) + "\n"


def use(cls):
    from foveal.spec import written

    example = written(cls(**cls.example))
    lines = [
        "```python",
        f'with foveal.attach(model, "{example}") as session:',
        "    out = model.generate(**inputs)",
        "```",
    ]
    named = cls.name if "budget" in cls.__dataclass_fields__ else f'"{example}"'
    lines += ["", "```sh", f"foveal compare --methods {named}", "```"]
    return "\n".join(lines)


def parameters(cls):
    fields = dataclasses.fields(cls)
    if not fields:
        return "None."
    rows = [(f"`{f.name}`", f"`{typename(f.type)}`", f"`{default(f)!r}`") for f in fields]
    return table(("parameter", "type", "default"), rows)


def default(field):
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def typename(kind):
    return kind.__name__ if type(kind) is type else str(kind)


def asks(method):
    """Questions answered, state and statistics, as a list."""
    planes = [
        f"`{name}` ({str(p.dtype).removeprefix('torch.')}, new keys {p.fill:g})" for name, p in method.planes.items()
    ]
    needs = [f"`{need}`" for need in sorted(method.needs)]
    reading = "like the dense model" if method.dense_prefill else "with the method at work"
    rows = [
        ("answers", ", ".join(f"`{q}`" for q in method.asks) or "nothing"),
        ("reads a prompt", reading),
        ("carries per key", ", ".join(planes) or "nothing"),
        ("needs", ", ".join(needs) + " (see [statistics](../how-it-works.md#statistics))" if needs else "nothing"),
    ]
    return "\n".join(f"- **{name}**: {value}" for name, value in rows)


# ---------------------------------------------------------------------- text


def paragraphs(cls):
    return [" ".join(p.split()) for p in inspect.getdoc(cls).split("\n\n")]


def cell(text):
    """One table cell: on one line, with bars escaped outside code."""
    pieces = " ".join(text.split()).split("`")
    return "`".join(piece if i % 2 else piece.replace("|", "\\|") for i, piece in enumerate(pieces))


def table(header, rows):
    lines = [header, ["---"] * len(header), *([cell(c) for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
