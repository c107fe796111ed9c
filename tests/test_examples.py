"""Examples out of files, data sets and lists, and what is said of those that cannot be read."""

import gzip
import json
from types import SimpleNamespace

import pytest

from fastbert.examples import read_examples

ROWS = [("fine", "good"), ("awful", "bad")]
EXPECTED = {"text": ["fine", "awful"], "label": ["good", "bad"]}


def test_the_same_from_all_formats(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = "".join(f"{text}\t{label}\n" for text, label in [("sentence", "label"), *ROWS])
    rows = [{"sentence": text, "label": label} for text, label in ROWS]
    (tmp_path / "a.tsv").write_text(table)
    (tmp_path / "a.csv").write_text(table.replace("\t", ","))
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(table.encode()))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        assert read_examples(path, ("text", "label")).columns == EXPECTED, path.name
    for source in (rows, ROWS, (row for row in ROWS)):
        assert read_examples(source, ("text", "label")).columns == EXPECTED


def test_hugging_face_data_sets():
    """As `datasets` has them, which is not installed here: an iterable with features."""

    class Rows(list):
        column_names = ("sentence", "label")

        @property
        def features(self):
            return {"label": SimpleNamespace(names=["bad", "good"])}

    found = read_examples(Rows([{"sentence": "fine", "label": 1}]), ("text", "label"))
    assert found.columns == {"text": ["fine"], "label": [1]}
    assert found.names == ["bad", "good"]


# The usual files: GLUE's pairs, MRPC's column names, an unrelated column beside.
@pytest.mark.parametrize(
    "columns, expected",
    [
        ("sentence1,sentence2,score", ("sentence1", "sentence2", "score")),
        ("Quality,#1 ID,#2 ID,#1 String,#2 String", ("#1 String", "#2 String", "Quality")),
        ("question,sentence,label", ("question", "sentence", "label")),
        ("idx,premise,hypothesis,gold_label", ("premise", "hypothesis", "gold_label")),
    ],
)
def test_guesses_pairs_and_says_so(tmp_path, columns, expected):
    path = tmp_path / "a.csv"
    path.write_text(f"{columns}\n" + ",".join("1" for _ in columns.split(",")) + "\n")
    found = read_examples(path, ("text", "text_pair", "label"))
    assert tuple(found.chosen.values()) == expected
    assert f"text {expected[0]!r} (a guess)" in found.said()


def test_conll(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text("-DOCSTART- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nPeter\tB-PER\n")
    found = read_examples(path, ("words", "tags"))
    assert found.columns["words"] == [["EU", "rejects"], ["Peter"]]
    assert found.columns["tags"] == [["B-ORG", "O"], ["B-PER"]]
    assert found.where == ["line 3", "line 7"]


def test_squad(shared):
    path = shared / "data/squad/dev_articles.json.gz"
    found = read_examples(path, ("id", "question", "context", "answers"))
    assert len(found) == 627
    for context, answers in zip(found.columns["context"], found.columns["answers"], strict=True):
        text, start = answers["text"][0], answers["answer_start"][0]
        assert context[start : start + len(text)] == text


BAD = {
    "missing column": ("a.tsv", b"text\tlabel\na\tb\n", {"label": "kind"}, "has no column 'kind'"),
    "no guess": ("a.tsv", b"x\ty\na\tb\n", {}, "which column of .*a.tsv is the text"),
    "short row": ("a.tsv", b"text\tlabel\na\tb\nc\n", {}, "a.tsv, line 3: wanted 2 fields"),
    "empty": ("a.tsv", b"", {}, "a.tsv is empty"),
    "header only": ("a.csv", b"text,label\n", {}, "a.csv is empty"),
    "not utf-8": ("a.tsv", b"text\tlabel\n\xff\tb\n", {}, "line 2: byte 0xff .* is not UTF-8"),
    "not json": ("a.jsonl", b'{"text": 1\n', {}, "line 1: not JSON"),
    "no label": ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "b"}\n', {}, "line 2: column"),
    "no text": ("a.jsonl", b'{"text": 5, "label": 1}\n', {}, "must be text, got int"),
    "half a gzip": ("a.tsv.gz", gzip.compress(b"text\tlabel\na\tb\n")[:-9], {}, "not a whole gzip"),
}


@pytest.mark.parametrize("name, content, columns, message", BAD.values(), ids=list(BAD))
def test_bad_files_are_named(tmp_path, name, content, columns, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / name, ("text", "label"), columns)


def test_other_bad_input(tmp_path):
    (tmp_path / "a.conll").write_text("EU B-ORG\nrejects\n")
    with pytest.raises(ValueError, match=r"a\.conll, line 2: wanted a word and its tag"):
        read_examples(tmp_path / "a.conll", ("words", "tags"))
    (tmp_path / "a.json").write_text('{"data": [{"paragraphs": [{"qas": [{"id": 1}]}]}]}')
    with pytest.raises(ValueError, match=r"a\.json, article 0, paragraph 0, question 0"):
        read_examples(tmp_path / "a.json", ("id", "question", "context", "answers"))
    with pytest.raises(ValueError, match=r"wanted \(text, label\), got 3 values"):
        read_examples([("a", "b", "c")], ("text", "label"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_examples(tmp_path / "none.tsv", ("text", "label"))
