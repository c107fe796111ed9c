"""Vocabularies against HF tokenizers' WordPieceTrainer, id for id, and `fastbert vocab`.

HF numbers "##x" by the order of a hash table that differs from run to run, and equally frequent
pairs are merged in the order of their ids. So it is given the tokens that ours begins with as its
special tokens: that fixes these ids, and all that follows must be equal.
"""

import gzip
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import DATA, NASTY, needs_data

import fastbert
from fastbert import _tokenizer, cli, train_vocab, vocab
from fastbert.readers import TextSource

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def hf_tokenizer(do_lower_case=True, strip_accents=None, tokenize_chinese_chars=True):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(
        lowercase=do_lower_case,
        strip_accents=strip_accents,
        handle_chinese_chars=tokenize_chinese_chars,
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return tokenizer


def tokens_of(tokenizer):
    ids = tokenizer.get_vocab()
    assert sorted(ids.values()) == list(range(len(ids)))
    return sorted(ids, key=ids.get)


def train_hf(texts, vocab_size, text_options, **options):
    tokenizer = hf_tokenizer(**text_options)
    options = {"special_tokens": SPECIAL, "min_frequency": 2, "limit_alphabet": 1000, **options}
    if options["limit_alphabet"] is None:
        del options["limit_alphabet"]
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size, show_progress=False, **options
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokens_of(tokenizer)


def character_counts(texts, text_options):
    tokenizer = hf_tokenizer(**text_options)
    counts = Counter()
    for text in texts:
        normal = tokenizer.normalizer.normalize_str(text)
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal):
            counts.update(word)
    return counts


def is_character(token):
    return len(token.removeprefix("##")) == 1


def assert_as_hf(texts, vocab_size, text_options=None, **options):
    text_options = text_options or {}
    ours = tokens_of(train_vocab(iter(texts), vocab_size, **text_options, **options))

    first = SPECIAL + list(itertools.takewhile(is_character, ours[len(SPECIAL) :]))
    alphabet = [token for token in first if len(token) == 1]
    assert ours[: len(SPECIAL)] == SPECIAL and alphabet == sorted(alphabet)
    start = train_hf(texts, 0, text_options, **options)
    if set(first) != set(start):  # other characters where the limit cuts equally frequent ones
        assert options.get("limit_alphabet", 1000) is not None
        counts = character_counts(texts, text_options)
        counts |= {c[0]: sys.maxsize for c in options.get("initial_alphabet", ())}
        kept = sorted(counts[c] for c in alphabet)
        assert kept == sorted(counts[token] for token in start if len(token) == 1)

    options["limit_alphabet"] = 0  # the alphabet is in `first`, and ties are not its affair
    assert ours == train_hf(texts, vocab_size, text_options, **{**options, "special_tokens": first})
    return ours


def read_lines(name):
    data = (DATA / name).read_bytes()
    return (gzip.decompress(data) if name.endswith(".gz") else data).decode().split("\n")


@needs_data
@pytest.mark.parametrize(
    "name, vocab_size, text_options, options",
    [
        ("corpus/en_novels.txt.gz", 8000, {}, {}),
        ("corpus/de_novels.txt.gz", 5000, {"do_lower_case": False}, {"min_frequency": 5}),
        ("corpus/zh_wiki.txt.gz", 20_000, {}, {}),  # runs out of pairs
        ("corpus/zh_wiki.txt.gz", 8000, {"tokenize_chinese_chars": False}, {"limit_alphabet": 800}),
        ("corpus/ja_soseki.txt.gz", 5000, {}, {"limit_alphabet": None}),
        ("corpus/ntrex/arb.txt.gz", 3000, {}, {"initial_alphabet": ["a", "zwei", "\u65e5"]}),
        ("corpus/ntrex/hin.txt.gz", 3000, {"strip_accents": False}, {}),
        ("corpus/ntrex/vie.txt.gz", 3000, {"do_lower_case": False, "strip_accents": True}, {}),
        ("corpus/ja_soseki.txt.gz", 100, {}, {}),  # there are more characters
    ],
)
def test_real_texts(name, vocab_size, text_options, options):
    lines = read_lines(name)
    every = max(1, sum(map(len, lines)) // 300_000)  # bench_vocab.py takes a whole one
    ours = assert_as_hf(lines[::every], vocab_size, text_options, **options)
    assert len(ours) > 300


# Of two letters, so that most counts are equal and many ways lead to the same token.
few_letters = st.lists(st.text("ab", max_size=9).map(lambda word: f"{word} {word}"), max_size=25)
nasty_texts = st.lists(st.sampled_from(NASTY) | st.text("abc##\u0301\u65e5\u1e9e.\n ", max_size=12))


@settings(deadline=None, max_examples=400)
@given(
    texts=few_letters | nasty_texts,
    vocab_size=st.integers(1, 120),
    min_frequency=st.integers(0, 4),
    limit_alphabet=st.none() | st.integers(0, 12),
    initial_alphabet=st.lists(st.sampled_from("abx\u65e5"), max_size=2),
)
def test_any_texts(texts, vocab_size, **options):
    assert_as_hf(texts, vocab_size, **options)


def test_ties_and_detours():
    random.seed(0)
    every_word = ["".join(letters) for letters in itertools.product("abc", repeat=6)]
    assert_as_hf(every_word, 400, min_frequency=1)
    # Two ways to a token, far apart: its pairs are counted anew on top of what they were.
    for _ in range(20):
        words = ["".join(random.choices("ab", [3, 1], k=random.randint(2, 30))) for _ in range(60)]
        assert_as_hf(words, 1000, min_frequency=1)


@pytest.mark.parametrize("text", ["", "cba cba", "zyx. zyx. a", "\u65e5\u672c\u672c \u65e5"])
def test_equal_without_help_where_hf_gives_the_same_ids_every_time(text):
    theirs = {tuple(train_hf([text], 30, {})) for _ in range(5)}
    assert theirs == {tuple(tokens_of(train_vocab(iter([text]), 30)))}


def test_nothing_but_the_texts_decides(tmp_path, monkeypatch):
    texts = [" ".join(random.Random(i).choices(NASTY, k=3)) for i in range(200)]
    wanted = train_vocab(iter(texts), 400).get_vocab()
    for options in ({"num_threads": 1}, {"num_threads": 7}, {"show_progress": False}):
        assert train_vocab(iter(texts), 400, **options).get_vocab() == wanted
    assert train_vocab(iter(random.sample(texts, 200)), 400).get_vocab() == wanted
    assert train_vocab((texts[i : i + 9] for i in range(0, 200, 9)), 400).get_vocab() == wanted
    monkeypatch.setattr(vocab, "_CHUNK", 10)  # more than one batch
    for n_threads in (1, 3):
        assert train_vocab(iter(texts), 400, num_threads=n_threads).get_vocab() == wanted

    data = "\r\n".join(texts).encode()
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.gz"
    plain.write_bytes(data)
    packed.write_bytes(gzip.compress(data))
    for files in (plain, str(packed), [plain], TextSource(packed)):
        assert train_vocab(files, 400).get_vocab() == wanted
    both = train_vocab([plain, str(packed)], 400).get_vocab()
    assert both == train_vocab((plain, TextSource(packed)), 400).get_vocab()
    assert both == train_vocab(iter(texts * 2), 400).get_vocab()


def test_the_tokenizer_is_whole(tmp_path):
    tokens = [*SPECIAL, "[DOC]", fastbert.AddedToken("<x>", special=True), "a", "[PAD]"]
    tokenizer = train_vocab(
        iter(NASTY * 2), 300, do_lower_case=False, strip_accents=True, special_tokens=tokens
    )
    assert tokens_of(tokenizer)[:8] == [*SPECIAL, "[DOC]", "<x>", "a"]
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__.startswith("BertTokenizer")
    assert theirs.get_vocab() == tokenizer.get_vocab()
    texts = [*NASTY, "[DOC] Hello<x>World caf\u00e9 [MASK]"]
    assert theirs(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert tokenizer.tokenize("[DOC]<x>") == ["[DOC]", "<x>"]


@needs_data
def test_lower_is_what_the_normalizer_does():
    cased = train_vocab(DATA / "corpus/bert_sample_text.txt", 500, do_lower_case=False)
    lower = train_vocab(DATA / "corpus/bert_sample_text.txt", 500)
    assert (lower.do_lower_case, cased.do_lower_case) == (True, False)
    assert "T" in cased.get_vocab() and "T" not in lower.get_vocab()


def test_refuses_bad_input(tmp_path):
    bad, table = tmp_path / "bad.txt", tmp_path / "data.csv"
    bad.write_bytes(b"good\n\xff\n")
    table.write_text("a,b\nx,y\n")
    for error, message, files, options in [
        (FileNotFoundError, "no such file: 'no.txt'; for a list of texts pass iter", "no.txt", {}),
        (FileNotFoundError, "no such file: 'a text'", ["a text", "b"], {}),
        (FileNotFoundError, "no such file: 'xxx", ["x" * 5000], {}),
        (TypeError, "must hold paths, got list", [["a"]], {}),
        (TypeError, "text 1 must be str, got int", iter(["a", 1]), {}),
        (TypeError, "text 2 must be str, got bytes", iter([["a", "b"], [b"c"]]), {}),
        (TypeError, "text 0 must be str, got PosixPath", iter([Path("a.txt")]), {}),
        (TypeError, "surrogate '.ud800'", iter(["a", "b\ud800"]), {}),
        (TypeError, "not iterable", 1, {}),
        (ValueError, "line 2: byte 0xff", bad, {}),
        (ValueError, "which column", table, {}),
        (ValueError, "vocab_size must be at least 1, got 0", iter([]), {"vocab_size": 0}),
        (ValueError, "min_frequency must be .* got -1", iter([]), {"min_frequency": -1}),
        (ValueError, "limit_alphabet must be .* got -1", iter([]), {"limit_alphabet": -1}),
        (ValueError, "num_threads must be .* got 0", iter([]), {"num_threads": 0}),
        (ValueError, r"must have \[UNK\], got \[PAD\]", iter([]), {"special_tokens": ["[PAD]"]}),
    ]:
        with pytest.raises(error, match=message):
            train_vocab(files, **{"vocab_size": 10, **options})
    with pytest.raises(ValueError, match="not a whole gzip file"):
        (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"words " * 1000)[:-20])
        train_vocab(tmp_path / "cut.txt.gz", 10)


def test_an_error_ends_the_merging():
    counts = _tokenizer.WordCounts(lowercase=True, strip_accents=True, chinese_chars=True)
    counts.add([" ".join(map(str, range(10_000))).encode()], 1)
    steps = []

    def interrupt(n_tokens):
        steps.append(n_tokens)
        os.kill(os.getpid(), signal.SIGINT)

    options = {"size": 5000, "min_frequency": 1, "limit_alphabet": 99, "initial_alphabet": ""}
    with pytest.raises(KeyboardInterrupt):
        counts.train(interrupt, special_tokens=[], **options)
    assert len(steps) == 1
    assert len(counts.train(steps.append, special_tokens=[], **options)) == 5000
    assert steps == sorted(steps) and len(steps) > 100


def test_progress(capsys, monkeypatch):
    for shown, lines in ((True, "5 of about 10 texts\n7 texts\n"), (False, "")):
        monkeypatch.setattr(vocab.time, "perf_counter", itertools.count(0, 9).__next__)
        progress = vocab.Progress("texts", shown)
        progress.show(4, None)  # too early
        progress.show(5, 10)
        progress.show(7, None)
        progress.close()
        assert capsys.readouterr().err == lines
    monkeypatch.undo()

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    train_vocab(iter(["some words"]), 30)
    assert "1 texts" in terminal.getvalue() and "tokens" in terminal.getvalue()


# ---- fastbert vocab


def run(*args):
    return cli.main(["vocab", *map(str, args)])


def test_command(tmp_path, capsys):
    texts = ["Das Caf\u00e9 und das Haus", "das Caf\u00e9"]
    (tmp_path / "a.txt").write_text("\n".join(texts), "utf-8")
    (tmp_path / "b.csv").write_text("id,words\n1,haus haus\n", "utf-8")
    (tmp_path / "c.jsonl").write_text('{"id": "x", "words": "das"}\n', "utf-8")
    out = tmp_path / "out"
    files = [tmp_path / "a.txt"]
    assert run(*files, "--out", out, "--size", 40, "--cased", "--threads", 1) == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")
    loaded = fastbert.BertTokenizer.from_pretrained(out)
    assert loaded.get_vocab() == train_vocab(iter(texts), 40, do_lower_case=False).get_vocab()
    assert not loaded.do_lower_case
    metrics = json.loads((out / "metrics.json").read_text())
    expected = {"files": [str(files[0])], "texts": 2, "distinct_words": 5, "tokens": len(loaded)}
    assert {name: metrics[name] for name in expected} == expected

    files += [tmp_path / "b.csv", tmp_path / "c.jsonl"]
    assert run(files[0], "--out", out, "--size", 40) == 1
    assert f"{out} exists already; --overwrite" in capsys.readouterr().err
    options = ("--min-frequency", 1, "--limit-alphabet", 9, "--no-strip-accents", "--overwrite")
    assert run(files[0], "--out", out, "--size", 40, *options) == 0
    wanted = train_vocab(
        iter(texts), 40, strip_accents=False, min_frequency=1, limit_alphabet=9
    ).get_vocab()
    assert fastbert.BertTokenizer.from_pretrained(out).get_vocab() == wanted
    assert run(*files[1:], "--text", "words", "--out", out, "--overwrite") == 0
    assert json.loads((out / "metrics.json").read_text())["texts"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.csv", "c.jsonl", "out"]


def test_command_refuses(tmp_path, capsys):
    (tmp_path / "bad.txt").write_bytes(b"good good good\n\xff\n")
    (tmp_path / "empty.txt").write_bytes(b" \n")
    out = tmp_path / "out"
    for message, *args in [
        ("no.txt does not exist", tmp_path / "no.txt", "--out", out),
        ("line 2: byte 0xff", tmp_path / "bad.txt", "--out", out),
        ("there are no words in", tmp_path / "empty.txt", "--out", out),
        ("cannot be replaced", tmp_path / "bad.txt", "--out", tmp_path, "--overwrite"),
        ("does not exist", tmp_path / "bad.txt", "--out", out / "deeper"),
    ]:
        assert run(*args) == 1
        error = capsys.readouterr().err
        assert error.startswith("fastbert: error: ") and error.count("\n") == 1
        assert message in error
    assert run(tmp_path / "bad.txt", "--errors", "replace", "--out", out) == 0
    assert "good" in fastbert.BertTokenizer.from_pretrained(out).get_vocab()


def test_ctrl_c_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("words " * 100)
    out = tmp_path / "out"
    assert run(tmp_path / "a.txt", "--out", out) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}

    def interrupt(*_):
        raise KeyboardInterrupt

    for place in ("fastbert.vocab.share_read", "fastbert.tokenizer_files.write_files"):
        with monkeypatch.context() as patch:
            patch.setattr(place, interrupt)
            assert run(tmp_path / "a.txt", "--out", out, "--overwrite") == 130
    assert capsys.readouterr().err == "fastbert: interrupted\n" * 2
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


def test_command_reads_standard_input_and_ends_at_ctrl_c(tmp_path):
    command = [sys.executable, "-P", "-m", "fastbert", "vocab", "-", "--out", tmp_path / "out"]
    done = subprocess.run(command, input=b"some words\n", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "vocab.txt").is_file()
    process = subprocess.Popen([*command, "--overwrite"], stdin=subprocess.PIPE, stderr=-1)
    for _ in range(100):
        process.stdin.write(b"x" * (1 << 16) + b"\n")  # blocks until it reads
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert process.stderr.read() == b"fastbert: interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
