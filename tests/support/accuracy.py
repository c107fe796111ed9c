"""How close is close enough: measured against float64, never chosen by hand."""

import pytest
import torch
from torch import Tensor

from fastbert.kernels.linear import can_prepack


def assert_as_accurate(out: Tensor, baseline: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """Hold `out` to `factor` times the error of plain torch in the same dtype."""
    assert (out.shape, out.dtype) == (baseline.shape, baseline.dtype)
    rounding = torch.finfo(out.dtype).eps * exact.abs().max()
    allowed = factor * (baseline - exact).abs().max() + rounding
    error = (out - exact).abs().max()
    assert error <= allowed, f"error {error:.3g} is over the allowed {allowed:.3g}"


def relative_error(out: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value wanted."""
    return ((out - wanted).abs().max() / wanted.abs().max()).item()


def prepacks_bfloat16():
    """Whether oneDNN takes bfloat16 on this CPU, be it emulated, which needs AVX-512."""
    return can_prepack() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


BFLOAT16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not prepacks_bfloat16(), reason="oneDNN has no bfloat16 on this CPU"),
)
