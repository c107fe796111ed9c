"""Layer norm over the last axis, with dropout and an optional residual added first."""

import torch.nn.functional as F
from torch import Tensor


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
) -> Tensor:
    if dropout_p:
        x = F.dropout(x, dropout_p)
    if residual is not None:
        x = x + residual
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
) -> Tensor:
    """Normalise each row of dropout(x), or of dropout(x) + residual.

    x, residual: (n_tokens, hidden). weight, bias: (hidden,). dropout_p: share of `x` set to zero,
    0.0 outside training. The result has the shape of `x` and the dtype of the sum.
    """
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"weight and bias must have shape ({x.shape[-1]},), "
            f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must be {tuple(x.shape)} as x, got {tuple(residual.shape)}")
    return layer_norm_ref(x, weight, bias, residual, dropout_p, eps)
