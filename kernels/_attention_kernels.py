"""The kernels of softmax attention on packed sequences; `attention.py` launches them.

Each program works on one row of a `Schedule`'s tiles and one head. Rows are counted from the first
token of the sequence, int32; what is added to a pointer for the tokens before is int64. Exponents
are of two: `scale` has a factor log2(e) for that.
"""

from __future__ import annotations

from fastbert.kernels._dropout import is_kept, row_words
from fastbert.kernels._triton import jit, tl


@jit()
def _tile(tiles_ptr, n_heads):
    """head, row, start, length, start and length of the other side."""
    program = tl.program_id(0)
    tile_ptr = tiles_ptr + program // n_heads * 5
    start = tl.load(tile_ptr + 1).to(tl.int64)
    other_start = tl.load(tile_ptr + 3).to(tl.int64)
    row, length, other_length = tl.load(tile_ptr), tl.load(tile_ptr + 2), tl.load(tile_ptr + 4)
    return program % n_heads, row, start, length, other_start, other_length


@jit()
def _load(
    ptr, row, length, stride,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(BLOCK, BLOCK_D) from `row` on, zeros past `length` and past HEAD_DIM."""
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    mask = (rows < length - row)[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (cols < HEAD_DIM)[None, :]
    ptr += tl.cast(row, tl.int64) * stride
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@jit()
def _store(
    ptr, x, row, length, stride,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows, cols = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    mask = (rows < length - row)[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (cols < HEAD_DIM)[None, :]
    ptr += tl.cast(row, tl.int64) * stride
    x = x.to(ptr.dtype.element_ty)
    tl.store(ptr + rows[:, None] * stride + cols[None, :], x, mask=mask)


@jit("n_tokens", "threshold")
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, tiles_ptr, seed_ptr, out_ptr, lse_ptr,
    stride_qm, stride_qh, stride_km, stride_kh, stride_vm, stride_vh,
    n_tokens, n_heads, scale, threshold, keep_scale,
    IS_CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of queries, a block of keys after the other."""
    head, row, start, length, key_start, key_length = _tile(tiles_ptr, n_heads)
    if row >= length:
        return
    q_ptr += start * stride_qm + head * stride_qh
    k_ptr += key_start * stride_km + head * stride_kh
    v_ptr += key_start * stride_vm + head * stride_vh
    rows = row + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)

    q = _load(q_ptr, row, length, stride_qm, BLOCK_M, HEAD_DIM, BLOCK_D)
    if HAS_DROPOUT:
        first, second = row_words(tl.load(seed_ptr), start + rows, head)
    largest = tl.full([BLOCK_M], -3.0e38, tl.float32)  # finite: for who sees no key
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    stop = key_length  # of the keys that some query sees
    clear = key_length  # of those that all queries see
    if IS_CAUSAL:
        stop = tl.minimum(key_length, row + BLOCK_M + key_length - length)
        clear = tl.minimum(key_length, row + 1 + key_length - length)

    for key in range(0, stop, BLOCK_N):
        k = _load(k_ptr, key, key_length, stride_km, BLOCK_N, HEAD_DIM, BLOCK_D)
        v = _load(v_ptr, key, key_length, stride_vm, BLOCK_N, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if key + BLOCK_N > clear:
            seen = (cols < key_length - key)[None, :]
            if IS_CAUSAL:
                seen = seen & (cols[None, :] <= (rows + (key_length - length - key))[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(weights, 1)
        if HAS_DROPOUT:
            kept = is_kept(first[:, None], second[:, None], (key + cols)[None, :], threshold)
            weights = tl.where(kept, weights, 0.0)
        out = out * shrink[:, None]
        out = tl.dot(weights.to(v.dtype), v, out, input_precision=PRECISION)
        largest = larger

    blind = total == 0.0  # sees no key
    total = tl.where(blind, 1.0, total)
    factor = keep_scale / total
    lse = tl.where(blind, float("inf"), largest + tl.log2(total))
    out_ptr += (start * n_heads + head) * HEAD_DIM
    _store(
        out_ptr, out * factor[:, None], row, length, n_heads * HEAD_DIM, BLOCK_M, HEAD_DIM, BLOCK_D
    )
    tl.store(lse_ptr + head.to(tl.int64) * n_tokens + start + rows, lse, mask=rows < length)


@jit("n_tokens", "threshold")
def _attention_short_fwd_kernel(
    q_ptr, k_ptr, v_ptr, tiles_ptr, seed_ptr, out_ptr, lse_ptr,
    stride_qm, stride_qh, stride_km, stride_kh, stride_vm, stride_vh,
    n_tokens, n_heads, scale, threshold, keep_scale,
    IS_CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of queries and all keys, which are at most BLOCK_N."""
    head, row, start, length, key_start, key_length = _tile(tiles_ptr, n_heads)
    if row >= length:
        return
    q_ptr += start * stride_qm + head * stride_qh
    k_ptr += key_start * stride_km + head * stride_kh
    v_ptr += key_start * stride_vm + head * stride_vh
    rows = row + tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)

    q = _load(q_ptr, row, length, stride_qm, BLOCK_M, HEAD_DIM, BLOCK_D)
    k = _load(k_ptr, 0, key_length, stride_km, BLOCK_N, HEAD_DIM, BLOCK_D)
    v = _load(v_ptr, 0, key_length, stride_vm, BLOCK_N, HEAD_DIM, BLOCK_D)

    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    seen = (keys < key_length)[None, :]
    if IS_CAUSAL:
        seen = seen & (keys[None, :] <= (rows + (key_length - length))[:, None])
    scores = tl.where(seen, scores, float("-inf"))
    largest = tl.maximum(tl.max(scores, 1) * scale, -3.0e38)  # finite: for who sees no key
    weights = tl.exp2(scores * scale - largest[:, None])
    total = tl.sum(weights, 1)
    if HAS_DROPOUT:
        first, second = row_words(tl.load(seed_ptr), start + rows, head)
        kept = is_kept(first[:, None], second[:, None], keys[None, :], threshold)
        weights = tl.where(kept, weights, 0.0)
    out = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)

    blind = total == 0.0  # sees no key
    total = tl.where(blind, 1.0, total)
    factor = keep_scale / total
    lse = tl.where(blind, float("inf"), largest + tl.log2(total))
    out_ptr += (start * n_heads + head) * HEAD_DIM
    _store(
        out_ptr, out * factor[:, None], row, length, n_heads * HEAD_DIM, BLOCK_M, HEAD_DIM, BLOCK_D
    )
    tl.store(lse_ptr + head.to(tl.int64) * n_tokens + start + rows, lse, mask=rows < length)


@jit("n_tokens", "threshold")
def _attention_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, seed_ptr,
    dq_ptr, delta_ptr, words_ptr,
    stride_qm, stride_qh, stride_km, stride_kh, stride_vm, stride_vh, stride_dm,
    n_tokens, n_heads, scale, threshold, delta_scale, grad_scale,
    IS_CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of queries. Leaves what the kernel of dk and dv needs of each query and head: delta,
    the sum of dout * out, and the words that dropout follows from."""
    head, row, start, length, key_start, key_length = _tile(tiles_ptr, n_heads)
    if row >= length:
        return
    q_ptr += start * stride_qm + head * stride_qh
    k_ptr += key_start * stride_km + head * stride_kh
    v_ptr += key_start * stride_vm + head * stride_vh
    out_offset = (start * n_heads + head) * HEAD_DIM
    rows = row + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    of_row = head.to(tl.int64) * n_tokens + start + rows
    row_mask = rows < length

    q = _load(q_ptr, row, length, stride_qm, BLOCK_M, HEAD_DIM, BLOCK_D)
    stride_out = n_heads * HEAD_DIM
    dout = _load(dout_ptr + out_offset, row, length, stride_out, BLOCK_M, HEAD_DIM, BLOCK_D)
    out = _load(out_ptr + out_offset, row, length, stride_out, BLOCK_M, HEAD_DIM, BLOCK_D)
    lse = tl.load(lse_ptr + of_row, mask=row_mask, other=float("inf"))
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1) * delta_scale
    tl.store(delta_ptr + of_row, delta, mask=row_mask)
    if HAS_DROPOUT:
        first, second = row_words(tl.load(seed_ptr), start + rows, head)
        words_ptr += of_row
        tl.store(words_ptr, first.to(tl.int32, bitcast=True), mask=row_mask)
        words_ptr += tl.cast(n_heads, tl.int64) * n_tokens
        tl.store(words_ptr, second.to(tl.int32, bitcast=True), mask=row_mask)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    stop = key_length  # of the keys that some query sees
    clear = key_length  # of those that all queries see
    if IS_CAUSAL:
        stop = tl.minimum(key_length, row + BLOCK_M + key_length - length)
        clear = tl.minimum(key_length, row + 1 + key_length - length)

    for key in range(0, stop, BLOCK_N):
        k = _load(k_ptr, key, key_length, stride_km, BLOCK_N, HEAD_DIM, BLOCK_D)
        v = _load(v_ptr, key, key_length, stride_vm, BLOCK_N, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if key + BLOCK_N > clear:
            seen = (cols < key_length - key)[None, :]
            if IS_CAUSAL:
                seen = seen & (cols[None, :] <= (rows + (key_length - length - key))[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        weights = tl.exp2(scores * scale - lse[:, None])
        if HAS_DROPOUT:
            kept = is_kept(first[:, None], second[:, None], (key + cols)[None, :], threshold)
            dweights = tl.where(kept, dweights, 0.0)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)

    dq_ptr += start * stride_dm + head * HEAD_DIM
    _store(dq_ptr, dq * grad_scale, row, length, stride_dm, BLOCK_M, HEAD_DIM, BLOCK_D)


@jit("n_tokens", "threshold")
def _attention_dkv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, tiles_ptr, delta_ptr, words_ptr,
    dk_ptr, dv_ptr,
    stride_qm, stride_qh, stride_km, stride_kh, stride_vm, stride_vh, stride_dm,
    n_tokens, n_heads, scale, threshold, keep_scale, grad_scale,
    IS_CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of keys. Scores are (keys, queries): what is multiplied next stays in registers."""
    head, row, key_start, key_length, start, length = _tile(tiles_ptr, n_heads)
    if row >= key_length:
        return
    q_ptr += start * stride_qm + head * stride_qh
    k_ptr += key_start * stride_km + head * stride_kh
    v_ptr += key_start * stride_vm + head * stride_vh
    dout_ptr += (start * n_heads + head) * HEAD_DIM
    keys = row + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_M)
    of_query = head.to(tl.int64) * n_tokens + start

    k = _load(k_ptr, row, key_length, stride_km, BLOCK_N, HEAD_DIM, BLOCK_D)
    v = _load(v_ptr, row, key_length, stride_vm, BLOCK_N, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin = 0  # the first block with a query that sees a key
    if IS_CAUSAL:
        begin = tl.maximum(row + length - key_length, 0) // BLOCK_M * BLOCK_M

    for query in range(begin, length, BLOCK_M):
        q = _load(q_ptr, query, length, stride_qm, BLOCK_M, HEAD_DIM, BLOCK_D)
        dout = _load(dout_ptr, query, length, n_heads * HEAD_DIM, BLOCK_M, HEAD_DIM, BLOCK_D)
        mask = cols < length - query
        lse = tl.load(lse_ptr + of_query + query + cols, mask=mask, other=float("inf"))
        delta = tl.load(delta_ptr + of_query + query + cols, mask=mask, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        weights = tl.exp2(scores * scale - lse[None, :])
        if IS_CAUSAL:  # noqa: SIM102
            if row + BLOCK_N > query + 1 + key_length - length:
                seen = keys[:, None] <= (query + cols + (key_length - length))[None, :]
                weights = tl.where(seen, weights, 0.0)
        dropped = weights
        if HAS_DROPOUT:
            word_ptr = words_ptr + of_query + query + cols
            first = tl.load(word_ptr, mask=mask, other=0)
            second = tl.load(word_ptr + tl.cast(n_heads, tl.int64) * n_tokens, mask=mask, other=0)
            first, second = first.to(tl.uint32, bitcast=True), second.to(tl.uint32, bitcast=True)
            kept = is_kept(first[None, :], second[None, :], keys[:, None], threshold)
            dropped = tl.where(kept, weights, 0.0)
            dweights = tl.where(kept, dweights, 0.0)
        dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dscores = weights * (dweights - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)

    offset = key_start * stride_dm + head * HEAD_DIM
    _store(dk_ptr + offset, dk * grad_scale, row, key_length, stride_dm, BLOCK_N, HEAD_DIM, BLOCK_D)
    _store(dv_ptr + offset, dv * keep_scale, row, key_length, stride_dm, BLOCK_N, HEAD_DIM, BLOCK_D)


@jit("n_tokens", "threshold")
def _attention_short_bwd_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, tiles_ptr, seed_ptr,
    dq_ptr, dk_ptr, dv_ptr,
    stride_qm, stride_qh, stride_km, stride_kh, stride_vm, stride_vh, stride_dm,
    n_tokens, n_heads, scale, threshold, keep_scale, grad_scale,
    IS_CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A sequence, whose queries and keys are at most BLOCK. Scores are (keys, queries)."""
    head, _, start, length, key_start, key_length = _tile(tiles_ptr, n_heads)
    q_ptr += start * stride_qm + head * stride_qh
    k_ptr += key_start * stride_km + head * stride_kh
    v_ptr += key_start * stride_vm + head * stride_vh
    dout_ptr += (start * n_heads + head) * HEAD_DIM
    rows = tl.arange(0, BLOCK)

    q = _load(q_ptr, 0, length, stride_qm, BLOCK, HEAD_DIM, BLOCK_D)
    k = _load(k_ptr, 0, key_length, stride_km, BLOCK, HEAD_DIM, BLOCK_D)
    v = _load(v_ptr, 0, key_length, stride_vm, BLOCK, HEAD_DIM, BLOCK_D)
    dout = _load(dout_ptr, 0, length, n_heads * HEAD_DIM, BLOCK, HEAD_DIM, BLOCK_D)
    lse_ptr += head.to(tl.int64) * n_tokens + start
    lse = tl.load(lse_ptr + rows, mask=rows < length, other=float("inf"))

    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    seen = (rows < key_length)[:, None]
    if IS_CAUSAL:
        seen = seen & (rows[:, None] <= (rows + (key_length - length))[None, :])
    weights = tl.exp2(tl.where(seen, scores, float("-inf")) * scale - lse[None, :])
    dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    dropped = weights
    if HAS_DROPOUT:
        first, second = row_words(tl.load(seed_ptr), start + rows, head)
        kept = is_kept(first[None, :], second[None, :], rows[:, None], threshold)
        dropped = tl.where(kept, weights, 0.0)
        dweights = tl.where(kept, dweights, 0.0)
    dv = tl.dot(dropped.to(dout.dtype), dout, input_precision=PRECISION)
    delta = tl.sum(weights * dweights, 0)
    dscores = (weights * (dweights - delta[None, :])).to(q.dtype)
    dk = tl.dot(dscores, q, input_precision=PRECISION)
    dq = tl.dot(tl.trans(dscores), k, input_precision=PRECISION)

    offset = key_start * stride_dm + head * HEAD_DIM
    _store(dv_ptr + offset, dv * keep_scale, 0, key_length, stride_dm, BLOCK, HEAD_DIM, BLOCK_D)
    _store(dk_ptr + offset, dk * grad_scale, 0, key_length, stride_dm, BLOCK, HEAD_DIM, BLOCK_D)
    dq_ptr += start * stride_dm + head * HEAD_DIM
    _store(dq_ptr, dq * grad_scale, 0, length, stride_dm, BLOCK, HEAD_DIM, BLOCK_D)
