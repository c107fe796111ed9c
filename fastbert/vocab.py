"""Training of WordPiece vocabularies. Counting words and merging pairs are C++."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import chain
from typing import Any

from fastbert import _tokenizer
from fastbert.readers import TextSource
from fastbert.tokenizer import AddedToken, BertTokenizer

_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CHUNK = 1 << 18  # characters that a thread counts at a time
_CHUNKS_IN_BATCH = 32

File = str | os.PathLike[str] | TextSource


def train_vocab(
    files_or_iterator: File | Sequence[File] | Iterable[str | Sequence[str]],
    vocab_size: int,
    *,
    do_lower_case: bool = True,
    strip_accents: bool | None = None,
    min_frequency: int = 2,
    limit_alphabet: int | None = 1000,
    tokenize_chinese_chars: bool = True,
    initial_alphabet: Sequence[str] = (),
    special_tokens: Sequence[str | AddedToken] = _SPECIAL_TOKENS,
    num_threads: int | None = None,
    show_progress: bool = True,
    metrics: dict[str, Any] | None = None,
) -> BertTokenizer:
    """A tokenizer with the vocabulary that HF tokenizers' WordPieceTrainer makes of these texts.

    files_or_iterator: a file, or a list or tuple of files: paths (.txt with a line a text, .csv,
    .tsv, .jsonl, .parquet, text ones also .gz) or TextSources. Any other iterable gives the texts
    themselves, str or lists of str; for a list of texts pass `iter(texts)`.

    vocab_size: tokens, unless special tokens and characters are more already or pairs that occur
    min_frequency times run out. limit_alphabet: the characters that are kept, the most frequent
    ones; None for all. initial_alphabet: characters that come before these. num_threads: None for
    as many as there are CPUs for this process. metrics: a dict to put the numbers of the run in.

    The order of the texts and num_threads change nothing. In HF tokenizers chance decides ties,
    by the order of its hash tables: the ids of characters inside words ("##a") and with them which
    of equally frequent pairs is merged first; which of equally frequent characters are kept. Here
    the ids follow the sorted words and the smaller code points are kept.

    Raises FileNotFoundError, TypeError for what is not text, ValueError for bad options and files.
    """
    n_threads = _tokenizer.n_available_cpus() if num_threads is None else num_threads
    for name, value, least in (
        ("vocab_size", vocab_size, 1),
        ("min_frequency", min_frequency, 0),
        ("limit_alphabet", sys.maxsize if limit_alphabet is None else limit_alphabet, 0),
        ("num_threads", n_threads, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    specials = [str(AddedToken.of(token)) for token in special_tokens]
    if "[UNK]" not in specials:
        raise ValueError(f"special_tokens must have [UNK], got {', '.join(specials)}")

    sources = _sources(files_or_iterator)
    texts = files_or_iterator if sources is None else chain.from_iterable(sources)
    counts = _tokenizer.WordCounts(
        lowercase=do_lower_case,
        strip_accents=do_lower_case if strip_accents is None else strip_accents,
        chinese_chars=tokenize_chinese_chars,
    )
    start = time.perf_counter()
    n_texts = 0
    with closing(Progress("texts", show_progress)) as progress:
        for n_texts, batch in _batches(texts):  # type: ignore[arg-type]
            counts.add(batch, n_threads)
            share = share_read(sources or [])
            progress.show(n_texts, round(n_texts / share) if share else None)
    counted = time.perf_counter()
    with closing(Progress("tokens", show_progress)) as progress:
        tokens = counts.train(
            lambda n_tokens: progress.show(n_tokens, vocab_size),
            size=vocab_size,
            min_frequency=min_frequency,
            limit_alphabet=sys.maxsize if limit_alphabet is None else limit_alphabet,
            initial_alphabet="".join(character[:1] for character in initial_alphabet),
            special_tokens=specials,
        )
    if metrics is not None:
        metrics.update(
            texts=n_texts,
            distinct_words=len(counts),
            tokens=len(tokens),
            seconds_counting=round(counted - start, 3),
            seconds_merging=round(time.perf_counter() - counted, 3),
            threads=n_threads,
        )
    return BertTokenizer(
        {token: id for id, token in enumerate(tokens)},
        do_lower_case=do_lower_case,
        strip_accents=strip_accents,
        tokenize_chinese_chars=tokenize_chinese_chars,
        extra_special_tokens=[t for t in special_tokens if str(t) not in _SPECIAL_TOKENS],
    )


def _sources(files: Any) -> list[TextSource] | None:
    """The files; None where it is not files that were given but texts."""
    if isinstance(files, str | os.PathLike | TextSource):
        files = [files]
    if not isinstance(files, list | tuple):
        return None
    return [file if isinstance(file, TextSource) else _source(file) for file in files]


def _source(path: Any) -> TextSource:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"a list must hold paths, got {type(path).__name__}; for a list of texts pass iter(...)"
        )
    try:
        return TextSource(os.fspath(path))
    except OSError:  # a text can be too long for a name
        raise FileNotFoundError(
            f"no such file: {os.fspath(path)[:100]!r}; for a list of texts pass iter(...)"
        ) from None


def share_read(sources: list[TextSource]) -> float | None:
    """How much of all files has been read, 0 to 1; None where that cannot be known."""
    if any(source.is_stdin for source in sources):
        return None
    sizes = [source.path.stat().st_size for source in sources]
    read = sum(
        size * (source.share_read() or 0) for source, size in zip(sources, sizes, strict=True)
    )
    return read / sum(sizes) if read else None


def _batches(texts: Iterable[str | Sequence[str]]) -> Iterator[tuple[int, list[bytes]]]:
    """The number of texts so far, and UTF-8 for threads to share out: lines of one text each."""
    batch: list[bytes] = []
    chunk: list[str] = []
    n_texts = n_characters = 0
    for item in texts:
        for text in item if isinstance(item, list | tuple) else (item,):
            if not isinstance(text, str):
                raise TypeError(f"text {n_texts} must be str, got {type(text).__name__}")
            n_texts += 1
            chunk.append(text)
            n_characters += len(text) + 1
            if n_characters >= _CHUNK:
                batch.append(_utf8(chunk))
                chunk, n_characters = [], 0
                if len(batch) == _CHUNKS_IN_BATCH:
                    yield n_texts, batch
                    batch = []
    yield n_texts, [*batch, _utf8(chunk)]


def _utf8(texts: list[str]) -> bytes:
    try:
        return "\n".join(texts).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise TypeError(f"texts must be valid Unicode, got the lone surrogate {half!a}") from None


class Progress:
    """How far it is, on stderr: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, unit: str, shown: bool) -> None:
        self._unit = unit
        self._next_line = time.perf_counter() + (10 if shown else float("inf"))
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(unit=f" {unit}", dynamic_ncols=True)

    def show(self, done: int, total: int | None) -> None:
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
        elif time.perf_counter() >= self._next_line:
            self._next_line += 10
            of_total = f" of about {total:,}" if total else ""
            print(f"{done:,}{of_total} {self._unit}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
