"""BERT that writes: tokens see those before them, another text, and what a cache has kept.

Without a cache everything is packed, as in the encoder. With one, or where the weights of attention
are asked for, sequences are rows with padding in plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbert.config import BertConfig
from fastbert.inputs import EncoderInputs
from fastbert.kernels._triton import on_kernel_device
from fastbert.kernels.attention import Schedule, attention, schedule
from fastbert.layers import BertAttention, BertIntermediate, BertOutput, BertSelfAttention
from fastbert.packing import PackedBatch

Pair = tuple[Tensor, Tensor]  # keys and values


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of the tokens so far, which the next ones see; a forward returns a new one.

    layers: for each layer keys and values, (n_seqs, n_heads, length, head_dim). mask: (n_seqs,
    length) bool, False at padding. source, source_mask: the same of the encoder's states; empty and
    None where there are none.
    """

    layers: tuple[Pair, ...]
    mask: Tensor
    source: tuple[Pair, ...] = ()
    source_mask: Tensor | None = None

    def get_seq_length(self) -> int:
        """Columns so far, padding included."""
        return self.mask.shape[1]

    def select(self, rows: Tensor) -> KeyValueCache:
        """Of these sequences, (n,) int64, in this order: what a beam search goes on with."""

        def pick(pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
            return tuple((k.index_select(0, rows), v.index_select(0, rows)) for k, v in pairs)

        source_mask = self.source_mask
        return KeyValueCache(
            pick(self.layers),
            self.mask.index_select(0, rows),
            pick(self.source),
            None if source_mask is None else source_mask.index_select(0, rows),
        )


def after(
    past: KeyValueCache,
    input_ids: Any,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
) -> tuple[EncoderInputs, Tensor]:
    """Inputs that follow those in a cache, and (n_seqs, past + new) bool: what is real of both."""
    if not isinstance(past, KeyValueCache):
        raise ValueError(
            f"past_key_values must be what a forward returned, got {type(past).__name__}"
        )
    given = input_ids if inputs_embeds is None else inputs_embeds
    n_seqs, n_past = past.mask.shape
    if not isinstance(given, Tensor) or given.dim() < 2:
        raise ValueError("past_key_values want padded input, (n_seqs, length), beside them")
    shape = given.shape[:2]
    if shape[0] != n_seqs:
        raise ValueError(f"past_key_values are of {n_seqs} sequences, the input is of {shape[0]}")
    if attention_mask is None:
        real = torch.cat([past.mask, past.mask.new_ones(shape)], 1)
    elif tuple(attention_mask.shape) == (n_seqs, n_past + shape[1]):
        real = attention_mask != 0
    else:
        raise ValueError(
            f"attention_mask must be of all tokens, {(n_seqs, n_past + shape[1])} with the "
            f"{n_past} of past_key_values, got {tuple(attention_mask.shape)}"
        )
    if position_ids is None:
        position_ids = torch.arange(n_past, n_past + shape[1], device=given.device)[None]
    of_new = None if attention_mask is None else real[:, n_past:]
    given = (input_ids, of_new, token_type_ids, position_ids, inputs_embeds)
    return EncoderInputs.of_padded(*given), real


def source_of(states: Any, mask: Any, n_seqs: int, hidden: int) -> EncoderInputs:
    """The encoder's states as packed vectors.

    states: (n_seqs, source_length, hidden) and a mask or None, or (n_keys, hidden) and the
    PackedBatch they are of.
    """
    wanted = (
        f"({n_seqs}, source_length, {hidden}), or (n_tokens, {hidden}) with the PackedBatch of "
        f"{n_seqs} sequences that they are of as encoder_attention_mask"
    )
    if isinstance(mask, PackedBatch):
        if tuple(states.shape) == (mask.input_ids.shape[0], hidden) and len(mask) == n_seqs:
            return replace(EncoderInputs.of_packed(mask), input_ids=None, inputs_embeds=states)
    elif states.dim() == 3 and states.shape[0] == n_seqs and states.shape[2] == hidden:
        if mask is None or tuple(mask.shape) == tuple(states.shape[:2]):
            return EncoderInputs.of_padded(None, mask, None, None, states)
        raise ValueError(
            f"encoder_attention_mask must be {tuple(states.shape[:2])}, got {tuple(mask.shape)}"
        )
    raise ValueError(f"encoder_hidden_states must be {wanted}, got {tuple(states.shape)}")


@dataclass(frozen=True)
class _Packed:
    """Queries, keys and values as packed tokens, (n_tokens, n_heads, head_dim)."""

    cu_seqlens: Tensor
    max_seqlen: int
    cu_seqlens_k: Tensor | None  # None: the queries' own text, of which they see what came before
    max_seqlen_k: int | None
    tiles: Schedule | None

    @classmethod
    def of(cls, x: Tensor, inputs: EncoderInputs, source: EncoderInputs | None) -> _Packed:
        bounds, longest = inputs.cu_seqlens, inputs.max_seqlen
        bounds_k = None if source is None else source.cu_seqlens
        longest_k = None if source is None else source.max_seqlen
        tiles = None
        if on_kernel_device(x):
            tiles = schedule(
                bounds, longest, x.shape[0],
                cu_seqlens_k=bounds_k, max_seqlen_k=longest_k,
                n_keys=None if source is None else source.n_tokens,
            )  # fmt: skip
        return cls(bounds, longest, bounds_k, longest_k, tiles)

    def keys(self, x: Tensor) -> Tensor:
        return x

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, weights: list[Tensor] | None
    ) -> Tensor:
        return attention(
            q, k, v, self.cu_seqlens, self.max_seqlen,
            causal=self.cu_seqlens_k is None, dropout_p=dropout_p,
            cu_seqlens_k=self.cu_seqlens_k, max_seqlen_k=self.max_seqlen_k, schedule=self.tiles,
        )  # fmt: skip


@dataclass(frozen=True)
class _Padded:
    """Queries as rows laid end to end, keys and values (n_seqs, n_heads, length, head_dim)."""

    mask: Tensor  # (n_seqs, 1, length, key_length) bool, True where a key is seen

    @classmethod
    def of(cls, real: Tensor, key_mask: Tensor, causal: bool) -> _Padded:
        """real, key_mask: (n_seqs, length) and (n_seqs, key_length), False at padding."""
        mask = real[:, None, :, None] & key_mask[:, None, None]
        n_before = key_mask.shape[1] - real.shape[1]
        return cls(mask & torch.ones_like(mask[:1]).tril(n_before) if causal else mask)

    def keys(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.mask.shape[0], -1)).transpose(1, 2)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, weights: list[Tensor] | None
    ) -> Tensor:
        q = self.keys(q)
        is_blind = ~self.mask.any(-1, keepdim=True)  # no key is seen: zeros, as where it is packed
        mask = self.mask | is_blind
        if weights is None:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p)
        else:
            scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
            shares = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            shares = F.dropout(shares.masked_fill(is_blind, 0), dropout_p)
            weights.append(shares)
            out = shares @ v
        return out.masked_fill(is_blind, 0).transpose(1, 2).flatten(0, 1)


@dataclass
class Record:
    """What a pass leaves behind beside its result; a list that is None is not filled."""

    states: list[Tensor] | None = None
    weights: list[Tensor] | None = None
    cross_weights: list[Tensor] | None = None
    kept: list[Pair] | None = None
    kept_source: list[Pair] = field(default_factory=list)


class DecoderSelfAttention(BertSelfAttention):
    """Attention to the tokens before, or, as `crossattention.self`, to another text."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        states: Tensor | None,
        sight: _Packed | _Padded,
        past: Pair | None,
        weights: list[Tensor] | None,
    ) -> tuple[Tensor, Pair]:
        """(n_tokens, hidden) to the same, and the keys and values seen. states: what to make keys
        of, those in `past` beside; None: only those."""
        heads = (self.num_attention_heads, self.attention_head_size)
        if states is not None:
            made = (linear(states).unflatten(-1, heads) for linear in (self.key, self.value))
            k, v = map(sight.keys, made)
            if past is not None:
                k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        else:
            assert past is not None
            k, v = past
        dropout_p = self.dropout.p if self.dropout.training else 0.0
        q = self.query(x).unflatten(-1, heads)
        return sight.attend(q, k, v, dropout_p, weights).flatten(1), (k, v)


class DecoderAttention(BertAttention):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.self = DecoderSelfAttention(config)

    def forward(self, x: Tensor, *args: Any) -> tuple[Tensor, Pair]:  # type: ignore[override]
        mixed, kept = self.self(x, *args)
        return self.output(mixed, x), kept


class DecoderLayer(nn.Module):
    """One layer of a decoder, with attention to another text where `add_cross_attention`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = DecoderAttention(config)
        if config.add_cross_attention:
            self.crossattention = DecoderAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)

    def forward(
        self,
        x: Tensor,
        source: Tensor | None,
        sight: _Packed | _Padded,
        cross_sight: _Packed | _Padded | None,
        past: Pair | None,
        past_source: Pair | None,
        record: Record,
    ) -> Tensor:
        x, kept = self.attention(x, x, sight, past, record.weights)
        if record.kept is not None:
            record.kept.append(kept)
        if cross_sight is not None:
            x, kept = self.crossattention(x, source, cross_sight, past_source, record.cross_weights)
            if record.kept is not None:
                record.kept_source.append(kept)
        return self.output(self.intermediate(x), x)


class BertDecoder(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.has_cross_attention = config.add_cross_attention
        self.gradient_checkpointing = False
        self.checkpoint_options: dict[str, Any] = {"use_reentrant": False}

    def forward(
        self,
        x: Tensor,
        inputs: EncoderInputs,
        source: EncoderInputs | None,
        past: KeyValueCache | None,
        key_mask: Tensor | None,
        record: Record,
    ) -> tuple[Tensor, KeyValueCache | None]:
        """(n_tokens, hidden) of `inputs` to the same, and a cache where `record.kept` is a list.

        key_mask: with `past`, (n_seqs, past + new) bool, whose end is the mask of `inputs`.
        """
        if source is not None and not self.has_cross_attention:
            raise ValueError("encoder_hidden_states need config.add_cross_attention, got False")
        states = None if source is None else source.inputs_embeds
        source_mask = None
        as_rows = past is not None or record.weights is not None
        if as_rows or record.kept is not None:
            real = inputs.real()
            key_mask = real if key_mask is None else key_mask
            source_mask = None if source is None else source.real()
        if past is not None and past.source:
            source, states, source_mask = None, None, past.source_mask

        sight: _Packed | _Padded
        cross_sight: _Packed | _Padded | None = None
        if as_rows:
            assert key_mask is not None
            x = inputs.to_rows(x).flatten(0, 1)
            sight = _Padded.of(real, key_mask, causal=True)
            if source_mask is not None:
                cross_sight = _Padded.of(real, source_mask, causal=False)
            if source is not None and states is not None:
                states = source.to_rows(states).flatten(0, 1)
        else:
            sight = _Packed.of(x, inputs, None)
            if source is not None:
                cross_sight = _Packed.of(x, inputs, source)

        checkpointed = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for i, layer in enumerate(self.layer):
            if record.states is not None:
                record.states.append(inputs.from_rows(x) if as_rows else x)
            kept = past.layers[i] if past is not None else None
            kept_source = past.source[i] if past is not None and past.source else None
            args = (x, states, sight, cross_sight, kept, kept_source, record)
            x = (
                checkpoint(layer, *args, **self.checkpoint_options)
                if checkpointed
                else layer(*args)
            )
        if as_rows:
            x = inputs.from_rows(x)
        if record.states is not None:
            record.states.append(x)
        if record.kept is None or key_mask is None:
            return x, None

        def rows(pairs: list[Pair], inputs: EncoderInputs | None) -> tuple[Pair, ...]:
            if as_rows or inputs is None:
                return tuple(pairs)
            return tuple(
                (inputs.to_rows(k).transpose(1, 2), inputs.to_rows(v).transpose(1, 2))
                for k, v in pairs
            )

        return x, KeyValueCache(
            rows(record.kept, inputs), key_mask, rows(record.kept_source, source), source_mask
        )
