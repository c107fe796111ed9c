"""Dropout inside kernels: what is kept follows from a seed, and is never stored.

Philox 4x32-10 (Salmon et al. 2011) gives each row 64 random bits, with the seed as its key and
(row, stream) as its counter. What becomes of column c follows from mixing them with c as SplitMix
does (Steele et al. 2014, with the 32-bit constants of C. Wellons): nine instructions an element.
Philox by itself takes 25, and would cost attention more than its products do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels._triton import jit, tl

_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B1, 0x7FEB352D, 0x846CA68B


def draw_seed(device: torch.device) -> Tensor:
    """(1,) int64, from torch's own generator."""
    return torch.randint(2**63 - 1, (1,), device=device)


def dropout_arguments(p: float) -> tuple[int, float]:
    """For a kernel: what a kept element's bits are at least, as int32; what it is multiplied by."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout_p must be from 0 to 1, got {p}")
    return min(round(p * 2**32), 2**32 - 1) - 2**31, 1 / (1 - p) if p < 1 else 0.0


def dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout, on a CPU in a third of the time: 16 random bits decide an element.

    So p is rounded to a multiple of 2**-16 there, and what is kept is divided by the share of it.
    """
    n_dropped = round(p * 2**16)
    if (
        x.device.type != "cpu"
        or not 0 < n_dropped < 2**16
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
    ):
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
    kept = torch.empty(x.shape, dtype=x.dtype)  # a mask of booleans takes four times as long
    torch.ge(bits, n_dropped - 2**15, out=kept)
    return x * kept * (2**16 / (2**16 - n_dropped))


@jit()
def row_words(seed, rows, stream):
    """Two words of random bits for each of `rows`, any shape of int32 or int64."""
    rows = rows.to(tl.uint32)
    first, second, _, _ = tl.philox(seed, rows, rows * 0 + stream, rows * 0, rows * 0)
    return first, second


@jit()
def is_kept(first, second, columns, threshold):
    """The words of rows and the numbers of columns, broadcast against each other, to booleans."""
    bits = first + columns.to(tl.uint32) * 0x9E3779B1
    bits = (bits ^ (bits >> 16) ^ second) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits.to(tl.int32, bitcast=True) >= threshold


def philox_ref(key: int, counter: Tensor) -> Tensor:
    """Philox 4x32-10. key: 64 bits. counter: (..., 4) int64 below 2**32; gives the same shape."""
    low = 0xFFFFFFFF
    keys = [key & low, key >> 32 & low]
    c = list(counter.unbind(-1))
    for _ in range(10):
        # Products of 32 bits by 32, in halves that fit int64.
        a, b = 0xD2511F53, 0xCD9E8D57
        high_a, low_a = _multiply(c[0], a)
        high_b, low_b = _multiply(c[2], b)
        c = [high_b ^ c[1] ^ keys[0], low_b, high_a ^ c[3] ^ keys[1], low_a]
        keys = [(keys[0] + 0x9E3779B9) & low, (keys[1] + 0xBB67AE85) & low]
    return torch.stack(c, -1)


def _multiply(x: Tensor, y: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit numbers."""
    low_sum = (x & 0xFFFF) * y
    high_sum = (x >> 16) * y + (low_sum >> 16)
    return high_sum >> 16, (high_sum & 0xFFFF) << 16 | low_sum & 0xFFFF


def is_kept_ref(seed: Tensor, rows: Tensor, stream: int, columns: Tensor, p: float) -> Tensor:
    """What a kernel keeps: (n_rows, n_columns) booleans for numbers of rows and columns."""
    rows = rows.long() & 0xFFFFFFFF
    counter = torch.stack([rows, torch.full_like(rows, stream), rows * 0, rows * 0], -1)
    first, second, _, _ = philox_ref(int(seed), counter).unsqueeze(-2).unbind(-1)
    bits = first + columns.long() * _GOLDEN & 0xFFFFFFFF
    bits = _multiply(bits ^ bits >> 16 ^ second, _MIX_1)[1]
    bits = _multiply(bits ^ bits >> 15, _MIX_2)[1]
    return (bits ^ 2**31) - 2**31 >= dropout_arguments(p)[0]  # bits read as int32
