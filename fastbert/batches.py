"""Steps of packed sequences: shuffled, cut by tokens, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbert.loop import MicroBatch
from fastbert.packing import PackedBatch

Index = NDArray[np.int64]
Collate = Callable[[Index, int], MicroBatch]  # of these sequences, in this epoch


def select(packed: PackedBatch, index: Sequence[int] | Index) -> PackedBatch:
    """The sequences of these numbers, in this order; token tensors become int64."""
    chosen = torch.as_tensor(np.asarray(index, np.int64))
    tokens, cu_seqlens = token_index(packed, chosen)
    lengths = cu_seqlens.diff()
    return PackedBatch(
        packed.input_ids[tokens].long(),
        packed.token_type_ids[tokens].long(),
        packed.position_ids[tokens].long(),
        cu_seqlens,
        int(lengths.max()) if lengths.numel() else 0,
    )


def token_index(packed: PackedBatch, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Where the tokens of these sequences are, (n_tokens,), and their cu_seqlens."""
    lengths = packed.lengths[chosen]
    cu_seqlens = torch.zeros(len(chosen) + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=cu_seqlens[1:])
    shift = torch.repeat_interleave(packed.cu_seqlens[chosen].long() - cu_seqlens[:-1], lengths)
    return torch.arange(shift.numel()) + shift, cu_seqlens


def by_budget(lengths: Index, budget: int) -> list[Index]:
    """Cut 0 .. n-1 into runs of at most `budget` tokens, or of one that is longer."""
    ends = np.cumsum(lengths)
    runs, first = [], 0
    while first < len(lengths):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + budget, side="right")))
        runs.append(np.arange(first, last))
        first = last
    return runs


class TokenBatches:
    """Steps for `fastbert.loop.fit`: every epoch all sequences once, in an order of its own.

    lengths: (n_seqs,) tokens of each sequence. collate: makes a batch of the sequences of these
    numbers. A step has `batch_size` sequences, the last of an epoch fewer; or, with None,
    `step_tokens` tokens at most (and one sequence at least). batch_tokens: at most in one forward;
    a step of more is cut. window: so many steps' sequences, in shuffled order, are sorted by length
    before they are cut into steps, whose order is shuffled again: 1 does not. rank, n_ranks: this
    process takes every n_ranks-th sequence of a step.
    """

    def __init__(
        self,
        lengths: Index,
        collate: Collate,
        *,
        epochs: float,
        batch_size: int | None = 32,
        step_tokens: int = 4096,
        batch_tokens: int = 8192,
        window: int = 1,
        seed: int = 0,
        rank: int = 0,
        n_ranks: int = 1,
    ) -> None:
        named = {"step_tokens": step_tokens, "batch_tokens": batch_tokens, "window": window}
        for name, value in {**named, "batch_size": 1 if batch_size is None else batch_size}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not len(lengths):
            raise ValueError("there must be at least one sequence, got none")
        if not epochs > 0:
            raise ValueError(f"epochs must be more than 0, got {epochs}")
        self.lengths, self.collate, self.epochs = lengths, collate, epochs
        self.batch_size, self.step_tokens, self.batch_tokens = batch_size, step_tokens, batch_tokens
        self.window, self.seed, self.rank, self.n_ranks = window, seed, rank, n_ranks
        self.epoch = self.step = 0
        full, part = int(epochs), epochs - int(epochs)
        per_epoch = [len(self.plan(epoch)) for epoch in range(full + (part > 0))]
        if part > 0:
            per_epoch[-1] = max(1, round(part * per_epoch[-1]))
        self.steps_of_epoch = per_epoch

    def __len__(self) -> int:
        """Steps in all epochs."""
        return sum(self.steps_of_epoch)

    def plan(self, epoch: int) -> list[Index]:
        """The sequences of each step of an epoch."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.lengths))
        if self.window > 1:
            per_step = self.batch_size or max(1, int(self.step_tokens / self.lengths.mean()))
            size = self.window * per_step
            windows = [order[i : i + size] for i in range(0, len(order), size)]
            order = np.concatenate([w[np.argsort(self.lengths[w], kind="stable")] for w in windows])
        if self.batch_size is None:
            steps = [order[run] for run in by_budget(self.lengths[order], self.step_tokens)]
        else:
            steps = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if self.window > 1:
            steps = [steps[i] for i in random.permutation(len(steps))]
        return [step for step in steps if len(step) >= self.n_ranks]

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        while self.epoch < len(self.steps_of_epoch):
            n_steps, plan = self.steps_of_epoch[self.epoch], self.plan(self.epoch)
            while self.step < n_steps:
                mine = plan[self.step][self.rank :: self.n_ranks]
                mine = mine[np.argsort(self.lengths[mine], kind="stable")]  # equal ones are one run
                self.step += 1
                yield [
                    self.collate(mine[run], self.epoch)
                    for run in by_budget(self.lengths[mine], self.batch_tokens)
                ]
            self.epoch, self.step = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]
