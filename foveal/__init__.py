"""Foveal: see what attention does, spend less of it, correct it, in any Hugging Face transformer."""

__version__ = "0.1.0"

# `attach`, `method` and `methods` are files as well as functions: the files are imported first, so that the names below stay bound
from . import methods as _package
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
