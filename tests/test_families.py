"""Every attention family, attached with no method, is the model itself; off again, nothing is left of the attachment."""

import pytest
import torch
from models import FAMILIES, HYBRID, MLA, VOCAB, tiny
from torch.nn import functional as F

import foveal
from foveal.errors import UnsupportedModel

CLOSE = {"rtol": 0, "atol": 1e-5}
PADS = (0, 9, 23)


def text(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def padded(side: str, length: int = 48) -> dict[str, torch.Tensor]:
    """A batch of three prompts with pads on one side, positions of the real tokens counted from 0."""
    mask = torch.ones(len(PADS), length, dtype=torch.long)
    for row, pads in zip(mask, PADS, strict=True):
        row[slice(0, pads) if side == "left" else slice(length - pads, None)] = 0
    ids = text(*mask.shape, seed=3).masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def real(logits: torch.Tensor, batch: dict) -> torch.Tensor:
    return logits[batch["attention_mask"].bool()]


def hooks(model) -> dict[str, int]:
    return {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}


# ---------------------------------------------------------------------- the plain path


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_the_models_own(family):
    model, ids = tiny(family), text(2, 48)
    batches = {side: padded(side) for side in ("left", "right")}
    want = model(ids).logits
    wants = {side: real(model(**b).logits, b) for side, b in batches.items()}
    with foveal.attach(model) as session:
        torch.testing.assert_close(model(ids).logits, want, **CLOSE)
        for side, batch in batches.items():
            torch.testing.assert_close(real(model(**batch).logits, batch), wants[side], **CLOSE)
            assert session.store.seen.tolist() == [48 - n for n in PADS]
    assert want.std() > 0.1  # and they say something


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_greedy_tokens_are_the_models_own(family):
    model, ids, batch = tiny(family), text(2, 24), padded("left", 32)
    del batch["position_ids"]  # `generate` makes its own
    # A random model repeats one token for ever; a penalty makes it wander, so that 40 tokens are 40 decisions.
    how = {"max_new_tokens": 40, "do_sample": False, "repetition_penalty": 3.0}
    want, wants = model.generate(ids, **how), model.generate(**batch, **how)
    with foveal.attach(model):
        assert torch.equal(model.generate(ids, **how), want)
        assert torch.equal(model.generate(**batch, **how), wants)
    assert want.shape == (2, 24 + 40) and wants.shape == (3, 32 + 40)
    assert len(set(want[0, 24:].tolist())) > 20


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_detaching_restores_the_model(family):
    model, ids = tiny(family), text(1, 20)
    before, implementation, hooked = model(ids).logits, model.config._attn_implementation, hooks(model)
    with foveal.attach(model):
        model.generate(ids, max_new_tokens=2)
        assert model.config._attn_implementation == "foveal" and len(hooks(model).items() - hooked.items()) == 1
    assert model.config._attn_implementation == implementation != "foveal"
    assert hooks(model) == hooked
    assert torch.equal(model(ids).logits, before)


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_gradients_are_the_models_own(family, use_cache):
    model, ids = tiny(family, fresh=True).requires_grad_(True), text(2, 40)

    def loss_and_gradients():
        model.zero_grad()
        logits = model(ids, use_cache=use_cache).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    model.train()
    want_loss, want = loss_and_gradients()
    with foveal.attach(model):
        loss, got = loss_and_gradients()
    torch.testing.assert_close(loss, want_loss, **CLOSE)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert all(want[name].abs().max() > 1e-4 for name in want if "self_attn" in name)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_training_mode_without_dropout_is_eval_mode(family):
    model, ids = tiny(family, fresh=True), text(2, 40)
    with foveal.attach(model):
        want = model(ids).logits
        model.train()
        torch.testing.assert_close(model(ids).logits, want, **CLOSE)


# ---------------------------------------------------------------------- special families


@torch.no_grad()
def test_latent_attention_is_refused_and_the_model_unchanged():
    model, ids = tiny(MLA), text(1, 20)
    before, implementation, hooked = model(ids).logits, model.config._attn_implementation, hooks(model)
    for method in (None, "h2o(budget=0.5)"):
        with pytest.raises(
            UnsupportedModel, match=r"multi-head latent attention.*use a model with ordinary or grouped"
        ):
            foveal.attach(model, method)
    assert model.config._attn_implementation == implementation and hooks(model) == hooked
    assert torch.equal(model(ids).logits, before)


@torch.no_grad()
def test_a_model_of_sliding_windows_only_takes_no_method():
    model, ids = tiny("mistral-sliding"), text(1, 40)
    before, implementation, hooked = model(ids).logits, model.config._attn_implementation, hooks(model)
    with pytest.raises(UnsupportedModel, match=r"no layer with full attention.*'h2o' has nothing to act on"):
        foveal.attach(model, "h2o(budget=0.5)")
    assert model.config._attn_implementation == implementation and hooks(model) == hooked
    assert torch.equal(model(ids).logits, before)
    with foveal.attach(model) as session:
        torch.testing.assert_close(model(ids).logits, before, **CLOSE)
        assert session.info.layers == () and session.store.rows == []


@pytest.mark.parametrize("family", HYBRID)
@torch.no_grad()
def test_a_method_acts_on_the_full_layers_of_a_hybrid_model(family):
    model, ids = tiny(family), text(2, 60)
    with foveal.attach(model) as session:
        model.generate(ids, max_new_tokens=9)
        whole = session.store
    with foveal.attach(model, "h2o(budget=0.5)") as session:
        model.generate(ids, max_new_tokens=9)
        store = session.store
    assert session.info.layers == store.managed == (1, 3)
    assert (whole.lengths == 68).all() and (store.lengths == 34).all() and store.lengths.shape == (2, 2, 2)
    for i in (0, 2):  # sliding windows are the model's own, of the model's own length
        assert store.layers[i].keys.shape == whole.layers[i].keys.shape
        assert type(store.layers[i]) is type(whole.layers[i])
    assert torch.equal(
        store.layers[0].keys[:, :, : 16 - 9], whole.layers[0].keys[:, :, : 16 - 9]
    )  # before any eviction


# ---------------------------------------------------------------------- the default model


PASSAGES = (
    "The lighthouse keeper wrote down the weather every evening, and in forty years he had missed a single day: ",
    "To bake bread you need flour, water, salt and time. First",
)


@pytest.mark.model
@torch.no_grad()
def test_the_default_model_is_itself(default_model):
    model, tokenizer = default_model
    batch = tokenizer(list(PASSAGES), return_tensors="pt", padding=True, padding_side="left")
    mask = batch["attention_mask"]
    assert mask[1, 0] == 0
    how = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    first = batch["input_ids"][:1]
    whole = dict(batch) | {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    want, wants = model(first).logits, real(model(**whole).logits, batch)
    tokens, padded_tokens = model.generate(first, **how), model.generate(**batch, **how)
    with foveal.attach(model):
        got, gots = model(first).logits, real(model(**whole).logits, batch)
        assert torch.equal(model.generate(first, **how), tokens)
        assert torch.equal(model.generate(**batch, **how), padded_tokens)
    # The largest logit is 28.6; measured differences: 0 alone, 4e-5 in the padded batch.
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4)
    torch.testing.assert_close(gots, wants, rtol=0, atol=2e-4)
    assert 20 < want.abs().max() < 40
    assert padded_tokens.shape[1] == mask.shape[1] + 64
