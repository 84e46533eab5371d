"""Fixtures shared by all tests."""

import gc
import os
import sys
import warnings

if any("interpreted" in argument for argument in sys.argv):  # Triton reads it once, at import
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest

# torch and what imports it stay out of this file's head: the process that hands out tests to others needs neither.


@pytest.fixture(scope="session", autouse=True)
def _imported():
    # Measuring memory collects garbage first; what was imported is none, and walking it takes half a second each time.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _threads():
    import torch

    # Waiting threads cost more than they give where test processes share the cores: one, unless told otherwise.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def default_model():
    """`(model, tokenizer)` of the default model in float32 on the CPU; tests must leave both as they found them."""
    from foveal.errors import ModelFileError
    from foveal.hub import load

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load(device="cpu", dtype="float32")
    except ModelFileError as error:
        pytest.skip(f"the default model is neither cached nor fetchable: {error}")
