import pytest
import torch
from accuracy import KERNEL_DTYPES, ONE_COLUMN, assert_matches

from fastbert.kernels import _triton, pooling
from fastbert.kernels.pooling import _POOL, MODES, _pool_op, pool, pool_ref

LENGTHS = [3, 0, 1, 9]
# Around the tokens that a program takes at once, and more than twice as many.
EDGES = [n + _POOL.block_m for n in (-1, 0, 1, _POOL.block_m + 3)]


def packed(lengths, n_cols, dtype=torch.float32, device="cpu"):
    """hidden, cu_seqlens."""
    hidden = torch.randn(sum(lengths), n_cols, dtype=dtype, device=device)
    return hidden, torch.tensor([0, *lengths], device=device).cumsum(0).int()


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


def matches(hidden, *args):
    assert_matches(lambda x: pool(x, *args), lambda x: pool_ref(x, *args), hidden)


@pytest.mark.parametrize("mode", MODES)
def test_matches_one_by_one(mode):
    hidden, cu_seqlens = packed(LENGTHS, 6, torch.float64)
    wanted = one_by_one(hidden, mode)
    torch.testing.assert_close(pool(hidden, cu_seqlens, mode), wanted)
    unit = pool(hidden, cu_seqlens, mode, normalize=True)
    torch.testing.assert_close(unit, wanted / wanted.norm(dim=1, keepdim=True).clamp(min=1e-12))
    assert pool(hidden[:0], torch.zeros(3, dtype=torch.int32), mode).tolist() == [[0] * 6] * 2


# 300 columns are more than a program's, with masked lanes; 2 are fewer.
@pytest.mark.parametrize(
    "lengths, n_cols",
    [(LENGTHS, 300), (EDGES, 2), ([1], 3), pytest.param([1], 1, marks=ONE_COLUMN)],
)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_kernel_matches_reference(mode, normalize, dtype, lengths, n_cols, device):
    hidden, cu_seqlens = packed(lengths, n_cols, dtype, device)
    matches(hidden, cu_seqlens, mode, normalize)


def test_columns_beyond_one_block_of_the_norm(device):
    hidden, cu_seqlens = packed(LENGTHS, pooling._NORMALIZE.block_n + 3, device=device)
    matches(hidden, cu_seqlens, "cls", True)


def test_many_sequences_of_skewed_lengths(device):
    lengths = (torch.rand(300) ** 16 * 90).int().tolist()
    hidden, cu_seqlens = packed(lengths, 4, device=device)
    matches(hidden, cu_seqlens, "max")


def test_any_stride_and_any_integer(device):
    hidden, cu_seqlens = packed(LENGTHS, 2 * 48, device=device)
    matches(hidden[:, ::2], cu_seqlens.long(), "mean", True)
    matches(hidden[:, :48], cu_seqlens.repeat_interleave(2)[::2], "max")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # plain torch and kernels
def test_equal_maxima_share_the_gradient(dtype, device):
    """Zero and minus infinity are as any other; a maximum may be in several blocks."""
    n = _POOL.block_m - 1
    columns = [[0.0, -1, 0, -2], [7, 7, 7, 7], [-torch.inf] * 4]
    hidden = torch.tensor(columns, dtype=dtype, device=device).T.repeat_interleave(n, 0)
    hidden.requires_grad_()
    out = pool(hidden, torch.tensor([0, 0, 4 * n], device=device).int(), "max")
    assert out.tolist() == [[0] * 3, [0, 7, -torch.inf]]
    out.sum().backward()
    shares = torch.tensor([[2.0, 1, 1], [0, 1, 1]], dtype=dtype, device=device) / (4 * n)
    torch.testing.assert_close(hidden.grad, shares.repeat(2, 1).repeat_interleave(n, 0))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_another_sequence_changes_nothing(mode, normalize, device):
    hidden, cu_seqlens = packed(LENGTHS, 20, device=device)
    changed = hidden.clone()
    changed[:3] = torch.nan
    found = [pool(x, cu_seqlens, mode, normalize) for x in (hidden, changed)]
    assert torch.equal(found[0][1:], found[1][1:])
    assert found[1][0].isnan().all()


@pytest.mark.parametrize("size", [0.0, 1e-14])
def test_a_row_that_is_hardly_there(size, device):
    """Its gradient is that of a division by the least norm."""
    hidden = torch.full((4, 3), size, device=device)
    matches(hidden, torch.tensor([0, 1, 4], device=device).int(), "mean", True)


def test_bfloat16_means_are_summed_in_float32():
    hidden = torch.full((4096, 2), 1.0, dtype=torch.bfloat16)  # a bfloat16 sum stops at 256
    assert pool_ref(hidden, torch.tensor([0, 4096]).int(), "mean").tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_operation(mode, normalize, device):
    """What torch asks of an operation: schema, fake, autograd, tracing with symbolic shapes."""
    hidden, cu_seqlens = packed(LENGTHS, 20, device=device)
    torch.library.opcheck(_pool_op.op, (hidden.requires_grad_(), cu_seqlens, mode, normalize))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_kernel_and_plain_torch_give_the_operation_one_meaning(
    mode, normalize, device, monkeypatch
):
    """What it gives where kernels cannot be compiled."""
    hidden, cu_seqlens = packed(LENGTHS, 20, device=device)

    def reference(x):
        with monkeypatch.context() as patch:
            patch.setattr(pooling, "_forward", None)
            patch.setattr(_triton, "on_kernel_device", lambda x: False)
            return _pool_op(x, cu_seqlens, mode, normalize)[0]

    assert_matches(lambda x: pool(x, cu_seqlens, mode, normalize), reference, hidden)


def test_compiles_whole(device):
    hidden, cu_seqlens = packed(LENGTHS, 20, device=device)
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    hidden.requires_grad_()
    gradients = [
        torch.autograd.grad(f(hidden, cu_seqlens, "max", True).square().sum(), hidden)[0]
        for f in (compiled, pool)
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    "shape, cu_seqlens, mode, message",
    [
        (
            (2, 2),
            torch.tensor([0, 2]),
            "median",
            "mode must be one of mean, cls, max, got 'median'",
        ),
        ((1, 2, 2), torch.tensor([0, 2]), "mean", r"\(n_tokens, hidden\), got \(1, 2, 2\)"),
        ((2, 2), torch.ones(1, 2), "mean", r"\(n_seqs \+ 1,\) int32.*got \(1, 2\) torch\.float32"),
    ],
)
@pytest.mark.parametrize("kernels", [True, False])
def test_refuses(shape, cu_seqlens, mode, message, kernels, monkeypatch):
    monkeypatch.setattr(_triton, "is_interpreted", lambda: kernels)
    with pytest.raises(ValueError, match=message):
        pool(torch.ones(shape), cu_seqlens, mode)
