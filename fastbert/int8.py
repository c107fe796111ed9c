"""Encoders whose linear layers are int8: for inference on a CPU, in folders of their own.

Such a folder has `model.int8.safetensors` in place of `model.safetensors`, so that nothing that
does not know of it takes whole numbers for weights. fastbert.quantization makes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.config import BertConfig
from fastbert.kernels.linear_int8 import PrepackedInt8, quantize_weight, why_no_int8
from fastbert.watch import Planned, Watch

MARK = "quantization"  # of a folder's config.json
DESCRIPTION = {
    "method": "fastbert, dynamic int8",
    "weights": "linear layers of the encoder: int8, a scale for each output",
    "inputs": "from 0 to 127, a scale and a least value for each token, found as it runs",
}
ADVICE = "int8 folders are for float32 inference on a CPU; take the folder it was made of"
_LAYER_WEIGHT = re.compile(r"\bencoder\.layer\.\d+\..*\.weight$")


class Int8Linear(Planned):
    """nn.Linear with int8 weights, for inference on a CPU: (n_rows, in_features) to
    (n_rows, out_features), float32. No gradients: an input that wants one is refused."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        empty = (
            torch.empty(out_features, in_features, dtype=torch.int8),
            torch.empty(out_features),
            torch.empty(out_features),
        )
        self.weight, self.weight_scale, self.bias = (nn.Parameter(e, False) for e in empty)
        self._plan: tuple[Watch, PrepackedInt8] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            raise ValueError(f"int8 has no gradients: {ADVICE}")
        if x.shape[0] == 0:
            return x.new_zeros(0, self.out_features)
        return self._packed().linear(x)

    def _packed(self) -> PrepackedInt8:
        if self.weight.is_inference():  # it carries no version to tell a change by
            return join([self])
        plan = self._plan  # other threads may run the same layer
        if plan is None or not plan[0].unchanged():
            self._plan = plan = Watch([self]), join([self])
        return plan[1]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def join(linears: list[Any]) -> PrepackedInt8:
    """Int8Linears of the same input as one product."""
    named = ("weight", "weight_scale", "bias")
    return PrepackedInt8.of(*(torch.cat([getattr(m, n) for m in linears]).detach() for n in named))


def is_int8(config: BertConfig) -> bool:
    """Whether the folder that this configuration was read from is an int8 one."""
    return MARK in config.extra


def has_int8(model: nn.Module) -> bool:
    return any(isinstance(module, Int8Linear) for module in model.modules())


def usual_device(config: BertConfig) -> str:
    """Where a model runs when nobody says it: on a GPU where there is one, but not in int8."""
    return "cuda" if torch.cuda.is_available() and not is_int8(config) else "cpu"


def exchange_linears(model: Any) -> None:
    """Put an Int8Linear without weights in place of each linear layer of a model's encoder.

    Raises ValueError for a decoder, and where this CPU does not multiply int8.
    """
    why = "int8 is for encoders, got a decoder" if model.config.is_decoder else why_no_int8()
    if why is not None:
        raise ValueError(why)
    for module in list(model.base_model.encoder.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(child.in_features, child.out_features))


def quantize_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors in float32, those of the encoder's linear layers in int8.

    Each `NAME.weight` in int8 has a `NAME.weight_scale` beside it. Raises ValueError where a weight
    is not finite.
    """
    out = {}
    for name, value in tensors.items():
        if value.dim() == 2 and _LAYER_WEIGHT.search(name):
            try:
                out[name], out[f"{name}_scale"] = quantize_weight(value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        else:
            out[name] = value.float() if value.is_floating_point() else value
    return out


def check_move(fn: Any) -> None:
    """Refuse what `nn.Module._apply` is about to do where int8 cannot follow it."""
    probe = fn(torch.empty(0, device="cpu", dtype=torch.float32))
    if probe.device.type != "cpu" or probe.dtype != torch.float32:
        raise ValueError(f"{ADVICE}, got {probe.device}, {probe.dtype}")
