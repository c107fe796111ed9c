"""Measure launch rows of the activation and of the product with it on a GPU; print what to paste.

python -P benchmarks/sweep_gelu.py
"""

import itertools

import torch
import torch.nn.functional as F
import triton

from fastbert.kernels import _triton, gelu, linear_gelu
from fastbert.kernels.gelu import bias_gelu

N_BYTES = 2**29  # of x: several times the L2 cache
N_TOKENS = [2**n for n in range(10, 17)]
HIDDEN = (384, 768, 1024)


def milliseconds(step):
    return triton.testing.do_bench(step, return_mode="median")


def randn(*size):
    return torch.randn(size, dtype=torch.bfloat16, device="cuda").requires_grad_()


def sweep_activation():
    times = {}
    for rows in itertools.product((1, 2, 4, 8, 16), (256, 512, 1024), (2, 4, 8)):
        if not 8 <= rows[0] * rows[1] / (32 * rows[2]) <= 64:
            continue
        row = gelu._FORWARD = gelu._BACKWARD = gelu._Launch(*rows)
        times[row] = [0.0, 0.0]
        for hidden in HIDDEN:
            args = [randn(N_BYTES // 8 // hidden, 4 * hidden), randn(4 * hidden)]
            out = bias_gelu(*args)
            dout = torch.randn_like(out)
            times[row][0] += milliseconds(lambda args=args: bias_gelu(*args))
            times[row][1] += milliseconds(
                lambda args=args, out=out, dout=dout: torch.autograd.grad(
                    out, args, dout, retain_graph=True
                )
            )
        print(f"#   {row}: {times[row][0]:.3f} ms forward, {times[row][1]:.3f} backward")
    for i, name in enumerate(("_FORWARD", "_BACKWARD")):
        print(f"{name} = {min(times, key=lambda row, i=i: times[row][i])}")


def product_rows(by_tma):
    """Rows that could be the best, by the accumulators a thread has and by shared memory."""
    for m, n, k in itertools.product((64, 128, 256), (64, 128, 256), (64,) if by_tma else (32, 64)):
        for num_warps, num_stages, programs in itertools.product((4, 8), (3, 4, 5), (1, 2)):
            shared = 2 * (num_stages * (m + n) * k + (m * n // 2 if by_tma else 0))
            if shared * programs <= 227 * 2**10 and 32 <= m * n / (32 * num_warps) <= 128:
                yield linear_gelu._Launch(m, n, k, num_warps, num_stages, programs)


def longest_run(wins):
    """The fewest and the most tokens of the longest run of those measured that are in `wins`."""
    runs = itertools.groupby(N_TOKENS, key=lambda n_tokens: n_tokens in wins)
    run = max((list(tokens) for won, tokens in runs if won), key=len)
    return run[0], run[-1]


@torch.no_grad()
def sweep_product():
    """The best row for each number of tokens, then where these beat two kernels."""
    by_tma = linear_gelu._takes_descriptors(randn(64, 64))
    wins = {hidden: [] for hidden in HIDDEN}
    print("_TMA_LAUNCHES = (" if by_tma else "# _LAUNCH, the best for each number of tokens:")
    for n_tokens in N_TOKENS:
        times, two = {}, []  # a row to what it takes for each hidden size
        for hidden in HIDDEN:
            args = [randn(n_tokens, hidden), randn(4 * hidden, hidden), randn(4 * hidden)]
            two.append(milliseconds(lambda a=args: bias_gelu(F.linear(*a[:2]), a[2])))
            for row in product_rows(by_tma):
                linear_gelu._LAUNCH, linear_gelu._TMA_LAUNCHES = row, ((2**31, row),)
                try:  # with the product, as two kernels write it too: a win here is one everywhere
                    times.setdefault(row, []).append(
                        milliseconds(lambda a=args: linear_gelu._forward(*a, "gelu", True))
                    )
                except _triton._compile_errors() as error:
                    times.setdefault(row, []).append(float("inf"))
                    print(f"#   {row}: {type(error).__name__}")
        best = min(times, key=lambda row: sum(times[row]))
        ms, two_ms = (", ".join(f"{t:.4f}" for t in found) for found in (times[best], two))
        print(f"    ({n_tokens}, {best}),  # ms: {ms}; as two kernels: {two_ms}")
        for hidden, one, other in zip(HIDDEN, times[best], two, strict=True):
            if one < other:
                wins[hidden].append(n_tokens)
    print(")" if by_tma else "#")
    print("_FASTER: dict[tuple[str, int, int], tuple[int, int]] = {")
    for hidden in filter(wins.get, HIDDEN):
        key = (torch.cuda.get_device_name(), hidden, 4 * hidden)
        print(f"    {key}: {longest_run(wins[hidden])},  # won at {wins[hidden]}")
    print("}")


def main():
    print(f"# From benchmarks/sweep_gelu.py on {torch.cuda.get_device_name()}, "
          f"torch {torch.__version__}, triton {triton.__version__}.")  # fmt: skip
    sweep_activation()
    sweep_product()


if __name__ == "__main__":
    main()
