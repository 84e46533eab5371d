"""Where the lm-evaluation-harness is not installed, its adapter says what to do."""

from importlib.util import find_spec

import pytest

from foveal.errors import InputError


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="the extra 'harness' is installed")
def test_without_the_harness_the_adapter_says_how_to_get_it():
    with pytest.raises(InputError, match=r"not installed: run pip install 'foveal\[harness\]'"):
        import foveal.harness  # noqa: F401
