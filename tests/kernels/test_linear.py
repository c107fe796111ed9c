import pytest
import torch
from accuracy import BFLOAT16, assert_as_accurate

from fastbert.kernels.gelu import ACTIVATIONS
from fastbert.kernels.linear import Prepacked, can_prepack, linear_ref

pytestmark = pytest.mark.skipif(not can_prepack(), reason="torch was built without oneDNN")


# 1 and 17 rows, one tile and more; sizes that are no multiple of a tile.
@pytest.mark.parametrize("n_rows, n_in, n_out", [(1, 384, 1152), (17, 50, 33), (200, 64, 64)])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@torch.no_grad()
def test_prepacked_is_as_accurate_as_plain(n_rows, n_in, n_out, activation, dtype):
    x, weight = torch.randn(n_rows, n_in, dtype=dtype), torch.randn(n_out, n_in, dtype=dtype)
    args = (x, weight, torch.randn(n_out, dtype=dtype))
    out = Prepacked.of(*args[1:]).linear(x, activation)
    exact = linear_ref(*(arg.double() for arg in args), activation)
    # factor 4: one row is a matrix-vector product to torch, which sums in blocks, not in a chain
    assert_as_accurate(out, linear_ref(*args, activation), exact, factor=4.0)


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@torch.no_grad()
def test_prepacked_adds_the_residual(dtype):
    x, weight, other = (torch.randn(*n, dtype=dtype) for n in ((17, 50), (33, 50), (17, 33)))
    args, kept = (x, weight, torch.randn(33, dtype=dtype)), other.clone()
    out = Prepacked.of(*args[1:]).linear_add(x, other)
    exact = linear_ref(*(arg.double() for arg in args)) + other.double()
    assert_as_accurate(out, linear_ref(*args) + other, exact, factor=4.0)
    assert torch.equal(other, kept)
