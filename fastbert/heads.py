"""Heads on the encoder: transformers' classes, without padding from the ids to the loss.

All take what BertModel takes, padded or a PackedBatch, and labels in the same form: of tokens
(n_seqs, length), or (n_tokens,) when packed; of sequences (n_seqs,). Logits of tokens are zeros at
padding, and labels there are not read. Losses are transformers'. `num_items_in_batch`: the labels
in all batches that make one step; a loss is then its sum over this batch divided by that, so that
gradients of small batches add up to those of one large batch. Losses of half precision are float32.
Models that embed these call `bert` with packed tokens, which is what its hooks see.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.config import BertConfig
from fastbert.inputs import EncoderInputs
from fastbert.kernels.cross_entropy import linear_cross_entropy
from fastbert.layers import BertIntermediate, LayerNorm
from fastbert.losses import (
    IGNORED,
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
    BertForPreTrainingOutput,
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from fastbert.packing import PackedBatch
from fastbert.pretrained import BertPreTrainedModel
from fastbert.watch import is_plain

_PADDED = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")


class BertPredictionHeadTransform(BertIntermediate):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(config.replace(intermediate_size=config.hidden_size))
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(super().forward(x))


class BertLMPredictionHead(nn.Module):
    """A score for each token of the vocabulary."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))  # the decoder's, when tied

    def forward(self, x: Tensor) -> Tensor:
        """(n_tokens, hidden) to (n_tokens, vocab_size)."""
        return self.decoder(self.transform(x))

    def loss(self, x: Tensor, labels: Tensor, num_items: Items) -> Tensor:
        """Cross entropy of (n_tokens,) labels; the product is made only where there are any."""
        x, decoder = self.transform(x), self.decoder
        if not is_plain(decoder, nn.Linear):
            labelled = (labels != IGNORED).nonzero().squeeze(1)
            return cross_entropy(decoder(x[labelled]), labels[labelled], num_items)
        reduction = "mean" if num_items is None else "sum"
        loss, *_ = linear_cross_entropy(
            x, decoder.weight, decoder.bias, labels, IGNORED, reduction=reduction
        )
        return loss if num_items is None else loss / num_items


class BertOnlyMLMHead(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.predictions(x)


class BertOnlyNSPHead(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.seq_relationship(pooled)


class BertPreTrainingHeads(BertOnlyMLMHead):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class _Headed(BertPreTrainedModel):
    """A BertModel under the name `bert`."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        assert config.num_labels is not None  # a configuration that is made has a number
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer)

    def _add(self, **modules: nn.Module) -> None:
        for name, module in modules.items():
            setattr(self, name, module)
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
        asked = (options.get("output_attentions"), options.get("output_hidden_states"))
        config = self.config
        if not (any(asked) or config.output_attentions or config.output_hidden_states):
            inputs = inputs.by_length()
        options = {"use_cache": False, **options, "return_dict": True}
        return inputs, self.bert(inputs, **options)

    def _returned(self, out: ModelOutput, options: dict[str, Any]) -> Any:
        return out if self._wants_names(options) else out.to_tuple()

    def _wants_names(self, options: dict[str, Any]) -> bool:
        return_dict = options.get("return_dict")
        return self.config.return_dict if return_dict is None else return_dict


class _WithVocabulary(_Headed):
    """With a BertLMPredictionHead as `cls.predictions`, whose weights are the word embeddings."""

    _tied_weights_keys: ClassVar[Mapping[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    cls: BertOnlyMLMHead

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.cls.predictions.decoder = value
        self.cls.predictions.bias = value.bias

    def _logits(
        self,
        inputs: EncoderInputs,
        x: Tensor,
        is_labelled: bool,
        output_logits: bool | None,
        options: dict[str, Any],
    ) -> Tensor | None:
        if output_logits is None:
            output_logits = not (is_labelled and self.training and self._wants_names(options))
        return inputs.restore(self.cls(x)) if output_logits else None


class BertForPreTraining(_WithVocabulary):
    """Masked language modelling, and whether the second text follows the first."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self._add(cls=BertPreTrainingHeads(config))

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        *,
        output_logits: bool | None = None,
        num_items_in_batch: Items = None,
        num_sequences_in_batch: Items = None,
        **kwargs: Any,
    ) -> BertForPreTrainingOutput | tuple[Any, ...]:
        """labels: of tokens, -100 where there is none. next_sentence_label: (n_seqs,), 0 where the
        second text follows, 1 where it does not. The loss is the sum of both; without one of them
        there is no loss, as in transformers. output_logits: as in BertForMaskedLM.
        num_items_in_batch counts `labels`, num_sequences_in_batch the sequences; without the
        latter, a batch counts for the second loss by its share of the former.
        """
        given = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        inputs, out = self._encode(given, kwargs)
        x, pooled = out.last_hidden_state, out.pooler_output
        assert x is not None and pooled is not None
        relationship = self.cls.seq_relationship(pooled)
        is_labelled = labels is not None and next_sentence_label is not None
        loss = None
        if labels is not None and next_sentence_label is not None:
            labels = token_labels(labels, inputs)
            follows = checked_labels(
                next_sentence_label, (inputs.n_seqs,), 2, "next_sentence_label"
            )
            second = cross_entropy(relationship, follows, num_sequences_in_batch)
            if num_items_in_batch is not None and num_sequences_in_batch is None:
                second = second * ((labels != IGNORED).sum() / num_items_in_batch)
            loss = self.cls.predictions.loss(x, labels, num_items_in_batch) + second
        return self._returned(
            BertForPreTrainingOutput(
                loss,
                self._logits(inputs, x, is_labelled, output_logits, kwargs),
                relationship,
                out.hidden_states,
                out.attentions,
            ),
            kwargs,
        )


class BertForMaskedLM(_WithVocabulary):
    """The token that stood where a mask stands now."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        if config.is_decoder:
            warnings.warn(
                "BertForMaskedLM sees tokens on both sides only with is_decoder=False, got True",
                stacklevel=2,
            )
        self._add(cls=BertOnlyMLMHead(config))

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        output_logits: bool | None = None,
        num_items_in_batch: Items = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """labels: of tokens, from 0 to vocab_size - 1, -100 where there is none.

        output_logits: whether to compute the logits of all tokens, which is most of the work and
        memory of this head; the loss needs only those that have labels. None: yes, except in
        training with labels, where `logits` is None (tuples, return_dict=False, always have them).
        """
        given = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        source = {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
        }
        inputs, out = self._encode(given, kwargs | source)
        x = out.last_hidden_state
        assert x is not None
        loss = None
        if labels is not None:
            picked = token_labels(labels, inputs)
            loss = self.cls.predictions.loss(x, picked, num_items_in_batch)
        logits = self._logits(inputs, x, labels is not None, output_logits, kwargs)
        return self._returned(
            MaskedLMOutput(loss, logits, out.hidden_states, out.attentions), kwargs
        )


class BertForNextSentencePrediction(_Headed):
    """Whether the second text follows the first."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self._add(cls=BertOnlyNSPHead(config))

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


class BertForSequenceClassification(_Headed):
    """A label, several labels or numbers for a sequence, as `config.problem_type` says.

    Where it is None, the first labels decide, as in transformers: "regression" with one label,
    "single_label_classification" of whole numbers, else "multi_label_classification". `config` is
    then replaced by one that says so.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self._add(
            dropout=self._classifier_dropout(),
            classifier=nn.Linear(config.hidden_size, self.num_labels),
        )

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


class BertForMultipleChoice(_Headed):
    """Which of several sequences."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self._add(dropout=self._classifier_dropout(), classifier=nn.Linear(config.hidden_size, 1))

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
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
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


class BertForTokenClassification(_Headed):
    """A label for each token."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        self._add(
            dropout=self._classifier_dropout(),
            classifier=nn.Linear(config.hidden_size, self.num_labels),
        )

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


class BertForQuestionAnswering(_Headed):
    """Where an answer starts and ends."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        if self.num_labels != 2:
            raise ValueError(f"num_labels must be 2, a start and an end, got {self.num_labels}")
        self._add(qa_outputs=nn.Linear(config.hidden_size, 2))

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
