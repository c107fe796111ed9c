"""How close is close enough: measured against float64, never chosen by hand."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from fastbert.kernels.linear import can_prepack

# In a small case error and bar are single roundings, and plain torch's may by chance be none. What
# is wrong is wrong with other values as well: so often are they drawn before a case has failed.
DRAWS = 4


# An exact gradient of zero, of which a GPU's multiply-add leaves a rounding.
ONE_COLUMN = pytest.mark.skipif(torch.cuda.is_available(), reason="its bar is zero on a GPU")


def assert_as_accurate(out: Tensor, baseline: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """Hold `out` to `factor` times the error of plain torch in the same dtype."""
    assert (out.shape, out.dtype) == (baseline.shape, baseline.dtype)
    rounding = torch.finfo(out.dtype).eps * exact.abs().max()
    allowed = factor * (baseline - exact).abs().max() + rounding
    error = (out - exact).abs().max()
    assert error <= allowed, f"error {error:.3g} is over the allowed {allowed:.3g}"


def outcome(function: Callable[..., Tensor], tensors: list[Tensor], dout: Tensor) -> list[Tensor]:
    """What `function` gives, and the gradient of sum(dout * that) in each of `tensors`."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, dout.to(out.dtype))]


def assert_matches(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    *tensors: Tensor,
    factor: float = 2.0,
    **options: object,
) -> None:
    """Hold function(*tensors, **options), forward and backward, to `factor` times the error that
    `reference` has in the same dtype; float64 is the truth."""
    assert not any(x.isnan().any() for x in tensors)
    function, reference = partial(function, **options), partial(reference, **options)
    shape, wrong = reference(*tensors), None
    for _ in range(DRAWS):
        dout = torch.randn_like(shape)
        found, baseline = (outcome(f, list(tensors), dout) for f in (function, reference))
        exact = outcome(reference, [tensor.double() for tensor in tensors], dout)
        for i, triple in enumerate(zip(found, baseline, exact, strict=True)):
            try:
                assert_as_accurate(*triple, factor=factor)
            except AssertionError as error:
                what = "the output" if i == 0 else f"the gradient of tensor {i - 1}"
                wrong = f"{what}: {error}"
                break
        else:
            return
        if i == 0:
            break  # another gradient does not change it
        again = outcome(function, list(tensors), dout)
        assert all(map(torch.equal, again, found)), f"{wrong}, and two runs differ"
    raise AssertionError(wrong)


def relative_error(out: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value wanted."""
    return ((out - wanted).abs().max() / wanted.abs().max()).item()


def prepacks_bfloat16():
    """Whether oneDNN takes bfloat16 on this CPU, be it emulated, which needs AVX-512."""
    return can_prepack() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


# What kernels take. The interpreter's bfloat16 is wrong: it truncates.
KERNEL_DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    KERNEL_DTYPES.append(torch.bfloat16)

BFLOAT16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not prepacks_bfloat16(), reason="oneDNN has no bfloat16 on this CPU"),
)
