"""Softmax attention on packed sequences: each token attends to the tokens of its own sequence."""

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor


def runs_of(bounds: Sequence[int]) -> list[tuple[int, int]]:
    """(n_seqs, length) of neighbouring sequences of one length, of `cu_seqlens` as a list."""
    lengths = (b - a for a, b in pairwise(bounds))
    runs = [(sum(1 for _ in group), length) for length, group in groupby(lengths)]
    return [(n_seqs, length) for n_seqs, length in runs if length]


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    causal: bool = False,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
) -> Tensor:
    runs = runs_of(cu_seqlens.tolist())
    return attend(q, k, v, runs, causal, dropout_p, softmax_scale)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: list[tuple[int, int]],
    causal: bool = False,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
) -> Tensor:
    """The reference with the sequences given as `runs_of` does."""
    # Neighbours of one length are one call: 1.7 to 1.9 times as fast as a call a sequence, and
    # level with two products and a softmax between (benchmarks/README.md).
    if not runs:
        return torch.empty_like(q)
    sizes = [n_seqs * length for n_seqs, length in runs]
    out = []
    for (n_seqs, length), *qkv in zip(runs, *(x.split(sizes) for x in (q, k, v)), strict=True):
        shape = (n_seqs, length, *q.shape[1:])
        heads = [x.view(shape).transpose(1, 2) for x in qkv]  # (n_seqs, n_heads, length, head_dim)
        run = F.scaled_dot_product_attention(
            heads[0], heads[1], heads[2], None, dropout_p, causal, scale=softmax_scale
        )
        out.append(run.transpose(1, 2).flatten(0, 1))
    return torch.cat(out) if len(out) > 1 else out[0]


def attention_weights_ref(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float | None = None,
) -> Tensor:
    """The weights themselves: (n_seqs, n_heads, max_seqlen, max_seqlen), zeros at padding.

    q, k: (n_tokens, n_heads, head_dim). Slow and large: for those who ask to see them.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    bounds = cu_seqlens.tolist()
    weights = []
    for start, stop in pairwise(bounds):
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) * scale
        padding = max_seqlen - (stop - start)
        weights.append(F.pad(scores.softmax(-1), (0, padding, 0, padding)))
    return torch.stack(weights) if weights else q.new_zeros(0, q.shape[1], max_seqlen, max_seqlen)


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
) -> Tensor: ...
def attention(*args, causal=False, dropout_p=0.0, softmax_scale=None):
    """softmax(q k^T * softmax_scale) v within each sequence (Vaswani et al. 2017).

    Arguments are (qkv, cu_seqlens, max_seqlen) or (q, k, v, cu_seqlens, max_seqlen).
    qkv: (n_tokens, 3, n_heads, head_dim). q, k, v: (n_tokens, n_heads, head_dim) of one shape and
    dtype, any row stride, last axis contiguous. cu_seqlens: (n_seqs + 1,) int32 from 0 to n_tokens.
    max_seqlen: length of the longest sequence. softmax_scale: head_dim ** -0.5 when None.
    Returns (n_tokens, n_heads, head_dim).
    """
    *tensors, cu_seqlens, max_seqlen = args
    if len(tensors) == 1:
        (qkv,) = tensors
        if qkv.dim() != 4 or qkv.shape[1] != 3:
            raise ValueError(
                f"qkv must be (n_tokens, 3, n_heads, head_dim), got {tuple(qkv.shape)}"
            )
        tensors = list(qkv.unbind(1))
    elif len(tensors) != 3:
        raise TypeError(
            "attention takes (qkv, cu_seqlens, max_seqlen) or (q, k, v, cu_seqlens, max_seqlen), "
            f"got {len(args)} arguments"
        )
    q, k, v = tensors
    if q.dim() != 3:
        raise ValueError(f"q must be (n_tokens, n_heads, head_dim), got {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if (x.shape, x.dtype) != (q.shape, q.dtype):
            raise ValueError(
                f"{name} must be as q, {tuple(q.shape)} {q.dtype}, got {tuple(x.shape)} {x.dtype}"
            )
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            "cu_seqlens must be (n_seqs + 1,) int32, "
            f"got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    return attention_ref(
        q, k, v, cu_seqlens, max_seqlen,
        causal=causal, dropout_p=dropout_p, softmax_scale=softmax_scale,
    )  # fmt: skip
