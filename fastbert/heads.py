"""Heads on the encoder: transformers' classes, without padding from the ids to the loss.

All take what BertModel takes, padded or a PackedBatch, and labels in the same form: of tokens
(n_seqs, length), or (n_tokens,) when packed; of sequences (n_seqs,). Logits of tokens are zeros at
padding, and labels there are not read. Losses are transformers'. `num_items_in_batch`: the labels
in all batches that make one step; a loss is then its sum over this batch divided by that, so that
gradients of small batches add up to those of one large batch. Losses of half precision are float32.
Models that embed these call `bert` with packed tokens, which is what its hooks see.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.config import BertConfig
from fastbert.inputs import EncoderInputs
from fastbert.losses import (
    Items,
    checked_labels,
    cross_entropy,
    span_loss,
    token_labels,
    wide,
)
from fastbert.model import BertModel
from fastbert.outputs import (
    BaseModelOutputWithPooling,
    ModelOutput,
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from fastbert.packing import PackedBatch
from fastbert.pretrained import BertPreTrainedModel

_PADDED = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


class BertOnlyNSPHead(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.seq_relationship(pooled)


class Headed(BertPreTrainedModel):
    """A BertModel under the name `bert`."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        assert config.num_labels is not None  # a configuration that is made has a number
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer)

    def _start(self) -> None:
        """First weights of the head, tied where they are to be: a constructor's last line."""
        for name, module in self.named_children():
            if name != "bert":
                module.apply(self._init_weights)
        self.tie_weights()

    def _classifier_dropout(self) -> nn.Dropout:
        rate = self.config.classifier_dropout
        return nn.Dropout(self.config.hidden_dropout_prob if rate is None else rate)

    def _encode(
        self, given: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[EncoderInputs, BaseModelOutputWithPooling]:
        """The inputs, and what `bert` makes of them, of packed tokens in their order."""
        inputs = EncoderInputs.of(*given)
        config = self.config
        asked = (options.get("output_attentions"), options.get("output_hidden_states"))
        if not (
            any(asked)
            or config.is_decoder
            or config.output_attentions
            or config.output_hidden_states
        ):
            inputs = inputs.by_length()
        options = {"use_cache": False, **options, "return_dict": True}
        return inputs, self.bert(inputs, **options)

    def _returned(self, out: ModelOutput, options: dict[str, Any]) -> Any:
        return out if self._wants_names(options) else out.to_tuple()

    def _wants_names(self, options: dict[str, Any]) -> bool:
        return_dict = options.get("return_dict")
        return self.config.return_dict if return_dict is None else return_dict


class BertForNextSentencePrediction(Headed):
    """Whether the second text follows the first."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.cls = BertOnlyNSPHead(config)
        self._start()

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        num_items_in_batch: Items = None,
        **kwargs: Any,
    ) -> NextSentencePredictorOutput | tuple[Any, ...]:
        """labels: (n_seqs,), 0 where the second text follows the first, 1 where it does not."""
        given = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        inputs, out = self._encode(given, kwargs)
        logits, loss = self.cls(out.pooler_output), None
        if labels is not None:
            labels = checked_labels(labels, (inputs.n_seqs,), 2)
            loss = cross_entropy(logits, labels, num_items_in_batch)
        return self._returned(
            NextSentencePredictorOutput(loss, logits, out.hidden_states, out.attentions), kwargs
        )


class BertForSequenceClassification(Headed):
    """A label, several labels or numbers for a sequence, as `config.problem_type` says.

    Where it is None, the first labels decide, as in transformers: "regression" with one label,
    "single_label_classification" of whole numbers, else "multi_label_classification". `config` is
    then replaced by one that says so.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.dropout = self._classifier_dropout()
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self._start()

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        num_items_in_batch: Items = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """labels: (n_seqs,) whole numbers for one label of several, (n_seqs, num_labels) of zeros
        and ones for several labels, (n_seqs, num_labels) or, of one, (n_seqs,) numbers to regress.
        """
        given = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        _, out = self._encode(given, kwargs)
        logits = self.classifier(self.dropout(out.pooler_output))
        loss = None if labels is None else self._loss(logits, labels, num_items_in_batch)
        return self._returned(
            SequenceClassifierOutput(loss, logits, out.hidden_states, out.attentions), kwargs
        )

    def _loss(self, logits: Tensor, labels: Tensor, num_items: Items) -> Tensor:
        kind = self.config.problem_type
        if kind is None:
            if self.num_labels == 1:
                kind = "regression"
            elif labels.dtype in (torch.int64, torch.int32):
                kind = "single_label_classification"
            else:
                kind = "multi_label_classification"
            if not torch.compiler.is_compiling():
                self._replace_config(problem_type=kind)
        n_seqs = logits.shape[0]
        if kind == "single_label_classification":
            labels = checked_labels(labels, (n_seqs,), self.num_labels)
            return cross_entropy(logits, labels, num_items)
        shape = (n_seqs, self.num_labels)
        if tuple(labels.shape) not in (shape, shape[: 1 if self.num_labels == 1 else 2]):
            raise ValueError(f"labels must be {shape} for {kind}, got {tuple(labels.shape)}")
        logits = wide(logits)
        labels = labels.reshape(shape).to(logits.dtype)
        function = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
        if num_items is None:
            return function(logits, labels)
        return function(logits, labels, reduction="sum") / num_items


class BertForMultipleChoice(Headed):
    """Which of several sequences."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.dropout = self._classifier_dropout()
        self.classifier = nn.Linear(config.hidden_size, 1)
        self._start()

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        num_choices: int | None = None,
        num_items_in_batch: Items = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput | tuple[Any, ...]:
        """Inputs: (n, num_choices, length), inputs_embeds with hidden behind; or a PackedBatch of
        n * num_choices sequences, choices of one question next to each other, with num_choices
        given where labels do not tell it. labels: (n,), the number of the right choice.
        """
        given: Any = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        if not isinstance(input_ids, PackedBatch):
            for name, x in zip(_PADDED, given, strict=True):
                shape = "(n, num_choices, length)"
                if name == "inputs_embeds":
                    shape = "(n, num_choices, length, hidden)"
                if x is not None and x.dim() != shape.count(",") + 1:
                    raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")
            first = input_ids if input_ids is not None else inputs_embeds
            num_choices = None if first is None else first.shape[1]
            given = tuple(None if x is None else x.flatten(0, 1) for x in given)
        elif num_choices is None:
            if labels is None:
                raise ValueError("a PackedBatch without labels needs num_choices, got None")
            num_choices = len(input_ids) // max(labels.shape[0], 1)
        inputs, out = self._encode(given, kwargs)
        if not num_choices or inputs.n_seqs % num_choices:
            raise ValueError(
                f"the number of sequences must be a multiple of num_choices = {num_choices}, "
                f"got {inputs.n_seqs}"
            )
        logits = self.classifier(self.dropout(out.pooler_output)).view(-1, num_choices)
        loss = None
        if labels is not None:
            labels = checked_labels(labels, (logits.shape[0],), num_choices)
            loss = cross_entropy(logits, labels, num_items_in_batch)
        return self._returned(
            MultipleChoiceModelOutput(loss, logits, out.hidden_states, out.attentions), kwargs
        )


class BertForTokenClassification(Headed):
    """A label for each token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.dropout = self._classifier_dropout()
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self._start()

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        num_items_in_batch: Items = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple[Any, ...]:
        """labels: of tokens, from 0 to num_labels - 1, -100 where there is none."""
        given = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        inputs, out = self._encode(given, kwargs)
        logits, loss = self.classifier(self.dropout(out.last_hidden_state)), None
        if labels is not None:
            labels = token_labels(labels, inputs, self.num_labels)
            loss = cross_entropy(logits, labels, num_items_in_batch)
        return self._returned(
            TokenClassifierOutput(loss, inputs.restore(logits), out.hidden_states, out.attentions),
            kwargs,
        )


class BertForQuestionAnswering(Headed):
    """Where an answer starts and ends."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        if self.num_labels != 2:
            raise ValueError(f"num_labels must be 2, a start and an end, got {self.num_labels}")
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self._start()

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        num_items_in_batch: Items = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """start_positions, end_positions: (n_seqs,), columns of the padded batch or, packed,
        counted from a sequence's first token. The loss is the mean of both cross entropies over
        the real tokens: padding is no candidate, as it is in transformers, whose loss is the same
        where there is none. Positions that are no real token do not count; below 0 is 0.
        """
        given = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        inputs, out = self._encode(given, kwargs)
        logits = self.qa_outputs(out.last_hidden_state)
        loss = None
        if start_positions is not None and end_positions is not None:
            positions = {"start_positions": start_positions, "end_positions": end_positions}
            loss = span_loss(logits, positions, inputs, num_items_in_batch)
        start, end = logits.unbind(1)
        return self._returned(
            QuestionAnsweringModelOutput(
                loss,
                inputs.restore(start.contiguous()),
                inputs.restore(end.contiguous()),
                out.hidden_states,
                out.attentions,
            ),
            kwargs,
        )
