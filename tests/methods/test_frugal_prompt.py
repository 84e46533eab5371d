"""FrugalPrompt: attributions against sums and loops written out, word and sentence boundaries, and which words are read."""

# The released decomposition (mohsenfayyaz/DecompX, modeling_bert.py) was run on the CPU with the weights of small
# BERTs: the same parts, logits and, from its norms without biases and MLP, GlobEnc; some of its numbers stand below.

import math

import pytest
import torch
import transformers
from models import tiny
from reference import hook
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

import foveal
from foveal.methods.keep import attribution
from foveal.methods.keep.attribution import by_the_model, decompx, globenc, projections, shares
from foveal.methods.keep.frugal_prompt import FrugalPrompt, lex_rank, scaled
from foveal.methods.keep.words import packed, split, tokenizer_of
from foveal.prompt import Prompt

N = 40
ENCODERS = ("Bert", "Electra", "XLMRoberta")


def encoder(family, layers=2):
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=50, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=48, num_labels=3,
        pad_token_id=0, **({"embedding_size": 20} if family == "Electra" else {}),
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (1, N), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", ENCODERS)
def test_decompx_parts_add_up_to_states_and_logit(family):
    model, ids = encoder(family), torch.tensor([3, 7, 11, 7, 20, 31])
    with torch.no_grad():
        out = model(input_ids=ids[None], output_hidden_states=True)
    for label in range(3):
        logit, parts = decompx(model, ids, label)
        assert torch.allclose(parts.sum(1), out.hidden_states[-1][0], atol=1e-4)
        assert abs(logit.sum().item() - out.logits[0, label].item()) < 1e-4
    assert parts.shape == (6, 6, 32) and parts.std() > 0.01


def test_numbers_of_the_released_code():
    """What DecompX and its norms give for weights drawn in the order of their names, class 1."""
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, num_labels=3,
        max_position_embeddings=32,
    )  # fmt: skip
    model, draw = transformers.BertForSequenceClassification(config).eval(), torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=draw) * 0.3 + ("LayerNorm.weight" in name))
    ids = torch.tensor([3, 7, 11, 7, 20])
    logit, _parts = decompx(model, ids, 1)
    assert torch.allclose(logit, torch.tensor([0.09193, -0.04311, 0.28254, 0.18634, 0.10416]), atol=2e-5)
    assert torch.allclose(globenc(model, ids), torch.tensor([0.31887, 0.11922, 0.19266, 0.17718, 0.19207]), atol=2e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_globenc_is_the_norms_of_what_is_added(family):
    """One layer, token by token: residual and attention through the first norm, then the second."""
    model, ids = encoder(family, layers=1), torch.tensor([3, 7, 11, 7, 20])
    layer = model.base_model.encoder.layer[0]
    with torch.no_grad():
        seen = {}
        hooks = [
            m.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (args[0], out)}))
            for name, m in [("o", layer.attention.output.dense), ("ln1", layer.attention.output.LayerNorm), ("ln2", layer.output.LayerNorm)]
        ]  # fmt: skip
        x = model(input_ids=ids[None], output_hidden_states=True).hidden_states[0][0]
        for h in hooks:
            h.remove()
        own, got = layer.attention.self, globenc(model, ids)
        added = torch.zeros(5, 32)
        for j in range(5):
            for h in range(4):
                cut = slice(8 * h, 8 * h + 8)
                z = (own.query(x[0])[cut] * own.key(x)[:, cut]).sum(-1) / math.sqrt(8)
                value = own.value(x[j])[cut]
                added[j] += z.softmax(-1)[j] * (layer.attention.output.dense.weight[:, cut] @ value)
        added[0] += x[0]
        for name, norm in (("ln1", layer.attention.output.LayerNorm), ("ln2", layer.output.LayerNorm)):
            true = seen[name][0][0, 0]
            added = (added - added.mean(-1, keepdim=True)) / (true.var(unbiased=False) + norm.eps).sqrt() * norm.weight
        want = added.norm(dim=-1) / added.norm(dim=-1).sum()
    assert torch.allclose(got, want, atol=1e-5) and abs(globenc(encoder(family), ids).sum().item() - 1) < 1e-5


def test_shares_of_a_causal_layer_are_those_of_the_stream(ids):
    """The parts whose norms are taken add up to the state after attention, and each row of shares to one."""
    model, seen = tiny("llama"), []
    info = foveal.attach(model, None)
    info.close()
    last = projections(model.get_decoder())
    with torch.no_grad(), foveal.attach(model, hook(after=lambda s: seen.append((s.q, s.k_new, s.v_new, s.scale)))):
        states = model(ids, output_hidden_states=True).hidden_states
    for layer, (q, k, v, scale) in enumerate(seen):
        k, v = (x[0].repeat_interleave(3, 0) for x in (k, v))
        z = (q[0] @ k.mT * scale).masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), -math.inf)
        a, w = z.softmax(-1), last[layer].weight
        size = torch.zeros(N, N)
        for i in (0, 3, N - 1):
            parts = torch.stack(
                [sum(a[h, i, j] * w[:, 16 * h : 16 * h + 16] @ v[h, j] for h in range(6)) for j in range(N)]
            )
            parts[i] += states[layer][0, i]
            size[i] = parts.norm(dim=-1) / parts.norm(dim=-1).sum()
            with torch.no_grad():
                attended = w @ torch.cat([a[h, i] @ v[h] for h in range(6)]) + states[layer][0, i]
            assert torch.allclose(parts.sum(0), attended, atol=1e-4)
        got = shares(a, seen[layer][2][0], w, states[layer][0])
        assert torch.allclose(got[[0, 3, N - 1]], size[[0, 3, N - 1]], atol=1e-5)


def test_sentences_read_together_are_scored_as_alone(ids):
    model = tiny("llama")
    sentences = [ids[0, :4].tolist(), ids[0, 4:15].tolist(), ids[0, 15:17].tolist()]
    with torch.no_grad(), foveal.attach(model, FrugalPrompt()) as session:
        prompt = Prompt(session, ids[0], None)
        together = by_the_model(prompt, sentences)
        alone = [by_the_model(prompt, [s])[0] for s in sentences]
    for a, b, s in zip(together, alone, sentences, strict=True):
        assert a.shape == (len(s),) and torch.allclose(a, b, atol=1e-5) and abs(a.sum().item() - 1) < 1e-5
    assert together[1].std() > 1e-3


SIZES = (3, 17, 1, 40, 5, 20)  # in no order, and of three groups


def parts_of(ids):
    """Sentences of these sizes out of one text."""
    return [torch.cat([ids[0, n // 2 :], ids[0]])[:n].tolist() for n in SIZES]


def scored(model, ids):
    with torch.no_grad(), foveal.attach(model, None) as session:
        return by_the_model(Prompt(session, ids[0], None), parts_of(ids))


def written_out(model, sentence):
    """The definition: what every token adds to every other, as a vector, in each layer of the unattached model's own attention."""
    ids, values = torch.tensor([sentence]), {}
    with torch.no_grad():
        out = model.get_decoder()(ids, output_attentions=True, output_hidden_states=True)
        with foveal.attach(model, hook(after=lambda s: values.update({s.layer: s.v_new[0]}))):
            model(ids)
        total, last = torch.eye(len(sentence)), projections(model.get_decoder())
        for layer, v in values.items():
            v = v.repeat_interleave(6 // len(v), 0)
            u = torch.stack([v[h] @ last[layer].weight[:, 16 * h : 16 * h + 16].T for h in range(6)])
            parts = torch.einsum("hij,hje->ije", out.attentions[layer][0], u)
            parts += torch.eye(len(sentence))[..., None] * out.hidden_states[layer][0]
            size = parts.norm(dim=-1)
            total = size / size.sum(-1, keepdim=True) @ total
    return total[-1]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "gpt_oss"])
def test_norms_by_inner_products_are_those_of_the_vectors(family, small, ids, monkeypatch):
    """Many sentences in a row, soft-caps, sinks, layers with windows (sentences alone); small: in several rows and tiles of queries."""
    model = tiny(family, fresh=True)
    model.set_attn_implementation("eager")
    if small:
        monkeypatch.setattr(attribution, "_ROW", 42)
        monkeypatch.setattr(attribution, "TILE", {"cpu": 1000})
    for got, sentence in zip(scored(model, ids), parts_of(ids), strict=True):
        assert torch.allclose(got, written_out(model, sentence), atol=1e-5)


def test_scores_of_a_model_in_half_precision(ids):
    model = tiny("llama", fresh=True).to(torch.bfloat16)
    half, full = scored(model, ids), scored(model.float(), ids)
    for a, b in zip(half, full, strict=True):
        assert a.dtype == torch.float32 and torch.allclose(a, b, atol=0.02)
    assert max(b.max() - b.min() for b in full) > 0.1


def test_work_does_not_grow_with_the_number_of_sentences():
    """A GPU waits for launches: those of 40 sentences are those of 4."""

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[-1] += 1
            return func(*args, **(kwargs or {}))

    counts = []
    with torch.no_grad(), foveal.attach(tiny("llama"), None) as session:
        prompt = Prompt(session, torch.zeros(1, dtype=torch.long), None)
        for many in (4, 40):
            counts.append(0)
            with Counted():
                by_the_model(prompt, [[7, 9, 11, 13, 15, 17]] * many)
    assert counts[1] < 1.5 * counts[0] and counts[0] > 100


# ---------------------------------------------------------------------- words


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, with special tokens <s> and <user>."""
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=letters, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", additional_special_tokens=["<user>"])


def test_words_and_sentences(tokenizer):
    text = '<s><user>role\nI saw a "whale." It dived!\nthe  end'
    words = split(tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer)
    named = [t.strip() for t in words.texts]
    assert named == ["<s>", "<user>", "role", "I", "saw", "a", '"whale."', "It", "dived!", "the", "end"]
    assert words.fixed == [True] * 3 + [False] * 8
    assert [[named[w] for w in s] for s in words.sentences][3:] == [
        ["I", "saw", "a", '"whale."'],
        ["It", "dived!"],
        ["the", "end"],
    ]
    assert "".join(words.texts) == text and words.tokens([3, 5]) == [*range(*words.spans[3]), *range(*words.spans[5])]
    assert [len(s) for s in split(range(150), None).sentences] == [64, 64, 22]


def test_a_model_s_tokenizer_is_loaded_once(tokenizer, tmp_path):
    model = tiny("llama", fresh=True)
    assert tokenizer_of(model) is None
    for name in ("one", "two"):
        tokenizer.add_tokens(name)
        tokenizer.save_pretrained(tmp_path / name)
        model.name_or_path = str(tmp_path / name)
        found = tokenizer_of(model)
        assert name in found.get_vocab() and tokenizer_of(model) is found
    assert tokenizer_of(tiny("qwen2")) is None


def test_pieces_are_packed_whole():
    assert packed([3, 3, 3, 3, 3], 6) == [range(2), range(2, 4), range(4, 5)]
    assert packed([5, 5, 5, 5, 1], 10) == [*[range(2), range(2, 4), range(4, 5)][:1], range(2, 3), range(3, 5)]
    assert packed([20], 10) == [range(1)]


def test_lex_rank_is_the_stationary_weight():
    sentences = [["the", "whale"], ["the", "white", "whale"], ["a", "white", "whale", "rose"], ["nothing", "else"]]
    got = torch.tensor(lex_rank(sentences), dtype=torch.float64)
    idf = {w: math.log(4 / sum(w in s for s in sentences)) + 1e-6 for s in sentences for w in s}
    cosine = torch.zeros(4, 4, dtype=torch.float64)
    for i, a in enumerate(sentences):
        for j, b in enumerate(sentences):
            dot = sum(idf[w] ** 2 for w in set(a) & set(b))
            cosine[i, j] = dot / math.sqrt(sum(idf[w] ** 2 for w in a) * sum(idf[w] ** 2 for w in b))
    step = 0.15 / 4 + 0.85 * cosine / cosine.sum(1, keepdim=True)
    values, vectors = torch.linalg.eig(step.T)
    first = vectors[:, values.real.argmax()].real
    assert torch.allclose(got, first / first.sum(), atol=1e-6) and got[1] == got.max()
    assert lex_rank([["a"], ["b"]]) == [0.5, 0.5]


# ---------------------------------------------------------------------- what is read


def read_by(method, ids):
    """Places of the tokens the model read."""
    seen = []
    with torch.no_grad(), foveal.attach(tiny("llama"), method | hook(after=lambda s: seen.append(s.pass_.ids[0]))):
        foveal_out = seen
        tiny("llama")(ids)
    return foveal_out[0].tolist()


def test_top_and_bottom_part_the_words_and_keep_their_order():
    ids = torch.randperm(119, generator=torch.Generator().manual_seed(2))[None, :N] + 1  # every token once
    text = ids[0].tolist()
    top, rest = read_by(FrugalPrompt(0.6), ids), read_by(FrugalPrompt(0.4, which="bottom"), ids)
    assert len(set(top) & set(rest) - {text[-1]}) == 0 and set(top) | set(rest) == set(text)
    assert abs(len(top) - 24) <= 1 and top == [t for t in text if t in top]
    assert read_by(FrugalPrompt(1.0), ids) == text
    random = [read_by(FrugalPrompt(0.5, which="random"), ids) for _ in range(2)]
    assert random[0] == random[1] and len(random[0]) in (20, 21) and random[0] != read_by(FrugalPrompt(0.5), ids)


def test_the_words_that_stay_have_the_best_scores(ids):
    method, seen = FrugalPrompt(0.5), {}
    model = tiny("llama")
    with torch.no_grad(), foveal.attach(model, method) as session:
        prompt = Prompt(session, ids[0], method.setup(session.info))
        words = split(ids[0].tolist(), None, 64)
        seen = method.scores(prompt, ids[0].tolist(), words)
        read = method.read(prompt)
        (raw,) = by_the_model(prompt, [ids[0].tolist()])
    assert torch.allclose(
        torch.tensor(seen), scaled(raw).double().float(), atol=1e-5
    )  # one sentence: its weight is one
    assert min(s for s, r in zip(seen, read, strict=True) if r) >= max(
        s for s, r in zip(seen, read, strict=True) if not r
    )


def test_an_encoder_scores_words_by_the_sum_of_their_pieces(tokenizer, tmp_path):
    judge = encoder("Bert")
    judge.resize_token_embeddings(300)
    folder = str(tmp_path / "judge")
    judge.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = tiny("llama", fresh=True, vocab_size=300)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model.name_or_path = str(tmp_path / "model")
    ids = tokenizer("<s>seas rose high on", add_special_tokens=False, return_tensors="pt")["input_ids"]
    for how in ("globenc", "decompx"):
        method = FrugalPrompt(2, encoder=folder, attribution=how, label=1)
        plan = method.setup(foveal.attach(model, None).info)
        foveal.detach(model)
        words = split(ids[0].tolist(), plan.tokenizer)
        got = method.scores(Prompt(None, ids[0], plan), ids[0].tolist(), words)
        pieces = tokenizer([t.strip() for t in words.texts[2:]], is_split_into_words=True)
        x = torch.tensor(pieces["input_ids"])
        raw = decompx(judge, x, 1)[0] if how == "decompx" else globenc(judge, x)
        unit = (raw - raw.min()) / (raw.max() - raw.min())
        want = [sum(u for u, w in zip(unit.tolist(), pieces.word_ids(), strict=True) if w == i) for i in range(3)]
        assert words.fixed == [True, True, False, False, False] and got[:2] == [0, 0]
        assert all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(got[2:], want, strict=True))
    with pytest.raises(foveal.InputError, match=r"label = 5: .* has 3 classes"):
        foveal.attach(model, FrugalPrompt(encoder=folder, label=5))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attribution": "decompx"}, "name one as `encoder`"),
        ({"attribution": "lime"}, "expected 'globenc' or 'decompx'"),
        ({"which": "first"}, "expected 'top', 'bottom' or 'random'"),
        ({"budget": 0.0}, "budget = 0.0"),
    ],
)
def test_bad_values(wrong, message):
    with pytest.raises(foveal.InputError, match=message):
        FrugalPrompt(**wrong)


def test_what_is_not_there(tmp_path):
    model = tiny("llama", fresh=True)
    with pytest.raises(foveal.InputError, match="leave `encoder` out"):
        foveal.attach(model, FrugalPrompt(encoder=str(tmp_path)))
    model.name_or_path = str(tmp_path / "gone")
    with pytest.raises(foveal.InputError, match="expected the tokenizer of"):
        foveal.attach(model, FrugalPrompt())
