"""Linear layer + cross entropy of the MLM head, against plain torch and Liger Kernel."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from fastbert.kernels.cross_entropy import (
    _LAUNCHES,
    linear_cross_entropy,
    linear_cross_entropy_ref,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHARE_LABELLED = 0.15


def fastbert(x, weight, bias, labels):
    return linear_cross_entropy(x, weight, bias, labels).loss


def all_positions(x, weight, bias, labels):
    return F.cross_entropy(F.linear(x, weight, bias), labels)


def labelled_positions(x, weight, bias, labels):
    rows = (labels != -100).nonzero().squeeze(1)
    return all_positions(x[rows], weight, bias, labels[rows])


def liger(x, weight, bias, labels):
    """On labelled positions: the others it would only multiply by zero."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    rows = (labels != -100).nonzero().squeeze(1)
    return liger_fused_linear_cross_entropy(x[rows], weight, labels[rows], bias)


NEEDS_LIGER = pytest.mark.skipif(
    DEVICE.type != "cuda" or find_spec("liger_kernel") is None,
    reason="needs a GPU and liger-kernel",
)
PROVIDERS = {
    "fastbert": fastbert,
    "torch, all positions": all_positions,
    "torch, labelled positions": labelled_positions,
    "torch.compile, all positions": torch.compile(all_positions, dynamic=False),
    "torch.compile, labelled positions": torch.compile(labelled_positions, dynamic=True),
    "liger-kernel": liger,
}


def least_flops(n_labelled, hidden, n_classes, *, backward):
    """The logits; with a backward, their gradient times the weight and times x."""
    return (6 if backward else 2) * n_labelled * hidden * n_classes


def least_bytes(x, weight, n_labelled, *, backward):
    """Forward: labelled rows of x and the weight in. Backward: the gradients of both out."""
    forward = n_labelled * x[0].nbytes + weight.nbytes
    return forward + backward * (x.nbytes + weight.nbytes)


def arguments(n_tokens, hidden, n_classes, dtype, device=DEVICE):
    torch.manual_seed(0)
    x = torch.randn(n_tokens, hidden, dtype=dtype, device=device)
    weight = 0.02 * torch.randn(n_classes, hidden, dtype=dtype, device=device)
    bias = torch.zeros(n_classes, dtype=dtype, device=device)
    labels = torch.randint(n_classes, (n_tokens,), device=device)
    labels[torch.rand(n_tokens, device=device) >= SHARE_LABELLED] = -100
    return [t.requires_grad_() for t in (x, weight, bias)], labels


# BERT-base and -large, and the 119,547 words of the multilingual one.
SIZES = [(768, 30522), (1024, 30522), (768, 119547)]


@pytest.mark.parametrize("hidden, n_classes", SIZES if DEVICE.type == "cuda" else SIZES[:1])
@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize(
    "provider",
    [
        pytest.param(name, marks=NEEDS_LIGER) if name == "liger-kernel" else name
        for name in PROVIDERS
        if DEVICE.type == "cuda" or not name.startswith("torch.compile")
    ],
)
def bench_cross_entropy(timed, provider, direction, hidden, n_classes):
    n_tokens = 32768 if DEVICE.type == "cuda" else 512
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    tensors, labels = arguments(n_tokens, hidden, n_classes, dtype)
    backward = direction != "forward"

    def step():
        loss = PROVIDERS[provider](*tensors, labels)
        return torch.autograd.grad(loss, tensors) if backward else loss

    with torch.set_grad_enabled(backward):
        # On a part, as all logits at once are large.
        part = tensors[0][:256], *tensors[1:], labels[:256]
        wanted = linear_cross_entropy_ref(*part).loss
        torch.testing.assert_close(PROVIDERS[provider](*part).float(), wanted, rtol=2e-2, atol=2e-2)
        n_labelled = int((labels != -100).sum())
        timed(
            step,
            f"linear + cross entropy, {hidden} to {n_classes}, {SHARE_LABELLED:.0%} labelled, "
            f"{direction}",
            provider=provider,
            tokens=n_tokens,
            flops=least_flops(n_labelled, hidden, n_classes, backward=backward),
            bytes=least_bytes(tensors[0], tensors[1], n_labelled, backward=backward),
        )


def launch_all(dtype):
    """Every kernel with every launch row and flag."""
    for n_cols in (30522, *(most + 1 for most, _ in _LAUNCHES[:-1])):
        for label_smoothing in (0.0, 0.1):
            for reduction in ("mean", "none"):
                tensors, labels = arguments(32, 16, n_cols, dtype, "cpu")
                labels[0] = 1  # at least one
                options = {"label_smoothing": label_smoothing, "reduction": reduction}
                linear_cross_entropy(*tensors, labels, **options).loss.sum().backward()
