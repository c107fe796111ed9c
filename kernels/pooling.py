"""One vector a sequence out of packed token vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels._operation import operation
from fastbert.kernels._triton import jit, next_power_of_2, on_kernel_device, rows_of, run, tl

MODES = ("mean", "cls", "max")
_LEAST_NORM = 1e-12  # F.normalize's


def pool_ref(hidden: Tensor, cu_seqlens: Tensor, mode: str, normalize: bool = False) -> Tensor:
    lengths = cu_seqlens.diff().long()
    n_seqs = lengths.numel()
    if mode == "cls":
        rows = F.pad(hidden, (0, 0, 0, 1))  # one more, of zeros, for the empty sequences
        pooled = rows[torch.where(lengths > 0, cu_seqlens[:-1].long(), hidden.shape[0])]
    else:
        row = _sequence_of_each(hidden, lengths)
        # float32 sums: a bfloat16 sum of 500 terms keeps no more than its first two digits
        values = hidden.to(_wide(hidden))
        if mode == "mean":
            pooled = values.new_zeros(n_seqs, hidden.shape[1]).index_add(0, row, values)
            pooled = pooled / lengths.clamp(min=1).unsqueeze(1)
        else:
            index = row.unsqueeze(1).expand_as(values)
            # Started at NaN, which no maximum equals: what equals it gets a share of the gradient.
            pooled = values.new_full((n_seqs, hidden.shape[1]), torch.nan)
            pooled = pooled.scatter_reduce(0, index, values, "amax", include_self=False)
            pooled = torch.where(lengths.unsqueeze(1) > 0, pooled, 0.0)
    if normalize:
        # wide: in float16 the least norm is zero
        pooled = F.normalize(pooled.to(_wide(hidden)), dim=1, eps=_LEAST_NORM)
    return pooled.to(hidden.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _sequence_of_each(hidden: Tensor, lengths: Tensor) -> Tensor:
    """The number of its sequence for each of the tokens."""
    numbers = torch.arange(lengths.shape[0], device=hidden.device)
    return torch.repeat_interleave(numbers, lengths, output_size=hidden.shape[0])


@dataclass(frozen=True)
class _Launch:
    block_m: int  # tokens at once
    block_n: int  # columns of a program: few, so that a long sequence has many programs
    num_warps: int


# By the compile report's registers, not measured yet: whole 128-byte lines, 32 elements a thread.
_POOL = _Launch(32, 128, 4)
_NORMALIZE = _Launch(1, 1024, 4)


@jit()
def _pool_fwd_kernel(
    hidden_ptr, cu_seqlens_ptr, pooled_ptr, counts_ptr,
    stride_hidden, n_cols,
    MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """counts: how many tokens have the maximum."""
    seq = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < n_cols
    start = tl.load(cu_seqlens_ptr + seq).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + seq + 1).to(tl.int64)
    if MODE == "cls":
        end = tl.minimum(end, start + 1)

    if MODE == "max":
        best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
        count = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(start, end, BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            mask = (rows < end)[:, None] & col_mask[None, :]
            x = tl.load(
                hidden_ptr + rows[:, None] * stride_hidden + cols[None, :],
                mask=mask, other=float("-inf"),
            ).to(tl.float32)  # fmt: skip
            is_better = (x > best) | (x != x)  # NaN is torch's maximum
            is_equal = (x == best) & mask
            count = tl.where(is_better, 1.0, count + is_equal.to(tl.float32))
            best = tl.where(is_better, x, best)
        is_nan = tl.max((best != best).to(tl.int32), 0) > 0
        pooled = tl.max(tl.where(best != best, float("-inf"), best), 0)
        count = tl.sum(tl.where(best == pooled[None, :], count, 0.0), 0)
        pooled = tl.where(is_nan, float("nan"), pooled)
        pooled = tl.where(end > start, pooled, 0.0)
        tl.store(counts_ptr + seq * n_cols + cols, count, mask=col_mask)
    else:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(start, end, BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            mask = (rows < end)[:, None] & col_mask[None, :]
            total += tl.load(
                hidden_ptr + rows[:, None] * stride_hidden + cols[None, :], mask=mask, other=0.0
            ).to(tl.float32)
        pooled = tl.sum(total, 0) / tl.maximum(end - start, 1).to(tl.float32)

    tl.store(pooled_ptr + seq * n_cols + cols, pooled, mask=col_mask)


@jit()
def _pool_bwd_kernel(
    dpooled_ptr, hidden_ptr, pooled_ptr, counts_ptr, cu_seqlens_ptr, dhidden_ptr,
    stride_dpooled, stride_hidden, n_cols,
    MODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < n_cols
    start = tl.load(cu_seqlens_ptr + seq).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + seq + 1).to(tl.int64)
    dpooled = tl.load(dpooled_ptr + seq * stride_dpooled + cols, mask=col_mask, other=0.0)
    dpooled = dpooled.to(tl.float32)
    if MODE == "mean":
        dpooled /= tl.maximum(end - start, 1).to(tl.float32)
    if MODE == "max":
        pooled = tl.load(pooled_ptr + seq * n_cols + cols, mask=col_mask, other=0.0).to(tl.float32)
        count = tl.load(counts_ptr + seq * n_cols + cols, mask=col_mask, other=1.0)
        dpooled /= tl.maximum(count, 1.0)

    for first in range(start, end, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        mask = (rows < end)[:, None] & col_mask[None, :]
        takes_part = mask
        if MODE == "cls":
            takes_part = mask & (rows == start)[:, None]
        if MODE == "max":
            x = tl.load(
                hidden_ptr + rows[:, None] * stride_hidden + cols[None, :], mask=mask, other=0.0
            ).to(tl.float32)
            takes_part = mask & (x == pooled[None, :])
        dhidden = tl.where(takes_part, dpooled[None, :], 0.0)
        tl.store(dhidden_ptr + rows[:, None] * n_cols + cols[None, :], dhidden, mask=mask)


@jit()
def _normalize_fwd_kernel(x_ptr, out_ptr, n_cols, least, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, n_cols, BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + row * n_cols + cols, mask=cols < n_cols, other=0.0)
        squares += x * x
    norm = tl.maximum(tl.sqrt_rn(tl.sum(squares, 0)), least)
    for first in range(0, n_cols, BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + row * n_cols + cols, mask=cols < n_cols, other=0.0)
        tl.store(out_ptr + row * n_cols + cols, x / norm, mask=cols < n_cols)


@jit()
def _normalize_bwd_kernel(
    dout_ptr, x_ptr, dx_ptr, stride_dout, n_cols, least, BLOCK_N: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK_N], tl.float32)
    products = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, n_cols, BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + row * n_cols + cols, mask=cols < n_cols, other=0.0)
        dout = tl.load(dout_ptr + row * stride_dout + cols, mask=cols < n_cols, other=0.0)
        squares += x * x
        products += x * dout.to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(squares, 0))
    is_least = norm < least  # a constant then
    norm = tl.maximum(norm, least)
    along = tl.where(is_least, 0.0, tl.sum(products, 0) / norm)
    for first in range(0, n_cols, BLOCK_N):
        cols = first + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + row * n_cols + cols, mask=cols < n_cols, other=0.0)
        dout = tl.load(dout_ptr + row * stride_dout + cols, mask=cols < n_cols, other=0.0)
        dx = (dout.to(tl.float32) - x / norm * along) / norm
        tl.store(dx_ptr + row * n_cols + cols, dx, mask=cols < n_cols)


# What the operations take and give: hidden (n_tokens, n_cols); cu_seqlens (n_seqs + 1,); out, its
# gradient (n_seqs, n_cols); pooled the same in float32, before it is normalised, else empty; counts
# the same in float32, how many tokens have the maximum, empty in other modes.


@operation("fastbert::pool")
def _pool_op(
    hidden: Tensor, cu_seqlens: Tensor, mode: str, normalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out, pooled, counts."""
    return run("pooling", _forward, _forward_ref, hidden, cu_seqlens, mode, normalize)


@operation("fastbert::pool_backward")
def _pool_backward_op(
    dout: Tensor,
    hidden: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    pooled: Tensor,
    counts: Tensor,
    mode: str,
    normalize: bool,
) -> Tensor:
    """The gradient of hidden."""
    args = (hidden, cu_seqlens, out, pooled, counts, mode, normalize)
    return run("pooling", _backward, _backward_ref, dout, *args)


def _outputs(hidden: Tensor, cu_seqlens: Tensor, mode: str, normalize: bool) -> list[Tensor]:
    """out, pooled, counts, to be written."""
    shape, wide = (cu_seqlens.shape[0] - 1, hidden.shape[1]), _wide(hidden)
    return [
        hidden.new_empty(shape),
        hidden.new_empty(shape if normalize else 0, dtype=wide),
        hidden.new_empty(shape if mode == "max" else 0, dtype=wide),
    ]


@_pool_op.register_fake
def _(hidden, cu_seqlens, mode, normalize):
    return tuple(_outputs(hidden, cu_seqlens, mode, normalize))


@_pool_backward_op.register_fake
def _(dout, hidden, cu_seqlens, out, pooled, counts, mode, normalize):
    return hidden.new_empty(hidden.shape)


def _save(ctx, inputs, output) -> None:
    hidden, cu_seqlens, ctx.mode, ctx.normalize = inputs
    ctx.save_for_backward(hidden, cu_seqlens, *output)


def _differentiate(ctx, dout, dpooled, dcounts):
    dhidden = _pool_backward_op(dout, *ctx.saved_tensors, ctx.mode, ctx.normalize)
    return dhidden, None, None, None


_pool_op.register_autograd(_differentiate, setup_context=_save)


def _forward_ref(hidden, cu_seqlens, mode, normalize):
    pooled = pool_ref(hidden.to(_wide(hidden)), cu_seqlens, mode)
    out, *saved = _outputs(hidden, cu_seqlens, mode, normalize)
    if normalize:
        saved[0] = pooled
    out = (F.normalize(pooled, dim=1, eps=_LEAST_NORM) if normalize else pooled).to(
        hidden.dtype, copy=True
    )
    if mode == "max":
        row = _sequence_of_each(hidden, cu_seqlens.diff().long())
        saved[1] = torch.zeros_like(pooled).index_add(0, row, (hidden == pooled[row]).to(pooled))
    return out, *saved


def _backward_ref(dout, hidden, cu_seqlens, out, pooled, counts, mode, normalize):
    dout, lengths = dout.to(_wide(hidden)), cu_seqlens.diff().long()
    if normalize:
        norm = pooled.norm(dim=1, keepdim=True)
        along = (pooled * dout).sum(1, keepdim=True) / norm
        along = torch.where(norm < _LEAST_NORM, 0.0, along)
        norm = norm.clamp(min=_LEAST_NORM)
        dout = (dout - pooled / norm * along) / norm
    row = _sequence_of_each(hidden, lengths)
    if mode == "cls":
        is_first = (
            torch.arange(hidden.shape[0], device=hidden.device) == cu_seqlens[:-1].long()[row]
        )
        dhidden = dout[row] * is_first.unsqueeze(1)
    elif mode == "mean":
        dhidden = (dout / lengths.unsqueeze(1))[row]
    else:
        is_most = hidden == (pooled if normalize else out)[row]
        dhidden = torch.where(is_most, (dout / counts)[row], 0.0)
    return dhidden.to(hidden.dtype)


def _pool_blocks(n_cols: int) -> tuple[int, dict[str, int]]:
    """Programs along the columns, and their launch."""
    block_n = min(_POOL.block_n, next_power_of_2(n_cols))
    options = {"BLOCK_M": _POOL.block_m, "BLOCK_N": block_n, "num_warps": _POOL.num_warps}
    return -(-n_cols // block_n), options


def _forward(hidden, cu_seqlens, mode, normalize):
    out, pooled, counts = _outputs(hidden, cu_seqlens, mode, normalize)
    n_seqs, n_cols = out.shape
    hidden, cu_seqlens = rows_of(hidden), cu_seqlens.contiguous()
    n_blocks, options = _pool_blocks(n_cols)
    _pool_fwd_kernel[(n_seqs, n_blocks)](
        hidden, cu_seqlens, pooled if normalize else out, counts, hidden.stride(0), n_cols,
        MODE=mode, **options,
    )  # fmt: skip
    if normalize:
        _normalize_fwd_kernel[(n_seqs,)](
            pooled, out, n_cols, _LEAST_NORM,
            BLOCK_N=_NORMALIZE.block_n, num_warps=_NORMALIZE.num_warps,
        )  # fmt: skip
    return out, pooled, counts


def _backward(dout, hidden, cu_seqlens, out, pooled, counts, mode, normalize):
    n_seqs, n_cols = out.shape
    dout, hidden, cu_seqlens = rows_of(dout), rows_of(hidden), cu_seqlens.contiguous()
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    dpooled = dout
    if normalize:
        dpooled = torch.empty_like(pooled)
        _normalize_bwd_kernel[(n_seqs,)](
            dout, pooled, dpooled, dout.stride(0), n_cols, _LEAST_NORM,
            BLOCK_N=_NORMALIZE.block_n, num_warps=_NORMALIZE.num_warps,
        )  # fmt: skip
    n_blocks, options = _pool_blocks(n_cols)
    _pool_bwd_kernel[(n_seqs, n_blocks)](
        dpooled, hidden, pooled if normalize else out, counts, cu_seqlens, dhidden,
        dpooled.stride(0), hidden.stride(0), n_cols,
        MODE=mode, **options,
    )  # fmt: skip
    return dhidden


def pool(hidden: Tensor, cu_seqlens: Tensor, mode: str = "mean", normalize: bool = False) -> Tensor:
    """Pool packed tokens, (n_tokens, hidden), to one row a sequence, (n_seqs, hidden).

    cu_seqlens: (n_seqs + 1,) int32 or int64, from 0 to n_tokens, which is not checked here. mode:
    "mean" or "max" over a sequence's tokens, or "cls", its first token. normalize: divide each row
    by its L2 norm. Sums are in float32. An empty sequence gives zeros.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be (n_tokens, hidden), got {tuple(hidden.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "cu_seqlens must be (n_seqs + 1,) int32 or int64, "
            f"got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    if not on_kernel_device(hidden) or hidden.numel() == 0 or cu_seqlens.shape[0] < 2:
        return pool_ref(hidden, cu_seqlens, mode, normalize)
    return _pool_op(hidden, cu_seqlens, mode, normalize)[0]
