"""LAMB, for steps of very many tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LAMB(torch.optim.Optimizer):
    """Adam whose step is as long, against each tensor, as the learning rate says.

    You et al. 2020, algorithm 2, with the bias correction of Adam: u = m / (sqrt(v) + eps) +
    weight_decay * p, p -= lr * |p| / |u| * u. As in google's, tensors of groups without weight
    decay (biases, layer norms) take Adam's own step; so do those that are zero.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params, [p.grad for p in params])
        return loss

    def _step_group(
        self, group: dict[str, Any], params: list[Tensor], gradients: list[Tensor]
    ) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in params]
        for state in states:
            state["step"] += 1
        n = int(states[0]["step"])
        beta1, beta2 = group["betas"]
        means = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)

        updates = torch._foreach_sqrt(squares)
        torch._foreach_mul_(updates, (1 - beta2**n) ** -0.5)
        torch._foreach_add_(updates, group["eps"])
        updates = torch._foreach_div(means, updates)
        torch._foreach_mul_(updates, 1 / (1 - beta1**n))
        if group["weight_decay"]:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
            lengths = zip(torch._foreach_norm(params), torch._foreach_norm(updates), strict=True)
            ratios = [torch.where((p > 0) & (u > 0), p / u, 1.0) for p, u in lengths]
            torch._foreach_mul_(updates, ratios)
        torch._foreach_add_(params, updates, alpha=-group["lr"])
