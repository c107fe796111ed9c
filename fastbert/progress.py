"""How far a training run is: a bar on a terminal, lines in a log, and TensorBoard if wanted."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """options: a fastbert.loop.Options. quiet: nothing is shown. writes: TensorBoard's
    files, if wanted. Rates count this process only."""

    def __init__(self, folder: Path, options: Any, quiet: bool, writes: bool = True) -> None:
        self.n_steps, self.quiet = options.steps, quiet
        self.bar: Any = None
        self.board: Any = None
        if options.tensorboard and writes:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("tensorboard=True needs it: pip install tensorboard") from None
            self.board = SummaryWriter(str(folder / "tensorboard"))

    def start(self, step: int, tokens: int) -> None:
        self.first = step, tokens
        self.started = self.said = time.monotonic()
        self.loss = ""
        if not self.quiet and sys.stderr.isatty():
            self.bar = tqdm(total=self.n_steps, initial=step, unit="step", dynamic_ncols=True)

    def update(self, step: int, tokens: int) -> None:
        now = time.monotonic()
        seconds = max(now - self.started, 1e-9)
        rate = f"{(tokens - self.first[1]) / seconds:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self.loss}{rate}", refresh=False)
            self.bar.update(step - self.bar.n)
        elif not self.quiet and (now - self.said >= _SECONDS_BETWEEN_LINES or step == self.n_steps):
            self.said = now
            left = (self.n_steps - step) * seconds / max(step - self.first[0], 1)
            self._say(f"step {step:,}/{self.n_steps:,}  {self.loss}{rate}  {left:,.0f} s left")

    def log(self, entry: dict[str, float]) -> None:
        self.loss = f"loss {entry['loss']:.4f}  "
        self._write("train", entry)

    def evaluated(self, entry: dict[str, float]) -> None:
        shown = [f"{k} {v:.4f}" for k, v in entry.items() if k != "step" and isinstance(v, float)]
        if not self.quiet:
            self._say(f"step {entry['step']:,}: {', '.join(shown[:6])}")
        self._write("dev", entry)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            self.board.close()

    def _say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _write(self, group: str, entry: dict[str, float]) -> None:
        for name, value in entry.items():
            if self.board is not None and isinstance(value, float):
                self.board.add_scalar(f"{group}/{name}", value, int(entry["step"]))
