"""BertTokenizer(..., compat="google") against a restatement of google-research/bert's own."""
# ruff: noqa: RUF001 (Greek letters are meant as such)

import copy
import gzip
import itertools
import json
import pickle
import random
import unicodedata

import pytest
import transformers
from google_tokenization import google_pieces, google_tokens, google_words
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import DATA, DETAILS, NASTY, UNCASED_VOCAB, needs_data

from fastbert.tokenizer import AddedToken, BertTokenizer

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHARACTERS = [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
ASSIGNED = [c for c in CHARACTERS if unicodedata.category(c) not in ("Cn", "Co")]
LOWER = [True, False]


@pytest.fixture(scope="module")
def vocab():
    """Each assigned character is a token, at the beginning of a word and inside."""
    tokens = itertools.chain(SPECIALS, ASSIGNED, ("##" + c for c in ASSIGNED))
    return {token: id for id, token in enumerate(tokens)}


@pytest.fixture(scope="module")
def tokenizers(vocab):
    return {lower: BertTokenizer(vocab, do_lower_case=lower, compat="google") for lower in LOWER}


def assert_as_google(tokenizer, texts, vocab=None):
    """The same tokens and words; offsets at which the letters of each piece can be seen."""
    lower, vocab = tokenizer.do_lower_case, vocab or tokenizer.get_vocab()
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    for row, text in enumerate(texts):
        pieces = [google_pieces(word, vocab) for word in google_words(text, lower)]
        expected = list(itertools.chain(*pieces))
        assert encoded.tokens(row) == expected, ascii(text)
        words = [i for i, word in enumerate(pieces) for _ in word]
        assert encoded.word_ids(row) == words, ascii(text)
        for token, (begin, end) in zip(expected, encoded["offset_mapping"][row], strict=True):
            assert 0 <= begin < end <= len(text), ascii(text)
            if token != "[UNK]":
                seen = "".join(google_words(text[begin:end], lower))
                assert letters(token.removeprefix("##")) in letters(seen), (ascii(text), token)


def letters(text):
    """Without what depends on the text around: final sigmas, and marks that change places."""
    return "".join(c for c in text.replace("ς", "σ") if not unicodedata.combining(c))


# ---- Characters


@pytest.mark.parametrize("lower", LOWER)
def test_every_code_point(tokenizers, vocab, lower):
    """Alone, at both ends and inside; unassigned or private at an end, and cased one in 16."""
    others = sorted(set(CHARACTERS).difference(ASSIGNED))[:: 1 if lower else 16]
    texts = [f"a{c}b {c} {c}a a{c}" for c in ASSIGNED] + [f"a{c}" for c in others]
    texts = [" ".join(texts[i : i + 512]) for i in range(0, len(texts), 512)]
    packed = tokenizers[lower].pack(texts, max_length=10**6)
    for text, row in zip(texts, packed.split(1), strict=True):
        expected = [vocab[token] for token in google_tokens(text, vocab, lower)]
        if row.input_ids.tolist()[1:-1] != expected:
            assert_as_google(tokenizers[lower], text.split(" "))
            pytest.fail(f"differs in {text!a}")


@pytest.mark.parametrize("options", [{"tokenize_chinese_chars": False}, {"strip_accents": False}])
def test_options_that_google_lacks(vocab, options):
    """What they take away is what they say, and nothing else."""
    with_, without = (
        BertTokenizer(vocab, compat="google", **options_).tokenize("ΟΔΟΣ日é本 x")
        for options_ in (options, {})
    )
    assert without == ["ο", "##δ", "##ο", "##ς", "日", "e", "本", "x"]
    if "strip_accents" in options:
        assert with_ == ["é" if token == "e" else token for token in without]
    else:
        assert with_ == ["ο", "##δ", "##ο", "##ς", "##日", "##e", "##本", "x"]


def test_final_sigma(tokenizers):
    """With letters, ignored and removed characters, and ends of words on both sides."""
    assert [c for c in CHARACTERS if len(c.lower()) != 1] == ["\u0130"], "sigmas are out of place"
    around = ["", "a", "Σ", ".", "'", "\u0301", "\xad", "\x00", "\u0130", "\u02b0", " ", "日", "1"]
    sides = ["".join(side) for side in itertools.product(around, around)]
    texts = [f"{left}Σ{right}" for left in sides for right in random.Random(0).sample(sides, 40)]
    texts += ["ΑΣ.Α", "ΑΣ\u2028Α", "ΑΣ\x85Α", "ΑΣ\tΑ", "Σ" * 5, "ΑΣς", "\u0130\u0130ΑΣ Σ"]
    for lower in LOWER:
        assert_as_google(tokenizers[lower], texts)
    assert tokenizers[True].tokenize("ΟΔΟΣ ΟΣΟ") == ["ο", "##δ", "##ο", "##ς", "ο", "##σ", "##ο"]


@pytest.mark.parametrize("lower", LOWER)
def test_nasty_texts(tokenizers, lower):
    assert_as_google(tokenizers[lower], NASTY)
    assert_as_google(BertTokenizer(UNCASED_VOCAB, lower, compat="google"), NASTY)


@pytest.mark.parametrize("character", ["a", "\u00e9", "\uac01", "\U0002b820"])
def test_long_words(tokenizers, character):
    texts = [f"x{character * n} y" for n in (32, 33, 65, 66, 67, 98, 99, 100, 198, 199, 200, 201)]
    for lower in LOWER:
        assert_as_google(tokenizers[lower], texts)
    for n in (100, 101, 199, 200, 201):
        tokens = tokenizers[True].tokenize("\u00e9" * n)
        assert (tokens == ["[UNK]"]) == (n > 200)


_TEXTS = st.lists(
    st.characters(exclude_categories=["Cs"])
    | st.sampled_from("abIΣΑ \t.'\u0301\u0323\u0345\u0315\u302e\u1100\u1161\u11a8\uac01\u65e5")
    | st.sampled_from(["[MASK]", "##", "\u0130", "\u0344", "\x00", "\u200d", "é", "\ue000"]),
    max_size=30,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(text=_TEXTS)
def test_random_text(tokenizers, vocab, text):
    for lower in LOWER:
        assert_as_google(tokenizers[lower], [text], vocab)


@needs_data
@pytest.mark.parametrize("language", ["ar", "de", "ja", "ru", "zh"])
def test_corpora(language):
    (path,) = (DATA / "corpus").glob(f"{language}_*.txt.gz")
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        lines = random.Random(0).sample(file.read().split("\n"), 60)
    for name in ("multilingual-cased", "chinese"):
        vocab = DATA / f"vocab/bert-base-{name}-vocab.txt"
        tokenizer = BertTokenizer(vocab, do_lower_case=name == "chinese", compat="google")
        assert_as_google(tokenizer, lines)


# ---- Rows


def test_the_same_as_hf_where_the_ids_are(tokenizers, vocab):
    """Offsets, words and the rest do not depend on the mode."""
    texts = [text for text in NASTY if "MASK" not in text]
    google, hf = (
        [tokenizer(text, **DETAILS) for text in texts]
        for tokenizer in (tokenizers[True], BertTokenizer(vocab))
    )
    equal = [(a, b) for a, b in zip(google, hf, strict=True) if a["input_ids"] == b["input_ids"]]
    assert len(equal) >= len(texts) // 2
    for a, b in equal:
        assert (a, a.word_ids(), a.tokens()) == (b, b.word_ids(), b.tokens())


def test_batches_pairs_and_words(tokenizers, vocab):
    tokenizer = tokenizers[True]
    a, b = "ΟΔΟΣ Α", "\ue000 ΣΑΣ"
    expected = ["[CLS]", *google_tokens(a, vocab, True), "[SEP]"]
    pair = [*expected, *google_tokens(b, vocab, True), "[SEP]"]
    for texts in (([a], [b]), ([(a, b)],), ([[a, b]],)):
        assert tokenizer(*texts).tokens() == pair
    assert tokenizer(a, b).tokens() == pair
    assert tokenizer.pack([a], [b]).input_ids.tolist() == [vocab[token] for token in pair]
    assert tokenizer(a, max_length=5).tokens() == [*expected[:4], "[SEP]"]
    assert tokenizer(a.split(" "), is_split_into_words=True).tokens() == expected
    assert tokenizer([a.split(" ")], [b.split(" ")], is_split_into_words=True).tokens() == pair
    with pytest.raises(TypeError, match="text 1 must be str, got int"):
        tokenizer(["ΑΣ", 5])
    with pytest.raises(TypeError, match="lone surrogate"):
        tokenizer("ΑΣ\ud800")


def test_special_and_added_tokens():
    """Special ones are plain text unless a call asks for them; others are found, if added."""
    tokenizer = BertTokenizer(UNCASED_VOCAB, compat="google")
    assert tokenizer.tokenize("[MASK]") == ["[", "mask", "]"]
    assert tokenizer.pack(["[SEP]"]).input_ids.tolist()[1:-1] == tokenizer.convert_tokens_to_ids(
        ["[", "sep", "]"]
    )
    assert tokenizer.tokenize("x[MASK]", split_special_tokens=False) == ["x", "[MASK]"]
    tokenizer.add_tokens(["ΟΔΟΣ", AddedToken("[ΟΔΟΣ]", normalized=False)])
    assert tokenizer.convert_ids_to_tokens(tokenizer("οδος ΟΔΟΣ [ΟΔΟΣ]")["input_ids"]) == [
        "[CLS]", "οδος", "οδος", "[ΟΔΟΣ]", "[SEP]"
    ]  # fmt: skip


# ---- Files


def test_vocabulary_lines_are_stripped(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes("[UNK]\r\n \x1ca\x1f\n##\u2028\n\n\u3000##b".encode())
    tokenizer = BertTokenizer(path, compat="google")
    assert list(tokenizer.get_vocab())[:5] == ["[UNK]", "a", "##", "", "##b"]
    path.write_bytes(b"[UNK]\na\n a\n")
    with pytest.raises(ValueError, match="lines 2 and 3 hold the same token 'a'"):
        BertTokenizer(path, compat="google")


def test_copies_and_files_keep_the_mode(tmp_path):
    tokenizer = BertTokenizer(UNCASED_VOCAB, compat="google")
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["compat"] == "google"
    for other in (
        pickle.loads(pickle.dumps(tokenizer)),
        copy.copy(tokenizer),
        copy.deepcopy(tokenizer),
        BertTokenizer.from_pretrained(tmp_path),
        BertTokenizer.from_pretrained(UNCASED_VOCAB, compat="google"),
    ):
        assert other.compat == "google"
        assert_as_google(other, NASTY)
    ours = BertTokenizer.from_pretrained(tmp_path, compat="hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in NASTY:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_refuses_other_modes():
    with pytest.raises(ValueError, match=r"compat.*hf.*google.*'bert'"):
        BertTokenizer(UNCASED_VOCAB, compat="bert")
