import pytest
import torch

from fastbert.kernels.embeddings import embed


def tables(dtype=torch.float64):
    sizes = (11, 16), (2, 16), (9, 16), (16,), (16,)
    return [torch.randn(*size, dtype=dtype, requires_grad=True) for size in sizes]


def ids():
    return torch.randint(0, 11, (20,)), torch.randint(0, 2, (20,)), torch.randint(0, 9, (20,))


def test_matches_the_sum_normalised():
    word, token_type, position, weight, bias = tables()
    w, t, p = ids()
    out = embed(w, t, p, word, token_type, position, weight, bias, eps=1e-6)
    x = word[w] + token_type[t] + position[p]
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(out, x * weight + bias, rtol=1e-12, atol=1e-12)


def test_the_padding_row_gets_no_gradient():
    args = tables()
    embed(torch.tensor([0, 3]), *torch.zeros(2, 2).long(), *args, padding_idx=0).sum().backward()
    assert args[0].grad[0].abs().max() == 0
    assert args[0].grad[3].abs().max() > 0


def test_dropout_rate():
    out = embed(*(torch.zeros(4000).long(),) * 3, *tables(), dropout_p=0.25)
    assert 0.23 < (out == 0).double().mean() < 0.27


def test_refuses():
    w, t, p = ids()
    word, token_type, position, weight, bias = tables()
    with pytest.raises(ValueError, match=r"position_ids must have the shape.*\(20,\), got \(3,\)"):
        embed(w, t, p[:3], word, token_type, position, weight, bias)
    with pytest.raises(ValueError, match=r"token_type must be \(rows, 16\).*got \(2, 8\)"):
        embed(w, t, p, word, token_type[:, :8], position, weight, bias)
