"""Random cases of every operation, against float64: `python tests/support/soak.py`.

Case number i of a seed is always the same: `--first` goes on where a run ended, and what failed is
run again with `--first i --cases 1`. Each is held to twice the error of plain torch in its dtype,
output and gradients, and must give the same bits twice.
"""

import argparse
import itertools
import os
import random
import sys
import time
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import torch
from accuracy import DRAWS, KERNEL_DTYPES, assert_matches, outcome

from fastbert.kernels import _triton
from fastbert.kernels._dropout import is_kept_ref
from fastbert.kernels.attention import attention, attention_ref
from fastbert.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from fastbert.kernels.embeddings import embed, embed_ref
from fastbert.kernels.gelu import ACTIVATIONS, bias_gelu, bias_gelu_ref
from fastbert.kernels.layer_norm import layer_norm, layer_norm_ref
from fastbert.kernels.linear_gelu import _linear_gelu_op, linear_gelu_ref
from fastbert.kernels.pooling import MODES, pool, pool_ref

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Case:
    """rng: chooses shapes and flags. longest: of a sequence. checked: compare, or only compute."""

    rng: random.Random
    longest: int
    checked: bool

    def __post_init__(self):
        self.choose, self.dtype = self.rng.choice, self.rng.choice(KERNEL_DTYPES)

    def randn(self, *shape):
        """Every third one is a part of something wider."""
        wide = self.choose([0, 0, 8])
        x = torch.randn(*shape[:-1], shape[-1] + wide, dtype=self.dtype, device=DEVICE)
        return x[..., : shape[-1]]

    def ids(self, n_rows, n):
        return torch.randint(n_rows, (n,), device=DEVICE)

    def lengths(self, n_seqs=None):
        """Empty and short ones among them; at least one token."""
        longest = self.choose([3, 64, 65, 128, 129, self.longest])
        n_seqs = n_seqs or self.rng.randint(1, 12)
        lengths = [
            round(min(longest, self.longest) * self.rng.random() ** 2) for _ in range(n_seqs)
        ]
        return lengths if any(lengths) else [1, *lengths[1:]]

    def columns(self):
        most = 8 * self.longest
        return self.choose([min(most, n) for n in (384, 768, 1024, self.rng.randint(1, 4096))])

    def seed_and_p(self):
        seed = torch.tensor([self.rng.getrandbits(60)], device=DEVICE)
        return seed, self.choose([0.0, 0.0, 0.1, 0.5])

    def check(self, function, reference, *tensors):
        dout = torch.randn_like(reference(*tensors))
        runs = [outcome(function, list(tensors), dout) for _ in range(2)]
        assert all(map(torch.equal, *runs)), "two runs differ"
        if _triton.failures:  # what was compared is plain torch
            raise RuntimeError(f"no kernel: {_triton.failures}")
        if self.checked:
            assert_matches(function, reference, *tensors)


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int().to(DEVICE)


def attention_given_kept(q, k, v, lengths, seed, p, scale):
    """The formula, a sequence at a time, with the weights that a kernel keeps."""
    out = []
    for tokens in torch.arange(sum(lengths), device=q.device).split(lengths):
        scores = torch.einsum("qhd,khd->hqk", q[tokens], k[tokens]) * scale
        keys = torch.arange(len(tokens), device=q.device)
        kept = [is_kept_ref(seed, tokens, head, keys, p) for head in range(q.shape[1])]
        weights = scores.softmax(-1) * torch.stack(kept) / (1 - p)
        out.append(torch.einsum("hqk,khd->qhd", weights, v[tokens]))
    return torch.cat(out)


def check_attention(case):
    lengths, heads = case.lengths(), case.choose([1, 2, 6, 12])
    dim, (seed, p) = case.choose([16, 32, 64, 80, 128]), case.seed_and_p()
    scale = case.choose([dim**-0.5, 0.3])
    if p:
        given = bounds_of(lengths), max(lengths)
        case.check(
            lambda qkv: attention(qkv, *given, dropout_p=p, softmax_scale=scale, seed=seed),
            lambda qkv: attention_given_kept(*qkv.unbind(1), lengths, seed, p, scale),
            case.randn(sum(lengths), 3, heads, dim),
        )
        return
    options = {"causal": case.choose([False, True]), "softmax_scale": scale}
    key_lengths = case.lengths(len(lengths)) if case.choose([False, True]) else lengths
    if key_lengths is not lengths:
        options |= {"cu_seqlens_k": bounds_of(key_lengths), "max_seqlen_k": max(key_lengths)}
    given = bounds_of(lengths), max(lengths)
    case.check(
        lambda q, k, v: attention(q, k, v, *given, **options),
        lambda q, k, v: attention_ref(q, k, v, *given, **options),
        *(case.randn(sum(n), heads, dim) for n in (lengths, key_lengths, key_lengths)),
    )


def kept(shape, seed, p):
    rows, columns = (torch.arange(n, device=DEVICE) for n in shape)
    return is_kept_ref(seed, rows, 0, columns, p) / (1 - p)


def check_layer_norm(case):
    shape, (seed, p) = (sum(case.lengths()), case.columns()), case.seed_and_p()
    factor, residual = kept(shape, seed, p), case.choose([[], [shape]])
    case.check(
        lambda *args: layer_norm(*args, dropout_p=p, seed=seed),
        lambda x, *args: layer_norm_ref(x * factor.to(x.dtype), *args),
        *(case.randn(*size) for size in (shape, shape[1:], shape[1:], *residual)),
    )


def check_embed(case):
    n_tokens, n_cols, (seed, p) = sum(case.lengths()), case.columns(), case.seed_and_p()
    # So many that ids take 32 bits; a program for each is too many to interpret.
    many = 60 * case.longest if n_cols <= 1024 and DEVICE.type == "cuda" else 9
    rows = [case.choose([5, case.longest // 2]), case.choose([1, 2, 3]), case.choose([9, many])]
    ids, factor = [case.ids(n, n_tokens) for n in rows], kept((n_tokens, n_cols), seed, p)
    padding_idx = case.choose([None, 0])
    case.check(
        lambda *args: embed(*ids, *args, dropout_p=p, seed=seed, padding_idx=padding_idx),
        lambda x, *args: (
            embed_ref(*ids, x, *args, padding_idx=padding_idx) * factor.to(x.dtype)
        ),
        *(case.randn(*size) for size in (*((n, n_cols) for n in rows), (n_cols,), (n_cols,))),
    )  # fmt: skip


def check_bias_gelu(case):
    n_cols, activation = case.columns(), case.choose(list(ACTIVATIONS))
    bias = [case.randn(n_cols)] if case.choose([True, False]) else []
    case.check(
        lambda x, b=None: bias_gelu(x, b, activation),
        lambda x, b=None: bias_gelu_ref(x, b, activation),
        case.randn(sum(case.lengths()), n_cols), *bias,
    )  # fmt: skip


def check_linear_gelu(case):
    """The one kernel, whether it is the faster way or not; float32 is plain torch's."""
    n_in, n_out = (8 * case.rng.randint(1, 2 * case.longest // 8 + 1) for _ in range(2))
    case.dtype = case.choose(KERNEL_DTYPES[1:])
    activation = case.choose(list(ACTIVATIONS))

    def one_kernel(x, weight, bias):
        if x.dtype == torch.float64:
            return linear_gelu_ref(x, weight, bias, activation)
        return _linear_gelu_op(x, weight, bias, activation, True)[0]

    x, weight, bias = (
        case.randn(*s) for s in ((sum(case.lengths()), n_in), (n_out, n_in), (n_out,))
    )
    reference = partial(linear_gelu_ref, activation=activation)
    case.check(one_kernel, reference, x, weight / n_in**0.5, bias)


def check_cross_entropy(case):
    n_tokens, n_classes = sum(case.lengths()), case.choose([2, 77, 3000, 3008])
    hidden = 8 * case.rng.randint(1, 32)
    labels = case.ids(n_classes, n_tokens)
    labels[1 :: case.choose([2, 7])] = -100
    options = {
        "label_smoothing": case.choose([0.0, 0.1]),
        "reduction": case.choose(["mean", "sum", "none"]),
    }
    bias = [case.randn(n_classes)] if case.choose([True, False]) else []
    case.check(
        lambda x, w, b=None: linear_cross_entropy(x, w, b, labels, **options).loss,
        lambda x, w, b=None: linear_cross_entropy_ref(x, w, b, labels, **options).loss,
        case.randn(n_tokens, hidden), case.randn(n_classes, hidden) / hidden**0.5, *bias,
    )  # fmt: skip


def check_pool(case):
    lengths = case.lengths()
    how = bounds_of(lengths), case.choose(list(MODES)), case.choose([False, True])
    x = case.randn(sum(lengths), case.columns())
    case.check(lambda x: pool(x, *how), lambda x: pool_ref(x, *how), x)


CHECKS = (
    check_attention, check_layer_norm, check_embed, check_bias_gelu, check_linear_gelu,
    check_cross_entropy, check_pool,
)  # fmt: skip


def run_case(i, seed=0, longest=600, checked=True):
    """(draws that were over the bar, what went wrong in the last of them or None)."""
    check, error = CHECKS[i % len(CHECKS)], None
    for draw in range(DRAWS):
        rng = random.Random(f"{seed} {i}")  # the same shapes and flags, by the same choices
        torch.manual_seed(hash((seed, i, draw)))
        try:
            check(Case(rng, longest, checked))
        except Exception as raised:  # of whatever kind: it is the finding
            error = f"case {i} of seed {seed}, {check.__name__}: {type(raised).__name__}: {raised}"
            if not isinstance(raised, AssertionError) or "two runs" in str(raised):
                return draw + 1, error
        else:
            return draw, None
    return DRAWS, error


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=450.0, help="stop after these")
    parser.add_argument("--longest", type=int, default=600, help="tokens of a sequence")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes")
    parser.add_argument("--unchecked", action="store_true", help="compute, but compare nothing")
    args = parser.parse_args()

    if DEVICE.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    start, redrawn, failed, done = time.monotonic(), 0, 0, args.first
    one = partial(run_case, seed=args.seed, longest=args.longest, checked=not args.unchecked)
    cases = range(args.first, args.first + args.cases)
    workers = get_context("spawn").Pool(args.jobs) if args.jobs > 1 else None
    found = workers.imap(one, cases) if workers else map(one, cases)
    for done, (draws, error) in zip(itertools.count(args.first + 1), found, strict=False):
        redrawn += draws > 0 and error is None
        failed += error is not None
        if error:
            print(error, flush=True)
        seconds = time.monotonic() - start
        if (done - args.first) % 500 == 0:
            print(f"{done} cases after {seconds:.0f} s", flush=True)
        if seconds > args.seconds or failed > 20 or "CUDA error" in (error or ""):
            break
    if workers:
        workers.terminate()
    print(
        f"{done - args.first} cases of seed {args.seed} on {DEVICE}, from {args.first}: {failed} "
        f"failed, {redrawn} drawn again; goes on with --first {done}"
    )
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
