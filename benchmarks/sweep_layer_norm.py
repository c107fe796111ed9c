"""Measure launch rows of the layer norm kernels on a GPU and print the table to paste.

python benchmarks/sweep_layer_norm.py
"""

import itertools
from functools import partial

import sweep
import torch

from fastbert.kernels import layer_norm as module
from fastbert.kernels.layer_norm import _Launch, layer_norm

N_BYTES = 2**29  # of x: several times the L2 cache
DTYPE = torch.bfloat16


def steps(n_cols, row, dropout_p):
    """The forward and the backward."""
    module._LAUNCHES = ((n_cols, row, row),)
    sizes = (N_BYTES // 2 // n_cols, n_cols), (n_cols,), (n_cols,), (N_BYTES // 2 // n_cols, n_cols)
    args = [torch.randn(s, dtype=DTYPE, device=sweep.DEVICE).requires_grad_() for s in sizes]
    out = layer_norm(*args, dropout_p=dropout_p)
    dout = torch.randn_like(out)
    yield lambda: layer_norm(*args, dropout_p=dropout_p)
    yield lambda: torch.autograd.grad(out, args, dout, retain_graph=True)


def main():
    for n_cols, *old in module._LAUNCHES:
        both = {}, {}
        for block_m, num_warps in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16)):
            if not 8 <= block_m * n_cols / (32 * num_warps) <= 64:
                continue
            row = _Launch(block_m, num_warps)
            each = [
                sweep.timings((n_cols, row, p), partial(steps, n_cols, row, p), 2)
                for p in (0.0, 0.1)
            ]
            for times, found in zip(both, zip(*each, strict=True), strict=True):
                times[row] = sum(found)
        forward, backward = map(sweep.best, both, old)
        sweep.paste(f"    ({n_cols}, {forward}, {backward}),")


if __name__ == "__main__":
    sweep.run(__file__, main)
