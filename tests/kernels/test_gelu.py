import math

import pytest
import torch
from accuracy import assert_as_accurate

from fastbert.kernels.gelu import bias_gelu


def formula(x, bias):
    x = x + bias
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_the_formula(dtype):
    x, bias = 4 * torch.randn(33, 100, dtype=dtype), torch.randn(100, dtype=dtype)
    exact = formula(x.double(), bias.double())
    assert_as_accurate(bias_gelu(x, bias), formula(x, bias), exact)


def test_refuses():
    with pytest.raises(ValueError, match=r"bias must have shape \(8,\), got \(4,\)"):
        bias_gelu(torch.ones(2, 8), torch.ones(4))
