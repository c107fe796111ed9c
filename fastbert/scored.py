"""What pretraining minimises, and what it is evaluated by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.instances import Instances
from fastbert.kernels.cross_entropy import linear_cross_entropy
from fastbert.lm import BertForMaskedLM, BertForPreTraining
from fastbert.loop import MicroBatch
from fastbert.losses import cross_entropy
from fastbert.masking import Ints


class Scored(nn.Module):
    """A model for pretraining, which gives sums of losses and of right answers by name."""

    def __init__(self, model: BertForPreTraining | BertForMaskedLM) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, batch: MicroBatch) -> dict[str, Tensor]:
        out = self.model.bert(batch.packed)
        head = self.model.cls.predictions
        x = head.transform(out.last_hidden_state)
        labels = batch.labels["labels"]
        found = linear_cross_entropy(
            x, head.decoder.weight, head.decoder.bias, labels, reduction="sum"
        )
        sums = {"mlm_loss": found.loss, "mlm_accuracy": found.n_correct}
        follows = batch.labels.get("next_sentence_label")
        if follows is not None:
            logits = self.model.cls.seq_relationship(out.pooler_output)
            sums["nsp_loss"] = cross_entropy(logits, follows, 1)
            sums["nsp_accuracy"] = (logits.argmax(1) == follows).sum()
        return sums


def loss_of(
    model: nn.Module, batch: MicroBatch, n_items: Mapping[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """What fastbert.loop.fit takes: the sum of both mean losses, and the shares that are right."""
    means = {
        name: value / n_items["sequences" if name.startswith("nsp") else "labels"]
        for name, value in model(batch).items()
    }
    loss = means["mlm_loss"]
    return loss + means["nsp_loss"] if "nsp_loss" in means else loss, means


def evaluate(model: nn.Module, batches: Sequence[MicroBatch], bf16: bool) -> dict[str, float]:
    """Losses, accuracies and perplexity (per masked token) on batches, with the model as it is."""
    device = next(model.parameters()).device
    items: dict[str, float] = {}
    for batch in batches:
        items = {name: items.get(name, 0) + n for name, n in batch.n_items.items()}
    totals: dict[str, Tensor] = {}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for batch in batches:
            for name, value in loss_of(model, batch.to(device), items)[1].items():
                totals[name] = totals.get(name, 0) + value.double()
    means = {name: float(value) for name, value in totals.items()}
    loss = means["mlm_loss"] + means.get("nsp_loss", 0.0)
    return {"loss": loss, "perplexity": math.exp(min(700.0, means["mlm_loss"])), **means}


def held_out_batches(instances: Instances, held: Ints, most_tokens: int) -> list[MicroBatch]:
    """Batches of the held-out documents, the same whenever they are made."""
    of_held = replace(instances, documents=held)
    batches: list[MicroBatch] = []
    n_tokens = 0
    for batch in of_held.batches(0, 0):
        batches.append(batch)
        n_tokens += batch.n_tokens
        if n_tokens >= most_tokens:
            break
    return batches
