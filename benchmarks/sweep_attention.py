"""Measure launch rows of the attention kernels on a GPU and print the rows to paste.

python -P benchmarks/sweep_attention.py
"""

import itertools
import sys
from dataclasses import replace
from functools import partial

import torch
import triton

from fastbert.kernels import _triton
from fastbert.kernels import attention as module
from fastbert.kernels.attention import _Launch, schedule

DEVICE, DTYPE = "cuda", torch.bfloat16
N_TOKENS, HIDDEN = 65536, 1024
LONG = 512  # tokens of a sequence that takes several tiles
STEPS = {"fwd": "forward", "dq": "backward", "dkv": "backward"}  # of a row, in which they are found


def milliseconds(head_dim, length, row, direction):
    """Medians with and without dropout, in sum; inf where a kernel cannot be had."""
    module._LAUNCHES = {_triton.architecture(torch.device(DEVICE)): ((2, head_dim, row),)}
    shape = (N_TOKENS, HIDDEN // head_dim, head_dim)
    q, k, v, dout = torch.randn(4, *shape, dtype=DTYPE, device=DEVICE)
    bounds = torch.arange(0, N_TOKENS + 1, length, dtype=torch.int32, device=DEVICE)
    made, into = schedule(bounds, length, N_TOKENS), [torch.empty_like(x) for x in (q, k, v)]
    total = 0.0
    for dropout_p in (0.0, 0.1):
        seed = torch.tensor([1], device=DEVICE) if dropout_p else None
        how = (bounds, bounds, seed, False, dropout_p, head_dim**-0.5, length, length)
        tiles = made.query_tiles, made.key_tiles
        try:
            step = partial(module._forward, q, k, v, *how, *tiles)
            if direction == "backward":
                step = partial(module._backward, q, k, v, dout, *step(), into, *how, *tiles)
            total += triton.testing.do_bench(step, return_mode="median")
        except _triton._compile_errors() as error:
            print(f"#   {type(error).__name__}: ", end="")
            return float("inf")
    return total


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
            print(f"#   {head_dim} {name} {launch}: {times[launch]:.3f} ms {direction}")
        row = replace(row, **{name: min(times, key=times.__getitem__)})
    return row


def most(head_dim, row, name, direction):
    """The longest sequences for which it pays to have all in one tile."""
    longest = 0
    for length in (64, 128):
        one, several = (
            milliseconds(head_dim, length, replace(row, **{name: n}), direction)
            for n in (length, 0)
        )
        print(f"#   {head_dim} {name} {length}: {one:.3f} ms in one tile, {several:.3f} in several")
        if one < several:
            longest = length
    return longest


def shown(row):
    launches = (getattr(row, name) for name in STEPS)
    text = ", ".join(f"_Launch({x.block}, {x.num_warps}, {x.num_stages})" for x in launches)
    return f"_Launches({row.most_fwd}, {row.most_bwd}, {text})"


def main():
    if not torch.cuda.is_available():
        sys.exit("sweep_attention.py: there is no GPU")
    architecture = _triton.architecture(torch.device(DEVICE))
    rows = {most_dim: row for size, most_dim, row in module._LAUNCHES[architecture] if size == 2}
    print(f"# From benchmarks/sweep_attention.py on {torch.cuda.get_device_name()}, "
          f"torch {torch.__version__}, triton {triton.__version__}: {architecture}.")  # fmt: skip
    for head_dim, row in rows.items():
        row = best(head_dim, row)
        mosts = {
            "most_fwd": most(head_dim, row, "most_fwd", "forward"),
            "most_bwd": most(head_dim, row, "most_bwd", "backward"),
        }
        print(f"        (2, {head_dim}, {shown(replace(row, **mosts))}),")


if __name__ == "__main__":
    main()
