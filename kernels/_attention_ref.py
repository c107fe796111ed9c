"""Softmax attention on packed sequences in plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels._dropout import dropout, dropout_arguments, is_kept_ref


def runs_of(bounds: Sequence[int]) -> list[tuple[int, int]]:
    """(n_seqs, length) of neighbouring sequences of one length, of `cu_seqlens` as a list."""
    return [(n_seqs, length) for n_seqs, length, _ in _runs_of(bounds, bounds)]


def _runs_of(bounds: Sequence[int], key_bounds: Sequence[int]) -> list[tuple[int, int, int]]:
    """(n_seqs, length, key_length) of neighbours of one length and one number of keys."""
    lengths = zip(*([b - a for a, b in pairwise(x)] for x in (bounds, key_bounds)), strict=True)
    runs = [(sum(1 for _ in group), *pair) for pair, group in groupby(lengths)]
    return [run for run in runs if run[1] or run[2]]


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
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    bounds = cu_seqlens.tolist()
    runs = _runs_of(bounds, bounds if cu_seqlens_k is None else cu_seqlens_k.tolist())
    return attend(q, k, v, runs, causal, dropout_p, softmax_scale)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: Sequence[tuple[int, ...]],
    causal: bool = False,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
) -> Tensor:
    """The reference with the sequences given as `runs_of` does, a number of keys after a length
    where that differs."""
    # Neighbours of one length are one call: 1.7 to 1.9 times as fast as a call a sequence, and
    # level with two products and a softmax between (benchmarks/README.md).
    if not runs:
        return torch.empty_like(q)
    out = []
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    for (_, *lengths), *parts in _split(runs, q, k, v):
        length, key_length = lengths[0], lengths[-1]
        heads = [x.transpose(1, 2) for x in parts]  # (n_seqs, n_heads, length, head_dim)
        mask, n_blind = None, 0 if key_length else length  # the first queries that see no key
        if causal and length != key_length:
            n_blind = max(length - key_length, 0)
            if length < key_length:
                mask = _seen(length, key_length, q.device)
        run = heads[0][:, :, n_blind:]
        if n_blind < length and dropout_p:  # torch's own draws bits slowly, and looks for -inf
            scores = (run * scale) @ heads[1].mT
            if causal:
                is_seen = _seen(length - n_blind, key_length, q.device) if mask is None else mask
                scores = scores.masked_fill(~is_seen, -math.inf)
            run = dropout(scores.softmax(-1), dropout_p) @ heads[2]
        elif n_blind < length:
            run = F.scaled_dot_product_attention(
                run, heads[1], heads[2], mask, dropout_p,
                causal and mask is None, scale=scale,
            )  # fmt: skip
        if n_blind:
            run = F.pad(run, (0, 0, n_blind, 0))
        out.append(run.transpose(1, 2).flatten(0, 1))
    return torch.cat(out) if len(out) > 1 else out[0]


def _split(
    runs: Sequence[tuple[int, ...]], q: Tensor, k: Tensor, v: Tensor, *like_q: Tensor
) -> Iterator[tuple]:
    """A run and its part of each tensor, (n_seqs, length, ...)."""
    sizes = [n_seqs * lengths[0] for n_seqs, *lengths in runs]
    key_sizes = [n_seqs * lengths[-1] for n_seqs, *lengths in runs]
    tensors = (q, k, v, *like_q)
    parts = (x.split(key_sizes if i in (1, 2) else sizes) for i, x in enumerate(tensors))
    for run, *of_run in zip(runs, *parts, strict=True):
        yield (
            run,
            *(
                x.view(run[0], run[-1 if i in (1, 2) else 1], *x.shape[1:])
                for i, x in enumerate(of_run)
            ),
        )


def _seen(length: int, key_length: int, device: torch.device) -> Tensor:
    """What a causal query sees: the last one all keys, each one before it a key less."""
    ones = torch.ones(length, key_length, dtype=torch.bool, device=device)
    return ones.tril(key_length - length)


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


# What the operations compute, in plain torch: by the formulas, in float32 or wider, dropping what
# the kernels drop.


def forward_ref(
    q, k, v, cu_seqlens, cu_seqlens_k, seed, causal, dropout_p, scale, *schedule
):  # fmt: skip
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_zeros(q.shape[:2], dtype=torch.float32)
    runs = _runs_of(cu_seqlens.tolist(), cu_seqlens_k.tolist())
    first = 0
    for run, q_, k_, v_, out_, lse_ in _split(runs, q, k, v, out, lse):
        _, logsumexp, dropped = _weights(run, q_, k_, first, seed, causal, dropout_p, scale)
        out_.copy_(torch.einsum("nhqk,nkhd->nqhd", dropped, v_.to(dropped.dtype)))
        lse_.copy_(logsumexp.transpose(1, 2) * math.log2(math.e))
        first += run[0] * run[1]
    return out, lse.T.contiguous()


def backward_ref(
    q, k, v, dout, out, lse, into,
    cu_seqlens, cu_seqlens_k, seed, causal, dropout_p, scale, *schedule,
):  # fmt: skip
    """Writes the gradients of q, k and v to `into`."""
    runs = _runs_of(cu_seqlens.tolist(), cu_seqlens_k.tolist())
    for x in into:
        x.zero_()
    first = 0
    parts = zip(_split(runs, q, k, v, dout), _split(runs, *into), strict=True)
    for (run, *of_run), (_, dq, dk, dv) in parts:
        weights, _, dropped = _weights(run, *of_run[:2], first, seed, causal, dropout_p, scale)
        q_, k_, v_, dout_ = (x.to(weights.dtype) for x in of_run)
        dv.copy_(torch.einsum("nhqk,nqhd->nkhd", dropped, dout_))
        dscores = torch.einsum("nqhd,nkhd->nhqk", dout_, v_) * dropped
        dscores = (dscores - weights * dscores.sum(-1, keepdim=True)) * scale
        dq.copy_(torch.einsum("nhqk,nkhd->nqhd", dscores, k_))
        dk.copy_(torch.einsum("nhqk,nqhd->nkhd", dscores, q_))
        first += run[0] * run[1]


def _weights(run, q, k, first, seed, causal, dropout_p, scale):
    """Of a run whose queries are tokens `first` and on: the weights (n_seqs, n_heads, length,
    key_length), the logarithms of what they are divided by, inf where no key is seen, and the
    weights after dropout."""
    n_seqs, length, key_length = run
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("nqhd,nkhd->nhqk", q.to(wide), k.to(wide)) * scale
    if causal:
        scores = scores.masked_fill(~_seen(length, key_length, q.device), -math.inf)
    lse = scores.logsumexp(-1)
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    weights = (scores - lse[..., None]).exp()
    if seed is None:
        return weights, lse, weights
    tokens = torch.arange(first, first + n_seqs * length, device=q.device)
    keys = torch.arange(key_length, device=q.device)
    heads = range(q.shape[2])
    kept = torch.stack([is_kept_ref(seed, tokens, head, keys, dropout_p) for head in heads])
    kept = kept.view(len(heads), n_seqs, length, key_length).transpose(0, 1)
    return weights, lse, weights * kept * dropout_arguments(dropout_p)[1]
