"""The bytes a keep method promises are the bytes the store allocates."""

import pytest
import torch
from models import tiny

import foveal
from foveal.heads import HeadRoles
from foveal.hub import model_identity

LENGTH = 2048
KEEPERS = [
    name
    for name, cls in sorted(foveal.methods().items())
    if "keep" in cls(**cls.example).asks and "budget" in cls.__dataclass_fields__
]


@pytest.fixture(scope="module")
def model():
    return tiny("llama", head_dim=64, num_hidden_layers=8, max_position_embeddings=2 * LENGTH, fresh=True)


@pytest.fixture(scope="module")
def roles(model, tmp_path_factory):
    config = model.config
    scores = torch.rand(
        3, config.num_hidden_layers, config.num_attention_heads, generator=torch.Generator().manual_seed(3)
    )
    names = ("retrieval", "induction", "echo")
    roles = HeadRoles(model_identity(model), dict(zip(names, scores, strict=True)), {"made": "for tests"})
    return str(roles.save(tmp_path_factory.mktemp("roles") / "roles.json"))


@pytest.mark.parametrize("budget", [0.5, 0.125])
@pytest.mark.parametrize("name", KEEPERS)
def test_resident_bytes_after_a_prompt(name, budget, model, roles):
    cls = foveal.methods()[name]
    own = cls.example | ({"roles": roles} if "roles" in cls.__dataclass_fields__ else {}) | {"budget": budget}
    ids = torch.randint(1, 120, (1, LENGTH), generator=torch.Generator().manual_seed(4))
    with torch.no_grad(), foveal.attach(model, foveal.get_method(name, **own)) as session:
        model(ids)
        store = session.store
    assert store.dense_nbytes == 2 * 8 * 2 * LENGTH * 64 * 4
    # rows of unequal length may share a block a fifth of an octave wide, of which they leave half empty on average
    padded = any(c.length is not None for rows in store.rows for c in rows.classes)
    assert store.nbytes <= (budget * (1.07 if padded else 1) + 0.02) * store.dense_nbytes
    assert store.nbytes >= 0.9 * store.lengths.sum().item() * 2 * 64 * 4  # and nothing is left out of the count
    assert store.lengths.sum().item() >= 0.9 * budget * 8 * 2 * LENGTH  # the budget is used, not only respected
