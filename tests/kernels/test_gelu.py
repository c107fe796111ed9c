import math
from functools import partial

import pytest
import torch
from accuracy import KERNEL_DTYPES, ONE_COLUMN, assert_as_accurate, assert_matches

from fastbert.kernels import _triton
from fastbert.kernels.gelu import (
    _BACKWARD,
    _FORWARD,
    ACTIVATIONS,
    _bias_gelu_op,
    bias_gelu,
    bias_gelu_backward,
    bias_gelu_ref,
)


def exact_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMULAS = {
    "gelu": exact_gelu,
    "gelu_new": tanh_gelu,
    "gelu_pytorch_tanh": tanh_gelu,
    "relu": lambda x: x.clamp(min=0),
}


def arguments(n_rows, n_cols, dtype=torch.float32, device="cpu"):
    return [
        2 * torch.randn(size, dtype=dtype, device=device) for size in ((n_rows, n_cols), n_cols)
    ]


def test_activations_are_those_of_the_config():
    from fastbert.config import HIDDEN_ACTS

    assert tuple(ACTIVATIONS) == HIDDEN_ACTS == tuple(FORMULAS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_the_formula(activation, dtype):
    x, bias = arguments(33, 100, dtype)
    formula = FORMULAS[activation]
    exact = formula(x.double() + bias.double())
    assert_as_accurate(bias_gelu_ref(x, bias, activation), formula(x + bias), exact)


# Rows and columns one less and more than the blocks of the forward; 4 rows are the backward's.
@pytest.mark.parametrize(
    "n_rows, n_cols",
    [(9, 513), (7, 511), (5, 512), (8, 100), (1, 3), pytest.param(1, 1, marks=ONE_COLUMN)],
)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_kernel_matches_reference(n_rows, n_cols, dtype, has_bias, device):
    args = arguments(n_rows, n_cols, dtype, device)
    if has_bias:
        assert_matches(bias_gelu, bias_gelu_ref, *args)
    else:
        assert_matches(bias_gelu, bias_gelu_ref, *args[:1], bias=None)


def test_the_sizes_above_are_at_the_edges_of_blocks():
    assert (_FORWARD.block_m, _BACKWARD.block_m) == (8, 4)
    assert _FORWARD.block_n == _BACKWARD.block_n == 512


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_activations(activation, dtype, device):
    args = arguments(40, 70, dtype, device)
    assert_matches(bias_gelu, bias_gelu_ref, *args, activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_float16(activation, device):
    """Forward and backward, in float32, of all numbers that float16 has, infinities and NaN too."""
    x = torch.arange(2**16).to(torch.int16).view(torch.float16).float().to(device)
    x = x.view(64, -1).requires_grad_()
    out, exact = bias_gelu(x, None, activation), bias_gelu_ref(x.double(), None, activation)
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in (out, exact)]
    assert_close = partial(torch.testing.assert_close, rtol=3e-7, atol=2e-7, equal_nan=True)
    assert_close(out, exact.float())
    assert_close(*gradients)


def test_the_tail_is_better_than_one_plus_erf(device):
    """Where 1 + erf cancels, what is left is right to a few parts in a thousand."""
    x = torch.linspace(-6, -1, 1000, device=device)
    exact = x.double() * torch.special.ndtr(x.double())
    assert ((bias_gelu(x, None) - exact) / exact).abs().max() < 5e-3


def test_more_rows_than_the_backward_has_programs(device, monkeypatch):
    monkeypatch.setattr("fastbert.kernels.gelu._MOST_PARTIALS", 5)
    assert_matches(bias_gelu, bias_gelu_ref, *arguments(61, 600, device=device))


def test_any_stride_and_shape(device):
    bias = torch.randn(48, device=device)
    assert_matches(bias_gelu, bias_gelu_ref, torch.randn(6, 2, 48, device=device)[:, 1], bias)
    assert_matches(bias_gelu, bias_gelu_ref, torch.randn(48, 6, device=device).T, bias)
    assert_matches(bias_gelu, bias_gelu_ref, torch.randn(2, 3, 48, device=device), bias)
    assert_matches(bias_gelu, bias_gelu_ref, torch.randn(48, device=device), bias)
    wide = torch.randn(96, device=device)[::2]
    assert_matches(bias_gelu, bias_gelu_ref, torch.randn(6, 48, device=device), wide)


def test_no_rows(device):
    args = [arg.requires_grad_() for arg in arguments(0, 8, device=device)]
    out = bias_gelu(*args)
    assert out.shape == (0, 8)
    out.sum().backward()
    assert torch.equal(args[1].grad, torch.zeros(8, device=device))


def test_half_precision_with_a_wide_bias(device):
    x, bias = arguments(5, 64, device=device)
    out, wanted = (f(x.half(), bias) for f in (bias_gelu, bias_gelu_ref))
    assert out.dtype == wanted.dtype == torch.float16
    exact = bias_gelu_ref(x.half().double(), bias.double())
    assert_as_accurate(out, wanted, exact)


@pytest.mark.parametrize("has_bias", [True, False])
def test_operations(has_bias, device):
    """What torch asks of an operation: schema, fake, autograd, tracing with symbolic shapes."""
    x, bias = (arg.requires_grad_() for arg in arguments(6, 20, device=device))
    bias = bias if has_bias else None
    torch.library.opcheck(_bias_gelu_op.op, (x, bias, "gelu"))
    dout, bias = torch.ones_like(x), None if bias is None else bias.detach()
    torch.library.opcheck(bias_gelu_backward.op, (dout, x.detach(), bias, "gelu"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernel_and_plain_torch_give_the_operation_one_meaning(activation, device, monkeypatch):
    """What it gives where kernels cannot be compiled."""

    def reference(x, bias, activation):
        with monkeypatch.context() as patch:
            patch.setattr("fastbert.kernels.gelu._forward", None)
            patch.setattr(_triton, "on_kernel_device", lambda x: False)
            return _bias_gelu_op(x, bias, activation)

    x, bias = arguments(6, 20, device=device)
    assert_matches(bias_gelu, reference, x, bias, activation=activation)
    found = bias_gelu_backward(x.cos(), x, bias, activation)
    monkeypatch.setattr(_triton, "on_kernel_device", lambda x: False)
    torch.testing.assert_close(found, bias_gelu_backward(x.cos(), x, bias, activation))


def test_compiles_whole(device):
    args = [arg.requires_grad_() for arg in arguments(6, 20, device=device)]
    compiled = torch.compile(bias_gelu, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(*args).square().sum(), args) for f in (compiled, bias_gelu)]
    for found, wanted in zip(*gradients, strict=True):
        assert torch.equal(found, wanted)


def test_runs_are_the_same_bit_for_bit(device, monkeypatch):
    monkeypatch.setattr("fastbert.kernels.gelu._MOST_PARTIALS", 3)
    args = arguments(40, 30, device=device)
    first, second = (bias_gelu_backward(args[0], *args, "gelu") for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    "bias, activation, message",
    [
        (torch.ones(4), "gelu", r"bias must have shape \(8,\), got \(4,\)"),
        (None, "swish", "activation must be one of gelu, gelu_new, .*, relu, got 'swish'"),
    ],
)
@pytest.mark.parametrize("kernels", [True, False])
def test_refuses(bias, activation, message, kernels, monkeypatch):
    monkeypatch.setattr(_triton, "is_interpreted", lambda: kernels)
    with pytest.raises(ValueError, match=message):
        bias_gelu(torch.ones(2, 8), bias, activation)
