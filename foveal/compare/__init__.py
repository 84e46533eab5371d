"""Compare methods in one run: same prompts, same model, same machine; scores, resident bytes, memory and speed."""

from .run import Comparison, Record, compare

__all__ = ["Comparison", "Record", "compare"]
