"""FASA against partial logits written out pair by pair; its measurement against counting."""

import json
import math

import pytest
import torch
from models import tiny
from reference import attend, causal, close, hook, over_heads, thin, thinned, watch

import foveal
from foveal.hub import model_identity
from foveal.methods.select.fasa import Fasa, _together
from foveal.methods.select.frequency_chunks import ChunkTable, agreement, rotary_pairs, table_for
from foveal.model_info import ModelInfo
from foveal.store import Layout

N, PROMPT, HEADS, KV = 66, 60, 6, 2


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(8))


@pytest.fixture(scope="module")
def table(model, tmp_path_factory):
    """A made-up table whose rankings differ between K = 16 and K = 1024."""
    generator = torch.Generator().manual_seed(2)
    found = {size: torch.rand(2, HEADS, 8, generator=generator) for size in (16, 1024)}
    path = tmp_path_factory.mktemp("chunks") / "table.json"
    return ChunkTable(model_identity(model), found, {"made": "for tests"}).save(path)


def visible_keys(s, base, prompt, budget, pairs, heads):
    """pairs: for each query head the (m, m + D/2) it looks at. The newest key and the best of the rest, [HEADS, n, n]."""
    n = base.shape[-1]
    visible = over_heads(base, HEADS).clone()
    for i in range(prompt, n):
        size = budget if isinstance(budget, int) else math.ceil(budget * (i + 1) - 1e-9)
        score = torch.zeros(HEADS, n).double()
        for h in range(HEADS):
            for a, b in pairs[h]:
                score[h] += s.q[h, i, a] * s.k[h // 3, :, a] + s.q[h, i, b] * s.k[h // 3, :, b]
        if heads == "kv":
            shown = (score / 4).masked_fill(~over_heads(base, HEADS)[:, i], -math.inf).softmax(-1)
            score = over_heads(shown.unflatten(0, (KV, -1)).sum(1), HEADS)
        for h in range(HEADS):
            past = [t for t in base[h // 3, i].nonzero().flatten().tolist() if t != i]
            best = sorted(past, key=lambda t: -score[h, t].item())[: size - 1]
            visible[h, i] = False
            visible[h, i, [i, *best]] = True
    return visible


@pytest.mark.parametrize("heads", ["query", "kv"])
@pytest.mark.parametrize(("how", "budget"), [("whole", 16), ("padded", 0.25), ("ragged", 20)])
def test_it_reads_the_keys_that_its_frequencies_rank_first(how, budget, heads, model, ids, table):
    method, pads = Fasa(budget, 0.375, str(table), heads), (0, 13) if how == "padded" else None
    seen = watch(model, thin() | method if how == "ragged" else method, ids, (PROMPT,), pads)
    known = json.loads(table.read_text())["agreement"]["16" if budget == 16 else "1024"]
    for _, layer, s in seen.each():
        n = s.q.shape[1]
        base = thinned(n, (PROMPT,), KV) if how == "ragged" else causal(n).expand(KV, -1, -1)
        rows = [[int(x) for x in row.split()] for row in known[layer]]
        best = [sorted(range(8), key=lambda m: -row[m])[:3] for row in rows]
        pairs = [[(m, m + 8) for m in some] for some in best]
        visible = visible_keys(s, base, n - (N - PROMPT), budget, pairs, heads)
        assert close(s.out, attend(s, visible))
        assert not close(s.out, attend(s, base), 1e-3)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(
    ("heads", "budget", "read"), [("query", 6, 18), ("kv", 6, 6), ("query", 40, 66), ("kv", 0.5, 33)]
)
def test_what_is_read_is_what_is_counted(heads, budget, read, paged, model, ids, table):
    """A list for each of three query heads reads up to three keys where a shared list reads one; never more than there are."""
    method, outs = Fasa(budget, 0.375, str(table), heads), []
    reference = watch(model, method, ids[:1], (PROMPT,)).seqs[0]
    watcher = hook(mix=lambda step, out: outs.append(out[0].double()) or out)
    with torch.no_grad(), foveal.attach(model, method | watcher, layout=Layout(paged=paged)) as session:
        cache = model(ids[:1, :PROMPT]).past_key_values
        outs.clear()
        for i in range(PROMPT, N):
            model(ids[:1, i : i + 1], past_key_values=cache)
        assert session.read_share == pytest.approx(read / N)
    for i, s in enumerate(reference):
        assert close(torch.cat(outs[i :: len(reference)], 1), s.out[:, PROMPT:])


def test_all_frequencies_are_exact_top_k(model, ids):
    single = tiny("llama", num_hidden_layers=2, num_key_value_heads=6)
    runs = [watch(single, m, ids, (PROMPT,)) for m in (Fasa(12, 1.0, "slowest"), foveal.get_method("top-k", budget=12))]
    for (_, _, a), (_, _, b) in zip(runs[0].each(), runs[1].each(), strict=True):
        assert close(a.out, b.out)


def test_heads_that_look_at_different_dimensions_share_their_union():
    dims = torch.zeros(4, 8, dtype=torch.bool)
    dims[0, [1, 5]] = dims[1, [1, 2]] = dims[2, [0, 4]] = dims[3, [0, 4]] = True
    union, chosen = _together(dims, 2)
    assert union.tolist() == [[1, 2, 5], [0, 4, -1]]
    assert chosen[:2].tolist() == [[True, False, True], [True, True, False]]
    assert chosen[2:, :2].all() and not chosen[2:, 2].any()


def test_slowest_looks_at_the_last_pairs(model, ids):
    pairs = [[(6, 14), (7, 15)]] * HEADS
    for _, _, s in watch(model, Fasa(16, 0.25, "slowest"), ids, (PROMPT,)).each():
        visible = visible_keys(s, causal(N).expand(KV, -1, -1), PROMPT, 16, pairs, "query")
        assert close(s.out, attend(s, visible))


# ---------------------------------------------------------------------- pairs and their measurement


@pytest.mark.parametrize("family", ["llama", "cohere", "gpt_neox", "smollm3", "gemma3"])
def test_the_score_of_a_pair_does_not_change_when_both_move(family):
    """What makes a pair a frequency: q and k turned by the same angle leave its score as it was."""
    info = ModelInfo.of(tiny(family))
    for layer in info.layers:
        pairs = rotary_pairs(info, layer)
        assert sorted(pairs.flatten().tolist()) == list(range(info.head_dim))
        q, k = torch.randn(2, info.head_dim, generator=torch.Generator().manual_seed(layer))
        moved = [info.rope.rotate(x, 37, layer) for x in (q, k)]
        before, after = (q[pairs] * k[pairs]).sum(-1), (moved[0][pairs] * moved[1][pairs]).sum(-1)
        assert close(before, after, 1e-4) and close(before.sum(), q @ k)
    assert rotary_pairs(info, info.layers[0])[0].tolist() == (
        [0, 1] if family == "cohere" else [0, 2 if family == "gpt_neox" else 8]
    )


def test_agreement_counts_common_keys():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(4, 8, generator=generator), torch.randn(2, 30, 8, generator=generator)
    pairs = torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]])
    found = agreement(q, k, pairs, (3, 10))
    for size in (3, 10):
        for h in range(4):
            best = set((k[h // 2] @ q[h]).argsort(descending=True)[:size].tolist())
            for m in range(4):
                part = k[h // 2][:, [m, m + 4]] @ q[h, [m, m + 4]]
                common = best & set(part.argsort(descending=True)[:size].tolist())
                assert found[size][h, m].item() == pytest.approx(len(common) / size)
    whole = agreement(q, k, torch.arange(8)[None], (5,))  # all dimensions as one chunk
    assert (whole[5] == 1).all()


def test_a_table_survives_its_file_and_refuses_other_models(model, table, tmp_path):
    again = ChunkTable.load(table)
    assert again.best(16, 3).shape == (2, HEADS, 3)
    assert torch.equal(again.best(77, 8), again.best(1024, 8)) and not torch.equal(again.best(16, 8), again.best(77, 8))
    with pytest.raises(foveal.InputError, match=r"were measured on .*measure its own with `python -m"):
        table_for(tiny("qwen2"), str(table))
    with pytest.raises(foveal.InputError, match=r"not known: measure them once .*chunks='slowest'"):
        foveal.attach(model, Fasa())
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(foveal.InputError, match="cannot be read as one"):
        table_for(model, str(tmp_path / "broken.json"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"share": 0}, "share = 0: expected"),
        ({"share": 1.5}, "share = 1.5: expected a number from 0 to 1"),
        ({"heads": "all"}, "heads = 'all': expected 'query' or 'kv'"),
    ],
)
def test_bad_values(wrong, message):
    with pytest.raises(foveal.InputError, match=message):
        Fasa(**wrong)
