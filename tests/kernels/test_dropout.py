"""What is dropped: Philox by its published answers, the rest by its statistics."""

import pytest
import torch

from fastbert.kernels._dropout import (
    dropout,
    dropout_arguments,
    is_kept,
    is_kept_ref,
    philox_ref,
    row_words,
)
from fastbert.kernels._triton import jit, tl


@jit()
def _kept_kernel(out_ptr, seed_ptr, threshold, STREAM: tl.constexpr, N: tl.constexpr):
    rows, cols = tl.arange(0, N), tl.arange(0, N)
    first, second = row_words(tl.load(seed_ptr), rows, STREAM)
    kept = is_kept(first[:, None], second[:, None], cols[None, :], threshold)
    tl.store(out_ptr + rows[:, None] * N + cols[None, :], kept)


# The known answers that come with Random123: counter, key, result.
@pytest.mark.parametrize(
    "counter, key, answer",
    [
        ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox(counter, key, answer):
    words = philox_ref(key, torch.tensor(counter)).tolist()
    assert " ".join(f"{word:08x}" for word in words) == answer


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_kernel_drops_what_the_reference_drops(p, device):
    seed = torch.tensor([2**62 + 12345], device=device)
    out = torch.empty(64, 64, dtype=torch.bool, device=device)
    _kept_kernel[(1,)](out, seed, dropout_arguments(p)[0], STREAM=7, N=64)
    wanted = is_kept_ref(seed, torch.arange(64), 7, torch.arange(64), p)
    assert torch.equal(out.cpu(), wanted.cpu())
    assert wanted.all() == (p == 0.0)


def test_what_is_kept_looks_random():
    """2**22 draws: shares of all, of rows, of columns and of pairs are as if independent."""
    p, n_rows, n_cols = 0.1, 2**14, 2**8
    kept = is_kept_ref(torch.tensor([1]), torch.arange(n_rows), 0, torch.arange(n_cols), p)
    x = (kept.double() - (1 - p)) / (p * (1 - p)) ** 0.5  # mean 0, variance 1
    assert x.sum().abs() / x.numel() ** 0.5 < 4
    for axis, n in ((0, n_rows), (1, n_cols)):
        variance = (x.sum(axis) / n**0.5).var()
        assert (variance - 1).abs() * ((x.numel() // n) / 2) ** 0.5 < 4
    for pairs, n in ((x.T @ x, n_rows), (x[:2048] @ x[:2048].T, n_cols)):
        off = pairs[~torch.eye(len(pairs), dtype=torch.bool)] / n**0.5
        assert (off.std() - 1).abs() < 0.02 and off.abs().max() < 7
    for seed, stream in ((1, 1), (2, 0)):
        args = (torch.tensor([seed]), torch.arange(n_rows), stream, torch.arange(n_cols), p)
        same = is_kept_ref(*args) == kept
        assert (same.double().mean() - (p * p + (1 - p) ** 2)).abs() < 1e-3


def test_refuses():
    with pytest.raises(ValueError, match=r"dropout_p must be from 0 to 1, got -0\.1"):
        dropout_arguments(-0.1)


@pytest.mark.parametrize("shape", [(100, 257), (3,), (0, 8)])
def test_on_a_cpu_16_bits_decide(shape):
    torch.manual_seed(0)
    x = torch.rand(shape, dtype=torch.float64).add(1).requires_grad_()
    out = dropout(x, 0.3)
    out.sum().backward()
    kept = out != 0
    torch.testing.assert_close(out[kept], x[kept] / 0.7, rtol=2**-16, atol=0)
    torch.testing.assert_close(x.grad, kept.double() / 0.7, rtol=2**-16, atol=0)
    n = x.numel()  # the share that is kept, within five standard deviations
    assert abs(int(kept.sum()) - 0.7 * n) <= 5 * (0.21 * n) ** 0.5


def test_on_a_cpu_it_follows_from_torchs_seed():
    x = torch.ones(64, 100)
    first, second = (torch.manual_seed(3) and dropout(x, 0.5) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, dropout(x, 0.5))


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_all_or_nothing(p):
    x = torch.ones(5, 7)
    assert torch.equal(dropout(x, p), x * (1 - p))
