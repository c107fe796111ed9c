"""BERT's tokenizer: WordPiece in C++ with the interface of transformers.BertTokenizerFast."""

from __future__ import annotations

import dataclasses
import inspect
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastbert import _tokenizer, google_compat, tokenizer_files
from fastbert.encoding import (
    BatchEncoding,
    Details,
    Layout,
    as_packed,
    as_tensor,
    check_lengths,
    check_texts,
    copied,
    find_details,
    is_arrow,
    one_of,
    padding_strategy,
    truncation_strategy,
)
from fastbert.token_table import TokenTable
from fastbert.tokenizer_files import SPECIAL_NAMES, AddedToken

if TYPE_CHECKING:
    import torch

    from fastbert.packing import PackedBatch

Texts = str | Sequence[str] | Sequence[Sequence[str]] | Sequence[Sequence[Sequence[str]]]

_NO_LIMIT = int(1e30)  # model_max_length where nothing says otherwise, as in transformers


class BertTokenizer(TokenTable):
    """Text to the ids of a BERT vocabulary and back.

    vocab: a vocabulary file (one token a line, its id the number of the line), or a dict from token
    to id. strip_accents: None for the value of do_lower_case. Special tokens that the vocabulary
    lacks are added behind it, but unk_token must be there.

    compat: "google" tokenizes as google-research/bert's tokenization.py does, which finds no
    special tokens in a text; transformers tokenizes as ever with what such a tokenizer has saved.

    Raises ValueError when compat is not known, or the vocabulary cannot be read, holds a token or
    an id twice, or has no unk_token.
    """

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
        compat: str = "hf",
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
        self.compat = one_of("compat", compat, ("hf", "google"))
        google = compat == "google"
        if not isinstance(vocab, dict):
            vocab = tokenizer_files.read_vocab(vocab, strip=google)
        self._vocab = dict(vocab)
        tokenizer_files.check_vocab(self._vocab)
        self.do_lower_case = do_lower_case
        self.tokenize_chinese_chars = tokenize_chinese_chars
        self.strip_accents = strip_accents
        self.model_max_length = _NO_LIMIT if model_max_length is None else model_max_length
        self.padding_side = one_of("padding_side", padding_side, ("right", "left"))
        self.truncation_side = one_of("truncation_side", truncation_side, ("right", "left"))
        self.model_input_names = list(model_input_names)
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.split_special_tokens = split_special_tokens or google
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
        max_chars = google_compat.MAX_WORD_CHARS if self.compat == "google" else 100
        self._pieces = _tokenizer.WordPiece(list(self._vocab.items()), self._unknown, max_chars)
        self._refresh()

    def _refresh(self) -> None:
        """Make the C++ tokenizer, which never changes: a new one takes up new tokens."""
        lower = self.do_lower_case
        strip = lower if self.strip_accents is None else self.strip_accents
        self._sees_sigmas = self.compat == "google" and lower
        tables = _tokenizer.UnicodeTables()
        if self.compat == "google":
            tables = google_compat.unicode_tables(lower, strip)
            lower, strip = False, True
        self._core = _tokenizer.Tokenizer(
            self._pieces,
            tables=tables,
            lowercase=lower,
            strip_accents=strip,
            chinese_chars=self.tokenize_chinese_chars,
            added=[
                _tokenizer.AddedToken(
                    content=self._seen(content),
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
        self._encode_query = self._core.query_function()
        # HF tokenizers shows a token that is normalised as what it matches, from then on.
        for content, token in self._settings.items():
            if token.normalized:
                self._normal[self._added[content]] = self._core.normalize(self._seen(content))
        self._tokens = {id: token for token, id in self.get_vocab().items()} | self._normal
        self._decoded: dict[int, str] = {}

    def _seen(self, texts: Any, errors: str = "strict") -> Any:
        """Texts, in lists or not, as the C++ tokenizer is to see them."""
        return google_compat.with_lower_sigmas(texts, errors) if self._sees_sigmas else texts

    def __getstate__(self) -> dict[str, Any]:
        made = ("_pieces", "_core", "_encode_query", "_tokens", "_decoded")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._build()

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
        batched = check_texts(text, text_pair, is_split_into_words)
        texts: Any = text if batched else [text]
        pairs: Any = text_pair if batched else [text_pair] if text_pair else None
        strategy = truncation_strategy(truncation, padding, max_length)
        pad_to = padding_strategy(padding)
        side = one_of("padding_side", padding_side or self.padding_side, ("right", "left"))
        one_of("return_tensors", return_tensors, (None, "pt", "np"))
        length = self.model_max_length if max_length is None else max_length
        if max_length is None and length > 10**20:  # nothing to truncate or pad to
            strategy = "do_not_truncate"
            pad_to = "do_not_pad" if pad_to == "max_length" else pad_to
        check_lengths(strategy, pad_to, length, stride, pad_to_multiple_of)
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
        texts, pairs = copied(self._seen(texts)), copied(self._seen(pairs))

        def encode(details: bool) -> tuple[_tokenizer.Rows, Layout]:
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
            )
            target = length if pad_to == "max_length" else None if pad_to == "longest" else 0
            return rows, Layout(rows, target, pad_to_multiple_of, side == "left")

        def details() -> Details:
            return find_details(*encode(details=True), tokens, pad_token)

        rows, layout = encode(return_offsets_mapping)
        # By name: the column of the rows, and what padding has in its place.
        columns = {"input_ids": ("ids", self.pad_token_id)}
        if return_token_type_ids:
            columns["token_type_ids"] = "type_ids", 0
        if return_attention_mask:
            columns["attention_mask"] = "mask", 0
        if return_special_tokens_mask:
            columns["special_tokens_mask"] = "special", 1
        if return_offsets_mapping:
            columns["offset_mapping"] = "spans", 0
        data: dict[str, Any] = {
            name: layout.rows(name, column, fill or 0, return_tensors)
            for name, (column, fill) in columns.items()
        }
        if return_length:
            data["length"] = as_tensor(layout.lengths, return_tensors)
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = as_tensor(rows.samples(), return_tensors)
        elif not batched and return_tensors is None:
            data.update({name: data[name][0] for name in columns})
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
        texts: Any,
        text_pairs: Any = None,
        *,
        max_length: int = 512,
        truncation: bool | str = "longest_first",
        num_threads: int | None = None,
        dtype: torch.dtype | None = None,
        pin_memory: bool = False,
        errors: str = "strict",
    ) -> PackedBatch:
        """Encode a batch of texts, or of pairs, without padding; no texts give an empty batch.

        texts, text_pairs: lists of str, of bytes or memoryview (UTF-8), or Arrow string arrays
        (whatever has `__arrow_c_array__` or `__arrow_c_stream__`); none of them is copied.
        num_threads: None for as many as there are CPUs for this process. dtype: torch.int64 (None)
        or torch.int32. pin_memory: for `to(device, non_blocking=True)`. errors: bytes that are not
        UTF-8 are refused ("strict") or become U+FFFD ("replace"). All token tensors are rows of one
        (3, n_tokens) buffer.
        """
        rows = self._encode_packed(texts, text_pairs, max_length, truncation, num_threads, errors)
        return as_packed(rows, dtype, pin_memory)

    def encode_arrays(
        self,
        texts: Any,
        text_pairs: Any = None,
        *,
        max_length: int = 512,
        truncation: bool | str = "longest_first",
        offsets: bool = False,
        num_threads: int | None = None,
    ) -> tuple[NDArray[Any], ...]:
        """`pack` without torch, and with little in front of the C++ code: for single queries.

        texts: also one str. Gives input_ids, (n_tokens,) int64, and cu_seqlens, (n_texts + 1,)
        int32; with `offsets` also the characters that each token stands for, (n_tokens, 2) int64.
        """
        is_query = type(texts) is str and text_pairs is None and truncation == "longest_first"
        if is_query and not offsets and not self._sees_sigmas:
            left = self.truncation_side == "left"
            found = self._encode_query(texts, max_length, self.split_special_tokens, left)
            if found is not None:
                return found
        rows = self._encode_packed(
            [texts] if isinstance(texts, str) else texts, text_pairs, max_length, truncation,
            num_threads, details=offsets,
        )  # fmt: skip
        arrays = rows.column("ids"), rows.offsets(dtype=np.dtype(np.int32))
        return (*arrays, rows.column("spans")) if offsets else arrays

    def _encode_packed(
        self,
        texts: Any,
        text_pairs: Any,
        max_length: int,
        truncation: bool | str,
        num_threads: int | None,
        errors: str = "strict",
        details: bool = False,
    ) -> _tokenizer.Rows:
        self._check_pack(texts, text_pairs, max_length, num_threads)
        return self._core.encode(
            self._seen(texts, errors),
            self._seen(text_pairs, errors),
            bytes=True,
            errors=errors,
            split_special_tokens=self.split_special_tokens,
            truncation=truncation_strategy(truncation),
            max_length=max_length,
            truncate_left=self.truncation_side == "left",
            details=details,
            num_threads=num_threads or 0,
        )

    def _check_pack(
        self, texts: Any, text_pairs: Any, max_length: int, num_threads: int | None
    ) -> None:
        for name, value in (("texts", texts), ("text_pairs", text_pairs)):
            if value is None and name == "text_pairs":
                continue
            if not (isinstance(value, list | tuple) or is_arrow(value)):
                raise TypeError(
                    f"{name} must be a list of str or an Arrow array, got {type(value).__name__}"
                )
        if text_pairs is not None and not is_arrow(texts) and len(texts) != len(text_pairs):
            raise ValueError(f"{len(texts)} texts do not go with {len(text_pairs)} text_pairs")
        if max_length is None or max_length < self.num_special_tokens_to_add(pair=True):
            raise ValueError(f"max_length must leave room for [CLS] and [SEP], got {max_length}")
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, got {num_threads}")

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
        files = tokenizer_files.find_files(
            pretrained_model_name_or_path,
            subfolder,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        config = {
            **tokenizer_files.read_files(files),
            "name_or_path": str(pretrained_model_name_or_path),
        }
        known = config.keys() & inspect.signature(cls).parameters
        return cls(**{**{name: config[name] for name in known}, **kwargs})

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[str, ...]:
        """Write tokenizer.json, tokenizer_config.json and vocab.txt, which transformers reads too.

        There is no vocab.txt where its lines could not give the ids back. Gives the paths.
        """
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
            **{name: getattr(self, name) for name in SPECIAL_NAMES},
            **({} if self.compat == "hf" else {"compat": self.compat}),
        }
        added = {self._added[content]: token for content, token in self._settings.items()}
        saved = tokenizer_files.tokenizer_json(
            config, self._vocab, added, self._unknown, self._cls_sep
        )
        return tokenizer_files.write_files(Path(save_directory), config, saved)
