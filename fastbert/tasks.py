"""What is trained: for each task its head, labels, batches, loss, scores and predictions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import metrics
from fastbert.batches import Index, by_budget, select, token_index
from fastbert.examples import Examples
from fastbert.heads import BertForSequenceClassification, BertForTokenClassification
from fastbert.loop import MicroBatch
from fastbert.losses import IGNORED, divergence, wide
from fastbert.packing import PackedBatch
from fastbert.tokenizer import BertTokenizer


@dataclass
class Data:
    """Encoded examples. packed: all sequences, int32. targets: tensors by name, of sequences
    (n_seqs, ...) or of tokens (n_tokens,). spots: whatever leads from tokens back to examples."""

    examples: Examples
    packed: PackedBatch
    targets: dict[str, Tensor] = field(default_factory=dict)
    spots: Any = None

    @property
    def lengths(self) -> Index:
        return self.packed.lengths.numpy().astype(np.int64)


class Task(ABC):
    """labels: the names of the labels, in the order of their numbers; None until they are read from
    the training examples. max_length: of a sequence, in tokens. columns: names of the columns of
    the parts of an example, where they are not to be guessed."""

    name: ClassVar[str]
    head: ClassVar[Any]
    parts: tuple[str, ...]
    optional: tuple[str, ...] = ()
    metric: str
    larger_is_better = True

    def __init__(
        self,
        tokenizer: BertTokenizer,
        *,
        max_length: int = 512,
        labels: Sequence[str] | None = None,
        columns: Mapping[str, str | None] | None = None,
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.labels = None if labels is None else list(labels)
        self.columns = dict(columns or {})

    @property
    def inputs(self) -> tuple[str, ...]:
        """The parts that a prediction needs."""
        return tuple(p for p in self.parts if p not in ("label", "tags", "answers", "id"))

    def settings(self) -> dict[str, Any]:
        """What makes the same task again, of JSON's types."""
        return {"task": self.name, "max_length": self.max_length, "columns": self.columns}

    def config(self) -> dict[str, Any]:
        """What the model's configuration says of it."""
        if self.labels is None:
            return {}
        return {"id2label": dict(enumerate(self.labels))}

    def fit_labels(self, examples: Examples) -> None:  # noqa: B027 - a task may have none
        """Learn the labels from the training examples."""

    @abstractmethod
    def encode(self, examples: Examples, labelled: bool = True) -> Data: ...

    @abstractmethod
    def collate(self, data: Data, index: Index, epoch: int) -> MicroBatch: ...

    @abstractmethod
    def loss(
        self, model: nn.Module, batch: MicroBatch, n_items: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]: ...

    @abstractmethod
    def evaluate(self, model: nn.Module, data: Data, batch_tokens: int) -> dict[str, Any]: ...

    def predict(self, model: nn.Module, data: Data, batch_tokens: int) -> list[dict[str, Any]]:
        raise ValueError(f"a model of the task {self.name} has nothing to predict")

    def number(self, examples: Examples, row: int, name: str) -> int:
        """The number of a label, or ValueError with file and row."""
        assert self.labels is not None
        if not hasattr(self, "_numbers"):
            self._numbers = {label: i for i, label in enumerate(self.labels)}
        if name not in self._numbers:
            some = ", ".join(self.labels[:10]) + (", ..." if len(self.labels) > 10 else "")
            raise examples.error(row, f"unknown label {name!r}; in training there were {some}")
        return self._numbers[name]


def infer(
    model: nn.Module,
    packed: PackedBatch,
    outputs: Callable[[Any], Tensor],
    batch_tokens: int,
    of_tokens: bool = False,
) -> Tensor:
    """(n_seqs, ...) or, of_tokens, (n_tokens, ...) float32 on the CPU, in the order of `packed`."""
    device = next(model.parameters()).device
    order = torch.argsort(packed.lengths, stable=True)
    found: Tensor | None = None
    n_rows = packed.input_ids.numel() if of_tokens else len(packed)
    for run in by_budget(packed.lengths[order].numpy().astype(np.int64), batch_tokens):
        chosen = order[torch.from_numpy(run)]
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, device.type == "cuda"):
            part = outputs(model(select(packed, chosen.numpy()).to(device))).float().cpu()
        if found is None:
            found = torch.empty(n_rows, *part.shape[1:])
        found[token_index(packed, chosen)[0] if of_tokens else chosen] = part
    assert found is not None
    return found


def label_name(value: Any, names: list[str] | None) -> str:
    """A label as text, whatever the file has in its place."""
    if names is not None and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def in_order(labels: set[str], names: list[str] | None) -> list[str]:
    if names is not None and labels <= set(names):
        return list(names)
    try:
        return sorted(labels, key=int)
    except ValueError:
        return sorted(labels)


class SequenceTask(Task):
    """One label of several, or several labels, or a number, of a text or of two.

    teaching: the share of a teacher's logits, data.targets["teacher"], in the loss, where there are
    some: Hinton et al. 2015, at this temperature.
    """

    name = "classify"
    head = BertForSequenceClassification

    def __init__(
        self,
        tokenizer: BertTokenizer,
        *,
        kind: str = "single_label_classification",
        pair: bool | None = None,
        class_weights: str | None = None,
        label_smoothing: float = 0.0,
        r_drop: float = 0.0,
        teaching: float = 0.5,
        temperature: float = 2.0,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, **options)
        if not 0 <= teaching <= 1 or not temperature > 0:
            raise ValueError(
                "teaching must be from 0 to 1 and temperature above 0, "
                f"got {teaching} and {temperature}"
            )
        self.teaching, self.temperature = teaching, temperature
        if class_weights not in (None, "balanced"):
            raise ValueError(f"class_weights must be None or 'balanced', got {class_weights!r}")
        if kind != "single_label_classification" and (class_weights or label_smoothing or r_drop):
            raise ValueError("class_weights, label_smoothing and r_drop are for one label of many")
        self.kind, self.pair = kind, pair
        self.class_weights, self.label_smoothing = class_weights, label_smoothing
        self.r_drop = r_drop
        self.weights: Tensor | None = None
        self.parts = ("text", "label") if pair is False else ("text", "text_pair", "label")
        self.optional = ("text_pair",) if pair is None else ()
        self.metric = "spearman" if kind == "regression" else "accuracy"
        if kind == "multi_label_classification":
            self.metric = "f1_micro"
        if kind == "regression":
            self.labels = ["score"]

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "kind": self.kind, "pair": self.pair}

    def config(self) -> dict[str, Any]:
        return {**super().config(), "problem_type": self.kind}

    def fit_labels(self, examples: Examples) -> None:
        if "text_pair" not in examples.columns:
            self.pair, self.parts = False, ("text", "label")
        else:
            self.pair, self.parts = True, ("text", "text_pair", "label")
        self.optional = ()
        if self.kind == "regression":
            return
        if self.labels is None:
            found = {name for names in self._names(examples) for name in names}
            self.labels = in_order(found, examples.names)
        if len(self.labels) < 2 and self.kind == "single_label_classification":
            raise ValueError(
                f"{examples.name} has one label only, {self.labels}: nothing to tell apart"
            )
        if self.class_weights:
            counts = Counter(name for names in self._names(examples) for name in names)
            n = len(self.labels)
            balanced = [len(examples) / (n * max(1, counts[name])) for name in self.labels]
            self.weights = torch.tensor(balanced, dtype=torch.float64)

    def _names(self, examples: Examples) -> list[list[str]]:
        values = examples.columns["label"]
        if self.kind != "multi_label_classification":
            return [[label_name(value, examples.names)] for value in values]
        split = (v.split(",") if isinstance(v, str) else v for v in values)
        named = (
            [label_name(value, examples.names) for value in value_list] for value_list in split
        )
        return [[name for name in names if name] for names in named]

    def encode(self, examples: Examples, labelled: bool = True) -> Data:
        packed = self.tokenizer.pack(
            examples.columns["text"],
            examples.columns["text_pair"] if self.pair else None,
            max_length=self.max_length,
            dtype=torch.int32,
        )
        return Data(examples, packed, {"labels": self._targets(examples)} if labelled else {})

    def _targets(self, examples: Examples) -> Tensor:
        assert self.labels is not None
        if self.kind == "regression":
            numbers = []
            for row, value in enumerate(examples.columns["label"]):
                try:
                    numbers.append(float(value))
                except (ValueError, TypeError):
                    numbers.append(math.nan)
                if not math.isfinite(numbers[-1]):
                    raise examples.error(row, f"the label {value!r} is not a number")
            return torch.tensor(numbers)
        numbered = [
            [self.number(examples, row, name) for name in names]
            for row, names in enumerate(self._names(examples))
        ]
        if self.kind == "single_label_classification":
            return torch.tensor([numbers[0] for numbers in numbered])
        targets = torch.zeros(len(examples), len(self.labels))
        for row, chosen in enumerate(numbered):
            targets[row, chosen] = 1
        return targets

    def collate(self, data: Data, index: Index, epoch: int) -> MicroBatch:
        labels = data.targets["labels"][index]
        n_items = float(labels.numel())
        if self.weights is not None:
            n_items = float(self.weights[labels].sum())
        targets = {"labels": labels}
        if "teacher" in data.targets:
            targets["teacher"] = data.targets["teacher"][index]
        items = {"labels": n_items, "sequences": float(len(index))}
        return MicroBatch(select(data.packed, index), targets, items)

    def loss(
        self, model: nn.Module, batch: MicroBatch, n_items: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        labels = batch.labels["labels"]
        logits = wide(model(batch.packed).logits)
        total = self._sum(logits, labels, True)
        if self.r_drop:  # KL both ways between two forwards (Liang et al. 2021)
            second = wide(model(batch.packed).logits)
            a, b = logits.log_softmax(1), second.log_softmax(1)
            between = ((a.exp() - b.exp()) * (a - b)).sum() / 2
            total = (total + self._sum(second, labels, True)) / 2 + self.r_drop * between
        loss = total / n_items["labels"]
        if "teacher" in batch.labels:
            taught = divergence(logits, batch.labels["teacher"], self.temperature, self.kind)
            loss = (1 - self.teaching) * loss + self.teaching * taught / n_items["sequences"]
        return loss, {}

    def _sum(self, logits: Tensor, labels: Tensor, in_training: bool = False) -> Tensor:
        """The loss; evaluations are without weights of classes and smoothing."""
        if self.kind == "regression":
            return F.mse_loss(logits[:, 0], labels, reduction="sum")
        if self.kind == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        weights = self.weights.to(logits) if in_training and self.weights is not None else None
        smoothing = self.label_smoothing if in_training else 0.0
        return F.cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=smoothing)

    def evaluate(self, model: nn.Module, data: Data, batch_tokens: int) -> dict[str, Any]:
        assert self.labels is not None
        logits = infer(model, data.packed, lambda out: out.logits, batch_tokens)
        labels = data.targets["labels"]
        loss = {"loss": float(self._sum(logits, labels)) / labels.numel()}
        if self.kind == "regression":
            return loss | metrics.regression(labels.double().numpy(), logits[:, 0].double().numpy())
        if self.kind == "multi_label_classification":
            chosen = (logits > 0).long().numpy()
            return loss | metrics.multi_label(labels.long().numpy(), chosen, self.labels)
        return loss | metrics.classification(labels.numpy(), logits.argmax(1).numpy(), self.labels)

    def predict(self, model: nn.Module, data: Data, batch_tokens: int) -> list[dict[str, Any]]:
        assert self.labels is not None
        logits = infer(model, data.packed, lambda out: out.logits, batch_tokens)
        if self.kind == "regression":
            return [{"score": value} for value in logits[:, 0].tolist()]
        if self.kind == "multi_label_classification":
            return [
                {
                    "labels": [name for name, p in zip(self.labels, row, strict=True) if p > 0.5],
                    "scores": dict(zip(self.labels, row, strict=True)),
                }
                for row in logits.sigmoid().tolist()
            ]
        scores, chosen = logits.softmax(1).max(1)
        return [
            {"label": self.labels[i], "score": score}
            for i, score in zip(chosen.tolist(), scores.tolist(), strict=True)
        ]


class TokenTask(Task):
    """A tag for each word, read at its first token; long sentences are cut into windows."""

    name = "tokens"
    head = BertForTokenClassification
    parts = ("words", "tags")
    metric = "f1"

    def __init__(self, tokenizer: BertTokenizer, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        self._choose_metric()

    def fit_labels(self, examples: Examples) -> None:
        if self.labels is None:
            tags = {label_name(t, examples.names) for ts in examples.columns["tags"] for t in ts}
            self.labels = in_order(tags, examples.names)
        self._choose_metric()

    def _choose_metric(self) -> None:
        if self.labels is not None and not any("-" in label for label in self.labels):
            self.metric = "word_accuracy"  # there are no entities

    def encode(self, examples: Examples, labelled: bool = True) -> Data:
        words = [
            value.split() if isinstance(value, str) else list(value)
            for value in examples.columns["words"]
        ]
        rows = self.tokenizer(
            words,
            is_split_into_words=True,
            truncation=True,
            max_length=self.max_length,
            return_overflowing_tokens=True,
        )
        packed = pack_lists(rows["input_ids"], rows["token_type_ids"])
        owners = []  # (example, word) of the first token of each word
        spots = []
        last, start = (-1, -1), 0
        for i, example in enumerate(rows["overflow_to_sample_mapping"]):
            ids = rows.word_ids(i)
            for j, word in enumerate(ids):
                if word is not None and (example, word) != last:
                    last = (example, word)
                    owners.append(last)
                    spots.append(start + j)
            start += len(ids)
        data = Data(examples, packed, {}, (words, owners, torch.tensor(spots, dtype=torch.int64)))
        if labelled:
            numbers = self._numbers_of(examples, words)
            labels = torch.full((packed.input_ids.numel(),), IGNORED)
            labels[data.spots[2]] = torch.tensor(
                [numbers[i][j] for i, j in owners], dtype=torch.int64
            )
            data.targets = {"labels": labels}
        return data

    def _numbers_of(self, examples: Examples, words: list[list[str]]) -> list[list[int]]:
        numbers = []
        for row, tags in enumerate(examples.columns["tags"]):
            tags = tags.split() if isinstance(tags, str) else tags
            if len(tags) != len(words[row]):
                raise examples.error(row, f"{len(words[row])} words, but {len(tags)} tags")
            named = [label_name(tag, examples.names) for tag in tags]
            numbers.append([self.number(examples, row, name) for name in named])
        return numbers

    def collate(self, data: Data, index: Index, epoch: int) -> MicroBatch:
        packed = select(data.packed, index)
        tokens, _ = token_index(data.packed, torch.from_numpy(index))
        labels = data.targets["labels"][tokens]
        n_items = {"labels": float((labels != IGNORED).sum())}
        return MicroBatch(packed, {"labels": labels}, n_items)

    def loss(
        self, model: nn.Module, batch: MicroBatch, n_items: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        items = max(1.0, n_items["labels"])
        out = model(batch.packed, labels=batch.labels["labels"], num_items_in_batch=items)
        return out.loss, {}

    def _tags(self, model: nn.Module, data: Data, batch_tokens: int) -> list[list[str]]:
        assert self.labels is not None
        words, owners, spots = data.spots
        logits = infer(model, data.packed, lambda out: out.logits, batch_tokens, of_tokens=True)
        outside = "O" if "O" in self.labels else self.labels[0]
        tags = [[outside] * len(sentence) for sentence in words]
        for (i, j), number in zip(owners, logits[spots].argmax(1).tolist(), strict=True):
            tags[i][j] = self.labels[number]
        return tags

    def evaluate(self, model: nn.Module, data: Data, batch_tokens: int) -> dict[str, Any]:
        assert self.labels is not None
        truth = [
            [self.labels[number] for number in numbers]
            for numbers in self._numbers_of(data.examples, data.spots[0])
        ]
        return metrics.entities(truth, self._tags(model, data, batch_tokens))

    def predict(self, model: nn.Module, data: Data, batch_tokens: int) -> list[dict[str, Any]]:
        tags = self._tags(model, data, batch_tokens)
        return [{"words": w, "tags": t} for w, t in zip(data.spots[0], tags, strict=True)]


def pack_lists(ids: list[list[int]], types: list[list[int]]) -> PackedBatch:
    """Rows of different lengths, int32."""
    lengths = np.array([len(row) for row in ids], np.int32)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    positions = np.arange(ends[-1], dtype=np.int32) - np.repeat(ends[:-1], lengths)
    flat = (
        np.fromiter((x for row in rows for x in row), np.int32, ends[-1]) for rows in (ids, types)
    )
    input_ids, token_type_ids = map(torch.from_numpy, flat)
    longest = int(lengths.max()) if len(lengths) else 0
    return PackedBatch(
        input_ids, token_type_ids, torch.from_numpy(positions), torch.from_numpy(ends), longest
    )
