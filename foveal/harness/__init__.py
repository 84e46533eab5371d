"""Foveal in EleutherAI's lm-evaluation-harness: any of its tasks under any method, and Foveal's generated tasks in it.

    python -m foveal.harness --model foveal --model_args pretrained=MODEL,method=duo,budget=0.25 --tasks hellaswag

The harness finds models outside of itself only once they are imported, which is all that this command adds to `lm_eval`; in Python,
`import foveal.harness` and `lm_eval.simple_evaluate(model="foveal", ...)` do the same. Needs the extra: pip install 'foveal[harness]'.
"""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from ..errors import InputError

OLDEST, BELOW = "0.4.13", "0.5"
"""The releases of lm_eval whose inner methods this adapter was written for."""


def check_harness() -> None:
    """Raise InputError unless a release of lm_eval is installed that this adapter knows."""
    try:
        found = version("lm_eval")
    except PackageNotFoundError:
        raise InputError(
            "the lm-evaluation-harness is not installed: run pip install 'foveal[harness]', or foveal compare for Foveal's own tasks"
        ) from None
    if not Version(OLDEST) <= Version(found) < Version(BELOW):
        raise InputError(
            f"expected lm_eval from {OLDEST} and below {BELOW}, found {found}: run pip install 'lm_eval>={OLDEST},<{BELOW}'"
        )


check_harness()

from .model import FovealLM  # noqa: E402
from .tasks import EXPORTED, write_tasks  # noqa: E402

__all__ = ["EXPORTED", "FovealLM", "check_harness", "write_tasks"]
