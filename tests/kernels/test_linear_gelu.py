from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate, assert_matches, outcome

from fastbert.kernels import _triton
from fastbert.kernels import linear_gelu as module
from fastbert.kernels.gelu import ACTIVATIONS, bias_gelu_ref
from fastbert.kernels.linear_gelu import (
    _LAUNCH,
    _TMA_LAUNCHES,
    _linear_gelu_op,
    linear_gelu,
    linear_gelu_ref,
)

DTYPES = [torch.float16]  # float32 is plain torch's; the interpreter's bfloat16 is wrong
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)


def arguments(n_tokens, n_in, n_out, dtype=torch.float16, device="cpu"):
    sizes = (n_tokens, n_in), (n_out, n_in), (n_out,)
    x, weight, bias = (torch.randn(size, dtype=dtype, device=device) for size in sizes)
    return x, weight / n_in**0.5, bias


def fused(x, weight, bias=None, activation="gelu"):
    """The operation; like the reference where dtypes are such that kernels are not asked."""
    if x.dtype == torch.float64:
        return linear_gelu_ref(x, weight, bias, activation)
    return _linear_gelu_op(x, weight, bias, activation, True)[0]


@pytest.fixture
def by_pointers(monkeypatch):
    monkeypatch.setattr(module, "_takes_descriptors", lambda *tensors: False)


def test_the_reference_is_a_product_and_an_activation(device):
    args = arguments(5, 40, 24, torch.float32)
    x, weight, bias = (arg.double() for arg in args)
    exact = bias_gelu_ref(x @ weight.T, bias)
    assert_as_accurate(linear_gelu_ref(*args), F.gelu(F.linear(*args)), exact)


# One token; tokens, features in and out one less, none and one more than a tile has; the last in
# sizes that are no multiples of 16 bytes, which are loaded through pointers.
@pytest.mark.parametrize(
    "n_tokens, n_in, n_out",
    [(1, 64, 128), (63, 56, 120), (64, 64, 256), (65, 72, 136), (127, 33, 127), (129, 31, 129)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_matches_reference(n_tokens, n_in, n_out, dtype, device):
    assert_matches(fused, linear_gelu_ref, *arguments(n_tokens, n_in, n_out, dtype, device))


@pytest.mark.parametrize("n_tokens, n_in, n_out", [(127, 24, 120), (129, 40, 136), (1, 8, 8)])
def test_pointers_match_reference(n_tokens, n_in, n_out, device, by_pointers):
    assert_matches(fused, linear_gelu_ref, *arguments(n_tokens, n_in, n_out, device=device))


# The launches for more tokens, on few: at their edges, and with more tiles than programs.
@pytest.mark.parametrize("launch", [launch for _, launch in _TMA_LAUNCHES])
def test_every_launch(launch, device, monkeypatch):
    monkeypatch.setattr(module, "_TMA_LAUNCHES", ((2**31, launch),))
    args = arguments(2 * launch.block_m + 1, 72, 2 * launch.block_n + 8, device=device)
    assert_matches(fused, linear_gelu_ref, *args)


def test_the_sizes_above_are_at_the_edges_of_tiles():
    first = _TMA_LAUNCHES[0][1]
    assert (first.block_m, first.block_n, first.block_k) == (64, 128, 64)
    assert (_LAUNCH.block_m, _LAUNCH.block_n, _LAUNCH.block_k) == (128, 128, 32)


@pytest.mark.parametrize("descriptors", [True, False])
def test_every_tile_is_computed(descriptors, device, monkeypatch):
    """More rows of tiles than a group has, and a last group that is not full."""
    small = module._Launch(16, 16, 16, 4, 2, 1)
    monkeypatch.setattr(module, "_TMA_LAUNCHES", ((2**31, small),))
    monkeypatch.setattr(module, "_LAUNCH", small)
    if not descriptors:
        monkeypatch.setattr(module, "_takes_descriptors", lambda *tensors: False)
    args = arguments(16 * 11 + 3, 16, 16 * 3, device=device)
    assert_matches(fused, linear_gelu_ref, *args)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("descriptors", [True, False])
def test_activations_without_a_bias(activation, descriptors, device, monkeypatch):
    if not descriptors:
        monkeypatch.setattr(module, "_takes_descriptors", lambda *tensors: False)
    args = arguments(9, 16, 24, device=device)[:2]
    options = {"bias": None, "activation": activation}
    assert_matches(fused, linear_gelu_ref, *args, **options)


def test_any_stride(device):
    x, weight, bias = arguments(6, 48, 40, device=device)
    wide = torch.randn(6, 2, 48, device=device).half()
    assert_matches(fused, linear_gelu_ref, wide[:, 1], weight, bias)
    assert_matches(fused, linear_gelu_ref, x.T.contiguous().T, weight.T.contiguous().T, bias)
    assert_matches(fused, linear_gelu_ref, x[:1].expand(6, -1), weight, bias)
    shifted = torch.randn(6 * 48 + 1, device=device).half()[1:].view(6, 48)  # not at 16 bytes
    assert_matches(fused, linear_gelu_ref, shifted, weight, bias)


def test_the_product_is_kept_or_computed_again(device):
    args = [arg.requires_grad_() for arg in arguments(9, 16, 24, device=device)]
    gradients = []
    for has_product in (True, False):
        out, product = _linear_gelu_op(*args, "gelu", has_product)
        assert product.shape == (out.shape if has_product else (0,))
        gradients.append(torch.autograd.grad(out.square().sum(), args))
    torch.testing.assert_close(*gradients)


def test_only_gradients_that_are_asked_for(device):
    x, weight, bias = arguments(9, 16, 24, device=device)
    x.requires_grad_()
    out, _ = _linear_gelu_op(x, weight, bias, "gelu", True)
    (found,) = torch.autograd.grad(out.sum(), x)
    wanted = outcome(fused, [x, weight, bias], torch.ones_like(out))[1]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("has_product", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_operation(has_product, dtype, device):
    """What torch asks of an operation: schema, fake, autograd, tracing with symbolic shapes."""
    args = [arg.requires_grad_() for arg in arguments(6, 16, 24, dtype, device)]
    torch.library.opcheck(_linear_gelu_op.op, (*args, "gelu", has_product))


def test_kernel_and_plain_torch_give_the_operation_one_meaning(device, monkeypatch):
    """What it gives where kernels cannot be compiled."""
    args = arguments(6, 16, 24, device=device)
    found = _linear_gelu_op(*args, "gelu", True)
    monkeypatch.setattr(_triton, "on_kernel_device", lambda x: False)
    plain = _linear_gelu_op(*args, "gelu", True)
    x, weight, bias = (arg.double() for arg in args)
    exact = linear_gelu_ref(x, weight, bias), x @ weight.T
    for triple in zip(found, plain, exact, strict=True):
        assert_as_accurate(*triple)


# float32 keeps what the kernels' own float32 gives; both ways that the public function has.
@pytest.mark.parametrize("faster", [True, False])
def test_public(faster, device, monkeypatch):
    monkeypatch.setattr(module, "_is_faster", lambda *args: faster)
    for dtype in (torch.float32, torch.float16):
        args = arguments(9, 16, 24, dtype, device)
        assert_matches(linear_gelu, linear_gelu_ref, *args)
    x, weight, bias = args
    assert_matches(linear_gelu, linear_gelu_ref, x.view(3, 3, 16), weight, bias)
    with torch.autocast(device.type, torch.float16):
        out = linear_gelu(*(arg.float() for arg in args))
    assert out.dtype == torch.float16
    exact = linear_gelu_ref(*(arg.double() for arg in args))
    assert_as_accurate(out, linear_gelu_ref(*args), exact)


@pytest.mark.parametrize("faster", [True, False])
def test_compiles_whole(faster, device, monkeypatch):
    monkeypatch.setattr(module, "_is_faster", lambda *args: faster)
    args = [arg.requires_grad_() for arg in arguments(6, 16, 24, device=device)]
    compiled = torch.compile(linear_gelu, fullgraph=True, backend="aot_eager")
    gradients = [
        torch.autograd.grad(f(*args).square().sum(), args) for f in (compiled, linear_gelu)
    ]
    for found, wanted in zip(*gradients, strict=True):
        assert torch.equal(found, wanted)


def test_no_tokens(device):
    args = [arg.requires_grad_() for arg in arguments(0, 8, 16, device=device)]
    out = linear_gelu(*args)
    assert out.shape == (0, 16)
    out.sum().backward()
    assert not args[1].grad.any()


def test_what_was_measured_decides(monkeypatch):
    """By the GPU, the features and the number of tokens; a GPU is stood in for."""
    tensor = partial(torch.empty, device="meta", dtype=torch.bfloat16)

    class OnGpu:
        device = torch.device("cuda", 0)

        def __init__(self, *shape):
            self.shape, self.numel = shape, tensor(shape).numel

    properties = type("Properties", (), {"name": "GPU"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(module, "_FASTER", {("GPU", 16, 64): (100, 200)})
    weight = tensor(64, 16)
    assert [module._is_faster(OnGpu(n, 16), weight, torch.bfloat16) for n in (99, 100, 201)] == [
        False, True, False,
    ]  # fmt: skip
    assert not module._is_faster(OnGpu(100, 16), weight, torch.float32)
    assert not module._is_faster(OnGpu(100, 32), tensor(64, 32), torch.bfloat16)
    assert not module._is_faster(tensor(100, 16), weight, torch.bfloat16)


@pytest.mark.parametrize(
    "weight, bias, activation, message",
    [
        ((4, 7), 4, "gelu", r"weight must have shape \(out_features, 8\), got \(4, 7\)"),
        ((8,), 4, "gelu", r"weight must have shape \(out_features, 8\), got \(8,\)"),
        ((4, 8), 8, "gelu", r"bias must have shape \(4,\), got \(8,\)"),
        ((4, 8), 4, "swish", "activation must be one of gelu, .*, got 'swish'"),
    ],
)
@pytest.mark.parametrize("kernels", [True, False])
def test_refuses(weight, bias, activation, message, kernels, monkeypatch):
    monkeypatch.setattr(_triton, "is_interpreted", lambda: kernels)
    with pytest.raises(ValueError, match=message):
        linear_gelu(torch.ones(2, 8), torch.ones(weight), torch.ones(bias), activation)
