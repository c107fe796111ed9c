"""Inference on a CPU: a layer's weights prepacked, its modules' calls left out.

A plan is used where nothing can tell the difference: no gradients, no training, no hooks, plain
modules. Everywhere else the layer runs its modules one by one. Int8 layers are planned as others
are; own CPU kernels would have their place here, too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.int8 import Int8Linear, join
from fastbert.kernels.attention import attend, runs_of
from fastbert.kernels.layer_norm import layer_norm
from fastbert.kernels.linear import Prepacked, can_prepack, native_bfloat16
from fastbert.kernels.linear_int8 import PrepackedInt8
from fastbert.watch import Watch, any_global_hooks

# Every number of rows that oneDNN meets costs it 0.5 ms a product the first time and 0.6 MB for
# good, up to 1,024 of them, and the holes between them keep freed tensors from being used again:
# sizes that rose by one row cost 2 GB in 300 batches (torch 2.13). So pieces are rounded up to a
# few sizes. A batch is cut between sequences, as 8,192 tokens at once are 5% slower than 2,048.
_PIECE = 2048
# Int8 products leave a scale, a bias and an activation to passes of their own, which are next to
# nothing where rows are still in the cache of the core that made them.
_PIECE_INT8 = 256


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
        or any_global_hooks()
        or not can_prepack()
    )


def run(plans: Sequence[LayerPlan], x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Pass packed tokens, (n_tokens, hidden), through layers, a piece of the batch at a time."""
    dtype, out = plans[0].dtype, []
    for start, stop, bounds in _pieces(cu_seqlens.tolist(), plans[0].most_rows):
        n_rows = stop - start
        rounded = _rounded(n_rows)
        piece = x.new_empty(rounded, x.shape[1], dtype=dtype)
        piece[:n_rows] = x[start:stop]
        piece[n_rows:] = 0
        if rounded > n_rows:
            bounds.append(rounded)  # the rows that fill up are a sequence of their own
        runs = runs_of(bounds)
        for plan in plans:
            piece = plan(piece, runs)
        out.append(piece[:n_rows].to(x.dtype))
    return torch.cat(out) if len(out) > 1 else out[0]


def _pieces(bounds: list[int], most: int) -> Iterator[tuple[int, int, list[int]]]:
    """Cut between sequences into parts of about equal size: first token, last + 1, cu_seqlens."""
    n_pieces = -(-bounds[-1] // most)
    first = 0
    for i in range(1, n_pieces + 1):
        last = bisect_left(bounds, bounds[-1] * i / n_pieces, lo=first)
        start, stop = bounds[first], bounds[last]
        if stop > start:
            yield start, stop, [bound - start for bound in bounds[first : last + 1]]
        first = last


class LayerPlan:
    """The arithmetic of one BertLayer with weights prepacked for the CPU's matrix instructions.

    In float32, or in bfloat16 where the CPU multiplies that itself; bfloat16 weights are otherwise
    computed with in float32, which is faster than emulation and no less exact. Int8Linears multiply
    int8, and the rest is float32. most_rows: in a piece of a batch.
    """

    def __init__(self, layer: Any, watch: Watch) -> None:
        attn = layer.attention.self
        self._watch = watch
        self.dtype = layer.output.LayerNorm.weight.dtype
        if self.dtype == torch.bfloat16 and not native_bfloat16():
            self.dtype = torch.float32
        is_int8 = type(attn.query) is Int8Linear
        self.most_rows = min(_PIECE, _PIECE_INT8 * torch.get_num_threads()) if is_int8 else _PIECE
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
    def of(cls, layer: Any, known: Collection[type]) -> LayerPlan | None:
        """The plan of a BertLayer, None where one of its modules is not plain.

        known: the classes whose arithmetic this is; a module of another class is not plain.
        """
        modules = list(layer.modules())
        parameters = list(layer.parameters())
        kinds = {type(module) for module in modules}
        if kinds - set(known) or {nn.Linear, Int8Linear} <= kinds:
            return None
        dtypes = {p.dtype for p in parameters} - {torch.int8}
        if dtypes not in ({torch.float32}, {torch.bfloat16}):
            return None
        if any(p.is_inference() or p.device.type != "cpu" for p in parameters):
            return None  # inference tensors carry no version to tell that they have changed
        watch = Watch(modules)
        return cls(layer, watch) if watch.unchanged() else None

    def holds(self) -> bool:
        """Whether the layer's modules and weights are still those that were packed."""
        return self._watch.unchanged()

    def __call__(self, x: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        """(n_tokens, hidden) of `self.dtype` to the same; sequences as `runs_of` gives them."""
        qkv = self.qkv.linear(x).view(-1, *self.heads)
        mixed = attend(*qkv.unbind(1), runs).flatten(1)
        x = self._norm_of(self.attention_output.linear_add(mixed, x), self.attention_norm)
        inner = self.intermediate.linear(x, self.activation)
        return self._norm_of(self.output.linear_add(inner, x), self.output_norm)

    def _pack(self, *linears: Any) -> Prepacked | PrepackedInt8:
        if type(linears[0]) is Int8Linear:
            return join(list(linears))
        weight = torch.cat([linear.weight for linear in linears]).to(self.dtype)
        return Prepacked.of(weight, torch.cat([linear.bias for linear in linears]).to(self.dtype))

    def _norm(self, norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
        weight, bias = norm.weight.detach(), norm.bias.detach()
        return weight.to(self.dtype), bias.to(self.dtype), norm.eps

    @staticmethod
    def _norm_of(x: Tensor, norm: tuple[Tensor, Tensor, float]) -> Tensor:
        weight, bias, eps = norm
        return layer_norm(x, weight, bias, eps=eps)
