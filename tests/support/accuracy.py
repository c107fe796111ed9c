"""How close is close enough: measured against float64, never chosen by hand."""

import torch
from torch import Tensor


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
