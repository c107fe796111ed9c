"""Distillation: a small model that learns from a large one what that was trained for.

    fastbert.distill.distill("train.tsv", teacher="teacher", student="tiny", out="student")

The student learns the labels, where there are some, the teacher's logits at a temperature (Hinton
et al. 2015, "Distilling the knowledge in a neural network"), and the teacher's hidden states of
every token, embeddings included, at evenly spaced layers (Sun et al. 2019, "Patient knowledge
distillation"), through a linear map where the student is not as wide (Jiao et al. 2020,
"TinyBERT").

Measured once, MiniLM-L6 (85.7%) to `tiny` on SST-2's 6,920 sentences, the best of 3 epochs on the
872 of dev, whose standard error is 1.3 points. Labels alone: 79.4%, with the teacher's embeddings
to start from 80.4%. With the logits too: 82.1%. With hidden states of weight 0.1 too: 81.7%; of
weight 1: 82.1%, and 80.6% without the embeddings, but both had learned nothing in the first epoch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.batches import Index, by_budget, select, token_index
from fastbert.examples import Examples, MissingColumn, Source
from fastbert.inputs import EncoderInputs
from fastbert.loop import MicroBatch
from fastbert.losses import divergence, wide
from fastbert.packing import PackedBatch
from fastbert.place import place_of
from fastbert.qa import QuestionTask
from fastbert.student import make_student, spaced
from fastbert.tasks import Data, SequenceTask, Task, TokenTask
from fastbert.train import Recipe, load, read_dev, run, usual_lr

_TIMED_TOKENS = 4096


def distill(
    train: Source,
    *,
    teacher: str | Path,
    student: str | Path,
    out: str | Path,
    dev: Source | None = None,
    columns: Mapping[str, str | None] | None = None,
    format: str | None = None,
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    hidden: float = 0.1,
    teaching: float = 0.5,
    temperature: float = 2.0,
    **options: Any,
) -> dict[str, Any]:
    """Train a student on what a teacher says, and write it to the folder `out`.

    teacher: a folder of fastbert train, whose task, labels, tokenizer and columns are the
    student's. student: a size ("tiny", ...), layers and width ("3x384"), or the folder or hub id of
    a model with the teacher's vocabulary. train: examples of the task; where they have no labels,
    the teacher alone teaches. hidden: the weight of the hidden states, 0 for none. teaching: the
    share of the teacher's logits, beside the labels. temperature: of the logits. The rest as for
    fastbert.train.train_task, options as for fastbert.train.Recipe.

    The numbers, also in OUT/metrics.json, have the teacher's scores on `dev`, and of both the
    parameters and the tokens/s of a forward. Raises ValueError for a folder that is no teacher, a
    size that is not known, another vocabulary, and data that cannot be read.
    """
    if hidden < 0 or not 0 <= teaching <= 1 or not temperature > 0:
        raise ValueError(
            "hidden must be 0 or more, teaching from 0 to 1 and temperature above 0, "
            f"got {hidden}, {teaching} and {temperature}"
        )
    recipe = Recipe(**options)
    with place_of(out, device, resume, overwrite, quiet) as place:
        taught = load(teacher, str(place.device))
        task, large = taught.task, taught.model.float().requires_grad_(False)
        if not isinstance(task, SequenceTask | TokenTask | QuestionTask):
            raise ValueError(
                "a teacher's task is classify, pair, regression, tokens or qa: "
                f"{teacher} was trained for {task.name}"
            )
        torch.manual_seed(recipe.seed)  # the student's first weights
        small, lr = make_student(str(student), task, large, place.device)
        longest = small.config.max_position_embeddings
        task.max_length = min(recipe.max_length, task.max_length, longest)

        examples, labelled = _read(task, train, format, columns)
        place.tell(examples.said() + ("" if labelled else "; no labels: the teacher alone teaches"))
        task.columns |= examples.chosen
        data, dev_data = task.encode(examples, labelled), None
        if dev is not None:
            dev_examples = read_dev(task, dev, format)
            place.tell(dev_examples.said())
            dev_data = task.encode(dev_examples)
        numbers = _compare(large, small, task, data, dev_data, recipe.batch_tokens)
        numbers["teacher"]["folder"] = str(teacher)
        for who, of in numbers.items():
            speed = f"{of['tokens_per_second']:,} tokens/s forward"
            place.tell(f"the {who}: {of['parameters']:,} parameters, {speed}")
        lesson = Distillation(task, large, hidden, teaching if labelled else 1.0, temperature)
        return run(
            task,
            data,
            dev_data,
            Student(small, large, hidden > 0),
            recipe,
            place,
            lr=recipe.lr or lr or usual_lr(small),
            settings={
                "teacher": str(teacher),
                "student": str(student),
                "distillation": [hidden, lesson.teaching, temperature],
            },
            numbers={"task": task.name, "model": str(student), **numbers},
            sources=[train, dev, teacher, student],
            finish=lambda trained: trained.model,
            lesson=lesson,
        )


class Student(nn.Module):
    """A model and what leads from each of its hidden states to a teacher's, which is trained with
    it and not kept. It is called as the model is."""

    def __init__(self, model: Any, teacher: Any, with_maps: bool) -> None:
        super().__init__()
        own, other = model.config.hidden_size, teacher.config.hidden_size
        n_maps = 1 + model.config.num_hidden_layers if with_maps else 0
        self.model = model
        self.maps = nn.ModuleList(
            nn.Identity() if own == other else nn.Linear(own, other) for _ in range(n_maps)
        ).to(model.device)

    def forward(self, packed: PackedBatch, **options: Any) -> Any:
        return self.model(packed, **options)


class Distillation:
    """What a student learns, batch by batch; the teacher reads each batch anew.

    The loss is (1 - teaching) * the task's + teaching * the divergence of logits + hidden * the
    mean squared error of hidden states, over tokens, columns and states. The logits that count are
    a text's, those of a word's first token, or those of an answer's start and end.
    """

    def __init__(
        self, task: Task, teacher: Any, hidden: float, teaching: float, temperature: float
    ) -> None:
        self.task, self.teacher, self.hidden = task, teacher, hidden
        self.teaching, self.temperature = teaching, temperature
        self.kind = task.kind if isinstance(task, SequenceTask) else "single_label_classification"

    def collate(self, data: Data, index: Index, epoch: int) -> MicroBatch:
        if data.targets:
            batch = self.task.collate(data, index, epoch)
        else:
            batch = MicroBatch(select(data.packed, index), {}, {})
        labels, n_taught = {**batch.labels}, len(index)
        if isinstance(self.task, TokenTask):
            tokens, _ = token_index(data.packed, torch.from_numpy(index))
            labels["spots"] = torch.isin(tokens, data.spots[2])
            n_taught = int(labels["spots"].sum())
        elif isinstance(self.task, QuestionTask):
            n_taught *= 2  # a start and an end
        items = {"taught": float(n_taught), "tokens": float(batch.n_tokens)}
        return MicroBatch(batch.packed, labels, {**batch.n_items, **items})

    def loss(
        self, student: Student, batch: MicroBatch, n_items: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As fastbert.loop.fit takes it; the parts are in the history, too."""
        found: list[Any] = []

        def forward(packed: PackedBatch, **labels: Any) -> Any:
            found.append(student(packed, output_hidden_states=self.hidden > 0, **labels))
            return found[0]

        parts: dict[str, Tensor] = {}
        if self.teaching < 1:  # else there may be no labels
            parts["labels"], _ = self.task.loss(forward, batch, n_items)  # type: ignore[arg-type]
        else:
            forward(batch.packed)
        on_gpu = batch.packed.device.type == "cuda"
        with torch.no_grad(), torch.autocast(batch.packed.device.type, torch.bfloat16, on_gpu):
            taught = self.teacher(batch.packed, output_hidden_states=self.hidden > 0)
        rows, wanted = self._rows(found[0], batch), self._rows(taught, batch)
        apart = divergence(rows, wanted, self.temperature, self.kind)
        parts["logits"] = apart / max(1.0, n_items["taught"])
        if self.hidden:
            own, others = found[0].hidden_states, taught.hidden_states
            chosen = [0, *spaced(len(own) - 1, len(others) - 1)]
            errors = [
                F.mse_loss(wide(to(x)), wide(others[i]), reduction="sum")
                for to, x, i in zip(student.maps, own, chosen, strict=True)
            ]
            n_columns = len(errors) * others[0].shape[1]
            parts["hidden"] = torch.stack(errors).sum() / (n_items["tokens"] * n_columns)
        weights = {"labels": 1 - self.teaching, "logits": self.teaching, "hidden": self.hidden}
        loss = torch.stack([weights[name] * value for name, value in parts.items()]).sum()
        return loss, {f"{name}_loss": value for name, value in parts.items()}

    def _rows(self, out: Any, batch: MicroBatch) -> Tensor:
        """(n, n_classes) logits: of texts, of words, or of windows' places of starts and ends."""
        if isinstance(self.task, QuestionTask):
            inputs = EncoderInputs.of_packed(batch.packed)
            scores = inputs.to_rows(wide(torch.stack([out.start_logits, out.end_logits], 1)))
            none = torch.finfo(scores.dtype).min / 2  # not -inf, whose difference is no number
            scores = scores.masked_fill(~inputs.real()[..., None], none)
            return scores.transpose(1, 2).flatten(0, 1)
        logits = wide(out.logits)
        return logits[batch.labels["spots"]] if "spots" in batch.labels else logits


def _read(
    task: Task, source: Source, format: str | None, columns: Mapping[str, str | None] | None
) -> tuple[Examples, bool]:
    """Examples, and whether they have labels."""
    try:
        return read_dev(task, source, format, columns=columns), True
    except MissingColumn as error:
        if columns and columns.get(error.part):
            raise
    return read_dev(task, source, format, task.inputs, columns), False


def _compare(
    teacher: Any, student: Any, task: Task, data: Data, dev_data: Data | None, batch_tokens: int
) -> dict[str, dict[str, Any]]:
    """Of both the parameters and a forward's speed, in turns; the teacher's scores."""
    packed, models = (dev_data or data).packed, (teacher, student)
    lengths = packed.lengths.numpy().astype(np.int64)
    first = by_budget(lengths, _TIMED_TOKENS)[0]
    part = select(packed, first[np.argsort(lengths[first], kind="stable")]).to(teacher.device)
    rounds = [[_seconds(model, part) for model in models] for _ in range(4)][1:]
    found: list[dict[str, Any]] = [
        {
            "parameters": model.num_parameters(),
            "tokens_per_second": round(part.input_ids.numel() / median(seconds)),
        }
        for model, *seconds in zip(models, *rounds, strict=True)
    ]
    scores = task.evaluate(teacher, dev_data, batch_tokens) if dev_data else {}
    found[0]["metrics"] = {name: x for name, x in scores.items() if isinstance(x, float)}
    return {"teacher": found[0], "student": found[1]}


def _seconds(model: Any, packed: PackedBatch) -> float:
    began, on_gpu = time.perf_counter(), packed.device.type == "cuda"
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, on_gpu):
        model(packed)[0].cpu()  # waits for the device
    return time.perf_counter() - began
