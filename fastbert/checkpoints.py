"""Checkpoints that are whole or not there: the last two, and the best weights."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbert.files import write_atomically

_KEPT = 2


class Checkpoints:
    """The folder of a run's checkpoints: step-N.pt, read with weights_only, and best.pt.

    writes: False on ranks that only read.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self.saved_at = time.monotonic()

    def age(self) -> float:
        """Seconds since the last one."""
        return time.monotonic() - self.saved_at

    def newest(self, resume: bool, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The newest state that can be read, None where there is no checkpoint.

        A file that is damaged is passed over with a warning. Raises ValueError where there are
        checkpoints and not `resume`, where none can be read, and where one is of other settings.
        """
        if self.writes:
            for left in self.folder.glob(".*.tmp"):
                left.unlink(missing_ok=True)
        paths = self._paths()
        if paths and not resume:
            raise ValueError(
                f"{self.folder} has checkpoints of a run: resume it, or remove them to start again"
            )
        for path in paths:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                kept = state["settings"]
            except Exception as error:  # torch, zip and pickle have no narrower base for damage
                reason = str(error).strip().partition("\n")[0]
                warnings.warn(f"{path} cannot be read, so not used: {reason}", stacklevel=3)
                continue
            differs = [
                f"{name} was {kept.get(name)!r} and is {settings.get(name)!r}"
                for name in {**kept, **settings}
                if kept.get(name) != settings.get(name)
            ]
            if differs:
                raise ValueError(f"{path} is of other settings: {'; '.join(differs)}")
            return state
        if paths:
            raise ValueError(f"none of the checkpoints in {self.folder} can be read")
        return None

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: dict[str, Any],
        state: dict[str, Any],
    ) -> None:
        """Write the checkpoint of a step, and remove all but the last two."""
        tensors = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        self._write(f"step-{step:09d}.pt", {"settings": settings, **tensors, **state})
        if self.writes:
            for path in self._paths()[_KEPT:]:
                path.unlink()
        self.saved_at = time.monotonic()

    def load(
        self, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def save_best(self, model: nn.Module, step: int) -> None:
        self._write("best.pt", {"step": step, "model": model.state_dict()})

    def load_best(self, model: nn.Module) -> None:
        state = torch.load(self.folder / "best.pt", map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])

    def _paths(self) -> list[Path]:
        """Newest first."""
        return sorted(self.folder.glob("step-*.pt"), reverse=True)

    def _write(self, name: str, state: dict[str, Any]) -> None:
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / name
        try:
            with write_atomically(path) as temporary, open(temporary, "wb") as file:
                torch.save(state, file)
            _sync_folder(self.folder)
        except (OSError, RuntimeError) as error:  # torch's writer hides the first behind the other
            reason: BaseException | None = error
            while reason is not None and not isinstance(reason, OSError):
                reason = reason.__context__
            if reason is None:
                raise
            there = self._paths()
            kept = f"{there[0]} is whole and stays" if there else "there is none before it"
            text = f"the checkpoint {path} cannot be written: {reason.strerror}; {kept}"
            raise OSError(text) from None


def _sync_folder(folder: Path) -> None:
    """Make a rename in it last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
