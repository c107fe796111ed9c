"""A tokenizer's files: vocab.txt, tokenizer.json and the JSON files beside them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from fastbert.files import write_atomically

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
                 "mask_token")  # fmt: skip
_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "added_tokens.json")  # fmt: skip

# What ends a line of a vocabulary file besides its line end: Unicode's White_Space.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


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


# ---- Vocabularies


def read_vocab(path: str | os.PathLike[str], strip: bool = False) -> dict[str, int]:
    """Ids of the tokens of a vocab.txt: the numbers of their lines, from 0.

    strip: take the lines without white space at both ends, as `str.strip` has it.
    """
    text = _read_text(Path(path))
    try:
        return _parse_vocab(text, strip)
    except ValueError as error:
        raise ValueError(f"{path} must hold each token once, but {error}") from None


def _parse_vocab(text: str, strip: bool = False) -> dict[str, int]:
    lines = text.removesuffix("\n").split("\n")
    vocab: dict[str, int] = {}
    for id, line in enumerate(lines):
        token = line.strip() if strip else line.rstrip(_WHITE_SPACE)
        if token in vocab:
            raise ValueError(f"lines {vocab[token] + 1} and {id + 1} hold the same token {token!r}")
        vocab[token] = id
    return vocab


def check_vocab(vocab: dict[str, int]) -> None:
    """Refuse what is no str, no id, or an id given twice."""
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


# ---- Reading


def find_files(name_or_path: str | os.PathLike[str], subfolder: str, **hub: Any) -> dict[str, Path]:
    """The files of a folder, of a single file, or of a repository of the hub, by name.

    hub: arguments of huggingface_hub.snapshot_download.
    """
    path = Path(name_or_path)
    if not path.exists():
        from huggingface_hub import snapshot_download

        prefix = f"{subfolder}/" if subfolder else ""
        patterns = [prefix + name for name in _FILES]
        path = Path(snapshot_download(str(name_or_path), allow_patterns=patterns, **hub))
    if path.is_dir():
        path = path / subfolder
        files = {name: path / name for name in _FILES if (path / name).is_file()}
    else:
        files = {"tokenizer.json" if path.suffix == ".json" else "vocab.txt": path}
    if "vocab.txt" not in files and "tokenizer.json" not in files:
        raise ValueError(f"{path} must hold vocab.txt or tokenizer.json, and holds neither")
    return files


def read_files(files: dict[str, Path]) -> dict[str, Any]:
    """Arguments of BertTokenizer, among others that it does not know."""
    config = _read_json(files, "tokenizer_config.json")
    saved = _read_json(files, "tokenizer.json")
    decoder = config.get("added_tokens_decoder")
    if decoder is None:
        for name, value in _read_json(files, "special_tokens_map.json").items():
            config[name] = {**value, "special": True} if isinstance(value, dict) else value
    for name in (*SPECIAL_NAMES, "extra_special_tokens", "additional_special_tokens"):
        config[name] = _from_json(config.get(name))
        if config[name] is None:
            del config[name]
    if decoder is None:
        special = {str(config[name]) for name in SPECIAL_NAMES if name in config}
        added: dict[int, Any] = {
            id: AddedToken(content, special=content in special)
            for content, id in _read_json(files, "added_tokens.json").items()
        }
        added.update({token["id"]: token for token in saved.get("added_tokens", [])})
    else:
        added = {int(id): token for id, token in decoder.items()}
    config["added_tokens_decoder"] = {id: AddedToken.of(token) for id, token in added.items()}
    config["vocab"] = files.get("vocab.txt")
    if saved:
        model = saved.get("model", {})
        if model.get("type", "WordPiece") != "WordPiece":
            raise ValueError(f"tokenizer.json must hold a WordPiece model, not {model['type']}")
        config["vocab"] = model["vocab"]
        for side, part in (("padding_side", "padding"), ("truncation_side", "truncation")):
            if saved.get(part):
                config.setdefault(side, saved[part].get("direction", "right").lower())
    return config


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


# ---- Writing


def tokenizer_json(
    config: dict[str, Any],
    vocab: dict[str, int],
    added: dict[int, AddedToken],
    unknown: str,
    cls_sep: tuple[int, int],
) -> dict[str, Any]:
    """What HF tokenizers calls a tokenizer.json.

    config: what tokenizer_config.json is to hold. added: by id. cls_sep: ids.
    """

    def piece(kind: str, id: str, type_id: int) -> dict[str, Any]:
        return {kind: {"id": id, "type_id": type_id}}

    cls, sep = (added[id].content for id in cls_sep)
    single = [piece("SpecialToken", cls, 0), piece("Sequence", "A", 0),
              piece("SpecialToken", sep, 0)]  # fmt: skip
    pair = [*single, piece("Sequence", "B", 1), piece("SpecialToken", sep, 1)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, **dataclasses.asdict(token)} for id, token in sorted(added.items())
        ],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": config["tokenize_chinese_chars"],
            "strip_accents": config["strip_accents"],
            "lowercase": config["do_lower_case"],
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": pair,
            "special_tokens": {
                token: {"id": token, "ids": [id], "tokens": [token]}
                for token, id in zip((cls, sep), cls_sep, strict=True)
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": unknown,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
    }


def write_files(folder: Path, config: dict[str, Any], saved: dict[str, Any]) -> tuple[str, ...]:
    """Write tokenizer_config.json, tokenizer.json and, where lines give the same ids, vocab.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
        "tokenizer.json": json.dumps(saved, ensure_ascii=False, indent=2),
    }
    vocab = saved["model"]["vocab"]
    lines = "".join(f"{token}\n" for token in sorted(vocab, key=vocab.__getitem__))
    with contextlib.suppress(ValueError):
        if _parse_vocab(lines) == vocab:
            files["vocab.txt"] = lines
    for name, content in files.items():
        with write_atomically(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8", newline="\n")
    return tuple(str(folder / name) for name in files)
