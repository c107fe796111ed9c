"""Masked tokens, to adapt a model to texts of a kind before it is fine-tuned."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastbert.batches import Index, by_budget, select, token_index
from fastbert.examples import Examples
from fastbert.lm import BertForMaskedLM
from fastbert.loop import MicroBatch
from fastbert.losses import IGNORED
from fastbert.packing import PackedBatch
from fastbert.tasks import Data, Task, TokenTask
from fastbert.tokenizer import BertTokenizer


class MaskedTask(Task):
    """The tokens that stood where masks stand: 15%, of which 80% are masks, 10% other tokens, 10%
    left as they are, others in each epoch; in evaluation always the same."""

    name = "mlm"
    head = BertForMaskedLM
    parts = ("text",)
    metric = "loss"
    larger_is_better = False

    def __init__(
        self, tokenizer: BertTokenizer, *, share: float = 0.15, seed: int = 0, **options: Any
    ) -> None:
        super().__init__(tokenizer, **options)
        if tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer must have a mask token, got None")
        self.share, self.seed, self.mask_id = share, seed, tokenizer.mask_token_id
        self._drawn: tuple[Any, Any] = (None, None)  # of all tokens, in one epoch

    def encode(self, examples: Examples, labelled: bool = True) -> Data:
        texts = [text for text in examples.columns["text"] if text.strip()]
        if not texts:
            raise ValueError(f"{examples.name} has no text")
        packed = self.tokenizer.pack(texts, max_length=self.max_length, dtype=torch.int32)
        if np.isin(packed.input_ids.numpy(), self.tokenizer.all_special_ids).all():
            raise ValueError(f"{examples.name}: the vocabulary knows no word of it")
        return Data(examples, packed)

    def collate(self, data: Data, index: Index, epoch: int) -> MicroBatch:
        if self._drawn[0] != (epoch, len(data.packed)):
            random = np.random.default_rng((self.seed, epoch + 1))
            shape = 3, data.packed.input_ids.numel()
            self._drawn = (epoch, len(data.packed)), random.random(shape, np.float32)
        packed = select(data.packed, index)
        tokens, _ = token_index(data.packed, torch.from_numpy(index))
        chance, kind, other = self._drawn[1][:, tokens.numpy()]
        ids = packed.input_ids.numpy()
        chosen = ~np.isin(ids, self.tokenizer.all_special_ids) & (chance < self.share)
        labels = np.where(chosen, ids, IGNORED)
        n_tokens = len(self.tokenizer)
        others = np.minimum((other * n_tokens).astype(np.int64), n_tokens - 1)
        ids = np.where(chosen & (kind < 0.8), self.mask_id, ids)
        ids = np.where(chosen & (kind >= 0.9), others, ids)
        masked = PackedBatch(
            torch.from_numpy(ids),
            packed.token_type_ids,
            packed.position_ids,
            packed.cu_seqlens,
            packed.max_seqlen,
        )
        n_items = {"labels": float(chosen.sum())}
        return MicroBatch(masked, {"labels": torch.from_numpy(labels)}, n_items)

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
