"""Examples to train on, out of files, Hugging Face datasets and lists.

A source is a file (.csv, .tsv, .jsonl, .txt, .parquet, text ones also .gz; CoNLL for tokens;
SQuAD's JSON for questions), an object with `column_names` that gives dicts (a `datasets.Dataset`),
or a list of dicts, tuples or texts.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from fastbert.readers import RecordFile

# Columns that are taken for a part of an example when none is named: the first that is there.
_USUAL = {
    "text": (
        "text", "sentence", "content", "review", "document", "body", "tweet", "title",
        "sentence1", "premise", "question", "question1", "text1", "text_a", "query", "#1 string",
    ),
    "text_pair": (
        "text_pair", "sentence2", "hypothesis", "passage", "sentence", "question2", "text2",
        "text_b", "answer", "#2 string",
    ),
    "label": (
        "label", "labels", "class", "category", "target", "sentiment", "score", "similarity",
        "rating", "stars", "quality", "gold_label", "relatedness_score",
    ),
    "words": ("tokens", "words", "text"),
    "tags": ("tags", "ner_tags", "labels", "ner", "pos_tags", "label"),
    "id": ("id",),
    "question": ("question",),
    "context": ("context", "passage", "text"),
    "answers": ("answers", "answer"),
}  # fmt: skip
_PAIR_FIRST = (
    "text1", "sentence1", "premise", "question1", "text_a", "query", "#1 string", "question",
    "text", "sentence",
)  # fmt: skip


class MissingColumn(ValueError):
    """No column is there for a part of the examples."""

    def __init__(self, part: str, message: str) -> None:
        super().__init__(message)
        self.part = part


Source = str | PathLike[str] | Iterable[Any]


@dataclass
class Examples:
    """columns: a list of values for each part ("text", "text_pair", "label", ...), of equal
    lengths. name: of the file. where: of each row, "line 5". chosen: the columns they came from,
    guessed: those parts that nobody named. names: of the labels, where the source has numbers for
    them and says what they mean."""

    name: str
    columns: dict[str, list[Any]]
    where: list[str]
    chosen: dict[str, str] = field(default_factory=dict)
    guessed: list[str] = field(default_factory=list)
    names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.where)

    def error(self, row: int, message: str) -> ValueError:
        return ValueError(f"{self.name}, {self.where[row]}: {message}")

    def said(self) -> str:
        """What was read, for people."""
        parts = [
            f"{part} {column!r}{' (a guess)' if part in self.guessed else ''}"
            for part, column in self.chosen.items()
        ]
        return f"{self.name}: {len(self):,} examples; {', '.join(parts)}"


def read_examples(
    source: Source,
    parts: Sequence[str],
    columns: Mapping[str, str | None] | None = None,
    *,
    optional: Sequence[str] = (),
    format: str | None = None,
    errors: str = "strict",
) -> Examples:
    """Read the parts of all examples. columns: what parts are called, where that is not guessed.

    optional: parts that may be left out. Raises ValueError that names file and row or column.
    """
    named = {part: column for part, column in (columns or {}).items() if column is not None}
    name, records, names = _open(source, parts, format, errors)
    found: Examples | None = None
    for where, record in records:
        if found is None:
            found = Examples(name, {}, [])
            _choose(found, list(record), parts, named, optional)
            if names is not None:
                label = found.chosen.get("label") or found.chosen.get("tags")
                found.names = names(label)
        found.where.append(where)
        for part, column in found.chosen.items():
            if record.get(column) is None:
                raise found.error(-1, f"column {column!r} is missing")
            value = record[column]
            if part in ("text", "text_pair", "question", "context") and not isinstance(value, str):
                wrong = f"column {column!r} must be text, got {type(value).__name__}"
                raise found.error(-1, wrong)
            found.columns[part].append(value)
    if found is None:
        raise ValueError(f"{name} is empty: it has no rows")
    return found


def _choose(
    found: Examples,
    columns: list[str],
    parts: Sequence[str],
    named: Mapping[str, str],
    optional: Sequence[str],
) -> None:
    """Which column each part is in."""
    free = [column for column in columns if column not in named.values()]
    for part in parts:
        column = named.get(part)
        if column is not None and column not in columns:
            it_has = ", ".join(columns)
            raise MissingColumn(part, f"{found.name} has no column {column!r}; it has {it_has}")
        if column is None:
            usual = _USUAL[part]
            if part == "text" and "text_pair" in parts:
                usual = (*_PAIR_FIRST, *usual)
            lower = {name.lower(): name for name in reversed(free)}
            column = next((lower[name] for name in usual if name in lower), None)
            if column is None and part in optional:
                continue
            if column is None:
                option = "--" + part.replace("_", "-")
                raise MissingColumn(
                    part,
                    f"which column of {found.name} is the {part}? Name it with {option}; "
                    f"it has {', '.join(columns)}",
                )
            free.remove(column)
            found.guessed.append(part)
        found.chosen[part] = column
        found.columns[part] = []


def _open(source: Source, parts: Sequence[str], format: str | None, errors: str) -> Any:
    """The source's name, its rows and, where it can tell, what numbers in a column stand for."""
    if isinstance(source, str | PathLike):
        path = Path(fspath(source))
        suffixes = [s.lower() for s in path.suffixes if s.lower() != ".gz"]
        last = suffixes[-1] if suffixes else ""
        if format in (None, "squad") and "answers" in parts and last == ".json":
            return str(path), _squad(path), None
        is_conll = last in (".conll", ".bio", ".iob", ".iob2", ".conll2003", ".txt")
        if format == "conll" or (format is None and "tags" in parts and is_conll):
            return str(path), _conll(RecordFile(path, format="txt", errors=errors)), None
        file = RecordFile(path, format=format, errors=errors)
        return file.name, file.records(), None
    features = getattr(source, "features", None)
    name = "the data set" if hasattr(source, "column_names") else "the list"
    return name, _rows(source, parts), (lambda column: _names(features, column))


def _names(features: Any, column: str | None) -> list[str] | None:
    """The names of a ClassLabel of Hugging Face's datasets, or of a sequence of them."""
    if not isinstance(features, Mapping) or column not in features:
        return None
    feature = features[column]
    feature = getattr(feature, "feature", feature)
    names = getattr(feature, "names", None)
    return None if names is None else list(names)


def _rows(source: Iterable[Any], parts: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for i, row in enumerate(source):
        where = f"row {i} (the first is 0)"
        if isinstance(row, str):
            row = (row,)
        if isinstance(row, Mapping):
            yield where, dict(row)
        elif isinstance(row, Sequence):
            if len(row) > len(parts):
                wanted = ", ".join(parts)
                raise ValueError(f"the list, {where}: wanted ({wanted}), got {len(row)} values")
            # (text, label) where there may be a pair
            names = parts if len(row) == len(parts) else [p for p in parts if p != "text_pair"]
            yield where, dict(zip(names, row, strict=False))
        else:
            raise ValueError(
                f"the list, {where}: wanted a dict, tuple or text, got {type(row).__name__}"
            )


def _conll(file: RecordFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Sentences of a line a word, the word first and its tag last, blank lines between."""
    words: list[str] = []
    tags: list[str] = []
    start = 1
    for number, line in file.lines():
        line = line.rstrip("\r\n")
        fields = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or fields[0] == "-DOCSTART-":
            if words:
                yield f"line {start}", {"tokens": words, "tags": tags}
            words, tags, start = [], [], number + 1
            continue
        if len(fields) < 2 or not fields[-1].strip():
            raise ValueError(f"{file.name}, line {number}: wanted a word and its tag, got {line!r}")
        words.append(fields[0])
        tags.append(fields[-1].strip())
    if words:
        yield f"line {start}", {"tokens": words, "tags": tags}


def _squad(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Questions of a file in SQuAD's layout, 1.1 or 2.0."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        articles = json.loads(data.decode("utf-8"))["data"]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not SQuAD's JSON: {error!r}") from None
    for i, article in enumerate(articles):
        for j, paragraph in enumerate(article.get("paragraphs", [])):
            for k, asked in enumerate(paragraph.get("qas", [])):
                where = f"article {i}, paragraph {j}, question {k} (the first is 0)"
                try:
                    answers = [(a["text"], a["answer_start"]) for a in asked["answers"]]
                    yield (
                        where,
                        {
                            "id": str(asked["id"]),
                            "question": asked["question"],
                            "context": paragraph["context"],
                            "answers": {
                                "text": [text for text, _ in answers],
                                "answer_start": [start for _, start in answers],
                            },
                        },
                    )
                except (KeyError, TypeError) as error:
                    raise ValueError(f"{path}, {where}: not SQuAD's layout: {error!r}") from None
