import pytest
import torch
import torch.nn.functional as F
from accuracy import KERNEL_DTYPES, assert_as_accurate, assert_matches, outcome
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastbert.kernels import _triton, cross_entropy
from fastbert.kernels.cross_entropy import (
    _forward,
    _forward_ref,
    _Launch,
    _linear_cross_entropy_backward_op,
    _linear_cross_entropy_op,
    linear_cross_entropy,
    linear_cross_entropy_ref,
)


def arguments(n_tokens, n_classes, dtype=torch.float32, device="cpu", hidden=24):
    """[x, weight, bias] and labels, of which every third is ignored."""
    sizes = (n_tokens, hidden), (n_classes, hidden), (n_classes,)
    labels = torch.randint(n_classes, (n_tokens,), device=device)
    labels[1::3] = -100
    return [torch.randn(size, dtype=dtype, device=device) for size in sizes], labels


def assert_loss_matches(tensors, labels, reference=linear_cross_entropy_ref, **options):
    """x, weight and perhaps bias: loss and gradients against the reference, counts exactly."""

    def loss_of(function):
        def loss(x, weight, bias=None):
            return function(x, weight, bias, labels, **options).loss

        return loss

    assert_matches(loss_of(linear_cross_entropy), loss_of(reference), *tensors)
    x, weight, bias = [*tensors, None][:3]
    found = linear_cross_entropy(x, weight, bias, labels, **options)
    wanted = linear_cross_entropy_ref(x, weight, bias, labels, **options)
    assert found.loss.dtype == torch.float32
    for a, b in zip(found[1:], wanted[1:], strict=True):
        assert a.dtype == torch.int64 and torch.equal(a, b)


def formula(x, weight, bias, labels, smoothing):
    """Cross entropy between softmax and labels of which `smoothing` is spread over all classes."""
    logits = x @ weight.T + bias
    wanted = torch.full_like(logits, smoothing / logits.shape[1])
    wanted[torch.arange(len(labels)), labels] += 1 - smoothing
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    return -(wanted * p.log()).sum() / len(labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_reference_is_the_formula(smoothing):
    tensors, labels = arguments(9, 13)
    labelled = labels != -100

    def of_formula(x, weight, bias):
        return formula(x[labelled], weight, bias, labels[labelled], smoothing)

    def of_reference(x, weight, bias):
        return linear_cross_entropy_ref(x, weight, bias, labels, label_smoothing=smoothing).loss

    assert_matches(of_reference, of_formula, *tensors)
    out = linear_cross_entropy_ref(*tensors, labels)
    right = [i for i, l in enumerate(labels) if l == F.linear(*tensors)[i].argmax()]
    assert (int(out.n_correct), int(out.n_labelled)) == (len(right), int(labelled.sum()))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_kernel_matches_reference(dtype, reduction, label_smoothing, device):
    tensors, labels = arguments(11, 70, dtype, device)
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    assert_loss_matches(tensors, labels, **options)


# Columns below, at and above a block of 64 and two of them, so that lanes are masked, and padded
# columns are in a block of their own; a single class; a single token.
@pytest.mark.parametrize(
    "n_tokens, n_classes",
    [(4, 63), (4, 64), (4, 65), (4, 127), (4, 129), (4, 1), (1, 70)],
)
def test_block_edges(n_tokens, n_classes, device, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_LAUNCHES", ((2**31 - 1, _Launch(64, 4)),))
    assert_loss_matches(*arguments(n_tokens, n_classes, device=device), label_smoothing=0.1)
    assert_loss_matches(*arguments(n_tokens, n_classes, device=device), reduction="none")


def test_every_launch_row(device):
    for n_classes in (49153, 98305):
        tensors, labels = arguments(3, n_classes, device=device, hidden=16)
        assert_loss_matches(tensors, labels)


# 10 of 15 rows are labelled: 1, 3, 4, or 10 at a time, the last chunk often shorter.
@pytest.mark.parametrize("most_rows", [1, 3, 4, 10])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_chunks(most_rows, dtype, reduction, device, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_MOST_LOGITS", 128 * most_rows)
    assert_loss_matches(*arguments(15, 100, dtype, device), reduction=reduction)


def test_without_bias(device):
    (x, weight, _), labels = arguments(7, 70, device=device)
    assert_loss_matches([x, weight], labels)
    assert_loss_matches([x, weight], labels, reduction="none")


def test_another_ignore_index(device):
    """Also one that is a class, which then is never labelled."""
    tensors, labels = arguments(12, 5, device=device)
    labels[labels == -100] = 3
    assert_loss_matches(tensors, labels, ignore_index=3)


def test_any_stride(device):
    (_, _, bias), labels = arguments(6, 20, device=device)
    x = torch.randn(6, 2, 24, device=device)[:, 1]
    weight = torch.randn(24, 20, device=device).T
    labels = torch.stack([labels, labels], 1)[:, 0]
    assert_loss_matches([x, weight, bias], labels)
    assert_loss_matches([x.T.contiguous().T, weight, bias], labels)


@pytest.mark.parametrize("n_tokens", [0, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_labelled(n_tokens, reduction, device):
    """A mean of nothing is nan; gradients are zero, as torch's."""
    tensors, labels = arguments(n_tokens, 70, device=device)
    labels.fill_(-100)

    def loss_of(function):
        return lambda *tensors: function(*tensors, labels, reduction=reduction).loss

    dout = torch.ones(n_tokens if reduction == "none" else (), device=device)
    found = outcome(loss_of(linear_cross_entropy), tensors, dout)
    wanted = outcome(loss_of(linear_cross_entropy_ref), tensors, dout)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)
    assert linear_cross_entropy(*tensors, labels).n_labelled == 0


def test_positions_that_are_not_labelled_change_nothing(device):
    tensors, labels = arguments(9, 70, device=device)
    other = tensors[0].clone()
    other[labels == -100] = float("nan")
    first, second = (
        outcome(
            lambda *tensors: linear_cross_entropy(*tensors, labels).loss,
            [x, *tensors[1:]],
            torch.ones((), device=device),
        )
        for x in (tensors[0], other)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert not first[1][labels == -100].any()


def test_ties_go_to_the_first_class(device, monkeypatch):
    """Within a block, and between blocks and lanes."""
    monkeypatch.setattr(cross_entropy, "_LAUNCHES", ((2**31 - 1, _Launch(64, 4)),))
    x, weight = torch.ones(1, 1, device=device), torch.zeros(200, 1, device=device)
    for first, second in [(3, 5), (3, 67), (5, 67), (70, 195)]:
        weight.zero_()[[first, second]] = 2.0
        for label in (first, second, 0):
            out = linear_cross_entropy(x, weight, None, torch.tensor([label], device=device))
            assert out.n_correct == (label == first)
    weight.zero_()
    assert linear_cross_entropy(x, weight, None, torch.tensor([0], device=device)).n_correct == 1


# Beside logits that are all low, those that only pad a row are not.
@pytest.mark.parametrize("scale, offset", [(1e3, 0.0), (1.0, -200.0)])
def test_extreme_and_banned_logits(scale, offset, device):
    """Nothing overflows, and a class that a bias of -inf bans has no share."""
    (x, weight, bias), labels = arguments(8, 70, device=device)
    bias += offset
    bias[11] = -float("inf")
    labels[labels == 11] = 12

    def loss_of(function):
        return lambda x, weight: function(x, weight, bias, labels).loss

    one = torch.ones((), device=device)
    found = outcome(loss_of(linear_cross_entropy), [scale * x, weight], one)
    wanted = outcome(loss_of(linear_cross_entropy_ref), [scale * x, weight], one)
    for a, b in zip(found, wanted, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_gradients_that_are_needed(reduction, device):
    tensors, labels = arguments(8, 70, device=device)
    all_of_them = outcome(
        lambda *t: linear_cross_entropy(*t, labels, reduction=reduction).loss.sum(),
        tensors,
        torch.ones((), device=device),
    )[1:]
    for i, gradient in enumerate(all_of_them):
        leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate(tensors)]
        linear_cross_entropy(*leaves, labels, reduction=reduction).loss.sum().backward()
        assert [leaf.grad is None for leaf in leaves] == [i != j for j in range(3)]
        assert torch.equal(leaves[i].grad, gradient)


def test_no_work_for_gradients_in_evaluation(device, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_add_product", None)
    tensors, labels = arguments(8, 70, device=device)
    tensors = [t.requires_grad_() for t in tensors]
    with torch.no_grad():
        linear_cross_entropy(*tensors, labels)
    linear_cross_entropy(*(t.detach() for t in tensors), labels)
    with pytest.raises(TypeError):
        linear_cross_entropy(*tensors, labels)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor made within."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.nbytes = max([self.nbytes, *(getattr(x, "nbytes", 0) for x in tree_leaves(out))])
        return out


def test_logits_are_never_whole(device, monkeypatch):
    """80 rows of 1,000 logits, 16 at a time; in plain torch these once more in float32."""
    monkeypatch.setattr(cross_entropy, "_MOST_LOGITS", 16 * 1024)
    tensors, labels = arguments(120, 1000, torch.float16, device, hidden=4)
    for path, most in [(_forward, 16 * 1024 * 2), (_forward_ref, 16 * 1000 * 4)]:
        with Largest() as largest:
            path(*tensors, labels, -100, 0.0, "mean", [True, True, True])
        assert largest.nbytes == most
    with Largest() as largest:
        linear_cross_entropy_ref(*tensors, labels)
    assert largest.nbytes == 120 * 1000 * 4  # so the measure works


def test_mean_in_half_precision_keeps_small_gradients(device):
    """Gradients of logits divided by n_labelled would be a few of float16's smallest numbers."""
    (x, weight, bias), _ = arguments(100, 40, torch.float16, device)
    labels = torch.randint(4, (100,), device=device)
    bias[4:] = -10.0

    def loss(bias):
        return linear_cross_entropy(x, 1e-3 * weight, bias, labels).loss

    def exact_loss(bias):
        exact = (x.double(), 1e-3 * weight.double(), bias)
        return linear_cross_entropy_ref(*exact, labels).loss

    one = torch.ones((), device=device)
    exact = outcome(exact_loss, [bias.double()], one)[1][4:]
    found = outcome(loss, [bias], one)[1][4:]
    assert_as_accurate(found, exact.half(), exact)


def test_half_precision_with_wide_weights(device):
    """As under autocast: the product is in the dtype of x, gradients are in each one's own."""
    tensors, labels = arguments(8, 70, device=device)
    x = tensors[0].half()
    leaves = [t.requires_grad_() for t in (x, *tensors[1:])]
    out = linear_cross_entropy(*leaves, labels)
    halves = [t.detach().half().requires_grad_() for t in leaves]
    wanted = linear_cross_entropy(*halves, labels)
    assert torch.equal(out.loss, wanted.loss)
    gradients = torch.autograd.grad(out.loss, leaves)
    assert [g.dtype for g in gradients] == [torch.float16, torch.float32, torch.float32]
    for found, half in zip(gradients, torch.autograd.grad(wanted.loss, halves), strict=True):
        assert torch.equal(found.half(), half)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction, device):
    tensors, labels = arguments(8, 70, device=device)
    leaves = [t.requires_grad_() for t in tensors]
    halves = [t.detach().half().requires_grad_() for t in leaves]
    with torch.autocast(device.type, torch.float16):
        found = linear_cross_entropy(*leaves, labels, reduction=reduction).loss
    wanted = linear_cross_entropy(*halves, labels, reduction=reduction).loss
    assert torch.equal(found, wanted)
    found = torch.autograd.grad(found.sum(), leaves)
    for a, b in zip(found, torch.autograd.grad(wanted.sum(), halves), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a.half(), b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_by_differences(reduction):
    """float64, which no kernel takes."""
    tensors, labels = arguments(6, 5, torch.float64, hidden=3)

    def loss(*tensors):
        options = {"label_smoothing": 0.2, "reduction": reduction}
        return linear_cross_entropy(*tensors, labels, **options).loss

    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in tensors])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_operation(reduction, device):
    """What torch asks of an operation: schema, fake, autograd, tracing with symbolic shapes."""
    tensors, labels = arguments(6, 20, device=device)
    leaves = [t.requires_grad_() for t in tensors]
    wanted = [reduction != "none"] * 3
    args = (*leaves, labels, -100, 0.1, reduction, wanted)
    torch.library.opcheck(_linear_cross_entropy_op.op, args)


def test_backward_operation(device):
    tensors, labels = arguments(6, 20, device=device)
    args = (torch.randn(6, device=device), *tensors, labels, -100, 0.1, [True, False, True])
    torch.library.opcheck(_linear_cross_entropy_backward_op.op, args)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_kernel_and_plain_torch_give_the_operation_one_meaning(reduction, device, monkeypatch):
    """What it gives where kernels cannot be compiled, and on a CPU."""

    def plain(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(_triton, "on_kernel_device", lambda x: False)
            return linear_cross_entropy(*args, **options)

    options = {"label_smoothing": 0.1, "reduction": reduction}
    for dtype in KERNEL_DTYPES:
        tensors, labels = arguments(6, 70, dtype, device)
        assert_loss_matches(tensors, labels, reference=plain, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_whole(reduction, device):
    tensors, labels = arguments(6, 20, device=device)
    leaves = [t.requires_grad_() for t in tensors]
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    found, wanted = (
        f(*leaves, labels, reduction=reduction) for f in (compiled, linear_cross_entropy)
    )
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    gradients = [torch.autograd.grad(out.loss.sum(), leaves) for out in (found, wanted)]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_meta(reduction):
    tensors, labels = arguments(6, 20, device="meta")
    x = tensors[0].requires_grad_()
    out = linear_cross_entropy(*tensors, labels, reduction=reduction)
    assert out.loss.shape == (() if reduction == "mean" else (6,))
    out.loss.sum().backward()
    assert x.grad.shape == x.shape


BAD = [
    ({"x": torch.ones(4, 7)}, r"x and weight must be .* got \(4, 7\) and \(9, 8\)"),
    ({"x": torch.ones(8)}, r"x and weight must be .* got \(8,\)"),
    ({"bias": torch.ones(8)}, r"bias must be \(9,\), got \(8,\)"),
    ({"labels": torch.ones(3).long()}, r"labels must be \(4,\) int64, got \(3,\) torch\.int64"),
    ({"labels": torch.ones(4)}, r"labels must be \(4,\) int64, got \(4,\) torch\.float32"),
    ({"labels": torch.tensor([0, 9, 1, 1])}, "labels must be from 0 to 8 or .* -100, got 9"),
    ({"labels": torch.tensor([0, -1, 1, 1])}, "labels must be from 0 to 8 or .* -100, got -1"),
    ({"label_smoothing": 1.5}, r"label_smoothing must be from 0 to 1, got 1\.5"),
    ({"reduction": "max"}, "reduction must be mean, sum or none, got 'max'"),
]


@pytest.mark.parametrize("change, message", BAD)
@pytest.mark.parametrize("kernels", [True, False])
def test_refuses(change, message, kernels, monkeypatch):
    monkeypatch.setattr(_triton, "is_interpreted", lambda: kernels)
    args = {
        "x": torch.ones(4, 8),
        "weight": torch.ones(9, 8),
        "bias": torch.ones(9),
        "labels": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**args | change)


def test_labels_that_are_no_class_make_the_loss_nan_on_a_gpu(device, monkeypatch):
    every_row = torch.arange(3, device=device)
    monkeypatch.setattr(cross_entropy, "_labelled_rows", lambda *_: every_row)
    tensors, labels = arguments(3, 20, device=device)
    for wrong in (-1, 20, 2**40):
        labels[:] = torch.tensor([1, wrong, 2])
        losses = linear_cross_entropy(*tensors, labels, reduction="none").loss
        assert losses.isnan().tolist() == [False, True, False]
