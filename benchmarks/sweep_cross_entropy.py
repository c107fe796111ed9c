"""Time launch choices of kernels/cross_entropy.py on this GPU and print the table to paste."""

from unittest.mock import patch

import torch
from triton.testing import do_bench

from fastbert.kernels import cross_entropy
from fastbert.kernels.cross_entropy import _LAUNCHES, _Launch, _losses

N_COLS = {_LAUNCHES[0][0]: 30522, _LAUNCHES[1][0]: 64000, _LAUNCHES[2][0]: 119547}
CANDIDATES = [
    _Launch(block_n, num_warps)
    for block_n in (1024, 2048, 4096, 8192)
    for num_warps in (4, 8, 16)
    if 4 <= block_n // num_warps // 32 <= 16  # columns a thread
]


def seconds(launch, n_cols, dtype=torch.bfloat16):
    """Of a row, with its gradient."""
    n_padded = -(-n_cols // cross_entropy._COLUMNS) * cross_entropy._COLUMNS
    n_rows = cross_entropy._MOST_LOGITS // n_padded
    logits = torch.randn(n_rows, n_padded, dtype=dtype, device="cuda")
    labels = torch.randint(n_cols, (n_rows,), device="cuda")
    losses, correct = torch.empty(n_rows, device="cuda"), torch.empty_like(labels)
    with patch.object(cross_entropy, "_launch", lambda n_cols: launch):
        # Gradients take the place of logits, which changes no time.
        time = do_bench(lambda: _losses(logits, labels, None, losses, correct, n_cols, 0.0, True))
    return time / 1e3 / n_rows


def main():
    print(f"# From benchmarks/sweep_cross_entropy.py on {torch.cuda.get_device_name()},")
    print(f"# torch {torch.__version__}, bfloat16:")
    for most, n_cols in N_COLS.items():
        times = {launch: seconds(launch, n_cols) for launch in CANDIDATES}
        best = min(times, key=times.__getitem__)
        rate = 4 * n_cols / times[best] / 1e12  # two bytes read, two written
        print(f"    ({most}, _Launch({best.block_n}, {best.num_warps})),  # {rate:.2f} TB/s")
        for launch, time in sorted(times.items(), key=lambda item: item[1]):
            print(f"    #   {launch}: {time / times[best]:.2f}")


if __name__ == "__main__":
    main()
