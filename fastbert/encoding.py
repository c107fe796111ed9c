"""Encoding a batch: its arguments checked, its rows as lists, arrays or tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from fastbert._tokenizer import Rows
    from fastbert.packing import PackedBatch

_PADDINGS = ("longest", "max_length", "do_not_pad")
_TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")


# ---- Arguments


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return next(a for a in allowed if a == value)  # a plain str, where an enum came


def truncation_strategy(
    truncation: bool | str | None, padding: bool | str = False, max_length: int | None = None
) -> str:
    """One of the names; a max_length alone also truncates."""
    if truncation is None and max_length is not None and padding is False:
        truncation = True
    if truncation is None or truncation is False:
        return "do_not_truncate"
    return "longest_first" if truncation is True else one_of("truncation", truncation, _TRUNCATIONS)


def padding_strategy(padding: bool | str) -> str:
    if isinstance(padding, bool):
        return "longest" if padding else "do_not_pad"
    return one_of("padding", padding, _PADDINGS)


def check_lengths(
    truncation: str, padding: str, length: int, stride: int, multiple: int | None
) -> None:
    """Refuse lengths that are none, and those that do not go together."""
    for name, value in (
        ("max_length", length),
        ("stride", stride),
        ("pad_to_multiple_of", multiple),
    ):
        if value is not None and (not hasattr(value, "__index__") or value < 0):
            raise ValueError(f"{name} must be a non-negative int, got {value!r}")
    if truncation == "do_not_truncate":
        return
    if length >= 2 and stride > length - 2:
        raise ValueError(
            f"stride must not be more than max_length - 2 = {length - 2}, got {stride}: "
            "windows would not move on"
        )
    if padding != "do_not_pad" and multiple and length % multiple:
        raise ValueError(
            f"truncation to max_length and padding do not go together: max_length {length} "
            f"is not a multiple of pad_to_multiple_of {multiple}"
        )


def check_texts(text: Any, text_pair: Any, is_split_into_words: bool) -> bool:
    """Whether this is a batch. What each item of it is, the C++ code checks."""
    for name, value in (("text", text), ("text_pair", text_pair)):
        if value is None and name == "text_pair":
            continue
        first = value[0] if isinstance(value, list | tuple) and value else value
        if not isinstance(first, str | list | tuple):
            got = type(value).__name__ + (
                f" of {type(first).__name__}" if first is not value else ""
            )
            raise ValueError(f"{name} must be str, a list of str, or lists of those, got {got}")
    is_list = isinstance(text, list | tuple)
    batched = is_list and (
        not is_split_into_words or (len(text) > 0 and isinstance(text[0], list | tuple))
    )
    if not batched:
        return False
    if not text:
        raise ValueError("text must hold at least one text, got an empty list")
    if isinstance(text_pair, str):
        raise TypeError("text_pair must be a list as long as text, got str")
    if text_pair is not None and len(text) != len(text_pair):
        raise ValueError(f"{len(text)} in text do not go with {len(text_pair)} in text_pair")
    return True


def copied(texts: Any) -> Any:
    """The same texts in lists that nobody else can change."""
    if not isinstance(texts, list | tuple):
        return texts
    if set(map(type, texts)) <= {str}:
        return list(texts)
    return [copied(text) for text in texts]


# ---- Results


class CharSpan(NamedTuple):
    """Characters start to end of a text."""

    start: int
    end: int


class Details(NamedTuple):
    """What the tokens of some rows are from; one list for each row."""

    tokens: list[list[str]]
    spans: list[list[tuple[int, int]]]
    words: list[list[int | None]]
    sequences: list[list[int | None]]


class BatchEncoding(dict[str, Any]):
    """What a tokenizer gives for a model: a dict whose keys are also attributes."""

    def __init__(
        self, data: dict[str, Any], details: Details | Callable[[], Details] | None = None
    ) -> None:
        super().__init__(data)
        self.__dict__["_details"] = details

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"BatchEncoding has no {name!r}, only {list(self)}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        details = self._get() if self.__dict__["_details"] else None
        return type(self), (dict(self), details)

    def _get(self) -> Details:
        """Tokens and where they are from: found when first asked for, since few ask."""
        details = self.__dict__["_details"]
        if details is None:
            raise ValueError("this BatchEncoding was not made by a tokenizer")
        if callable(details):
            details = self.__dict__["_details"] = details()
        return details

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a row as strings."""
        return self._get().tokens[batch_index]

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row the number of its word, None for [CLS], [SEP] and padding."""
        return self._get().words[batch_index]

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of a row which text it is from, 0 or 1; None as in word_ids."""
        return self._get().sequences[batch_index]

    def token_to_chars(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> CharSpan | None:
        """Where a token is in its text; None for [CLS], [SEP] and padding."""
        row, token = _row_and_index(batch_or_token_index, token_index)
        details = self._get()
        if details.sequences[row][token] is None:
            return None
        return CharSpan(*details.spans[row][token])

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The first token that a character of text `sequence_index` is in; None if in none."""
        row, char = _row_and_index(batch_or_char_index, char_index)
        details = self._get()
        for token, (start, end) in enumerate(details.spans[row]):
            if details.sequences[row][token] == sequence_index and start <= char < end:
                return token
        return None

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> BatchEncoding:
        """Move all tensors; gives this same object."""
        for name, value in self.items():
            if hasattr(value, "to"):
                self[name] = value.to(device=device, non_blocking=non_blocking)
        return self


def _row_and_index(first: int, second: int | None) -> tuple[int, int]:
    """Methods of BatchEncoding take (index) for the first row, or (row, index)."""
    return (0, first) if second is None else (first, second)


class Layout:
    """Where the tokens of rows go when rows are padded."""

    def __init__(self, rows: Rows, target: int | None, multiple: int | None, left: bool) -> None:
        """target: the length to pad to, 0 for none, None for the longest of the first rows."""
        if target is None:  # windows that overflowed have no say
            target = rows.longest(windows=False)
        if multiple and target:
            target = -(-target // multiple) * multiple
        self._rows, self._target, self._left = rows, target, left

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """(n_rows + 1,): row i is places offsets[i] to offsets[i + 1]."""
        return self._rows.offsets(self._target)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @cached_property
    def _width(self) -> int | None:
        """The length of every row; None where they differ."""
        if 0 < self._target >= self._rows.longest(windows=True):
            return self._target
        return int(self.lengths[0]) if (self.lengths == self.lengths[0]).all() else None

    def flat(self, column: str, fill: int) -> NDArray[np.int64]:
        """Values of all tokens, (n_places, ...), with `fill` where padding is."""
        return self._rows.column(column, length=self._target, fill=fill, fill_left=self._left)

    def lists(self, values: NDArray[Any]) -> list[list[Any]]:
        """Values of all places as one list for each row."""
        flat = values.tolist()
        items = flat if values.ndim == 1 else list(map(tuple, flat))
        return [items[a:b] for a, b in itertools.pairwise(self.offsets.tolist())]

    def rows(self, name: str, column: str, fill: int, tensors: str | None) -> Any:
        """Padded values as lists, or as an array or tensor (n_rows, length, ...)."""
        values = self.flat(column, fill)
        if tensors is None:
            return self.lists(values)
        if self._width is not None:
            return as_tensor(
                values.reshape(self._rows.n_rows, self._width, *values.shape[1:]), tensors
            )
        if tensors == "np":
            array = np.empty(len(self.lengths), dtype=object)
            array[:] = np.split(values, self.offsets[1:-1])
            return array
        raise ValueError(
            f"{name} has rows of {self.lengths.min()} to {self.lengths.max()} tokens: rows of "
            "one tensor must be equally long, so ask for padding=True and truncation=True"
        )


def as_tensor(array: NDArray[np.int64], tensors: str | None) -> Any:
    """tensors: None for a list, "np" for the array itself, "pt" for a torch tensor."""
    if tensors is None:
        return array.tolist()
    if tensors == "np":
        return array
    import torch

    return torch.from_numpy(array)


# glibc's malloc takes what is larger from the system: zeros that take no memory until they are
# looked at. Smaller memory it uses again, and would fill with zeros on one thread.
_FRESH = 32 << 20


def as_packed(rows: Rows, dtype: torch.dtype | None, pin_memory: bool) -> PackedBatch:
    """The rows end to end, written once where the tensors are."""
    import torch

    from fastbert.packing import PackedBatch

    if rows.n_tokens >= 2**31:
        raise ValueError(f"a packed batch holds less than 2**31 tokens, got {rows.n_tokens}")
    dtype = torch.int64 if dtype is None else dtype
    if dtype not in (torch.int64, torch.int32):
        raise ValueError(f"dtype must be torch.int64 or torch.int32, got {dtype}")
    shape = 3, rows.n_tokens
    type_ids, pinned = True, None
    if pin_memory:
        pinned = torch.empty(shape, dtype=dtype, pin_memory=True)
        buffer = pinned.numpy()
    else:
        buffer = np.empty(shape, np.int64 if dtype == torch.int64 else np.int32)
        if buffer.nbytes >= _FRESH and not rows.has_pairs:
            buffer, type_ids = np.zeros(shape, buffer.dtype), False
    rows.write_packed(buffer, type_ids=type_ids)
    # torch's own tensor, as only that keeps the memory till an asynchronous copy has ended.
    ids, type_ids, positions = torch.from_numpy(buffer) if pinned is None else pinned
    cu_seqlens = torch.from_numpy(rows.offsets(dtype=np.dtype(np.int32)))
    if pinned is not None:
        cu_seqlens = cu_seqlens.pin_memory()
    longest = rows.longest(windows=True)
    return PackedBatch.unchecked(ids, type_ids, positions, cu_seqlens, longest)


def is_arrow(texts: Any) -> bool:
    """Whether these are an Arrow array, or a stream of some."""
    return hasattr(texts, "__arrow_c_array__") or hasattr(texts, "__arrow_c_stream__")


def find_details(
    rows: Rows, layout: Layout, tokens: dict[int, str], pad_token: str | None
) -> Details:
    """rows: encoded with details. tokens: by id."""

    def none_if_special(column: str) -> list[list[int | None]]:
        lists = layout.lists(layout.flat(column, -1))
        return [[None if value < 0 else value for value in row] for row in lists]

    ids = layout.flat("ids", -1).tolist()
    strings = [str(pad_token) if id < 0 else tokens[id] for id in ids]
    places = np.flatnonzero(layout.flat("mask", 0))
    for index, text in rows.matched():
        strings[places[index]] = text
    return Details(
        tokens=[strings[a:b] for a, b in itertools.pairwise(layout.offsets.tolist())],
        spans=layout.lists(layout.flat("spans", 0)),
        words=none_if_special("words"),
        sequences=none_if_special("sequences"),
    )
