"""One file a method, in the folder of its main question. Importing a file registers its method."""

import importlib
import pkgutil
from functools import cache


@cache
def load_all() -> None:
    """Import every method file, once."""
    for module in pkgutil.walk_packages(__path__, __name__ + "."):
        importlib.import_module(module.name)
