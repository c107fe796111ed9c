"""Inference on a CPU: a layer's weights prepacked, its modules' calls left out.

A plan is used where nothing can tell the difference: no gradients, no training, no hooks, plain
modules. Everywhere else the layer runs its modules one by one. Other ways to compute a layer, int8
or own CPU kernels, have their place here.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastbert.kernels.attention import attention
from fastbert.kernels.layer_norm import layer_norm
from fastbert.kernels.linear import Prepacked, can_prepack, native_bfloat16

if TYPE_CHECKING:
    from fastbert.layers import BertLayer


# Every number of rows that oneDNN meets costs it 0.5 ms a product the first time and, for good, as
# much memory as the product's result (measured with torch 2.13: 2 GB after 300 batches of different
# size). So batches are cut into pieces, between sequences, and pieces rounded up to a few sizes.
# 1,024 to 4,096 tokens a piece are equally fast; 8,192 are 7% slower (L2 of 2 MB a core).
_PIECE = 1024


def _rounded(n_rows: int) -> int:
    step = 8 if n_rows <= 64 else 16 if n_rows <= 256 else 32
    return -(-n_rows // step) * step


def can_plan(x: Tensor, training: bool) -> bool:
    """Whether this call needs only values: no gradients, training, tracing, autocast or device."""
    return not (
        x.device.type != "cpu"
        or torch.is_grad_enabled()
        or training
        or x.dtype not in (torch.float32, torch.bfloat16)
        or x.shape[0] == 0
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or _has_any_global_hook()
        or not can_prepack()
    )


def run(plans: Sequence[LayerPlan], x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Pass packed tokens, (n_tokens, hidden), through layers, a piece of the batch at a time."""
    dtype, out = plans[0].dtype, []
    for start, stop, bounds in _pieces(cu_seqlens.tolist()):
        n_rows = stop - start
        rounded = _rounded(n_rows)
        piece = x.new_zeros(rounded, x.shape[1], dtype=dtype)
        piece[:n_rows] = x[start:stop]
        if rounded > n_rows:
            bounds.append(rounded)  # the rows that fill up are a sequence of their own
        piece_cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        longest = max(b - a for a, b in pairwise(bounds))
        for plan in plans:
            piece = plan(piece, piece_cu_seqlens, longest)
        out.append(piece[:n_rows].to(x.dtype))
    return torch.cat(out) if len(out) > 1 else out[0]


def _pieces(bounds: list[int]) -> Iterator[tuple[int, int, list[int]]]:
    """Cut between sequences into parts of about equal size: first token, last + 1, cu_seqlens."""
    n_pieces = -(-bounds[-1] // _PIECE)
    first = 0
    for i in range(1, n_pieces + 1):
        last = bisect_left(bounds, bounds[-1] * i / n_pieces, lo=first)
        start, stop = bounds[first], bounds[last]
        if stop > start:
            yield start, stop, [bound - start for bound in bounds[first : last + 1]]
        first = last


def _is_plain(module: nn.Module) -> bool:
    """Whether calling `module` does what its class says and nothing else."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


class LayerPlan:
    """The arithmetic of one BertLayer with weights prepacked for the CPU's matrix instructions.

    In float32, or in bfloat16 where the CPU multiplies that itself; bfloat16 weights are otherwise
    computed with in float32, which is faster than emulation and no less exact.
    """

    def __init__(self, layer: BertLayer, watched: list[tuple[nn.Module, type, dict]]) -> None:
        attn = layer.attention.self
        self._watched = watched
        self._state = _versions(watched)
        self._alive = [p.detach() for p in layer.parameters()]  # so that no address is used twice
        self.dtype = attn.query.weight.dtype
        if self.dtype == torch.bfloat16 and not native_bfloat16():
            self.dtype = torch.float32
        self.heads = (3, attn.num_attention_heads, attn.attention_head_size)
        self.activation = layer.intermediate.activation
        qkv = (attn.query, attn.key, attn.value)
        self.qkv = self._pack(*qkv)
        self.attention_output = self._pack(layer.attention.output.dense)
        self.intermediate = self._pack(layer.intermediate.dense)
        self.output = self._pack(layer.output.dense)
        self.attention_norm = self._norm(layer.attention.output.LayerNorm)
        self.output_norm = self._norm(layer.output.LayerNorm)

    @classmethod
    def of(cls, layer: BertLayer) -> LayerPlan | None:
        """The plan of a layer, None where one of its modules is not plain."""
        from fastbert.layers import BertLayer, Dropout, LayerNorm

        modules = list(layer.modules())
        known = type(layer) is BertLayer and all(
            type(m) in (nn.Linear, LayerNorm, Dropout) or type(m).__module__ == BertLayer.__module__
            for m in modules
        )
        parameters = list(layer.parameters())
        same = len({p.dtype for p in parameters}) == 1
        if not (known and same and all(map(_is_plain, modules))):
            return None
        if any(p.is_inference() or p.device.type != "cpu" for p in parameters):
            return None  # inference tensors carry no version to tell that they have changed
        return cls(layer, [(m, type(m), dict(m._modules)) for m in modules])

    def holds(self, layer: BertLayer) -> bool:
        """Whether the layer's modules and weights are still those that were packed."""
        for module, kind, children in self._watched:
            if type(module) is not kind or module._modules != children:
                return False
            if not _is_plain(module):
                return False
        return _versions(self._watched) == self._state

    def __call__(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """(n_tokens, hidden) of `self.dtype` to the same."""
        qkv = self.qkv.linear(x).unflatten(1, self.heads)
        mixed = attention(qkv, cu_seqlens, max_seqlen).flatten(1)
        x = self._add_norm(self.attention_output.linear(mixed), x, self.attention_norm)
        inner = self.intermediate.linear(x, self.activation)
        return self._add_norm(self.output.linear(inner), x, self.output_norm)

    def _pack(self, *linears: nn.Linear) -> Prepacked:
        weight = torch.cat([linear.weight for linear in linears]).to(self.dtype)
        return Prepacked.of(weight, torch.cat([linear.bias for linear in linears]).to(self.dtype))

    def _norm(self, norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
        weight, bias = norm.weight.detach(), norm.bias.detach()
        return weight.to(self.dtype), bias.to(self.dtype), norm.eps

    @staticmethod
    def _add_norm(x: Tensor, residual: Tensor, norm: tuple[Tensor, Tensor, float]) -> Tensor:
        weight, bias, eps = norm
        return layer_norm(x, weight, bias, residual, eps=eps)


def _versions(watched: list[tuple[nn.Module, type, dict]]) -> list[tuple[int, int]]:
    return [
        (p.data_ptr(), p._version)
        for module, _, _ in watched
        for p in module._parameters.values()
        if p is not None
    ]
