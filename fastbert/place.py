"""Where a run of fine-tuning is: the folder that it writes, and OUT.parts until that is whole."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """out: the folder to write. resume: go on with the run that OUT.parts holds.

    Raises ValueError where `out` or OUT.parts is there and neither to be replaced nor to go on
    with, FileNotFoundError where `out` has no parent.
    """

    out: Path
    resume: bool
    overwrite: bool
    quiet: bool
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        out, work = self.out, self.work
        if out.exists() and not self.overwrite:
            raise ValueError(f"{out} exists already; --overwrite replaces it")
        if not out.absolute().parent.is_dir():
            raise FileNotFoundError(f"the folder {out.parent} for {out.name} does not exist")
        if work.exists() and self.overwrite and not self.resume:
            shutil.rmtree(work)
        if any(work.glob("checkpoints/step-*.pt")) and not self.resume:
            raise ValueError(
                f"{work} holds a run that was stopped: --resume goes on with it, "
                "--overwrite starts again"
            )

    @property
    def work(self) -> Path:
        return self.out.with_name(self.out.name + ".parts")

    def tell(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)
