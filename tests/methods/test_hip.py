"""HiP against its search written out with lists, and what the search can find."""

import math

import pytest
import torch
from models import tiny
from reference import Seq, attend, causal, close, hook, stays, thin, thinned, watch

import foveal
from foveal.methods.select.hip import HiP
from foveal.ops.tree import halve
from foveal.store import Layout

N, PROMPT, KV = 75, 66, 2


@pytest.fixture(scope="module")
def model():
    return tiny("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 120, (2, N), generator=torch.Generator().manual_seed(8))


def found(q, k, newest, m, size, held=lambda t: True):
    """Keys a search finds for queries q [rows, head_dim] of which the first is token `newest`, among the tokens that are held."""
    wanted = max(1, (size - m.sink - m.recent) // m.key_block)
    stop = newest + 1 - m.recent
    count = max(0, math.ceil((stop - m.sink) / m.key_block))

    def tokens(b):
        return [t for t in range(m.sink + b * m.key_block, m.sink + (b + 1) * m.key_block) if t < stop and held(t)]

    def best(node):
        stands = node[0] if m.representative == "first" else sum(node) // 2
        return max([-math.inf, *(q @ k[tokens(stands)].T).flatten().tolist()])

    nodes = [(i * count // wanted, (i + 1) * count // wanted) for i in range(wanted)]
    while any(r - l > 1 for l, r in nodes):
        halves = [x for l, r in nodes for x in ((l, (l + r) // 2), ((l + r) // 2, r)) if x[0] < x[1]]
        nodes = sorted(halves, key=best, reverse=True)[:wanted]
    return {t for l, r in nodes if l < r for t in tokens(l)}


def size(m, n):
    return m.budget if isinstance(m.budget, int) else math.ceil(m.budget * n - 1e-9)


def since(m, i):
    """The newest token up to i at which sequences search."""
    while (i + 1) % m.refresh:
        i -= 1
    return i


def read_in_decode(q, k, i, m, prompt, held=lambda t: True):
    """Tokens that query i reads, q [rows, n, head_dim]: the list of the last search, which a prompt's last query makes too."""
    start = since(m, i)
    by = max(start, prompt - 1)
    keys = found(q[:, by], k, start, m, size(m, by + 1), held)
    return keys | {*range(m.sink), *range(start + 1 - m.recent, i + 1)}


def chosen(s, m, prompt=PROMPT):
    """[KV, n, n]: what each query reads."""
    n, group = s.q.shape[1], s.q.shape[0] // KV
    seen = torch.zeros(KV, n, n, dtype=torch.bool)
    for g in range(KV):
        q = s.q[g * group : (g + 1) * group]
        for a in range(0, prompt, m.query_block):
            rows = torch.arange(a, a + m.query_block, m.stride).clamp(max=prompt - 1)
            keys = found(q[:, rows].flatten(0, 1), s.k[g], a, m, size(m, prompt))
            keys |= {*range(m.sink), *range(a + 1 - m.recent, a + m.query_block)}
            seen[g, a : min(a + m.query_block, prompt)] = torch.tensor([j in keys for j in range(n)])
        if size(m, prompt) >= prompt:
            seen[g, :prompt] = True
        for i in range(prompt, n):
            keys = read_in_decode(q, s.k[g], i, m, prompt)
            seen[g, i] = torch.tensor([j in keys for j in range(n)]) | (size(m, i + 1) > i)
    return seen & causal(n)


METHODS = [
    HiP(24, 2, 4, 8, 2, dense=1),
    HiP(20, 0, 1, 1, 1, "middle", dense=0),
    HiP(30, 5, 9, 16, 3, "middle", stride=2, dense=0),
    HiP(8, 4, 6, 8, 4, dense=1),  # too small for both ends: one block
]
KEPT = [
    HiP(24, 2, 4, 8, 2, dense=1, refresh=4),
    HiP(0.3, 0, 1, 1, 1, "middle", dense=0, refresh=3),
    HiP(30, 5, 9, 16, 3, "middle", stride=2, dense=0, refresh=50),  # the prompt's list serves all steps
    HiP(8, 4, 6, 8, 4, dense=0, refresh=2),
    HiP(67, 2, 4, 8, 2, dense=0, refresh=3),  # dense at first
]


@pytest.mark.parametrize("method", [*METHODS, *KEPT], ids=str)
def test_queries_read_what_the_search_finds(method, model, ids):
    """With `refresh`, between searches what the last one found and all from where its window began."""
    unread = in_decode = 0
    for _, layer, s in watch(model, method, ids, (PROMPT,)).each():
        visible = causal(N).expand(KV, -1, -1) if layer < method.dense else chosen(s, method)
        assert close(s.out, attend(s, visible))
        hidden = causal(N) & ~visible
        unread, in_decode = unread + int(hidden.sum()), in_decode + int(hidden[:, PROMPT:].sum())
    assert in_decode > 0 and (unread > 1000 or method.budget == 67)


@pytest.mark.parametrize("method", KEPT, ids=str)
def test_sequences_of_a_batch_search_at_steps_of_their_own(method, model, ids):
    pads = (0, 13)  # no multiple of any `refresh`, so that one searches where the other does not
    for b, layer, s in watch(model, method, ids, (PROMPT,), pads).each():
        visible = chosen(s, method, PROMPT - pads[b]) if layer >= method.dense else causal(N - pads[b])[None]
        assert close(s.out, attend(s, visible))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(("refresh", "read"), [(1, 24), (4, 27)])
def test_a_decode_step_touches_no_more_than_its_lists(refresh, read, paged, model, ids):
    method = HiP(24, 2, 4, 8, 2, dense=0, refresh=refresh)
    with torch.no_grad(), foveal.attach(model, method, layout=Layout(paged=paged)) as session:
        cache = model(ids[:, :PROMPT]).past_key_values
        model(ids[:, PROMPT : PROMPT + 1], past_key_values=cache)
        assert session.read_share == pytest.approx(read / (PROMPT + 1))


@pytest.mark.parametrize("method", KEPT, ids=str)
def test_pages_read_the_same(method, model, ids):
    def run(layout):
        with torch.no_grad(), foveal.attach(model, method, layout=layout):
            cache = model(ids[:, :PROMPT]).past_key_values
            out = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(PROMPT, N)]
        return torch.cat(out, 1), cache.rows[-1].plane("hip")

    (a, marks), (b, expected) = run(Layout(paged=True)), run(Layout(paged=False))
    assert close(a, b) and torch.equal(marks, expected) and marks.any()


@pytest.mark.parametrize("paged", [False, True])
def test_lists_come_along_when_sequences_join_and_are_copied(paged, model, ids):
    """Two that are out of step, in one batch after some steps, and a copy of one, go on as they would alone."""
    with torch.no_grad(), foveal.attach(model, KEPT[0], layout=Layout(paged=paged)):

        def go(cache, columns):
            at = cache.seen[:, None]
            return model(columns, past_key_values=cache, position_ids=at).logits

        def start(row, prompt, steps):
            cache = model(ids[row, :prompt][None]).past_key_values
            for i in range(prompt, prompt + steps):
                go(cache, ids[row, i][None, None])
            return cache

        ends = (PROMPT + 3, PROMPT - 8)
        alone = [start(0, PROMPT, 3), start(1, PROMPT - 13, 5)]
        both = foveal.Store.join([c.fork() for c in alone])
        for step in range(6):
            columns = torch.stack([ids[b, ends[b] + step] for b in range(2)])[:, None]
            want = torch.cat([go(c, columns[b : b + 1]) for b, c in enumerate(alone)])
            assert close(go(both, columns), want)
            if step == 2:
                both = both.take([0, 1])


def logged(model, method, pieces, crop=0):
    """Read pieces of a text, of which `crop` tokens are forgotten before the last: query, output and cache of layer 0 at the last."""
    log, cache = [], None

    def note(step, out):
        if step.layer == 0:
            log.append((step.q[0, :, -1:], out[0, :, -1:]))
        return out

    with torch.no_grad(), foveal.attach(model, method | hook(mix=note)):
        for i, piece in enumerate(pieces):
            if crop and i + 1 == len(pieces):
                cache.crop(-crop)
            cache = model(piece, past_key_values=cache).past_key_values
    return log, cache


def marked(cache, g):
    return set(cache.rows[0].plane("hip")[0, g].nonzero().flatten().tolist())


def test_the_last_query_of_a_later_text_makes_the_list(model, ids):
    m, text = HiP(20, 2, 4, 8, 2, dense=0, refresh=8), ids[:1]
    log, cache = logged(model, m, text[:, :61].split([40, 1, 1, 19], 1))
    for g in range(KV):
        want = found(log[-1][0][3 * g : 3 * g + 3, 0], cache.rows[0].keys()[0, g], 55, m, 20)
        assert marked(cache, g) == want


def test_after_a_crop_no_key_counts_twice(model, ids):
    """The list of a search that was undone stays, but for what the window reads now."""
    m, n = HiP(60, 2, 4, 8, 2, dense=0, refresh=8), 73  # the token number 72 made a list
    pieces = [*ids[:1, :n].split([66, *[1] * (n - 66)], 1), ids[:1, 70:71]]
    log, cache = logged(model, m, pieces, crop=3)
    q, k, v = log[-1][0], cache.rows[0].keys()[0], cache.rows[0].values()[0]
    window = {*range(since(m, 70) + 1 - m.recent, 71)}
    visible = torch.zeros(KV, 1, 71, dtype=torch.bool)
    for g in range(KV):
        keys = found(log[6][0][3 * g : 3 * g + 3, 0], k[g], 71, m, 60)
        assert len(keys & window) > 2
        visible[g, 0, list(keys | window | {0, 1})] = True
    assert not visible.all()
    s = Seq(*(x.double() for x in (q, k, v, log[-1][1])))
    assert close(s.out, attend(s, visible))


def test_a_list_is_not_made_again_between(model, ids, monkeypatch):
    searched = []
    own = HiP._search
    monkeypatch.setattr(HiP, "_search", lambda self, step, since: searched.append(step.T) or own(self, step, since))
    watch(model, HiP(24, 2, 4, 8, 2, dense=1, refresh=4), ids[:1], (PROMPT,))
    assert searched == [PROMPT, 68, 72]


@pytest.mark.parametrize("refresh", [1, 4])
def test_rows_that_lost_keys_are_searched_by_token(refresh, model, ids):
    method = HiP(20, 2, 4, 8, 2, dense=0, refresh=refresh)  # every block of 2 still holds a key
    for _, _, s in watch(model, thin() | method, ids, (PROMPT,)).each():
        visible = thinned(N, (PROMPT,), KV)
        for g in range(KV):
            here = lambda t, g=g: t >= PROMPT or bool(stays(torch.tensor(t), g))
            for i in range(PROMPT, N):
                by_prompt = since(method, i) < PROMPT  # it lost keys after its last query had made a list
                held = {} if by_prompt else {"held": here}
                keys = read_in_decode(s.q[3 * g : 3 * g + 3], s.k[g], i, method, PROMPT, **held)
                visible[g, i] &= torch.tensor([j in keys for j in range(N)])
        assert close(s.out[:, PROMPT:], attend(s, visible)[:, PROMPT:])


@pytest.mark.parametrize("representative", ["first", "middle", "random"])
@pytest.mark.parametrize(("count", "wanted"), [(37, 4), (64, 8), (5, 7), (1, 1), (0, 3)])
def test_every_block_can_be_found(representative, count, wanted):
    """A block wins where all that stands for its groups is preferred: force each in turn."""
    for goal in range(count):

        def score(blocks, goal=goal):  # nearness to the goal: what locality of attention promises
            return -(blocks - goal).abs().double()

        got = halve(torch.tensor([count]), wanted, wanted, max(count, 1), score, "middle")[0].tolist()
        assert goal in got
        exact = halve(
            torch.tensor([count]), wanted, wanted, max(count, 1), lambda b: torch.rand(b.shape), representative
        )
        valid = [b for b in exact[0].tolist() if b >= 0]
        assert len(valid) == len(set(valid)) == min(wanted, count) and valid == sorted(valid)
        assert all(0 <= b < count for b in valid)


def test_a_smooth_peak_is_found_as_exactly_as_by_top_k():
    z = -((torch.arange(200.0) - 71.3) ** 2)
    got = halve(torch.tensor([200]), 16, 16, 200, lambda b: z[b.clamp(min=0)], "middle")[0]
    assert got.tolist() == z.topk(16).indices.sort().values.tolist()


def test_lists_may_want_different_numbers():
    z = torch.rand(300, generator=torch.Generator().manual_seed(1))
    count, wanted = torch.tensor([300, 120, 3, 0]), torch.tensor([9, 4, 6, 2])
    got = halve(count, wanted, 9, 300, lambda b: z[b.clamp(min=0)])
    for row, n, w in zip(got, count.tolist(), wanted.tolist(), strict=True):
        alone = halve(torch.tensor([n]), w, w, 300, lambda b: z[b.clamp(min=0)])[0]
        assert row[row >= 0].tolist() == alone[alone >= 0].tolist()


def test_only_a_logarithm_of_the_blocks_is_scored():
    scored = []

    def score(blocks):
        scored.append(blocks.shape[-1])
        return torch.rand(blocks.shape)

    halve(torch.tensor([1 << 16]), 64, 64, 1 << 16, score)
    assert sum(scored) == 2 * 64 * 10


@pytest.mark.parametrize("refresh", [1, 4])
def test_a_budget_for_everything_is_dense(refresh, model, ids):
    for _, _, s in watch(model, HiP(1.0, 2, 4, 8, 2, dense=0, refresh=refresh), ids, (PROMPT,)).each():
        assert close(s.out, attend(s, causal(N)[None]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"recent": 0}, "recent = 0"),
        ({"key_block": 0}, "key_block = 0"),
        ({"refresh": 0}, "refresh = 0: .*at least 1"),
        ({"representative": "last"}, "representative = 'last': expected one of first, middle, random"),
        ({"budget": 0.0}, "budget = 0.0"),
    ],
)
def test_bad_values(wrong, message):
    with pytest.raises(foveal.InputError, match=message):
        HiP(**wrong)
