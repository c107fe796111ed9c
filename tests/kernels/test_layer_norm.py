import pytest
import torch
from accuracy import KERNEL_DTYPES, ONE_COLUMN, assert_as_accurate, assert_matches

from fastbert.kernels import _triton
from fastbert.kernels._dropout import is_kept_ref
from fastbert.kernels.layer_norm import _LAUNCHES, _layer_norm_op, layer_norm, layer_norm_ref


def formula(x, weight, bias, residual, eps):
    x = x + residual
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    return (x - mean) / (var + eps).sqrt() * weight + bias


def arguments(n_rows, n_cols, dtype=torch.float32, device="cpu"):
    sizes = (n_rows, n_cols), (n_cols,), (n_cols,), (n_rows, n_cols)
    return [torch.randn(size, dtype=dtype, device=device) for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_the_formula(dtype):
    args = arguments(5, 768, dtype)
    exact = formula(*(arg.double() for arg in args), 1e-5)
    assert_as_accurate(layer_norm_ref(*args, eps=1e-5), formula(*args, 1e-5), exact)


# 768 is BERT-base; 100 leaves masked lanes; (1, 3) is the edge; rows one more and one less than
# those at once.
@pytest.mark.parametrize(
    "n_rows, n_cols",
    [(5, 768), (9, 100), (7, 512), (3, 1025), (1, 3), pytest.param(1, 1, marks=ONE_COLUMN)],
)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("has_residual", [True, False])
def test_kernel_matches_reference(n_rows, n_cols, dtype, has_residual, device):
    args = arguments(n_rows, n_cols, dtype, device)
    assert_matches(layer_norm, layer_norm_ref, *args[: 3 + has_residual], eps=1e-5)


def test_more_rows_than_the_backward_has_programs(device, monkeypatch):
    monkeypatch.setattr("fastbert.kernels.layer_norm._MOST_PARTIALS", 3)
    assert_matches(layer_norm, layer_norm_ref, *arguments(61, 40, device=device), eps=1e-5)


def test_any_stride(device):
    x = torch.randn(6, 2, 48, device=device)[:, 1]
    residual = torch.randn(48, 6, device=device).T  # its last axis is not contiguous
    assert_matches(layer_norm, layer_norm_ref, x, *arguments(6, 48, device=device)[1:3], residual)


def test_dropout_is_the_same_forward_and_backward(device):
    """Against plain torch that is given the mask."""
    seed, p = torch.tensor([2**40 + 3], device=device), 0.25
    rows, cols = torch.arange(37, device=device), torch.arange(300, device=device)
    kept = is_kept_ref(seed, rows, 0, cols, p)

    def reference(x, weight, bias, residual):
        return layer_norm_ref(x * kept / (1 - p), weight, bias, residual, eps=1e-5)

    def kernel(x, weight, bias, residual):
        return layer_norm(x, weight, bias, residual, p, 1e-5, seed=seed)

    args = arguments(37, 300, device=device)
    assert_matches(kernel, reference, *args)
    other = layer_norm(*args, p, 1e-5, seed=seed + 1)
    assert not torch.equal(other, kernel(*args))
    assert torch.equal(kernel(*args), kernel(*args))


def test_dropout_follows_torchs_generator(device):
    args = arguments(8, 64, device=device)
    torch.manual_seed(1)
    first = layer_norm(*args, dropout_p=0.5)
    assert not torch.equal(first, layer_norm(*args, dropout_p=0.5))
    torch.manual_seed(1)
    assert torch.equal(first, layer_norm(*args, dropout_p=0.5))


def test_dropout_leaves_the_residual(device):
    x, residual = torch.zeros(64, 32, device=device), torch.randn(64, 32, device=device)
    weight, bias = torch.ones(32, device=device), torch.zeros(32, device=device)
    plain = layer_norm(residual, weight, bias)
    assert torch.equal(layer_norm(x, weight, bias, residual, dropout_p=0.5), plain)
    assert not torch.equal(layer_norm(x + 1, weight, bias, residual, dropout_p=0.5), plain)
    assert torch.equal(layer_norm(x + 1, weight, bias, residual, dropout_p=1.0), plain)


@pytest.mark.parametrize("n_cols", [_LAUNCHES[-1][0] + 1, 8])
def test_sizes_that_no_kernel_takes(n_cols, device):
    args = arguments(2 if n_cols > 8 else 0, n_cols, device=device)
    assert torch.equal(layer_norm(*args), layer_norm_ref(*args))


def test_half_precision_with_wide_weights(device):
    x, weight, bias, residual = arguments(5, 64, device=device)
    out = layer_norm(x.half(), weight, bias, residual)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, layer_norm_ref(x.half().float(), weight, bias, residual))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_operation(dropout_p, device):
    """What torch asks of an operation: schema, fake, autograd, tracing with symbolic shapes."""
    args = [arg.requires_grad_() for arg in arguments(6, 20, device=device)]
    seed = torch.tensor([5], device=device) if dropout_p else None
    torch.library.opcheck(_layer_norm_op.op, (*args, seed, dropout_p, 1e-5, torch.float32))


def test_kernel_and_plain_torch_give_the_operation_one_meaning(device, monkeypatch):
    """What it gives where kernels cannot be compiled."""
    args = arguments(6, 20, device=device)
    seed = torch.tensor([5], device=device)

    def kernel(*args):
        return layer_norm(*args, 0.5, 1e-5, seed=seed)

    def reference(*args):
        with monkeypatch.context() as patch:
            patch.setattr("fastbert.kernels.layer_norm._forward", None)
            patch.setattr(_triton, "on_kernel_device", lambda x: False)
            return _layer_norm_op(*args, seed, 0.5, 1e-5, args[0].dtype)[0]

    assert_matches(kernel, reference, *args)


def test_compiles_whole(device):
    args = [arg.requires_grad_() for arg in arguments(6, 20, device=device)]
    compiled = torch.compile(layer_norm, fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(*args).square().sum(), args) for f in (compiled, layer_norm)]
    for found, wanted in zip(*gradients, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "weight, residual, dropout_p, message",
    [
        (torch.ones(7), None, 0.0, r"weight and bias must have shape \(8,\), got \(7,\)"),
        (torch.ones(8), torch.ones(3, 8), 0.0, r"residual must be \(4, 8\) as x, got \(3, 8\)"),
        (torch.ones(8), None, 1.5, r"dropout_p must be from 0 to 1, got 1\.5"),
    ],
)
@pytest.mark.parametrize("kernels", [True, False])
def test_refuses(weight, residual, dropout_p, message, kernels, monkeypatch):
    monkeypatch.setattr(_triton, "is_interpreted", lambda: kernels)
    with pytest.raises(ValueError, match=message):
        layer_norm(torch.ones(4, 8), weight, torch.ones(8), residual, dropout_p)
