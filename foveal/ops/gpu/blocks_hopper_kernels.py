"""Attention over block lists by a producer and two consumers, for Hopper; launched by `blocks_hopper.py` beside this file.

A resident program per multiprocessor takes tiles of 128 queries from an atomic counter, heavy ones first. Its producer walks
the list and fetches keys and values into rings of two; two consumers of 64 queries each multiply the next keys while they
exponentiate the last, and leave their output to an asynchronous store while the producer already fetches the next tile.
Masked key tiles come first in a tile, so that the loop over the others has no mask. The twin is `blocks._forward`.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

_LN2 = gl.constexpr(0.6931471805599453)
_HIDDEN = gl.constexpr(-3.0e38)
_LOWEST = gl.constexpr(-1.0e30)
_MESSAGE = gl.constexpr(5)  # what the producer tells of a tile: its number, a0, a1, a2, a3


@gluon.jit
def _place(i, a0, a1, a2, a3):
    """List tile that is visited as number i: those with a mask first."""
    before = a1 - a0
    masked = before + a3 - a2
    return gl.where(i < before, a0 + i, gl.where(i < masked, a2 + i - before, a1 + i - masked))


@gluon.jit
def _key_start(INDICES, row, place, width, BLOCK: gl.constexpr, STEP: gl.constexpr):
    PARTS: gl.constexpr = BLOCK // STEP
    entry = gl.minimum(place // PARTS, width - 1)  # a tile without keys still reads one, and hides it
    return gl.load(INDICES + row * width + entry) * BLOCK + (place % PARTS) * STEP


@gluon.jit
def _tell(work, full, empty, turn, tile, a0, a1, a2, a3):
    """Hand a work item to both consumers."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = turn % 2
    mbarrier.wait(empty.index(slot), ((turn // 2) & 1) ^ 1)
    base = slot * _MESSAGE
    work.index(base).store(gl.full([1], tile, gl.int32, layout))
    work.index(base + 1).store(gl.full([1], a0, gl.int32, layout))
    work.index(base + 2).store(gl.full([1], a1, gl.int32, layout))
    work.index(base + 3).store(gl.full([1], a2, gl.int32, layout))
    work.index(base + 4).store(gl.full([1], a3, gl.int32, layout))
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def _hear(work, n):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(work.index(n).load(layout), 0)


@gluon.jit
def _next(COUNTER, ITEMS, items, ITEM: gl.constexpr):
    """Claim a work item: its number (-1 once there is none) and span."""
    n = gl.atomic_add(COUNTER, 1, sem="relaxed")
    item = ITEMS + gl.minimum(n, items - 1) * ITEM
    tile = gl.where(n < items, gl.load(item), -1)
    return tile, gl.load(item + 1), gl.load(item + 2), gl.load(item + 3), gl.load(item + 4)


@gluon.jit
def _produce(
    Q, K, V, PQ, PK, qs, ks, vs, pqs, pks, work, bars, INDICES, ITEMS, COUNTER, items, heads, tiles, rows, width,
    GROUP: gl.constexpr, SHARE: gl.constexpr, ROW: gl.constexpr, BLOCK: gl.constexpr, STEP: gl.constexpr, BIAS: gl.constexpr,
    ITEM: gl.constexpr, ST: gl.constexpr,
):  # fmt: skip
    wfull, wempty, qfull, qempty, kfull, kempty, vfull, vempty = bars
    turn = 0
    base = 0
    tile, a0, a1, a2, a3 = _next(COUNTER, ITEMS, items, ITEM)
    _tell(work, wfull, wempty, turn, tile, a0, a1, a2, a3)
    while tile >= 0:
        owner = tile // tiles
        m = tile % tiles
        head = owner % heads
        batch = owner // heads
        row = (owner * rows + m * 128 // ROW).to(gl.int64)
        count = gl.maximum(a3 - a0, 1)
        start = _key_start(INDICES, row, _place(0, a0, a1, a2, a3), width, BLOCK, STEP)
        for c in gl.static_range(2):
            mbarrier.wait(qempty.index(c), (turn & 1) ^ 1)
            mbarrier.expect(qfull.index(c), Q.block_type.nbytes + (PQ.block_type.nbytes if BIAS else 0))
            tma.async_copy_global_to_shared(Q, [batch, head, m * 128 + c * 64, 0], qfull.index(c), qs.index(c))
            if BIAS:
                tma.async_copy_global_to_shared(PQ, [batch, head, m * 128 + c * 64, 0], qfull.index(c), pqs.index(c))
        for i in range(count):
            # The next list entry is on its way while this tile waits for room.
            following = _key_start(
                INDICES, row, _place(gl.minimum(i + 1, count - 1), a0, a1, a2, a3), width, BLOCK, STEP
            )
            s = (base + i) % ST
            phase = ((base + i) // ST) & 1
            mbarrier.wait(kempty.index(s), phase ^ 1)
            mbarrier.expect(kfull.index(s), K.block_type.nbytes + (PK.block_type.nbytes if BIAS else 0))
            tma.async_copy_global_to_shared(K, [batch, head // GROUP, start, 0], kfull.index(s), ks.index(s))
            if BIAS:
                tma.async_copy_global_to_shared(PK, [batch, head // SHARE, start, 0], kfull.index(s), pks.index(s))
            mbarrier.wait(vempty.index(s), phase ^ 1)
            mbarrier.expect(vfull.index(s), V.block_type.nbytes)
            tma.async_copy_global_to_shared(V, [batch, head // GROUP, start, 0], vfull.index(s), vs.index(s))
            start = following
        base += count
        turn += 1
        tile, a0, a1, a2, a3 = _next(COUNTER, ITEMS, items, ITEM)
        _tell(work, wfull, wempty, turn, tile, a0, a1, a2, a3)


@gluon.jit
def _hide(s, position, start, first, sink, recent, some, PACKED: gl.constexpr, BAND: gl.constexpr, STEP: gl.constexpr):
    """Logits of one tile with what the queries do not see set far below everything."""
    key = start + gl.arange(0, STEP, layout=gl.SliceLayout(0, s.type.layout))
    see = (position[:, None] >= key[None, :]) & some
    if PACKED:
        see = see & (key[None, :] >= first[:, None])
    if BAND:
        see = see & ((key[None, :] < sink) | (position[:, None] - key[None, :] < recent))
    return gl.where(see, s, _HIDDEN)


@gluon.jit
def _step(
    q, ks, vs, pq, pks, kfull, kempty, vfull, vempty, n, acc, p, top, mass, heat, factor, position, start, first, sink, recent,
    MASK: gl.constexpr, PACKED: gl.constexpr, BAND: gl.constexpr, ENTROPY: gl.constexpr, BIAS: gl.constexpr,
    STEP: gl.constexpr, ST: gl.constexpr,
):  # fmt: skip
    """Multiply keys n, then values n - 1; exponentiate n while the values are still being multiplied."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, STEP, 16])
    k = n % ST
    v = (n - 1) % ST
    mbarrier.wait(kfull.index(k), (n // ST) & 1)
    zero = gl.zeros([64, STEP], gl.float32, layout=mma)
    keys = ks.index(k).reshape([STEP, q.shape[1]])
    s_later = warpgroup_mma(q, keys.permute((1, 0)), zero, use_acc=False, is_async=True)
    if BIAS:
        factors = pks.index(k).reshape([STEP, pq.shape[1]])
        s_later = warpgroup_mma(pq, factors.permute((1, 0)), s_later, is_async=True)
    mbarrier.wait(vfull.index(v), ((n - 1) // ST) & 1)
    acc_later = warpgroup_mma(p, vs.index(v).reshape([STEP, q.shape[1]]), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s_later])
    mbarrier.arrive(kempty.index(k), count=1)
    if MASK:
        s = _hide(s, position, start, first, sink, recent, True, PACKED, BAND, STEP)
    new = gl.maximum(top, gl.max(s, 1) * factor)
    weight = gl.exp2(s * factor - new[:, None])
    keep = gl.exp2(top - new)
    mass = mass * keep + gl.sum(weight, 1)
    if ENTROPY:
        heat = heat * keep + gl.sum(weight * s, 1)
    acc, p = warpgroup_mma_wait(0, deps=[acc_later, p])
    mbarrier.arrive(vempty.index(v), count=1)
    rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    acc = acc * gl.convert_layout(keep, rows)[:, None]
    p = gl.convert_layout(weight.to(p.dtype), p.type.layout)
    return acc, p, new, mass, heat


@gluon.jit
def _consume(
    OUT, qs, ks, vs, pqs, pks, outs, work, bars, LSE, HEAT, INDICES, FIRST, SINK, RECENT,
    heads, length, total, tiles, rows, width, factor,
    C: gl.constexpr, D: gl.constexpr, ROW: gl.constexpr, BLOCK: gl.constexpr, STEP: gl.constexpr, PACKED: gl.constexpr,
    BAND: gl.constexpr, ENTROPY: gl.constexpr, BIAS: gl.constexpr, ST: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    wfull, wempty, qfull, qempty, kfull, kempty, vfull, vempty = bars
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, STEP, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, mma)
    q = qs.index(C).reshape([64, D])
    pq = pqs.index(C).reshape([64, pqs.shape[4]])
    slot = outs.index(C)
    turn = 0
    base = 0
    mbarrier.wait(wfull.index(0), 0)
    tile = _hear(work, 0)
    while tile >= 0:
        message = (turn % 2) * _MESSAGE
        a0, a1, a2, a3 = (
            _hear(work, message + 1),
            _hear(work, message + 2),
            _hear(work, message + 3),
            _hear(work, message + 4),
        )
        mbarrier.arrive(wempty.index(turn % 2), count=1)
        owner = tile // tiles
        m = tile % tiles
        head = owner % heads
        batch = owner // heads
        row = (owner * rows + m * 128 // ROW).to(gl.int64)
        count = gl.maximum(a3 - a0, 1)
        masked = a1 - a0 + a3 - a2
        query = m * 128 + C * 64 + gl.arange(0, 64, layout=by_row)
        position = query + total - length
        first = position
        sink = 0
        recent = 0
        if PACKED:
            first = gl.load(FIRST + position, mask=position < total, other=0)
        if BAND:
            sink = gl.load(SINK + head)
            recent = gl.load(RECENT + head)
        start = _key_start(INDICES, row, _place(0, a0, a1, a2, a3), width, BLOCK, STEP)
        mbarrier.wait(qfull.index(C), turn & 1)
        k = base % ST
        mbarrier.wait(kfull.index(k), (base // ST) & 1)
        zero = gl.zeros([64, STEP], gl.float32, layout=mma)
        s = warpgroup_mma(q, ks.index(k).reshape([STEP, D]).permute((1, 0)), zero, use_acc=False, is_async=True)
        if BIAS:
            factors = pks.index(k).reshape([STEP, pq.shape[1]])
            s = warpgroup_mma(pq, factors.permute((1, 0)), s, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(kempty.index(k), count=1)
        s = _hide(s, position, start, first, sink, recent, a3 > a0, PACKED, BAND, STEP)
        top = gl.maximum(gl.max(s, 1) * factor, _LOWEST)
        weight = gl.exp2(s * factor - top[:, None])
        mass = gl.sum(weight, 1)
        heat = mass
        if ENTROPY:
            heat = gl.sum(weight * s, 1)
        p = gl.convert_layout(weight.to(dtype), operand)
        acc = gl.zeros([64, D], gl.float32, layout=wide)
        for i in range(1, masked):
            start = _key_start(INDICES, row, _place(i, a0, a1, a2, a3), width, BLOCK, STEP)
            acc, p, top, mass, heat = _step(
                q, ks, vs, pq, pks, kfull, kempty, vfull, vempty, base + i, acc, p, top, mass, heat, factor, position, start,
                first, sink, recent, True, PACKED, BAND, ENTROPY, BIAS, STEP, ST,
            )  # fmt: skip
        for i in range(gl.maximum(masked, 1), count):
            acc, p, top, mass, heat = _step(
                q, ks, vs, pq, pks, kfull, kempty, vfull, vempty, base + i, acc, p, top, mass, heat, factor, position, start,
                first, sink, recent, False, PACKED, BAND, ENTROPY, BIAS, STEP, ST,
            )  # fmt: skip
        mbarrier.arrive(qempty.index(C), count=1)
        base += count
        turn += 1
        v = (base - 1) % ST
        mbarrier.wait(vfull.index(v), ((base - 1) // ST) & 1)
        acc = warpgroup_mma(p, vs.index(v).reshape([STEP, D]), acc, is_async=True)
        some = mass > 0
        share = 1.0 / gl.where(some, mass, 1.0)
        lse = gl.where(some, (top + gl.log2(mass)) * _LN2, float("-inf"))
        inside = query < length
        gl.store(LSE + owner.to(gl.int64) * length + query, lse, mask=inside)
        if ENTROPY:
            entropy = gl.where(some, lse - heat * share * (factor * _LN2), 0.0)
            gl.store(HEAT + owner.to(gl.int64) * length + query, entropy, mask=inside)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(vempty.index(v), count=1)
        out = acc * gl.convert_layout(share, gl.SliceLayout(1, wide))[:, None]
        tma.store_wait(0)  # the last tile's output has left
        slot.reshape([64, D]).store(out.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(OUT, [batch, head, m * 128 + C * 64, 0], slot)
        mbarrier.wait(wfull.index(turn % 2), (turn // 2) & 1)
        tile = _hear(work, (turn % 2) * _MESSAGE)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["items", "heads", "length", "total", "tiles", "rows", "width"])
def forward_kernel(
    Q, K, V, PQ, PK, OUT, LSE, HEAT, INDICES, ITEMS, COUNTER, FIRST, SINK, RECENT,
    items, heads, length, total, tiles, rows, width, factor,
    GROUP: gl.constexpr, SHARE: gl.constexpr, D: gl.constexpr, R: gl.constexpr, ROW: gl.constexpr, BLOCK: gl.constexpr,
    STEP: gl.constexpr, PACKED: gl.constexpr, BAND: gl.constexpr, ENTROPY: gl.constexpr, ITEM: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = K.dtype
    qs = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], Q.layout)
    outs = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, D], OUT.layout)
    ks = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, STEP, D], K.layout)
    vs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, STEP, D], V.layout)
    BIAS: gl.constexpr = R > 0
    pqs = gl.allocate_shared_memory(PQ.dtype, [2, 1, 1, 64, R], PQ.layout) if BIAS else qs
    pks = gl.allocate_shared_memory(PK.dtype, [STAGES, 1, 1, STEP, R], PK.layout) if BIAS else ks
    work = gl.allocate_shared_memory(gl.int32, [2 * _MESSAGE, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    wfull = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    wempty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    qfull = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    qempty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    kfull = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kempty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    vfull = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    vempty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(wfull.index(i), count=1)
        mbarrier.init(wempty.index(i), count=2)
        mbarrier.init(qfull.index(i), count=1)
        mbarrier.init(qempty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(kfull.index(i), count=1)
        mbarrier.init(kempty.index(i), count=2)
        mbarrier.init(vfull.index(i), count=1)
        mbarrier.init(vempty.index(i), count=2)
    fence_async_shared()
    bars = (wfull, wempty, qfull, qempty, kfull, kempty, vfull, vempty)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    OUT, qs, ks, vs, pqs, pks, outs, work, bars, LSE, HEAT, INDICES, FIRST, SINK, RECENT, heads, length,
                    total, tiles, rows, width, factor, 0, D, ROW, BLOCK, STEP, PACKED, BAND, ENTROPY, BIAS, STAGES, dtype,
                ),
            ),
            (
                _consume,
                (
                    OUT, qs, ks, vs, pqs, pks, outs, work, bars, LSE, HEAT, INDICES, FIRST, SINK, RECENT, heads, length,
                    total, tiles, rows, width, factor, 1, D, ROW, BLOCK, STEP, PACKED, BAND, ENTROPY, BIAS, STAGES, dtype,
                ),
            ),
            (
                _produce,
                (
                    Q, K, V, PQ, PK, qs, ks, vs, pqs, pks, work, bars, INDICES, ITEMS, COUNTER, items, heads, tiles, rows,
                    width, GROUP, SHARE, ROW, BLOCK, STEP, BIAS, ITEM, STAGES,
                ),
            ),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip
