"""Labels looked at, and the losses that heads share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.inputs import EncoderInputs

IGNORED = -100  # a label that stands for none
Items = Tensor | float | None  # how many labels a sum of losses is divided by; None: its own


def span_loss(
    logits: Tensor, positions: dict[str, Tensor], inputs: EncoderInputs, num_items: Items
) -> Tensor:
    """logits: (n_tokens, 2), starts and ends."""
    real = inputs.real()
    scores = inputs.to_rows(wide(logits)).masked_fill(~real[..., None], -torch.inf)
    n_seqs, length = real.shape
    real = F.pad(real, (0, 1))
    losses = []
    for column, (name, given) in zip(scores.unbind(-1), positions.items(), strict=True):
        target = checked_labels(given, (n_seqs,), None, name).clamp(0, length)
        target = target.where(real.gather(1, target[:, None])[:, 0], length)
        losses.append(cross_entropy(column, target, num_items, ignore_index=length))
    return (losses[0] + losses[1]) / 2


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy(
    logits: Tensor, labels: Tensor, num_items: Items, ignore_index: int = IGNORED
) -> Tensor:
    logits = wide(logits)
    if num_items is None:
        return F.cross_entropy(logits, labels, ignore_index=ignore_index)
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum") / num_items


def divergence(
    logits: Tensor, teacher: Tensor, temperature: float, kind: str = "single_label_classification"
) -> Tensor:
    """How far rows of logits, (n_rows, n_classes), are from a teacher's, summed over the rows.

    Both are divided by the temperature, and the sum multiplied by its square, so that gradients
    stay about as large (Hinton et al. 2015). kind: one of fastbert.config's PROBLEM_TYPES: the
    Kullback-Leibler divergence, or cross entropies of each label's yes and no (their mean), or
    squared errors of numbers, which have no temperature.
    """
    teacher, t = teacher.to(logits), temperature
    if kind == "regression":
        return F.mse_loss(logits, teacher, reduction="sum")
    if kind == "multi_label_classification":
        wanted = (teacher / t).sigmoid()
        loss = F.binary_cross_entropy_with_logits(logits / t, wanted, reduction="sum")
        return loss * t**2 / logits.shape[1]
    student, wanted = (logits / t).log_softmax(1), (teacher / t).log_softmax(1)
    return F.kl_div(student, wanted, reduction="sum", log_target=True) * t**2


def token_labels(
    labels: Tensor, inputs: EncoderInputs, n_classes: int | None = None, name: str = "labels"
) -> Tensor:
    """(n_tokens,) int64 in the order of `inputs`."""
    picked = inputs.pick(checked_labels(labels, inputs.given_shape, None, name))
    return checked_labels(picked, (inputs.n_tokens,), n_classes, name)


def checked_labels(
    labels: Tensor, shape: tuple[int, ...], n_classes: int | None, name: str = "labels"
) -> Tensor:
    """int64 of this shape, or ValueError; of a last axis of one, too, as transformers takes it."""
    if tuple(labels.shape) not in (shape, (*shape, 1)):
        raise ValueError(f"{name} must be {shape}, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"{name} must be whole numbers such as int64, got {labels.dtype}")
    labels = labels.reshape(shape).long()
    may_look = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if n_classes is not None and may_look and labels.numel():
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= n_classes))]
        if wrong.numel():
            raise ValueError(
                f"{name} must be from 0 to {n_classes - 1} or {IGNORED}, got {int(wrong[0])}"
            )
    return labels
