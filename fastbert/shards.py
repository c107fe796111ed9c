"""A tokenised corpus on disk: arrays that are mapped into memory, never loaded whole."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbert.files import write_atomically
from fastbert.tokenizer import BertTokenizer

MANIFEST = "corpus.json"
_ARRAYS = ("tokens", "sentences", "documents")


@dataclass(frozen=True)
class Block:
    """Documents in memory. Sentence i is tokens sentences[i] to sentences[i + 1], document i
    sentences documents[i] to documents[i + 1]; both arrays start at 0."""

    tokens: NDArray[Any]
    sentences: NDArray[np.int64]
    documents: NDArray[np.int64]


class Corpus:
    """A folder that `build_corpus` has written.

    Raises FileNotFoundError where it is none, ValueError where it is not complete.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise FileNotFoundError(f"{self.folder} is no corpus: it has no {MANIFEST}")
        self.manifest = manifest
        if not self.manifest["complete"]:
            raise ValueError(f"{self.folder} is not complete: build it again to go on with it")
        names = range(len(self.manifest["shards"]))
        self._shards = [[open_array(self.folder, n, array) for array in _ARRAYS] for n in names]
        self._first = np.cumsum([0, *(len(documents) - 1 for *_, documents in self._shards)])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(n_documents,): tokens in each."""
        return np.concatenate([np.diff(ends[docs]) for _, ends, docs in self._shards])

    def check(self, tokenizer: BertTokenizer) -> None:
        """Raise ValueError unless it was made with this tokenizer."""
        if self.manifest["settings"]["vocabulary"] != vocabulary_hash(tokenizer):
            raise ValueError(f"{self.folder} was made with another vocabulary")

    def read(self, documents: NDArray[np.int64]) -> Block:
        """These documents, in this order."""
        tokens, lengths, counts = [], [], []
        shards = np.searchsorted(self._first, documents, "right") - 1
        places = documents - self._first[shards]
        for shard, place in zip(shards.tolist(), places.tolist(), strict=True):
            ids, sentences, of_documents = self._shards[shard]
            ends = sentences[of_documents[place] : of_documents[place + 1] + 1]
            tokens.append(ids[ends[0] : ends[-1]])
            lengths.append(np.diff(ends))
            counts.append(len(ends) - 1)
        return Block(
            np.concatenate(tokens), offsets(np.concatenate(lengths)), offsets(np.array(counts))
        )


def vocabulary_hash(tokenizer: BertTokenizer) -> str:
    """Of all that decides which ids a text gets."""
    told = (
        sorted(tokenizer.get_vocab().items()),
        tokenizer.do_lower_case,
        tokenizer.strip_accents,
        tokenizer.tokenize_chinese_chars,
        tokenizer.compat,
    )
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def chosen(block: Block, keep: NDArray[np.bool_]) -> Block:
    counts, lengths = np.diff(block.documents), np.diff(block.sentences)
    sentences = np.repeat(keep, counts)
    tokens = block.tokens[np.repeat(sentences, lengths)]
    return Block(tokens, offsets(lengths[sentences]), offsets(counts[keep]))


def offsets(lengths: NDArray[Any]) -> NDArray[np.int64]:
    out = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=out[1:])
    return out


def array_path(folder: Path, number: int, array: str) -> Path:
    return folder / f"{number:05d}.{array}.npy"


def open_array(folder: Path, number: int, array: str) -> NDArray[Any]:
    path = array_path(folder, number, array)
    try:
        return np.asarray(np.load(path, mmap_mode="r"))  # an array, whose slices are made faster
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a corpus' description: {error}") from None


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with write_atomically(folder / MANIFEST) as path:
        path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
