"""BERT's input: word + token type + position embedding, layer norm, dropout.

The gradients of the tables are sums over the tokens of each id. All ids are sorted together, and
each row of a table is summed over its run of tokens and written once, zeros too, so that nothing is
filled first, half precision needs no wider copy of a table, and every sum has one order. Atomics
would need both, and are slowest where they meet: on [CLS], on the first positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels._dropout import (
    draw_seed,
    dropout,
    dropout_arguments,
    is_kept,
    is_kept_ref,
    row_words,
)
from fastbert.kernels._operation import operation
from fastbert.kernels._triton import jit, next_power_of_2, on_kernel_device, rows_of, run, tl


def embed_ref(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
    padding_idx: int | None = None,
) -> Tensor:
    x = F.embedding(input_ids, word, padding_idx) + F.embedding(token_type_ids, token_type)
    x = F.layer_norm(x + F.embedding(position_ids, position), word.shape[-1:], weight, bias, eps)
    return dropout(x, dropout_p) if dropout_p else x


@dataclass(frozen=True)
class _Launch:
    block_m: int  # tokens at once
    num_warps: int


# (most columns, forward and sums of tokens, backward): 256 columns a warp, in 16-byte loads of half
# precision, so that sums over tokens stay inside a thread; 16 to 32 elements of a tensor a thread,
# for registers (benchmarks/compile_report.py). Not measured yet.
_LAUNCHES = (
    (256, _Launch(4, 1), _Launch(2, 1)),
    (512, _Launch(4, 2), _Launch(2, 2)),
    (1024, _Launch(4, 4), _Launch(2, 4)),
    (2048, _Launch(4, 8), _Launch(2, 8)),
    (4096, _Launch(2, 16), _Launch(1, 16)),
)
# The backward's programs each sum what their tokens give to weight, bias and token types: as many
# as an H200, of 132 processors, runs at once with their registers.
_PROCESSORS, _WARPS = 132, 12
_SHORT = 2**15  # ids below are sorted as 16 bits, in half the passes that 32 take
_CHUNK = 32  # tokens of one id that are summed ahead, so that no program walks a long run alone


def _launches(n_cols: int) -> tuple[dict[str, int], dict[str, int]]:
    forward, backward = next(row[1:] for row in _LAUNCHES if n_cols <= row[0])
    block_n = next_power_of_2(n_cols)
    return (
        {"BLOCK_M": forward.block_m, "BLOCK_N": block_n, "num_warps": forward.num_warps},
        {"BLOCK_M": backward.block_m, "BLOCK_N": block_n, "num_warps": backward.num_warps},
    )


@jit()
def _look_up(ids_ptr, table_ptr, stride, n_rows, tokens, token_mask, cols, col_mask):
    """Rows of a table as float32, and their ids: -1 and zeros where the id is outside."""
    ids = tl.load(ids_ptr + tokens, mask=token_mask, other=-1).to(tl.int64)
    ids = tl.where((ids >= 0) & (ids < n_rows), ids, -1)
    mask = (ids >= 0)[:, None] & col_mask[None, :]
    x = tl.load(table_ptr + ids[:, None] * stride + cols[None, :], mask=mask, other=0.0)
    return x.to(tl.float32), ids


@jit("n_tokens", "threshold")
def _embed_fwd_kernel(
    word_ptr, token_type_ptr, position_ptr, input_ids_ptr, token_type_ids_ptr, position_ids_ptr,
    weight_ptr, bias_ptr, seed_ptr, out_ptr, stats_ptr,
    stride_word, stride_token_type, stride_position,
    n_tokens, n_words, n_types, n_positions, n_cols, eps, threshold, scale,
    HAS_DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    token_mask = tokens < n_tokens
    col_mask = cols < n_cols
    mask = token_mask[:, None] & col_mask[None, :]

    words, word_ids = _look_up(
        input_ids_ptr, word_ptr, stride_word, n_words, tokens, token_mask, cols, col_mask
    )
    types, type_ids = _look_up(
        token_type_ids_ptr, token_type_ptr, stride_token_type, n_types,
        tokens, token_mask, cols, col_mask,
    )  # fmt: skip
    positions, position_ids = _look_up(
        position_ids_ptr, position_ptr, stride_position, n_positions,
        tokens, token_mask, cols, col_mask,
    )  # fmt: skip
    weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)

    x = words + types + positions
    mean = tl.sum(x, 1) / n_cols
    centered = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centered * centered, 1) / n_cols + eps)
    is_known = tl.minimum(tl.minimum(word_ids, type_ids), position_ids) >= 0
    rstd = tl.where(is_known, rstd, float("nan"))
    out = centered * rstd[:, None] * weight[None, :] + bias[None, :]
    if HAS_DROPOUT:
        first, second = row_words(tl.load(seed_ptr), tokens, 0)
        kept = is_kept(first[:, None], second[:, None], cols[None, :], threshold)
        out = tl.where(kept, out * scale, 0.0)

    tl.store(out_ptr + tokens[:, None] * n_cols + cols[None, :], out, mask=mask)
    tl.store(stats_ptr + tokens, mean, mask=token_mask)
    tl.store(stats_ptr + n_tokens + tokens, rstd, mask=token_mask)


@jit("n_tokens", "threshold")
def _embed_bwd_kernel(
    dout_ptr, word_ptr, token_type_ptr, position_ptr,
    input_ids_ptr, token_type_ids_ptr, position_ids_ptr,
    weight_ptr, seed_ptr, stats_ptr, dsum_ptr, partials_ptr,
    stride_dout, stride_word, stride_token_type, stride_position,
    n_tokens, n_words, n_types, n_positions, n_cols, threshold, scale,
    HAS_DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dsum: of the three lookups' sum. partials: of weight, bias and the first two token types."""
    cols = tl.arange(0, BLOCK_N)
    col_mask = cols < n_cols
    weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    first_type = tl.zeros([BLOCK_N], tl.float32)
    second_type = tl.zeros([BLOCK_N], tl.float32)

    for block in range(tl.program_id(0), tl.cdiv(n_tokens, BLOCK_M), tl.num_programs(0)):
        tokens = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        token_mask = tokens < n_tokens
        mask = token_mask[:, None] & col_mask[None, :]
        dout = tl.load(dout_ptr + tokens[:, None] * stride_dout + cols, mask=mask, other=0.0)
        words, _ = _look_up(
            input_ids_ptr, word_ptr, stride_word, n_words, tokens, token_mask, cols, col_mask
        )
        types, type_ids = _look_up(
            token_type_ids_ptr, token_type_ptr, stride_token_type, n_types,
            tokens, token_mask, cols, col_mask,
        )  # fmt: skip
        positions, _ = _look_up(
            position_ids_ptr, position_ptr, stride_position, n_positions,
            tokens, token_mask, cols, col_mask,
        )  # fmt: skip
        mean = tl.load(stats_ptr + tokens, mask=token_mask, other=0.0)
        rstd = tl.load(stats_ptr + n_tokens + tokens, mask=token_mask, other=0.0)

        dout = dout.to(tl.float32)
        if HAS_DROPOUT:
            first, second = row_words(tl.load(seed_ptr), tokens, 0)
            kept = is_kept(first[:, None], second[:, None], cols[None, :], threshold)
            dout = tl.where(kept, dout * scale, 0.0)
        x = words + types + positions
        normed = (x - mean[:, None]) * rstd[:, None]
        scaled = dout * weight[None, :]
        along = tl.sum(scaled * normed, 1) / n_cols
        dsum = rstd[:, None] * (
            scaled - tl.sum(scaled, 1)[:, None] / n_cols - normed * along[:, None]
        )
        dweight += tl.sum(dout * normed, 0)
        dbias += tl.sum(dout, 0)
        first_type += tl.sum(tl.where((type_ids == 0)[:, None], dsum, 0.0), 0)
        second_type += tl.sum(tl.where((type_ids == 1)[:, None], dsum, 0.0), 0)

        tl.store(dsum_ptr + tokens[:, None] * n_cols + cols[None, :], dsum, mask=mask)

    partial_ptr = partials_ptr + tl.program_id(0) * 4 * n_cols + cols
    tl.store(partial_ptr, dweight, mask=col_mask)
    tl.store(partial_ptr + n_cols, dbias, mask=col_mask)
    tl.store(partial_ptr + 2 * n_cols, first_type, mask=col_mask)
    tl.store(partial_ptr + 3 * n_cols, second_type, mask=col_mask)


@jit()
def _embed_chunk_bwd_kernel(
    dsum_ptr, keys_ptr, tokens_ptr, chunks_ptr,
    n_cols,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """chunks: sums over each CHUNK of sorted keys, written where all of them are one."""
    chunk = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    col_mask = cols < n_cols
    first = chunk * CHUNK
    if tl.load(keys_ptr + first) == tl.load(keys_ptr + first + CHUNK - 1):
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i in range(0, CHUNK, BLOCK_M):
            tokens = tl.load(tokens_ptr + first + i + tl.arange(0, BLOCK_M))
            total += tl.load(
                dsum_ptr + tokens[:, None] * n_cols + cols[None, :],
                mask=col_mask[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
        tl.store(chunks_ptr + chunk.to(tl.int64) * n_cols + cols, tl.sum(total, 0), mask=col_mask)


@jit("padding_row")
def _embed_tables_bwd_kernel(
    dsum_ptr, starts_ptr, tokens_ptr, chunks_ptr, dposition_ptr, dword_ptr, dtoken_type_ptr,
    n_positions, n_words, n_cols, padding_row,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A row of a table: its run's whole chunks, and by themselves the tokens before and after."""
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    col_mask = cols < n_cols
    start = tl.load(starts_ptr + row)
    end = tl.load(starts_ptr + row + 1)
    end = tl.where(row == padding_row, start, end)
    first_chunk, last_chunk = tl.cdiv(start, CHUNK), end // CHUNK
    n_before = tl.minimum(end, first_chunk * CHUNK) - start
    after = tl.maximum(start + n_before, last_chunk * CHUNK)
    n_single = n_before + end - after
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    for i in range(0, n_single, BLOCK_M):
        single = i + tl.arange(0, BLOCK_M)
        places = tl.where(single < n_before, start + single, after - n_before + single)
        tokens = tl.load(tokens_ptr + places, mask=single < n_single, other=0)
        mask = (single < n_single)[:, None] & col_mask[None, :]
        total += tl.load(
            dsum_ptr + tokens[:, None] * n_cols + cols[None, :], mask=mask, other=0.0
        ).to(tl.float32)
    for i in range(first_chunk, last_chunk, BLOCK_M):
        chunks = (i + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (chunks < last_chunk)[:, None] & col_mask[None, :]
        total += tl.load(
            chunks_ptr + chunks[:, None] * n_cols + cols[None, :], mask=mask, other=0.0
        )

    table_ptr, table_row = dposition_ptr, row.to(tl.int64)
    if row >= n_positions:
        table_ptr, table_row = dword_ptr, table_row - n_positions
    if row >= n_positions + n_words:
        table_ptr, table_row = dtoken_type_ptr, table_row - n_words
    tl.store(table_ptr + table_row * n_cols + cols, tl.sum(total, 0), mask=col_mask)


# What the operations take and give: tables (n_rows, n_cols) of one dtype; ids (n_tokens,); out, its
# gradient (n_tokens, n_cols); seed (1,) int64, None without dropout; padding_idx -1 for none; stats
# (2, n_tokens) float32, means and reciprocal deviations.


@operation("fastbert::embed")
def _embed_op(
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    padding_idx: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """out, in `dtype`, and stats."""
    tables, ids = (word, token_type, position), (input_ids, token_type_ids, position_ids)
    args = (*tables, *ids, weight, bias, seed, dropout_p, eps, dtype)
    return run("embeddings", _forward, _forward_ref, *args)


@operation("fastbert::embed_backward")
def _embed_backward_op(
    dout: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    stats: Tensor,
    dropout_p: float,
    padding_idx: int,
    has_tables: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the tables, empty without `has_tables`; of weight and bias (2, n_cols)."""
    tables, ids = (word, token_type, position), (input_ids, token_type_ids, position_ids)
    args = (*tables, *ids, weight, seed, stats, dropout_p, padding_idx, has_tables)
    return run("embeddings", _backward, _backward_ref, dout, *args)


@_embed_op.register_fake
def _(word, token_type, position, input_ids, token_type_ids, position_ids, weight, bias, *args):
    n_tokens, n_cols = input_ids.shape[0], word.shape[1]
    stats = word.new_empty(2, n_tokens, dtype=torch.float32)
    return word.new_empty(n_tokens, n_cols, dtype=args[-1]), stats


@_embed_backward_op.register_fake
def _(dout, word, token_type, position, *args):
    weight, has_tables = args[3], args[-1]
    tables = (x.new_empty(x.shape if has_tables else 0) for x in (word, token_type, position))
    return *tables, weight.new_empty(2, word.shape[1])


def _save(ctx, inputs, output) -> None:
    *tensors, _bias, seed, ctx.dropout_p, _eps, ctx.padding_idx, _dtype = inputs
    ctx.save_for_backward(*tensors, seed, output[1])


def _differentiate(ctx, dout, dstats):
    has_tables = any(ctx.needs_input_grad[:3])
    *dtables, dparameters = _embed_backward_op(
        dout, *ctx.saved_tensors, ctx.dropout_p, ctx.padding_idx, has_tables
    )
    if not has_tables:
        dtables = [None] * 3
    return *dtables, None, None, None, dparameters[0], dparameters[1], *[None] * 5


_embed_op.register_autograd(_differentiate, setup_context=_save)


def _summed(word, token_type, position, input_ids, token_type_ids, position_ids):
    x = F.embedding(input_ids, word) + F.embedding(token_type_ids, token_type)
    return x + F.embedding(position_ids, position)


def _dropped(x, seed, dropout_p):
    rows, cols = (torch.arange(n, device=x.device) for n in x.shape)
    scale = dropout_arguments(dropout_p)[1]
    return x * (is_kept_ref(seed, rows, 0, cols, dropout_p) * scale).to(x.dtype)


def _forward_ref(
    word, token_type, position, input_ids, token_type_ids, position_ids,
    weight, bias, seed, dropout_p, eps, dtype,
):  # fmt: skip
    x = _summed(word, token_type, position, input_ids, token_type_ids, position_ids)
    out = F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)
    if seed is not None:
        out = _dropped(out, seed, dropout_p)
    var, mean = torch.var_mean(x.float(), -1, correction=0)
    return out.to(dtype), torch.stack([mean, (var + eps).rsqrt()])


def _backward_ref(
    dout, word, token_type, position, input_ids, token_type_ids, position_ids,
    weight, seed, stats, dropout_p, padding_idx, has_tables,
):  # fmt: skip
    x = _summed(word, token_type, position, input_ids, token_type_ids, position_ids)
    x = x.to(torch.promote_types(x.dtype, stats.dtype))  # CUDA's takes no other statistics
    dout = dout.to(x.dtype)
    if seed is not None:
        dout = _dropped(dout, seed, dropout_p)
    mean, rstd = stats.to(x.dtype).unsqueeze(-1)
    weight_like_x = weight.to(x.dtype)
    dsum, *dparameters = torch.ops.aten.native_layer_norm_backward(
        dout, x, x.shape[-1:], mean, rstd, weight_like_x, weight_like_x, [True] * 3
    )
    dparameters = torch.stack(dparameters).to(weight.dtype)
    if not has_tables:
        return *(word.new_empty(0) for _ in range(3)), dparameters
    dsum = dsum.to(word.dtype)
    sums = (
        torch.ops.aten.embedding_dense_backward(dsum, ids, len(table), padding, False)
        for table, ids, padding in (
            (word, input_ids, padding_idx),
            (token_type, token_type_ids, -1),
            (position, position_ids, -1),
        )
    )
    return *sums, dparameters


def _forward(
    word, token_type, position, input_ids, token_type_ids, position_ids,
    weight, bias, seed, dropout_p, eps, dtype,
):  # fmt: skip
    n_tokens, n_cols = input_ids.shape[0], word.shape[1]
    tables = [rows_of(table) for table in (word, token_type, position)]
    ids = [x.contiguous() for x in (input_ids, token_type_ids, position_ids)]
    out = word.new_empty(n_tokens, n_cols, dtype=dtype)
    stats = word.new_empty(2, n_tokens, dtype=torch.float32)
    launch, _ = _launches(n_cols)
    _embed_fwd_kernel[(-(-n_tokens // launch["BLOCK_M"]),)](
        *tables, *ids, weight.contiguous(), bias.contiguous(), seed, out, stats,
        *(table.stride(0) for table in tables),
        n_tokens, *map(len, tables), n_cols, eps, *dropout_arguments(dropout_p),
        HAS_DROPOUT=seed is not None, **launch,
    )  # fmt: skip
    return out, stats


def _backward(
    dout, word, token_type, position, input_ids, token_type_ids, position_ids,
    weight, seed, stats, dropout_p, padding_idx, has_tables,
):  # fmt: skip
    n_tokens, n_cols = dout.shape
    dout = rows_of(dout)
    tables = [rows_of(table) for table in (word, token_type, position)]
    ids = [x.contiguous() for x in (input_ids, token_type_ids, position_ids)]
    n_words, n_types, n_positions = map(len, tables)
    of_sums, launch = _launches(n_cols)
    n_programs = _PROCESSORS * max(1, _WARPS // launch["num_warps"])
    n_partials = min(-(-n_tokens // launch["BLOCK_M"]), n_programs)
    dsum = torch.empty_like(dout, memory_format=torch.contiguous_format)
    partials = dout.new_empty(n_partials, 4, n_cols, dtype=torch.float32)
    _embed_bwd_kernel[(n_partials,)](
        dout, *tables, *ids, weight.contiguous(), seed, stats, dsum, partials,
        dout.stride(0), *(table.stride(0) for table in tables),
        n_tokens, n_words, n_types, n_positions, n_cols, *dropout_arguments(dropout_p),
        HAS_DROPOUT=seed is not None, **launch,
    )  # fmt: skip
    sums = partials.sum(0)
    dparameters = sums[:2].to(weight.dtype, copy=True)
    if not has_tables:
        return *(word.new_empty(0) for _ in range(3)), dparameters

    # One table after the other, as rows of one. Few types have been summed already.
    parts, n_rows = [position_ids, input_ids + n_positions], n_positions + n_words
    dword, dposition = word.new_empty(word.shape), position.new_empty(position.shape)
    if n_types <= 2:
        dtoken_type = sums[2 : 2 + n_types].to(word.dtype, copy=True)
    else:
        dtoken_type = token_type.new_empty(token_type.shape)
        parts, n_rows = [*parts, token_type_ids + n_rows], n_rows + n_types
    key_dtype = torch.int16 if n_rows < _SHORT else torch.int32
    keys, tokens = torch.cat(parts).to(key_dtype).sort(stable=True)
    tokens %= n_tokens
    every_row = torch.arange(n_rows + 1, dtype=key_dtype, device=keys.device)
    starts = torch.searchsorted(keys, every_row, out_int32=True)
    n_chunks = len(keys) // _CHUNK
    chunks = dsum.new_empty(n_chunks, n_cols, dtype=torch.float32)
    _embed_chunk_bwd_kernel[(n_chunks,)](
        dsum, keys, tokens, chunks, n_cols, CHUNK=_CHUNK, **of_sums
    )
    _embed_tables_bwd_kernel[(n_rows,)](
        dsum, starts, tokens, chunks, dposition, dword, dtoken_type,
        n_positions, n_words, n_cols, -1 if padding_idx < 0 else n_positions + padding_idx,
        CHUNK=_CHUNK, **of_sums,
    )  # fmt: skip
    return dword, dtoken_type, dposition, dparameters


def embed(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
    padding_idx: int | None = None,
    *,
    seed: Tensor | None = None,
) -> Tensor:
    """Look up three tables, add, normalise: (n_tokens,) ids to (n_tokens, hidden).

    input_ids, token_type_ids, position_ids: (n_tokens,) int32 or int64, inside their tables. An id
    that is outside is an error of torch's, or NaN from a kernel, for whose check nothing waits.
    word: (vocab_size, hidden), token_type: (type_vocab_size, hidden), position:
    (max_position_embeddings, hidden), of one dtype. weight, bias: (hidden,). dropout_p: share of
    the result set to zero, 0.0 outside training. padding_idx: the row of `word` that gets no
    gradient. seed: (1,) int64 on the device of `word`, drawn when None; a kernel drops by it, plain
    torch by its own generator. Statistics are in float32. The result has the dtype of the tables;
    under autocast it is float32, as torch's layer norm is.
    """
    for name, ids in (("token_type_ids", token_type_ids), ("position_ids", position_ids)):
        if ids.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}, "
                f"got {tuple(ids.shape)}"
            )
    every_ids = (input_ids, token_type_ids, position_ids)
    for ids in every_ids:
        if ids.dtype not in (torch.int32, torch.int64) or ids.device != word.device:
            raise ValueError(
                f"ids must be int32 or int64 on {word.device} as word, "
                f"got {ids.dtype} on {ids.device}"
            )
    for name, table in (("token_type", token_type), ("position", position)):
        if table.shape[1:] != word.shape[1:] or table.dtype != word.dtype:
            raise ValueError(
                f"{name} must be (rows, {word.shape[-1]}) {word.dtype} as word, "
                f"got {tuple(table.shape)} {table.dtype}"
            )
    if weight.shape != word.shape[1:] or bias.shape != word.shape[1:]:
        raise ValueError(
            f"weight and bias must have shape ({word.shape[-1]},), "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if padding_idx is not None and not -len(word) <= padding_idx < len(word):
        raise ValueError(f"padding_idx must be a row of word's {len(word)}, got {padding_idx}")
    dropout_arguments(dropout_p)  # refuses what is no share
    if not on_kernel_device(word) or input_ids.numel() == 0 or word.shape[1] > _LAUNCHES[-1][0]:
        tables = (word, token_type, position)
        return embed_ref(*every_ids, *tables, weight, bias, dropout_p, eps, padding_idx)
    dtype = torch.float32 if torch.is_autocast_enabled(word.device.type) else word.dtype
    if not dropout_p:
        seed = None
    elif seed is None:
        seed = draw_seed(word.device)
    flat_ids = (ids if ids.dim() == 1 else ids.reshape(-1) for ids in every_ids)
    padding_idx = -1 if padding_idx is None else padding_idx % len(word)
    out, _ = _embed_op(
        word, token_type, position, *flat_ids,
        weight, bias, seed, dropout_p, eps, padding_idx, dtype,
    )  # fmt: skip
    return out if input_ids.dim() == 1 else out.view(*input_ids.shape, word.shape[1])
