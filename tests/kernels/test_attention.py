import pytest
import torch
from accuracy import KERNEL_DTYPES, assert_as_accurate, assert_matches

from fastbert.kernels import attention as module
from fastbert.kernels._dropout import is_kept_ref
from fastbert.kernels.attention import (
    _attention_backward_op,
    _attention_op,
    attention,
    attention_ref,
    attention_weights_ref,
    schedule,
)

# Out of order, equal neighbours, a length of one, an empty sequence.
LENGTHS = [7, 3, 3, 1, 0, 12, 40]


def cu(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def naive(q, k, v, cu_seqlens, causal, scale):
    """The formula, a sequence at a time."""
    out = []
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[start:stop], k[start:stop]) * scale
        if causal:
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:stop]))
    return torch.cat(out)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("causal, scale", [(False, None), (True, None), (False, 0.5)])
def test_matches_the_formula(dtype, causal, scale):
    cu_seqlens = cu(LENGTHS)
    qkv = torch.randn(sum(LENGTHS), 3, 4, 24, dtype=dtype)
    args = (cu_seqlens, causal, scale or 24**-0.5)
    out = attention(qkv, cu_seqlens, max(LENGTHS), causal=causal, softmax_scale=scale)
    assert_as_accurate(out, naive(*qkv.unbind(1), *args), naive(*qkv.double().unbind(1), *args))


def test_three_tensors_are_the_one_tensor():
    qkv = torch.randn(sum(LENGTHS), 3, 4, 24)
    cu_seqlens = cu(LENGTHS)
    one = attention(qkv, cu_seqlens, 40)
    assert torch.equal(one, attention(*qkv.unbind(1), cu_seqlens, 40))


def test_gradients_match_the_formula():
    qkv = torch.randn(sum(LENGTHS), 3, 2, 16, dtype=torch.float64, requires_grad=True)
    cu_seqlens, weights = cu(LENGTHS), torch.randn(sum(LENGTHS), 2, 16, dtype=torch.float64)
    (out,) = torch.autograd.grad((attention(qkv, cu_seqlens, 40) * weights).sum(), qkv)
    plain = naive(*qkv.unbind(1), cu_seqlens, False, 0.25)
    (wanted,) = torch.autograd.grad((plain * weights).sum(), qkv)
    torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


def test_sequences_do_not_see_each_other():
    qkv = torch.randn(sum(LENGTHS), 3, 4, 32)
    cu_seqlens = cu(LENGTHS)
    before = attention(qkv, cu_seqlens, 40)
    qkv[:7] = torch.randn(7, 3, 4, 32)  # the first sequence
    after = attention(qkv, cu_seqlens, 40)
    assert torch.equal(before[7:], after[7:])
    assert not torch.equal(before[:7], after[:7])


def test_no_tokens():
    assert attention(torch.randn(0, 3, 4, 32), cu([]), 0).shape == (0, 4, 32)
    assert attention(torch.randn(0, 3, 4, 32), cu([0, 0]), 0).shape == (0, 4, 32)


def test_dropout_drops(device):
    """Of equal weights of values of one, the output is the share that is kept, scaled."""
    bounds, p = cu([64]).to(device), 0.25
    qkv = torch.zeros(64, 3, 2, 16, device=device)
    qkv[:, 2] = 1.0
    out = attention(qkv, bounds, 64, dropout_p=p)
    kept, n_weights = out[..., 0] * (1 - p), 64 * 64 * 2
    assert (kept.mean() - (1 - p)).abs() < 4 * (p * (1 - p) / n_weights) ** 0.5
    assert not torch.equal(out, attention(qkv, bounds, 64, dropout_p=p))  # by another seed
    torch.manual_seed(0)
    assert torch.equal(out, attention(qkv, bounds, 64, dropout_p=p))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n_queries, n_keys", [(6, 6), (3, 8), (8, 3)])
def test_plain_torch_computes_the_same_with_dropout(n_queries, n_keys, causal):
    """With a share so small that nothing is dropped: what is written out equals torch's own."""
    q, k, v = (torch.randn(n, 2, 16, dtype=torch.float64) for n in (n_queries, n_keys, n_keys))
    more = {"cu_seqlens_k": cu([n_keys]), "max_seqlen_k": n_keys, "causal": causal}
    args = (q, k, v, cu([n_queries]), n_queries)
    out = attention_ref(*args, dropout_p=1e-12, softmax_scale=0.3, **more)
    torch.testing.assert_close(out, attention_ref(*args, softmax_scale=0.3, **more))


def test_weights_are_those_that_are_applied():
    q, k, v = torch.randn(sum(LENGTHS), 3, 2, 16).unbind(1)
    cu_seqlens = cu(LENGTHS)
    weights = attention_weights_ref(q, k, cu_seqlens, 40)
    assert weights.shape == (len(LENGTHS), 2, 40, 40)
    padded = torch.zeros(len(LENGTHS), 40, 2, 16)
    for i, (start, n) in enumerate(zip(cu_seqlens.tolist(), LENGTHS, strict=False)):
        padded[i, :n] = v[start : start + n]
    out = torch.einsum("nhqk,nkhd->nqhd", weights, padded)
    wanted = attention(q, k, v, cu_seqlens, 40)
    torch.testing.assert_close(torch.cat([out[i, :n] for i, n in enumerate(LENGTHS)]), wanted)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q: (q[:, :1].unsqueeze(1), cu([9]), 9), r"qkv must be \(n_tokens, 3, n_heads"),
        (lambda q: (q, q[:5], q, cu([9]), 9), r"k must be as q, \(9, 2, 8\).*got \(5, 2, 8\)"),
        (lambda q: (q, q, q.half(), cu([9]), 9), "v must be as q.*float32.*got.*float16"),
        (lambda q: (q, q, q, cu([9]).long(), 9), "cu_seqlens must be.*int32.*got.*int64"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        attention(*change(torch.randn(9, 2, 8)))


# In one tile of 64, in one of 128, around the edge of it, around that of blocks, in several tiles.
@pytest.mark.parametrize(
    "lengths", [[7, 0, 1, 64], [63, 65], [127, 128], [129, 3], [191, 192, 193], [300, 5]], ids=str
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernels_match_the_formula(lengths, causal, dtype, device):
    bounds = cu(lengths).to(device)
    qkv = torch.randn(sum(lengths), 3, 1, 24, dtype=dtype, device=device)

    def kernel(qkv):
        return attention(qkv, bounds, max(lengths), causal=causal)

    def reference(qkv):
        return attention_ref(*qkv.unbind(1), bounds, max(lengths), causal=causal)

    assert_matches(kernel, reference, qkv)


# Empty ones on either side; more keys than one tile, fewer keys than queries.
@pytest.mark.parametrize(
    "lengths, key_lengths", [([5, 0, 9], [7, 3, 0]), ([70, 3], [20, 150])], ids=str
)
@pytest.mark.parametrize("causal", [False, True])
def test_keys_of_another_text(lengths, key_lengths, causal, device):
    bounds, key_bounds = cu(lengths).to(device), cu(key_lengths).to(device)
    q = torch.randn(sum(lengths), 8, 16, device=device)
    k, v = torch.randn(2, sum(key_lengths), 8, 16, device=device)
    options = {"causal": causal, "cu_seqlens_k": key_bounds, "max_seqlen_k": max(key_lengths)}

    def kernel(q, k, v):
        return attention(q, k, v, bounds, max(lengths), **options)

    def reference(q, k, v):
        return attention_ref(q, k, v, bounds, max(lengths), **options)

    assert_matches(kernel, reference, q, k, v)


@pytest.mark.parametrize("lengths", [[40, 9], [100, 3], [150, 20]], ids=str)
def test_dropout_is_the_same_forward_and_backward(lengths, device):
    """Against the formula that is given the mask."""
    bounds, seed, p = cu(lengths).to(device), torch.tensor([2**40 + 7], device=device), 0.3
    qkv = torch.randn(sum(lengths), 3, 2, 24, device=device)

    def kernel(qkv):
        return attention(qkv, bounds, max(lengths), dropout_p=p, seed=seed)

    def reference(qkv):
        out = []
        for tokens in torch.arange(sum(lengths), device=device).split(lengths):
            q, k, v = qkv[tokens].unbind(1)
            weights = (torch.einsum("qhd,khd->hqk", q, k) * 24**-0.5).softmax(-1)
            keys = tokens - tokens[0]
            kept = [is_kept_ref(seed, tokens, head, keys, p) for head in range(2)]
            out.append(torch.einsum("hqk,khd->qhd", weights * torch.stack(kept) / (1 - p), v))
        return torch.cat(out)

    assert_matches(kernel, reference, qkv)


@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_head_sizes_and_strides(head_dim, device):
    """Tensors that are parts of wider ones."""
    lengths = [33, 70]
    wide = torch.randn(sum(lengths), 3, 2, head_dim + 8, device=device)
    q, k, v = wide[..., :head_dim].unbind(1)
    bounds = cu(lengths).to(device)

    def kernel(q, k, v):
        return attention(q, k, v, bounds, 70)

    def reference(q, k, v):
        return attention_ref(q, k, v, bounds, 70)

    assert_matches(kernel, reference, q, k, v)


def test_many_sequences_of_skewed_lengths(device):
    lengths = (2 + 1.2 * torch.randn(300)).exp().int().tolist()
    assert lengths.count(0) > 5 and max(lengths) > 128 and sorted(lengths)[150] < 10
    bounds = cu(lengths).to(device)
    qkv = torch.randn(sum(lengths), 3, 1, 16, device=device)

    def kernel(qkv):
        return attention(qkv, bounds, max(lengths))

    def reference(qkv):
        return attention_ref(*qkv.unbind(1), bounds, max(lengths))

    assert_matches(kernel, reference, qkv)


# One kernel of the backward, two.
@pytest.mark.parametrize("lengths", [[40, 9], [150, 20]], ids=str)
def test_softmax_scale(lengths, device):
    bounds = cu(lengths).to(device)
    qkv = torch.randn(sum(lengths), 3, 2, 24, device=device)

    def kernel(qkv):
        return attention(qkv, bounds, max(lengths), softmax_scale=0.6)

    def reference(qkv):
        return attention_ref(*qkv.unbind(1), bounds, max(lengths), softmax_scale=0.6)

    assert_matches(kernel, reference, qkv)


# One kernel of the backward, two.
@pytest.mark.parametrize("lengths", [[40, 9, 33], [150, 20, 130]], ids=str)
def test_other_sequences_and_reruns_change_no_bit(lengths, device):
    bounds, seed = cu(lengths).to(device), torch.tensor([3], device=device)
    qkv = torch.randn(sum(lengths), 3, 2, 16, device=device)
    dout = torch.randn(sum(lengths), 2, 16, device=device)

    def both_ways(qkv):
        qkv = qkv.clone().requires_grad_()
        out = attention(qkv, bounds, max(lengths), dropout_p=0.2, seed=seed)
        return out.detach(), *torch.autograd.grad(out, qkv, dout)

    before, again = both_ways(qkv), both_ways(qkv)
    assert all(map(torch.equal, before, again))
    one = slice(lengths[0], lengths[0] + lengths[1])
    qkv[one] = torch.randn_like(qkv[one])
    for x, y in zip(before, both_ways(qkv), strict=True):
        assert torch.equal(x[: one.start], y[: one.start])
        assert torch.equal(x[one.stop :], y[one.stop :])
        assert not torch.equal(x[one], y[one])


# The joined tensor; keys of another text and dropout, with what programs work on made before.
@pytest.mark.parametrize("is_cross", [False, True])
def test_operations(is_cross, device):
    """What torch asks of them: schema, fake, autograd, tracing with symbolic shapes."""
    bounds, key_bounds = cu([5, 0, 12]).to(device), cu([7, 3, 4]).to(device)
    if is_cross:
        tensors = [torch.randn(n, 2, 16, device=device) for n in (17, 14, 14)]
        made = schedule(bounds, 12, 17, cu_seqlens_k=key_bounds, max_seqlen_k=7, n_keys=14)
        tiles = made.query_tiles, made.key_tiles
        numbers = (torch.tensor([3], device=device), True, 0.2, 0.25, 12, 7, *tiles)
    else:
        tensors, key_bounds = [torch.randn(17, 3, 2, 16, device=device), None, None], bounds.clone()
        numbers = (None, False, 0.0, 0.25, 12, 12, None, None)
    leaves = [None if x is None else x.clone().requires_grad_() for x in tensors]
    torch.library.opcheck(_attention_op.op, (*leaves, bounds, key_bounds, *numbers))
    out, lse = _attention_op(*tensors, bounds, key_bounds, *numbers)
    dout = torch.randn_like(out)
    args = (dout, *tensors, out, lse, bounds, key_bounds, *numbers)
    torch.library.opcheck(_attention_backward_op.op, args)


# Where these take more kernels for short sequences than others do.
@pytest.mark.parametrize(
    "name, head_dim, lengths",
    [("ampere", 128, [50, 9]), ("ampere", 128, [100, 9]), ("amd", 64, [100, 9])],
)
def test_launches_of_other_architectures(name, head_dim, lengths, device, monkeypatch):
    monkeypatch.setattr(module, "architecture", lambda device: name)
    bounds = cu(lengths).to(device)
    qkv = torch.randn(sum(lengths), 3, 2, head_dim, device=device).half()

    def kernel(qkv):
        return attention(qkv, bounds, max(lengths), causal=True)

    def reference(qkv):
        return attention_ref(*qkv.unbind(1), bounds, max(lengths), causal=True)

    assert_matches(kernel, reference, qkv)
