"""What is left out of a corpus: duplicates, other languages, documents too short or too long."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbert.shards import Block, chosen, open_array

_LEAST_BYTES = 64  # of a line that is looked up among those before: shorter ones recur by nature
_SHINGLE = 5  # tokens whose sequence is one element of a document's set, for MinHash


@dataclass(frozen=True)
class Hygiene:
    """What is left out of a corpus.

    duplicates: "keep" all, or of documents ("documents") or of lines of at least 64 bytes ("lines")
    that are equal but for case and white space, keep the first. near_duplicates: the Jaccard
    similarity of two documents' sets of five tokens, above 0 to 1, from which the later one is
    left out (MinHash; needs datasketch); None keeps them. min_tokens, max_tokens: of a document.
    languages: codes such as "en", which documents may be in (needs py3langid).
    """

    duplicates: str = "keep"
    near_duplicates: float | None = None
    min_tokens: int = 1
    max_tokens: int | None = None
    languages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.duplicates not in ("keep", "documents", "lines"):
            raise ValueError(
                f"duplicates must be 'keep', 'documents' or 'lines', got {self.duplicates!r}"
            )
        near = self.near_duplicates
        if near is not None and not 0 < near <= 1:
            raise ValueError(f"near_duplicates must be above 0 and at most 1, got {near}")
        least, most = self.min_tokens, self.max_tokens
        if least < 1 or (most is not None and most < least):
            raise ValueError(f"min_tokens must be from 1 to max_tokens = {most}, got {least}")


class Cleaner:
    """Leaves out what `hygiene` says, and counts it."""

    def __init__(self, hygiene: Hygiene, left_out: Counter[str]) -> None:
        self.hygiene = hygiene
        self.left_out = left_out
        self.new_hashes: list[int] = []  # since the last shard
        self.new_signatures: list[NDArray[Any]] = []
        self._hashes: set[int] = set()
        if hygiene.languages:
            self._language_of = _language_of(hygiene.languages)
        if hygiene.near_duplicates is not None:
            self._minhash, self._similar = _minhash(hygiene.near_duplicates)

    def remember(self, folder: Path, number: int) -> None:
        """What a shard that was written before has to tell later ones."""
        if self.hygiene.duplicates != "keep":
            self._hashes.update(open_array(folder, number, "hashes").tolist())
        if self.hygiene.near_duplicates is not None:
            for values in open_array(folder, number, "signatures"):
                self._insert(values)

    def texts(self, documents: list[list[str]]) -> list[list[str]]:
        """Those to tokenise."""
        if self.hygiene.languages:
            documents = [d for d in documents if self._keep(d, self._in_language(d), "language")]
        if self.hygiene.duplicates == "documents":
            documents = [
                d for d in documents if self._keep(d, self._is_new("\n".join(d)), "duplicate")
            ]
        elif self.hygiene.duplicates == "lines":
            documents = [self._new_lines(d) for d in documents]
        return documents

    def tokens(self, block: Block) -> Block:
        """Those to keep, by what they are in tokens; none that are empty."""
        lengths = np.diff(block.sentences[block.documents])
        keep = lengths > 0
        for reason, wrong in (
            ("shorter than min_tokens", lengths < self.hygiene.min_tokens),
            ("longer than max_tokens", lengths > (self.hygiene.max_tokens or np.inf)),
        ):
            self._count(reason, keep & wrong, lengths)
            keep &= ~wrong
        if self.hygiene.near_duplicates is not None:
            bounds = block.sentences[block.documents]
            near = np.zeros_like(keep)
            for i in np.flatnonzero(keep).tolist():
                near[i] = self._is_near(block.tokens[bounds[i] : bounds[i + 1]])
            self._count("near duplicate", near, lengths)
            keep &= ~near
        return block if keep.all() else chosen(block, keep)

    def _count(self, reason: str, which: NDArray[np.bool_], lengths: NDArray[np.int64]) -> None:
        if which.any():
            self.left_out[f"{reason}: documents"] += int(which.sum())
            self.left_out[f"{reason}: tokens"] += int(lengths[which].sum())

    def _keep(self, document: list[str], keep: bool, reason: str) -> bool:
        if not keep:
            self.left_out[f"{reason}: documents"] += 1
            self.left_out[f"{reason}: characters"] += sum(map(len, document))
        return keep

    def _new_lines(self, document: list[str]) -> list[str]:
        kept = []
        for line in document:
            if len(line.encode()) < _LEAST_BYTES or self._is_new(line):
                kept.append(line)
            else:
                self.left_out["duplicate: lines"] += 1
                self.left_out["duplicate: characters"] += len(line)
        return kept

    def _is_new(self, text: str) -> bool:
        data = " ".join(text.split()).casefold().encode()
        value = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
        if value in self._hashes:
            return False
        self._hashes.add(value)
        self.new_hashes.append(value)
        return True

    def _in_language(self, document: list[str]) -> bool:
        return self._language_of(" ".join(document)[:5000]) in self.hygiene.languages

    def _is_near(self, tokens: NDArray[Any]) -> bool:
        shingles = np.zeros(max(1, len(tokens) - _SHINGLE + 1), np.uint64)
        for i in range(min(_SHINGLE, len(tokens))):  # a polynomial of the tokens, modulo 2**64
            part = tokens[i : i + len(shingles)].astype(np.uint64)
            shingles = shingles * np.uint64(0x9E3779B97F4A7C15) + part + np.uint64(1)
        values = np.unique(shingles * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(32))
        signature = self._minhash.copy()
        signature.update_batch(values.tolist())
        if self._similar.query(signature):
            return True
        self.new_signatures.append(signature.hashvalues)
        self._similar.insert(len(self._similar.keys), signature)
        return False

    def _insert(self, values: NDArray[Any]) -> None:
        signature = self._minhash.copy()
        signature.hashvalues = np.array(values)
        self._similar.insert(len(self._similar.keys), signature)


def _minhash(threshold: float) -> tuple[Any, Any]:
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise ValueError("near duplicates need datasketch: pip install datasketch") from None
    return MinHash(hashfunc=int), MinHashLSH(threshold=threshold)


def _language_of(languages: Sequence[str]) -> Callable[[str], str]:
    try:
        import py3langid
    except ImportError:
        raise ValueError("languages need py3langid: pip install py3langid") from None
    known = {language for language, _ in py3langid.rank("")}
    if unknown := sorted(set(languages) - known):
        raise ValueError(
            f"languages must be among {', '.join(sorted(known))}, got {', '.join(unknown)}"
        )
    return lambda text: py3langid.classify(text)[0]
