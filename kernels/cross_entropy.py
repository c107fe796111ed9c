"""Linear layer and cross entropy on labelled positions only, a chunk of logits at a time.

Where the loss is one number, its gradient is made with it and only scaled in the backward, as in
Liger Kernel (Hsu et al. 2024): logits are never kept, nor computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels._operation import operation
from fastbert.kernels._triton import jit, next_power_of_2, run, tl


class LinearCrossEntropy(NamedTuple):
    loss: Tensor
    n_correct: Tensor  # labelled positions whose largest logit is the label's; int64
    n_labelled: Tensor  # int64


def linear_cross_entropy_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int = -100,
    *,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> LinearCrossEntropy:
    logits = F.linear(x, weight, bias)
    logits = logits.to(_wide(logits))
    loss = F.cross_entropy(
        logits,
        labels,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    labelled = labels != ignore_index
    return LinearCrossEntropy(
        loss, (labelled & (logits.argmax(-1) == labels)).sum(), labelled.sum()
    )


def _wide(x: Tensor) -> torch.dtype:
    """In what losses are computed and gradients of parameters are summed."""
    return torch.promote_types(x.dtype, torch.float32)


# Logits at a time: 256 MB in half precision, 4,397 rows of BERT's 30,522.
_MOST_LOGITS = 2**27
# Columns of logits are a multiple of this, for whole loads and matrix products at full speed.
_COLUMNS = 64


@dataclass(frozen=True)
class _Launch:
    block_n: int  # columns at once
    num_warps: int


# By the largest number of columns. Not measured yet, but chosen from the compile report: eight
# columns a thread are a load of 16 bytes and leave five rows at work on each processor of an H200;
# of long rows there are fewer at work, so that these stay in L2 for the second pass.
_LAUNCHES = (
    (49152, _Launch(2048, 8)),
    (98304, _Launch(4096, 16)),
    (2**31 - 1, _Launch(8192, 16)),
)


def _launch(n_cols: int) -> _Launch:
    return next(launch for most, launch in _LAUNCHES if n_cols <= most)


@jit()
def _cross_entropy_fwd_kernel(
    logits_ptr, labels_ptr, dlosses_ptr, losses_ptr, correct_ptr,
    stride_logits, n_cols, smoothing,
    HAS_GRADIENT: tl.constexpr, HAS_DLOSSES: tl.constexpr, HAS_SMOOTHING: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A row: its loss, whether its label is the largest, and in place of logits their gradient."""
    row = tl.program_id(0).to(tl.int64)  # int64: row * stride passes 2**31
    logits_ptr += row * stride_logits

    # Each lane has its own maximum, first column that has it, and sum of exponentials below it
    # (Milakov and Gimelshein 2018): no reduction before the end, and one exponential a column,
    # as one of the two is always exp(0).
    most = tl.full([BLOCK_N], -3.4e38, tl.float32)  # not -inf, which less itself is nan
    best = tl.zeros([BLOCK_N], tl.int32)
    exps = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        # stride_logits, a multiple of 16: a mask by n_cols would split the load.
        x = tl.load(logits_ptr + cols, mask=cols < stride_logits, other=0.0).to(tl.float32)
        x = tl.where(cols < n_cols, x, -float("inf"))
        rise = x - most
        exp = tl.exp(-tl.abs(rise))
        exps = tl.where(rise > 0, exps * exp + 1.0, exps + exp)
        best = tl.where(rise > 0, cols, best)
        most = tl.maximum(most, x)
        if HAS_SMOOTHING:
            total += tl.where(cols < n_cols, x, 0.0)

    # Before the reductions: no thread stores a gradient until all have passed these.
    label = tl.load(labels_ptr + row)
    is_column = (label >= 0) & (label < n_cols)
    at_label = tl.load(logits_ptr + label, mask=is_column, other=float("nan")).to(tl.float32)

    top = tl.max(most, 0)
    log_sum = tl.log(tl.sum(exps * tl.exp(most - top), 0))
    winner = tl.min(tl.where(most == top, best, n_cols), 0)
    loss = top - at_label + log_sum
    if HAS_SMOOTHING:
        uniform = top - tl.sum(total, 0) / n_cols + log_sum
        loss += smoothing * (uniform - loss)
    tl.store(losses_ptr + row, loss)
    tl.store(correct_ptr + row, (winner == label).to(tl.int64))

    if HAS_GRADIENT:
        for start in range(0, stride_logits, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            mask = cols < stride_logits
            x = tl.load(logits_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            gradient = tl.exp(x - top - log_sum)
            if HAS_SMOOTHING:
                gradient -= smoothing / n_cols
                gradient = tl.where(cols == label, gradient - (1.0 - smoothing), gradient)
            else:
                gradient = tl.where(cols == label, gradient - 1.0, gradient)
            if HAS_DLOSSES:
                gradient *= tl.load(dlosses_ptr + row)
            gradient = tl.where(cols < n_cols, gradient, 0.0)
            tl.store(logits_ptr + cols, gradient, mask=mask)


# What the operations take and give: gradients of x (n_tokens, hidden), weight and bias as these,
# each empty unless wanted, a flag for each; counts (2,) int64, correct and labelled. Where the
# loss is one number, gradients are those of its sum, not divided: 1 / n_labelled would take many
# of float16's to zero. The reduction "none" computes them in its backward.


@operation("fastbert::linear_cross_entropy")
def _linear_cross_entropy_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, counts, and gradients of x in its dtype, of weight and bias in float32."""
    args = (x, weight, bias, labels, ignore_index, label_smoothing, reduction, wanted)
    return run("cross_entropy", _forward, _forward_ref, *args)


@operation("fastbert::linear_cross_entropy_backward")
def _linear_cross_entropy_backward_op(
    dlosses: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    args = (x, dlosses, weight, bias, labels, ignore_index, label_smoothing, wanted)
    return run("cross_entropy", _backward, _backward_ref, *args)


@_linear_cross_entropy_op.register_fake
def _(x, weight, bias, labels, ignore_index, label_smoothing, reduction, wanted):
    loss = x.new_empty(x.shape[0] if reduction == "none" else (), dtype=_wide(x))
    dx, dweight, dbias = _empty_gradients(x, weight, wanted)
    return loss, labels.new_empty(2), dx, dweight, dbias


@_linear_cross_entropy_backward_op.register_fake
def _(dlosses, x, weight, bias, labels, ignore_index, label_smoothing, wanted):
    dx, dweight, dbias = _empty_gradients(x, weight, wanted)
    return dx, dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype)


def _empty_gradients(x, weight, wanted, n_cols=None):
    """Of x, and of weight and bias with room for n_cols."""
    n_cols = weight.shape[0] if n_cols is None else n_cols
    shapes = x.shape, (n_cols, x.shape[1]), (n_cols,)
    dtypes = x.dtype, _wide(x), _wide(x)
    return [
        x.new_empty(shape if is_wanted else 0, dtype=dtype)
        for shape, dtype, is_wanted in zip(shapes, dtypes, wanted, strict=True)
    ]


def _save(ctx, inputs, output) -> None:
    x, weight, bias, labels, ctx.ignore_index, ctx.label_smoothing, ctx.reduction, _ = inputs
    ctx.set_materialize_grads(False)  # no zeros as large as the gradients
    ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
    if ctx.reduction == "none":
        ctx.save_for_backward(x, weight, bias, labels)
    else:
        ctx.save_for_backward(*output[1:])


def _differentiate(ctx, dloss, *_):
    needed = list(ctx.needs_input_grad[:3])
    if dloss is None:
        gradients = [None] * 3
    elif ctx.reduction == "none":
        x, weight, bias, labels = ctx.saved_tensors
        gradients = _linear_cross_entropy_backward_op(
            dloss, x, weight, bias, labels, ctx.ignore_index, ctx.label_smoothing, needed
        )
    else:
        counts, *gradients = ctx.saved_tensors
        if ctx.reduction == "mean":
            dloss = dloss / counts[1].clamp(min=1)
        gradients = [
            # `out` makes it one pass; a scale of one dimension is not rounded to half precision.
            torch.mul(gradient, dloss.view(1), out=torch.empty_like(gradient, dtype=dtype))
            if is_needed
            else None
            for gradient, dtype, is_needed in zip(gradients, ctx.dtypes, needed, strict=True)
        ]
    gradients = [g if is_needed else None for g, is_needed in zip(gradients, needed, strict=True)]
    return *gradients, None, None, None, None, None


_linear_cross_entropy_op.register_autograd(_differentiate, setup_context=_save)


def _labelled_rows(labels: Tensor, ignore_index: int, n_cols: int) -> Tensor:
    """(n_labelled,) int64. Waits for the device: on the host, that is how much work there is."""
    rows = (labels != ignore_index).nonzero().squeeze(1)
    if labels.device.type == "cpu" and rows.numel():
        least, most = (int(x) for x in labels[rows].aminmax())
        if least < 0 or most >= n_cols:
            wrong = least if least < 0 else most
            raise ValueError(
                f"labels must be from 0 to {n_cols - 1} or ignore_index {ignore_index}, got {wrong}"
            )
    return rows


def _in_chunks(losses_of, x, weight, bias, labels, rows, label_smoothing, wanted, dlosses=None):
    """losses and correct, (n_rows,) each, and the gradients of their sum, weighted by dlosses."""
    n_rows, n_cols, n_padded = len(rows), len(weight), -(-len(weight) // _COLUMNS) * _COLUMNS
    labels = labels.index_select(0, rows)
    weight = _padded(weight, n_padded, x.dtype)
    bias = None if bias is None else _padded(bias, n_padded, x.dtype)
    losses = x.new_empty(n_rows, dtype=_wide(x))
    correct = labels.new_empty(n_rows)
    dx, dweight, dbias = _empty_gradients(x, weight, wanted)
    dx.zero_()
    if not n_rows:
        dweight.zero_()
    dbias.zero_()

    n_chunks = max(-(-n_rows * n_padded // _MOST_LOGITS), 1)
    size = max(-(-n_rows // (4 * n_chunks)) * 4, 1)  # so that chunks begin at multiples of 16 bytes
    buffer = x.new_empty(min(size, n_rows), n_padded)
    for begin in range(0, n_rows, size):
        chunk = slice(begin, begin + size)
        inputs = x.index_select(0, rows[chunk])
        logits = buffer[: len(inputs)]
        if bias is None:
            torch.mm(inputs, weight.T, out=logits)
        else:
            torch.addmm(bias, inputs, weight.T, out=logits)
        losses_of(
            logits, labels[chunk], None if dlosses is None else dlosses[chunk],
            losses[chunk], correct[chunk], n_cols, label_smoothing, any(wanted),
        )  # fmt: skip
        if wanted[0]:
            dx.index_copy_(0, rows[chunk], logits @ weight)
        if wanted[1]:
            _add_product(dweight, logits.T, inputs, is_first=begin == 0)
        if wanted[2]:
            dbias += logits.sum(0, dtype=dbias.dtype)
    return losses, correct, (dx, dweight[:n_cols], dbias[:n_cols])


def _padded(x: Tensor, n_rows: int, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype` with rows of zeros up to n_rows; itself where it is that."""
    if len(x) == n_rows and x.dtype == dtype:
        return x.contiguous()
    out = x.new_empty(n_rows, *x.shape[1:], dtype=dtype)
    out[: len(x)] = x
    out[len(x) :] = 0
    return out


# The first torch whose addmm adds to float32 what it multiplies in half precision.
_ADDMM_WIDENS = torch.version.cuda is not None and torch.__version__ >= "2.10"


def _add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
    """total += a @ b, or total = a @ b."""
    beta = 0 if is_first else 1
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda and _ADDMM_WIDENS:
        torch.addmm(total, a, b, total.dtype, beta=beta, out=total)
    elif is_first:
        total.copy_(a @ b)
    else:
        total += a @ b


def _losses_ref(logits, labels, dlosses, losses, correct, n_cols, label_smoothing, has_gradient):
    """Fill losses and correct; with has_gradient, put that of the losses in place of logits."""
    logits = logits[:, :n_cols]  # the rest is zero, as is its gradient
    correct.copy_(logits.argmax(-1) == labels)
    log_p = logits.to(losses.dtype).log_softmax(-1)
    labels = labels.unsqueeze(1)
    losses.copy_(-log_p.gather(1, labels).squeeze(1))
    if label_smoothing:
        losses.lerp_(-log_p.mean(-1), label_smoothing)
    if has_gradient:
        gradient = log_p.exp_().sub_(label_smoothing / n_cols)
        gradient.scatter_add_(1, labels, gradient.new_full(labels.shape, label_smoothing - 1))
        logits.copy_(gradient if dlosses is None else gradient.mul_(dlosses.unsqueeze(1)))


def _losses(logits, labels, dlosses, losses, correct, n_cols, label_smoothing, has_gradient):
    """As _losses_ref."""
    launch = _launch(n_cols)
    _cross_entropy_fwd_kernel[(len(logits),)](
        logits, labels, dlosses, losses, correct,
        logits.stride(0), n_cols, label_smoothing,
        HAS_GRADIENT=has_gradient, HAS_DLOSSES=dlosses is not None,
        HAS_SMOOTHING=label_smoothing > 0,
        BLOCK_N=min(launch.block_n, next_power_of_2(n_cols)), num_warps=launch.num_warps,
    )  # fmt: skip


def _forward_with(
    losses_of: Callable,
    x, weight, bias, labels, ignore_index, label_smoothing, reduction, wanted,
):  # fmt: skip
    rows = _labelled_rows(labels, ignore_index, len(weight))
    losses, correct, gradients = _in_chunks(
        losses_of, x, weight, bias, labels, rows, label_smoothing, wanted
    )
    counts = torch.stack([correct.sum(), correct.new_full((), len(rows))])
    if reduction == "none":
        loss = losses.new_zeros(len(x)).index_copy_(0, rows, losses)
    else:
        loss = losses.sum() if reduction == "sum" else losses.mean()
    return loss, counts, *gradients


def _backward_with(
    losses_of: Callable,
    x, dlosses, weight, bias, labels, ignore_index, label_smoothing, wanted,
):  # fmt: skip
    rows = _labelled_rows(labels, ignore_index, len(weight))
    dlosses = dlosses.index_select(0, rows)
    _, _, (dx, dweight, dbias) = _in_chunks(
        losses_of, x, weight, bias, labels, rows, label_smoothing, wanted, dlosses
    )
    return dx, dweight.to(weight.dtype), dbias if bias is None else dbias.to(bias.dtype)


_forward, _forward_ref = partial(_forward_with, _losses), partial(_forward_with, _losses_ref)
_backward, _backward_ref = partial(_backward_with, _losses), partial(_backward_with, _losses_ref)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int = -100,
    *,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> LinearCrossEntropy:
    """Cross entropy of x @ weight.T + bias, and how many labels are the largest of their logits.

    x: (n_tokens, hidden). weight: (n_classes, hidden). bias: (n_classes,). labels: (n_tokens,)
    int64, from 0 to n_classes - 1 or ignore_index; others are refused on a CPU, and on a GPU, where
    looking would wait for it, make the loss nan. reduction: "mean" over labelled positions, nan
    where there are none; "sum"; or "none", (n_tokens,) with zeros at the others. A tie goes to the
    first class, as in torch.argmax.

    Positions that are not labelled cost nothing. To know how many are, the host waits for the
    device once. The product is in the dtype of x, under autocast in that of autocast; the loss is
    float32 (float64 for float64), where torch's of half precision is half. Memory: at most 2**27
    logits at a time in the dtype of x (in plain torch once more in float32), and with gradients
    one of the weight in float32; the weight once more where n_classes is no multiple of 64 or its
    dtype is another.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            "x and weight must be (n_tokens, hidden) and (n_classes, hidden), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if labels.shape != x.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be ({x.shape[0]},) int64, got {tuple(labels.shape)} {labels.dtype}"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    wanted = [
        reduction != "none" and torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (x, weight, bias)
    ]
    loss, counts, *_ = _linear_cross_entropy_op(
        x, weight, bias, labels, ignore_index, label_smoothing, reduction, wanted
    )
    return LinearCrossEntropy(loss, counts[0], counts[1])
