"""A vocabulary: tokens and their ids, special and added ones, and ids back to text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, cast

from fastbert.tokenizer_files import SPECIAL_NAMES, AddedToken

# The decoder of HF tokenizers rewrites each token so, clean_up_tokenization_spaces the whole text.
_CLEAN_UP = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
             (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


class TokenTable:
    """What of a tokenizer knows no text yet; a subclass makes, in `_refresh`, what reads it."""

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

    clean_up_tokenization_spaces: bool
    extra_special_tokens: list[str]

    _vocab: dict[str, int]
    _unknown: str
    # By content: the id and the latest settings of added tokens; which were ever special.
    _added: dict[str, int]
    _settings: dict[str, AddedToken]
    _special: set[str]
    # By id: every token as it is shown; what of the text it gives, once it was asked for.
    _tokens: dict[int, str]
    _decoded: dict[int, str]

    def _refresh(self) -> None:
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """Number of tokens without the added ones; `len` counts all."""
        return len(self._vocab)

    def __len__(self) -> int:
        return len(self._vocab.keys() | self._added.keys())

    def get_vocab(self) -> dict[str, int]:
        """All tokens and their ids."""
        return {**self._vocab, **self._added}

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens that have a name, such as `cls_token`, and are set."""
        return {name: token for name in SPECIAL_NAMES if (token := getattr(self, name)) is not None}

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
            elif name in SPECIAL_NAMES:
                setattr(self, name, str(AddedToken.of(value)))
                tokens.append(value)
            else:
                wanted = (*SPECIAL_NAMES, "extra_special_tokens")
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
            text = _clean_up(text)
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
                pieces.append(_clean_up_token(token))
                continue
            if id not in self._decoded:
                inner = token.startswith("##")
                self._decoded[id] = _clean_up_token(token[2:] if inner else " " + token)
            pieces.append(self._decoded[id])
        return pieces


def _id_property(name: str) -> property:
    def get(tokenizer: TokenTable) -> int | None:
        token = getattr(tokenizer, name)
        return None if token is None else tokenizer._id(token)

    def put(tokenizer: TokenTable, id: int | None) -> None:
        setattr(tokenizer, name, None if id is None else tokenizer.convert_ids_to_tokens(id))

    return property(get, put, doc=f"The id of {name}, None where that is None.")


for _name in SPECIAL_NAMES:
    setattr(TokenTable, f"{_name}_id", _id_property(_name))


def _clean_up(text: str) -> str:
    for old, new in _CLEAN_UP:
        text = text.replace(old, new)
    return text


def _clean_up_token(token: str) -> str:
    return _clean_up(token).replace(" do not", " don't")
