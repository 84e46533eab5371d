"""A tiny model with a byte tokenizer, and few tokens scored of a text: steps are what takes the time."""

import pytest
from models import tiny
from test_tasks import characters

from foveal.verify import lab


@pytest.fixture(scope="package")
def tools():
    """`(model, tokenizer)`; tests must leave both as they found them."""
    return tiny("llama", fresh=True, vocab_size=257, max_position_embeddings=2048), characters(None)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Six tokens scored of each text."""
    monkeypatch.setattr(lab, "SCORED", 6)
