"""BERT's tokenizer: WordPiece in C++ with the interface of transformers.BertTokenizerFast."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from fastbert import _tokenizer

if TYPE_CHECKING:
    import torch

    from fastbert.packing import PackedBatch

Texts = str | Sequence[str] | Sequence[Sequence[str]] | Sequence[Sequence[Sequence[str]]]

_NO_LIMIT = int(1e30)  # model_max_length where nothing says otherwise, as in transformers
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
                  "mask_token")  # fmt: skip
_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json")  # fmt: skip
_PADDINGS = ("longest", "max_length", "do_not_pad")
_TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")

# What ends a line of a vocabulary file besides its line end: Unicode's White_Space.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)

# The decoder of HF tokenizers rewrites each token so; clean_up_tokenization_spaces does the same
# to the whole text, but for " do not".
_CLEAN_UP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
             (" 'm", "'m"), (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"),
             (" 're", "'re"))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text before words are split.

    single_word: only where no letter or digit is next to it. lstrip, rstrip: takes the white space
    before or after it along. normalized: looked for in the normalised text (None: unless special).
    """

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None
    special: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.content, str):
            raise TypeError(f"an added token must be str, got {type(self.content).__name__}")
        if self.normalized is None:
            object.__setattr__(self, "normalized", not self.special)

    def __str__(self) -> str:
        return self.content

    @classmethod
    def of(cls, token: Any, special: bool = False) -> AddedToken:
        """From a str, the dict of a saved token, or an AddedToken of this or another library."""
        if isinstance(token, AddedToken):
            return token
        if isinstance(token, str):
            return cls(token, special=special)
        names = [field.name for field in dataclasses.fields(cls)]
        if isinstance(token, dict):
            return cls(**{name: token[name] for name in names if name in token})
        if hasattr(token, "content"):
            return cls(**{name: getattr(token, name) for name in names})
        raise TypeError(f"a token must be str or AddedToken, got {type(token).__name__}")


class CharSpan(NamedTuple):
    """Characters start to end of a text."""

    start: int
    end: int


class _Details(NamedTuple):
    """What the tokens of some rows are from; one list for each row."""

    tokens: list[list[str]]
    spans: list[list[tuple[int, int]]]
    words: list[list[int | None]]
    sequences: list[list[int | None]]


class BatchEncoding(dict[str, Any]):
    """What a tokenizer gives for a model: a dict whose keys are also attributes."""

    def __init__(self, data: dict[str, Any], details: Callable[[], _Details] | None = None) -> None:
        super().__init__(data)
        self.__dict__["_details"] = details

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"BatchEncoding has no {name!r}, only {list(self)}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        details = _Known(self._get()) if self.__dict__["_details"] else None
        return type(self), (dict(self), details)

    def _get(self) -> _Details:
        """Tokens and where they are from: found when first asked for, since few ask."""
        details = self.__dict__["_details"]
        if details is None:
            raise ValueError("this BatchEncoding was not made by a tokenizer")
        if not isinstance(details, _Known):
            details = self.__dict__["_details"] = _Known(details())
        return details()

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


class _Known(NamedTuple):
    """Details that were found already, as a function that gives them."""

    details: _Details

    def __call__(self) -> _Details:
        return self.details


class BertTokenizer:
    """Text to the ids of a BERT vocabulary and back.

    vocab: a vocabulary file (one token a line, its id the number of the line), or a dict from token
    to id. strip_accents: None for the value of do_lower_case. Special tokens that the vocabulary
    lacks are added behind it, but unk_token must be there.

    Raises ValueError when the vocabulary cannot be read, holds a token or an id twice, or has no
    unk_token.
    """

    unk_token: str
    sep_token: str
    pad_token: str | None
    cls_token: str
    mask_token: str | None
    bos_token: str | None
    eos_token: str | None
    unk_token_id: int
    sep_token_id: int
    pad_token_id: int | None
    cls_token_id: int
    mask_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | None

    def __init__(
        self,
        vocab: str | os.PathLike[str] | dict[str, int] | None = None,
        do_lower_case: bool = True,
        unk_token: str | AddedToken = "[UNK]",
        sep_token: str | AddedToken = "[SEP]",
        pad_token: str | AddedToken | None = "[PAD]",
        cls_token: str | AddedToken = "[CLS]",
        mask_token: str | AddedToken | None = "[MASK]",
        tokenize_chinese_chars: bool = True,
        strip_accents: bool | None = None,
        *,
        bos_token: str | AddedToken | None = None,
        eos_token: str | AddedToken | None = None,
        extra_special_tokens: Sequence[str | AddedToken] | None = None,
        additional_special_tokens: Sequence[str | AddedToken] | None = None,
        added_tokens_decoder: dict[int, AddedToken] | None = None,
        model_max_length: int | None = None,
        padding_side: str = "right",
        truncation_side: str = "right",
        model_input_names: Sequence[str] = ("input_ids", "token_type_ids", "attention_mask"),
        clean_up_tokenization_spaces: bool = False,
        split_special_tokens: bool = False,
        name_or_path: str = "",
    ) -> None:
        named = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "unk_token": unk_token,
            "sep_token": sep_token,
            "pad_token": pad_token,
            "cls_token": cls_token,
            "mask_token": mask_token,
        }
        for name in ("unk_token", "sep_token", "cls_token"):
            if named[name] is None:
                raise TypeError(f"{name} must be str or AddedToken, got None")
        for name, token in named.items():
            setattr(self, name, None if token is None else str(AddedToken.of(token)))
        if vocab is None:
            order = (pad_token, unk_token, cls_token, sep_token, mask_token)
            vocab = {str(token): i for i, token in enumerate(order)}
        self._vocab = dict(vocab) if isinstance(vocab, dict) else _read_vocab(vocab)
        _check_vocab(self._vocab)
        self.do_lower_case = do_lower_case
        self.tokenize_chinese_chars = tokenize_chinese_chars
        self.strip_accents = strip_accents
        self.model_max_length = _NO_LIMIT if model_max_length is None else model_max_length
        self.padding_side = _one_of("padding_side", padding_side, ("right", "left"))
        self.truncation_side = _one_of("truncation_side", truncation_side, ("right", "left"))
        self.model_input_names = list(model_input_names)
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.split_special_tokens = split_special_tokens
        self.name_or_path = name_or_path

        if extra_special_tokens is None:
            extra_special_tokens = additional_special_tokens or ()
        if isinstance(extra_special_tokens, str | dict) and extra_special_tokens:
            raise TypeError(
                "extra_special_tokens must be a list of str or AddedToken, "
                f"got {type(extra_special_tokens).__name__}"
            )
        self.extra_special_tokens = [str(AddedToken.of(token)) for token in extra_special_tokens]

        # By content: the id and the latest settings of added tokens; which were ever special.
        self._added: dict[str, int] = {}
        self._settings: dict[str, AddedToken] = {}
        self._special: set[str] = set()
        self._normal: dict[int, str] = {}
        tokens = [AddedToken.of(token) for _, token in sorted((added_tokens_decoder or {}).items())]
        known = {token.content for token in tokens}
        for token in (*named.values(), *extra_special_tokens):
            if token is not None and str(token) not in known:
                tokens.append(AddedToken.of(token, special=True))
        names = {str(token) for token in named.values()}
        self._register(
            dataclasses.replace(token, special=True) if token.content in names else token
            for token in tokens
        )
        # These stay what they are when the attributes are set to other tokens.
        self._unknown = self.unk_token
        self._cls_sep = self.cls_token_id, self.sep_token_id
        self._build()

    def _build(self) -> None:
        self._pieces = _tokenizer.WordPiece(list(self._vocab.items()), self._unknown)
        self._refresh()

    def _refresh(self) -> None:
        """Make the C++ tokenizer, which never changes: a new one takes up new tokens."""
        self._core = _tokenizer.Tokenizer(
            self._pieces,
            lowercase=self.do_lower_case,
            strip_accents=self.do_lower_case if self.strip_accents is None else self.strip_accents,
            chinese_chars=self.tokenize_chinese_chars,
            added=[
                _tokenizer.AddedToken(
                    content=content,
                    id=self._added[content],
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=bool(token.normalized),
                    special=content in self._special,
                )
                for content, token in self._settings.items()
            ],
            cls_id=self._cls_sep[0],
            sep_id=self._cls_sep[1],
        )
        # HF tokenizers shows a token that is normalised as what it matches, from then on.
        for content, token in self._settings.items():
            if token.normalized:
                self._normal[self._added[content]] = self._core.normalize(content)
        self._tokens = {id: token for token, id in self.get_vocab().items()} | self._normal
        self._decoded: dict[int, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        made = ("_pieces", "_core", "_tokens", "_decoded")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._build()

    # ---- Vocabulary

    @property
    def vocab_size(self) -> int:
        """Number of tokens without the added ones; `len` counts all."""
        return len(self._vocab)

    def __len__(self) -> int:
        return len(self._vocab.keys() | self._added.keys())

    def get_vocab(self) -> dict[str, int]:
        """All tokens and their ids."""
        return {**self._vocab, **self._added}

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_token_id") and name.removesuffix("_id") in _SPECIAL_NAMES:
            token = getattr(self, name.removesuffix("_id"))
            return None if token is None else self.convert_tokens_to_ids(token)
        raise AttributeError(f"BertTokenizer has no {name!r}")

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens that have a name, such as `cls_token`, and are set."""
        return {
            name: token for name in _SPECIAL_NAMES if (token := getattr(self, name)) is not None
        }

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.extra_special_tokens]))

    @property
    def all_special_ids(self) -> list[int]:
        return [self._id(token) for token in self.all_special_tokens]

    def add_tokens(
        self,
        new_tokens: str | AddedToken | Sequence[str | AddedToken],
        special_tokens: bool = False,
    ) -> int:
        """Add tokens behind the vocabulary, or have those in it found in texts; gives how many.

        The model's embeddings must then be made to have len(tokenizer) rows.
        """
        if not new_tokens:
            return 0
        if not isinstance(new_tokens, list | tuple):
            new_tokens = [cast("str | AddedToken", new_tokens)]
        tokens = [AddedToken.of(token, special=special_tokens) for token in new_tokens]
        if special_tokens:
            tokens = [dataclasses.replace(token, special=True) for token in tokens]
        before = self._added.copy(), self._settings.copy(), self._special.copy()
        n_added = self._register(tokens)
        try:
            self._refresh()
        except ValueError:
            self._added, self._settings, self._special = before
            raise
        return n_added

    def add_special_tokens(
        self, special_tokens_dict: dict[str, Any], replace_extra_special_tokens: bool = True
    ) -> int:
        """Set named special tokens, or `extra_special_tokens` (a list); adds those that are new."""
        tokens: list[Any] = []
        for name, value in special_tokens_dict.items():
            if name in ("extra_special_tokens", "additional_special_tokens"):
                if not isinstance(value, list | tuple):
                    raise ValueError(f"{name} must be a list, got {type(value).__name__}")
                extra = [str(AddedToken.of(token)) for token in value]
                kept = [] if replace_extra_special_tokens and extra else self.extra_special_tokens
                self.extra_special_tokens = list(dict.fromkeys([*kept, *extra]))
                tokens += value
            elif name in _SPECIAL_NAMES:
                setattr(self, name, str(AddedToken.of(value)))
                tokens.append(value)
            else:
                wanted = (*_SPECIAL_NAMES, "extra_special_tokens")
                raise ValueError(f"a special token must be one of {wanted}, got {name!r}")
        return self.add_tokens(tokens, special_tokens=True)

    def _register(self, tokens: Iterable[AddedToken]) -> int:
        """Give tokens their ids: the vocabulary's, or the next free one; gives how many changed."""
        n_new = 0
        next_id = max(max(self._added.values(), default=-1) + 1, len(self._vocab))
        for token in tokens:
            if not token.content or self._settings.get(token.content) == token:
                continue
            if token.special:
                self._special.add(token.content)
            id = self._added.setdefault(token.content, self._vocab.get(token.content, next_id))
            next_id = max(next_id, id + 1)
            self._settings[token.content] = token
            n_new += 1
        return n_new

    def _id(self, token: str) -> int:
        id = self._added.get(token, self._vocab.get(token))
        return self._vocab[self._unknown] if id is None else id

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | list[int]:
        """Ids of tokens, unk_token_id for those unknown; one id for one token."""
        if isinstance(tokens, str):
            return self._id(tokens)
        return [self._id(token) for token in tokens]

    def convert_ids_to_tokens(
        self, ids: int | Iterable[int], skip_special_tokens: bool = False
    ) -> str | list[str | None] | None:
        """Tokens of ids, None for those that there are not; one token for one id."""
        if isinstance(ids, int):
            return self._tokens.get(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        return [self._tokens.get(int(id)) for id in ids if int(id) not in skipped]

    # ---- Text to ids

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many tokens [CLS] and [SEP] are in a row."""
        return 3 if pair else 2

    def __call__(
        self,
        text: Texts,
        text_pair: Texts | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        split_special_tokens: bool | None = None,
    ) -> BatchEncoding:
        """Encode a text, a pair, or a batch of them; arguments and result as in transformers.

        text, text_pair: str, or a list of str for a batch; with is_split_into_words a list of
        words, or a list of such lists. padding: False, True or "longest", "max_length". truncation:
        False, True or "longest_first", "only_first", "only_second"; a max_length alone also
        truncates. return_tensors: None for lists, "pt" or "np" for int64 (n_rows, length).
        """
        batched = _check_texts(text, text_pair, is_split_into_words)
        texts: Any = text if batched else [text]
        pairs: Any = text_pair if batched else [text_pair] if text_pair else None
        strategy = _one_of("truncation", _truncation(truncation, padding, max_length), _TRUNCATIONS)
        pad_to = _one_of("padding", _padding(padding), _PADDINGS)
        side = _one_of("padding_side", padding_side or self.padding_side, ("right", "left"))
        _one_of("return_tensors", return_tensors, (None, "pt", "np"))
        length = self.model_max_length if max_length is None else max_length
        if max_length is None and length > 10**20:  # nothing to truncate or pad to
            strategy = "do_not_truncate"
            pad_to = "do_not_pad" if pad_to == "max_length" else pad_to
        _check_lengths(strategy, pad_to, length, stride, pad_to_multiple_of)
        if padding is True and max_length is not None and strategy == "do_not_truncate":
            warnings.warn(
                "max_length has no effect with padding=True and no truncation: "
                "padding='max_length' pads to it",
                stacklevel=2,
            )
        if pad_to != "do_not_pad" and self.pad_token is None:
            raise ValueError("padding needs a pad_token, but this tokenizer's is None")
        given = self.model_input_names
        if return_token_type_ids is None:
            return_token_type_ids = "token_type_ids" in given
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in given

        # The result may ask for details later, when this tokenizer or the lists have changed.
        core, tokens, pad_token = self._core, self._tokens, self.pad_token
        truncate_left = self.truncation_side == "left"
        split = self.split_special_tokens if split_special_tokens is None else split_special_tokens
        texts, pairs = _snapshot(texts), _snapshot(pairs)

        def encode(details: bool) -> tuple[_tokenizer.Rows, _Padding]:
            rows = core.encode(
                texts,
                pairs,
                is_split_into_words=is_split_into_words,
                add_special_tokens=add_special_tokens,
                split_special_tokens=split,
                truncation=strategy,
                max_length=length if strategy != "do_not_truncate" else 0,
                stride=stride,
                truncate_left=truncate_left,
                overflow=return_overflowing_tokens,
                details=details,
                num_threads=_n_cpus(),
            )
            target = length if pad_to == "max_length" else None if pad_to == "longest" else 0
            return rows, _Padding(rows, target, pad_to_multiple_of, side == "left")

        def details() -> _Details:
            return _details(*encode(details=True), tokens, pad_token)

        rows, layout = encode(return_special_tokens_mask or return_offsets_mapping)
        n_tokens = rows["ids"].size
        flat = {"input_ids": layout.pad(rows["ids"], self.pad_token_id)}
        if return_token_type_ids:
            flat["token_type_ids"] = layout.pad(rows["type_ids"], 0)
        if return_attention_mask:
            flat["attention_mask"] = layout.pad(np.ones(n_tokens, np.int64), 0)
        if return_special_tokens_mask:
            flat["special_tokens_mask"] = layout.pad((rows["sequences"] < 0).astype(np.int64), 1)
        if return_offsets_mapping:
            flat["offset_mapping"] = layout.pad(rows["spans"].reshape(-1, 2), 0)
        data: dict[str, Any] = {
            name: layout.rows(name, values, return_tensors) for name, values in flat.items()
        }
        if return_length:
            data["length"] = _vector(layout.lengths, return_tensors)
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = _vector(rows["samples"], return_tensors)
        elif not batched and return_tensors is None:
            data.update({name: data[name][0] for name in flat})
        return BatchEncoding(data, details)

    def encode(self, text: Texts, text_pair: Texts | None = None, **kwargs: Any) -> list[int]:
        """The input_ids of `self(text, text_pair, ...)`."""
        return self(text, text_pair, **kwargs)["input_ids"]

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """The tokens of a text as strings."""
        return self(text, pair, add_special_tokens=add_special_tokens, **kwargs).tokens()

    def pack(
        self,
        texts: Sequence[str],
        text_pairs: Sequence[str] | None = None,
        *,
        max_length: int = 512,
        truncation: bool | str = "longest_first",
        num_threads: int | None = None,
    ) -> PackedBatch:
        """Encode a batch of texts, or of pairs, without padding; no texts give an empty batch.

        num_threads: None for as many as there are CPUs for this process.
        """
        import torch

        from fastbert.packing import PackedBatch

        for name, value in (("texts", texts), ("text_pairs", text_pairs)):
            if not isinstance(value, list | tuple) and not (value is None and name != "texts"):
                raise TypeError(f"{name} must be a list of str, got {type(value).__name__}")
        if text_pairs is not None and len(texts) != len(text_pairs):
            raise ValueError(f"{len(texts)} texts do not go with {len(text_pairs)} text_pairs")
        strategy = _one_of("truncation", _truncation(truncation, False, None), _TRUNCATIONS)
        if max_length < self.num_special_tokens_to_add(pair=True):
            raise ValueError(f"max_length must leave room for [CLS] and [SEP], got {max_length}")
        n_threads = _n_cpus() if num_threads is None else num_threads
        if n_threads < 1:
            raise ValueError(f"num_threads must be at least 1, got {num_threads}")
        rows = self._core.encode(
            texts,
            text_pairs,
            split_special_tokens=self.split_special_tokens,
            truncation=strategy,
            max_length=max_length,
            truncate_left=self.truncation_side == "left",
            positions=True,
            num_threads=n_threads,
        )
        offsets = rows["offsets"]
        if offsets[-1] >= 2**31:
            raise ValueError(f"a packed batch holds less than 2**31 tokens, got {offsets[-1]}")
        return PackedBatch(
            torch.from_numpy(rows["ids"]),
            torch.from_numpy(rows["type_ids"]),
            torch.from_numpy(rows["position_ids"]),
            torch.from_numpy(offsets.astype(np.int32)),
            int(np.diff(offsets).max(initial=0)),
        )

    # ---- Ids to text

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str | list[str]:
        """The text of ids (a list, array or tensor); a list of texts for a batch."""
        if hasattr(token_ids, "tolist"):
            token_ids = token_ids.tolist()
        if isinstance(token_ids, dict):
            token_ids = token_ids["input_ids"]
        if isinstance(token_ids, int):
            token_ids = [token_ids]
        token_ids = [ids.tolist() if hasattr(ids, "tolist") else ids for ids in token_ids]
        if token_ids and isinstance(token_ids[0], list | tuple):
            return [
                cast(str, self.decode(ids, skip_special_tokens, clean_up_tokenization_spaces))
                for ids in token_ids
            ]
        text = "".join(self._pieces_of(token_ids, skip_special_tokens))
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        if clean_up_tokenization_spaces:
            for old, new in _CLEAN_UP:
                text = text if old == " do not" else text.replace(old, new)
        return text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """`decode` for a batch; always a list."""
        texts = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces)
        return [texts] if isinstance(texts, str) else texts

    def _pieces_of(self, ids: Sequence[int], skip_special_tokens: bool) -> list[str]:
        """The part of the text that each id gives; ids without a token give none."""
        pieces: list[str] = []
        for id in map(int, ids):
            if id < 0:
                raise ValueError(f"ids must not be negative, got {id}")
            token = self._tokens.get(id)
            if token is None or (skip_special_tokens and token in self._special):
                continue
            if not pieces:  # keeps its ##, and has no space in front
                pieces.append(_clean_up(token))
                continue
            if id not in self._decoded:
                inner = token.startswith("##")
                self._decoded[id] = _clean_up(token[2:] if inner else " " + token)
            pieces.append(self._decoded[id])
        return pieces

    # ---- Files

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str = "",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: bool | str | None = None,
        **kwargs: Any,
    ) -> BertTokenizer:
        """Load from a folder, a vocab.txt or tokenizer.json, or a repository of the hub.

        As in transformers 5, only the vocabulary, the added tokens and the sides are read from
        tokenizer.json: do_lower_case and the like come from tokenizer_config.json, or from kwargs,
        which go to the constructor.
        """
        path = Path(pretrained_model_name_or_path)
        if not path.exists():
            from huggingface_hub import snapshot_download

            prefix = f"{subfolder}/" if subfolder else ""
            path = Path(
                snapshot_download(
                    str(pretrained_model_name_or_path),
                    allow_patterns=[prefix + name for name in _FILES],
                    revision=revision,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        if path.is_dir():
            path = path / subfolder
            files = {name: path / name for name in _FILES if (path / name).is_file()}
        else:
            files = {"tokenizer.json" if path.suffix == ".json" else "vocab.txt": path}
        if "vocab.txt" not in files and "tokenizer.json" not in files:
            raise ValueError(f"{path} must hold vocab.txt or tokenizer.json, and holds neither")

        config = _read_json(files, "tokenizer_config.json")
        saved = _read_json(files, "tokenizer.json")
        added: dict[int, Any] = {}
        if "added_tokens_decoder" in config:
            added = {int(id): token for id, token in config["added_tokens_decoder"].items()}
        else:
            for name, value in _read_json(files, "special_tokens_map.json").items():
                if isinstance(value, dict):
                    value = AddedToken.of({**value, "special": True})
                config[name] = value
            special = {config.get(name) for name in _SPECIAL_NAMES}
            for content, id in _read_json(files, "added_tokens.json").items():
                added[id] = AddedToken(content, special=content in map(str, special))
            added.update({token["id"]: token for token in saved.get("added_tokens", [])})
        config["added_tokens_decoder"] = {id: AddedToken.of(t) for id, t in added.items()}
        vocab: Any = files.get("vocab.txt")
        if saved:
            model = saved.get("model", {})
            if model.get("type", "WordPiece") != "WordPiece":
                raise ValueError(f"tokenizer.json must hold a WordPiece model, not {model['type']}")
            vocab = model["vocab"]
            for side, part in (("padding_side", "padding"), ("truncation_side", "truncation")):
                if saved.get(part):
                    config.setdefault(side, saved[part].get("direction", "right").lower())
        known = inspect.signature(cls).parameters
        config = {name: value for name, value in config.items() if name in known}
        for name in (*_SPECIAL_NAMES, "extra_special_tokens", "additional_special_tokens"):
            config[name] = _from_json(config.get(name))
            if config[name] is None:
                del config[name]
        config["name_or_path"] = str(pretrained_model_name_or_path)
        return cls(**{**config, "vocab": vocab, **kwargs})

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[str, ...]:
        """Write tokenizer.json, tokenizer_config.json and vocab.txt, which transformers reads too.

        There is no vocab.txt where its lines could not give the ids back. Gives the paths.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.do_lower_case,
            "strip_accents": self.strip_accents,
            "tokenize_chinese_chars": self.tokenize_chinese_chars,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "model_input_names": self.model_input_names,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "split_special_tokens": self.split_special_tokens,
            "extra_special_tokens": self.extra_special_tokens,
            **{name: getattr(self, name) for name in _SPECIAL_NAMES},
        }
        files = {
            "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
            "tokenizer.json": json.dumps(self._as_json(), ensure_ascii=False, indent=2),
        }
        lines = "".join(f"{token}\n" for token in sorted(self._vocab, key=self._vocab.__getitem__))
        with contextlib.suppress(ValueError):
            if _parse_vocab(lines) == self._vocab:
                files["vocab.txt"] = lines
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8", newline="\n")
        return tuple(str(folder / name) for name in files)

    def _as_json(self) -> dict[str, Any]:
        """What HF tokenizers calls a tokenizer.json."""

        def piece(kind: str, id: str, type_id: int) -> dict[str, Any]:
            return {kind: {"id": id, "type_id": type_id}}

        contents = {id: content for content, id in self._added.items()}
        cls, sep = (contents[id] for id in self._cls_sep)
        single = [piece("SpecialToken", cls, 0), piece("Sequence", "A", 0),
                  piece("SpecialToken", sep, 0)]  # fmt: skip
        pair = [*single, piece("Sequence", "B", 1), piece("SpecialToken", sep, 1)]
        added = [
            {"id": id, **dataclasses.asdict(self._settings[content])}
            for id, content in sorted(contents.items())
        ]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {
                "type": "BertNormalizer",
                "clean_text": True,
                "handle_chinese_chars": self.tokenize_chinese_chars,
                "strip_accents": self.strip_accents,
                "lowercase": self.do_lower_case,
            },
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": single,
                "pair": pair,
                "special_tokens": {
                    token: {"id": token, "ids": [id], "tokens": [token]}
                    for token, id in zip((cls, sep), self._cls_sep, strict=True)
                },
            },
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
            "model": {
                "type": "WordPiece",
                "unk_token": self._unknown,
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100,
                "vocab": self._vocab,
            },
        }


# ---- Arguments


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return next(a for a in allowed if a == value)  # a plain str, where an enum came


def _truncation(truncation: bool | str | None, padding: bool | str, max_length: int | None) -> Any:
    if truncation is None and max_length is not None and padding is False:
        truncation = True
    if truncation is None or truncation is False:
        return "do_not_truncate"
    return "longest_first" if truncation is True else truncation


def _padding(padding: bool | str) -> Any:
    if isinstance(padding, bool):
        return "longest" if padding else "do_not_pad"
    return padding


def _check_lengths(
    truncation: str, padding: str, length: int, stride: int, multiple: int | None
) -> None:
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


def _check_texts(text: Any, text_pair: Any, is_split_into_words: bool) -> bool:
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


def _row_and_index(first: int, second: int | None) -> tuple[int, int]:
    """Methods of BatchEncoding take (index) for the first row, or (row, index)."""
    return (0, first) if second is None else (first, second)


def _snapshot(texts: Any) -> Any:
    """The same texts in lists that nobody else can change."""
    if isinstance(texts, list | tuple):
        return [text if isinstance(text, str) else _snapshot(text) for text in texts]
    return texts


def _n_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---- Results


class _Padding:
    """Where the tokens of rows go when rows are padded."""

    def __init__(
        self, rows: _tokenizer.Rows, target: int | None, multiple: int | None, left: bool
    ) -> None:
        """target: the length to pad to, 0 for none, None for the longest of the first rows."""
        before = np.diff(rows["offsets"])
        if target is None:  # windows that overflowed have no say
            target = int(before[np.diff(rows["samples"], prepend=-1) != 0].max())
        if multiple and target:
            target = -(-target // multiple) * multiple
        self.lengths = np.maximum(before, target)
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self._index: NDArray[np.int64] | None = None
        if (self.lengths != before).any():
            starts = self.offsets[1:] - before if left else self.offsets[:-1]
            shifts = np.repeat(starts - rows["offsets"][:-1], before)
            self._index = np.arange(rows["ids"].size) + shifts

    def pad(self, values: NDArray[np.int64], fill: int | None) -> NDArray[np.int64]:
        """Values of all tokens, (n_tokens, ...), with `fill` between them."""
        if self._index is None:
            return values
        padded = np.full((self.offsets[-1], *values.shape[1:]), fill, np.int64)
        padded[self._index] = values
        return padded

    def rows(self, name: str, values: NDArray[np.int64], tensors: str | None) -> Any:
        """Padded values as one list for each row, or as an array (n_rows, length, ...)."""
        equal = (self.lengths == self.lengths[0]).all()
        if tensors is None:
            items = values.tolist() if values.ndim == 1 else list(map(tuple, values.tolist()))
            bounds = self.offsets.tolist()
            return [items[a:b] for a, b in itertools.pairwise(bounds)]
        if equal:
            array = values.reshape(len(self.lengths), self.lengths[0], *values.shape[1:])
        elif tensors == "np":
            array = np.empty(len(self.lengths), dtype=object)
            array[:] = np.split(values, self.offsets[1:-1])
            return array
        else:
            raise ValueError(
                f"{name} has rows of {self.lengths.min()} to {self.lengths.max()} tokens: rows of "
                "one tensor must be equally long, so ask for padding=True and truncation=True"
            )
        return _as_tensor(array, tensors)


def _as_tensor(array: NDArray[np.int64], tensors: str) -> Any:
    if tensors == "np":
        return array
    import torch

    return torch.from_numpy(array)


def _vector(values: NDArray[np.int64], tensors: str | None) -> Any:
    return values.tolist() if tensors is None else _as_tensor(values, tensors)


def _details(
    rows: _tokenizer.Rows, layout: _Padding, tokens: dict[int, str], pad_token: str | None
) -> _Details:
    def none_if_special(values: NDArray[np.int64]) -> list[list[int | None]]:
        lists = layout.rows("", layout.pad(values, -1), None)
        return [[None if value < 0 else value for value in row] for row in lists]

    strings = [tokens[id] for id in rows["ids"].tolist()]
    for index, text in rows["matched"].items():
        strings[index] = text
    # Strings go where their numbers go; padding is number -1, the last.
    strings.append(str(pad_token))
    places = layout.rows("", layout.pad(np.arange(rows["ids"].size), -1), None)
    return _Details(
        tokens=[[strings[place] for place in row] for row in places],
        spans=layout.rows("", layout.pad(rows["spans"].reshape(-1, 2), 0), None),
        words=none_if_special(rows["words"]),
        sequences=none_if_special(rows["sequences"]),
    )


def _clean_up(token: str) -> str:
    for old, new in _CLEAN_UP:
        token = token.replace(old, new)
    return token


# ---- Files


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8, and is not at byte {error.start}") from error


def _read_json(files: dict[str, Path], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        return json.loads(_read_text(files[name]))
    except json.JSONDecodeError as error:
        raise ValueError(f"{files[name]} must be JSON: {error}") from error


def _from_json(value: Any) -> Any:
    """Saved tokens, alone or in a list, as str or AddedToken."""
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return AddedToken.of(value) if isinstance(value, dict) and value else value or None


def _parse_vocab(text: str) -> dict[str, int]:
    lines = text.removesuffix("\n").split("\n")
    vocab: dict[str, int] = {}
    for id, line in enumerate(lines):
        token = line.rstrip(_WHITE_SPACE)
        if token in vocab:
            raise ValueError(f"lines {vocab[token] + 1} and {id + 1} hold the same token {token!r}")
        vocab[token] = id
    return vocab


def _read_vocab(path: str | os.PathLike[str]) -> dict[str, int]:
    text = _read_text(Path(path))
    try:
        return _parse_vocab(text)
    except ValueError as error:
        raise ValueError(f"{path} must hold each token once, but {error}") from None


def _check_vocab(vocab: dict[str, int]) -> None:
    try:
        "".join(vocab).encode()
    except (TypeError, UnicodeEncodeError) as error:
        raise ValueError(f"a vocabulary must hold valid Unicode str: {error}") from None
    for token, id in vocab.items():
        if not isinstance(id, int) or not 0 <= id < 2**31:
            raise ValueError(f"a vocabulary maps str to int, 0 to 2**31 - 1, got {token!r}: {id!r}")
    if len(set(vocab.values())) != len(vocab):
        tokens: dict[int, str] = {}
        for token, id in vocab.items():
            if tokens.setdefault(id, token) != token:
                raise ValueError(f"a vocabulary gives each id once, but {tokens[id]!r} and "
                                 f"{token!r} have {id}")  # fmt: skip
