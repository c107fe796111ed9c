"""Measure launch rows of the activation and of the product with it on a GPU; print what to paste.

python benchmarks/sweep_gelu.py
"""

import itertools
from functools import partial

import sweep
import torch
import torch.nn.functional as F

from fastbert.kernels import gelu, linear_gelu
from fastbert.kernels.gelu import bias_gelu

N_BYTES = 2**29  # of x: several times the L2 cache
N_TOKENS = [2**n for n in range(10, 17)]
HIDDEN, DTYPE = (384, 768, 1024), torch.bfloat16


def randn(*size):
    return torch.randn(size, dtype=DTYPE, device=sweep.DEVICE).requires_grad_()


def activation_steps(row):
    """Forward and backward of each hidden size."""
    gelu._FORWARD = gelu._BACKWARD = row
    for hidden in HIDDEN:
        args = [randn(N_BYTES // 8 // hidden, 4 * hidden), randn(4 * hidden)]
        out = bias_gelu(*args)
        dout = torch.randn_like(out)
        yield lambda args=args: bias_gelu(*args)
        yield lambda args=args, out=out, dout=dout: torch.autograd.grad(
            out, args, dout, retain_graph=True
        )


def sweep_activation():
    old, both = (gelu._FORWARD, gelu._BACKWARD), ({}, {})
    for rows in itertools.product((1, 2, 4, 8, 16), (256, 512, 1024), (2, 4, 8)):
        if 8 <= rows[0] * rows[1] / (32 * rows[2]) <= 64:
            row = gelu._Launch(*rows)
            found = sweep.timings(row, partial(activation_steps, row), 2 * len(HIDDEN))
            both[0][row], both[1][row] = sum(found[::2]), sum(found[1::2])
    gelu._FORWARD, gelu._BACKWARD = map(sweep.best, both, old)
    sweep.paste(f"_FORWARD = {gelu._FORWARD}")
    sweep.paste(f"_BACKWARD = {gelu._BACKWARD}")


def product_rows(by_tma):
    """Rows that could be the best, by the accumulators a thread has and by shared memory."""
    for m, n, k in itertools.product((64, 128, 256), (64, 128, 256), (64,) if by_tma else (32, 64)):
        for num_warps, num_stages, programs in itertools.product((4, 8), (3, 4, 5), (1, 2)):
            shared = 2 * (num_stages * (m + n) * k + (m * n // 2 if by_tma else 0))
            if shared * programs <= 227 * 2**10 and 32 <= m * n / (32 * num_warps) <= 128:
                yield linear_gelu._Launch(m, n, k, num_warps, num_stages, programs)


def product_steps(row, n_tokens):
    """Of each hidden size; with the product, as two kernels write it too: a win here is one
    everywhere. row: None for two kernels."""
    if row:
        linear_gelu._LAUNCH, linear_gelu._TMA_LAUNCHES = row, ((2**31, row),)
    for hidden in HIDDEN:
        x, weight, bias = randn(n_tokens, hidden), randn(4 * hidden, hidden), randn(4 * hidden)
        if row:
            yield partial(linear_gelu._forward, x, weight, bias, "gelu", True)
        else:
            yield lambda x=x, w=weight, bias=bias: bias_gelu(F.linear(x, w), bias)


def longest_run(wins):
    """The fewest and the most tokens of the longest run of those measured that are in `wins`."""
    runs = itertools.groupby(N_TOKENS, key=lambda n_tokens: n_tokens in wins)
    run = max((list(tokens) for won, tokens in runs if won), key=len)
    return run[0], run[-1]


@torch.no_grad()
def sweep_product():
    """The best row for each number of tokens, then where these beat two kernels."""
    by_tma = linear_gelu._takes_descriptors(randn(64, 64))
    old = linear_gelu._TMA_LAUNCHES if by_tma else ((2**31, linear_gelu._LAUNCH),)
    wins, n = {hidden: [] for hidden in HIDDEN}, len(HIDDEN)
    sweep.paste("_TMA_LAUNCHES = (" if by_tma else "# _LAUNCH, the best for each number of tokens:")
    for n_tokens in sorted(N_TOKENS, reverse=True):  # what matters first
        two = sweep.timings(("two", n_tokens), partial(product_steps, None, n_tokens), n)
        found = {
            row: sweep.timings((row, n_tokens), partial(product_steps, row, n_tokens), n)
            for row in product_rows(by_tma)
        }
        there = next(launch for most, launch in old if n_tokens <= most)
        best = sweep.best({row: sum(times) for row, times in found.items()}, there)
        one = found.get(best, [float("inf")] * n)
        ms, two_ms = (", ".join(f"{t:.4f}" for t in times) for times in (one, two))
        sweep.paste(f"    ({n_tokens}, {best}),  # ms: {ms}; as two kernels: {two_ms}")
        for hidden, fused, apart in zip(HIDDEN, one, two, strict=True):
            if fused < apart:
                wins[hidden].append(n_tokens)
    sweep.paste(")  # from the most tokens to the fewest" if by_tma else "#")
    sweep.paste("_FASTER: dict[tuple[str, int, int], tuple[int, int]] = {")
    for hidden in filter(wins.get, HIDDEN):
        key = (torch.cuda.get_device_name(), hidden, 4 * hidden)
        sweep.paste(f"    {key}: {longest_run(wins[hidden])},  # won at {wins[hidden]}")
    sweep.paste("}")


def main():
    sweep_activation()
    sweep_product()


if __name__ == "__main__":
    sweep.run(__file__, main)
