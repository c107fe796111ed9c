"""The training loop, which knows no task: steps in, checkpoints and a history out.

`fit` takes optimizer steps from a source and a loss from a function. A step is a list of
`MicroBatch`es; losses are divided by the number of items in the whole step (over all of its
batches and all ranks), so that neither the loss nor the gradients depend on how a step is cut.
A run that was killed goes on with `resume=True` from its last checkpoint, on a CPU bit for bit:
weights, optimizer, schedule, data source and random numbers are in it (fastbert.checkpoints).

Under torch.distributed every rank calls `fit` with its own share of each step, at least one batch.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastbert.checkpoints import Checkpoints
from fastbert.files import write_atomically
from fastbert.packing import PackedBatch
from fastbert.progress import Progress


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward takes.

    packed: the tokens. labels: tensors by name, of any shapes. n_items: what the losses of this
    batch are sums over, by name: {"labels": 32}, or {"labels": 80, "sequences": 16}.
    """

    packed: PackedBatch
    labels: dict[str, Tensor]
    n_items: dict[str, float]

    @property
    def n_tokens(self) -> int:
        return self.packed.input_ids.numel()

    def to(self, device: torch.device) -> MicroBatch:
        if self.packed.device == device:
            return self
        is_gpu = device.type == "cuda"
        packed = self.packed.pin_memory() if is_gpu else self.packed
        labels = {n: (x.pin_memory() if is_gpu else x) for n, x in self.labels.items()}
        return replace(
            self,
            packed=packed.to(device, non_blocking=is_gpu),
            labels={name: x.to(device, non_blocking=is_gpu) for name, x in labels.items()},
        )


class Steps(Protocol):
    """Where the steps come from. Iterating starts where `load_state_dict` put it, else at the
    first step; `state_dict` is what leads to the step after the one that was last given out, of
    plain values and tensors."""

    def __iter__(self) -> Iterator[list[MicroBatch]]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


# (model, batch, items of the whole step by name) -> the loss, divided by the items, and other
# 0-dim tensors by name, divided in the same way: over the step's batches and ranks they add up.
LossOf = Callable[[nn.Module, MicroBatch, Mapping[str, float]], tuple[Tensor, dict[str, Tensor]]]
Evaluate = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Options:
    """How to train.

    steps: optimizer steps in all. schedule: of the learning rate, after a warm-up from 0 that takes
    `warmup` steps, or that share of them where it is below 1. layer_decay: the rate of each layer
    is that of the one above times this. freeze: so many layers, counted from the embeddings, which
    belong to the first, stay as they are; -1: all but the head. weight_decay: not of biases and
    layer norms. dtype: of autocast; None: bfloat16 on a GPU, float32 elsewhere.

    evaluate_every: steps; 0: only at the end. metric: whose best evaluation gives the final
    weights; None: the last ones. patience: evaluations without a better one, after which the run
    stops; 0: it does not. save_every: steps between checkpoints, there is one after every
    evaluation as well; save_seconds: at least one in that time. seed: of dropout (plus the rank).
    settings: what else makes the run what it is; a checkpoint of other settings is refused.
    """

    steps: int
    lr: float = 5e-5
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    layer_decay: float = 1.0
    freeze: int = 0
    dtype: Literal["float32", "bfloat16"] | None = None
    evaluate_every: int = 0
    metric: str | None = None
    larger_is_better: bool = True
    patience: int = 0
    save_every: int = 0
    save_seconds: float = 300.0
    log_every: int = 20
    tensorboard: bool = False
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("steps", "log_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("lr", "weight_decay", "warmup", "evaluate_every", "patience", "save_every"):
            _at_least(name, getattr(self, name), 0)
        if self.schedule not in ("linear", "cosine", "constant"):
            raise ValueError(f"schedule must be linear, cosine or constant, got {self.schedule!r}")
        if self.patience and self.metric is None:
            raise ValueError("patience needs a metric, got None")

    def rate(self, step: int) -> float:
        """What the learning rate is multiplied with at this step, counted from 0."""
        warmup = self.warmup * self.steps if self.warmup < 1 else self.warmup
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1.0, self.steps - warmup)
        if self.schedule == "linear":
            return 1 - done
        return 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1.0

    def same_run(self) -> dict[str, Any]:
        """What a checkpoint must agree on."""
        free = ("save_every", "save_seconds", "log_every", "tensorboard")
        return {name: value for name, value in asdict(self).items() if name not in free}


@dataclass
class Result:
    """A run so far. history: {"step", "loss", "lr", "tokens", ...} each log_every steps, means
    since the one before; evaluations: {"step", **metrics}; both also in metrics.json."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    stopped_early: bool = False


def parameter_groups(model: nn.Module, options: Options) -> list[dict[str, Any]]:
    """The parameters that train, grouped by learning rate and by whether they decay.

    Freezes those of the `options.freeze` lowest layers.
    """
    names = [name for name, _ in model.named_parameters()]
    n_layers = 1 + max((_depth(name, 0) for name in names), default=0)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    frozen = n_layers if options.freeze == -1 else options.freeze
    for name, p in model.named_parameters():
        depth = _depth(name, n_layers)
        if frozen and depth < frozen:
            p.requires_grad_(False)
        if p.requires_grad:
            decay = options.weight_decay if p.dim() > 1 else 0.0  # 1-d: biases and layer norms
            rate = options.lr * options.layer_decay ** (n_layers - depth)
            groups.setdefault((rate, decay), []).append(p)
    return [
        {"params": params, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), params in groups.items()
    ]


def _depth(name: str, head: int) -> int:
    """The number of the layer that a parameter is in; embeddings count as below the first."""
    _, is_layer, rest = name.partition("encoder.layer.")
    if is_layer:
        return int(rest.split(".")[0])
    return -1 if ".embeddings." in f".{name}" else head


def adamw(groups: list[dict[str, Any]], options: Options) -> torch.optim.Optimizer:
    """torch's AdamW, fused."""
    return torch.optim.AdamW(groups, betas=options.betas, eps=options.eps, fused=True)


def fit(
    model: nn.Module,
    steps: Steps,
    loss_of: LossOf,
    options: Options,
    folder: Path,
    resume: bool = False,
    evaluate: Evaluate | None = None,
    make_optimizer: Callable[[list[dict[str, Any]], Options], torch.optim.Optimizer] = adamw,
    quiet: bool = False,
) -> Result:
    """Train `model`, which is on its device; it is left in eval mode with the final weights.

    folder: gets metrics.json and checkpoints/, which the caller may remove when all is done.
    resume: go on from the newest checkpoint there that can be read, or start where there is none.
    evaluate: metrics of the model, which is in eval mode; called on every rank, and rank 0's count.

    Raises ValueError for a checkpoint of other settings, where there are checkpoints without
    `resume`, and where the loss is not finite; OSError where a checkpoint cannot be written: the
    ones before stay.
    """
    return _Run(model, steps, loss_of, options, folder, evaluate, make_optimizer, quiet).go(resume)


class _Run:
    def __init__(
        self,
        model: nn.Module,
        steps: Steps,
        loss_of: LossOf,
        options: Options,
        folder: Path,
        evaluate: Evaluate | None,
        make_optimizer: Callable[[list[dict[str, Any]], Options], torch.optim.Optimizer],
        quiet: bool,
    ) -> None:
        self.model, self.steps, self.loss_of = model, steps, loss_of
        self.options, self.folder, self.evaluate = options, folder, evaluate
        self.device = next(model.parameters()).device
        self.is_distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.is_distributed else 0
        self.n_ranks = dist.get_world_size() if self.is_distributed else 1
        self.optimizer = make_optimizer(parameter_groups(model, options), options)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.wrapped: Any = model
        if self.n_ranks > 1 and not hasattr(model, "set_requires_gradient_sync"):  # FSDP2 has it
            self.wrapped = DistributedDataParallel(model)
        dtype = options.dtype or ("bfloat16" if self.device.type == "cuda" else "float32")
        self.autocast = dtype == "bfloat16"
        self.checkpoints = Checkpoints(folder / "checkpoints", writes=self.rank == 0)
        self.result = Result()
        self.sums: dict[str, Tensor] = {}  # since the last line of the history
        self.progress = Progress(folder, options, quiet or self.rank > 0, writes=self.rank == 0)

    def go(self, resume: bool) -> Result:
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(self.options.seed + self.rank)
        state = self.checkpoints.newest(resume, self.options.same_run())
        if state is not None:
            self._restore(state)
        result, options = self.result, self.options
        before, started = result.seconds, time.monotonic()
        self.wrapped.train()
        self.progress.start(result.step, result.tokens)
        source = iter(self.steps)
        while result.step < options.steps and not result.stopped_early:
            batches = next(source, None)
            if batches is None:
                raise ValueError(
                    f"there is data for {result.step} steps, but {options.steps} were wanted"
                )
            must_save = self.checkpoints.age() > options.save_seconds
            must_save |= bool(options.save_every) and (result.step + 1) % options.save_every == 0
            n_items, n_tokens, must_save = self._agree(batches, must_save)
            step_sums, rate = self._step(batches, n_items)
            for name, value in step_sums.items():
                self.sums[name] = self.sums[name] + value if name in self.sums else value
            result.step += 1
            result.tokens += n_tokens
            result.seconds = before + time.monotonic() - started
            is_last = result.step == options.steps
            if result.step % options.log_every == 0 or is_last:
                self._log(rate)
            self.progress.update(result.step, result.tokens)
            due = options.evaluate_every and result.step % options.evaluate_every == 0
            if self.evaluate is not None and (due or is_last):
                self._evaluate()
                must_save = True
            if must_save or is_last:
                self._save()
        self.progress.close()
        if options.metric is not None and self.evaluate is not None:
            self.checkpoints.load_best(self.model)
        self.model.eval()
        return result

    def _agree(
        self, batches: list[MicroBatch], must_save: bool
    ) -> tuple[dict[str, float], int, bool]:
        """Items and tokens of the step on all ranks, and whether rank 0 wants to save."""
        names = list(batches[0].n_items)
        numbers = [sum(batch.n_items[name] for batch in batches) for name in names]
        numbers += [sum(batch.n_tokens for batch in batches), must_save and self.rank == 0]
        if self.n_ranks > 1:
            shared = torch.tensor(numbers, dtype=torch.float64, device=self.device)
            dist.all_reduce(shared)
            numbers = shared.tolist()
        *items, n_tokens, rank_0_wants = numbers
        return dict(zip(names, items, strict=True)), int(n_tokens), bool(rank_0_wants)

    def _step(
        self, batches: list[MicroBatch], n_items: dict[str, float]
    ) -> tuple[dict[str, Tensor], float]:
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            is_last = i == len(batches) - 1
            with self._syncing(is_last):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                    loss, extra = self.loss_of(self.wrapped, batch.to(self.device), n_items)
                (loss * self.n_ranks if self.n_ranks > 1 else loss).backward()  # they are averaged
            for name, value in {"loss": loss, **extra}.items():
                value = value.detach().double() if self.device.type != "mps" else value.detach()
                sums[name] = sums[name] + value if name in sums else value
        factor = self.options.rate(self.result.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        if self.options.max_grad_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sums, self.options.lr * factor

    def _syncing(self, is_last: bool) -> Any:
        """Ranks exchange gradients in the last backward of a step only."""
        if isinstance(self.wrapped, DistributedDataParallel):
            return nullcontext() if is_last else self.wrapped.no_sync()
        if self.n_ranks > 1:
            self.wrapped.set_requires_gradient_sync(is_last)
        return nullcontext()

    def _log(self, rate: float) -> None:
        names, values = list(self.sums), torch.stack(list(self.sums.values()))
        self.sums = {}
        if self.n_ranks > 1:
            dist.all_reduce(values)
        result = self.result
        n_steps = result.step - int(result.history[-1]["step"] if result.history else 0)
        means = dict(zip(names, (values / n_steps).tolist(), strict=True))
        if not math.isfinite(means["loss"]):
            raise ValueError(
                f"the loss is {means['loss']} near step {result.step}: try a lower learning rate, "
                f"got {self.options.lr:g}"
            )
        result.history.append({"step": result.step, "tokens": result.tokens, "lr": rate, **means})
        self.progress.log(result.history[-1])

    def _evaluate(self) -> None:
        self.wrapped.eval()
        assert self.evaluate is not None
        found = [self.evaluate(self.model)]
        if self.n_ranks > 1:
            dist.broadcast_object_list(found, 0)
        self.wrapped.train()
        result, options, metrics = self.result, self.options, found[0]
        result.evaluations.append({"step": result.step, **metrics})
        self.progress.evaluated(result.evaluations[-1])
        if options.metric is None:
            return
        if options.metric not in metrics:
            raise ValueError(f"metric must be one of {', '.join(metrics)}, got {options.metric!r}")
        sign = 1 if options.larger_is_better else -1
        values = [sign * metrics[options.metric] for metrics in result.evaluations]
        best = max(range(len(values)), key=lambda i: (values[i], -i))
        result.best_step = int(result.evaluations[best]["step"])
        if best == len(values) - 1:
            self.checkpoints.save_best(self.model, result.step)
        elif options.patience and len(values) - 1 - best >= options.patience:
            result.stopped_early = True

    def _save(self) -> None:
        mine = {
            "source": self.steps.state_dict(),
            "random": _random_state(self.device),
            "sums": {name: value.cpu() for name, value in self.sums.items()},
        }
        ranks: list[Any] = [mine]
        if self.n_ranks > 1:
            ranks = [None] * self.n_ranks
            dist.all_gather_object(ranks, mine)
        self.checkpoints.save(
            self.result.step,
            self.model,
            self.optimizer,
            self.options.same_run(),
            {"result": asdict(self.result), "ranks": ranks},
        )
        if self.rank == 0:
            text = json.dumps(asdict(self.result), indent=1) + "\n"
            with write_atomically(self.folder / "metrics.json") as path:
                path.write_text(text, encoding="utf-8")

    def _restore(self, state: dict[str, Any]) -> None:
        if len(state["ranks"]) != self.n_ranks:
            raise ValueError(
                f"the checkpoint is of {len(state['ranks'])} ranks, got {self.n_ranks} now"
            )
        self.checkpoints.load(state, self.model, self.optimizer)
        self.result = Result(**state["result"])
        mine = state["ranks"][self.rank]
        self.steps.load_state_dict(mine["source"])
        self.sums = {name: value.to(self.device) for name, value in mine["sums"].items()}
        _set_random_state(mine["random"], self.device)


def _random_state(device: torch.device) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
