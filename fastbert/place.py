"""Where a run is: the folder that it writes, OUT.parts until that is whole, device and ranks."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastbert.files import check_can_write, replace_folder


@dataclass(frozen=True)
class Place:
    """out: the folder to write. resume: go on with the run that OUT.parts holds. rank, n_ranks:
    torchrun's, of which rank 0 talks and writes.

    Raises ValueError where `out` or OUT.parts is there and neither to be replaced nor to go on
    with, FileNotFoundError where `out` has no parent.
    """

    out: Path
    resume: bool
    overwrite: bool
    quiet: bool
    device: torch.device
    rank: int = 0
    n_ranks: int = 1
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        work = self.work
        if self.rank:
            return
        check_can_write(self.out, self.overwrite)
        if any(work.glob("checkpoints/step-*.pt")) and not self.resume:
            if not self.overwrite:
                raise ValueError(
                    f"{work} holds a run that was stopped: --resume goes on with it, "
                    "--overwrite starts again"
                )
            shutil.rmtree(work / "checkpoints")
            shutil.rmtree(work / "tensorboard", ignore_errors=True)

    @property
    def work(self) -> Path:
        return self.out.with_name(self.out.name + ".parts")

    def tell(self, text: str) -> None:
        if not self.quiet and self.rank == 0:
            print(text, flush=True)

    @contextmanager
    def written(self, sources: Sequence[Any]) -> Iterator[Path]:
        """A folder to fill, which then becomes `out`; OUT.parts goes. sources: of the run, which
        `out` must not hold, where they are files and folders."""
        paths = [x for x in sources if isinstance(x, str | os.PathLike) and Path(x).exists()]
        with replace_folder(self.out, self.overwrite, paths) as new:
            new.mkdir(parents=True)
            yield new
            if (self.work / "tensorboard").is_dir():
                shutil.copytree(self.work / "tensorboard", new / "tensorboard")
        shutil.rmtree(self.work, ignore_errors=True)


@contextmanager
def place_of(
    out: str | Path, device: str | None, resume: bool, overwrite: bool, quiet: bool
) -> Iterator[Place]:
    """The place of a run, one of several ranks where torchrun has started this process."""
    chosen = chosen_device(device)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Place(Path(out), resume, overwrite, quiet, chosen)
        return
    if on_gpu := chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    # A day: in pretraining rank 0 tokenises the corpus first.
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(days=1))
    try:
        ranks = dist.get_rank(), dist.get_world_size()
        yield Place(Path(out), resume, overwrite, quiet, chosen, *ranks)
    finally:
        dist.destroy_process_group()


def chosen_device(device: str | None) -> torch.device:
    """This one, or a GPU where there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
