"""Corpora on disk hold the tokens of the text, whole, once, and go on where they were stopped."""

import gzip
import json

import numpy as np
import pytest

from fastbert import BertTokenizer
from fastbert.corpus import build_corpus
from fastbert.hygiene import Hygiene
from fastbert.shards import Corpus

MARKS = (".", "!", "?", "'", '"', ")")
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "run", "far", "away", *MARKS)
TOKENIZER = BertTokenizer(
    {t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s"])}
)


def write(path, documents):
    text = "\n\n".join("\n".join(lines) for lines in documents)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def random_documents(seed, n=40):
    rng = np.random.default_rng(seed)
    return [
        [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(rng.integers(1, 9))]
        for _ in range(n)
    ]


def texts(corpus):
    """The documents as lists of token strings, a list a sentence."""
    block = corpus.read(np.arange(len(corpus.lengths)))
    sentences = [
        TOKENIZER.convert_ids_to_tokens(block.tokens[a:b].tolist())
        for a, b in zip(block.sentences, block.sentences[1:], strict=False)
    ]
    return [sentences[a:b] for a, b in zip(block.documents, block.documents[1:], strict=False)]


def tokens(documents):
    return [[TOKENIZER.tokenize(line) for line in document] for document in documents]


def build(files, out, **options):
    return build_corpus(files, TOKENIZER, out, show_progress=False, **options)


def test_every_token_of_every_file_once(tmp_path):
    first, second = random_documents(0), random_documents(1)
    files = [write(tmp_path / "a.txt", first), write(tmp_path / "b.txt.gz", second)]
    corpus = build(files, tmp_path / "c", max_sentence=None, shard_tokens=100)
    assert texts(corpus) == tokens(first + second)
    assert corpus.lengths.tolist() == [sum(map(len, d)) for d in tokens(first + second)]
    picked = corpus.read(np.array([50, 3]))
    assert len(picked.tokens) == corpus.lengths[[50, 3]].sum()


def test_blank_lines_and_lines_without_tokens_are_no_sentences(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n \nthe cat\n\u0001\nsat\n\n\n\u0001\n\na dog\n")
    assert texts(build([path], tmp_path / "c")) == [[["the", "cat"], ["sat"]], [["a", "dog"]]]


def test_rows_of_tables_are_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in ("the cat\nsat", "a dog")))
    assert texts(build([path], tmp_path / "c")) == [[["the", "cat"], ["sat"]], [["a", "dog"]]]


def test_special_tokens_in_text_are_text(tmp_path):
    path = write(tmp_path / "a.txt", [["the [MASK] cat [SEP]"]])
    ids = build([path], tmp_path / "c").read(np.array([0])).tokens
    assert not set(ids.tolist()) & {TOKENIZER.mask_token_id, TOKENIZER.sep_token_id}


def test_long_lines_are_cut_behind_sentences(tmp_path):
    line = "the cat sat . \" a dog saw ! ' ) and a mat ? the dog"
    corpus = build([write(tmp_path / "a.txt", [[line, "a cat . sat"]])], tmp_path / "c",
                   max_sentence=8)  # fmt: skip
    assert [" ".join(s) for s in texts(corpus)[0]] == [
        'the cat sat . "', "a dog saw ! ' )", "and a mat ?", "the dog", "a cat . sat",
    ]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"hygiene": Hygiene("lines", near_duplicates=0.7)}])
def test_goes_on_where_it_was_stopped(tmp_path, monkeypatch, options):
    monkeypatch.setattr("fastbert.corpus._BATCH", 400)
    documents = random_documents(0) + random_documents(0)[:20] + random_documents(1)
    files, options = [write(tmp_path / "a.txt", documents)], {"shard_tokens": 500, **options}
    whole = build(files, tmp_path / "whole", **options)
    assert len(whole.manifest["shards"]) > 3

    n_written = 0

    def stopped(*args):
        nonlocal n_written
        n_written += 1
        if n_written == 3:
            raise KeyboardInterrupt
        return write_shard(*args)

    from fastbert.corpus import _write_shard as write_shard

    monkeypatch.setattr("fastbert.corpus._write_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        build(files, tmp_path / "c", **options)
    with pytest.raises(ValueError, match="is not complete"):
        Corpus(tmp_path / "c")
    monkeypatch.setattr("fastbert.corpus._write_shard", write_shard)
    again = build(files, tmp_path / "c", **options)
    assert texts(again) == texts(whole)
    assert again.manifest["left_out"] == whole.manifest["left_out"]
    assert len(texts(build(files, tmp_path / "c", **options))) == len(whole.lengths)  # made once


def test_other_settings_are_refused(tmp_path):
    path = write(tmp_path / "a.txt", random_documents(0))
    build([path], tmp_path / "c")
    with pytest.raises(ValueError, match="was made with max_sentence = 64, now it is 9"):
        build([path], tmp_path / "c", max_sentence=9)
    write(path, random_documents(0, n=41))
    with pytest.raises(ValueError, match="was made with files"):
        build([path], tmp_path / "c")
    other = BertTokenizer({**TOKENIZER.get_vocab(), "new": len(TOKENIZER)})
    with pytest.raises(ValueError, match="another vocabulary"):
        Corpus(tmp_path / "c").check(other)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\x01\n"])
def test_nothing_to_read_is_refused(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"no documents are left of .*a\.txt"):
        build([tmp_path / "a.txt"], tmp_path / "c")


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"the cat\n\xff sat\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 2: byte 0xff"):
        build([tmp_path / "a.txt"], tmp_path / "c")


LONG = "the cat sat on a mat and saw the dog run far far away from the mat and the cat ."


def test_duplicates_by_document_and_by_line(tmp_path):
    documents = [[LONG, "a cat"], [LONG.upper(), "  a  cat"], ["a cat"], [LONG, "a dog"]]
    path = write(tmp_path / "a.txt", documents)
    by_document = build([path], tmp_path / "d", hygiene=Hygiene("documents"))
    assert texts(by_document) == tokens([documents[0], documents[2], documents[3]])
    assert by_document.manifest["left_out"]["duplicate: documents"] == 1
    by_line = build([path], tmp_path / "l", hygiene=Hygiene("lines"))  # short ones recur by nature
    assert texts(by_line) == tokens([[LONG, "a cat"], ["a cat"], ["a cat"], ["a dog"]])
    assert by_line.manifest["left_out"]["duplicate: lines"] == 2


def test_near_duplicates(tmp_path):
    rng = np.random.default_rng(0)
    words = rng.choice(WORDS[:12], 400)
    changed, other = words.copy(), rng.choice(WORDS[:12], 400)
    changed[[100, 300]] = "!"  # 10 of 396 runs of five words
    documents = [[" ".join(w)] for w in (words, other, changed)]
    path = write(tmp_path / "a.txt", documents)
    corpus = build([path], tmp_path / "c", hygiene=Hygiene(near_duplicates=0.7))
    assert texts(corpus) == tokens(documents[:2])
    assert corpus.manifest["left_out"]["near duplicate: documents"] == 1


def test_lengths(tmp_path):
    path = write(tmp_path / "a.txt", [["the cat sat"], ["a cat"], ["a dog", "saw"], ["the"] * 9])
    corpus = build([path], tmp_path / "c", hygiene=Hygiene(min_tokens=3, max_tokens=8))
    assert texts(corpus) == tokens([["the cat sat"], ["a dog", "saw"]])
    assert corpus.manifest["left_out"] == {
        "shorter than min_tokens: documents": 1,
        "shorter than min_tokens: tokens": 2,
        "longer than max_tokens: documents": 1,
        "longer than max_tokens: tokens": 9,
    }


def test_languages(tmp_path):
    german = ["Dies ist ein deutscher Satz, der von einem Hund und einer Katze handelt."]
    path = write(tmp_path / "a.txt", [[LONG], german])
    corpus = build([path], tmp_path / "c", hygiene=Hygiene(languages=("en",)))
    assert texts(corpus) == tokens([[LONG]])
    left_out = {"language: documents": 1, "language: characters": len(german[0])}
    assert corpus.manifest["left_out"] == left_out
    with pytest.raises(ValueError, match=r"languages must be among .*, got xx"):
        build([path], tmp_path / "d", hygiene=Hygiene(languages=("xx",)))


@pytest.mark.parametrize(
    "options", [{"duplicates": "some"}, {"near_duplicates": 0}, {"min_tokens": 9, "max_tokens": 8}]
)
def test_hygiene_refuses(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        Hygiene(**options)
