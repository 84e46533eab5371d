"""What can go wrong, each as one sentence: what was expected, what came, what to do."""

import difflib
from collections.abc import Iterable


class FovealError(Exception):
    """Base of every error Foveal raises on purpose; the command line prints it and exits with code 2."""


class InputError(FovealError, ValueError):
    """A parameter, prompt or file has a value Foveal cannot work with."""


class UnsupportedModel(FovealError, TypeError):
    """The model lacks something the request needs, or is built in a way Foveal cannot follow."""


class CompositionError(FovealError, TypeError):
    """Two methods were combined that cannot be."""


class ModelFileError(FovealError, OSError):
    """A model file is missing, corrupt, or could not be fetched."""


def suggest(word: str, known: Iterable[str]) -> str:
    """How to put a wrong name right: "did you mean ...?" where one is near, else the list of what there is."""
    known = list(known)
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(known)}"
