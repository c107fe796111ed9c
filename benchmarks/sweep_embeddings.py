"""Measure launch rows of the embedding kernels on a GPU and print the table to paste.

python benchmarks/sweep_embeddings.py
"""

import itertools
from functools import partial

import sweep
import torch
from bench_embeddings import arguments

from fastbert.kernels import embeddings as module
from fastbert.kernels.embeddings import _Launch, embed

N_TOKENS, DTYPE = 65536, torch.bfloat16
SIZES = (30522, 2, 512)  # rows of the tables


def steps(n_cols, row, chunk):
    """The forward and the backward, with dropout."""
    module._LAUNCHES, module._CHUNK = ((n_cols, row, row),), chunk
    ids, args = arguments(N_TOKENS, n_cols, DTYPE, sweep.DEVICE, SIZES)
    out = embed(*ids, *args, dropout_p=0.1)
    dout = torch.randn_like(out)
    yield lambda: embed(*ids, *args, dropout_p=0.1)
    yield lambda: torch.autograd.grad(out, args, dout, retain_graph=True)


def main():
    old_chunk = module._CHUNK
    for n_cols, *old in module._LAUNCHES:
        both, of_chunk = ({}, {}), {}
        for block_m, num_warps in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16)):
            if not 8 <= block_m * n_cols / (32 * num_warps) <= 64:
                continue
            row = _Launch(block_m, num_warps)
            for chunk in (16, 64, old_chunk) if row == old[1] else (old_chunk,):
                found = sweep.timings((n_cols, row, chunk), partial(steps, n_cols, row, chunk), 2)
                if row == old[1]:
                    of_chunk[chunk] = found[1]
            for times, ms in zip(both, found, strict=True):
                times[row] = ms
        forward, backward = map(sweep.best, both, old)
        sweep.paste(f"    ({n_cols}, {forward}, {backward}),")
        sweep.paste(
            f"    # _CHUNK = {sweep.best(of_chunk, old_chunk)}: {of_chunk} ms, old backward"
        )


if __name__ == "__main__":
    sweep.run(__file__, main)
