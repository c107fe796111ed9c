"""The activation between the two halves of the feed-forward block, with the bias before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels._operation import operation
from fastbert.kernels._triton import jit, on_kernel_device, rows_of, run, tl

_tanh_gelu = partial(F.gelu, approximate="tanh")
# By transformers' names for them.
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": F.relu,
}


def bias_gelu_ref(x: Tensor, bias: Tensor | None, activation: str = "gelu") -> Tensor:
    return ACTIVATIONS[activation](x if bias is None else x + bias.to(x.dtype))


@dataclass(frozen=True)
class _Launch:
    block_m: int  # rows at once
    block_n: int  # columns at once
    num_warps: int


# Not measured yet. 512 columns divide the widths of BERT; each thread has four loads of 16 bytes in
# flight, and registers leave room for seven programs and more on a processor.
_FORWARD = _Launch(8, 512, 4)
_BACKWARD = _Launch(4, 512, 4)
# Programs of the backward with a bias, each of which sums what its rows give to it: eight for each
# processor of an H200.
_MOST_PARTIALS = 1056


@jit()
def normal_cdf(x):
    """The standard normal distribution up to x, Phi(x), to 7e-8: an erf costs twice as much.

    Phi(-z) is 2 to the power of a polynomial for z >= 0, which was fitted by iteratively
    reweighted least squares (Lawson 1961) to the smallest largest error of max(1, z) * Phi(-z).
    """
    z = tl.abs(x)
    power = tl.fma(z, -1.4444544e-06, 2.3537959e-05)
    power = tl.fma(power, z, -0.00011545273)
    power = tl.fma(power, z, -0.00029487829)
    power = tl.fma(power, z, 0.0072497567)
    power = tl.fma(power, z, -0.052608643)
    power = tl.fma(power, z, -0.45917758)
    power = tl.fma(power, z, -1.1511079)
    below = tl.exp2(tl.fma(power, z, -1.0))
    return tl.where(x < 0, below, 1.0 - below)


@jit()
def tanh_cdf(x):
    """What stands for Phi(x) in the tanh form, and its product with what it lacks to one.

    (1 + tanh(u)) / 2 = sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
    """
    small = tl.exp2(tl.abs(x) * (x * x * -0.10294324 - 2.3022082))  # exp(-2 |u|): no overflow
    share = 1.0 / (1.0 + small)
    return tl.where(x < 0, small * share, share), small * share * share


@jit()
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        out = tl.where(x <= 0, 0.0, x)  # NaN stays
    elif ACTIVATION == "gelu":
        out = x * normal_cdf(x)
    else:
        cdf, _ = tanh_cdf(x)
        out = x * cdf
    return out


@jit()
def _gradient(x, ACTIVATION: tl.constexpr):
    """Of `activate`."""
    if ACTIVATION == "relu":
        out = tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        density = tl.exp2(x * x * -0.72134752) * 0.39894228  # exp(-x^2 / 2) / sqrt(2 pi)
        out = normal_cdf(x) + x * density
    else:
        cdf, product = tanh_cdf(x)
        out = cdf + x * product * (x * x * 0.21406445 + 1.5957691)  # 2 du/dx
    return out


@jit("n_rows")
def _bias_gelu_fwd_kernel(
    x_ptr, bias_ptr, out_ptr,
    stride_x,
    n_rows, n_cols,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n_col_blocks = tl.cdiv(n_cols, BLOCK_N)
    rows = (tl.program_id(0) // n_col_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % n_col_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]

    x = tl.load(x_ptr + rows[:, None] * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)

    tl.store(out_ptr + rows[:, None] * n_cols + cols, activate(x, ACTIVATION), mask=mask)


@jit("n_rows")
def _bias_gelu_bwd_kernel(
    dout_ptr, x_ptr, bias_ptr, dx_ptr, partials_ptr,
    stride_dout, stride_x,
    n_rows, n_cols,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partials: of the bias, a row for each group of programs that together span the columns."""
    n_col_blocks = tl.cdiv(n_cols, BLOCK_N)
    group, n_groups = tl.program_id(0) // n_col_blocks, tl.num_programs(0) // n_col_blocks
    cols = tl.program_id(0) % n_col_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < n_cols
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
        dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    for block in range(group, tl.cdiv(n_rows, BLOCK_M), n_groups):
        rows = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < n_rows)[:, None] & col_mask[None, :]
        dout = tl.load(dout_ptr + rows[:, None] * stride_dout + cols, mask=mask, other=0.0)
        x = tl.load(x_ptr + rows[:, None] * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += bias

        dx = dout.to(tl.float32) * _gradient(x, ACTIVATION)
        if HAS_BIAS:
            dbias += dx

        tl.store(dx_ptr + rows[:, None] * n_cols + cols, dx, mask=mask)

    if HAS_BIAS:
        partial_ptr = partials_ptr + group.to(tl.int64) * n_cols + cols
        tl.store(partial_ptr, tl.sum(dbias, 0), mask=col_mask)


# What the operations take and give: x, out, gradients (n_rows, n_cols); bias (n_cols,) or None.


@operation("fastbert::bias_gelu")
def _bias_gelu_op(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return run("gelu", _forward, bias_gelu_ref, x, bias, activation).contiguous()


@operation("fastbert::bias_gelu_backward")
def bias_gelu_backward(
    dout: Tensor, x: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of the bias (empty where there is none)."""
    return run("gelu", _backward, _backward_ref, dout, x, bias, activation)


@_bias_gelu_op.register_fake
def _(x, bias, activation):
    return x.new_empty(x.shape)


@bias_gelu_backward.register_fake
def _(dout, x, bias, activation):
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _save(ctx, inputs, output) -> None:
    x, bias, ctx.activation = inputs
    ctx.save_for_backward(x, bias)


def _differentiate(ctx, dout):
    x, bias = ctx.saved_tensors
    dx, dbias = bias_gelu_backward(dout, x, bias, ctx.activation)
    return dx, None if bias is None else dbias, None


_bias_gelu_op.register_autograd(_differentiate, setup_context=_save)


def _backward_ref(dout, x, bias, activation):
    dout, summed = dout.to(x.dtype), x if bias is None else x + bias.to(x.dtype)
    if activation == "relu":
        dx = torch.ops.aten.threshold_backward(dout, summed, 0)
    else:
        approximate = "none" if activation == "gelu" else "tanh"
        dx = torch.ops.aten.gelu_backward(dout, summed, approximate=approximate)
    return dx.contiguous(), x.new_empty(0) if bias is None else dx.sum(0).to(bias.dtype)


def _forward(x, bias, activation):
    n_rows, n_cols = x.shape
    x, bias = rows_of(x), None if bias is None else bias.contiguous()
    out = x.new_empty(x.shape)
    n_programs = -(-n_rows // _FORWARD.block_m) * -(-n_cols // _FORWARD.block_n)
    _bias_gelu_fwd_kernel[(n_programs,)](
        x, bias, out, x.stride(0), n_rows, n_cols,
        HAS_BIAS=bias is not None, ACTIVATION=activation,
        BLOCK_M=_FORWARD.block_m, BLOCK_N=_FORWARD.block_n, num_warps=_FORWARD.num_warps,
    )  # fmt: skip
    return out


def _backward(dout, x, bias, activation):
    n_rows, n_cols = x.shape
    dout, x, bias = rows_of(dout), rows_of(x), None if bias is None else bias.contiguous()
    n_groups, n_col_blocks = -(-n_rows // _BACKWARD.block_m), -(-n_cols // _BACKWARD.block_n)
    if bias is not None:
        n_groups = min(n_groups, max(_MOST_PARTIALS // n_col_blocks, 1))
    dx = x.new_empty(x.shape)
    partials = x.new_empty(0 if bias is None else (n_groups, n_cols), dtype=torch.float32)
    _bias_gelu_bwd_kernel[(n_groups * n_col_blocks,)](
        dout, x, bias, dx, partials, dout.stride(0), x.stride(0), n_rows, n_cols,
        HAS_BIAS=bias is not None, ACTIVATION=activation,
        BLOCK_M=_BACKWARD.block_m, BLOCK_N=_BACKWARD.block_n, num_warps=_BACKWARD.num_warps,
    )  # fmt: skip
    return dx, x.new_empty(0) if bias is None else partials.sum(0).to(bias.dtype)


def check_bias(bias: Tensor | None, n_cols: int, activation: str) -> None:
    if bias is not None and bias.shape != (n_cols,):
        raise ValueError(f"bias must have shape ({n_cols},), got {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def bias_gelu(x: Tensor, bias: Tensor | None, activation: str = "gelu") -> Tensor:
    """activation(x + bias), or activation(x) where `bias` is None.

    x: (..., features). bias: (features,). activation: "gelu", the exact one, x * Phi(x) (Hendrycks
    and Gimpel 2016, erf form); "gelu_new" or "gelu_pytorch_tanh", their tanh form; "relu". The
    result has the shape and dtype of `x`.
    """
    check_bias(bias, x.shape[-1], activation)
    if not on_kernel_device(x) or x.numel() == 0:
        return bias_gelu_ref(x, bias, activation)
    if x.dim() == 2:
        return _bias_gelu_op(x, bias, activation)
    return _bias_gelu_op(x.reshape(-1, x.shape[-1]), bias, activation).view(x.shape)
