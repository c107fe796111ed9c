import pytest
import torch
from accuracy import KERNEL_DTYPES, ONE_COLUMN, assert_matches

from fastbert.kernels import _triton, embeddings
from fastbert.kernels._dropout import is_kept_ref
from fastbert.kernels.embeddings import _CHUNK, _LAUNCHES, _embed_op, embed, embed_ref

SIZES = (11, 2, 9)  # rows of the tables: words, token types, positions


def tables(n_cols=16, dtype=torch.float64, device="cpu", sizes=SIZES):
    """word, token_type, position, weight, bias."""
    shapes = *((n, n_cols) for n in sizes), (n_cols,), (n_cols,)
    return [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]


def ids(n_tokens=20, device="cpu", sizes=SIZES):
    return [torch.randint(0, n, (n_tokens,), device=device) for n in sizes]


def matches(ids, args, factor=2.0, **options):
    def on(function):
        return lambda *args, **options: function(*ids, *args, **options)

    assert_matches(on(embed), on(embed_ref), *args, factor=factor, eps=1e-5, **options)


def test_matches_the_sum_normalised():
    word, token_type, position, weight, bias = tables()
    w, t, p = ids()
    out = embed(w, t, p, word, token_type, position, weight, bias, eps=1e-6)
    x = word[w] + token_type[t] + position[p]
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(out, x * weight + bias, rtol=1e-12, atol=1e-12)


# 768 is BERT-base; 100 leaves masked lanes; 1025 is another row of the table; (1, 3) is the edge.
# Tokens one more and one less than those at once.
@pytest.mark.parametrize(
    "n_tokens, n_cols",
    [(5, 768), (9, 100), (7, 257), (3, 1025), (1, 3), pytest.param(1, 1, marks=ONE_COLUMN)],
)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_kernel_matches_reference(n_tokens, n_cols, dtype, device):
    matches(ids(n_tokens, device), tables(n_cols, dtype, device))


# Token types are summed with weight and bias up to 2, else as the other tables. 20 rows and more
# are sorted as 32 bits.
@pytest.mark.parametrize("sizes", [(11, 1, 8), (11, 2, 9), (11, 3, 9), (1, 1, 1)])
def test_sizes_of_tables(sizes, device, monkeypatch):
    monkeypatch.setattr(embeddings, "_SHORT", 20)
    matches(ids(25, device, sizes), tables(4, torch.float32, device, sizes))


@pytest.mark.parametrize("n_rows", [3, 2])
def test_runs_of_one_id(n_rows, device):
    """Runs that end around a chunk's edge, and one of several chunks."""
    sizes = (11, n_rows, 9)
    words, types, positions = ids(4 * _CHUNK + 5, device, sizes)
    positions[:] = 3
    lengths = torch.tensor([1, _CHUNK - 1, _CHUNK, _CHUNK + 1, _CHUNK + 4], device=device)
    words = torch.repeat_interleave(torch.tensor([9, 0, 2, 3, 5], device=device), lengths)
    shuffled = torch.randperm(len(words), device=device)
    args = tables(8, torch.float32, device, sizes)
    matches((words[shuffled], types, positions), args)


def test_more_tokens_than_the_backward_has_programs(device, monkeypatch):
    monkeypatch.setattr(embeddings, "_PROCESSORS", 1)
    matches(ids(61, device), tables(40, torch.float32, device))


def test_any_stride_and_any_integer(device):
    word, token_type, position, weight, bias = tables(48, torch.float32, device)
    position = torch.stack([position, position + 1], 1)[:, 0]
    token_type = token_type.T.contiguous().T  # its last axis is not contiguous
    words, types, positions = ids(6, device)
    args = (words.int(), types[::2].repeat_interleave(2), positions[:1].int().expand(6))
    matches(args, [word, token_type, position, weight, bias])


def test_the_gradient_is_the_same_each_time(device):
    args = [x.requires_grad_() for x in tables(8, torch.float32, device)]
    tokens = ids(100, device)
    first, second = (torch.autograd.grad(embed(*tokens, *args).square().sum(), args) for _ in "ab")
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("padding_idx", [0, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # plain torch and kernels
def test_the_padding_row_gets_no_gradient(padding_idx, dtype, device):
    args = [x.requires_grad_() for x in tables(dtype=dtype, device=device)]
    tokens = torch.tensor([0, 3, 10, 10], device=device), *torch.zeros(2, 4, device=device).long()
    embed(*tokens, *args, padding_idx=padding_idx).square().sum().backward()
    got = args[0].grad.abs().amax(1).nonzero().flatten().tolist()
    assert got == [i for i in (0, 3, 10) if i != padding_idx % 11]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # plain torch and kernels
def test_frozen_tables(dtype, device):
    """What is left when no table asks for a gradient."""
    tokens, gradients = ids(7, device), []
    *of_rows, weight, bias = tables(24, dtype, device)
    norm = weight.requires_grad_(), bias.requires_grad_()
    for frozen in (True, False):
        of_rows = [x.requires_grad_(not frozen) for x in of_rows]
        out = _embed_op(*of_rows, *tokens, *norm, None, 0.0, 1e-5, -1, dtype)[0]
        gradients.append(torch.autograd.grad(out.square().sum(), norm))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("outside", [-1, 11, 2**40])
def test_an_id_outside_spoils_its_token_alone(which, outside, device):
    args, tokens = tables(24, torch.float32, device), ids(7, device)
    plain = embed(*tokens, *args)
    tokens[which][2] = outside
    out = embed(*tokens, *(x.requires_grad_() for x in args))
    assert out[2].isnan().all()
    assert torch.equal(out[3:], plain[3:]) and torch.equal(out[:2], plain[:2])
    out.sum().backward()  # writes nowhere else
    assert args[3].grad.isnan().all()


def test_dropout_is_the_same_forward_and_backward(device):
    """Against plain torch that is given the mask."""
    seed, p, tokens = torch.tensor([2**40 + 3], device=device), 0.25, ids(37, device)
    rows, cols = torch.arange(37, device=device), torch.arange(300, device=device)
    kept = is_kept_ref(seed, rows, 0, cols, p)

    def reference(*args):
        return embed_ref(*tokens, *args, eps=1e-5) * kept / (1 - p)

    def kernel(*args):
        return embed(*tokens, *args, p, 1e-5, seed=seed)

    args = tables(300, torch.float32, device)
    assert_matches(kernel, reference, *args)
    assert not torch.equal(embed(*tokens, *args, p, 1e-5, seed=seed + 1), kernel(*args))


def test_dropout_follows_torchs_generator(device):
    tokens, args = ids(8, device), tables(64, torch.float32, device)
    torch.manual_seed(1)
    first = embed(*tokens, *args, dropout_p=0.5)
    assert not torch.equal(first, embed(*tokens, *args, dropout_p=0.5))
    torch.manual_seed(1)
    assert torch.equal(first, embed(*tokens, *args, dropout_p=0.5))


def test_dropout_rate():
    out = embed(*(torch.zeros(4000).long(),) * 3, *tables(), dropout_p=0.25)
    assert 0.23 < (out == 0).double().mean() < 0.27


def test_half_precision_with_wide_weights(device):
    *half, weight, bias = tables(64, torch.float32, device)
    half = [x.half() for x in half]
    tokens = ids(5, device)
    out = embed(*tokens, *half, weight, bias)
    assert out.dtype == torch.float16
    wanted = embed_ref(*tokens, *(x.float() for x in half), weight, bias)
    torch.testing.assert_close(out, wanted.half(), rtol=1e-3, atol=1e-3)
    with torch.autocast(device.type, torch.bfloat16):
        out = embed(*tokens, *half, weight, bias)
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("n_cols", [_LAUNCHES[-1][0] + 1, 8])
def test_sizes_that_no_kernel_takes(n_cols, device):
    tokens = ids(2 if n_cols > 8 else 0, device)
    args = tables(n_cols, torch.float32, device)
    assert torch.equal(embed(*tokens, *args), embed_ref(*tokens, *args))


def test_ids_of_any_shape(device):
    tokens, args = ids(6, device), tables(24, torch.float32, device)
    out = embed(*(x.view(2, 3) for x in tokens), *args)
    assert torch.equal(out, embed(*tokens, *args).view(2, 3, 24))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_operation(dropout_p, device):
    """What torch asks of an operation: schema, fake, autograd, tracing with symbolic shapes."""
    *of_rows, weight, bias = (x.requires_grad_() for x in tables(20, torch.float32, device))
    seed = torch.tensor([5], device=device) if dropout_p else None
    args = (*of_rows, *ids(6, device), weight, bias, seed, dropout_p, 1e-5, 0, torch.float32)
    torch.library.opcheck(_embed_op.op, args)


def test_kernel_and_plain_torch_give_the_operation_one_meaning(device, monkeypatch):
    """What it gives where kernels cannot be compiled."""
    seed, tokens = torch.tensor([5], device=device), ids(6, device)

    def kernel(*args):
        return embed(*tokens, *args, 0.5, 1e-5, 3, seed=seed)

    def reference(*args):
        with monkeypatch.context() as patch:
            patch.setattr(embeddings, "_forward", None)
            patch.setattr(_triton, "on_kernel_device", lambda x: False)
            return _embed_op(*args[:3], *tokens, *args[3:], seed, 0.5, 1e-5, 3, args[0].dtype)[0]

    assert_matches(kernel, reference, *tables(20, torch.float32, device))


def test_compiles_whole(device):
    tokens = ids(6, device)
    args = [x.requires_grad_() for x in tables(20, torch.float32, device)]
    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager")
    gradients = [
        torch.autograd.grad(f(*tokens, *args).square().sum(), args) for f in (compiled, embed)
    ]
    for found, wanted in zip(*gradients, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "change, message",
    [
        ({2: torch.zeros(3).long()}, r"position_ids must have the shape.*\(20,\), got \(3,\)"),
        ({0: torch.zeros(20)}, r"ids must be int32 or int64 on cpu as word, got torch\.float32"),
        ({4: torch.ones(2, 8)}, r"token_type must be \(rows, 16\).*got \(2, 8\)"),
        ({5: torch.ones(9, 16).half()}, r"position must be \(rows, 16\).*got \(9, 16\).*float16"),
        ({7: torch.ones(8)}, r"weight and bias must have shape \(16,\), got \(16,\) and \(8,\)"),
        ({8: -0.5}, r"dropout_p must be from 0 to 1, got -0\.5"),
        ({10: 11}, r"padding_idx must be a row of word's 11, got 11"),
    ],
)
@pytest.mark.parametrize("kernels", [True, False])
def test_refuses(change, message, kernels, monkeypatch):
    monkeypatch.setattr(_triton, "is_interpreted", lambda: kernels)
    args = [*ids(), *tables(dtype=torch.float32), 0.0, 1e-12, None]
    for place, value in change.items():
        args[place] = value
    with pytest.raises(ValueError, match=message):
        embed(*args)
