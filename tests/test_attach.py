"""Attaching, detaching and everything `generate` does in between; what cannot be followed is refused and harms nothing."""

import threading
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from models import MAX_POSITIONS, VOCAB, tiny
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration

import foveal
from foveal.cache import ACTIVE, Store
from foveal.errors import FovealError, InputError, UnsupportedModel
from foveal.method import Method

CLOSE = {"rtol": 0, "atol": 1e-5}


def text(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def is_stock(model) -> bool:
    # transformers leaves hooks of its own on a model once somebody has asked it for attention weights
    ours = (h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    hooks = any((getattr(h, "__module__", None) or "").startswith("foveal") for h in ours)
    return model.config._attn_implementation in ("sdpa", "eager") and not hooks and ACTIVE.get() is None


@dataclass(frozen=True)
class Probe(Method):
    """Writes down what it is told about each pass; fails in layer 1 where it is told to."""

    fail: bool = False
    name = "test-probe"
    log = []

    def after(self, step):
        if self.fail and step.layer == 1:
            raise RuntimeError("layer 1 fails")
        if step.layer == 0:
            self.log.append((step.L, step.decode, step.prompt_done))


# ---------------------------------------------------------------------- on and off


def test_attach_and_detach():
    model, ids = tiny("llama"), text(1, 20)
    want = model(ids).logits
    session = foveal.attach(model)
    assert model.config._attn_implementation == "foveal" and session.store is None
    torch.testing.assert_close(model(ids).logits, want, **CLOSE)
    assert session.store.counts == [20]
    foveal.detach(model)
    assert is_stock(model) and torch.equal(model(ids).logits, want)
    foveal.detach(model)  # once more changes nothing
    session.close()
    assert is_stock(model)


def test_the_context_manager_restores_also_after_an_exception():
    model, ids = tiny("llama"), text(1, 20)
    want = model(ids).logits
    with pytest.raises(ZeroDivisionError), foveal.attach(model, "h2o(budget=0.5)") as session:
        model(ids)
        assert (session.store.lengths == 10).all()
        raise ZeroDivisionError
    assert is_stock(model) and torch.equal(model(ids).logits, want)


def test_the_models_own_implementation_comes_back():
    model = tiny("llama", fresh=True)
    model.set_attn_implementation("eager")
    with foveal.attach(model):
        assert model.config._attn_implementation == "foveal"
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("leave", [True, False])
def test_an_interrupted_pass_leaves_nothing_behind(leave):
    model = tiny("llama", fresh=True)
    ids = torch.randint(1, 100, (1, 12))

    def stop(*_):
        raise KeyboardInterrupt

    with foveal.attach(model) as session:
        handle = model.model.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(ids)
        handle.remove()
        if not leave:
            with pytest.raises(InputError, match="failed half-way"):
                model(ids, past_key_values=session.store)
            assert model(ids).past_key_values.counts == [12]
    assert is_stock(model) and ACTIVE.get() is None


def test_a_model_is_attached_once():
    model, ids = tiny("llama"), text(1, 20)
    with foveal.attach(model) as session:
        with pytest.raises(FovealError, match=r"attached already: detach it first, or compose methods with `a \| b`"):
            foveal.attach(model, "h2o")
        with pytest.raises(FovealError, match="attached already"):
            foveal.attach(model.model)  # the decoder inside it is the same one
        model(ids)
        assert (session.store.lengths == 20).all()
    with foveal.attach(model, "h2o(budget=0.25)") as session:
        model(ids)
        assert (session.store.lengths == 5).all()
    assert is_stock(model)


def test_methods_by_specification():
    model = tiny("llama")
    with foveal.attach(model, "h2o(budget=0.25)") as session:
        assert session.method == foveal.get_method("h2o", budget=0.25)
    with foveal.attach(model, "quest(budget=16, page=4, skip=0) | h2o(budget=0.5)") as session:
        assert [m.name for m in session.method.parts] == ["quest", "h2o"]
    for wrong, hint in (("h2oo", "did you mean 'h2o'"), ("h2o(bugdet=0.5)", "budget"), ("h2o(budget=7.5)", "budget")):
        with pytest.raises(InputError, match=hint):
            foveal.attach(model, wrong)
    with pytest.raises(InputError, match="expected a foveal Method, a name or None, got int"):
        foveal.attach(model, 3)
    assert is_stock(model)


# ---------------------------------------------------------------------- generate


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.3, "top_k": 20},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
        {"do_sample": False, "prefill_chunk_size": 7},
        {"do_sample": False, "use_cache": False},
    ],
    ids=["greedy", "sampling", "beams", "sampling beams", "chunked prefill", "no cache"],
)
def test_generate_gives_the_stock_tokens(how):
    model, ids = tiny("llama"), text(2, 24)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    how = how | {"max_new_tokens": 16, "attention_mask": mask, "repetition_penalty": 2.0}

    def tokens(seed):
        torch.manual_seed(seed)
        return model.generate(ids, **how)

    want = tokens(7)
    with foveal.attach(model):
        assert torch.equal(tokens(7), want)
    assert len(set(want[0, 24:].tolist())) > 5
    assert not how["do_sample"] or not torch.equal(tokens(8), want)


def test_turns_of_a_padded_conversation_with_one_cache_equal_stock():
    model = tiny("llama")

    def talk():
        cache, whole, mask = None, text(2, 12), torch.ones(2, 12, dtype=torch.long)
        mask[0, :5] = 0
        for turn in range(3):
            out = model.generate(
                whole,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=6,
                repetition_penalty=2.0,
                return_dict_in_generate=True,
            )
            cache, whole = out.past_key_values, torch.cat([out.sequences, text(2, 5, seed=turn)], 1)
            mask = torch.cat([mask, mask.new_ones(2, 11)], 1)
        return whole

    want = talk()
    with foveal.attach(model) as session:
        assert torch.equal(talk(), want)
        seen = 12 + 3 * 6 + 2 * 5 - 1  # the last token was never read
        assert session.store.seen.tolist() == [seen - 5, seen]


@torch.no_grad()
def test_a_call_without_a_cache_returns_none():
    model, ids = tiny("llama"), text(2, 12)
    with foveal.attach(model) as session:
        for caller in (model, model.model):
            assert caller(ids, use_cache=False).past_key_values is None
            assert len(caller(ids, use_cache=False, return_dict=False)) == 1
            assert caller(ids).past_key_values is session.store
            assert caller(ids, return_dict=False)[1] is session.store
        cache = session.store
        assert model(ids[:, :1], past_key_values=cache, use_cache=False).past_key_values is cache


def test_generate_returns_the_store():
    model, ids = tiny("llama"), text(2, 40)
    with foveal.attach(model, "h2o(budget=0.25)") as session:
        out = model.generate(ids, max_new_tokens=9, return_dict_in_generate=True)
        store = out.past_key_values
        assert isinstance(store, Store) and store is session.store
        assert store.seen.tolist() == [48, 48] and store.get_seq_length() == 48
        assert store.lengths.shape == (3, 2, 2) and (store.lengths == 12).all()
        assert store.dense_nbytes == 3 * 2 * 2 * 48 * 2 * 16 * 4
        assert 3 * 2 * 2 * 12 * 2 * 16 * 4 < store.nbytes < 0.5 * store.dense_nbytes


# ---------------------------------------------------------------------- chunks of a prompt


def test_methods_wait_for_the_end_of_an_open_prompt():
    model, ids = tiny("llama"), text(1, 40)
    with foveal.attach(model, "h2o(budget=0.5)") as session:
        with session.open_prompt():
            cache = model(ids[:, :15]).past_key_values
            model(ids[:, 15:30], past_key_values=cache)
            assert (cache.lengths == 30).all()
        model(ids[:, 30:], past_key_values=cache)
        assert (cache.lengths == 20).all()
        kept = [r.token for r in cache.rows]
        model(ids)
        for chunked, whole in zip(kept, session.store.rows, strict=True):
            assert torch.equal(chunked[..., :20], whole.token[..., :20])


def test_a_step_knows_whether_its_prompt_is_done():
    model, ids, probe = tiny("llama"), text(1, 12), Probe()
    probe.log.clear()
    with foveal.attach(model, probe) as session:
        with pytest.raises(ZeroDivisionError), session.open_prompt():
            model(ids)
            raise ZeroDivisionError
        model(ids)
        model(ids[:, :1], past_key_values=session.store)
    assert probe.log == [(12, False, False), (12, False, True), (1, True, True)]


def test_a_method_that_needs_the_whole_prompt_takes_no_chunks():
    @dataclass(frozen=True)
    class Whole(Method):
        name = "test-whole"
        needs = frozenset({"whole_prompt"})

        def after(self, step):
            pass

    model = tiny("llama")
    with foveal.attach(model, Whole()) as session:
        with pytest.raises(InputError, match="needs the whole prompt at once"), session.open_prompt():
            pass
        assert model(text(1, 9)).logits.isfinite().all()


# ---------------------------------------------------------------------- positions of joined sequences


@pytest.mark.parametrize("length", [1, 5], ids=["decode", "chunk"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@torch.no_grad()
def test_joined_sequences_go_on_at_their_own_positions(family, length):
    model, prompts, new = tiny(family), [text(1, n, seed=n) for n in (40, 22)], text(2, length, seed=5)
    with foveal.attach(model):
        want = [model(torch.cat([p, new[i : i + 1]], 1)).logits[0, -length:] for i, p in enumerate(prompts)]
        joined = Store.join([model(p).past_key_values for p in prompts])
        for order in ([0, 1], [1, 0], [1]):
            store = joined.take(order)
            got = model(new[order], past_key_values=store).logits  # neither positions nor a mask
            torch.testing.assert_close(got, torch.stack([want[i] for i in order]), rtol=0, atol=5e-5)
            assert store.counts == [[40, 22][i] + length for i in order]
        at = joined.seen[:, None] + torch.arange(length) + 100  # what the caller says is not touched
        moved = model(new, past_key_values=joined, position_ids=at).logits
        assert (moved - torch.stack(want)).abs().max() > 0.1


@torch.no_grad()
def test_a_prompt_whose_positions_count_pads_goes_on_counting_them():
    model, ids = tiny("llama"), text(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    want = model(ids, attention_mask=mask).logits[:, -1]
    with foveal.attach(model):
        padded = model(ids[:, :-1], attention_mask=mask[:, :-1]).past_key_values
        got = model(ids[:, -1:], past_key_values=padded).logits[:, -1]
        assert padded.counts == [30, 22]
        torch.testing.assert_close(got, want, **CLOSE)


# ---------------------------------------------------------------------- several models


@torch.no_grad()
def test_two_models_at_once_do_not_meet():
    a, b, ids = tiny("llama"), tiny("gemma2"), text(1, 30)
    with foveal.attach(a, "h2o(budget=0.5)"):
        want_a = a.generate(ids, max_new_tokens=6)
    with foveal.attach(b):
        want_b = b(ids).logits

    with foveal.attach(a, "h2o(budget=0.5)") as first, foveal.attach(b) as second:
        got_b = []
        hook = a.model.layers[1].register_forward_pre_hook(lambda *_: got_b.append(b(ids).logits) and None)
        try:
            assert torch.equal(a.generate(ids, max_new_tokens=6), want_a)  # b runs inside every pass of a
        finally:
            hook.remove()
        assert len(got_b) == 6 and all(torch.equal(g, want_b) for g in got_b)
        assert first.store.seen.tolist() == [35] and second.store.seen.tolist() == [30]
        with pytest.raises(InputError, match="another method or model"):
            b(ids[:, :1], past_key_values=first.store)
    assert is_stock(a) and is_stock(b)


def test_models_in_threads_do_not_meet():
    jobs = [(tiny("llama"), "h2o(budget=0.5)"), (tiny("qwen3"), None)]
    ids = text(1, 30)

    def work(model, method, found):
        with foveal.attach(model, method) as session:
            for _ in range(3):
                found.append(model.generate(ids, max_new_tokens=8))
            found.append(session.store.lengths)

    alone, together = [[], []], [[], []]
    for job, found in zip(jobs, alone, strict=True):
        work(*job, found)
    threads = [threading.Thread(target=work, args=(*job, found)) for job, found in zip(jobs, together, strict=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    for want, got in zip(alone, together, strict=True):
        assert len(got) == len(want) == 4 and all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert all(is_stock(model) for model, _ in jobs)


# ---------------------------------------------------------------------- models that are refused


def test_an_encoder_decoder_is_refused():
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    how, before = {"decoder_input_ids": text(1, 4) % 32}, model.config._attn_implementation
    want = model(text(1, 6) % 32, **how).logits
    with pytest.raises(
        UnsupportedModel, match="T5ForConditionalGeneration is an encoder-decoder: attach a decoder-only"
    ):
        foveal.attach(model)
    assert model.config._attn_implementation == before and torch.equal(model(text(1, 6) % 32, **how).logits, want)


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), "llama", None], ids=["module", "string", "none"])
def test_what_is_not_a_model_is_refused(thing):
    with pytest.raises(InputError, match=f"expected a transformers model, got {type(thing).__name__}"):
        foveal.attach(thing)


def test_a_model_left_on_this_attention_without_a_session_says_so():
    with foveal.attach(tiny("llama")):
        pass
    model = tiny("llama", fresh=True)
    model.set_attn_implementation("foveal")
    with pytest.raises(FovealError, match=r"is not attached: use `with foveal\.attach"):
        model(text(1, 5))


# ---------------------------------------------------------------------- calls that are refused


@pytest.fixture
def attached():
    with foveal.attach(tiny("llama")) as session:
        yield session


@contextmanager
def refused(session, message: str, error=InputError):
    """The body raises, and the model is as good as before."""
    ids = text(2, 30, seed=9)
    model = session.model

    def valid():
        with torch.no_grad():
            cache = model(ids).past_key_values
            return model(ids[:, :1], past_key_values=cache).logits

    want = valid()
    with pytest.raises(error, match=message):
        yield
    assert ACTIVE.get() is None and not session._tokens
    assert torch.equal(valid(), want)


def test_masks_that_are_not_two_dimensional_are_refused(attached):
    mask = torch.ones(1, 1, 10, 10, dtype=torch.bool).tril()
    with refused(attached, r"expected a 2-D attention mask \[batch, columns\], got 4 dimensions"):
        attached.model(text(1, 10), attention_mask=mask)


def test_masks_of_the_wrong_size_are_refused(attached):
    for shape in ((1, 9), (2, 10)):
        with refused(attached, rf"attention mask \[1, at least 10\], got \[{shape[0]}, {shape[1]}\]"):
            attached.model(text(1, 10), attention_mask=torch.ones(shape))


def test_packed_sequences_are_refused(attached):
    at = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    with refused(attached, "packed sequences cannot be attached, give them as a padded batch"):
        attached.model(text(1, 7), position_ids=at)


def test_empty_prompts_are_refused(attached):
    with refused(attached, "the prompt is empty: give at least one token"):
        attached.model(torch.zeros(1, 0, dtype=torch.long))
    with refused(attached, "sequence 1 of the batch is empty"):
        attached.model(text(2, 5), attention_mask=torch.tensor([[1] * 5, [0] * 5]))


def test_texts_beyond_the_positions_are_refused(attached):
    model = attached.model
    with refused(attached, f"{MAX_POSITIONS + 1} tokens long but the model has {MAX_POSITIONS} positions: shorten it"):
        model(text(1, MAX_POSITIONS + 1))
    with torch.no_grad():
        full = model(text(1, MAX_POSITIONS)).past_key_values
    with refused(attached, f"{MAX_POSITIONS + 1} tokens long"):
        model(text(1, 1), past_key_values=full)
    assert full.counts == [MAX_POSITIONS]


def test_attention_dropout_in_training_is_refused():
    model = tiny("llama", fresh=True, attention_dropout=0.5)
    with foveal.attach(model) as session, refused(session, "attention dropout is 0.5 in training mode"):
        model.train()
        try:
            model(text(1, 10))
        finally:
            model.eval()


def test_gradient_checkpointing_is_refused():
    model = tiny("llama", fresh=True).requires_grad_(True)
    model.gradient_checkpointing_enable()
    with foveal.attach(model) as session, refused(session, "gradient checkpointing runs attention twice"):
        model.train()
        try:
            model(text(1, 10))
        finally:
            model.eval()


def test_attention_weights_are_refused():
    model = tiny("llama", fresh=True)  # transformers leaves hooks of its own behind
    with foveal.attach(model) as session, refused(session, "attention weights are never held whole here"):
        model(text(1, 10), output_attentions=True)


@torch.no_grad()
def test_caches_of_others_are_refused(attached):
    model = attached.model
    with foveal.attach(tiny("qwen3"), "h2o(budget=0.5)"):
        other = tiny("qwen3")(text(1, 10)).past_key_values
    with refused(attached, "filled by another method or model: start with an empty cache"):
        model(text(1, 1), past_key_values=other)
    foreign = DynamicCache(config=model.config)
    foveal.detach(model)
    model(text(1, 10), past_key_values=foreign)
    with foveal.attach(model) as session:
        with refused(session, "holds tokens that this session did not read"):
            model(text(1, 1), past_key_values=foreign)
        assert foreign.get_seq_length() == 10
        assert model(text(1, 4), past_key_values=DynamicCache()).past_key_values.counts == [4]  # an empty one is fine


@torch.no_grad()
def test_decode_steps_that_do_not_fit_the_cache_are_refused(attached):
    model, ids = attached.model, text(2, 12)
    cache = model(ids).past_key_values
    want = model(ids[:, :1], past_key_values=cache.fork()).logits
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, -1] = 0
    with refused(attached, "masked newest column: drop finished sequences"):
        model(ids[:, :1], past_key_values=cache, attention_mask=mask)
    with refused(attached, "the cache holds 2 sequences but the input has 3"):
        model(text(3, 1), past_key_values=cache)
    with refused(attached, "without input_ids or inputs_embeds"):
        model.model(past_key_values=cache)
    assert torch.equal(model(ids[:, :1], past_key_values=cache).logits, want)  # the cache took no harm


def test_a_refused_call_leaves_the_latest_store_in_place(attached):
    attached.model(text(1, 12))
    store = attached.store
    with pytest.raises(InputError):
        attached.model(text(1, 10), attention_mask=torch.ones(1, 3))
    assert attached.store is store and store.counts == [12]


@torch.no_grad()
def test_a_cache_half_filled_by_a_failed_pass_is_refused():
    model, ids = tiny("llama"), text(1, 12)
    with foveal.attach(model, Probe(fail=True)) as session:
        with pytest.raises(RuntimeError, match="layer 1 fails"):
            model(ids)
        assert ACTIVE.get() is None
        with pytest.raises(InputError, match="failed half-way through this cache: start with an empty cache"):
            model(ids[:, :1], past_key_values=session.store)
    assert is_stock(model)


def test_no_gradient_flows_through_cached_keys():
    model, ids = tiny("llama", fresh=True).requires_grad_(True), text(1, 12)
    with foveal.attach(model) as session:
        for more in (1, 4):
            with refused(
                session, "no gradient flows through cached keys: for training, run the whole text", FovealError
            ):
                cache = model(ids).past_key_values
                model(ids[:, :more], past_key_values=cache).logits.sum().backward()
        model.zero_grad()
        model(ids).logits.sum().backward()
        assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 1e-4
