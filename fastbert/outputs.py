"""What models return."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from fastbert.decoder import KeyValueCache


@dataclass
class ModelOutput:
    """Named results that are also a mapping and, by number, a tuple, as in transformers.

    Results that are None are left out of the mapping and the tuple.
    """

    def keys(self) -> list[str]:
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]

    def values(self) -> list[Any]:
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        return [(name, getattr(self, name)) for name in self.keys()]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name) if name in self else default

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self:
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass
class BaseModelOutputWithPooling(ModelOutput):
    """Packed input: last_hidden_state (n_tokens, hidden). Padded: (n_seqs, length, hidden).

    pooler_output: (n_seqs, hidden), None without a pooling layer. hidden_states: the embeddings and
    each layer's output, shaped as last_hidden_state. attentions: for each layer
    (n_seqs, n_heads, length, length). Of a decoder only: past_key_values, a KeyValueCache, and
    cross_attentions, (n_seqs, n_heads, length, source_length).
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    past_key_values: KeyValueCache | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


# The heads': loss and logits first, then the encoder's. Logits of tokens are shaped as
# last_hidden_state, with classes in place of hidden.


@dataclass
class BertForPreTrainingOutput(ModelOutput):
    """prediction_logits: of tokens. seq_relationship_logits: (n_seqs, 2)."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class _LogitsOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MaskedLMOutput(_LogitsOutput):
    """logits: of tokens; None in training with labels, unless asked for."""


class NextSentencePredictorOutput(_LogitsOutput):
    """logits: (n_seqs, 2)."""


class SequenceClassifierOutput(_LogitsOutput):
    """logits: (n_seqs, num_labels)."""


class TokenClassifierOutput(_LogitsOutput):
    """logits: of tokens."""


class MultipleChoiceModelOutput(_LogitsOutput):
    """logits: (n, n_choices)."""


@dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """start_logits, end_logits: (n_seqs, length) or, packed, (n_tokens,)."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutputWithCrossAttentions(ModelOutput):
    """logits: of tokens; None in training with labels, unless asked for."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KeyValueCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
