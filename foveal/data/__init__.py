"""Text that ships with the package."""

import lzma
from functools import cache
from importlib.resources import files


@cache
def book() -> str:
    """The whole text of *Moby-Dick; or, The Whale* (1851), about 1.2 million characters."""
    return lzma.decompress(files(__name__).joinpath("moby_dick.txt.xz").read_bytes()).decode("utf-8")
