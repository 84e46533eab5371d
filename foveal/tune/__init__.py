"""Find the method and budget that serve a model best under a memory limit, on the user's own prompts."""

from .search import Tuning, tune

__all__ = ["Tuning", "tune"]
