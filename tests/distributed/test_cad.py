"""Plans against the documents they cut, and attention over ranks against attention on one device."""

import math
import random
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from foveal.distributed.cad import Task, attend_planned, context_parallel, plan_attention
from foveal.errors import InputError


def draw_lengths(ranks, tokens, seed):
    """Ranks of equally many tokens in documents of a long-tailed length."""
    rng, found = random.Random(seed), []
    for _ in range(ranks):
        left, some = tokens, []
        while left:
            n = min(left, max(1, int(rng.paretovariate(0.8) * tokens / 40)))
            some.append(n)
            left -= n
        found.append(some)
    return found


PLANS = {
    "one long document": [[1000], [10] * 100, [250] * 4, [500, 500]],
    "odd and tiny": [[101, 1, 2], [3], [1, 1], [7]],
    "an empty rank": [[64, 33], []],
    **{f"long tail {seed}": draw_lengths(8, 5000, seed) for seed in range(3)},
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("block", [1, 8])
def test_every_query_once_and_work_level(name, block):
    lengths = PLANS[name]
    plan = plan_attention(lengths, block=block)
    seen = {d: torch.zeros(document.length, dtype=torch.int64) for d, document in enumerate(plan.documents)}
    for tasks in plan.tasks:
        for task in tasks:
            assert task.work == sum(range(task.start + 1, task.stop + 1))
            seen[task.document][task.start : task.stop] += 1
    assert all((count == 1).all() for count in seen.values())
    exact = sum(n * (n + 1) // 2 for some in lengths for n in some)
    assert sum(plan.after.work) == sum(plan.before.work) == exact
    mean, unit = exact / len(lengths), block * (max(n for some in lengths for n in some) + 1)
    assert max(plan.after.work) <= max(1.1 * mean, mean + unit)
    assert plan.before.bytes == 0


@pytest.mark.parametrize("n", [20, 21])
def test_a_slice_and_its_mirror_cost_the_same_wherever_they_lie(n):
    for a in range(n // 2):
        for b in range(a + 1, n // 2 + 1):
            assert Task(0, a, b).work + Task(0, n - b, n - a).work == (b - a) * (n + 1)


def test_even_ranks_stay_as_they_are():
    plan = plan_attention([[50, 50], [50, 50]])
    assert plan.after.bytes == 0
    assert [{t.document for t in tasks} for tasks in plan.tasks] == [{0, 1}, {2, 3}]


def test_bytes_by_hand():
    plan = plan_attention([[8], []], tolerance=0.0)  # 36 pairs: the inner two pairs of queries move
    assert plan.tasks == ((Task(0, 0, 2), Task(0, 6, 8)), (Task(0, 2, 6),))
    assert plan.after.work == (18, 18)
    assert plan.after.bytes == 4 * plan.shape.query + 6 * plan.shape.key


def test_context_parallelism_by_hand():
    plain = context_parallel([[6], [2, 4]])
    assert plain.work == (21, 3 + 10)
    assert plain.bytes == 0
    cut = context_parallel([[8], []])
    assert cut.work == (10, 26)
    assert cut.bytes == 4 * plan_attention([[8]]).shape.key
    even = context_parallel([[8], []], zigzag=True)
    assert even.work == (18, 18)
    assert even.bytes == (4 + 2) * plan_attention([[8]]).shape.key


def test_more_level_than_context_parallelism():
    lengths = draw_lengths(16, 8000, 5)
    plan = plan_attention(lengths)
    assert plan.after.unevenness < 1.12 < 1.5 < context_parallel(lengths).unevenness
    assert plan.after.bytes < context_parallel(lengths, zigzag=True).bytes


LENGTHS = [[13, 4], [3], []]


def tensors(rank):
    g = torch.Generator().manual_seed(rank)
    n = sum(LENGTHS[rank])
    return [torch.randn(1, h, n, 8, generator=g, dtype=torch.float64) for h in (4, 2, 2, 4)]  # q, k, v, gradient of out


def on_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    q, k, v, aim = tensors(rank)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = attend_planned(q, k, v, plan_attention(LENGTHS))
    try:
        attend_planned(q, k, v, plan_attention(LENGTHS[:2]))
        refused = False
    except InputError:
        refused = True
    torch.save([refused, out.detach(), *torch.autograd.grad((out * aim).sum(), leaves)], f"{folder}/{rank}")
    dist.destroy_process_group()


def test_ranks_give_what_one_device_gives(tmp_path):
    plan = plan_attention(LENGTHS)
    assert plan.after.bytes > 0
    assert all(plan.tasks)  # the rank without documents works too
    how = "fork" if sys.platform == "linux" else "spawn"  # a fork need not import everything again
    mp.start_processes(on_rank, args=(str(tmp_path),), nprocs=3, start_method=how)
    for rank, lengths in enumerate(LENGTHS):
        q, k, v, aim = tensors(rank)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
        see = (owner[:, None] == owner) & torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
        x = q @ k.repeat_interleave(2, 1).mT / math.sqrt(8)
        expected = x.masked_fill(~see, -math.inf).softmax(-1) @ v.repeat_interleave(2, 1)
        refused, *found = torch.load(tmp_path / str(rank))
        assert refused
        for a, b in zip(found, [expected, *torch.autograd.grad((expected * aim).sum(), leaves)], strict=True):
            torch.testing.assert_close(a, b.detach())


def test_bad_input_is_refused():
    for lengths in ([], [[]], [[3, 0]], [[3.5]], [3, 4], ["ab"]):
        for call in (plan_attention, context_parallel):
            with pytest.raises(InputError, match="documents of at least 1 token"):
                call(lengths)
    for how in ({"tolerance": 1.0}, {"block": 0}, {"block": 1.5}):
        with pytest.raises(InputError, match="tolerance"):
            plan_attention([[3]], **how)
    q = torch.zeros(1, 1, 3, 8)
    with pytest.raises(InputError, match="init_process_group"):
        attend_planned(q, q, q, plan_attention([[3]]))
