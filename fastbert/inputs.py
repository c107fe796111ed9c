"""A forward's arguments on their way in and results on their way out: padding stops here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from fastbert.kernels.pooling import pool
from fastbert.packing import PackedBatch, pack_indices


@dataclass(frozen=True)
class EncoderInputs:
    """Packed inputs, and how their tokens came to be where they are."""

    input_ids: Tensor | None  # (n_tokens,)
    token_type_ids: Tensor
    position_ids: Tensor
    inputs_embeds: Tensor | None  # (n_tokens, hidden)
    cu_seqlens: Tensor
    max_seqlen: int
    padded_shape: tuple[int, int] | None = None  # (n_seqs, length), None when packed was given
    index: Tensor | None = None  # (n_tokens,) where each token was; None: where it is
    order: Tensor | None = None  # (n_seqs,) the sequences' numbers; None: as given
    starts: bool = True  # whether the first column of every row is a token

    @classmethod
    def of(
        cls,
        input_ids: Tensor | PackedBatch | EncoderInputs | None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> EncoderInputs:
        """Of the arguments of a model's forward: padded, packed, or these inputs themselves."""
        others = (attention_mask, token_type_ids, position_ids, inputs_embeds)
        if not isinstance(input_ids, (PackedBatch, EncoderInputs)):
            return cls.of_padded(input_ids, *others)
        if any(x is not None for x in others):
            raise ValueError("a PackedBatch holds ids, types, positions: give nothing beside it")
        return input_ids if isinstance(input_ids, EncoderInputs) else cls.of_packed(input_ids)

    @classmethod
    def of_packed(cls, batch: PackedBatch) -> EncoderInputs:
        return cls(
            batch.input_ids,
            batch.token_type_ids,
            batch.position_ids,
            None,
            batch.cu_seqlens,
            batch.max_seqlen,
        )

    @classmethod
    def of_padded(
        cls,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> EncoderInputs:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        given = input_ids if inputs_embeds is None else inputs_embeds
        name, wanted, dim = (
            ("input_ids", "(n_seqs, length)", 2)
            if inputs_embeds is None
            else ("inputs_embeds", "(n_seqs, length, hidden)", 3)
        )
        if not isinstance(given, Tensor):
            raise ValueError(f"{name} must be a tensor {wanted}, got {type(given).__name__}")
        if given.dim() != dim:
            raise ValueError(f"{name} must be {wanted}, got {tuple(given.shape)}")
        if dim == 2 and given.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be int64 or int32, got {given.dtype}")
        shape, device = (given.shape[0], given.shape[1]), given.device
        columns = torch.arange(shape[1], device=device)
        if position_ids is None:
            position_ids = columns.expand(shape)
        elif tuple(position_ids.shape) not in (shape, (1, shape[1])):
            raise ValueError(f"position_ids must be {shape} or (1, {shape[1]}), "
                             f"got {tuple(position_ids.shape)}")  # fmt: skip
        if token_type_ids is None:
            token_type_ids = torch.zeros(shape, dtype=torch.int64, device=device)
        elif tuple(token_type_ids.shape) != shape:
            raise ValueError(f"token_type_ids must be {shape}, got {tuple(token_type_ids.shape)}")

        index, starts = None, True
        if attention_mask is None:
            cu_seqlens = torch.arange(shape[0] + 1, dtype=torch.int32, device=device) * shape[1]
            max_seqlen = shape[1]
        else:
            if attention_mask.dim() != 2:
                raise ValueError(
                    f"attention_mask must be {shape}, got {tuple(attention_mask.shape)}"
                )
            index, cu_seqlens, max_seqlen, starts = pack_indices(attention_mask, shape)
            if index.numel() == shape[0] * shape[1]:
                index = None  # nothing is padding
        inputs = cls(
            None if input_ids is None else input_ids.flatten(),
            token_type_ids.flatten(),
            position_ids.expand(shape).flatten(),
            None if inputs_embeds is None else inputs_embeds.flatten(0, 1),
            cu_seqlens,
            max_seqlen,
            shape,
            starts=starts,
        )
        return inputs if index is None else inputs._pick(index)

    def with_bounds(self, cu_seqlens: Tensor, max_seqlen: int) -> EncoderInputs:
        """The same tokens, which are these sequences: of rows that were packed by the caller."""
        return replace(self, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)

    def by_length(self) -> EncoderInputs:
        """The same with the sequences sorted by length, on a CPU, where equal ones run as one."""
        if self.cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
            return self
        lengths = self.cu_seqlens.diff()
        steps = lengths.diff()
        if (steps >= 0).all() or (steps <= 0).all():
            return self
        order = torch.argsort(lengths, stable=True)
        lengths = lengths[order]
        cu_seqlens = torch.zeros_like(self.cu_seqlens)
        torch.cumsum(lengths, 0, dtype=torch.int32, out=cu_seqlens[1:])
        shift = torch.repeat_interleave(self.cu_seqlens[order] - cu_seqlens[:-1], lengths)
        token_order = torch.arange(shift.numel()) + shift
        return replace(self._pick(token_order), cu_seqlens=cu_seqlens, order=order)

    def _pick(self, index: Tensor) -> EncoderInputs:
        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.index_select(0, index)

        return replace(
            self,
            input_ids=pick(self.input_ids),
            token_type_ids=self.token_type_ids.index_select(0, index),
            position_ids=self.position_ids.index_select(0, index),
            inputs_embeds=pick(self.inputs_embeds),
            index=index if self.index is None else self.index[index],
        )

    def first_tokens(self, x: Tensor) -> Tensor:
        """(n_tokens, hidden) to (n_seqs, hidden): the first token of each sequence as given."""
        first = pool(x, self.cu_seqlens, "cls")
        if self.order is None:
            return first
        return torch.empty_like(first).index_copy_(0, self.order, first)

    @property
    def n_seqs(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def n_tokens(self) -> int:
        return self.position_ids.shape[0]

    @property
    def given_shape(self) -> tuple[int, ...]:
        """Of the ids as given: (n_seqs, length), or (n_tokens,) when they were packed."""
        return self.padded_shape or (self.n_tokens,)

    def pick(self, values: Tensor) -> Tensor:
        """Values for each token as given, (n_seqs, length, ...) or (n_tokens, ...), to those of
        `input_ids`. What stands at padding is not read."""
        if self.padded_shape is not None:
            values = values.flatten(0, 1)
        return values if self.index is None else values.index_select(0, self.index)

    def to_rows(self, x: Tensor) -> Tensor:
        """(n_tokens, ...) to (n_seqs, length, ...), zeros at padding, on the right when packed."""
        places, shape = self._places()
        if places is not None:
            out = x.new_zeros(shape[0] * shape[1], *x.shape[1:])
            x = out.index_copy_(0, places, x)
        return x.unflatten(0, shape)

    def from_rows(self, x: Tensor) -> Tensor:
        """(n_seqs * length, ...), the rows of `to_rows` end to end, to (n_tokens, ...)."""
        places, _ = self._places()
        return x if places is None else x.index_select(0, places)

    def real(self) -> Tensor:
        """(n_seqs, length) bool: where `to_rows` puts tokens."""
        return self.to_rows(torch.ones_like(self.position_ids, dtype=torch.bool))

    def _places(self) -> tuple[Tensor | None, tuple[int, int]]:
        """(n_tokens,) where tokens are in rows of length, None where they are; n_seqs, length."""
        if self.padded_shape is not None:
            return self.index, self.padded_shape
        lengths = self.cu_seqlens.diff()
        if self.order is not None:
            lengths = torch.empty_like(lengths).index_copy_(0, self.order, lengths)
        tokens = torch.arange(self.n_tokens, device=lengths.device)
        rows = torch.arange(self.n_seqs, device=lengths.device)
        rows = rows.repeat_interleave(lengths, output_size=self.n_tokens)
        starts = lengths.cumsum(0) - lengths
        places = rows * self.max_seqlen + tokens - starts[rows]
        places = places if self.index is None else places[self.index]
        return places, (self.n_seqs, self.max_seqlen)

    def restore(self, x: Tensor) -> Tensor:
        """(n_tokens, ...) to the order and shape that was given, zeros at padding."""
        if self.padded_shape is None:
            return x if self.index is None else torch.empty_like(x).index_copy_(0, self.index, x)
        if self.index is not None:
            n_seqs, length = self.padded_shape
            x = x.new_zeros(n_seqs * length, *x.shape[1:]).index_copy_(0, self.index, x)
        return x.unflatten(0, self.padded_shape)

    def restore_weights(self, weights: Tensor) -> Tensor:
        """Attention weights, (n_seqs, n_heads, max, max), to the columns that was given."""
        if self.padded_shape is None or self.index is None:
            return weights
        n_seqs, length = self.padded_shape
        out = weights.new_zeros(n_seqs, weights.shape[1], length, length)
        bounds = self.cu_seqlens.tolist()
        for row, (start, stop) in enumerate(pairwise(bounds)):
            columns = self.index[start:stop] - row * length
            n = stop - start
            out[row][:, columns[:, None], columns[None]] = weights[row, :, :n, :n]
        return out
