"""A linear layer and its activation as one product: activation(x @ weight.T + bias)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels._operation import operation
from fastbert.kernels._triton import jit, on_kernel_device, rows_of, run, tl
from fastbert.kernels.gelu import (
    ACTIVATIONS,
    activate,
    bias_gelu,
    bias_gelu_backward,
    check_bias,
)


def linear_gelu_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "gelu"
) -> Tensor:
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


@dataclass(frozen=True)
class _Launch:
    block_m: int  # tokens
    block_n: int  # features that come out
    block_k: int  # features that go in, at once
    num_warps: int
    num_stages: int
    programs: int  # that share a processor, so that one multiplies while another activates


# By the largest number of tokens. Not measured yet, but chosen from what is compiled for Hopper: no
# spills, at most 125, 123 and 171 registers, and shared memory for so many programs.
_TMA_LAUNCHES = (
    (512, _Launch(64, 128, 64, 4, 4, 2)),
    (4096, _Launch(128, 128, 64, 8, 3, 2)),
    (2**31, _Launch(128, 256, 64, 8, 4, 1)),
)
# Elsewhere: 48 KiB of shared memory, as RTX 40 and MI300 have less than the others.
_LAUNCH = _Launch(128, 128, 32, 8, 4, 1)
# Where this was measured to be faster than cuBLASLt's product and then `bias_gelu`:
# (GPU, in_features, out_features) to the fewest and the most tokens. None has been measured yet:
# benchmarks/sweep_gelu.py prints these rows.
_FASTER: dict[tuple[str, int, int], tuple[int, int]] = {}


@jit()
def _tile(tile, n_rows, n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and column of a tile. Eight tiles down, then one across: both inputs stay in L2."""
    n_down, n_across = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_cols, BLOCK_N)
    first = tile // (8 * n_across) * 8
    n_group = min(n_down - first, 8)
    within = tile % (8 * n_across)
    return (first + within % n_group) * BLOCK_M, within // n_group * BLOCK_N


@jit("n_tokens")
def _linear_gelu_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, product_ptr,
    stride_x, stride_weight,
    n_tokens, n_in, n_out,
    HAS_BIAS: tl.constexpr, HAS_PRODUCT: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(n_tokens, BLOCK_M) * tl.cdiv(n_out, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        row, col = _tile(tile, n_tokens, n_out, BLOCK_M, BLOCK_N)
        rows, cols = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        row_mask, col_mask = rows < n_tokens, cols < n_out
        x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_x + ks
        weight_ptrs = weight_ptr + cols.to(tl.int64)[None, :] * stride_weight + ks[:, None]

        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, n_in, BLOCK_K):
            k_mask = ks < n_in - k
            x = tl.load(x_ptrs + k, mask=row_mask[:, None] & k_mask, other=0.0)
            weight = tl.load(weight_ptrs + k, mask=col_mask & k_mask[:, None], other=0.0)
            acc = tl.dot(x, weight, acc)

        mask = row_mask[:, None] & col_mask
        at = rows.to(tl.int64)[:, None] * n_out + cols
        if HAS_PRODUCT:
            tl.store(product_ptr + at, acc, mask=mask)
        if HAS_BIAS:
            acc += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, activate(acc, ACTIVATION), mask=mask)


@jit("n_tokens")
def _linear_gelu_tma_fwd_kernel(
    x_desc, weight_desc, bias_ptr, out_desc, product_desc,
    n_tokens, n_in, n_out,
    HAS_BIAS: tl.constexpr, HAS_PRODUCT: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tiles are moved by Hopper's tensor memory accelerator, which reads zeros past an edge."""
    n_tiles = tl.cdiv(n_tokens, BLOCK_M) * tl.cdiv(n_out, BLOCK_N)
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=True):
        row, col = _tile(tile, n_tokens, n_out, BLOCK_M, BLOCK_N)

        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, n_in, BLOCK_K):
            acc = tl.dot(x_desc.load([row, k]), weight_desc.load([col, k]).T, acc)

        # In halves, so that what waits in shared memory to be stored leaves room for the loads.
        halves = tl.permute(tl.reshape(acc, [BLOCK_M, 2, BLOCK_N // 2]), [0, 2, 1])
        left, right = tl.split(halves)
        for half in tl.static_range(2):
            part = left if half == 0 else right
            first = col + half * (BLOCK_N // 2)
            if HAS_PRODUCT:
                product_desc.store([row, first], part.to(product_desc.dtype))
            if HAS_BIAS:
                cols = first + tl.arange(0, BLOCK_N // 2)
                part += tl.load(bias_ptr + cols, mask=cols < n_out, other=0.0).to(tl.float32)
            out_desc.store([row, first], activate(part, ACTIVATION).to(out_desc.dtype))


# What the operation takes and gives: x (n_tokens, n_in), weight (n_out, n_in) as nn.Linear has it,
# bias (n_out,) or None; out (n_tokens, n_out); product, x @ weight.T without the bias, of the same
# shape or empty. The backward needs it: kept, it costs 2 bytes an element to write; computed again,
# those too and a third product.


@operation("fastbert::linear_gelu")
def _linear_gelu_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, has_product: bool
) -> tuple[Tensor, Tensor]:
    """out and product. float32 is left to plain torch."""
    forward = _forward_ref if x.dtype == torch.float32 else _forward
    return run("linear_gelu", forward, _forward_ref, x, weight, bias, activation, has_product)


@_linear_gelu_op.register_fake
def _(x, weight, bias, activation, has_product):
    out = x.new_empty(x.shape[0], weight.shape[0])
    return out, out.new_empty(out.shape if has_product else 0)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, ctx.activation, _ = inputs
    ctx.save_for_backward(x, weight, bias, output[1])


def _differentiate(ctx, dout, dproduct):
    x, weight, bias, product = ctx.saved_tensors
    if product.numel() == 0:  # no gradient was foreseen
        product = F.linear(x, weight)
    dproduct, dbias = bias_gelu_backward(dout, product, bias, ctx.activation)
    dx = dproduct @ weight if ctx.needs_input_grad[0] else None
    dweight = dproduct.T @ x if ctx.needs_input_grad[1] else None
    return dx, dweight, None if bias is None else dbias, None, None


_linear_gelu_op.register_autograd(_differentiate, setup_context=_save)


def _forward_ref(x, weight, bias, activation, has_product):
    product = F.linear(x, weight)
    out = ACTIVATIONS[activation](product if bias is None else product + bias.to(x.dtype))
    return out, product if has_product else x.new_empty(0)


@cache
def _descriptor_type() -> Any:
    """Triton's description of a tensor that is moved in tiles; None before 3.4."""
    try:
        from triton.tools.tensor_descriptor import TensorDescriptor
    except ImportError:
        return None
    return TensorDescriptor


def _takes_descriptors(*tensors: Tensor) -> bool:
    """Whether tiles of `tensors` can be moved by hardware: rows start at multiples of 16 bytes."""
    device = tensors[0].device
    if device.type == "cuda" and (
        torch.version.hip is not None or torch.cuda.get_device_capability(device) < (9, 0)
    ):
        return False
    return _descriptor_type() is not None and all(
        x.data_ptr() % 16 == 0
        and x.stride(0) * x.element_size() % 16 == 0
        and x.stride(0) >= x.shape[1]
        for x in tensors
    )


def _n_processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 2  # interpreted, a program after another
    return torch.cuda.get_device_properties(device).multi_processor_count


def _forward(x, weight, bias, activation, has_product):
    (n_tokens, n_in), n_out = x.shape, weight.shape[0]
    x, weight = rows_of(x), rows_of(weight)
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(n_tokens, n_out)
    product = out.new_empty(out.shape if has_product else 0)
    by_tma = _takes_descriptors(x, weight, out)
    launch = _LAUNCH
    if by_tma:
        launch = next(launch for most, launch in _TMA_LAUNCHES if n_tokens <= most)
    n_tiles = -(-n_tokens // launch.block_m) * -(-n_out // launch.block_n)
    grid = (min(n_tiles, launch.programs * _n_processors(x.device)),)
    options = {
        "HAS_BIAS": bias is not None, "HAS_PRODUCT": has_product, "ACTIVATION": activation,
        "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "BLOCK_K": launch.block_k,
        "num_warps": launch.num_warps, "num_stages": launch.num_stages,
    }  # fmt: skip
    if by_tma:
        describe = _descriptor_type().from_tensor
        stored = [launch.block_m, launch.block_n // 2]
        _linear_gelu_tma_fwd_kernel[grid](
            describe(x, [launch.block_m, launch.block_k]),
            describe(weight, [launch.block_n, launch.block_k]), bias,
            describe(out, stored), describe(product, stored) if has_product else None,
            n_tokens, n_in, n_out, **options,
        )  # fmt: skip
    else:
        _linear_gelu_fwd_kernel[grid](
            x, weight, bias, out, product, x.stride(0), weight.stride(0), n_tokens, n_in, n_out,
            **options,
        )  # fmt: skip
    return out, product


def _is_faster(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the one product was measured to be the faster way for such tensors."""
    if not _FASTER or x.device.type != "cuda" or dtype == torch.float32:
        return False
    gpu = torch.cuda.get_device_properties(x.device).name
    fewest, most = _FASTER.get((gpu, weight.shape[1], weight.shape[0]), (1, 0))
    return fewest <= x.numel() // x.shape[-1] <= most


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "gelu") -> Tensor:
    """activation(x @ weight.T + bias), in one kernel where that is measured to be faster.

    x: (..., in_features). weight: (out_features, in_features). bias: (out_features,) or None.
    activation: a name that `bias_gelu` takes. The bias is added by the kernel that activates, which
    then gives its gradient too. The result has the dtype of `x`, or autocast's.
    """
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight must have shape (out_features, {x.shape[-1]}), got {tuple(weight.shape)}"
        )
    check_bias(bias, weight.shape[0], activation)
    if not on_kernel_device(x) or x.numel() == 0:
        return linear_gelu_ref(x, weight, bias, activation)
    autocasts = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocasts else x.dtype
    if not _is_faster(x, weight, dtype):
        return bias_gelu(F.linear(x, weight), bias, activation)
    trains = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)
    )
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    out, _ = _linear_gelu_op(flat, weight.to(dtype), bias, activation, trains)
    return out.view(*x.shape[:-1], -1)
