import pytest
import torch

from fastbert.kernels.pooling import MODES, pool

LENGTHS = [3, 0, 1, 9]


def one_by_one(hidden, mode):
    rows = []
    for part in hidden.split(LENGTHS):
        if len(part) == 0:
            rows.append(torch.zeros(hidden.shape[1], dtype=hidden.dtype))
        elif mode == "mean":
            rows.append(part.mean(0))
        else:
            rows.append(part[0] if mode == "cls" else part.amax(0))
    return torch.stack(rows)


@pytest.mark.parametrize("mode", MODES)
def test_matches_one_by_one(mode):
    hidden = torch.randn(13, 6, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    wanted = one_by_one(hidden, mode)
    torch.testing.assert_close(pool(hidden, cu_seqlens, mode), wanted)
    unit = pool(hidden, cu_seqlens, mode, normalize=True)
    torch.testing.assert_close(unit, wanted / wanted.norm(dim=1, keepdim=True).clamp(min=1e-12))
    assert pool(hidden[:0], torch.zeros(3, dtype=torch.int32), mode).tolist() == [[0] * 6] * 2


def test_bfloat16_means_are_summed_in_float32():
    hidden = torch.full((4096, 2), 1.0, dtype=torch.bfloat16)  # a bfloat16 sum stops at 256
    assert pool(hidden, torch.tensor([0, 4096]).int()).tolist() == [[1.0, 1.0]]


def test_refuses():
    with pytest.raises(ValueError, match="mode must be one of mean, cls, max, got 'median'"):
        pool(torch.ones(2, 2), torch.tensor([0, 2]).int(), "median")
    with pytest.raises(ValueError, match=r"hidden must be \(n_tokens, hidden\), got \(1, 2, 2\)"):
        pool(torch.ones(1, 2, 2), torch.tensor([0, 2]).int())
