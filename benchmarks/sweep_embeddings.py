"""Measure launch rows of the embedding kernels on a GPU and print the table to paste.

python -P benchmarks/sweep_embeddings.py
"""

import itertools
from operator import itemgetter

import torch
import triton
from bench_embeddings import arguments

from fastbert.kernels import embeddings as module
from fastbert.kernels.embeddings import _Launch, embed

N_TOKENS = 65536


def milliseconds(n_cols, row, chunk):
    """Medians of the forward and the backward, with dropout."""
    module._LAUNCHES, module._CHUNK = ((n_cols, row, row),), chunk
    ids, args = arguments(N_TOKENS, n_cols, torch.bfloat16)
    out = embed(*ids, *args, dropout_p=0.1)
    dout = torch.randn_like(out)
    steps = (
        lambda: embed(*ids, *args, dropout_p=0.1),
        lambda: torch.autograd.grad(out, args, dout, retain_graph=True),
    )
    return [triton.testing.do_bench(step, return_mode="median") for step in steps]


def main():
    print(f"# From benchmarks/sweep_embeddings.py on {torch.cuda.get_device_name()}, "
          f"torch {torch.__version__}, triton {triton.__version__}.")  # fmt: skip
    for n_cols in (256, 512, 1024, 2048, 4096):
        timings = []
        for block_m, num_warps in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16)):
            if 8 <= block_m * n_cols / (32 * num_warps) <= 64:
                row = _Launch(block_m, num_warps)
                for chunk in (16, 32, 64) if block_m == 4 else (32,):
                    times = milliseconds(n_cols, row, chunk)
                    print(f"#   {n_cols} {row} chunk {chunk}: {times[0]:.3f} ms, {times[1]:.3f}")
                    timings.append((*times, row))
        forward, backward = (min(timings, key=itemgetter(i))[2] for i in (0, 1))
        print(f"    ({n_cols}, {forward}, {backward}),")


if __name__ == "__main__":
    main()
