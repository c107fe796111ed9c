"""Measure launch rows of the pooling kernels on a GPU and print the rows to paste.

python benchmarks/sweep_pooling.py
"""

import itertools
from functools import partial

import sweep
import torch
from bench_encoder import lognormal
from bench_pooling import arguments

from fastbert.kernels import pooling as module
from fastbert.kernels.pooling import _Launch, pool

MANY, DTYPE = 2048, torch.bfloat16  # texts


def steps(mode, normalize):
    """Forward and backward, on many short texts and on some of 512 tokens."""
    for lengths in (lognormal(MANY, 40, longest=512), [512] * (MANY // 16)):
        x, cu_seqlens = arguments(lengths, 1024, DTYPE, sweep.DEVICE)
        out = pool(x.requires_grad_(), cu_seqlens, mode, normalize)
        dout = torch.randn_like(out)
        yield lambda x=x, cu=cu_seqlens: pool(x, cu, mode, normalize)
        yield lambda x=x, out=out, dout=dout: torch.autograd.grad(out, x, dout, retain_graph=True)


def best(name, rows, mode, normalize):
    times, old = {}, getattr(module, name)
    for row in rows:
        setattr(module, name, row)
        times[row] = sum(sweep.timings((mode, row), partial(steps, mode, normalize), 4))
    row = sweep.best(times, old)
    setattr(module, name, row)
    sweep.paste(f"{name} = {row}")


def main():
    sizes = itertools.product((8, 16, 32, 64), (64, 128, 256, 512), (1, 2, 4, 8))
    rows = [_Launch(m, n, w) for m, n, w in sizes if 8 <= m * n / (32 * w) <= 64]
    best("_POOL", rows, "max", False)
    sizes = itertools.product((256, 512, 1024, 2048), (1, 2, 4, 8))
    best("_NORMALIZE", [_Launch(1, n, w) for n, w in sizes], "mean", True)


if __name__ == "__main__":
    sweep.run(__file__, main)
