"""Masked tokens, to adapt a model to texts of a kind before it is fine-tuned."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.batches import Index, by_budget, select, token_index
from fastbert.examples import Examples
from fastbert.lm import BertForMaskedLM
from fastbert.loop import MicroBatch
from fastbert.losses import IGNORED
from fastbert.masking import Masking, Vocabulary
from fastbert.tasks import Data, Task, TokenTask
from fastbert.tokenizer import BertTokenizer

_BLOCK_TOKENS = 1 << 20  # that masks are drawn for at once


class MaskedTask(Task):
    """The tokens that stood where masks stand, by fastbert.masking: others in each epoch, in
    evaluation always the same."""

    name = "mlm"
    head = BertForMaskedLM
    parts = ("text",)
    metric = "loss"
    larger_is_better = False

    def __init__(
        self,
        tokenizer: BertTokenizer,
        *,
        masking: str = "tokens",
        mask_rate: float = 0.15,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, **options)
        self.masking, self.vocabulary = Masking(masking, mask_rate), Vocabulary(tokenizer)
        self.seed = seed
        self._drawn: tuple[Any, Any, Any] = (None, None, None)  # of all tokens, in one epoch

    def encode(self, examples: Examples, labelled: bool = True) -> Data:
        texts = [text for text in examples.columns["text"] if text.strip()]
        if not texts:
            raise ValueError(f"{examples.name} has no text")
        packed = self.tokenizer.pack(texts, max_length=self.max_length, dtype=torch.int32)
        if np.isin(packed.input_ids.numpy(), self.tokenizer.all_special_ids).all():
            raise ValueError(f"{examples.name}: the vocabulary knows no word of it")
        return Data(examples, packed)

    def collate(self, data: Data, index: Index, epoch: int) -> MicroBatch:
        ids, labels = self._masked(data, epoch)
        tokens, _ = token_index(data.packed, torch.from_numpy(index))
        packed = replace(select(data.packed, index), input_ids=ids[tokens])
        labels = labels[tokens]
        n_items = {"labels": float((labels != IGNORED).sum())}
        return MicroBatch(packed, {"labels": labels}, n_items)

    def _masked(self, data: Data, epoch: int) -> tuple[Tensor, Tensor]:
        """All tokens of an epoch, drawn at once, so that nothing depends on how batches are cut."""
        if self._drawn[0] != (epoch, len(data.packed)):
            bounds, ids = data.packed.cu_seqlens, data.packed.input_ids.long().numpy()
            labels = np.empty_like(ids)
            for i, run in enumerate(by_budget(data.lengths, _BLOCK_TOKENS)):
                block = slice(int(bounds[run[0]]), int(bounds[run[-1] + 1]))
                random = np.random.default_rng((self.seed, epoch + 1, i))
                ids[block], labels[block] = self.masking.apply(
                    ids[block], data.lengths[run], self.vocabulary, random
                )
            key = epoch, len(data.packed)
            self._drawn = key, torch.from_numpy(ids), torch.from_numpy(labels)
        return self._drawn[1:]

    loss = TokenTask.loss

    def evaluate(self, model: nn.Module, data: Data, batch_tokens: int) -> dict[str, Any]:
        device = next(model.parameters()).device
        total = right = count = 0.0
        for run in by_budget(data.lengths, min(batch_tokens, 1024)):
            batch = self.collate(data, run, -1).to(device)
            labels = batch.labels["labels"]
            with torch.inference_mode():
                logits = model(batch.packed).logits[labels != IGNORED].float()
            labels = labels[labels != IGNORED]
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += float((logits.argmax(1) == labels).sum())
            count += labels.numel()
        loss = total / max(1.0, count)
        return {"loss": loss, "perplexity": math.exp(loss), "accuracy": right / max(1.0, count)}
