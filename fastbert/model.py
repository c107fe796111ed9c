"""BertModel: padded or packed token ids in, token vectors out, no work on padding between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbert.config import BertConfig
from fastbert.decoder import BertDecoder, KeyValueCache, Record, after, source_of
from fastbert.graphs import Graphs
from fastbert.inputs import EncoderInputs
from fastbert.layers import BertEmbeddings, BertEncoder, BertPooler
from fastbert.outputs import BaseModelOutputWithPooling
from fastbert.packing import PackedBatch
from fastbert.pretrained import BertPreTrainedModel


class BertModel(BertPreTrainedModel):
    """The encoder (Devlin et al. 2019); names, results and weights are transformers' BertModel's.

    config: with `is_decoder` a token sees only those before it, and with `add_cross_attention`
    another text, too; refused with ValueError where only the latter is set. add_pooling_layer:
    False leaves out the dense layer on the first token, and `pooler_output` is None. cuda_graphs:
    inference of an encoder on a GPU with at most so many tokens is launched as a CUDA graph,
    captured when a shape of batch comes back. True: up to 4,096; False: never.
    `model.cuda_graphs = False` does it later and gives the graphs' memory back.
    """

    def __init__(
        self, config: BertConfig, add_pooling_layer: bool = True, *, cuda_graphs: bool | int = True
    ) -> None:
        super().__init__(config)
        if config.add_cross_attention and not config.is_decoder:
            raise ValueError("add_cross_attention needs is_decoder=True, got False")
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertDecoder(config) if config.is_decoder else BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.cuda_graphs = cuda_graphs
        self.apply(self._init_weights)

    @property
    def cuda_graphs(self) -> int:
        """Most tokens of a forward that is launched as a CUDA graph; 0: none is."""
        return self._graphs.most_tokens

    @cuda_graphs.setter
    def cuda_graphs(self, most_tokens: bool | int) -> None:
        before, self._graphs = self.__dict__.get("_graphs"), Graphs(most_tokens)
        if before is not None:
            before.clear()

    def train(self, mode: bool = True) -> BertModel:
        self._graphs.clear()  # as the layers' plans, which graphs may read
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> BertModel:
        self._graphs.clear()  # they keep the memory of weights that move
        return super()._apply(fn, recurse)

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | PackedBatch | None = None,
        past_key_values: KeyValueCache | None = None,
        use_cache: bool | None = None,
        *,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Encode a batch.

        input_ids: (n_seqs, length) int64 or int32, or a PackedBatch, which holds all the rest.
        attention_mask: (n_seqs, length), zero at padding, all ones when None. token_type_ids: as
        input_ids, zeros when None. position_ids: (n_seqs, length) or (1, length), column numbers
        when None. inputs_embeds: (n_seqs, length, hidden) in place of input_ids.
        output_hidden_states, output_attentions, return_dict: as the configuration says when None.

        Of a decoder only: encoder_hidden_states: (n_seqs, source_length, hidden), and
        encoder_attention_mask its mask; or (n_tokens, hidden), and there the PackedBatch they are
        of. past_key_values: what a forward before returned; input_ids are then the tokens after
        those, attention_mask is of all of them (None: the new ones are real), and position_ids
        count on. use_cache: whether to return the next cache; None: as the configuration says, for
        padded input, in evaluation.

        Returns last_hidden_state and pooler_output as BaseModelOutputWithPooling describes, zeros
        at padding; a tuple with return_dict=False. The pooler reads a sequence's first real token.
        Other keyword arguments are taken and not read, as in transformers. Raises ValueError on ids
        outside the vocabulary (on a CPU, where looking is free), too long sequences, and shapes
        that do not fit.
        """
        if kwargs.get("cu_seq_lens_q") is not None:
            raise ValueError("BertModel wants a PackedBatch in place of cu_seq_lens_q")
        of_decoder = {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "past_key_values": past_key_values,
        }
        for name, value in of_decoder.items():
            if value is not None and not self.config.is_decoder:
                raise ValueError(f"{name} must be None without config.is_decoder, got a value")
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        key_mask = None
        if past_key_values is None:
            inputs = EncoderInputs.of(*given)
        else:
            inputs, key_mask = after(past_key_values, *given)
        of_head = inputs is input_ids  # whose own business it is to put padding back
        self._check_range(inputs)

        config = self.config
        want_states = _or(output_hidden_states, config.output_hidden_states)
        want_weights = _or(output_attentions, config.output_attentions)
        states: list[Tensor] | None = [] if want_states else None
        weights: list[Tensor] | None = [] if want_weights else None
        crossed: list[Tensor] | None = None
        cache = None
        if config.is_decoder:
            source = None
            if encoder_hidden_states is not None:
                source = source_of(
                    encoder_hidden_states, encoder_attention_mask, inputs.n_seqs, config.hidden_size
                )
            crossed = None if weights is None else []
            record = Record(states, weights, crossed)
            if self._keeps(use_cache, inputs):
                record.kept = []
            x, cache = self.encoder(
                self._embed(inputs), inputs, source, past_key_values, key_mask, record
            )
            pooled = None if self.pooler is None else self.pooler(inputs.first_tokens(x))
        else:
            found = None
            if states is None and weights is None:
                found = self._graphs.run(self, inputs)
                inputs = inputs if found or of_head else inputs.by_length()
            x, pooled = found or self._encode(inputs, states, weights)
            if weights is not None:
                weights = [inputs.restore_weights(w) for w in weights]
        out = BaseModelOutputWithPooling(
            x if of_head else inputs.restore(x),
            pooled,
            hidden_states=None if states is None else tuple(map(inputs.restore, states)),
            past_key_values=cache,
            attentions=None if weights is None else tuple(weights),
            cross_attentions=None if crossed is None else tuple(crossed),
        )
        return out if _or(return_dict, config.return_dict) else out.to_tuple()

    def _encode(
        self,
        inputs: EncoderInputs,
        states: list[Tensor] | None = None,
        weights: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(n_tokens, hidden), and what the pooler makes of the first tokens."""
        x = self._embed(inputs)
        x = self.encoder(x, inputs.cu_seqlens, inputs.max_seqlen, states, weights)
        return x, None if self.pooler is None else self.pooler(inputs.first_tokens(x))

    def _embed(self, inputs: EncoderInputs) -> Tensor:
        return self.embeddings(
            inputs.input_ids, inputs.token_type_ids, inputs.position_ids, inputs.inputs_embeds
        )

    def _keeps(self, use_cache: bool | None, inputs: EncoderInputs) -> bool:
        """Whether a decoder's forward returns a cache."""
        if self.training and self.is_gradient_checkpointing:
            return False
        if inputs.padded_shape is None:
            if use_cache:
                raise ValueError("use_cache=True wants padded input, got packed")
            return False
        return _or(use_cache, self.config.use_cache and not self.training)

    def _check_range(self, inputs: EncoderInputs) -> None:
        if torch.compiler.is_compiling():
            return
        config = self.config
        limits = (
            ("input_ids", inputs.input_ids, config.vocab_size, "vocab_size"),
            ("token_type_ids", inputs.token_type_ids, config.type_vocab_size, "type_vocab_size"),
            (
                "position_ids",
                inputs.position_ids,
                config.max_position_embeddings,
                "max_position_embeddings",
            ),
        )
        for name, ids, size, limit in limits:
            if ids is None or ids.device.type != "cpu" or ids.numel() == 0:
                continue
            low, high = (int(x) for x in ids.aminmax())
            if low < 0 or high >= size:
                raise ValueError(
                    f"{name} must be from 0 to {size - 1} ({limit} is {size}), "
                    f"got {low if low < 0 else high}"
                )


def _or(given: bool | None, default: bool) -> bool:
    return default if given is None else given
