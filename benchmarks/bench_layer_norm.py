"""Layer norm of dropout(x) + residual, against plain torch and against what memory allows."""

import pytest
import torch

from fastbert.kernels.layer_norm import _LAUNCHES, layer_norm, layer_norm_ref

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROVIDERS = {"fastbert": layer_norm, "torch": layer_norm_ref}
if DEVICE.type == "cuda":
    PROVIDERS["torch.compile"] = torch.compile(layer_norm_ref)


def least_bytes(x, *, backward=False, drops=False):
    """Forward: x and residual in, one out. Backward: these and dout in, the gradient of the sum
    out, which is that of both, or with dropout two gradients."""
    return (4 + drops if backward else 3) * x.nbytes


def arguments(n_tokens, hidden, dtype, device=DEVICE):
    sizes = (n_tokens, hidden), (hidden,), (hidden,), (n_tokens, hidden)
    return [torch.randn(size, dtype=dtype, device=device).requires_grad_() for size in sizes]


@pytest.mark.parametrize("hidden", [384, 768, 1024])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_layer_norm(timed, provider, direction, dropout_p, hidden):
    n_tokens = 65536 if DEVICE.type == "cuda" else 2048
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    args = arguments(n_tokens, hidden, dtype)
    backward = direction == "backward"

    def forward():
        return PROVIDERS[provider](*args, dropout_p=dropout_p, eps=1e-12)

    if not dropout_p:
        torch.testing.assert_close(forward(), layer_norm_ref(*args), rtol=2e-2, atol=2e-2)
    out = forward()
    dout = torch.randn_like(out)
    with torch.set_grad_enabled(backward):
        timed(
            (lambda: torch.autograd.grad(out, args, dout, retain_graph=True))
            if backward
            else forward,
            f"layer norm + residual, {hidden} columns, dropout {dropout_p}, {direction}",
            provider=provider,
            bytes=least_bytes(args[0], backward=backward, drops=dropout_p > 0),
        )


def launch_all(dtype):
    """Every kernel with every launch row and flag."""
    for n_cols, _, _ in _LAUNCHES:
        for n_tensors in (3, 4):
            for dropout_p in (0.0, 0.1):
                args = arguments(64, n_cols, dtype, "cpu")[:n_tensors]
                layer_norm(*args, dropout_p=dropout_p).sum().backward()
