"""What the lab measures, against the plain ways: a stock model, one text at a time, methods that read for themselves."""

import pytest
import torch
from models import tiny

import foveal
from foveal.compare.drive import follow
from foveal.heads import HeadRoles, roles_path
from foveal.hub import model_identity
from foveal.tasks import get_task
from foveal.verify import StaysNear
from foveal.verify import lab as lab_module
from foveal.verify.experiments import Cell
from foveal.verify.lab import QUESTIONS, Lab, named

TEXT = Cell("perplexity", 160, 3)
ROUNDING = 1e-4  # nats; sums in another order


@pytest.fixture
def roles(tools, tmp_path, monkeypatch):
    """Head roles of the tiny model, where the lab will find them: no two heads alike."""
    monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path))
    identity = model_identity(tools[0])
    scores = torch.rand(identity["layers"], identity["heads"], generator=torch.Generator().manual_seed(5))
    HeadRoles(identity, {"retrieval": scores, "echo": 1 - scores}).save(roles_path(tools[0]))
    return scores


def texts(tokenizer, cell=TEXT, seed=0):
    return get_task("perplexity", max_new_tokens=6).samples(tokenizer, cell.length, cell.n, seed)


def test_dense_nats_are_those_of_the_stock_model(tools):
    model, tokenizer = tools
    want = []
    for s in texts(tokenizer):
        ids = torch.tensor([[*s.context, *s.question, *s.target]])
        with torch.no_grad():
            logits = tiny("llama", fresh=True, vocab_size=257, max_position_embeddings=2048)(ids).logits[0]
        nats = -logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        want += nats[-len(s.target) :].tolist()
    got = Lab(model, tokenizer).scores("dense", TEXT)
    assert got.values == pytest.approx(want, abs=ROUNDING)
    assert (got.sign, got.bounded, got.documents, got.reads) == (-1, False, 3, 1.0)


@pytest.mark.parametrize("arm", ["h2o(budget=0.25)", "streaming-llm(budget=40)", "quest(budget=0.25, skip=0)"])
def test_an_arm_in_a_batch_equals_one_text_at_a_time(tools, arm):
    model, tokenizer = tools
    want, held = [], []
    for s in texts(tokenizer):
        with torch.no_grad(), foveal.attach(model, arm):
            store = model(torch.tensor([s.context])).past_key_values
            held.append(store.nbytes / store.dense_nbytes)
            want += follow(model, store, [*s.question, *s.target], model.device)[0][-len(s.target) :]
    planned = [StaysNear(arm, "perplexity", within=0.1, length=160, n=3), StaysNear("scissorhands", *TEXT[:2], 1)]
    got = Lab(model, tokenizer, planned).scores(arm, TEXT)
    assert got.values == pytest.approx(want, abs=ROUNDING)
    assert got.bytes == pytest.approx(sum(held) / 3, rel=0.02)


def test_keys_read_count_what_is_held_and_what_is_read_of_it(tools):
    model, tokenizer = tools
    ask = Lab(model, tokenizer).scores
    assert ask("streaming-llm(budget=0.25)", TEXT).reads == pytest.approx(0.25, abs=0.02)
    assert ask("quest(budget=0.25, skip=0, page=4)", TEXT).reads == pytest.approx(0.25, abs=0.03)
    assert ask("quest(budget=0.25, skip=0, page=4)", TEXT).bytes >= 1.0


def test_answers_are_scored_by_the_task(tools, monkeypatch):
    """A model that answers right is scored 1, and only then: the answers are planted, the rest is real."""
    model, tokenizer = tools
    cell = Cell("passkey", 700, 4)
    samples = get_task("passkey").samples(tokenizer, cell.length, cell.n, 0)
    said = [s.target if i in (0, 3) else "00000" for i, s in enumerate(samples)]
    asked = []

    def planted(model, store, questions, most, stops):
        start = len(asked)
        asked.extend(questions)
        return [tokenizer(t, add_special_tokens=False)["input_ids"] for t in said[start : start + len(questions)]]

    monkeypatch.setattr(lab_module, "answer", planted)
    got = Lab(model, tokenizer).scores("h2o(budget=0.5)", cell)
    assert got.values == [1.0, 0.0, 0.0, 1.0] and got.bounded and got.mean == 0.5
    assert asked == [s.question for s in samples]


def test_a_question_that_belongs_to_the_prompt_is_read_before_the_method_acts(tools, monkeypatch):
    model, tokenizer = tools
    asked = []

    def planted(model, store, questions, most, stops):
        asked.extend(questions)
        return [tokenizer("no", add_special_tokens=False)["input_ids"] for _ in questions]

    monkeypatch.setattr(lab_module, "answer", planted)
    near = StaysNear("h2o(budget=0.5)", "passkey", 0.1, 700, 2, query_aware=True)
    ((_, cell), _) = near.arms()
    got = Lab(model, tokenizer).scores("h2o(budget=0.5)", cell)
    samples = get_task("passkey").samples(tokenizer, 700, 2, 0, query_aware=True)
    assert asked == [s.question for s in samples] and all(len(q) == 1 for q in asked)
    seen = [s.question for s in get_task("passkey").samples(tokenizer, 700, 2, 0)]
    assert all(s.context[-len(q) + 1 :] == q[:-1] for s, q in zip(samples, seen, strict=True)) and got.documents == 2


def count_passes(model, monkeypatch):
    passes = []
    monkeypatch.setattr(model, "forward", lambda *a, _old=model.forward, **k: passes.append(1) or _old(*a, **k))
    return passes


def test_the_same_question_is_asked_once_and_readings_are_shared(tools, monkeypatch):
    model, tokenizer = tools
    planned = [
        StaysNear("h2o(budget=0.25)", "perplexity", 0.1, 160, 2),
        StaysNear("scissorhands", "perplexity", 0.1, 160, 2),
    ]
    lab, cell = Lab(model, tokenizer, planned), Cell("perplexity", 160, 2)
    passes = count_passes(model, monkeypatch)
    lab.scores("dense", cell)
    first = len(passes)
    lab.scores("dense", cell)
    assert len(passes) == first
    lab.scores("h2o(budget=0.25)", cell)
    lab.scores("scissorhands", cell)
    assert len(passes) == first + 2 * (first - 2)  # decode steps only: both texts were read for the first arm


def test_readings_are_let_go_of_when_they_fill_their_room(tools, monkeypatch):
    model, tokenizer = tools
    monkeypatch.setattr(lab_module, "_RECORDINGS", 1)
    lab = Lab(model, tokenizer)
    kept = lab.scores("dense", TEXT)
    assert not lab._recordings
    assert kept.values == pytest.approx(Lab(model, tokenizer).scores("dense", TEXT).values)


def test_readings_make_way_for_another_cell_but_not_for_one_another(tools, monkeypatch):
    """Two of three texts fit: each arm reads only the third again, where the oldest making way would have it read all."""
    model, tokenizer = tools
    lab, read = Lab(model, tokenizer), []
    arms = ("dense", "quest(budget=0.25, skip=0)", "quest(budget=0.5, skip=0)")
    real = lab_module.record
    monkeypatch.setattr(lab_module, "record", lambda model, ids, methods: read.append(ids) or real(model, ids, methods))
    monkeypatch.setattr(lab_module, "_size", lambda recording: 1)
    monkeypatch.setattr(lab_module, "_RECORDINGS", 2)
    got = [lab.scores(arm, TEXT).values for arm in arms]
    first, second, third = (torch.tensor([s.context]) for s in texts(tokenizer))
    want = [first, second, third, third, third]
    assert len(read) == len(want) and all(map(torch.equal, read, want))
    assert got[2] == pytest.approx(Lab(model, tokenizer).scores(arms[2], TEXT).values)
    other = TEXT._replace(draw=1, n=2)
    lab.scores("dense", other)
    assert {cell for _, cell in lab._recordings} == {other} and len(lab._recordings) == 2


def test_a_quick_run_asks_less(tools):
    model, tokenizer = tools
    lab = Lab(model, tokenizer, quick=True)
    got = lab.scores("dense", Cell("perplexity", 1024, None))
    assert (len(got.values), got.documents) == (8, 1)  # on 384 tokens
    assert lab._fit(Cell("needle", 1024, None)) == Cell("needle", 384, 2)
    assert lab._fit(Cell("needle", 1024, 16, query_aware=True)) == Cell("needle", 384, 1, query_aware=True)
    assert lab._fit(Cell("needle", 256, 1, 1, True)) == Cell("needle", 256, 1, 1, True)
    assert Lab(model, tokenizer)._fit(Cell("needle", 1024, None)) == Cell("needle", 1024, QUESTIONS)


def test_the_quick_needles_are_asked_of_one_document_and_answered_in_as_many_tokens_as_they_have(tools, monkeypatch):
    model, tokenizer = tools
    most = []
    monkeypatch.setattr(lab_module, "answer", lambda model, store, qs, n, stops: most.append(n) or [[65]] * len(qs))
    monkeypatch.setitem(lab_module.QUICK, "length", 1400)  # a token here is a letter
    quick = Lab(model, tokenizer, quick=True).scores("dense", Cell("needle", 1400, None))
    assert (len(quick.values), quick.documents) == (2, 1)
    Lab(model, tokenizer).scores("dense", Cell("needle", 1400, 2))
    assert most == [8, 12]


def test_another_draw_asks_other_samples(tools):
    model, tokenizer = tools
    lab = Lab(model, tokenizer)
    assert lab.scores("dense", TEXT).values != lab.scores("dense", TEXT._replace(draw=1)).values


def test_logits_cover_the_prompts_end_and_the_steps_after(tools):
    model, tokenizer = tools
    got = Lab(model, tokenizer).logits("dense")
    (s,) = get_task("perplexity", max_new_tokens=8).samples(tokenizer, 104, 1)
    with torch.no_grad():
        want = model(torch.tensor([[*s.context, *s.question, *s.target]])).logits[0, -16:]
    assert torch.allclose(got, want, atol=1e-4)


def test_shuffled_roles_are_the_same_kv_heads_elsewhere(tools, roles):
    lab = Lab(*tools)
    method = lab.method("duo(roles='{random}')")
    shuffled = HeadRoles.load(method.roles)
    for name, old in (("retrieval", roles), ("echo", 1 - roles)):
        pairs = [x.unflatten(1, (2, 3)).flatten(0, 1) for x in (old, shuffled[name])]
        order = [int((pairs[0] == row).all(1).nonzero()) for row in pairs[1]]  # whole groups, in another order
        assert sorted(order) == list(range(6)) != order
    assert named("duo(roles='{random}')").roles == "random.json"


def test_heads_taken_out_are_the_best_and_as_many_others(tools, roles):
    top, *drawn = Lab(*tools).ablations("retrieval", 4, 3, "zero")
    best = {(int(i) // 6, int(i) % 6) for i in roles.flatten().topk(4).indices}
    assert set(top.heads) == best and top.mode == "zero"
    assert all(len(set(d.heads)) == 4 and not set(d.heads) & best for d in drawn)
    assert len({d.heads for d in drawn}) > 1
