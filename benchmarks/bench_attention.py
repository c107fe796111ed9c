"""Attention on packed sequences on a CPU: which way to avoid the padding."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from bench_encoder import lognormal

from fastbert.kernels.attention import attention, attention_ref

N_HEADS, HEAD_DIM = 12, 32


def one_at_a_time(q, k, v, cu_seqlens, max_seqlen):
    """A call a sequence."""
    bounds = cu_seqlens.tolist()
    out = torch.empty_like(q)
    for a, b in pairwise(bounds):
        heads = (x[a:b].transpose(0, 1) for x in (q, k, v))
        out[a:b] = F.scaled_dot_product_attention(*heads).transpose(0, 1)
    return out


def two_products(q, k, v, cu_seqlens, max_seqlen):
    """Two batched products and a softmax for each sequence."""
    bounds = cu_seqlens.tolist()
    out, q = torch.empty_like(q), q * HEAD_DIM**-0.5
    for a, b in pairwise(bounds):
        qs, ks, vs = (x[a:b].transpose(0, 1) for x in (q, k, v))
        out[a:b] = ((qs @ ks.transpose(1, 2)).softmax(-1) @ vs).transpose(0, 1)
    return out


def padded(q, k, v, cu_seqlens, max_seqlen):
    """Padded to the longest and masked."""
    lengths = cu_seqlens.diff()
    real = torch.arange(max_seqlen) < lengths[:, None]
    heads = []
    for x in (q, k, v):
        wide = x.new_zeros(len(lengths), max_seqlen, N_HEADS, HEAD_DIM)
        wide[real] = x
        heads.append(wide.transpose(1, 2))
    mask = real[:, None, None]
    return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)[real]


pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="ways to do it on a CPU; a GPU's are in bench_gpu.py"
)
PROVIDERS = {
    "fastbert, neighbours of one length": attention_ref,
    "a call a sequence": one_at_a_time,
    "two products": two_products,
    "padded": padded,
}


@pytest.mark.parametrize("n_seqs, mean", [(32, 40), (256, 20), (8, 128)])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_attention(timed, provider, n_seqs, mean):
    lengths = sorted(lognormal(n_seqs, mean))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    torch.manual_seed(0)
    q, k, v = torch.randn(sum(lengths), 3, N_HEADS, HEAD_DIM).unbind(1)
    args = (q, k, v, cu_seqlens, max(lengths))
    with torch.inference_mode():
        run = PROVIDERS[provider]
        torch.testing.assert_close(run(*args), attention_ref(*args), rtol=1e-4, atol=1e-5)
        timed(
            lambda: run(*args),
            f"attention, {n_seqs} sequences of mean length {mean}, sorted",
            provider=provider,
            rounds=30,
            tokens=sum(lengths),
            padding=1 - sum(lengths) / (n_seqs * max(lengths)),
            flops=sum(4 * n * n * N_HEADS * HEAD_DIM for n in lengths),
        )


def launch_all(dtype):
    """Every kernel with every launch row and flag."""
    flags = [(2, causal, dropout_p) for causal in (False, True) for dropout_p in (0.0, 0.1)]
    for head_dim in (32, 64, 128):
        for length in (48, 112, 240):  # one tile of 64, one of 128, several
            cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
            for heads, causal, dropout_p in [*flags, (1, False, 0.1)]:  # 1 is a constant to Triton
                qkv = torch.zeros(length, 3, heads, head_dim, dtype=dtype, requires_grad=True)
                out = attention(qkv, cu_seqlens, length, causal=causal, dropout_p=dropout_p)
                out.sum().backward()
