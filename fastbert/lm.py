"""Heads that score every token of the vocabulary: masked, pretraining, and causal models."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastbert.config import BertConfig
from fastbert.decoder import KeyValueCache
from fastbert.heads import Headed
from fastbert.inputs import EncoderInputs
from fastbert.kernels.cross_entropy import linear_cross_entropy
from fastbert.layers import BertIntermediate, LayerNorm
from fastbert.losses import IGNORED, Items, checked_labels, cross_entropy, token_labels
from fastbert.outputs import (
    BertForPreTrainingOutput,
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
)
from fastbert.packing import PackedBatch
from fastbert.watch import is_plain


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


class BertPreTrainingHeads(BertOnlyMLMHead):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class _WithVocabulary(Headed):
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

    cls: BertPreTrainingHeads

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.cls = BertPreTrainingHeads(config)
        self._start()

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
        self.cls = BertOnlyMLMHead(config)
        self._start()

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


class BertLMHeadModel(_WithVocabulary):
    """The next token (`config.is_decoder`), of a text alone or after another one
    (`config.add_cross_attention`). Without is_decoder tokens see both sides, as in transformers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        if not config.is_decoder:
            warnings.warn(
                "BertLMHeadModel sees only what came before with is_decoder=True, got False",
                stacklevel=2,
            )
        self.cls = BertOnlyMLMHead(config)
        self._start()

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | PackedBatch | None = None,
        labels: Tensor | None = None,
        past_key_values: KeyValueCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        output_logits: bool | None = None,
        num_items_in_batch: Items = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithCrossAttentions | tuple[Any, ...]:
        """labels: of tokens, the tokens themselves, -100 where there is none: each token is scored
        for the label of the one after it, padding left out, so that the first label of a sequence
        is not read. output_logits: as in BertForMaskedLM. logits_to_keep:
        logits of so many last columns only, or, a (n,) tensor, of these columns; 0: of all; others
        want padded input. The rest is BertModel's, which see.
        """
        given = input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        options = {
            **kwargs,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "use_cache": False if labels is not None else use_cache,
        }
        if past_key_values is None:
            inputs, out = self._encode(given, options)
            x = out.last_hidden_state
        else:
            options |= {"past_key_values": past_key_values, "return_dict": True}
            out = self.bert(*given, **options)
            n_new = out.last_hidden_state.shape[1]
            mask = None if attention_mask is None else attention_mask[:, -n_new:]
            inputs = EncoderInputs.of(input_ids, mask, inputs_embeds=inputs_embeds)
            x = inputs.from_rows(out.last_hidden_state.flatten(0, 1))
        assert x is not None
        loss = None
        if labels is not None:
            picked = _shifted(token_labels(labels, inputs), inputs.cu_seqlens)
            loss = self.cls.predictions.loss(x, picked, num_items_in_batch)
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if keeps_all or output_logits is False:
            logits = self._logits(inputs, x, labels is not None, output_logits, kwargs)
        else:
            logits = self._logits_of(inputs, x, logits_to_keep)
        return self._returned(
            CausalLMOutputWithCrossAttentions(
                loss,
                logits,
                out.past_key_values,
                out.hidden_states,
                out.attentions,
                out.cross_attentions,
            ),
            kwargs,
        )

    def _logits_of(self, inputs: EncoderInputs, x: Tensor, columns: int | Tensor) -> Tensor:
        if inputs.padded_shape is None:
            raise ValueError("logits_to_keep wants padded input, got packed")
        chosen = slice(-columns, None) if isinstance(columns, int) else columns
        rows = inputs.to_rows(x)[:, chosen]
        logits = self.cls(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        return logits.masked_fill(~inputs.real()[:, chosen, None], 0)


def _shifted(labels: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(n_tokens,): each token's label is that of the next one of its sequence, if there is one."""
    if labels.numel() == 0:
        return labels
    ends = (cu_seqlens[1:].long() - 1) % labels.shape[0]  # an empty first one's: the last token
    return labels.roll(-1).index_fill(0, ends, IGNORED)
