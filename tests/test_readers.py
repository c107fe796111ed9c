"""Texts of every format, and one clear line for everything that is not as it should be."""

import csv
import gzip
import io
import json
import sys

import pytest

from fastbert.readers import TextSource

TEXTS = [
    "plain",
    "",
    "a\tb",
    'says "hi", twice',
    "naïve 東京 🎉",
    "u+2028 \u2028 stays",
    " spaces ",
]


def write(path, data):
    data = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def as_csv(rows):
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue()


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_txt_has_a_text_a_line(tmp_path, suffix, newline):
    path = tmp_path / f"a{suffix}"
    assert list(TextSource(write(path, "".join(t + newline for t in TEXTS)))) == TEXTS
    assert list(TextSource(write(path, newline.join(TEXTS)))) == TEXTS  # no end to the last line
    assert list(TextSource(write(path, "\ufeffone\n\n\n"))) == ["one", "", ""]
    assert list(TextSource(write(path, ""))) == []


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_csv_is_rfc_4180(tmp_path, suffix):
    texts = [*TEXTS, "two\nlines", "two\r\nlines", "x" * 200_000]
    rows = [["id", "text", "label"], *([i, text, 0] for i, text in enumerate(texts))]
    source = TextSource(write(tmp_path / f"a{suffix}", "\ufeff" + as_csv(rows)))
    assert (source.column, source.guessed) == ("text", True)
    assert list(source) == texts
    assert list(source) == texts  # again from the start
    assert next(iter(TextSource(source.path, column="label"))) == "0"


def test_tsv_splits_at_tabs_alone(tmp_path):
    texts = ['"open', "a,b", "", "\u2028"]
    lines = ["sentence\tlabel", *(f"{text}\t1" for text in texts)]
    source = TextSource(write(tmp_path / "a.tsv", "\n".join(lines) + "\n"))
    assert (source.column, list(source)) == ("sentence", texts)


def test_jsonl(tmp_path):
    rows = "".join(json.dumps({"n": i, "body": text}) + "\n" for i, text in enumerate(TEXTS))
    source = TextSource(write(tmp_path / "a.jsonl.gz", rows))
    assert (source.column, list(source)) == ("body", TEXTS)


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_parquet(tmp_path, kind):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = pa.array(TEXTS * 2000)
    texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(getattr(pa, kind)())
    tags = pa.array([["x"]] * len(texts))  # a list of strings is no text
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"tags": tags, "said": texts}), path, row_group_size=999)
    source = TextSource(path)
    assert (source.column, list(source)) == ("said", TEXTS * 2000)
    assert source.share_read() == 1


def test_stdin_is_txt(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n\nb\n")))
    source = TextSource("-")
    assert source.share_read() is None
    assert list(source) == ["a", "", "b"]
    with pytest.raises(ValueError, match="not as csv"):
        TextSource("-", format="csv")


def test_format_overrides_the_name(tmp_path):
    path = write(tmp_path / "train.en.gz", "text\tb\n")
    assert list(TextSource(path, format="txt")) == ["text\tb"]
    with pytest.raises(ValueError, match=r"not clear .* --format$"):
        TextSource(path)


@pytest.mark.parametrize(
    "header, row, column",
    [
        ("label text sentence", "x y z", "text"),
        ("id Sentence", "7 y", "Sentence"),
        ("id score said", "7 0.5 hello", "said"),
        ("one two", "a b", None),
        ("text1 text2", "a b", None),
        ("id score", "1 2", None),
    ],
)
def test_guesses_a_column_or_asks(tmp_path, header, row, column):
    data = f"{header}\n{row}\n".replace(" ", "\t")
    path = write(tmp_path / "a.tsv", data)
    if column:
        assert TextSource(path).column == column
    else:
        with pytest.raises(ValueError, match=f"--text; it has {', '.join(header.split())}$"):
            TextSource(path)


def test_share_read_rises_to_one(tmp_path):
    source = TextSource(write(tmp_path / "a.txt", "0123456789\n" * 100_000))
    texts = iter(source)
    for _ in range(50_000):
        next(texts)
    assert 0.45 < source.share_read() < 0.55
    list(texts)
    assert source.share_read() == 1


@pytest.mark.parametrize(
    "name, data, message",
    [
        (
            "a.txt",
            b"fine\nbad \xff\n",
            "line 2: byte 0xff at position 5 is not UTF-8; --err",
        ),
        ("a.csv", b"text\nfine\n\xe9t\xe9\n", "line 3: byte 0xe9 at position 1 is not UTF-8"),
        ("a.csv", 'text,n\nfine,1\n"two\nlines",1\nshort\n', "line 5: wanted 2 fields, .* got 1"),
        ("a.csv", 'text,n\nfine,1\n"open,2\n', "line 3: not CSV: unexpected end of data"),
        ("a.csv", "text,n\n", "is empty: it has no rows"),
        ("a.csv", "", "is empty: it has no rows"),
        ("a.tsv", "text\tn\na\t1\n\n", "line 3: wanted 2 fields, as in the header, got 1"),
        ("a.tsv", "n\ttext\n1\ta\tb\n", "line 2: wanted 2 fields, as in the header, got 3"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', "line 2: column 'text' is missing"),
        ("a.jsonl", '{"text": "a"}\n{"n": 1}\n', "line 2: column 'text' is missing"),
        ("a.jsonl", '{"text": "a"}\n{"text": 1}\n', "line 2: column 'text' holds int, not text"),
        ("a.jsonl", '{"text": "a"}\n{"text"\n', "line 2: not JSON: Expecting ':'"),
        ("a.jsonl", "[1]\n", "line 1: wanted a JSON object, got list"),
        ("a.jsonl", '{"text": "a \\ud83d"}\n', r"line 1: '\\ud83d' is half a character; --errors"),
        ("a.txt.gz", gzip.compress(b"text\n" * 99)[:-9], "is not a whole gzip file"),
    ],
)
def test_bad_input_is_named(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    with pytest.raises(ValueError, match=rf"^{path}.*{message}"):
        list(TextSource(path))


def test_bad_parquet_is_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["a", None], "n": [1, 2]}), path)
    with pytest.raises(ValueError, match=r"row 1 \(the first is 0\): column 'text' is missing"):
        list(TextSource(path))
    with pytest.raises(ValueError, match="column 'n' does not hold text"):
        list(TextSource(path, column="n"))
    with pytest.raises(ValueError, match=r"no column 'x'; it has text, n$"):
        TextSource(path, column="x")

    not_utf8 = pa.array([b"a", b"\xff"]).view(pa.string())
    parquet.write_table(pa.table({"text": not_utf8}), path)
    with pytest.raises(ValueError, match=r"row 1 .* byte 0xff"):
        list(TextSource(path))
    assert list(TextSource(path, errors="replace")) == ["a", "\ufffd"]

    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        TextSource(path)


def test_errors_replace_goes_on(tmp_path):
    path = write(tmp_path / "a.txt", b"bad \xff\nfine\n")
    assert list(TextSource(path, errors="replace")) == ["bad \ufffd", "fine"]
    path = write(tmp_path / "a.jsonl", '{"text": "a \\ud83d"}\n{"text": "\\ud83c\\udf89"}\n')
    assert list(TextSource(path, errors="replace")) == ["a \ufffd", "🎉"]


def test_missing_column_and_file(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tn\na\t1\n")
    with pytest.raises(ValueError, match=r"has no column 'txt'; it has text, n$"):
        TextSource(path, column="txt")
    with pytest.raises(ValueError, match="no columns, so no 'text'"):
        TextSource(path, format="txt", column="text")
    with pytest.raises(FileNotFoundError, match=r"b\.tsv does not exist"):
        TextSource(tmp_path / "b.tsv")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        TextSource(tmp_path, format="txt")
