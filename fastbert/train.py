"""Fine-tuning: from files to a model folder with its scores.

    fastbert.train.classify("train.tsv", dev="dev.tsv", model="bert-base-uncased", out="out")

`classify`, `pair`, `regression`, `tokens`, `qa` and `mlm` take what fastbert.examples reads and
give the numbers that they also write to OUT/metrics.json. The folder is a model folder, which
transformers reads too; `load`, `evaluate` and `predict` take it. On more GPUs or machines:

    torchrun --nproc-per-node 8 -m fastbert.train classify train.tsv --dev dev.tsv ...
"""

from __future__ import annotations

import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbert.batches import TokenBatches
from fastbert.config import BertConfig
from fastbert.examples import Examples, MissingColumn, Source, read_examples
from fastbert.files import find_checkpoint, model_folder
from fastbert.int8 import ADVICE, is_int8, usual_device
from fastbert.loop import Options, fit
from fastbert.masked import MaskedTask
from fastbert.place import Place, place_of
from fastbert.qa import QuestionTask
from fastbert.tasks import Data, SequenceTask, Task, TokenTask, infer
from fastbert.tokenizer import BertTokenizer

SETTINGS_NAME = "fastbert_task.json"
_TASKS: dict[str, Any] = {
    task.name: task for task in (SequenceTask, TokenTask, QuestionTask, MaskedTask)
}


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are a recipe that suits small data and small models.

    epochs: how often each example is seen. lr: None: the task's. batch_size: sequences a step;
    step_tokens: in its place, tokens a step. batch_tokens: at most in one forward; a step of more
    is cut, which changes neither loss nor gradients. max_length: tokens of a sequence, beyond which
    it is cut, or, for tokens and questions, goes on in another window. evaluations: in an epoch.
    The rest as fastbert.loop.Options says.
    """

    epochs: float = 3
    lr: float | None = None
    batch_size: int | None = 32
    step_tokens: int | None = None
    batch_tokens: int = 8192
    max_length: int = 512
    window: int = 1
    weight_decay: float = 0.01
    schedule: str = "linear"
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    layer_decay: float = 1.0
    freeze: int = 0
    dtype: str | None = None
    evaluations: int = 1
    patience: int = 0
    seed: int = 0
    save_every: int = 0
    save_seconds: float = 300.0
    log_every: int = 20
    tensorboard: bool = False


def classify(train: Source, **options: Any) -> dict[str, Any]:
    """One label of several, of a text; multi_label=True: any number of them. Options: `train`'s,
    and class_weights="balanced", label_smoothing, r_drop (the weight of its second term)."""
    return train_task("classify", train, **options)


def pair(train: Source, **options: Any) -> dict[str, Any]:
    """As `classify`, of two texts."""
    return train_task("pair", train, **options)


def regression(train: Source, **options: Any) -> dict[str, Any]:
    """A number, of a text or of two."""
    return train_task("regression", train, **options)


def tokens(train: Source, **options: Any) -> dict[str, Any]:
    """A tag for each word."""
    return train_task("tokens", train, **options)


def qa(train: Source, **options: Any) -> dict[str, Any]:
    """Where in a text the answer to a question is. Options: stride, max_answer_length."""
    return train_task("qa", train, **options)


def mlm(train: Source, **options: Any) -> dict[str, Any]:
    """Masked tokens, of texts of the kind that a model is for, before it is fine-tuned."""
    return train_task("mlm", train, **options)


def distill(train: Source, **options: Any) -> dict[str, Any]:
    """A small model that learns from a trained one: fastbert.distill.distill."""
    from fastbert.distill import distill as of_teacher

    return of_teacher(train, **options)


def make_task(
    name: str, tokenizer: BertTokenizer, *, multi_label: bool = False, **options: Any
) -> Task:
    """The task of a name of the command line."""
    if name in ("classify", "pair", "regression"):
        kind = "multi_label_classification" if multi_label else "single_label_classification"
        kind = "regression" if name == "regression" else kind
        pair = {"pair": True, "classify": bool((options.get("columns") or {}).get("text_pair"))}
        return SequenceTask(tokenizer, kind=kind, pair=pair.get(name), **options)
    if name not in _TASKS:
        raise ValueError(
            f"task must be one of classify, pair, regression, tokens, qa, mlm, got {name!r}"
        )
    return _TASKS[name](tokenizer, **options)


def train_task(
    task_name: str,
    train: Source,
    *,
    model: str | Path,
    out: str | Path,
    dev: Source | None = None,
    columns: Mapping[str, str | None] | None = None,
    format: str | None = None,
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    lora: int = 0,
    teacher: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train `model`, a folder or hub id, and write it to the folder `out`.

    columns: names of the columns ("text", "text_pair", "label", "words", "tags", "question",
    "context", "answers"), guessed where they are not given. resume: go on with a run that was
    stopped, from OUT.parts. lora: the rank of adapters (peft) that are trained in place of the
    weights, into which they are merged at the end; 0: none. teacher: a folder trained for the same
    labels, whose logits are learned as well (of classify, pair and regression): `model` may then be
    much smaller. options: Recipe's and the task's. Under torchrun every rank calls it, and rank 0
    writes.

    The model is evaluated on `dev` after each epoch, and the best by the task's metric is kept;
    without `dev` the last is. Raises ValueError, with file and row, on data that cannot be read.
    """
    named = {f.name for f in fields(Recipe)} & options.keys()
    recipe = Recipe(**{name: options.pop(name) for name in named})
    with place_of(out, device, resume, overwrite, quiet) as place:
        tokenizer = BertTokenizer.from_pretrained(model)
        config = BertConfig.from_file(find_checkpoint(model, weights=False).config_file)
        if is_int8(config):
            raise ValueError(f"{model} cannot be trained: {ADVICE}")
        limit = min(recipe.max_length, config.max_position_embeddings)
        if task_name == "mlm":
            options.setdefault("seed", recipe.seed)
        task = make_task(task_name, tokenizer, max_length=limit, columns=columns, **options)
        train_examples = read_examples(
            train, task.parts, columns, optional=task.optional, format=format
        )
        place.tell(train_examples.said())
        task.fit_labels(train_examples)
        task.columns = {**train_examples.chosen}
        data, dev_data = task.encode(train_examples), None
        if dev is not None:
            dev_examples = read_dev(task, dev, format)
            place.tell(dev_examples.said())
            dev_data = task.encode(dev_examples)
        if task.labels is not None and len(task.labels) > 1:
            shown = ", ".join(task.labels[:12]) + (", ..." if len(task.labels) > 12 else "")
            place.tell(f"{len(task.labels)} labels: {shown}")

        if teacher is not None:
            data.targets["teacher"] = _taught(task, train_examples, teacher, str(place.device))
        torch.manual_seed(recipe.seed)  # the head's first weights
        network = load_head(task, model, place.device)
        return run(
            task,
            data,
            dev_data,
            _with_lora(network, lora) if lora else network,
            recipe,
            place,
            lr=recipe.lr or usual_lr(network, bool(lora)),
            settings={
                "options": {k: v for k, v in options.items() if k != "columns"},
                "model": str(model),
                "lora": lora,
                "teacher": None if teacher is None else str(teacher),
            },
            numbers={"task": task_name, "model": str(model)},
            sources=[train, dev, model],
            finish=(lambda trained: trained.merge_and_unload()) if lora else None,
        )


def run(
    task: Task,
    data: Data,
    dev_data: Data | None,
    trained: nn.Module,
    recipe: Recipe,
    place: Place,
    *,
    lr: float,
    settings: Mapping[str, Any],
    numbers: dict[str, Any],
    sources: list[Any],
    finish: Callable[[Any], Any] | None,
    lesson: Any = None,
) -> dict[str, Any]:
    """Train `trained` on `data`, and write it, or what `finish` makes of it, to `place.out`.

    settings: what a checkpoint must agree on beside the recipe. numbers: what metrics.json says
    first. sources: what `place.out` must not hold. lesson: whose `collate` and `loss` are learned,
    where they are not the task's.
    """
    lesson = task if lesson is None else lesson
    device = next(trained.parameters()).device
    steps = TokenBatches(
        data.lengths,
        lambda index, epoch: lesson.collate(data, index, epoch),
        epochs=recipe.epochs,
        batch_size=None if recipe.step_tokens else recipe.batch_size,
        step_tokens=recipe.step_tokens or 4096,
        batch_tokens=recipe.batch_tokens,
        window=recipe.window,
        seed=recipe.seed,
        rank=place.rank,
        n_ranks=place.n_ranks,
    )
    per_epoch = steps.steps_of_epoch[0]
    loop_options = Options(
        steps=len(steps),
        lr=lr,
        evaluate_every=math.ceil(per_epoch / recipe.evaluations) if dev_data else 0,
        metric=task.metric if dev_data else None,
        larger_is_better=task.larger_is_better,
        settings={
            "task": task.settings(),
            "labels": task.labels,
            **settings,
            "sequences": len(data.packed),
            "tokens": int(data.packed.input_ids.numel()),
            "batches": [recipe.epochs, recipe.batch_size, recipe.step_tokens, recipe.batch_tokens],
            "window": recipe.window,
        },
        **{
            f.name: getattr(recipe, f.name)
            for f in fields(Recipe)
            if f.name not in ("epochs", "lr") and f.name in {o.name for o in fields(Options)}
        },
    )
    place.tell(
        f"{len(data.packed):,} sequences, {data.packed.input_ids.numel():,} tokens: "
        f"{len(steps):,} steps in {recipe.epochs:g} epochs, learning rate {lr:g}, on {device}"
    )

    def evaluated(network: nn.Module) -> dict[str, float]:
        assert dev_data is not None
        return task.evaluate(network, dev_data, recipe.batch_tokens)

    result = fit(
        trained,
        steps,
        lesson.loss,
        loop_options,
        place.work,
        place.resume,
        evaluated if dev_data else None,
        quiet=place.quiet,
    )
    best_step = result.best_step or result.step
    network, final = trained, None
    if finish is not None:
        network = finish(trained)
        final = evaluated(network) if dev_data else None
    elif dev_data:
        scores = next(e for e in reversed(result.evaluations) if e["step"] == best_step)
        final = {name: score for name, score in scores.items() if name != "step"}
    numbers = {
        **numbers,
        "train": data.examples.name,
        "dev": None if dev_data is None else dev_data.examples.name,
        "labels": task.labels,
        "metrics": final,
        "steps": result.step,
        "best_step": best_step,
        "stopped_early": result.stopped_early,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 3),
        "seconds_in_all": round(time.perf_counter() - place.started, 3),
        "tokens_per_second": round(result.tokens / max(result.seconds, 1e-9)),
        "recipe": {f.name: getattr(recipe, f.name) for f in fields(Recipe)} | {"lr": lr},
        "settings": loop_options.settings,
        "versions": {"fastbert": version("fastbert"), "torch": torch.__version__},
        "device": f"{device}, {platform.machine()}",
        "history": result.history,
        "evaluations": [_numbers(entry) for entry in result.evaluations],
    }
    if place.rank == 0:
        with place.written(sources) as new:
            write_model(new, network, task, numbers)
    return numbers


def write_model(folder: Path, network: Any, task: Task, numbers: dict[str, Any]) -> None:
    """The model folder: weights, tokenizer, the task, scores, pictures and a card."""
    from fastbert.report import model_card, plot_confusion, plot_history

    network.save_pretrained(folder)
    task.tokenizer.save_pretrained(folder)
    _write_json(folder / SETTINGS_NAME, task.settings())
    _write_json(folder / "metrics.json", numbers)
    plot_history(folder / "loss.png", numbers)
    if numbers["metrics"] and "confusion" in numbers["metrics"]:
        plot_confusion(folder / "confusion.png", numbers["metrics"]["confusion"], task.labels or [])
    (folder / "README.md").write_text(model_card(numbers), encoding="utf-8")


@dataclass
class Trained:
    """A model that was trained here, and its task."""

    model: Any
    task: Task
    batch_tokens: int = 8192

    def evaluate(self, data: Source, format: str | None = None) -> dict[str, Any]:
        """Scores on labelled data."""
        return self.task.evaluate(self.model, self.encode(data, format), self.batch_tokens)

    def encode(self, data: Source, format: str | None = None) -> Data:
        return self.task.encode(read_dev(self.task, data, format))

    def predict(
        self,
        data: Source,
        format: str | None = None,
        columns: Mapping[str, str | None] | None = None,
    ) -> list[dict[str, Any]]:
        """A dict for each example: "label" and "score", "labels", "score", "tags" or "answer"."""
        examples = read_dev(self.task, data, format, self.task.inputs, columns)
        encoded = self.task.encode(examples, labelled=False)
        return self.task.predict(self.model, encoded, self.batch_tokens)


def load(folder: str | Path, device: str | None = None) -> Trained:
    """A model folder that `fastbert train` wrote."""
    path = model_folder(folder)
    try:
        settings = json.loads((path / SETTINGS_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {SETTINGS_NAME}: it is not a folder of fastbert train"
        ) from None
    kind = _TASKS[settings.pop("task")]
    config = BertConfig.from_pretrained(path)
    network = kind.head.from_pretrained(path, device=device or usual_device(config))
    has_labels = kind in (SequenceTask, TokenTask)
    labels = list(network.config.id2label.values()) if has_labels else None
    task = kind(BertTokenizer.from_pretrained(path), labels=labels, **settings)
    return Trained(network, task)


def evaluate(folder: str | Path, data: Source, **options: Any) -> dict[str, Any]:
    """Scores of a folder on labelled data."""
    return load(folder).evaluate(data, **options)


def predict(folder: str | Path, data: Source, **options: Any) -> list[dict[str, Any]]:
    """What a folder's model says of data."""
    return load(folder).predict(data, **options)


def read_dev(
    task: Task,
    source: Source,
    format: str | None = None,
    parts: tuple[str, ...] | None = None,
    columns: Mapping[str, str | None] | None = None,
) -> Examples:
    """Other examples for a task: the columns are called as in training, or guessed again."""
    parts = task.parts if parts is None else parts
    if columns:
        return read_examples(source, parts, columns, optional=task.optional, format=format)
    named = {part: name for part, name in task.columns.items() if part in parts}
    try:
        return read_examples(source, parts, named, optional=task.optional, format=format)
    except MissingColumn as error:
        try:
            return read_examples(source, parts, optional=task.optional, format=format)
        except MissingColumn:
            raise error from None


def load_head(task: Task, model: str | Path, device: torch.device) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*initialised afresh.*")
        return task.head.from_pretrained(
            model,
            dtype=torch.float32,
            device=device,
            ignore_mismatched_sizes=True,
            **task.config(),
        )


def _taught(task: Task, examples: Examples, folder: str | Path, device: str) -> torch.Tensor:
    """(n_examples, n_labels): a teacher's logits, in the order of the task's labels."""
    teacher = load(folder, device)
    other = teacher.task
    if not isinstance(task, SequenceTask) or not isinstance(other, SequenceTask):
        raise ValueError(f"a teacher is for classify, pair and regression, got {other.name}")
    if (other.kind, other.pair) != (task.kind, task.pair):
        raise ValueError(f"{folder} was trained for another task than this one")
    assert task.labels is not None and other.labels is not None
    if set(task.labels) != set(other.labels):
        raise ValueError(f"the teacher's labels must be {task.labels}, got {other.labels}")
    encoded = other.encode(examples, labelled=False)
    logits = infer(teacher.model, encoded.packed, lambda out: out.logits, teacher.batch_tokens)
    return logits[:, [other.labels.index(label) for label in task.labels]].clone()


def _with_lora(network: Any, rank: int) -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError("lora needs peft: pip install peft") from None
    others = [(name, module) for name, module in network.named_children() if name != "bert"]
    heads = [name for name, module in others if any(True for _ in module.parameters())]
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["query", "value"], modules_to_save=heads
    )
    return peft.get_peft_model(network, config)


def usual_lr(network: Any, is_lora: bool = False) -> float:
    """Larger for smaller models, as Turc et al. 2019 found; larger again for adapters."""
    hidden = network.config.hidden_size
    lr = 5e-5 if hidden >= 768 else 1e-4 if hidden >= 384 else 3e-4
    if hidden >= 1024:
        lr = 2e-5
    return 10 * lr if is_lora else lr


def _numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if isinstance(v, int | float)}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from fastbert.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
