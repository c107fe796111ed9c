"""x @ weight.T + bias on a CPU, with weights laid out beforehand for its matrix instructions."""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels.gelu import ACTIVATIONS

# What oneDNN computes while a tile of the product is still in registers: (attr, algorithm).
_POINTWISE = {
    None: ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
}


@cache
def native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; oneDNN's emulation is slower than float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@cache
def can_prepack() -> bool:
    """Whether this build of torch has oneDNN's prepacked product."""
    ops = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and hasattr(ops, "_reorder_linear_weight")


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None = None) -> Tensor:
    out = F.linear(x, weight, bias)
    return out if activation is None else ACTIVATIONS[activation](out)


@dataclass(frozen=True)
class Prepacked:
    """A weight in oneDNN's own layout. No gradients; does not follow changes of the weight."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor) -> "Prepacked":
        """weight: (out_features, in_features), bias: (out_features,), float32 or bfloat16."""
        # The number of rows is a hint for the layout: 16 to 1,024 are equally fast, 1 is slower.
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 512)
        return cls(packed, bias.detach().contiguous())

    def linear(self, x: Tensor, activation: str | None = None) -> Tensor:
        """activation(x @ weight.T + bias). x: (n_rows, in_features), n_rows > 0."""
        attr, algorithm = _POINTWISE[activation]
        return torch.ops.mkldnn._linear_pointwise.default(
            x, self.weight, self.bias, attr, [], algorithm
        )

    def linear_add(self, x: Tensor, other: Tensor) -> Tensor:
        """x @ weight.T + bias + other, added in registers. other: (n_rows, out_features)."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")
