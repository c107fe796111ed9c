"""Pretraining: from raw text to a BERT.

    fastbert.pretrain.pretrain(["text.txt.gz"], vocab="vocab", out="model", size="mini", minutes=60)

More than one GPU or machine, whose common folder `out` is in:

    torchrun --nproc-per-node 8 -m fastbert.pretrain corpus.txt.gz --vocab vocab --out model ...
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastbert.config import BertConfig
from fastbert.corpus import build_corpus
from fastbert.files import write_atomically
from fastbert.hygiene import Hygiene
from fastbert.instances import Instances, PretrainingSteps, hold_out
from fastbert.lamb import LAMB
from fastbert.lm import BertForMaskedLM, BertForPreTraining
from fastbert.loop import Options, adamw, fit
from fastbert.masking import Masking, Vocabulary
from fastbert.place import Place, place_of
from fastbert.report import plot_history
from fastbert.scored import Scored, evaluate, held_out_batches, loss_of
from fastbert.shards import MANIFEST, Corpus
from fastbert.tokenizer import BertTokenizer

# Layers and hidden size of google-research/bert's models; 64 columns a head, 4 hidden sizes inside.
SIZES = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}
_LR = {"tiny": 2e-3, "mini": 1e-3, "small": 7e-4, "medium": 5e-4, "base": 2e-4, "large": 1e-4}
_SECONDS_TRIED = 5.0  # to learn how long a step takes


@dataclass(frozen=True)
class Recipe:
    """How to pretrain.

    steps, or minutes: of training, from which steps follow by trying how long one takes. size: one
    of SIZES. nsp: sentence pairs, half of whose second texts follow, else single texts.
    max_length: of a sequence; second_length: of the last second_share of the steps, None for the
    same in all. batch_tokens: of one forward, None by the device; accumulate: forwards of a rank
    in a step. masking, mask_rate: as fastbert.masking.Masking says. held_out: the share of the
    text that is kept to evaluate on; eval_tokens: at most so many of it. evaluations: in the run.
    optimizer: "adamw" or "lamb". lr: None for one by the size. positions: "absolute" or
    "sinusoidal". fsdp: share out weights and optimizer over the ranks (FSDP2), else each has all
    (DDP). dtype, schedule, warmup and what follows: as fastbert.loop.Options says.
    """

    steps: int | None = None
    minutes: float | None = None
    size: str = "small"
    nsp: bool = True
    max_length: int = 128
    second_length: int | None = 512
    second_share: float = 0.1
    batch_tokens: int | None = None
    accumulate: int = 1
    masking: str = "tokens"
    mask_rate: float = 0.15
    short_probability: float = 0.1
    held_out: float = 0.01
    eval_tokens: int = 1 << 17
    evaluations: int = 10
    optimizer: str = "adamw"
    lr: float | None = None
    positions: str = "absolute"
    dropout: float = 0.1
    fsdp: bool = False
    weight_decay: float = 0.01
    schedule: str = "linear"
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    dtype: str | None = None
    seed: int = 0
    save_every: int = 0
    save_seconds: float = 300.0
    log_every: int = 20
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(
                f"give steps or minutes, one of them, got {self.steps} and {self.minutes}"
            )
        length = self.steps if self.minutes is None else self.minutes
        if length is None or length <= 0:
            raise ValueError(f"steps and minutes must be above 0, got {length}")
        if self.size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {self.size!r}")
        if self.optimizer not in ("adamw", "lamb"):
            raise ValueError(f"optimizer must be adamw or lamb, got {self.optimizer!r}")
        if not 0 <= self.second_share < 1:
            raise ValueError(f"second_share must be from 0 to below 1, got {self.second_share}")
        if self.eval_tokens < 1 or self.evaluations < 1:
            raise ValueError("eval_tokens and evaluations must be at least 1")

    def config(self, tokenizer: BertTokenizer) -> BertConfig:
        n_layers, hidden = SIZES[self.size]
        longest = max(512, self.max_length, self.second_length or 0)
        return BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            num_hidden_layers=n_layers,
            num_attention_heads=hidden // 64,
            intermediate_size=4 * hidden,
            max_position_embeddings=longest,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            position_embedding_type=self.positions,
            pad_token_id=tokenizer.pad_token_id,
            # BERT's 0.02 at 768 columns. At 128, 0.02 is 5 to 6% behind in perplexity (1 M tokens).
            initializer_range=0.02 * (768 / hidden) ** 0.5,
        )


def pretrain(
    files: Sequence[str | os.PathLike[str]],
    *,
    vocab: str | Path,
    out: str | Path,
    corpus: str | Path | None = None,
    hygiene: Hygiene | None = None,
    max_sentence: int | None = 64,
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Pretrain a BERT on text files and write it, with its tokenizer and numbers, to `out`.

    files: as fastbert.corpus.build_corpus takes them, or one folder that it has written. vocab: a
    tokenizer's folder. corpus: where to keep the tokenised text; None: in OUT.parts, which is
    removed at the end. resume: go on with a run that was stopped. options: Recipe's. Gives the
    numbers of metrics.json. Under torchrun every rank calls it, and rank 0 writes.
    """
    recipe = Recipe(**options)
    tokenizer = BertTokenizer.from_pretrained(vocab)
    with place_of(out, device, resume, overwrite, quiet) as place:
        folder = Path(corpus or place.work / "corpus")
        text = _corpus(files, tokenizer, folder, place.rank, quiet, hygiene, max_sentence)
        numbers = _train(recipe, text, tokenizer, place)
        network = numbers.pop("network")
        numbers |= {"files": [os.fspath(f) for f in files], "vocab": str(vocab)}
        if place.rank == 0:
            with place.written(files) as new:
                network.save_pretrained(new)
                tokenizer.save_pretrained(new)
                (new / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
                plot_history(new / "loss.png", numbers)
    return numbers


def _train(
    recipe: Recipe,
    text: Corpus,
    tokenizer: BertTokenizer,
    place: Place,
) -> dict[str, Any]:
    device, n_ranks = place.device, place.n_ranks
    train, held = hold_out(text, recipe.held_out, recipe.seed)
    batch_tokens = recipe.batch_tokens or (65536 if device.type == "cuda" else 4096)
    lengths = [recipe.max_length]
    if recipe.second_length and recipe.second_share and recipe.second_length != lengths[0]:
        lengths.append(recipe.second_length)
    all_instances = [
        Instances(
            text, train, Vocabulary(tokenizer), length, recipe.nsp,
            Masking(recipe.masking, recipe.mask_rate), batch_tokens, recipe.short_probability,
            recipe.seed,
        )
        for length in lengths
    ]  # fmt: skip
    torch.manual_seed(recipe.seed)
    config = recipe.config(tokenizer)
    network: Any = (BertForPreTraining if recipe.nsp else BertForMaskedLM)(config)
    model = Scored(network).to(device)
    lr = recipe.lr or _LR[recipe.size]
    if recipe.fsdp and n_ranks > 1:
        from fastbert.sharding import shard, with_whole_state
    is_bf16 = recipe.dtype == "bfloat16" or (recipe.dtype is None and device.type == "cuda")

    def make_optimizer(groups: list[dict[str, Any]], options: Options) -> torch.optim.Optimizer:
        if recipe.optimizer == "lamb":
            made: torch.optim.Optimizer = LAMB(groups, betas=options.betas, eps=options.eps)
        else:
            made = adamw(groups, options)
        return with_whole_state(made) if recipe.fsdp and n_ranks > 1 else made

    n_steps = recipe.steps or _steps_of(
        recipe, place, lambda: _seconds_a_step(recipe, model, all_instances[0], is_bf16)
    )  # fmt: skip
    first = n_steps - round(n_steps * recipe.second_share) if len(lengths) > 1 else n_steps
    phases = list(zip((first, n_steps - first), all_instances, strict=False))
    steps = PretrainingSteps(phases, accumulate=recipe.accumulate, rank=place.rank, n_ranks=n_ranks)
    held_batches = held_out_batches(all_instances[0], held, recipe.eval_tokens) if len(held) else []
    loop_options = Options(
        steps=n_steps,
        lr=lr,
        eps=1e-6,
        evaluate_every=max(1, n_steps // recipe.evaluations) if held_batches else 0,
        settings={
            "corpus": text.manifest["settings"],
            "recipe": {
                f.name: getattr(recipe, f.name)
                for f in fields(Recipe)
                if f.name not in ("save_every", "save_seconds", "log_every", "tensorboard")
            },
            "batch_tokens": batch_tokens,
        },
        **{
            f.name: getattr(recipe, f.name)
            for f in fields(Recipe)
            if f.name not in ("steps", "lr") and f.name in {o.name for o in fields(Options)}
        },
    )
    n_parameters = sum(p.numel() for p in network.parameters())
    place.tell(
        f"{recipe.size}: {n_parameters:,} parameters on {n_ranks} x {device.type}; "
        f"{text.lengths[train].sum():,} tokens in {len(train):,} documents, "
        f"{text.lengths[held].sum():,} in {len(held):,} held out; {n_steps:,} steps of about "
        f"{batch_tokens * recipe.accumulate * n_ranks:,} tokens, "
        f"ln(V) = {math.log(len(tokenizer)):.2f}"
    )
    if recipe.fsdp and n_ranks > 1:
        shard(model, network.bert.encoder.layer)
    result = fit(
        model, steps, loss_of, loop_options, place.work, place.resume,
        (lambda m: evaluate(m, held_batches, is_bf16)) if held_batches else None,
        make_optimizer, place.quiet,
    )  # fmt: skip
    if recipe.fsdp and n_ranks > 1:
        state = model.state_dict()  # whole tensors
        network = type(network)(config)
        Scored(network).load_state_dict(state)
    final = {k: v for k, v in result.evaluations[-1].items() if k != "step"} if held_batches else {}
    return {
        "network": network,
        "task": "pretraining",
        "model": recipe.size,
        "parameters": n_parameters,
        "ln_vocabulary": math.log(len(tokenizer)),
        "metrics": final,
        "steps": result.step,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 3),
        "tokens_per_second": round(result.tokens / max(result.seconds, 1e-9)),
        "corpus": {k: v for k, v in text.manifest.items() if k not in ("shards", "settings")},
        "held_out_documents": len(held),
        "recipe": {f.name: getattr(recipe, f.name) for f in fields(Recipe)}
        | {"steps": n_steps, "lr": lr, "batch_tokens": batch_tokens},
        "ranks": n_ranks,
        "device": f"{device}, {platform.machine()}",
        "versions": {"fastbert": version("fastbert"), "torch": torch.__version__},
        "history": result.history,
        "evaluations": result.evaluations,
    }


def _steps_of(recipe: Recipe, place: Place, seconds: Callable[[], float]) -> int:
    """How many steps the minutes are; of a run that goes on, as many as were found at first."""
    assert recipe.minutes is not None
    path = place.work / "steps.json"
    if place.resume and path.is_file():
        return int(json.loads(path.read_text())["steps"])
    slowest = torch.tensor(seconds(), device=place.device)
    if place.n_ranks > 1:
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
    n_steps = max(1, round(0.95 * 60 * recipe.minutes / float(slowest)))
    if place.rank == 0:
        place.work.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as temporary:
            temporary.write_text(json.dumps({"steps": n_steps}) + "\n")
    return n_steps


def _seconds_a_step(recipe: Recipe, model: nn.Module, instances: Instances, bf16: bool) -> float:
    """Tried on a copy of the model."""
    model = copy.deepcopy(model).train()
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    seconds: list[float] = []
    for step in PretrainingSteps([(0, instances)], accumulate=recipe.accumulate):
        start = time.perf_counter()
        for batch in step:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, _ = loss_of(model, batch.to(device), batch.n_items)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
        if len(seconds) >= 5 and sum(seconds) > _SECONDS_TRIED:
            break
    tried = sorted(seconds[2:])
    return tried[len(tried) // 2]


def _corpus(
    files: Sequence[str | os.PathLike[str]],
    tokenizer: BertTokenizer,
    folder: Path,
    rank: int,
    quiet: bool,
    hygiene: Hygiene | None,
    max_sentence: int | None,
) -> Corpus:
    """The corpus; rank 0 makes it, and the others wait."""
    is_made = len(files) == 1 and (Path(files[0]) / MANIFEST).is_file()
    folder = Path(files[0]) if is_made else folder
    failure: list[str | None] = [None]
    if rank == 0 and not is_made:
        try:
            build_corpus(
                files, tokenizer, folder, hygiene=hygiene, max_sentence=max_sentence,
                show_progress=not quiet,
            )  # fmt: skip
        except (ValueError, OSError) as error:
            if not dist.is_initialized():
                raise
            failure = [str(error)]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(failure, 0)
        if failure[0] is not None:
            raise ValueError(failure[0])
    corpus = Corpus(folder)
    corpus.check(tokenizer)
    return corpus


if __name__ == "__main__":
    from fastbert.cli import main

    sys.exit(main(["pretrain", *sys.argv[1:]]))
