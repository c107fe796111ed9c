"""Questions whose answers are spans of a text: windows, their labels, and answers out of scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastbert import metrics
from fastbert.batches import Index, select
from fastbert.examples import Examples
from fastbert.heads import BertForQuestionAnswering
from fastbert.loop import MicroBatch
from fastbert.tasks import Data, Task, infer, pack_lists

_N_BEST = 20  # starts and ends of a window that are looked at


@dataclass
class _Windows:
    """example: (n_windows,), whose window it is. first: (n_windows,), its first token of the
    context; spans: for each window (n, 2), the characters of the context's tokens from there on."""

    example: list[int]
    first: list[int]
    spans: list[np.ndarray]


class QuestionTask(Task):
    """Where the answer to a question is in a text.

    Long texts are cut into windows that overlap by `stride` tokens (None: 128, or a third of a
    window where that is less). Where a training question has no answer, none may be given: it is
    the first token, and wins where its score is above the best span's by more than null_threshold.
    """

    name = "qa"
    head = BertForQuestionAnswering
    parts = ("id", "question", "context", "answers")
    optional = ("id",)
    metric = "f1"

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int = 384,
        stride: int | None = None,
        max_answer_length: int = 30,
        may_be_none: bool = False,
        null_threshold: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, max_length=min(max_length, 384), **options)
        stride = min(128, self.max_length // 3) if stride is None else stride
        if not 0 <= stride < self.max_length:
            raise ValueError(f"stride must be from 0 to {self.max_length - 1}, got {stride}")
        self.stride, self.max_answer_length = stride, max_answer_length
        self.may_be_none, self.null_threshold = may_be_none, null_threshold

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "stride": self.stride,
            "max_answer_length": self.max_answer_length,
            "may_be_none": self.may_be_none,
            "null_threshold": self.null_threshold,
        }

    def fit_labels(self, examples: Examples) -> None:
        self.may_be_none = any(not answers["text"] for answers in examples.columns["answers"])

    def encode(self, examples: Examples, labelled: bool = True) -> Data:
        questions = [question.strip() for question in examples.columns["question"]]
        try:
            rows = self.tokenizer(
                questions,
                examples.columns["context"],
                truncation="only_second",
                max_length=self.max_length,
                stride=self.stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
        except Exception as error:  # the tokenizer does not say which question is too long
            raise ValueError(
                f"{examples.name}: a question leaves no room for its context in "
                f"{self.max_length} tokens with a stride of {self.stride}: {error}"
            ) from None
        packed = pack_lists(rows["input_ids"], rows["token_type_ids"])
        windows = _Windows(list(map(int, rows["overflow_to_sample_mapping"])), [], [])
        for types, spans in zip(rows["token_type_ids"], rows["offset_mapping"], strict=True):
            first = len(types) - sum(types)  # the second text, and a [SEP] behind it
            windows.first.append(first)
            windows.spans.append(np.array(spans[first:-1], np.int64).reshape(-1, 2))
        data = Data(examples, packed, {}, windows)
        if labelled:
            data.targets = {"positions": self._positions(examples, windows)}
        return data

    def _positions(self, examples: Examples, windows: _Windows) -> Tensor:
        """(n_windows, 2): the first and last token of the answer; zeros where it is not there."""
        wanted: list[tuple[int, int] | None] = []
        for row, answers in enumerate(examples.columns["answers"]):
            try:
                texts, starts = list(answers["text"]), list(answers["answer_start"])
                if texts:
                    text, start = str(texts[0]), int(starts[0])
            except (KeyError, TypeError, ValueError, IndexError):
                raise examples.error(
                    row, f"answers must be {{'text': [...], 'answer_start': [...]}}, got {answers}"
                ) from None
            if not texts:
                wanted.append(None)
                continue
            there = examples.columns["context"][row][start : start + len(text)]
            if there != text:
                raise examples.error(row, f"the answer {text!r} is not at {start}: {there!r} is")
            wanted.append((start, start + len(text)))
        positions = torch.zeros(len(windows.example), 2, dtype=torch.int64)
        for i, example in enumerate(windows.example):
            answer, spans = wanted[example], windows.spans[i]
            if answer is None or not len(spans):
                continue
            start, end = answer
            if spans[0, 0] > start or spans[-1, 1] < end:
                continue
            inside = np.flatnonzero((spans[:, 1] > start) & (spans[:, 0] < end))
            if len(inside):
                positions[i] = torch.tensor([inside[0], inside[-1]]) + windows.first[i]
        return positions

    def collate(self, data: Data, index: Index, epoch: int) -> MicroBatch:
        positions = data.targets["positions"][index]
        labels = {"start": positions[:, 0], "end": positions[:, 1]}
        return MicroBatch(select(data.packed, index), labels, {"labels": float(len(index))})

    def loss(
        self, model: nn.Module, batch: MicroBatch, n_items: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        out = model(
            batch.packed,
            start_positions=batch.labels["start"],
            end_positions=batch.labels["end"],
            num_items_in_batch=n_items["labels"],
        )
        return out.loss, {}

    def predict(self, model: nn.Module, data: Data, batch_tokens: int) -> list[dict[str, Any]]:
        scores = infer(
            model,
            data.packed,
            lambda out: torch.stack([out.start_logits, out.end_logits], 1),
            batch_tokens,
            of_tokens=True,
        ).numpy()
        windows, ends = data.spots, data.packed.cu_seqlens.tolist()
        contexts = data.examples.columns["context"]
        best: list[tuple[float, int, int]] = [(-np.inf, 0, 0)] * len(contexts)
        none = np.full(len(contexts), np.inf)
        for i, example in enumerate(windows.example):
            own = scores[ends[i] : ends[i + 1]]
            none[example] = min(none[example], own[0].sum())
            spans = windows.spans[i]
            found = self._best_span(own[windows.first[i] :][: len(spans)])
            if found is not None and found[0] > best[example][0]:
                score, first, last = found
                best[example] = score, int(spans[first, 0]), int(spans[last, 1])
        predictions = []
        for (score, start, end), null, context in zip(best, none, contexts, strict=True):
            is_none = self.may_be_none and null > score + self.null_threshold
            start, end = (0, 0) if is_none else (start, end)
            predictions.append(
                {"answer": context[start:end], "start": start, "end": end, "score": float(score)}
            )
        return predictions

    def _best_span(self, scores: np.ndarray) -> tuple[float, int, int] | None:
        """The best of the spans of allowed lengths among the likeliest starts and ends."""
        if not len(scores):
            return None
        starts = np.argsort(-scores[:, 0], kind="stable")[:_N_BEST]
        ends = np.argsort(-scores[:, 1], kind="stable")[:_N_BEST]
        lengths = ends[None, :] - starts[:, None]
        sums = scores[starts, 0][:, None] + scores[ends, 1][None, :]
        sums = np.where((lengths >= 0) & (lengths < self.max_answer_length), sums, -np.inf)
        row, column = np.unravel_index(int(sums.argmax()), sums.shape)
        if not np.isfinite(sums[row, column]):
            return None
        return float(sums[row, column]), int(starts[row]), int(ends[column])

    def evaluate(self, model: nn.Module, data: Data, batch_tokens: int) -> dict[str, Any]:
        predicted = [found["answer"] for found in self.predict(model, data, batch_tokens)]
        truth = [list(answers["text"]) for answers in data.examples.columns["answers"]]
        return metrics.answers(truth, predicted)
