"""The activation between the two halves of the feed-forward block, with the bias before it."""

import torch.nn.functional as F
from torch import Tensor


def bias_gelu_ref(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) with the exact GELU, x * Phi(x) (Hendrycks and Gimpel 2016, erf form).

    x: (n_tokens, features). bias: (features,).
    """
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"bias must have shape ({x.shape[-1]},), got {tuple(bias.shape)}")
    return bias_gelu_ref(x, bias)
