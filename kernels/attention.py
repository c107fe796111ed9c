"""Softmax attention on packed sequences: each token attends to the tokens of its own sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from fastbert.kernels._attention_kernels import (
    _attention_dkv_kernel,
    _attention_dq_kernel,
    _attention_fwd_kernel,
    _attention_short_bwd_kernel,
    _attention_short_fwd_kernel,
)
from fastbert.kernels._attention_ref import (
    attend,
    attention_ref,
    attention_weights_ref,
    backward_ref,
    forward_ref,
    runs_of,
)
from fastbert.kernels._dropout import draw_seed, dropout_arguments
from fastbert.kernels._operation import operation
from fastbert.kernels._triton import (
    allows_tf32,
    architecture,
    next_power_of_2,
    on_kernel_device,
    rows_of,
    run,
)

__all__ = [
    "Schedule",
    "attend",
    "attention",
    "attention_ref",
    "attention_weights_ref",
    "runs_of",
    "schedule",
]

HEAD_DIMS = range(16, 129)
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class _Launch:
    block: int  # rows of the side that is gone through
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class _Launches:
    most_fwd: int  # keys up to which the forward has them all in one tile
    most_bwd: int  # the same for keys and queries of the backward
    fwd: _Launch
    dq: _Launch
    dkv: _Launch


# By architecture, bytes of a number and largest head_dim. Chosen by what the compile report shows,
# so that no kernel of 16 bits spills; not measured.
_LAUNCHES = {
    "hopper": (
        (2, 32, _Launches(128, 128, _Launch(64, 8, 3), _Launch(64, 8, 2), _Launch(64, 8, 2))),
        (2, 64, _Launches(128, 128, _Launch(64, 8, 3), _Launch(64, 8, 2), _Launch(64, 8, 2))),
        (2, 128, _Launches(128, 64, _Launch(64, 8, 2), _Launch(32, 8, 2), _Launch(32, 8, 2))),
        (4, 64, _Launches(0, 0, _Launch(32, 8, 1), _Launch(32, 8, 1), _Launch(32, 8, 1))),
        (4, 128, _Launches(0, 0, _Launch(32, 8, 1), _Launch(16, 8, 1), _Launch(16, 8, 1))),
    ),
    "blackwell": (
        (2, 32, _Launches(128, 128, _Launch(128, 8, 2), _Launch(64, 8, 2), _Launch(64, 8, 2))),
        (2, 64, _Launches(128, 64, _Launch(64, 8, 2), _Launch(64, 8, 2), _Launch(64, 8, 2))),
        (2, 128, _Launches(128, 0, _Launch(64, 8, 2), _Launch(32, 8, 2), _Launch(32, 8, 2))),
        (4, 64, _Launches(64, 64, _Launch(32, 8, 1), _Launch(32, 8, 1), _Launch(32, 8, 1))),
        (4, 128, _Launches(64, 0, _Launch(32, 8, 1), _Launch(16, 8, 1), _Launch(16, 8, 1))),
    ),
    "ampere": (
        (2, 32, _Launches(128, 64, _Launch(128, 8, 2), _Launch(64, 8, 2), _Launch(64, 8, 2))),
        (2, 64, _Launches(128, 64, _Launch(128, 8, 2), _Launch(64, 8, 2), _Launch(32, 8, 2))),
        (2, 128, _Launches(64, 0, _Launch(64, 8, 2), _Launch(32, 8, 2), _Launch(16, 8, 2))),
        (4, 64, _Launches(64, 64, _Launch(32, 8, 1), _Launch(32, 8, 1), _Launch(32, 8, 1))),
        (4, 128, _Launches(64, 0, _Launch(32, 8, 1), _Launch(16, 8, 1), _Launch(16, 8, 1))),
    ),
    "amd": (
        (2, 32, _Launches(128, 64, _Launch(64, 8, 2), _Launch(64, 8, 2), _Launch(16, 8, 1))),
        (2, 64, _Launches(128, 64, _Launch(64, 8, 2), _Launch(64, 8, 1), _Launch(16, 8, 1))),
        (2, 128, _Launches(64, 64, _Launch(64, 8, 2), _Launch(32, 8, 1), _Launch(16, 8, 1))),
        (4, 64, _Launches(64, 64, _Launch(32, 8, 1), _Launch(32, 8, 1), _Launch(32, 8, 1))),
        (4, 128, _Launches(64, 0, _Launch(32, 8, 1), _Launch(16, 8, 1), _Launch(16, 8, 1))),
    ),
}


def _launches(x: Tensor) -> _Launches:
    size, head_dim = x.element_size(), x.shape[-1]
    table = _LAUNCHES[architecture(x.device)]
    return next(row for of, most, row in table if of == size and head_dim <= most)


@dataclass(frozen=True)
class Schedule:
    """What programs work on, made once a batch for all layers, forward and backward.

    query_tiles: (n_tiles, 5) int32: the first row of the tile in its sequence, the sequence's first
    token and its length, the first token and the number of its keys. key_tiles: the same with
    queries and keys in each other's place. A row past the length is no work. block: rows of a tile.
    """

    query_tiles: Tensor
    key_tiles: Tensor
    block: int


def schedule(
    cu_seqlens: Tensor,
    max_seqlen: int,
    n_tokens: int,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    n_keys: int | None = None,
) -> Schedule:
    """The schedule of a batch, on the device of `cu_seqlens`, without waiting for it.

    Arguments are those of `attention`; n_tokens and n_keys: rows of q and of k. Tiles of the
    sequences with most work come first, so that the last programs are short.
    """
    if cu_seqlens_k is None:
        cu_seqlens_k, max_seqlen_k, n_keys = cu_seqlens, max_seqlen, n_tokens
    if max_seqlen_k is None or n_keys is None:
        raise ValueError("cu_seqlens_k needs max_seqlen_k and n_keys, got None")
    block = _block(max_seqlen, max_seqlen_k)
    query_tiles = _tiles(cu_seqlens, cu_seqlens_k, max_seqlen, n_tokens, block)
    if cu_seqlens_k is cu_seqlens:
        return Schedule(query_tiles, query_tiles, block)
    return Schedule(
        query_tiles, _tiles(cu_seqlens_k, cu_seqlens, max_seqlen_k, n_keys, block), block
    )


def _block(max_seqlen: int, max_seqlen_k: int) -> int:
    return 64 if max(max_seqlen, max_seqlen_k) <= 64 else 128


def _tiles(
    cu_seqlens: Tensor, cu_others: Tensor, max_seqlen: int, n_rows: int, block: int
) -> Tensor:
    lengths, others = cu_seqlens.diff(), cu_others.diff()
    sequences = torch.stack([lengths * 0, cu_seqlens[:-1], lengths, cu_others[:-1], others], 1)
    if max_seqlen <= block:
        return sequences
    order = others.argsort(descending=True, stable=True)
    sequences = sequences[order]
    n_tiles = (sequences[:, 2] + block - 1) // block
    ends = n_tiles.cumsum(0)
    most = n_rows // block + lengths.shape[0]
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        most = int(ends[-1])
    tiles = torch.arange(most, device=ends.device)
    which = torch.searchsorted(ends, tiles, right=True).clamp(max=lengths.shape[0] - 1)
    rows = (tiles - (ends - n_tiles)[which]) * block
    return torch.cat([rows[:, None].int(), sequences[which, 1:]], 1)


# What the operations take: q, k, v (n_tokens, n_heads, head_dim), or q is qkv (n_tokens, 3,
# n_heads, head_dim) and k and v are None; the bounds of queries and of keys; seed (1,) int64, None
# without dropout; tiles of a schedule, made when None. out: (n_tokens, n_heads, head_dim). lse:
# (n_heads, n_tokens) float32, the logarithm to base 2 of what weights are divided by, inf where
# that is zero.


@operation("fastbert::attention")
def _attention_op(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    causal: bool,
    dropout_p: float,
    scale: float,
    max_seqlen: int,
    max_seqlen_k: int,
    query_tiles: Tensor | None,
    key_tiles: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out and lse."""
    q, k, v = _three(q, k, v)
    kernels = _forward if _has_kernel(q, k, scale) else forward_ref
    return run(
        "attention", kernels, forward_ref,
        q, k, v, cu_seqlens, cu_seqlens_k, seed, causal, dropout_p, scale,
        max_seqlen, max_seqlen_k, query_tiles, key_tiles,
    )  # fmt: skip


@operation("fastbert::attention_backward")
def _attention_backward_op(
    dout: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    seed: Tensor | None,
    causal: bool,
    dropout_p: float,
    scale: float,
    max_seqlen: int,
    max_seqlen_k: int,
    query_tiles: Tensor | None,
    key_tiles: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; or of qkv, and two that are empty."""
    gradients = _empty_gradients(dout, q, k, v)
    into = _three(gradients[0], *([None, None] if k is None else gradients[1:]))
    q, k, v = _three(q, k, v)
    kernels = _backward if _has_kernel(q, k, scale) else backward_ref
    run(
        "attention", kernels, backward_ref,
        q, k, v, dout, out, lse, into, cu_seqlens, cu_seqlens_k, seed, causal, dropout_p, scale,
        max_seqlen, max_seqlen_k, query_tiles, key_tiles,
    )  # fmt: skip
    return gradients


@_attention_op.register_fake
def _(q, k, v, *args):
    n_tokens, *heads = q.shape if k is not None else (q.shape[0], *q.shape[2:])
    return q.new_empty(n_tokens, *heads), q.new_empty(heads[0], n_tokens, dtype=torch.float32)


@_attention_backward_op.register_fake
def _empty_gradients(dout, q, k, v, *args):
    if k is None:
        return q.new_empty(q.shape), q.new_empty(0), q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, cu_seqlens_k, seed, *ctx.numbers, query_tiles, key_tiles = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, cu_seqlens_k, seed, query_tiles, key_tiles)


def _differentiate(ctx, dout, dlse):
    *tensors, query_tiles, key_tiles = ctx.saved_tensors
    dq, dk, dv = _attention_backward_op(dout, *tensors, *ctx.numbers, query_tiles, key_tiles)
    if tensors[1] is None:
        dk = dv = None
    return dq, dk, dv, *[None] * 10


_attention_op.register_autograd(_differentiate, setup_context=_save)


def _three(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, ...]:
    return q.unbind(1) if k is None or v is None else (q, k, v)


def _has_kernel(q: Tensor, k: Tensor, scale: float) -> bool:
    return q.shape[-1] in HEAD_DIMS and scale > 0 and q.numel() > 0 and k.numel() > 0


def _constants(x: Tensor, causal: bool, seed: Tensor | None) -> dict[str, Any]:
    """What each kernel is compiled for."""
    return {
        "IS_CAUSAL": causal,
        "HAS_DROPOUT": seed is not None,
        "PRECISION": "tf32" if allows_tf32() else "ieee",
        "HEAD_DIM": x.shape[-1],
        "BLOCK_D": next_power_of_2(x.shape[-1]),
    }


def _both_tiles(cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, n_tokens, n_keys):
    """Tiles for an operation that was given none."""
    made = schedule(
        cu_seqlens, max_seqlen, n_tokens,
        cu_seqlens_k=cu_seqlens_k, max_seqlen_k=max_seqlen_k, n_keys=n_keys,
    )  # fmt: skip
    return made.query_tiles, made.key_tiles


def _forward(
    q, k, v, cu_seqlens, cu_seqlens_k, seed, causal, dropout_p, scale,
    max_seqlen, max_seqlen_k, query_tiles, key_tiles,
):  # fmt: skip
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    n_tokens, n_heads, _ = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty(n_heads, n_tokens, dtype=torch.float32)
    if query_tiles is None:
        lengths = (max_seqlen, max_seqlen_k, n_tokens, len(k))
        query_tiles, _ = _both_tiles(cu_seqlens, cu_seqlens_k, *lengths)
    block, launches = _block(max_seqlen, max_seqlen_k), _launches(q)
    if max_seqlen_k <= launches.most_fwd:
        kernel = _attention_short_fwd_kernel
        launch = _Launch(64 if max_seqlen_k <= 64 else 128, block // 16, 1)
    else:
        kernel, launch = _attention_fwd_kernel, launches.fwd
    kernel[(len(query_tiles) * n_heads,)](
        q, k, v, query_tiles, seed, out, lse,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        n_tokens, n_heads, scale * _LOG2_E, *dropout_arguments(dropout_p),
        **_constants(q, causal, seed), BLOCK_M=block, BLOCK_N=launch.block,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return out, lse


def _backward(
    q, k, v, dout, out, lse, into, cu_seqlens, cu_seqlens_k, seed, causal, dropout_p, scale,
    max_seqlen, max_seqlen_k, query_tiles, key_tiles,
):  # fmt: skip
    q, k, v, dout = rows_of(q), rows_of(k), rows_of(v), dout.to(q.dtype).contiguous()
    n_tokens, n_heads, _ = q.shape
    if query_tiles is None:
        lengths = (max_seqlen, max_seqlen_k, n_tokens, len(k))
        query_tiles, key_tiles = _both_tiles(cu_seqlens, cu_seqlens_k, *lengths)
    block, launches = _block(max_seqlen, max_seqlen_k), _launches(q)
    threshold, keep_scale = dropout_arguments(dropout_p)
    dq, dk, dv = into
    # dq's rows are as far apart as those of dk and dv: all are new, or within one.
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], dq.stride(0))
    numbers = (n_tokens, n_heads, scale * _LOG2_E, threshold)
    grad_scale, constants = scale * keep_scale, _constants(q, causal, seed)
    if max(max_seqlen, max_seqlen_k) <= launches.most_bwd:
        _attention_short_bwd_kernel[(len(query_tiles) * n_heads,)](
            dout, q, k, v, lse, query_tiles, seed, dq, dk, dv, *strides,
            *numbers, keep_scale, grad_scale,
            **constants, BLOCK=block, num_warps=block // 16, num_stages=1,
        )  # fmt: skip
        return
    delta = torch.empty_like(lse)
    words = None if seed is None else lse.new_empty(2, *lse.shape, dtype=torch.int32)
    _attention_dq_kernel[(len(query_tiles) * n_heads,)](
        dout, q, k, v, out, lse, query_tiles, seed, dq, delta, words, *strides,
        *numbers, 1 - dropout_p, grad_scale,
        **constants, BLOCK_M=block, BLOCK_N=launches.dq.block,
        num_warps=launches.dq.num_warps, num_stages=launches.dq.num_stages,
    )  # fmt: skip
    _attention_dkv_kernel[(len(key_tiles) * n_heads,)](
        dout, q, k, v, lse, key_tiles, delta, words, dk, dv, *strides,
        *numbers, keep_scale, grad_scale,
        **constants, BLOCK_M=launches.dkv.block, BLOCK_N=block,
        num_warps=launches.dkv.num_warps, num_stages=launches.dkv.num_stages,
    )  # fmt: skip


@overload
def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    /,
    *,
    causal: bool = ...,
    dropout_p: float = ...,
    softmax_scale: float | None = ...,
    seed: Tensor | None = ...,
    schedule: Schedule | None = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    /,
    *,
    causal: bool = ...,
    dropout_p: float = ...,
    softmax_scale: float | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    max_seqlen_k: int | None = ...,
    seed: Tensor | None = ...,
    schedule: Schedule | None = ...,
) -> Tensor: ...
def attention(
    *args,
    causal=False,
    dropout_p=0.0,
    softmax_scale=None,
    cu_seqlens_k=None,
    max_seqlen_k=None,
    seed=None,
    schedule=None,
):
    """dropout(softmax(q k^T * softmax_scale)) v within each sequence (Vaswani et al. 2017).

    Arguments are (qkv, cu_seqlens, max_seqlen) or (q, k, v, cu_seqlens, max_seqlen).
    qkv: (n_tokens, 3, n_heads, head_dim), whose gradient is made whole. q: (n_tokens, n_heads,
    head_dim). k, v: (n_keys, n_heads, head_dim) in the dtype of q. Any strides; only a last axis
    that is not contiguous is copied. cu_seqlens: (n_seqs + 1,) int32 from 0 to n_tokens.
    max_seqlen: length of the longest sequence. Both are trusted on a GPU, where they cannot be
    checked without waiting. cu_seqlens_k, max_seqlen_k: of the keys, where those are of another
    text. causal: the last query of a sequence sees all its keys, each one before it a key less.
    A query that sees no key gets zeros. dropout_p: share of the weights set to zero. softmax_scale:
    head_dim ** -0.5 when None. seed: (1,) int64 on the device of q, drawn when None; a kernel drops
    by it, plain torch by its own generator. schedule: what `schedule` gives for the batch, which
    saves making it in each layer. Returns (n_tokens, n_heads, head_dim).
    """
    *tensors, cu_seqlens, max_seqlen = args
    is_cross = cu_seqlens_k is not None
    if not is_cross:
        cu_seqlens_k, max_seqlen_k = cu_seqlens, max_seqlen
    _check(tensors, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, is_cross)
    block = _block(max_seqlen, max_seqlen_k)
    if schedule is not None and schedule.block != block:
        raise ValueError(f"schedule must have tiles of {block} rows, got {schedule.block}")
    dropout_arguments(dropout_p)  # refuses what is no share
    device = tensors[0].device
    if torch.is_autocast_enabled(device.type):
        tensors = [x.to(torch.get_autocast_dtype(device.type)) for x in tensors]
    q, k, v = _three(*tensors, *[None] * (3 - len(tensors)))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale

    # Plain torch asks for the lengths, which what is traced may not: there the operation asks.
    has_kernel = on_kernel_device(q)
    if not torch.compiler.is_compiling() and not (has_kernel and _has_kernel(q, k, scale)):
        return attention_ref(
            q, k, v, cu_seqlens, max_seqlen, causal=causal, dropout_p=dropout_p,
            softmax_scale=scale, cu_seqlens_k=cu_seqlens_k, max_seqlen_k=max_seqlen_k,
        )  # fmt: skip
    if not dropout_p:
        seed = None
    elif seed is None:
        seed = draw_seed(device)
    tiles = (None, None)
    if schedule is not None:
        tiles = (schedule.query_tiles, schedule.key_tiles)
    elif has_kernel:
        tiles = _both_tiles(
            cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, q.shape[0], k.shape[0]
        )
    out, _ = _attention_op(
        *tensors, *[None] * (3 - len(tensors)), cu_seqlens, cu_seqlens_k, seed, causal, dropout_p,
        scale, max_seqlen, max_seqlen_k, *tiles,
    )  # fmt: skip
    return out


def _check(tensors, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, is_cross) -> None:
    if len(tensors) == 1:
        (qkv,) = tensors
        if qkv.dim() != 4 or qkv.shape[1] != 3:
            raise ValueError(
                f"qkv must be (n_tokens, 3, n_heads, head_dim), got {tuple(qkv.shape)}"
            )
        if is_cross:
            raise ValueError("cu_seqlens_k needs q, k and v, got qkv")
    elif len(tensors) != 3:
        raise TypeError(
            "attention takes (qkv, cu_seqlens, max_seqlen) or (q, k, v, cu_seqlens, max_seqlen), "
            f"got {len(tensors) + 2} arguments"
        )
    q, k, v = _three(*tensors, *[None] * (3 - len(tensors)))
    if q.dim() != 3:
        raise ValueError(f"q must be (n_tokens, n_heads, head_dim), got {tuple(q.shape)}")
    shape = (k.shape[0], *q.shape[1:]) if is_cross and k.dim() else tuple(q.shape)
    for name, x in (("k", k), ("v", v)):
        if (x.shape, x.dtype, x.device) != (shape, q.dtype, q.device):
            raise ValueError(
                f"{name} must be as q, {shape} {q.dtype} on {q.device}, "
                f"got {tuple(x.shape)} {x.dtype} on {x.device}"
            )
    pairs = (("cu_seqlens", cu_seqlens), ("cu_seqlens_k", cu_seqlens_k))
    for name, bounds in pairs:
        if bounds.dim() != 1 or bounds.dtype != torch.int32 or bounds.device != q.device:
            raise ValueError(
                f"{name} must be (n_seqs + 1,) torch.int32 on {q.device}, "
                f"got {tuple(bounds.shape)} {bounds.dtype} on {bounds.device}"
            )
