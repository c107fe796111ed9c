"""BERT's embeddings, layer norm and dropout, against plain torch and against what memory allows."""

import pytest
import torch

from fastbert.kernels.embeddings import _LAUNCHES, embed, embed_ref

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROVIDERS = {"fastbert": embed, "torch": embed_ref}
if DEVICE.type == "cuda":
    PROVIDERS["torch.compile"] = torch.compile(embed_ref)


def least_bytes(ids, tables, *, backward=False):
    """Forward: the rows in use once, one out. Backward: these rows and dout, all gradients."""
    row = tables[0][0].nbytes
    used = sum(len(x.unique()) for x in ids)
    gradients = sum(table.nbytes for table in tables) if backward else 0
    return (used + len(ids[0])) * row + sum(x.nbytes for x in ids) + gradients


def arguments(n_tokens, hidden, dtype, device=DEVICE, sizes=(30522, 2, 512), length=128):
    """Ids of sequences of `length`, words as often as Zipf has them; tables, weight and bias."""
    torch.manual_seed(0)
    places = torch.arange(n_tokens)
    words = (sizes[0] ** torch.rand(n_tokens)).long() % sizes[0]
    words[places % length == 0] = 101 % sizes[0]
    ids = [words, places // 50 % sizes[1], places % length % sizes[2]]
    shapes = *((n, hidden) for n in sizes), (hidden,), (hidden,)
    args = [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in shapes]
    return [x.to(device) for x in ids], args


@pytest.mark.parametrize("n_tokens", [65536 if DEVICE.type == "cuda" else 2048])
@pytest.mark.parametrize("hidden", [384, 768, 1024])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_embeddings(timed, provider, direction, dropout_p, hidden, n_tokens):
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    ids, args = arguments(n_tokens, hidden, dtype)
    backward = direction == "backward"

    def forward():
        return PROVIDERS[provider](*ids, *args, dropout_p=dropout_p)

    if not dropout_p:
        torch.testing.assert_close(forward(), embed_ref(*ids, *args), rtol=5e-2, atol=5e-2)
    out = forward()
    dout = torch.randn_like(out)
    with torch.set_grad_enabled(backward):
        timed(
            (lambda: torch.autograd.grad(out, args, dout, retain_graph=True))
            if backward
            else forward,
            f"embeddings, {n_tokens} tokens, {hidden} columns, dropout {dropout_p}, {direction}",
            provider=provider,
            tokens=n_tokens,
            bytes=least_bytes(ids, args[:3], backward=backward),
        )


def launch_all(dtype):
    """Every kernel with every launch row and flag; ids sorted as 16 bits and as 32."""
    for n_cols, _, _ in _LAUNCHES:
        for dropout_p, sizes in ((0.0, (40, 2, 9)), (0.1, (40, 3, 2**15))):
            ids, args = arguments(64, n_cols, dtype, "cpu", sizes)
            embed(*ids, *args, dropout_p=dropout_p).sum().backward()
