"""Time launch choices of kernels/cross_entropy.py on this GPU and print the table to paste."""

from functools import partial

import sweep
import torch

from fastbert.kernels import cross_entropy
from fastbert.kernels.cross_entropy import _LAUNCHES, _Launch, _losses

N_COLS = {_LAUNCHES[0][0]: 30522, _LAUNCHES[1][0]: 64000, _LAUNCHES[2][0]: 119547}
DTYPE = torch.bfloat16
CANDIDATES = [
    _Launch(block_n, num_warps)
    for block_n in (1024, 2048, 4096, 8192)
    for num_warps in (4, 8, 16)
    if 4 <= block_n // num_warps // 32 <= 16  # columns a thread
]


def steps(launch, n_cols):
    """Losses and gradients of as many rows as there are at a time."""
    n_padded = -(-n_cols // cross_entropy._COLUMNS) * cross_entropy._COLUMNS
    n_rows = cross_entropy._MOST_LOGITS // n_padded
    logits = torch.randn(n_rows, n_padded, dtype=DTYPE, device=sweep.DEVICE)
    labels = torch.randint(n_cols, (n_rows,), device=sweep.DEVICE)
    losses, correct = torch.empty(n_rows, device=sweep.DEVICE), torch.empty_like(labels)
    cross_entropy._launch = lambda n_cols: launch
    # Gradients take the place of logits, which changes no time.
    yield lambda: _losses(logits, labels, None, losses, correct, n_cols, 0.0, True)


def main():
    for most, old in _LAUNCHES:
        times = {}
        for launch in CANDIDATES:
            what = partial(steps, launch, N_COLS[most])
            (times[launch],) = sweep.timings((most, launch), what)
        best = sweep.best(times, old)
        # Two bytes read and two written, of as many logits as there are at a time.
        rate = 4 * cross_entropy._MOST_LOGITS / times.get(best, float("inf")) / 1e9
        sweep.paste(f"    ({most}, {best}),  # {rate:.2f} TB/s")


if __name__ == "__main__":
    sweep.run(__file__, main)
