"""What csrc/bindings.cpp offers; fastbert.tokenizer is its interface."""

from collections.abc import Callable
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

class Rows:
    """Rows of tokens as they are made; columns of them are written in layouts. See csrc/rows.h."""

    n_rows: int
    n_tokens: int
    has_pairs: bool
    def longest(self, windows: bool) -> int: ...
    def offsets(self, length: int = 0, *, dtype: np.dtype[Any] = ...) -> NDArray[Any]: ...
    def samples(self) -> NDArray[np.int64]: ...
    def column(
        self,
        name: str,
        *,
        dtype: np.dtype[Any] = ...,
        length: int = 0,
        fill: int = 0,
        fill_left: bool = False,
    ) -> NDArray[Any]: ...
    def write_packed(self, out: NDArray[Any], *, type_ids: bool) -> None: ...
    def matched(self) -> list[tuple[int, str]]: ...

class WordPiece:
    def __init__(
        self, vocab: list[tuple[str, int]], unknown: str, max_chars: int = 100
    ) -> None: ...

class UnicodeTables:
    @overload
    def __init__(self) -> None: ...
    @overload
    def __init__(
        self, *, flags: bytes, combining: bytes, decompositions: list[tuple[str, str]]
    ) -> None: ...

class AddedToken:
    def __init__(
        self,
        *,
        content: str,
        id: int,
        single_word: bool,
        lstrip: bool,
        rstrip: bool,
        normalized: bool,
        special: bool,
    ) -> None: ...

class Tokenizer:
    def __init__(
        self,
        pieces: WordPiece,
        *,
        tables: UnicodeTables,
        lowercase: bool,
        strip_accents: bool,
        chinese_chars: bool,
        added: list[AddedToken],
        cls_id: int,
        sep_id: int,
    ) -> None: ...
    def normalize(self, text: str) -> str: ...
    def encode(
        self,
        texts: object,
        pairs: object = None,
        *,
        is_split_into_words: bool = False,
        bytes: bool = False,
        errors: str = "strict",
        add_special_tokens: bool = True,
        split_special_tokens: bool = False,
        truncation: str = "do_not_truncate",
        max_length: int = 0,
        stride: int = 0,
        truncate_left: bool = False,
        overflow: bool = False,
        details: bool = False,
        num_threads: int = 0,
    ) -> Rows: ...
    def query_function(
        self,
    ) -> Callable[[str, int, bool, bool], tuple[NDArray[np.int64], NDArray[np.int32]] | None]: ...

class WordCounts:
    """See csrc/word_counts.h; `train` is csrc/vocab_trainer.h."""

    def __init__(self, *, lowercase: bool, strip_accents: bool, chinese_chars: bool) -> None: ...
    def __len__(self) -> int: ...
    def add(self, texts: list[bytes], num_threads: int) -> None: ...
    def train(
        self,
        progress: Callable[[int], None],
        *,
        size: int,
        min_frequency: int,
        limit_alphabet: int,
        initial_alphabet: str,
        special_tokens: list[str],
    ) -> list[str]: ...

def n_available_cpus() -> int: ...
def instructions() -> str: ...
