"""Measure launch rows of the pooling kernels on a GPU and print the rows to paste.

python -P benchmarks/sweep_pooling.py
"""

import itertools

import torch
import triton
from bench_encoder import lognormal
from bench_pooling import arguments

from fastbert.kernels import pooling as module
from fastbert.kernels.pooling import _Launch, pool


def milliseconds(mode, normalize):
    """Medians of the forward and the backward, on many short texts and on some of 512 tokens."""
    total = 0.0
    for lengths in (lognormal(2048, 40, longest=512), [512] * 128):
        x, cu_seqlens = arguments(lengths, 1024, torch.bfloat16)
        out = pool(x.requires_grad_(), cu_seqlens, mode, normalize)
        dout = torch.randn_like(out)
        steps = (
            lambda x=x, cu=cu_seqlens: pool(x, cu, mode, normalize),
            lambda x=x, out=out, dout=dout: torch.autograd.grad(out, x, dout, retain_graph=True),
        )
        total += sum(triton.testing.do_bench(step, return_mode="median") for step in steps)
    return total


def best(name, rows, mode, normalize):
    timings = []
    for row in rows:
        setattr(module, name, row)
        timings.append((milliseconds(mode, normalize), row))
        print(f"#   {row} {mode}: {timings[-1][0]:.3f} ms")
    row = min(timings, key=lambda timing: timing[0])[1]
    setattr(module, name, row)
    print(f"{name} = {row}")


def main():
    print(f"# From benchmarks/sweep_pooling.py on {torch.cuda.get_device_name()}, "
          f"torch {torch.__version__}, triton {triton.__version__}.")  # fmt: skip
    sizes = itertools.product((8, 16, 32, 64), (64, 128, 256, 512), (1, 2, 4, 8))
    rows = [_Launch(m, n, w) for m, n, w in sizes if 8 <= m * n / (32 * w) <= 64]
    best("_POOL", rows, "max", False)
    sizes = itertools.product((256, 512, 1024, 2048), (1, 2, 4, 8))
    best("_NORMALIZE", [_Launch(1, n, w) for n, w in sizes], "mean", True)


if __name__ == "__main__":
    main()
