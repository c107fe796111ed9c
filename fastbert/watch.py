"""Noticing that modules are no longer those that something was made of."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.modules import module as nn_module
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

_version = attrgetter("_version")


def is_plain(module: nn.Module, kind: type | tuple[type, ...]) -> bool:
    """Whether calling `module` does what the class `kind`, or one of them, says, nothing else."""
    return (
        (type(module) is kind or (isinstance(kind, tuple) and type(module) in kind))
        and "forward" not in module.__dict__
        and not any(hooks_of(module))
        and not any_global_hooks()
    )


def any_global_hooks() -> bool:
    """Whether there are hooks that all modules run."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def hooks_of(module: nn.Module) -> list[dict]:
    """The dicts in which hooks are registered on a module.

    Written out: asked ten times a layer, it is a part of what a forward costs the host.
    """
    return [
        module._forward_hooks, module._forward_pre_hooks,
        module._backward_hooks, module._backward_pre_hooks,
    ]  # fmt: skip


_watched = WeakIdKeyDictionary()  # parameters whose versions somebody reads


def _count_writes(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Raise the versions of what a fused optimizer has written, which torch leaves as they were."""
    for group in optimizer.param_groups:
        for p in group["params"] if _watched and group.get("fused") else ():
            if p.grad is not None and p in _watched:
                increment_version(p)


register_optimizer_step_post_hook(_count_writes)


class Planned(nn.Module):
    """A module that keeps what it has made of its weights for inference, as `_plan`."""

    _plan: Any

    def train(self, mode: bool = True) -> Planned:
        self._plan = None  # also for those who write weights where versions do not show it (.data)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Planned:
        self._plan = None  # it holds the weights' old memory
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None}  # not copied, not pickled: made again when needed


class Structure:
    """Notices hooks on modules, modules that were exchanged, and methods put in place of forward.

    Looked at before every forward, so it holds on to the dicts themselves and only reads them.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.kinds = [type(module) for module in modules]
        self.hooks = [hooks for module in modules for hooks in hooks_of(module)]
        self.attributes = [module.__dict__ for module in modules]
        self.children = [(m._modules, n, c) for m in modules for n, c in m._modules.items()]

    def same(self) -> bool:
        """Whether the modules are those that they were; there may be hooks on them."""
        return (
            not any("forward" in names for names in self.attributes)
            and list(map(type, self.modules)) == self.kinds
            and all(children.get(name) is child for children, name, child in self.children)
        )

    def unchanged(self) -> bool:
        """Whether calling the modules still does what their classes say, nothing else."""
        return not any(self.hooks) and self.same()


class Watch(Structure):
    """As Structure, in evaluation, and notices parameters that have changed.

    Parameters made in inference mode have no versions: not for those.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__(modules)
        self.parameters = [m._parameters for m in modules if m._parameters]
        self.state = self.versions()
        found = self._found()
        self.values = [p.detach() for p in found]  # so that no address is another tensor's
        _watched.update(dict.fromkeys(found))

    def unchanged(self) -> bool:
        return (
            not any(names["training"] for names in self.attributes)
            and super().unchanged()
            and self.versions() == self.state
        )

    def versions(self) -> tuple[list[int], list[int]]:
        """Where the parameters are, and how often they were written to."""
        found = self._found()
        return list(map(Tensor.data_ptr, found)), list(map(_version, found))

    def _found(self) -> list[Tensor]:
        return [p for ps in self.parameters for p in ps.values() if p is not None]
