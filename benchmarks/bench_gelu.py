"""Bias and activation, alone and after a linear layer, against plain torch and a GPU's limits."""

from itertools import product
from unittest.mock import patch

import pytest
import torch

from fastbert.kernels import linear_gelu as linear_gelu_module
from fastbert.kernels.gelu import bias_gelu, bias_gelu_ref
from fastbert.kernels.linear_gelu import (
    _TMA_LAUNCHES,
    _linear_gelu_op,
    linear_gelu,
    linear_gelu_ref,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
PROVIDERS = {"fastbert": bias_gelu, "torch": bias_gelu_ref}
LINEAR_PROVIDERS = {
    "fastbert": linear_gelu,
    "fastbert, one product": lambda *args: _linear_gelu_op(*args, "gelu", torch.is_grad_enabled())[
        0
    ],
    "torch": linear_gelu_ref,
}
if DEVICE.type == "cuda":
    PROVIDERS["torch.compile"] = torch.compile(bias_gelu_ref)
    LINEAR_PROVIDERS["torch.compile"] = torch.compile(linear_gelu_ref)


def least_bytes(x, *, backward=False):
    """Forward: x in, out out. Backward: x and dout in, dx out."""
    return (3 if backward else 2) * x.nbytes


def linear_flops(x, weight, *, backward=False):
    """Forward: one product. Backward: two. The activation is left out."""
    return (4 if backward else 2) * x.shape[0] * weight.numel()


def linear_least_bytes(x, weight, *, backward=False):
    """Forward: x and weight in, out out. Backward: these, dout and the product in, dx, dweight out.

    A forward that trains also writes the product, as much as out.
    """
    out = x.shape[0] * weight.shape[0] * x.element_size()
    return 2 * (x.nbytes + weight.nbytes + out) if backward else x.nbytes + weight.nbytes + out


def timed_step(timed, function, args, group, *, backward, **facts):
    out = function(*args)
    dout = torch.randn_like(out)
    with torch.set_grad_enabled(backward):
        timed(
            (lambda: torch.autograd.grad(out, args, dout, retain_graph=True))
            if backward
            else (lambda: function(*args)),
            group,
            **facts,
        )


@pytest.mark.parametrize("n_cols", [1536, 3072, 4096])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_bias_gelu(timed, provider, direction, n_cols):
    n_tokens = 65536 if DEVICE.type == "cuda" else 1024
    sizes = (n_tokens, n_cols), (n_cols,)
    args = [torch.randn(size, dtype=DTYPE, device=DEVICE).requires_grad_() for size in sizes]
    out = PROVIDERS[provider](*args)
    torch.testing.assert_close(out, bias_gelu_ref(*args), rtol=2e-2, atol=2e-2)
    timed_step(
        timed, PROVIDERS[provider], args, f"bias and GELU, {n_cols} columns, {direction}",
        backward=direction == "backward", provider=provider,
        bytes=least_bytes(args[0], backward=direction == "backward"),
    )  # fmt: skip


@pytest.mark.parametrize("hidden", [384, 768, 1024])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("provider", LINEAR_PROVIDERS)
def bench_linear_gelu(timed, provider, direction, hidden):
    if provider == "fastbert, one product" and DEVICE.type != "cuda":
        pytest.skip("its kernel needs a GPU")
    n_tokens = 65536 if DEVICE.type == "cuda" else 256
    sizes = (n_tokens, hidden), (4 * hidden, hidden), (4 * hidden,)
    x, weight, bias = (torch.randn(size, dtype=DTYPE, device=DEVICE) for size in sizes)
    args = [arg.requires_grad_() for arg in (x, weight / hidden**0.5, bias)]
    out = LINEAR_PROVIDERS[provider](*args)
    torch.testing.assert_close(out, linear_gelu_ref(*args), rtol=3e-2, atol=3e-2)
    backward = direction == "backward"
    timed_step(
        timed, LINEAR_PROVIDERS[provider], args, f"linear and GELU, {hidden} to 4x, {direction}",
        backward=backward, provider=provider,
        flops=linear_flops(x, weight, backward=backward),
        bytes=linear_least_bytes(x, weight, backward=backward),
    )  # fmt: skip


def launch_all(dtype):
    """Every kernel with every launch row and flag, for sizes that 16 divides, as it does BERT's."""

    def zeros(*size):
        return torch.zeros(size, dtype=dtype).requires_grad_()

    for activation, bias in product(("gelu", "gelu_new", "relu"), (zeros(1024), None)):
        bias_gelu(zeros(64, 1024), bias, activation).sum().backward()

    def linear(n_tokens, n_in, n_out, activation="gelu", has_bias=True):
        x, weight = zeros(n_tokens, n_in), zeros(n_out, n_in)
        bias = zeros(n_out) if has_bias else None
        for has_product in (False, True):
            _linear_gelu_op(x, weight, bias, activation, has_product)

    def by_all_flags(n_tokens):
        for activation in ("gelu", "gelu_new", "relu"):
            linear(n_tokens, 64, 128, activation)
        linear(n_tokens, 64, 128, has_bias=False)

    for most in (1, *(most for most, _ in _TMA_LAUNCHES[:-1])):
        by_all_flags(most + 1)
    with patch.object(linear_gelu_module, "_takes_descriptors", lambda *tensors: False):
        by_all_flags(64)
