"""How kernels reach Triton: imported at the first launch; what fails is not tried again."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Collection
from functools import cache, cached_property, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_HAS_TRITON = find_spec("triton") is not None  # once: torch.compile cannot trace it
_LEAST_CAPABILITY = (8, 0)  # of NVIDIA's: the first with bfloat16


class _Language:
    """What a kernel's signature says before triton.language is there."""

    constexpr = "constexpr"


tl: Any = _Language()


_linking = threading.RLock()


class Kernel:
    """A function that becomes a kernel of triton.jit, with all that its file calls, when needed."""

    def __init__(self, function: Callable[..., None], unspecialized: Collection[str]) -> None:
        self.function, self.unspecialized = function, list(unspecialized)
        self._is_linked = False

    def __getitem__(self, grid: Any) -> Any:
        return self.jitted()[grid]

    def jitted(self) -> Any:
        if not self._is_linked:
            import triton

            names = self.function.__globals__
            with _linking:
                made = {
                    name: value._jitted if value.function.__globals__ is names else value.jitted()
                    for name, value in list(names.items())
                    if isinstance(value, Kernel)
                }
                # At once: another thread that finds a kernel there also finds what it calls.
                names.update(made, tl=triton.language)
                self._is_linked = True
        return self._jitted

    @cached_property
    def _jitted(self) -> Any:
        import triton

        made = triton.jit(self.function, do_not_specialize=self.unspecialized)
        asked = "TRITON_DEFAULT_FP_FUSION" in os.environ
        if isinstance(made, triton.runtime.JITFunction) and not asked:
            # Products and sums as one instruction, for which Triton 3.10 will want to be asked.
            made.run = partial(made.run, enable_fp_fusion=True)
        return made


def jit(*unspecialized: str) -> Callable[[Callable[..., None]], Any]:
    """`triton.jit` without importing triton.

    unspecialized: integers that differ from batch to batch, for whose values nothing is compiled
    anew.
    """
    return lambda function: Kernel(function, unspecialized)


def is_interpreted() -> bool:
    """Whether kernels run on the CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device) -> str | None:
    """Why no kernel runs on `device`; None where they do."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if device.type == "cpu":
        return None if is_interpreted() else "kernels need a GPU"
    if device.type != "cuda":
        return f"there are no kernels for {device.type}"
    return _why_not_gpu(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _why_not_gpu(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if torch.version.hip is None and capability < _LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(index)
        wanted, has = (".".join(map(str, version)) for version in (_LEAST_CAPABILITY, capability))
        return f"kernels need compute capability {wanted}, {name} has {has}"
    return None


def on_kernel_device(x: Tensor) -> bool:
    """Whether a kernel can take `x`, by its device and dtype."""
    return x.dtype in DTYPES and why_not(x.device) is None


@cache
def architecture(device: torch.device) -> str:
    """What launches are chosen by.

    "hopper" and "blackwell": NVIDIA's data centre GPUs since the H100 and since the B200, with 227
    KiB of shared memory, from which they multiply; the first also where kernels are interpreted.
    "ampere": all others of NVIDIA, with 99 KiB or more, which multiply from registers. "amd": 64.
    """
    if device.type != "cuda":
        return "hopper"
    if torch.version.hip is not None:
        return "amd"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "hopper", 10: "blackwell"}.get(major, "ampere")


def allows_tf32() -> bool:
    """Whether products of float32 on a GPU may round what is multiplied to TF32.

    As torch is told by set_float32_matmul_precision and allow_tf32, or since 2.9 by fp32_precision,
    after which asking for either of the former is an error.
    """
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


# (operation, device) to the error with which its kernels could not be compiled there.
failures: dict[tuple[str, str], str] = {}


def run(operation: str, kernels: Callable, reference: Callable, x: Tensor, *args: Any) -> Any:
    """kernels(x, *args), or reference(x, *args) where no kernel can take `x`.

    Kernels that cannot be compiled for a GPU are warned about once and not tried there again.
    """
    if not on_kernel_device(x):
        return reference(x, *args)
    if x.device.type == "cpu":
        return kernels(x, *args)
    with torch.cuda.device(x.device):
        if not failures or (operation, torch.cuda.get_device_name()) not in failures:
            try:
                return kernels(x, *args)
            except _compile_errors() as error:
                device = torch.cuda.get_device_name()
                failures[operation, device] = f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"{operation} runs in plain torch, as its kernels cannot be compiled for "
                    f"{device}: {failures[operation, device]}",
                    stacklevel=2,
                )
        return reference(x, *args)


@cache
def _compile_errors() -> tuple[type[Exception], ...]:
    from triton.compiler.errors import CompilationError
    from triton.runtime import errors

    # Triton 3.2, which torch 2.6 has, does not know the last.
    found = (getattr(errors, name, None) for name in ("OutOfResources", "PTXASError"))
    return CompilationError, *filter(None, found)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def rows_of(x: Tensor) -> Tensor:
    """`x` with its last axis contiguous, which kernels rely on; a copy only where it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()
