"""Foveal: see what attention does, spend less of it, correct it, in any Hugging Face transformer."""

__version__ = "0.1.0"

# `methods` is a folder as well as a function: imported first, so that the name below stays the function
from . import methods as _methods  # noqa: F401
from .attach import Session, attach, detach
from .cache import Store
from .edits import Bias, Keep, Plane, Reweigh
from .errors import CompositionError, FovealError, InputError, ModelFileError, UnsupportedModel
from .hub import load
from .method import Method, get_method, method, methods

__all__ = [
    "Bias",
    "CompositionError",
    "FovealError",
    "InputError",
    "Keep",
    "Method",
    "ModelFileError",
    "Plane",
    "Reweigh",
    "Session",
    "Store",
    "UnsupportedModel",
    "__version__",
    "attach",
    "detach",
    "get_method",
    "load",
    "method",
    "methods",
]
