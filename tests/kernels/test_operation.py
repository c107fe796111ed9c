"""Operations called directly and by torch's dispatcher: where which is, and that it is the same."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert.kernels.layer_norm import _layer_norm_op, layer_norm


@pytest.fixture
def args(device):
    sizes = (6, 20), (20,), (20,), (6, 20)
    return [torch.randn(size, device=device, requires_grad=True) for size in sizes]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def asked(monkeypatch):
    """Counts calls that take torch's operation."""
    calls, op = [], _layer_norm_op.op
    monkeypatch.setattr(_layer_norm_op, "op", lambda *args: (calls.append(0), op(*args))[1])
    return calls


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_both_give_the_same_bits(args, dropout_p, device):
    seed = torch.tensor([5], device=device)
    found = []
    for watched in (False, True):
        with Seen() if watched else nullcontext() as seen:
            out = layer_norm(*args, dropout_p, seed=seed)
            found.append([out.detach(), *torch.autograd.grad(out.sum(), args)])
    assert {"fastbert.layer_norm.default", "fastbert.layer_norm_backward.default"} <= {*seen.names}
    assert all(map(torch.equal, *found))


def test_eager_code_calls_it_directly(args, asked):
    layer_norm(*args).sum().backward()
    with torch.no_grad():
        layer_norm(*args)
    assert not asked


def test_a_trace_has_the_operation(args, asked):
    x, *others = (arg.detach() for arg in args)

    def loss(x):
        return layer_norm(x, *others).square().sum()

    traced = torch.jit.trace(loss, (x,), check_trace=False)
    assert len(asked) == 1
    other = torch.randn_like(x)
    assert torch.equal(traced(other), loss(other))


# Also where what comes from behind is a constant.
@pytest.mark.parametrize("loss", [torch.Tensor.square, lambda out: 3 * out])
def test_a_second_derivative_is_refused(args, loss):
    (dx,) = torch.autograd.grad(loss(layer_norm(*args)).sum(), args[:1], create_graph=True)
    assert dx.requires_grad
    with pytest.raises(RuntimeError, match="layer_norm_backward"):
        dx.square().sum().backward()


class Nothing(torch.autograd.Function):
    """Whose gradient is none at all."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        return None


def test_where_no_gradient_comes_none_goes_on(args):
    hidden = layer_norm(*args)
    (hidden.sum() + Nothing.apply(layer_norm(*args)).sum()).backward()
    found = [x.grad.clone() for x in args]
    wanted = torch.autograd.grad(layer_norm(*args).sum(), args)
    assert all(map(torch.equal, found, wanted))


def test_batched_and_negated_tensors(args):
    x, *others = args
    out = layer_norm(*args)
    douts = torch.randn(3, *out.shape, device=out.device)
    (batched,) = torch.autograd.grad(out, x, douts, retain_graph=True, is_grads_batched=True)
    for dout, dx in zip(douts, batched, strict=True):
        assert torch.equal(dx, torch.autograd.grad(out, x, dout, retain_graph=True)[0])
    with torch.no_grad():
        assert torch.equal(layer_norm(torch._neg_view(x), *others), layer_norm(-x, *others))


def test_saved_tensors_pass_through_hooks(args):
    wanted = torch.autograd.grad(layer_norm(*args).sum(), args)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (packed.append(x.shape), x.clone())[1], lambda x: x
    ):
        out = layer_norm(*args)
    assert len(packed) >= 4
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), args), wanted))
