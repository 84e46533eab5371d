"""The lm-evaluation-harness over a tiny model and tiny tasks: `hf` itself without a method, and plain token-by-token reading under one."""

import sys

import pytest
import torch
from models import tiny
from test_tasks import characters

import foveal
from foveal.errors import InputError, UnsupportedModel

lm_eval = pytest.importorskip("lm_eval", reason="the extra 'harness' is not installed")

from lm_eval.tasks import TaskManager  # noqa: E402

import foveal.harness  # noqa: E402
from foveal.harness import __main__ as command  # noqa: E402
from foveal.harness import model as adapter  # noqa: E402
from foveal.harness.model import HFLM, FovealLM  # noqa: E402
from foveal.harness.tasks import EXPORTED, dataset, score, write_tasks  # noqa: E402
from foveal.method import methods  # noqa: E402
from foveal.tasks import get_task  # noqa: E402

DOCUMENTS = """
import datasets

ROWS = [
    {"text": "The whale is white and the sea is", "choices": [" deep", " dry", "!", " as deep as it is wide"], "gold": 0},
    {"text": "Call me", "choices": [" Ishmael", " Ahab", "?", " a whale"], "gold": 0},
    {"text": "x", "choices": [" y", "z", " who knows what", "-"], "gold": 1},
]


def rows(**_):
    return {"test": datasets.Dataset.from_list(ROWS)}
"""
SHARED = "custom_dataset: !function documents.rows\ntest_split: test\nnum_fewshot: 0\ndoc_to_text: text\n"
TASKS = {
    "tiny_choice": "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: gold\ntarget_delimiter: ''\n",
    "tiny_roll": "output_type: loglikelihood_rolling\ndoc_to_target: text\nmetric_list:\n  - metric: word_perplexity\n",
    "tiny_write": "output_type: generate_until\ndoc_to_target: text\ngeneration_kwargs: {do_sample: false, until: ['~'], max_gen_toks: 7}\n"
    "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model that holds 600 tokens, with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", fresh=True, vocab_size=257, max_position_embeddings=600).save_pretrained(folder)
    tokenizer = characters(None, limit=600)
    tokenizer.eos_token = "<s>"
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "documents.py").write_text(DOCUMENTS)
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{SHARED}{text}")
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(manager, folder, model, batch_size=1, **arguments):
    got = lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": folder, **arguments},
        tasks=list(TASKS),
        batch_size=batch_size,
        device="cpu",
        task_manager=manager,
        bootstrap_iters=0,
    )
    return {
        name: [s["resps"] for s in sorted(rows, key=lambda s: s["doc_id"])] for name, rows in got["samples"].items()
    }


def flat(value):
    return [x for v in value for x in flat(v)] if isinstance(value, (list, tuple)) else [value]


@pytest.fixture(scope="module")
def plain(manager, folder):
    return evaluate(manager, folder, "hf")


def same(got, want, tolerance=1e-3):
    for a, b in zip(flat(list(got.values())), flat(list(want.values())), strict=True):
        assert a == b if isinstance(a, (str, bool)) else float(a) == pytest.approx(float(b), abs=tolerance)


def test_without_a_method_it_is_hf_number_for_number(manager, folder, plain):
    assert evaluate(manager, folder, "foveal") == plain
    assert evaluate(manager, folder, "foveal", method="dense") == plain


@pytest.mark.parametrize("continuation", ["decode", "prompt"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_method_that_changes_nothing_gives_the_numbers_of_hf(manager, folder, plain, batch_size, continuation):
    got = evaluate(manager, folder, "foveal", batch_size, method="h2o", budget=1.0, continuation=continuation)
    same(got, plain)


@pytest.fixture(scope="module")
def lm(folder):
    def make(**arguments):
        return FovealLM(folder, device="cpu", **arguments)

    return make


def by_hand(lm, method, context, continuation):
    """One text, one token at a time: the last token of the context and the continuation are decoded."""
    cut = max(1, len(context) - 1)
    total, greedy, whole = 0.0, True, context + continuation
    with torch.no_grad(), foveal.attach(lm.model, method):
        got = lm.model(torch.tensor([whole[:cut]]))
        store, logits = got.past_key_values, got.logits[0, -1]
        for t in range(cut, len(whole)):
            if t >= len(context):
                total += logits.log_softmax(-1)[whole[t]].item()
                greedy &= logits.argmax().item() == whole[t]
            logits = lm.model(torch.tensor([[whole[t]]]), past_key_values=store).logits[0, -1]
    return total, greedy


def requests(seed=3):
    draw = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(1, 257, (n,), generator=draw).tolist()

    shared = ids(40)
    pairs = [(shared, ids(n)) for n in (1, 3, 6, 2)]
    return [*pairs, (ids(1), ids(30)), (ids(2), ids(1)), (ids(25), ids(9)), (ids(1), ids(1))]


@pytest.mark.parametrize(
    "method", ["h2o(budget=0.2)", "snapkv(budget=0.3, window=4)", "quest(budget=0.25, skip=0, page=4)"]
)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_likelihoods_under_a_method_are_those_of_decoding_by_hand(lm, method, batch_size):
    under = lm(method=method, batch_size=batch_size)
    asked = requests()
    got = under._loglikelihood_tokens([(None, a, b) for a, b in asked], disable_tqdm=True)
    want = [by_hand(under, method, a, b) for a, b in asked]
    assert [g for _, g in got] == [g for _, g in want]
    assert [p for p, _ in got] == pytest.approx([p for p, _ in want], abs=1e-3)
    dense = lm()._loglikelihood_tokens([(None, a, b) for a, b in asked], disable_tqdm=True)
    assert abs(dense[2][0] - got[2][0]) > 1e-2  # the method has its effect


def test_layers_with_a_window_of_their_own(folder):
    """Texts of different lengths cannot share a batch there: they are continued alone, to the same numbers."""
    model = tiny("gemma2", fresh=True, vocab_size=257, max_position_embeddings=600)
    under = FovealLM(model, method="h2o(budget=0.3)", tokenizer=folder, batch_size=4)
    asked = requests()
    got = under._loglikelihood_tokens([(None, a, b) for a, b in asked], disable_tqdm=True)
    want = [by_hand(under, "h2o(budget=0.3)", a, b) for a, b in asked]
    assert [p for p, _ in got] == pytest.approx([p for p, _ in want], abs=1e-3)


def test_a_greedy_continuation_is_told_from_another(lm):
    under = lm(method="h2o(budget=0.3)", batch_size=4)
    context, greedy = requests()[0][0], []
    with torch.no_grad(), foveal.attach(under.model, "h2o(budget=0.3)"):
        store = under.model(torch.tensor([context[:-1]])).past_key_values
        token = context[-1]
        for _ in range(5):
            token = under.model(torch.tensor([[token]]), past_key_values=store).logits[0, -1].argmax().item()
            greedy.append(token)
    other = [*greedy[:4], (greedy[4] + 1) % 257]
    got = under._loglikelihood_tokens([(None, context, c) for c in (greedy, other, greedy[:1])], disable_tqdm=True)
    assert [g for _, g in got] == [True, False, True]


def test_read_at_once_a_method_sees_no_padding(lm):
    """Patterns of a prompt act on each text alone, however many are asked together."""
    method = "pooled-blocks(budget=0.3, block=4)"
    asked = [(None, a, b) for a, b in requests()]
    alone = lm(method=method, continuation="prompt", batch_size=1)
    together = lm(method=method, continuation="prompt", batch_size=8)._loglikelihood_tokens(asked, disable_tqdm=True)
    want = []
    with torch.no_grad(), foveal.attach(alone.model, method):
        for _, a, b in asked:
            chance = alone.model(torch.tensor([a + b[:-1]])).logits[0].log_softmax(-1)[-len(b) :]
            want.append(chance.gather(1, torch.tensor(b)[:, None]).sum().item())
    assert [p for p, _ in together] == pytest.approx(want, abs=1e-3)
    dense = lm()._loglikelihood_tokens(asked, disable_tqdm=True)
    assert abs(dense[2][0] - want[2]) > 1e-3


def test_shared_contexts_are_read_once(lm, monkeypatch):
    under = lm(method="h2o(budget=0.2)", batch_size=2)
    read = []
    monkeypatch.setattr(under, "_read", lambda row, _old=under._read: read.append(row.prompt) or _old(row))
    under._loglikelihood_tokens([(None, a, b) for a, b in requests()[:4]], disable_tqdm=True)
    assert len(read) == 1


def test_long_texts_are_cut_from_the_left_as_hf_cuts_them(lm):
    texts = [(None, list(range(1, 200)) * 3, list(range(1, 51)))]  # 597 + 50 of 600
    got = lm(method="h2o(budget=1.0)")._loglikelihood_tokens(texts, disable_tqdm=True)
    assert got[0][0] == pytest.approx(lm()._loglikelihood_tokens(texts, disable_tqdm=True)[0][0], abs=1e-3)
    with pytest.raises(InputError, match="a continuation has 601 tokens but the model reads 1 to 600"):
        lm(method="h2o")._loglikelihood_tokens([(None, [1], [2] * 601)], disable_tqdm=True)


@pytest.mark.parametrize("method", ["h2o(budget=0.2)", "snapkv(budget=0.3, window=4)"])
def test_generation_in_padded_batches_is_that_of_one_text_alone(lm, method):
    texts = ["The whale is white and the sea is deep and wide", "Call me Ishmael", "xy"]
    under = lm(method=method, batch_size=3)
    ids, mask = under.tok_batch_encode(texts)
    with under._attached():
        got = under._model_generate(ids, ids.shape[1] + 9, ["\x00\x01"], attention_mask=mask)
    for text, row in zip(texts, got[:, ids.shape[1] :].tolist(), strict=True):
        alone = under.tok_encode(text)
        want = []
        with torch.no_grad(), foveal.attach(under.model, method):
            store, token = under.model(torch.tensor([alone[:-1]])).past_key_values, alone[-1]
            for _ in range(9):
                token = under.model(torch.tensor([[token]]), past_key_values=store).logits[0, -1].argmax().item()
                want.append(token)
                if token == 0:
                    break
        assert row[: len(want)] == want


def test_the_model_is_left_as_it_was_after_each_kind_of_request(lm, manager, folder):
    under = lm(method="h2o(budget=0.2)")
    before = under.model.config._attn_implementation
    lm_eval.simple_evaluate(model=under, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    assert under.model.config._attn_implementation == before
    assert under.get_model_info()["foveal_method"] == "h2o"  # 0.2 is its default


# ---------------------------------------------------------------------- arguments


def test_parameters_stand_beside_the_method(folder):
    text = f"pretrained={folder},method=streaming-llm,budget=40,sink=2,dtype=float32"
    under = FovealLM.create_from_arg_string(text, {"device": "cpu", "batch_size": 2})
    assert under.method == foveal.get_method("streaming-llm", budget=40, sink=2) and under.batch_size == 2
    assert under.model.dtype == torch.float32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "h20"}, "no method called 'h20': did you mean 'h2o'"),
        ({"method": "h2o", "budgt": 0.2}, "method 'h2o' has no parameter 'budgt': did you mean 'budget'"),
        ({"method": "h2o", "budget": 2.0}, "budget = 2.0: expected a share"),
        ({"method": "quest | h2o", "budget": 0.2}, r"give budget inside the brackets of the method, like quest\(...\)"),
        ({"method": 3}, "method = 3: expected a name"),
        ({"method": "h2o", "batch_size": "auto"}, "give a number, like batch_size=8"),
        ({"continuation": "both"}, "continuation = 'both': expected one of decode, prompt"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_is_loaded(folder, wrong, message, monkeypatch):
    monkeypatch.setattr(HFLM, "__init__", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(InputError, match=message):
        FovealLM(folder, **wrong)


def test_a_model_that_cannot_be_attached_is_refused_before_any_request(folder, monkeypatch):
    def refuse(model, method):
        raise UnsupportedModel("not this one")

    monkeypatch.setattr(adapter, "attach", refuse)
    with pytest.raises(UnsupportedModel, match="not this one"):
        FovealLM(folder, method="h2o", device="cpu")


def test_no_method_has_a_parameter_that_the_harness_takes_for_itself():
    taken = set(adapter.inspect.signature(HFLM.__init__).parameters) | {
        "method",
        "continuation",
        "text_length",
        "samples",
        "text_seed",
    }
    for name, cls in methods().items():
        assert not taken & set(cls.__dataclass_fields__), name


def test_an_old_harness_is_refused(monkeypatch):
    monkeypatch.setattr(foveal.harness, "version", lambda name: "0.4.2")
    with pytest.raises(InputError, match=r"expected lm_eval from 0.4.13 and below 0.5, found 0.4.2: run pip install"):
        foveal.harness.check_harness()


# ---------------------------------------------------------------------- our tasks there


@pytest.mark.parametrize("name", EXPORTED)
def test_every_generated_task_goes_through_the_harness(name, folder):
    """Gold answers score as the task itself scores them; the prompt is the sample's, token by token."""
    tokenizer = characters(None, limit=60_000)
    task, length = get_task(name), 20_000
    (want,) = task.samples(tokenizer, length, 1, 4, query_aware=True)
    import foveal.harness.tasks as exported

    with pytest.MonkeyPatch.context() as m:
        m.setattr(exported, "AutoTokenizer", type("Tokens", (), {"from_pretrained": staticmethod(lambda _: tokenizer)}))
        (doc,) = dataset(name, length, 1, 4, pretrained=folder, method="h2o", budget=0.2)["test"]
    assert tokenizer(doc["prompt"], add_special_tokens=False)["input_ids"] == [*want.context, *want.question]
    golds = [want.target] if isinstance(want.target, str) else list(want.target)
    for said in (" ".join(golds), "nothing of the kind", golds[0]):
        assert score(doc, [said]) == {"score": task.score(want, said)}


def test_exported_files_run_under_hf_and_under_foveal(folder, tmp_path):
    files = write_tasks(tmp_path)
    assert {f.stem for f in files} == {f"foveal_{name}" for name in EXPORTED} and len(EXPORTED) > 15
    metadata = {"pretrained": folder, "text_length": 560, "samples": 3}
    for model, arguments in (("hf", {}), ("foveal", {"method": "h2o", "budget": 0.2})):
        got = lm_eval.simple_evaluate(
            model=model,
            model_args={"pretrained": folder, **arguments},
            tasks=["foveal_passkey"],
            device="cpu",
            batch_size=2,
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False, metadata=metadata | arguments),
            bootstrap_iters=0,
        )
        rows = got["samples"]["foveal_passkey"]
        assert len(rows) == 3 and all(len(r["filtered_resps"][0]) <= 2 * 10 for r in rows)  # ten bytes
        assert got["results"]["foveal_passkey"]["score,none"] == 0.0


def test_the_command_adds_the_model_and_the_tasks(monkeypatch, tmp_path):
    seen = []

    def run():
        seen.append(sys.argv)
        at = sys.argv.index("--include_path") if "--include_path" in sys.argv else None
        if at is not None and sys.argv[at + 1] != "mine":
            assert (foveal.harness.tasks.Path(sys.argv[at + 1]) / "foveal_needle.yaml").is_file()

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", run)
    monkeypatch.setattr(sys, "argv", ["x"])
    command.main(["--model", "foveal", "--tasks", "foveal_needle,hellaswag"])
    command.main(["--model", "foveal", "--tasks", "hellaswag"])
    command.main(["--tasks=foveal_needle", "--include_path", "mine"])
    assert [("--include_path" in a, a[0]) for a in seen] == [(True, "lm_eval"), (False, "lm_eval"), (True, "lm_eval")]
    assert seen[2].count("--include_path") == 1
    command.main(["tasks", str(tmp_path / "new")])
    assert (tmp_path / "new" / "foveal_passkey.yaml").is_file()
    with pytest.raises(InputError, match="cannot write tasks to"):
        command.main(["tasks", str(tmp_path / "new" / "foveal_passkey.yaml")])
    with pytest.raises(SystemExit, match="usage"):
        command.main(["tasks"])
