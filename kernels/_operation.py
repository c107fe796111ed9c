"""Operations of torch.library that eager code reaches without the dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Operation:
    """A `torch.library.custom_op`, and the same function called directly where nobody can tell.

    What is compiled, exported, traced, counted, mapped or of another type of tensor takes the
    operation, which costs the host more than the function does: of layer norm 59 us and not 40,
    with gradients to come 205 and not 91, and backward 285 and not 149 (a slow core, torch 2.11).
    A GPU needs less than that for few tokens.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.op = torch.library.custom_op(name, function, mutates_args=())
        self._function = function
        self._apply: Callable[..., Any] = self.op  # where gradients are wanted

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self.op.register_fake(function)

    def register_autograd(
        self, differentiate: Callable[..., Any], setup_context: Callable[..., None]
    ) -> None:
        """As torch's, but outputs of which no gradient comes have None, not zeros.

        The first output is the one that has a gradient.
        """
        self.op.register_autograd(differentiate, setup_context=setup_context)
        function = self._function

        def forward(ctx: Any, *args: Any) -> Any:
            output = function(*args)
            ctx.set_materialize_grads(False)
            setup_context(ctx, args, output)
            return output

        def backward(ctx: Any, *douts: Any) -> Any:
            if douts[0] is None:  # all that comes after it gave none
                return (None,) * len(ctx.needs_input_grad)
            return differentiate(ctx, *douts)

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        # Profilers and errors say the name.
        kind: Any = type(self.op._name, (torch.autograd.Function,), methods)
        self._apply = kind.apply

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.op(*args)
        tensors = [x for x in args if isinstance(x, Tensor)]
        if not _is_plain(tensors):
            return self.op(*args)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return self._apply(*args)
        return self._function(*args)


def operation(name: str) -> Callable[[Callable[..., Any]], Operation]:
    return lambda function: Operation(name, function)


def _is_plain(tensors: list[Tensor]) -> bool:
    """Whether a function of `tensors` may run without anything that watches operations."""
    for x in tensors:
        kind = type(x)
        if kind is not Tensor and kind is not nn.Parameter:
            return False
        if x.is_neg() or torch._C._functorch.is_legacy_batchedtensor(x):
            return False
    return not (
        tensors[0].is_meta
        or torch._C._len_torch_dispatch_stack()
        or torch._ops._len_torch_dispatch_stack_pre_dispatch()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    )
