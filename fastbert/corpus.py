"""Text files tokenised once, into arrays on disk that training reads without loading them."""

from __future__ import annotations

import copy
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbert.files import write_atomically
from fastbert.hygiene import Cleaner, Hygiene
from fastbert.readers import TextSource
from fastbert.shards import (
    Block,
    Corpus,
    array_path,
    offsets,
    read_manifest,
    vocabulary_hash,
    write_manifest,
)
from fastbert.tokenizer import BertTokenizer
from fastbert.vocab import Progress, share_read

_BATCH = 1 << 22  # characters that are tokenised at a time
_ENDS = tuple(".!?\u2026\u3002\uff01\uff1f\uff0e\u061f\u06d4\u0964\u0965")
_CLOSING = tuple("\"'\u201d\u2019)]*\xbb\u300d\u300f\uff09")


def build_corpus(
    files: Sequence[str | os.PathLike[str] | TextSource],
    tokenizer: BertTokenizer,
    out: str | os.PathLike[str],
    *,
    hygiene: Hygiene | None = None,
    max_sentence: int | None = 64,
    shard_tokens: int = 1 << 27,
    num_threads: int | None = None,
    show_progress: bool = True,
) -> Corpus:
    """Tokenise files into `out`, or go on where an earlier call was stopped; made once only.

    files: .txt and .txt.gz with a sentence or paragraph a line and an empty line between
    documents; the end of a file ends a document. Of tables (.csv, .tsv, .jsonl, .parquet) a row is
    a document. max_sentence: a line of more tokens is cut behind the punctuation that ends
    sentences; None: a line is always one. shard_tokens: at least so many in each file of arrays
    but the last; one of them is in memory at a time. Tokens such as [MASK] in text are text.

    `out`/corpus.json tells the settings, what each shard holds, and what `hygiene` has left out.
    Raises ValueError where `out` is of other settings, and where nothing is left.
    """
    hygiene = hygiene or Hygiene()
    sources = [f if isinstance(f, TextSource) else TextSource(os.fspath(f)) for f in files]
    if any(source.is_stdin for source in sources):
        raise ValueError("a corpus must be read again to go on with it: name files, not -")
    folder = Path(out)
    settings = json.loads(
        json.dumps(
            {
                "vocabulary": vocabulary_hash(tokenizer),
                "files": [[source.name, source.path.stat().st_size] for source in sources],
                "columns": [source.column for source in sources],
                "max_sentence": max_sentence,
                "shard_tokens": shard_tokens,
                **asdict(hygiene),
            }
        )
    )
    manifest = read_manifest(folder) or {"settings": settings, "complete": False, "shards": []}
    for name, wanted in settings.items():
        if manifest["settings"].get(name) != wanted:
            raise ValueError(
                f"{folder} was made with {name} = {_short(manifest['settings'].get(name))}, now it "
                f"is {_short(wanted)}: name another folder or remove it"
            )
    if manifest["complete"]:
        return Corpus(folder)

    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    shards = manifest["shards"]
    work = Cleaner(hygiene, Counter(shards[-1]["left_out"] if shards else {}))
    for number in range(len(shards)):
        work.remember(folder, number)
    n_read = shards[-1]["documents_read"] if shards else 0
    documents = islice(_documents(sources), n_read, None)
    reader = copy.copy(tokenizer)
    reader.split_special_tokens = True
    ends, closing_ids = (_table(tokenizer, marks) for marks in (_ENDS, _CLOSING))
    parts: list[Block] = []
    with closing(Progress("documents", show_progress)) as progress:
        for batch in _batches(documents):
            n_read += len(batch)
            part = _tokenised(work.texts(batch), reader, num_threads)
            if max_sentence is not None:
                part = _cut(part, max_sentence, ends, closing_ids)
            parts.append(work.tokens(part))
            if sum(len(part.tokens) for part in parts) >= shard_tokens:
                shards.append(_write_shard(folder, len(shards), parts, work, n_read, tokenizer))
                write_manifest(folder, manifest)
                parts = []
            share = share_read(sources)
            progress.show(n_read, round(n_read / share) if share else None)
    if any(len(part.tokens) for part in parts):
        shards.append(_write_shard(folder, len(shards), parts, work, n_read, tokenizer))
    if not shards:
        names = ", ".join(source.name for source in sources)
        why = dict(work.left_out) or "there is no text"
        raise ValueError(f"no documents are left of {names}: {why}")
    totals = {key: sum(s[key] for s in shards) for key in ("tokens", "sentences", "documents")}
    manifest |= {
        "complete": True,
        **totals,
        "documents_read": n_read,
        "left_out": dict(work.left_out),
        "seconds": round(time.perf_counter() - start, 3),
    }
    write_manifest(folder, manifest)
    return Corpus(folder)


def _documents(sources: Sequence[TextSource]) -> Iterator[list[str]]:
    """The lines of each document, none of them empty; a document may have none."""
    for source in sources:
        if source.format != "txt":
            for text in source:
                yield [line for line in map(str.strip, re.split(r"[\r\n]+", text)) if line]
            continue
        lines: list[str] = []
        for line in map(str.strip, source):
            if line:
                lines.append(line)
            elif lines:
                yield lines
                lines = []
        if lines:
            yield lines


def _batches(documents: Iterator[list[str]]) -> Iterator[list[list[str]]]:
    batch: list[list[str]] = []
    n_characters = 0
    for document in documents:
        batch.append(document)
        n_characters += sum(map(len, document))
        if n_characters >= _BATCH:
            yield batch
            batch, n_characters = [], 0
    if batch:
        yield batch


def _tokenised(
    documents: list[list[str]], tokenizer: BertTokenizer, num_threads: int | None
) -> Block:
    """Lines without a token are left out."""
    lines = [line for document in documents for line in document]
    ids, bounds = tokenizer.encode_arrays(lines, truncation=False, num_threads=num_threads)
    bounds = bounds.astype(np.int64)
    inside = np.ones(len(ids), bool)
    inside[bounds[:-1]] = inside[bounds[1:] - 1] = False  # [CLS], [SEP]
    lengths = np.diff(bounds) - 2
    seen = offsets(lengths > 0)[offsets(np.array([len(d) for d in documents], np.int64))]
    return Block(ids[inside], offsets(lengths[lengths > 0]), seen)


def _cut(block: Block, longest: int, ends: NDArray[Any], closing_ids: NDArray[Any]) -> Block:
    """Sentences of more than `longest` tokens cut behind those that end one."""
    lengths = np.diff(block.sentences)
    ending, closes = ends[block.tokens], closing_ids[block.tokens]
    for _ in range(3):  # quotation marks and brackets behind an end are of it
        ending[1:] |= ending[:-1] & closes[1:]
    ending[:-1] &= ~(ending[1:])
    ending &= np.repeat(lengths > longest, lengths)
    bounds = np.union1d(np.flatnonzero(ending) + 1, block.sentences)
    documents = np.searchsorted(bounds, block.sentences[block.documents])
    return Block(block.tokens, bounds, documents)


def _table(tokenizer: BertTokenizer, marks: Sequence[str]) -> NDArray[np.bool_]:
    """(vocab_size,): whether an id is one of these tokens."""
    table = np.zeros(len(tokenizer), bool)
    vocab = tokenizer.get_vocab()
    table[[vocab[m] for mark in marks for m in (mark, f"##{mark}") if m in vocab]] = True
    return table


def _write_shard(
    folder: Path,
    number: int,
    parts: list[Block],
    work: Cleaner,
    n_read: int,
    tokenizer: BertTokenizer,
) -> dict[str, Any]:
    """Files that count only once the manifest names the shard."""
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.int32
    lengths = np.concatenate([np.diff(part.sentences) for part in parts])
    counts = np.concatenate([np.diff(part.documents) for part in parts])
    arrays: dict[str, NDArray[Any]] = {
        "tokens": np.concatenate([part.tokens.astype(dtype) for part in parts]),
        "sentences": offsets(lengths),
        "documents": offsets(counts),
    }
    if work.hygiene.duplicates != "keep":
        arrays["hashes"] = np.array(work.new_hashes, np.uint64)
    if work.hygiene.near_duplicates is not None:
        arrays["signatures"] = np.array(work.new_signatures)
    for name, array in arrays.items():
        with write_atomically(array_path(folder, number, name)) as path, open(path, "wb") as file:
            np.save(file, array)
    work.new_hashes, work.new_signatures = [], []
    return {
        "tokens": len(arrays["tokens"]),
        "sentences": len(lengths),
        "documents": len(counts),
        "documents_read": n_read,
        "left_out": dict(work.left_out),
    }


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
