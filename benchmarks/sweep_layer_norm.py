"""Measure launch rows of the layer norm kernels on a GPU and print the table to paste.

python -P benchmarks/sweep_layer_norm.py
"""

import itertools

import torch
import triton

from fastbert.kernels import layer_norm as module
from fastbert.kernels.layer_norm import _Launch, layer_norm

N_BYTES = 2**29  # of x: several times the L2 cache


def milliseconds(n_cols, forward, backward, dropout_p):
    """Medians of the forward and the backward."""
    module._LAUNCHES = ((n_cols, forward, backward),)
    sizes = (N_BYTES // 2 // n_cols, n_cols), (n_cols,), (n_cols,), (N_BYTES // 2 // n_cols, n_cols)
    args = [torch.randn(s, dtype=torch.bfloat16, device="cuda").requires_grad_() for s in sizes]
    out = layer_norm(*args, dropout_p=dropout_p)
    dout = torch.randn_like(out)
    steps = (
        lambda: layer_norm(*args, dropout_p=dropout_p),
        lambda: torch.autograd.grad(out, args, dout, retain_graph=True),
    )
    return [triton.testing.do_bench(step, return_mode="median") for step in steps]


def main():
    print(f"# From benchmarks/sweep_layer_norm.py on {torch.cuda.get_device_name()}, "
          f"torch {torch.__version__}, triton {triton.__version__}.")  # fmt: skip
    for n_cols in (512, 1024, 4096):
        best = [(float("inf"), None), (float("inf"), None)]
        for block_m, num_warps in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16)):
            if not 8 <= block_m * n_cols / (32 * num_warps) <= 64:
                continue
            row = _Launch(block_m, num_warps)
            each = [milliseconds(n_cols, row, row, p) for p in (0.0, 0.1)]
            times = [sum(both) for both in zip(*each, strict=True)]
            print(f"#   {n_cols} {row}: {times[0]:.3f} ms forward, {times[1]:.3f} backward")
            best = [min(b, (t, row), key=lambda x: x[0]) for b, t in zip(best, times, strict=True)]
        print(f"    ({n_cols}, {best[0][1]}, {best[1][1]}),")


if __name__ == "__main__":
    main()
