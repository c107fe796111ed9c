"""FSDP2: a model shared out over ranks, whose checkpoints are of the whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Share out `model` over all ranks, each of `layers` by itself.

    Afterwards `model.state_dict()`, which all ranks must call, holds whole tensors, and
    `load_state_dict` takes them.
    """
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    model.register_state_dict_post_hook(_whole)
    model.register_load_state_dict_pre_hook(_shared_out)


def with_whole_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same, whose state dict, too, holds whole tensors."""
    optimizer.register_state_dict_post_hook(_whole_optimizer)
    optimizer.register_load_state_dict_pre_hook(_shared_out_optimizer)
    return optimizer


def _full(value: Any) -> Any:
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def _like(value: Any, given: Any) -> Any:
    """`value` shared out as the parameter `given` is, where it has its shape."""
    if not (isinstance(given, DTensor) and isinstance(value, torch.Tensor)):
        return value
    if isinstance(value, DTensor) or value.shape != given.shape:
        return value
    value = value.to(given.device)
    return distribute_tensor(value, given.device_mesh, given.placements, src_data_rank=None)


def _whole(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in list(state):
        state[name] = _full(state[name])


def _shared_out(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    given = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers()),
    }
    for name, value in state.items():
        state[name] = _like(value, given.get(name.removeprefix(prefix)))


def _whole_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    kept = {i: {n: _full(x) for n, x in values.items()} for i, values in state["state"].items()}
    return {**state, "state": kept}


def _shared_out_optimizer(
    optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = {
        i: {name: _like(x, parameters[i]) for name, x in values.items()}
        for i, values in state["state"].items()
    }
    return {**state, "state": kept}
