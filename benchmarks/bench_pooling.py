"""Packed pooling to one vector a sequence, against plain torch and against what memory allows."""

import pytest
import torch
from bench_encoder import lognormal

from fastbert.kernels.pooling import MODES, pool, pool_ref

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROVIDERS = {"fastbert": pool, "torch": pool_ref}
if DEVICE.type == "cuda":
    PROVIDERS["torch.compile"] = torch.compile(pool_ref)


def least_bytes(hidden, n_seqs, mode, *, backward=False):
    """Forward: the tokens that count in, a row a sequence out. Backward: a row a sequence in, for
    a maximum the tokens too, a gradient of each token out."""
    of_rows = n_seqs * hidden[0].nbytes
    if backward:
        return of_rows + hidden.nbytes * (2 if mode == "max" else 1)
    return of_rows + (of_rows if mode == "cls" else hidden.nbytes)


def arguments(lengths, hidden, dtype, device=DEVICE):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    return torch.randn(sum(lengths), hidden, dtype=dtype, device=device), cu_seqlens


@pytest.mark.parametrize("hidden", [384, 1024])
@pytest.mark.parametrize("mode, normalize", [("mean", True), ("cls", False), ("max", False)])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_pooling(timed, provider, direction, mode, normalize, hidden):
    lengths = lognormal(2048 if DEVICE.type == "cuda" else 64, 40, longest=512)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    x, cu_seqlens = arguments(lengths, hidden, dtype)
    x.requires_grad_(direction == "backward")

    def forward():
        return PROVIDERS[provider](x, cu_seqlens, mode, normalize)

    out = forward()
    torch.testing.assert_close(out, pool_ref(x, cu_seqlens, mode, normalize))
    dout, backward = torch.randn_like(out), direction == "backward"
    timed(
        (lambda: torch.autograd.grad(out, x, dout, retain_graph=True)) if backward else forward,
        f"pooling, {mode}{', normalised' * normalize}, {hidden} columns, {direction}",
        provider=provider,
        tokens=len(x),
        bytes=least_bytes(x, len(lengths), mode, backward=backward),
    )


def launch_all(dtype):
    """Every kernel with every launch row and flag."""
    for hidden in (64, 1024):
        for mode in MODES:
            for normalize in (False, True):
                x, cu_seqlens = arguments([3, 0, 5], hidden, dtype, "cpu")
                pool(x.requires_grad_(), cu_seqlens, mode, normalize).sum().backward()
