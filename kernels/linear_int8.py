"""x @ weight.T + bias on a CPU in whole numbers of 8 bits, by oneDNN.

A weight has a scale for each output, `x` a scale and an offset for each row, found as it runs,
so that what becomes of a text does not depend on the texts beside it. The numbers of `x` are from 0
to 127: without VNNI a CPU adds two products in 16 bits, which 255 times 127 would overflow. Answers
are the same with it.
"""

import platform
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastbert.kernels.gelu import ACTIVATIONS

_MOST = 127
_TINY = 1e-30  # for the range of rows of one value


@cache
def why_no_int8() -> str | None:
    """Why this CPU or this build of torch does not multiply int8; None where it does."""
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return f"int8 wants an x86 CPU with AVX2, got {machine}"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return "this torch was built without oneDNN's int8 product"
    return None


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(out_features, in_features) to int8 from -127 to 127 and a scale for each output, float32.

    Raises ValueError where the weight is not finite.
    """
    weight = weight.detach().float()
    if not weight.isfinite().all():
        raise ValueError("int8 wants finite weights, got infinity or NaN")
    scale = weight.abs().amax(1).div_(127).clamp_min_(_TINY)
    return (weight / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def linear_int8_ref(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, activation: str | None = None
) -> Tensor:
    """The same in plain torch, exact in float64; in float32 up to 1,000 in_features."""
    least = x.amin(1, keepdim=True)
    width = (x.amax(1, keepdim=True) - least).clamp_min(_TINY)
    steps = _MOST / width
    numbers = torch.addcmul(0.5 - least * steps, x, steps).floor()
    weight, scale = weight.to(x.dtype), scale.to(x.dtype)
    out = numbers @ weight.T * scale * (width / _MOST) + least * (weight.sum(1) * scale)
    out = out + bias.to(x.dtype)
    return out if activation is None else ACTIVATIONS[activation](out)


@dataclass(frozen=True)
class PrepackedInt8:
    """A weight in oneDNN's own layout, as `fastbert.kernels.linear.Prepacked`."""

    weight: Tensor
    scale: Tensor
    zero_points: Tensor
    sums: Tensor  # of each output's weights
    bias: Tensor

    @classmethod
    def of(cls, weight: Tensor, scale: Tensor, bias: Tensor) -> "PrepackedInt8":
        """weight: (out_features, in_features) int8; scale, bias: (out_features,) float32.

        Raises ValueError on other dtypes, and where int8 cannot be multiplied here.
        """
        why = why_no_int8()
        if why is not None:
            raise ValueError(why)
        dtypes = (weight.dtype, scale.dtype, bias.dtype)
        if dtypes != (torch.int8, torch.float32, torch.float32):
            raise ValueError(f"weight, scale, bias must be int8, float32, float32, got {dtypes}")
        packed = torch.ops.onednn.qlinear_prepack(weight.detach().contiguous(), None)
        zero_points = torch.zeros(len(scale), dtype=torch.int64)
        sums = weight.sum(1) * scale.detach()
        return cls(
            packed, scale.detach().contiguous(), zero_points, sums, bias.detach().contiguous()
        )

    def linear(self, x: Tensor, activation: str | None = None) -> Tensor:
        """activation(x @ weight.T + bias). x: (n_rows, in_features) float32, n_rows > 0."""
        least = x.amin(1, keepdim=True)
        width = x.amax(1, keepdim=True).sub_(least).clamp_min_(_TINY)
        # int8 is faster to make than uint8, and the same up to 127.
        steps = _MOST / width
        numbers = torch.addcmul(0.5 - least * steps, x, steps).to(torch.int8).view(torch.uint8)
        out = torch.ops.onednn.qlinear_pointwise.default(
            numbers, 1 / _MOST, 0, self.weight, self.scale, self.zero_points,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        out = torch.addcmul(self.bias, least, self.sums).addcmul_(out, width)
        return out if activation is None else ACTIVATIONS[activation](out)

    def linear_add(self, x: Tensor, other: Tensor) -> Tensor:
        """x @ weight.T + bias + other. other: (n_rows, out_features)."""
        return self.linear(x).add_(other)
