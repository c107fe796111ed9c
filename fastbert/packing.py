"""Batches without padding: all tokens in one row, and where each sequence starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Token sequences laid end to end.

    input_ids, token_type_ids, position_ids: (n_tokens,) int64 or int32. cu_seqlens: (n_seqs + 1,)
    int32; sequence i is tokens cu_seqlens[i] to cu_seqlens[i + 1]. max_seqlen: length of the
    longest sequence, a Python int, so that nothing has to wait for a GPU to learn it.

    Raises ValueError when shapes, dtypes or devices do not fit together.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    def __post_init__(self) -> None:
        for name in ("input_ids", "token_type_ids", "position_ids"):
            tensor = getattr(self, name)
            if tensor.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"{name} must be int64 or int32, got {tensor.dtype}")
            if tensor.dim() != 1 or tensor.shape != self.input_ids.shape:
                raise ValueError(
                    f"{name} must have shape (n_tokens,) = ({self.input_ids.numel()},), "
                    f"got {tuple(tensor.shape)}"
                )
        if self.cu_seqlens.dtype != torch.int32:
            raise ValueError(f"cu_seqlens must be int32, got {self.cu_seqlens.dtype}")
        if self.cu_seqlens.dim() != 1 or self.cu_seqlens.numel() == 0:
            raise ValueError(
                f"cu_seqlens must have shape (n_seqs + 1,), got {tuple(self.cu_seqlens.shape)}"
            )
        devices = {str(tensor.device) for tensor in self._tensors().values()}
        if len(devices) > 1:
            raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(devices))}")
        if self.cu_seqlens.device.type == "cpu":  # free to look at only here
            lengths = self.cu_seqlens.diff()
            ends = int(self.cu_seqlens[0]), int(self.cu_seqlens[-1])
            if ends != (0, self.input_ids.numel()) or (lengths < 0).any():
                raise ValueError(
                    f"cu_seqlens must rise from 0 to n_tokens = {self.input_ids.numel()}, "
                    f"got {self.cu_seqlens.tolist()[:8]}..."
                )
            longest = int(lengths.max()) if lengths.numel() else 0
            if self.max_seqlen != longest:
                raise ValueError(f"max_seqlen must be {longest}, got {self.max_seqlen}")

    @classmethod
    def unchecked(cls, *values: Any) -> PackedBatch:
        """The batch of these fields, in order, which its maker vouches for: checks take time."""
        batch = object.__new__(cls)
        for name, value in zip(_FIELDS, values, strict=True):
            object.__setattr__(batch, name, value)
        return batch

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def _map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        changed: dict[str, Any] = {name: change(t) for name, t in self._tensors().items()}
        return replace(self, **changed)

    def __len__(self) -> int:
        """Number of sequences."""
        return self.cu_seqlens.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """(n_seqs,) int32: tokens in each sequence."""
        return self.cu_seqlens.diff()

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens.device

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> PackedBatch:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, for `to(device, non_blocking=True)`."""
        return self._map(Tensor.pin_memory)

    def split(self, split_size: int | Sequence[int]) -> list[PackedBatch]:
        """Cut between sequences, as `torch.split` cuts rows.

        split_size: sequences in each part (the last may have fewer), or a list with the number in
        each. The parts share memory with this batch.
        """
        if isinstance(split_size, int):
            if split_size < 1:
                raise ValueError(f"split_size must be at least 1, got {split_size}")
            full, rest = divmod(len(self), split_size)
            sizes = [split_size] * full + [rest] * (rest > 0)
        else:
            sizes = list(split_size)
        if sum(sizes) != len(self) or any(size < 0 for size in sizes):
            raise ValueError(f"split sizes must add up to {len(self)} sequences, got {sizes}")
        return self.cut(sizes, self.cu_seqlens.tolist())

    def cut(self, sizes: Sequence[int], bounds: Sequence[int]) -> list[PackedBatch]:
        """`split` where cu_seqlens are known on the host, so that nothing waits for a GPU."""
        parts, first = [], 0
        for size in sizes:
            last = first + size
            tokens = slice(bounds[first], bounds[last])
            lengths = [b - a for a, b in pairwise(bounds[first : last + 1])]
            parts.append(
                PackedBatch(
                    self.input_ids[tokens],
                    self.token_type_ids[tokens],
                    self.position_ids[tokens],
                    self.cu_seqlens[first : last + 1] - bounds[first],
                    max(lengths, default=0),
                )
            )
            first = last
        return parts


_FIELDS = tuple(field.name for field in fields(PackedBatch))  # which torch 2.6 cannot trace


def pack(
    input_ids: Tensor,
    attention_mask: Tensor,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> PackedBatch:
    """Leave the padding out of a padded batch.

    input_ids, attention_mask: (n_seqs, length); a token stays where the mask is not zero. A mask
    with holes or left padding keeps the column numbers as positions, as transformers does.
    token_type_ids: the same shape, zeros when None. position_ids: (n_seqs, length) or
    (1, length), column numbers when None.
    """
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be (n_seqs, length), got {tuple(input_ids.shape)}")
    index, cu_seqlens, max_seqlen, _ = pack_indices(attention_mask, input_ids.shape)
    if token_type_ids is None:
        token_type_ids = torch.zeros_like(input_ids)
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    shape, row = tuple(input_ids.shape), (1, input_ids.shape[1])
    if tuple(token_type_ids.shape) != shape:
        raise ValueError(f"token_type_ids must be {shape}, got {tuple(token_type_ids.shape)}")
    if tuple(position_ids.shape) not in (shape, row):
        raise ValueError(f"position_ids must be {shape} or {row}, got {tuple(position_ids.shape)}")
    return PackedBatch(
        input_ids.reshape(-1)[index],
        token_type_ids.reshape(-1)[index],
        position_ids.expand_as(input_ids).reshape(-1)[index],
        cu_seqlens,
        max_seqlen,
    )


def pack_indices(attention_mask: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor, int, bool]:
    """Where the real tokens of a padded batch are: flat index, cu_seqlens, max_seqlen, and whether
    the first column is real in all rows.

    attention_mask: (n_seqs, length) = `shape`, zero at padding. The one place that waits for a GPU.
    """
    if tuple(attention_mask.shape) != tuple(shape[:2]):
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(shape[:2])}, "
            f"got {tuple(attention_mask.shape)}"
        )
    real = attention_mask != 0
    lengths = real.sum(dim=1, dtype=torch.int32)
    cu_seqlens = torch.zeros(shape[0] + 1, dtype=torch.int32, device=real.device)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=cu_seqlens[1:])
    longest = lengths.max() if lengths.numel() else cu_seqlens[-1]
    first = real[:, :1].all().int()
    n_tokens, max_seqlen, has_first = torch.stack([cu_seqlens[-1], longest, first]).tolist()
    if real.device.type == "cpu":
        index = real.reshape(-1).nonzero().squeeze(1)
    else:  # nonzero would wait once more
        index = torch.sort(real.reshape(-1), descending=True, stable=True).indices[:n_tokens]
    return index, cu_seqlens, max_seqlen, bool(has_first)


def unpack(tensor: Tensor, packed: PackedBatch, total_length: int | None = None) -> Tensor:
    """Put padding back, on the right: (n_tokens, ...) to (n_seqs, length, ...), zeros at padding.

    length is `packed.max_seqlen`, or `total_length` where given, which must not be shorter.
    """
    if tensor.shape[0] != packed.input_ids.numel():
        raise ValueError(
            f"tensor must have n_tokens = {packed.input_ids.numel()} rows, got {tensor.shape[0]}"
        )
    length = packed.max_seqlen if total_length is None else total_length
    if length < packed.max_seqlen:
        raise ValueError(
            f"total_length must be at least the longest sequence, {packed.max_seqlen}, got {length}"
        )
    lengths = packed.lengths.long()
    row = torch.repeat_interleave(
        torch.arange(len(packed), device=tensor.device), lengths, output_size=tensor.shape[0]
    )
    column = torch.arange(tensor.shape[0], device=tensor.device) - packed.cu_seqlens.long()[row]
    padded = tensor.new_zeros((len(packed) * length, *tensor.shape[1:]))
    padded = padded.index_copy_(0, row * length + column, tensor)
    return padded.unflatten(0, (len(packed), length))
