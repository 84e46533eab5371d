"""The two passes of attention statistics, by key blocks and by query blocks; launched by `stats.py` beside this file.

Both hold one tile of p = 2 ** (logit - lse), all logits in base 2: no maximum, no rescaling, no memory beyond the results. The column
pass computes S^T = K Q^T, so that sums over queries run along a tile's row. What nobody asks for is not compiled.
"""

import triton
import triton.language as tl


@triton.jit
def _score(a, b, fa, fb, scale, cap, CAPPED: tl.constexpr, RANK: tl.constexpr):
    """Logits in base 2 of one tile, a b^T, soft-capped, plus the bias fa fb^T."""
    x = tl.dot(a, tl.trans(b)) * scale
    if CAPPED:
        x = cap * (2 * tl.sigmoid(x) - 1)  # the scale holds the 2 of tanh(x) = 2 sigmoid(2 x) - 1
    if RANK > 0:
        x = tl.dot(fa, tl.trans(fb), x)
    return x


@triton.jit(do_not_specialize=["n", "total", "past", "blocks", "heads", "low_heads"])
def columns_kernel(
    QD, KD, FQD, FKD, LSE, LOG_MASS, LOW, MASS, COUNT, n, width, total, past, blocks, heads, low_heads, scale, cap,
    GROUP: tl.constexpr, BIAS_GROUP: tl.constexpr, MASS_GROUP: tl.constexpr, RANK: tl.constexpr, CAPPED: tl.constexpr,
    SUM: tl.constexpr, LOWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a block of BN keys and head: sum of p, and number of queries with p below theirs of LOW.

    LSE and LOW have `width` entries a head, a multiple of the tile: a masked load of them would cost as much as the product.
    """
    pid = tl.program_id(0)
    head, j0 = pid // blocks, pid % blocks * BN  # the first keys are seen by most queries: they start first
    b, h = head // heads, head % heads
    key = j0 + tl.arange(0, BN)
    k = tl.reshape(KD.load([b, h // GROUP, j0, 0]), [BN, D])
    fk = k
    if RANK > 0:
        fk = tl.reshape(FKD.load([b, h // BIAS_GROUP, j0, 0]), [BN, RANK])
    if MASS_GROUP > 0:
        log_mass = tl.load(LOG_MASS + (head // MASS_GROUP) * total + key, mask=key < total, other=0.0)
    mass = tl.zeros([BN], tl.float32)
    count = tl.zeros([BN], tl.float32)
    low_at = LOW + (b * low_heads + h // (heads // low_heads)) * width
    first = tl.maximum(j0 - past, 0) // BM * BM
    cut = tl.minimum((tl.maximum(j0 + BN - 1 - past, 0) + BM - 1) // BM * BM, (n + BM - 1) // BM * BM)
    for phase in tl.static_range(2):  # 0: the tiles that the diagonal cuts, 1: the rest
        if phase == 0:
            begin = first
            end = cut
        else:
            begin = tl.maximum(cut, first)
            end = n
        for i in tl.range(begin, end, BM, num_stages=1 if phase == 0 else STAGES):
            query = i + tl.arange(0, BM)
            q = tl.reshape(QD.load([b, h, i, 0]), [BM, D])
            fq = q
            if RANK > 0:
                fq = tl.reshape(FQD.load([b, h, i, 0]), [BM, RANK])
            x = _score(k, q, fk, fq, scale, cap, CAPPED, RANK)
            if MASS_GROUP > 0:
                x += log_mass[:, None]
            x -= tl.load(LSE + head * width + query)[None, :]
            if phase == 0:
                seen = (query + past)[None, :] >= key[:, None]
                x = tl.where(seen, x, -1e38)
            if SUM:
                mass += tl.sum(tl.exp2(x), 1)
            if LOWS:
                low = x < tl.load(low_at + query)[None, :]
                if phase == 0:
                    low = low & seen
                count += tl.sum(low.to(tl.float32), 1)
    if SUM:
        tl.store(MASS + head * total + key, mass, mask=key < total)
    if LOWS:
        tl.store(COUNT + head * total + key, count, mask=key < total)


@triton.jit(do_not_specialize=["n", "total", "past", "blocks", "heads", "sink", "map_lines", "map_width"])
def rows_kernel(
    QD, KD, FQD, FKD, LSE, LOG_MASS, BIN, EDGE, ENTROPY, SINK, DISTANCE, MAX, ARGMAX, BINS, MAP, TOP, TOP_KEY,
    n, total, past, blocks, heads, sink, map_lines, map_width, scale, cap,
    GROUP: tl.constexpr, BIAS_GROUP: tl.constexpr, MASS_GROUP: tl.constexpr, RANK: tl.constexpr, CAPPED: tl.constexpr,
    WANT_ENTROPY: tl.constexpr, WANT_SINK: tl.constexpr, WANT_DISTANCE: tl.constexpr, WANT_MAX: tl.constexpr,
    NB: tl.constexpr, BLOCK: tl.constexpr, NTOP: tl.constexpr, NTOP_PADDED: tl.constexpr, ALL_KEYS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program a block of BM queries and head. BINS and MAP hold one line a program, summed up afterwards."""
    pid = tl.program_id(0)
    head = pid // blocks
    block = blocks - 1 - pid % blocks  # the last queries see most keys: they start first
    b, h = head // heads, head % heads
    i0 = block * BM
    row = i0 + tl.arange(0, BM)
    ni = tl.arange(0, BN)
    q = tl.reshape(QD.load([b, h, i0, 0]), [BM, D])
    fq = q
    if RANK > 0:
        fq = tl.reshape(FQD.load([b, h, i0, 0]), [BM, RANK])
    lse = tl.load(LSE + head * n + row, mask=row < n, other=1e30)
    at = head * n + row
    position = (row + past).to(tl.float32)
    end = tl.minimum(i0 + BM + past, total)
    mass_at = LOG_MASS + (head // (MASS_GROUP if MASS_GROUP > 0 else 1)) * total
    if WANT_SINK:
        on_sinks = tl.zeros([BM], tl.float32)
        for j in tl.range(0, tl.minimum(sink, end), BN, num_stages=1):
            key = j + ni
            k = tl.reshape(KD.load([b, h // GROUP, j, 0]), [BN, D])
            fk = k
            if RANK > 0:
                fk = tl.reshape(FKD.load([b, h // BIAS_GROUP, j, 0]), [BN, RANK])
            x = _score(q, k, fq, fk, scale, cap, CAPPED, RANK)
            if MASS_GROUP > 0:
                x += tl.load(mass_at + key, mask=key < total, other=0.0)[None, :]
            seen = ((row + past)[:, None] >= key[None, :]) & (key < sink)[None, :]
            on_sinks += tl.sum(tl.exp2(tl.where(seen, x - lse[:, None], -1e38)), 1)
        tl.store(SINK + at, on_sinks, mask=row < n)
    if ALL_KEYS:
        entropy = tl.zeros([BM], tl.float32)
        distance = tl.zeros([BM], tl.float32)
        best = tl.full([BM, BN], -3e38, tl.float32)
        best_at = tl.zeros([BM, BN], tl.int32)
        bins = tl.zeros([NB if NB > 0 else 1], tl.float32)
        in_block = tl.zeros([BM], tl.float32)
        ti = tl.arange(0, NTOP_PADDED)
        top = tl.zeros([BM, NTOP_PADDED], tl.float32) + tl.where(ti < NTOP, 0.0, 3e38)[None, :]
        top_key = tl.full([BM, NTOP_PADDED], -1, tl.int32)
        map_at = MAP + (head * map_lines + block).to(tl.int64) * map_width
        whole = (i0 + past + 1) // BN * BN
        for phase in tl.static_range(2):  # 0: the tiles that every query sees, 1: those the diagonal cuts
            if phase == 0:
                begin = 0
                stop = whole
            else:
                begin = whole
                stop = end
            for j in tl.range(begin, stop, BN, num_stages=STAGES if phase == 0 else 1):
                key = j + ni
                k = tl.reshape(KD.load([b, h // GROUP, j, 0]), [BN, D])
                fk = k
                if RANK > 0:
                    fk = tl.reshape(FKD.load([b, h // BIAS_GROUP, j, 0]), [BN, RANK])
                x = _score(q, k, fq, fk, scale, cap, CAPPED, RANK)
                if MASS_GROUP > 0:
                    x += tl.load(mass_at + key, mask=key < total, other=0.0)[None, :]
                x -= lse[:, None]
                if phase == 1:
                    x = tl.where((row + past)[:, None] >= key[None, :], x, -1e38)
                if WANT_MAX > 0:  # tile position by tile position: no reduction inside the loop
                    if WANT_MAX > 1:
                        best_at = tl.where(x > best, j, best_at)
                    best = tl.maximum(best, x)
                p = tl.exp2(x)
                if WANT_ENTROPY:
                    entropy += tl.sum(p * x, 1)
                if WANT_DISTANCE:
                    distance += tl.sum(p * (position[:, None] - key.to(tl.float32)[None, :]), 1)
                if NB > 0:
                    bins = _histogram(bins, p, BIN, EDGE, i0 + past, j, total, BM, BN, NB)
                if BLOCK > 0:
                    in_block += tl.sum(p, 1)
                    if (j + BN) % BLOCK == 0:
                        tl.store(map_at + j // BLOCK, tl.sum(in_block, 0))
                        in_block = tl.zeros([BM], tl.float32)
                if NTOP > 0:
                    top, top_key = _insert(top, top_key, p, j, ti, ni)
        if WANT_ENTROPY:
            tl.store(ENTROPY + at, -0.6931471805599453 * entropy, mask=row < n)
        if WANT_DISTANCE:
            tl.store(DISTANCE + at, distance, mask=row < n)
        if WANT_MAX > 0:
            largest = tl.max(best, 1)
            tl.store(MAX + at, tl.exp2(largest), mask=row < n)
            if WANT_MAX > 1:
                where = tl.min(tl.where(best == largest[:, None], best_at + ni[None, :], total), 1)
                tl.store(ARGMAX + at, where.to(tl.int64), mask=row < n)
        if NB > 0:
            tl.store(BINS + (head * blocks + block) * NB + tl.arange(0, NB), bins)
        if BLOCK > 0:  # noqa: SIM102
            if (end + BN - 1) // BN * BN % BLOCK != 0:  # the last block is not full
                tl.store(map_at + (end - 1) // BLOCK, tl.sum(in_block, 0))
        if NTOP > 0:
            top = tl.where((ti < NTOP)[None, :], top, -1.0)
            for rank in tl.static_range(NTOP):  # largest first, equal ones by key
                largest = tl.max(top, 1)
                where = tl.min(tl.where(top == largest[:, None], top_key, 2147483647), 1)
                chosen = tl.min(
                    tl.where((top == largest[:, None]) & (top_key == where[:, None]), ti[None, :], NTOP_PADDED), 1
                )
                tl.store(TOP + at.to(tl.int64) * NTOP + rank, largest, mask=row < n)
                tl.store(TOP_KEY + at.to(tl.int64) * NTOP + rank, where.to(tl.int64), mask=row < n)
                top = tl.where(ti[None, :] == chosen[:, None], -1.0, top)


@triton.jit
def _histogram(bins, p, BIN, EDGE, first, j, total, BM: tl.constexpr, BN: tl.constexpr, NB: tl.constexpr):
    """Add one tile to the bins of query-key distance; most tiles fall into one bin whole. `first`: its first query's position."""
    near = tl.load(BIN + tl.maximum(first - (j + BN - 1), 0))
    far = tl.load(BIN + tl.minimum(first + BM - 1 - j, total - 1))
    bi = tl.arange(0, NB)
    if near == far:
        bins += tl.where(bi == near, tl.sum(tl.sum(p, 1), 0), 0.0)
    else:
        distance = (first - j) + tl.arange(0, BM)[:, None] - tl.arange(0, BN)[None, :]
        for bin in range(near, far + 1):
            inside = (distance >= tl.load(EDGE + bin)) & (distance < tl.load(EDGE + bin + 1))
            bins += tl.where(bi == bin, tl.sum(tl.sum(tl.where(inside, p, 0.0), 1), 0), 0.0)
    return bins


@triton.jit
def _insert(top, top_key, p, j, ti, ni):
    """Let a tile's probabilities into the unsorted lists of the largest, as long as any row has one above its list's least."""
    least = tl.min(top, 1)
    largest = tl.max(p, 1)
    more = tl.max((largest > least).to(tl.int32), 0)
    if more > 0:  # as a branch: a bare while would keep the loop around it from being pipelined
        while more > 0:
            at = tl.argmax(p, 1)
            place = tl.argmin(top, 1)
            put = (largest > least)[:, None] & (ti[None, :] == place[:, None])
            top = tl.where(put, largest[:, None], top)
            top_key = tl.where(put, (j + at)[:, None], top_key)
            p = tl.where(ni[None, :] == at[:, None], -1.0, p)
            least = tl.min(top, 1)
            largest = tl.max(p, 1)
            more = tl.max((largest > least).to(tl.int32), 0)
    return top, top_key
