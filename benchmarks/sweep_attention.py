"""Measure launch rows of the attention kernels on a GPU and print the rows to paste.

python benchmarks/sweep_attention.py
"""

import itertools
from dataclasses import replace
from functools import partial

import sweep
import torch

from fastbert.kernels import _triton
from fastbert.kernels import attention as module
from fastbert.kernels.attention import _Launch, schedule

DTYPE, N_TOKENS, HIDDEN = torch.bfloat16, 65536, 1024
LONG = 512  # tokens of a sequence that takes several tiles
STEPS = {"fwd": "forward", "dq": "backward", "dkv": "backward"}  # of a row, in which they are found
# Where the row that was found is compared with the one there was: tokens, of a sequence, heads.
GRID = list(itertools.product((1024, 16384, 262144), (16, 64, 128, 512, 2048), (6, 12)))
ARCHITECTURE = _triton.architecture(torch.device(sweep.DEVICE))


def steps(head_dim, length, row, direction, n_tokens=None, n_heads=None):
    """Without and with dropout."""
    n_tokens, n_heads = n_tokens or N_TOKENS, n_heads or HIDDEN // head_dim
    module._LAUNCHES = {ARCHITECTURE: ((2, head_dim, row),)}
    shape = (max(n_tokens, length), n_heads, head_dim)
    q, k, v, dout = torch.randn(4, *shape, dtype=DTYPE, device=sweep.DEVICE)
    bounds = torch.arange(0, shape[0] + 1, length, dtype=torch.int32, device=sweep.DEVICE)
    made, into = schedule(bounds, length, shape[0]), [torch.empty_like(x) for x in (q, k, v)]
    for dropout_p in (0.0, 0.1):
        seed = torch.tensor([1], device=sweep.DEVICE) if dropout_p else None
        how = (bounds, bounds, seed, False, dropout_p, head_dim**-0.5, length, length)
        tiles = made.query_tiles, made.key_tiles
        step = partial(module._forward, q, k, v, *how, *tiles)
        if direction == "backward":
            step = partial(module._backward, q, k, v, dout, *step(), into, *how, *tiles)
        yield step


def milliseconds(*args):
    """In sum."""
    return sum(sweep.timings(args, partial(steps, *args), 2))


def candidates():
    for sizes in itertools.product((16, 32, 64, 128), (4, 8), (1, 2, 3, 4)):
        yield _Launch(*sizes)


def best(head_dim, row):
    """`row` with the fastest launch for each kernel that goes through the other side."""
    row = replace(row, most_fwd=0, most_bwd=0)
    for name, direction in STEPS.items():
        times = {}
        for launch in candidates():
            tried = replace(row, **{name: launch})
            times[launch] = milliseconds(head_dim, LONG, tried, direction)
        row = replace(row, **{name: sweep.best(times, getattr(row, name))})
    return row


def most(head_dim, row, name, direction):
    """The longest sequences for which it pays to have all in one tile."""
    longest = 0
    for length in (64, 128):
        one, several = (
            milliseconds(head_dim, length, replace(row, **{name: n}), direction)
            for n in (length, 0)
        )
        if one < several:
            longest = length
    return longest


def shown(row):
    launches = (getattr(row, name) for name in STEPS)
    text = ", ".join(f"_Launch({x.block}, {x.num_warps}, {x.num_stages})" for x in launches)
    return f"_Launches({row.most_fwd}, {row.most_bwd}, {text})"


def compare(head_dim, old, new):
    for (n_tokens, length, n_heads), direction in itertools.product(GRID, ("forward", "backward")):
        before, after = (
            milliseconds(head_dim, length, row, direction, n_tokens, n_heads) for row in (old, new)
        )
        sweep.paste(
            f"#   {n_heads} x {head_dim}, {n_tokens} tokens, lengths of {length}, {direction}: "
            f"{after:.4f} ms, {after / before:.2f} of the old row's"
        )


def main():
    table = module._LAUNCHES[ARCHITECTURE]
    rows = {most_dim: row for size, most_dim, row in table if size == 2}
    found = {}
    for head_dim in (64, 32, 128):  # what matters first
        row = best(head_dim, rows[head_dim])
        mosts = {
            "most_fwd": most(head_dim, row, "most_fwd", "forward"),
            "most_bwd": most(head_dim, row, "most_bwd", "backward"),
        }
        found[head_dim] = replace(row, **mosts)
        sweep.paste(f"        (2, {head_dim}, {shown(found[head_dim])}),  # {ARCHITECTURE}")
    for head_dim in (64, 32):
        compare(head_dim, rows[head_dim], found[head_dim])


if __name__ == "__main__":
    sweep.run(__file__, main)
