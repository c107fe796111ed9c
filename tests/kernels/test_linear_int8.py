import numpy as np
import pytest
import torch
from accuracy import assert_as_accurate

from fastbert.kernels import linear_int8
from fastbert.kernels.gelu import ACTIVATIONS
from fastbert.kernels.linear_int8 import (
    PrepackedInt8,
    linear_int8_ref,
    quantize_weight,
    why_no_int8,
)

runs_here = pytest.mark.skipif(why_no_int8() is not None, reason=str(why_no_int8()))


def made(n_rows, n_in, n_out):
    x, weight, bias = torch.randn(n_rows, n_in), torch.randn(n_out, n_in), torch.randn(n_out)
    return x * torch.rand(n_rows, 1).add(0.1), weight, bias


def by_hand(x, weight, bias):
    """In float64, all of it: rows to 0 .. 127, outputs of the weight to -127 .. 127."""
    x, weight, bias = (t.double().numpy() for t in (x, weight, bias))
    least = x.min(1, keepdims=True)
    x_scale = (x.max(1, keepdims=True) - least) / 127
    weight_scale = np.abs(weight).max(1, keepdims=True) / 127
    numbers, weights = np.floor((x - least) / x_scale + 0.5), np.rint(weight / weight_scale)
    return torch.from_numpy((numbers * x_scale + least) @ (weights * weight_scale).T + bias)


# One row, one tile and more; sizes that are no multiple of a tile.
@runs_here
@pytest.mark.parametrize("n_rows, n_in, n_out", [(1, 384, 1152), (17, 50, 33), (200, 64, 64)])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@torch.no_grad()
def test_as_by_hand(n_rows, n_in, n_out, activation):
    x, weight, bias = made(n_rows, n_in, n_out)
    packed = PrepackedInt8.of(*quantize_weight(weight), bias)
    exact = by_hand(x, weight, bias)
    baseline = linear_int8_ref(x, *quantize_weight(weight), bias)
    if activation is not None:
        exact, baseline = ACTIVATIONS[activation](exact), ACTIVATIONS[activation](baseline)
    assert_as_accurate(packed.linear(x, activation), baseline, exact, factor=4.0)


@runs_here
@torch.no_grad()
def test_near_the_float_product():
    """No further than half a step of every number can bring it."""
    x, weight, bias = made(64, 384, 96)
    out = PrepackedInt8.of(*quantize_weight(weight), bias).linear(x).double()
    x, weight = x.double(), weight.double()
    x_half = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / 254
    weight_half = weight.abs().amax(1, keepdim=True) / 254
    allowed = x_half * weight.abs().sum(1) + (x.abs() + x_half).sum(1)[:, None] * weight_half.T
    error = (out - (x @ weight.T + bias)).abs()
    assert (error <= allowed).all()
    assert error.norm() / out.norm() < 0.02


@runs_here
@torch.no_grad()
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_numbers_do_not_overflow(sign):
    """Eight bits of both would, in the 16 bits that CPUs without VNNI add two products in."""
    x, weight = torch.ones(5, 512), torch.full((64, 512), sign)
    x[:, 0] = 0.0
    out = PrepackedInt8.of(*quantize_weight(weight), torch.zeros(64)).linear(x)
    torch.testing.assert_close(out, torch.full((5, 64), 511 * sign))


@runs_here
@torch.no_grad()
def test_rows_of_one_value_are_exact():
    _, weight, bias = made(1, 96, 64)
    numbers, scale = quantize_weight(weight)
    x = torch.tensor([[-2.5], [0.0], [7.0]]).expand(-1, 96)
    out = PrepackedInt8.of(numbers, scale, bias).linear(x)
    exact = x.double() @ (numbers.double() * scale.double()[:, None]).T + bias.double()
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-5)


@runs_here
@torch.no_grad()
def test_rows_do_not_depend_on_each_other():
    x, weight, bias = made(40, 96, 64)
    packed = PrepackedInt8.of(*quantize_weight(weight), bias)
    out = packed.linear(x)
    assert torch.equal(packed.linear(x[7:8]), out[7:8])
    x[3], x[4], x[5, 9] = x[3] * 1000, 0.0, float("nan")
    other = packed.linear(x)
    same = [i for i in range(40) if i not in (3, 4, 5)]
    assert torch.equal(other[same], out[same])
    assert torch.equal(other[4], bias)
    assert other[5].isnan().all()


@runs_here
@torch.no_grad()
def test_adds_the_residual():
    x, weight, bias = made(17, 50, 33)
    packed, other = PrepackedInt8.of(*quantize_weight(weight), bias), torch.randn(17, 33)
    kept = other.clone()
    torch.testing.assert_close(packed.linear_add(x, other), packed.linear(x) + other)
    assert torch.equal(other, kept)


def test_weights_have_a_scale_for_each_output():
    weight = torch.tensor([[1.0, -2.54], [0.0, 0.0], [100.0, 127.0]])
    numbers, scale = quantize_weight(weight)
    assert numbers.dtype == torch.int8
    assert numbers.tolist() == [[50, -127], [0, 0], [100, 127]]
    torch.testing.assert_close(scale[[0, 2]], torch.tensor([0.02, 1.0]))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            quantize_weight(torch.tensor([[1.0, bad]]))


def test_refuses_what_it_cannot_multiply(monkeypatch):
    if why_no_int8() is None:
        with pytest.raises(ValueError, match="must be int8, float32, float32"):
            PrepackedInt8.of(torch.zeros(4, 8), torch.ones(4), torch.zeros(4))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    why_no_int8.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"an x86 CPU with AVX2, got .*SVE256"):
            linear_int8.PrepackedInt8.of(*quantize_weight(torch.ones(4, 8)), torch.zeros(4))
    finally:
        why_no_int8.cache_clear()
