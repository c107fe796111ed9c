"""Layer norm over the last axis, with dropout and an optional residual added first."""

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


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
) -> Tensor:
    if dropout_p:
        x = dropout(x, dropout_p)
    if residual is not None:
        x = x + residual
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@dataclass(frozen=True)
class _Launch:
    block_m: int  # rows at once
    num_warps: int


# (most columns, forward, backward): 16 to 32 elements of a tensor a thread, which leaves registers
# for enough bytes in flight (benchmarks/compile_report.py). Not measured yet.
_LAUNCHES = (
    (512, _Launch(8, 4), _Launch(4, 4)),
    (1024, _Launch(4, 4), _Launch(2, 4)),
    (4096, _Launch(1, 8), _Launch(1, 8)),
)
# Programs of the backward, each of which sums what its rows give to weight and bias: four for each
# processor of an H200.
_MOST_PARTIALS = 528


def _launches(n_cols: int) -> tuple[_Launch, _Launch]:
    return next(row[1:] for row in _LAUNCHES if n_cols <= row[0])


@jit("n_rows", "threshold")
def _layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, out_ptr, stats_ptr,
    stride_x, stride_residual,
    n_rows, n_cols, eps, threshold, scale,
    HAS_RESIDUAL: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    col_mask = cols < n_cols
    row_mask = rows < n_rows
    mask = row_mask[:, None] & col_mask[None, :]

    x = tl.load(x_ptr + rows[:, None] * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        first, second = row_words(tl.load(seed_ptr), rows, 0)
        kept = is_kept(first[:, None], second[:, None], cols[None, :], threshold)
        x = tl.where(kept, x * scale, 0.0)
    if HAS_RESIDUAL:
        x += tl.load(
            residual_ptr + rows[:, None] * stride_residual + cols, mask=mask, other=0.0
        ).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)

    mean = tl.sum(x, 1) / n_cols
    centered = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centered * centered, 1) / n_cols + eps)
    out = centered * rstd[:, None] * weight + bias

    tl.store(out_ptr + rows[:, None] * n_cols + cols, out, mask=mask)
    tl.store(stats_ptr + rows, mean, mask=row_mask)
    tl.store(stats_ptr + n_rows + rows, rstd, mask=row_mask)


@jit("n_rows", "threshold")
def _layer_norm_bwd_kernel(
    dout_ptr, x_ptr, residual_ptr, weight_ptr, seed_ptr, stats_ptr,
    dsum_ptr, dx_ptr, partials_ptr,
    stride_dout, stride_x, stride_residual,
    n_rows, n_cols, threshold, scale,
    HAS_RESIDUAL: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dsum: of dropout(x) + residual. dx: of x, with dropout. partials: of weight and bias."""
    cols = tl.arange(0, BLOCK_N)
    col_mask = cols < n_cols
    weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)

    for block in range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.num_programs(0)):
        rows = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        row_mask = rows < n_rows
        mask = row_mask[:, None] & col_mask[None, :]
        dout = tl.load(dout_ptr + rows[:, None] * stride_dout + cols, mask=mask, other=0.0)
        x = tl.load(x_ptr + rows[:, None] * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + rows, mask=row_mask, other=0.0)
        rstd = tl.load(stats_ptr + n_rows + rows, mask=row_mask, other=0.0)
        if HAS_DROPOUT:
            first, second = row_words(tl.load(seed_ptr), rows, 0)
            kept = is_kept(first[:, None], second[:, None], cols[None, :], threshold)
            x = tl.where(kept, x * scale, 0.0)
        if HAS_RESIDUAL:
            x += tl.load(
                residual_ptr + rows[:, None] * stride_residual + cols, mask=mask, other=0.0
            ).to(tl.float32)

        dout = dout.to(tl.float32)
        normed = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        scaled = dout * weight
        along = tl.sum(scaled * normed, 1) / n_cols
        dsum = rstd[:, None] * (
            scaled - tl.sum(scaled, 1)[:, None] / n_cols - normed * along[:, None]
        )
        dweight += tl.sum(dout * normed, 0)
        dbias += tl.sum(dout, 0)

        tl.store(dsum_ptr + rows[:, None] * n_cols + cols, dsum, mask=mask)
        if HAS_DROPOUT:
            dx = tl.where(kept, dsum * scale, 0.0)
            tl.store(dx_ptr + rows[:, None] * n_cols + cols, dx, mask=mask)

    partial_ptr = partials_ptr + tl.program_id(0) * 2 * n_cols + cols
    tl.store(partial_ptr, dweight, mask=col_mask)
    tl.store(partial_ptr + n_cols, dbias, mask=col_mask)


# What the operations take and give: x, residual, out, gradients (n_rows, n_cols); seed (1,) int64,
# None without dropout; stats (2, n_rows) float32, means and reciprocal deviations.


@operation("fastbert::layer_norm")
def _layer_norm_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """out, in `dtype`, and stats."""
    args = (x, weight, bias, residual, seed, dropout_p, eps, dtype)
    return run("layer_norm", _forward, _forward_ref, *args)


@operation("fastbert::layer_norm_backward")
def _layer_norm_backward_op(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    seed: Tensor | None,
    stats: Tensor,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum, of x (empty without dropout), of weight and bias (2, n_cols)."""
    return run(
        "layer_norm", _backward, _backward_ref, dout, x, weight, residual, seed, stats, dropout_p
    )


@_layer_norm_op.register_fake
def _(x, weight, bias, residual, seed, dropout_p, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(2, x.shape[0], dtype=torch.float32)


@_layer_norm_backward_op.register_fake
def _(dout, x, weight, residual, seed, stats, dropout_p):
    dx = x.new_empty(0 if seed is None else x.shape)
    return dout.new_empty(x.shape), dx, weight.new_empty(2, x.shape[1])


def _save(ctx, inputs, output) -> None:
    x, weight, _bias, residual, seed, ctx.dropout_p, _eps, _dtype = inputs
    ctx.save_for_backward(x, weight, residual, seed, output[1])


def _differentiate(ctx, dout, dstats):
    x, weight, residual, seed, stats = ctx.saved_tensors
    dsum, dx, dparameters = _layer_norm_backward_op(
        dout, x, weight, residual, seed, stats, ctx.dropout_p
    )
    dresidual = None if residual is None else dsum.to(residual.dtype)
    dx = dsum.to(x.dtype) if seed is None else dx
    return dx, dparameters[0], dparameters[1], dresidual, None, None, None, None


_layer_norm_op.register_autograd(_differentiate, setup_context=_save)


def _summed(
    x: Tensor, residual: Tensor | None, seed: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor | None]:
    """dropout(x) + residual, and what x is multiplied by."""
    factor = None
    if seed is not None:
        rows, cols = (torch.arange(n, device=x.device) for n in x.shape)
        factor = is_kept_ref(seed, rows, 0, cols, dropout_p) * dropout_arguments(dropout_p)[1]
        x = x * factor.to(x.dtype)
    return x if residual is None else x + residual, factor


def _forward_ref(x, weight, bias, residual, seed, dropout_p, eps, dtype):
    x, _ = _summed(x, residual, seed, dropout_p)
    out = F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)
    var, mean = torch.var_mean(x.float(), -1, correction=0)
    return out.to(dtype), torch.stack([mean, (var + eps).rsqrt()])


def _backward_ref(dout, x, weight, residual, seed, stats, dropout_p):
    summed, factor = _summed(x, residual, seed, dropout_p)
    summed = summed.to(torch.promote_types(summed.dtype, stats.dtype))  # CUDA's takes no others
    mean, rstd = stats.to(summed.dtype).unsqueeze(-1)
    dsum, *dparameters = torch.ops.aten.native_layer_norm_backward(
        dout.to(summed.dtype), summed, summed.shape[-1:], mean, rstd,
        weight.to(summed.dtype), weight.to(summed.dtype), [True] * 3,
    )  # fmt: skip
    dx = x.new_empty(0) if factor is None else (dsum * factor).to(x.dtype)
    return dsum.to(dout.dtype), dx, torch.stack(dparameters).to(weight.dtype)


def _forward(x, weight, bias, residual, seed, dropout_p, eps, dtype):
    n_rows, n_cols = x.shape
    x, residual = rows_of(x), None if residual is None else rows_of(residual)
    out = x.new_empty(x.shape, dtype=dtype)
    stats = x.new_empty(2, n_rows, dtype=torch.float32)
    launch, _ = _launches(n_cols)
    _layer_norm_fwd_kernel[(-(-n_rows // launch.block_m),)](
        x, residual, weight.contiguous(), bias.contiguous(), seed, out, stats,
        x.stride(0), 0 if residual is None else residual.stride(0),
        n_rows, n_cols, eps, *dropout_arguments(dropout_p),
        HAS_RESIDUAL=residual is not None, HAS_DROPOUT=seed is not None,
        BLOCK_M=launch.block_m, BLOCK_N=next_power_of_2(n_cols), num_warps=launch.num_warps,
    )  # fmt: skip
    return out, stats


def _backward(dout, x, weight, residual, seed, stats, dropout_p):
    n_rows, n_cols = x.shape
    dout, x, residual = rows_of(dout), rows_of(x), None if residual is None else rows_of(residual)
    _, launch = _launches(n_cols)
    n_partials = min(-(-n_rows // launch.block_m), _MOST_PARTIALS)
    dsum = torch.empty_like(x, dtype=dout.dtype, memory_format=torch.contiguous_format)
    dx = x.new_empty(0 if seed is None else x.shape)
    partials = x.new_empty(n_partials, 2, n_cols, dtype=torch.float32)
    _layer_norm_bwd_kernel[(n_partials,)](
        dout, x, residual, weight.contiguous(), seed, stats, dsum, dx, partials,
        dout.stride(0), x.stride(0), 0 if residual is None else residual.stride(0),
        n_rows, n_cols, *dropout_arguments(dropout_p),
        HAS_RESIDUAL=residual is not None, HAS_DROPOUT=seed is not None,
        BLOCK_M=launch.block_m, BLOCK_N=next_power_of_2(n_cols), num_warps=launch.num_warps,
    )  # fmt: skip
    return dsum, dx, partials.sum(0).to(weight.dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
    *,
    seed: Tensor | None = None,
) -> Tensor:
    """Normalise each row of dropout(x), or of dropout(x) + residual.

    x, residual: (..., hidden). weight, bias: (hidden,). dropout_p: share of `x` set to zero, 0.0
    outside training. seed: (1,) int64 on the device of `x`, drawn when None; a kernel drops by it,
    plain torch by its own generator. Statistics are in float32. The result has the shape of `x`
    and the dtype of the sum; under autocast it is float32, as torch's.
    """
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"weight and bias must have shape ({x.shape[-1]},), "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must be {tuple(x.shape)} as x, got {tuple(residual.shape)}")
    dropout_arguments(dropout_p)  # refuses what is no share
    if not on_kernel_device(x) or x.numel() == 0 or x.shape[-1] > _LAUNCHES[-1][0]:
        return layer_norm_ref(x, weight, bias, residual, dropout_p, eps)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.float32
    if not dropout_p:
        seed = None
    elif seed is None:
        seed = draw_seed(x.device)
    shape = x.shape
    if len(shape) != 2:  # else three views, which autograd would go through, too
        x = x.reshape(-1, shape[-1])
        residual = None if residual is None else residual.reshape(x.shape)
    out, _ = _layer_norm_op(x, weight, bias, residual, seed, dropout_p, eps, dtype)
    return out if len(shape) == 2 else out.view(shape)
