import pytest
import torch
from accuracy import assert_as_accurate

from fastbert.kernels.layer_norm import layer_norm


def formula(x, weight, bias, residual, eps):
    x = x + residual
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    return (x - mean) / (var + eps).sqrt() * weight + bias


# 768 is BERT-base; 100 leaves masked lanes; (1, 1) is the edge.
@pytest.mark.parametrize("n_rows, n_cols", [(5, 768), (3, 100), (1, 1), (0, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_the_formula(n_rows, n_cols, dtype):
    if n_rows == 0:
        assert layer_norm(*(torch.ones(0, 8), torch.ones(8), torch.ones(8))).shape == (0, 8)
        return
    x, residual = torch.randn(2, n_rows, n_cols, dtype=dtype)
    weight, bias = torch.randn(2, n_cols, dtype=dtype)
    args = (x, weight, bias, residual)
    exact = formula(*(arg.double() for arg in args), 1e-5)
    assert_as_accurate(layer_norm(*args, eps=1e-5), formula(*args, 1e-5), exact)


def test_dropout_leaves_the_residual():
    x, residual = torch.zeros(64, 32), torch.randn(64, 32)
    weight, bias = torch.ones(32), torch.zeros(32)
    plain = layer_norm(residual, weight, bias)
    assert torch.equal(layer_norm(x, weight, bias, residual, dropout_p=0.5), plain)
    assert not torch.equal(layer_norm(x + 1, weight, bias, residual, dropout_p=0.5), plain)


@pytest.mark.parametrize(
    "weight, residual, message",
    [
        (torch.ones(7), None, r"weight and bias must have shape \(8,\), got \(7,\)"),
        (torch.ones(8), torch.ones(3, 8), r"residual must be \(4, 8\) as x, got \(3, 8\)"),
    ],
)
def test_refuses(weight, residual, message):
    with pytest.raises(ValueError, match=message):
        layer_norm(torch.ones(4, 8), weight, torch.ones(8), residual)
