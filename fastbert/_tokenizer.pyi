"""What csrc/bindings.cpp offers; fastbert.tokenizer is its interface."""

from collections.abc import Sequence
from typing import NotRequired, TypedDict, overload

import numpy as np
from numpy.typing import NDArray

class Rows(TypedDict):
    """Rows of tokens laid end to end; all arrays are int64. See `Rows` in csrc/tokenizer.h."""

    ids: NDArray[np.int64]
    type_ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    samples: NDArray[np.int64]
    position_ids: NotRequired[NDArray[np.int64]]
    spans: NotRequired[NDArray[np.int64]]
    words: NotRequired[NDArray[np.int64]]
    sequences: NotRequired[NDArray[np.int64]]
    matched: NotRequired[dict[int, str]]

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
        texts: Sequence[object],
        pairs: Sequence[object] | None = None,
        *,
        is_split_into_words: bool = False,
        add_special_tokens: bool = True,
        split_special_tokens: bool = False,
        truncation: str = "do_not_truncate",
        max_length: int = 0,
        stride: int = 0,
        truncate_left: bool = False,
        overflow: bool = False,
        positions: bool = False,
        details: bool = False,
        num_threads: int = 1,
    ) -> Rows: ...
