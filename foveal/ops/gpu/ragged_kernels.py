"""The kernels of decode attention over pages; launched by `ragged.py` beside this file.

The split kernel has a constant grid of pieces; each program works out from the lengths, on the device, which row and which
stretch of it is its own, so lengths may change under one captured graph. The queries of a group are packed into one matrix
product. The merge kernel joins the pieces of a row by their log-sum-exp; a third turns logits into weights where somebody
asks for them. Logits are in base 2 inside.
"""

import triton
import triton.language as tl


@triton.jit
def _share(
    LENGTH, rows, limit, pieces, RP: tl.constexpr, BN: tl.constexpr, LEAST_TILES: tl.constexpr, LISTED: tl.constexpr
):
    """Keys and pieces of every row, and tiles of a piece. LISTED: rows read lists of `limit` slots, whatever they hold."""
    r = tl.arange(0, RP)
    if LISTED:
        length = tl.where(r < rows, limit, 0)
    else:
        length = tl.minimum(tl.load(LENGTH + r, mask=r < rows, other=0), limit)
    tiles = (length + BN - 1) // BN
    chunk = tl.maximum((tl.sum(tiles, 0) + pieces - 1) // pieces, LEAST_TILES)
    return r, length, (tiles + chunk - 1) // chunk, chunk


@triton.jit
def locate(
    LENGTH, pid, rows, limit, pieces, RP: tl.constexpr, BN: tl.constexpr, LEAST_TILES: tl.constexpr, LISTED: tl.constexpr
):  # fmt: skip
    """Which row a piece belongs to: (row, piece of the row, keys of the row, tiles of a piece)."""
    r, length, n, chunk = _share(LENGTH, rows, limit, pieces, RP, BN, LEAST_TILES, LISTED)
    end = tl.cumsum(n, 0)
    row = tl.sum((end <= pid).to(tl.int32), 0)
    mine = r == row
    first = tl.sum(tl.where(mine, end - n, 0), 0)
    return row, pid - first, tl.sum(tl.where(mine, length, 0), 0), chunk


@triton.jit
def _codes(X, at, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows `at` of a pool [keys, WIDTH]: [keys, PADDED], zero past the width."""
    di = tl.arange(0, PADDED)
    pointers = X + at[:, None] * WIDTH + di[None, :]
    if PADDED == WIDTH:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=(di < WIDTH)[None, :], other=0.0)
    return x.to(tl.float32) if X.dtype.element_ty == tl.int8 else x  # through float32: not every target has it directly


@triton.jit
def _nibbles(x, dtype: tl.constexpr):
    """Both halves of bytes as numbers that are too large by a constant: the bits of 128 or 1024 with the nibble below them."""
    if dtype == tl.float32:
        low = (x & 15).to(tl.float32)
        high = (x >> 4).to(tl.float32)
    else:
        magic: tl.constexpr = 0x6400 if dtype == tl.float16 else 0x4300
        wide = x.to(tl.uint16)
        low = ((wide & 15) | magic).to(dtype, bitcast=True)
        high = ((wide >> 4) | magic).to(dtype, bitcast=True)
    return low, high


@triton.jit
def _half(x, shift: tl.constexpr):
    return ((x >> shift) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _four(SCALE, at):
    """Scale and zero of both halves of a key, read as one number of 64 bits."""
    x = tl.load(SCALE + at)
    return _half(x, 0), _half(x, 16), _half(x, 32), _half(x, 48)


@triton.jit
def split_kernel(
    Q, K, V, TABLE, LENGTH, HELD, SLOTS, EXTRA, MOVED, K_SCALE, V_SCALE, OUT, LSE, LOGIT,
    table_stride, slots_stride, extra_row, extra_head, logit_stride, moved, sink, listed, limit, rows, pieces, scale, softcap,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, PAGE: tl.constexpr,
    RP: tl.constexpr, GP: tl.constexpr, BN: tl.constexpr, LEAST_TILES: tl.constexpr, FORMAT: tl.constexpr,
    HAS_SLOTS: tl.constexpr, RUN: tl.constexpr, OWN: tl.constexpr, HAS_EXTRA: tl.constexpr,
    HAS_MOVED: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    WRITE_LOGIT: tl.constexpr, VALUES: tl.constexpr, PRECISE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, piece, length, chunk = locate(LENGTH, pid, rows, limit, pieces, RP, BN, LEAST_TILES, HAS_SLOTS)
    if row < rows:
        start = piece * chunk * BN
        end = tl.minimum(start + chunk * BN, length)
        HALVES: tl.constexpr = 2 if FORMAT == 2 else 1  # a byte of nibbles holds dimension i and i + D / 2
        OFFSET: tl.constexpr = 0 if PRECISE else 1024 if Q.dtype.element_ty == tl.float16 else 128
        DIMS: tl.constexpr = D // HALVES
        WIDE: tl.constexpr = DV // HALVES
        gi = tl.arange(0, GP)
        ni = tl.arange(0, BN)
        di = tl.arange(0, DP // HALVES)
        dv = tl.arange(0, DVP // HALVES)
        some = gi < G
        q_at = Q + row * G * D + gi[:, None] * D + di[None, :]
        q_ok = some[:, None] & (di < DIMS)[None, :]
        q = tl.load(q_at, mask=q_ok, other=0.0)
        if FORMAT == 2:
            q_high = tl.load(q_at + DIMS, mask=q_ok, other=0.0)
            q_sum = tl.sum(q.to(tl.float32), 1)
            q_high_sum = tl.sum(q_high.to(tl.float32), 1)
            high = tl.zeros([GP, DVP // HALVES], tl.float32)
        if HAS_SLOTS:
            held = tl.load(HELD + row) - (1 if OWN else 0)  # a list may name slots that have gone
        if HAS_WINDOW:
            skipped = tl.load(LENGTH + row) - length  # between the sinks and the window
        top = tl.full([GP], float("-inf"), tl.float32)
        total = tl.zeros([GP], tl.float32)
        acc = tl.zeros([GP, DVP // HALVES], tl.float32)
        for n0 in tl.range(start, end, BN, num_stages=STAGES):
            n = n0 + ni
            ok = n < length
            slot = n
            if HAS_SLOTS:
                first = tl.load(SLOTS + row * slots_stride + n // RUN, mask=n < listed * RUN, other=-1)
                slot = first + n % RUN
                ok = (first >= 0) & (slot < held)
                if OWN:  # the newest key comes last, and only once
                    ok = ok | (n == listed * RUN)
                    slot = tl.where(n == listed * RUN, held, slot)
                slot = tl.where(ok, slot, 0)
            if HAS_WINDOW:
                slot = tl.where(n < sink, n, n + skipped)
            page = tl.load(TABLE + row * table_stride + slot // PAGE, mask=ok, other=0)
            at = page.to(tl.int64) * PAGE + slot % PAGE
            k = _codes(K, at, DIMS, DP // HALVES)
            if HAS_MOVED:  # the oldest slots have keys of their own: positions inside the cache
                other = MOVED + (row * moved + slot)[:, None] * D + di[None, :]
                own = (slot < moved)[:, None]
                k = tl.where(own, tl.load(other, mask=own & (di < D)[None, :], other=0.0), k)
            if FORMAT == 0:
                s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee" if PRECISE else "tf32")
            elif FORMAT == 1:
                s = tl.dot(q, tl.trans(k.to(q.dtype)))
                s = s * tl.load(K_SCALE + at)[None, :].to(tl.float32)
            else:
                low_k, high_k = _nibbles(k, q.dtype)
                a, b, c, d = _four(K_SCALE, at)
                s = tl.dot(q, tl.trans(low_k)) * a[None, :] + q_sum[:, None] * (b - OFFSET * a)[None, :]
                s += tl.dot(q_high, tl.trans(high_k)) * c[None, :] + q_high_sum[:, None] * (d - OFFSET * c)[None, :]
            s = s * scale
            if HAS_CAP:
                s = softcap * (2 * tl.sigmoid(2 * s / softcap) - 1) * 1.4426950408889634
            if HAS_EXTRA == 2:
                s += tl.load(EXTRA + row * extra_row + slot, mask=ok, other=0.0)[None, :] * 1.4426950408889634
            elif HAS_EXTRA:
                more = tl.load(
                    EXTRA + row * extra_row + gi[:, None] * extra_head + slot[None, :],
                    mask=some[:, None] & ok[None, :], other=0.0,
                )  # fmt: skip
                s += more * 1.4426950408889634
            s = tl.where(ok[None, :], s, float("-inf"))
            if WRITE_LOGIT:  # the logits of a key lie together, so that a key is one store
                to = LOGIT + (row * logit_stride + n)[:, None] * G + gi[None, :]
                tl.store(to, tl.trans(s), mask=(n < length)[:, None] & some[None, :])
            if VALUES:
                new = tl.maximum(top, tl.max(s, 1))
                base = tl.where(new == float("-inf"), 0.0, new) if HAS_EXTRA or HAS_SLOTS else new
                fade = tl.exp2(top - base)
                p = tl.exp2(s - base[:, None])
                total = total * fade + tl.sum(p, 1)
                acc = acc * fade[:, None]
                v = _codes(V, at, WIDE, DVP // HALVES)
                if FORMAT == 0:
                    acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee" if PRECISE else "tf32")
                elif FORMAT == 1:
                    p *= tl.load(V_SCALE + at)[None, :].to(tl.float32)
                    acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc)
                else:
                    low_v, high_v = _nibbles(v, q.dtype)
                    a, b, c, d = _four(V_SCALE, at)
                    low_p = (p * a[None, :]).to(q.dtype)
                    acc = tl.dot(low_p, low_v, acc)
                    acc += tl.sum(p * b[None, :] - OFFSET * low_p.to(tl.float32), 1)[:, None]
                    high_p = (p * c[None, :]).to(q.dtype)
                    high = tl.dot(high_p, high_v, high * fade[:, None])
                    high += tl.sum(p * d[None, :] - OFFSET * high_p.to(tl.float32), 1)[:, None]
                top = new
        if VALUES:
            seen = tl.maximum(total, 1e-30)
            out_at = OUT + pid * G * DV + gi[:, None] * DV + dv[None, :]
            out_ok = some[:, None] & (dv < WIDE)[None, :]
            tl.store(out_at, acc / seen[:, None], mask=out_ok)
            if FORMAT == 2:
                tl.store(out_at + WIDE, high / seen[:, None], mask=out_ok)
            tl.store(LSE + pid * G + gi, tl.where(total > 0, top + tl.log2(seen), float("-inf")), mask=some)


@triton.jit
def merge_kernel(
    PART, PART_LSE, LENGTH, SINKS, OUT, LSE, limit, rows, pieces,
    G: tl.constexpr, DV: tl.constexpr, DB: tl.constexpr, NB: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr,
    LEAST_TILES: tl.constexpr, LISTED: tl.constexpr, MANY: tl.constexpr, HAS_SINKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program per (row, query head, stretch of the value): the pieces of the row, joined."""
    pid = tl.program_id(0)
    stretch, head = pid % NB, pid // NB
    row, g = head // G, head % G
    r, _, n, _ = _share(LENGTH, rows, limit, pieces, RP, BN, LEAST_TILES, LISTED)
    first = tl.sum(tl.where(r < row, n, 0), 0)
    count = tl.sum(tl.where(r == row, n, 0), 0)
    di = stretch * DB + tl.arange(0, DB)
    many = tl.arange(0, MANY)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([DB], tl.float32)
    for p0 in range(0, count, MANY):
        ok = p0 + many < count
        at = (first + p0 + many) * G + g
        lse = tl.load(PART_LSE + at, mask=ok, other=float("-inf"))
        part = tl.load(PART + at[:, None] * DV + di[None, :], mask=ok[:, None] & (di < DV)[None, :], other=0.0)
        new = tl.maximum(top, tl.max(lse, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(lse - base)
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weight, 0)
        acc = acc * fade + tl.sum(weight[:, None] * part, 0)
        top = new
    if HAS_SINKS:
        sink = tl.load(SINKS + head).to(tl.float32) * 1.4426950408889634
        new = tl.maximum(top, sink)
        fade = tl.exp2(top - new)
        total = total * fade + tl.exp2(sink - new)
        acc = acc * fade
        top = new
    seen = tl.maximum(total, 1e-30)
    tl.store(OUT + head * DV + di, (acc / seen).to(OUT.dtype.element_ty), mask=di < DV)
    if stretch == 0:
        tl.store(LSE + head, tl.where(total > 0, (top + tl.log2(seen)) * 0.6931471805599453, float("-inf")))


@triton.jit
def weigh_kernel(
    LOGIT, LSE, LENGTH, WEIGHT, logit_stride, width, limit,
    G: tl.constexpr, GP: tl.constexpr, BN: tl.constexpr, SUM: tl.constexpr, LOW: tl.constexpr, LISTED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Logits to weights, [rows, group, width] or, summed over the group, [rows, width]; zero past a row's length.

    LOW: instead of a sum, how many of the group's weights are below uniform.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    gi = tl.arange(0, GP)
    length = limit if LISTED else tl.minimum(tl.load(LENGTH + row), limit)
    some = (gi < G)[:, None]
    lse = tl.load(LSE + row * G + gi, mask=gi < G, other=0.0) * 1.4426950408889634
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    at = (row * logit_stride + n)[None, :] * G + gi[:, None]
    s = tl.load(LOGIT + at, mask=some & (n < length)[None, :], other=float("-inf"))
    p = tl.exp2(s - lse[:, None])
    if LOW:  # a tie with uniform attention is not low
        low = some & (n < length)[None, :] & (p < 0.99999 / length)
        tl.store(WEIGHT + row * width + n, tl.sum(low.to(tl.float32), 0), mask=n < width)
    elif SUM:
        tl.store(WEIGHT + row * width + n, tl.sum(p, 0), mask=n < width)
    else:
        tl.store(WEIGHT + (row * G + gi[:, None]) * width + n[None, :], p, mask=some & (n < width)[None, :])
