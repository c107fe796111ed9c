"""BertTokenizer against transformers.BertTokenizerFast: equal results, with no exceptions list."""

import copy
import functools
import gzip
import itertools
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import (
    DATA,
    DETAILS,
    NASTY,
    UNCASED_VOCAB,
    assert_same,
    both,
    needs_data,
    outcome,
)

from fastbert.tokenizer import AddedToken, BertTokenizer

CORPORA = sorted(DATA.glob("corpus/**/*.txt*"))
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def uncased():
    return both()


@pytest.fixture(scope="module")
def cased():
    """Cased on the same vocabulary: capitals become [UNK], which still shows where words end."""
    return both(do_lower_case=False)


# ---- Characters


@pytest.fixture(scope="module")
def every_character():
    """A vocabulary in which each character is a token, at the beginning of a word and inside."""
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    tokens = itertools.chain(SPECIALS, characters, ("##" + c for c in characters))
    return characters, {token: id for id, token in enumerate(tokens)}


@pytest.mark.parametrize("do_lower_case", [True, False])
def test_every_code_point(every_character, do_lower_case):
    """Alone, at both ends of a word, and inside: removed, space, punctuation, mark, lowercase..."""
    characters, vocab = every_character
    ours, theirs = both(vocab, do_lower_case=do_lower_case)
    chunks = [characters[i : i + 512] for i in range(0, len(characters), 512)]
    texts = ["".join(f"a{c}b {c} " for c in chunk) for chunk in chunks]
    packed = ours.pack(texts, max_length=10**6)
    expected = theirs.backend_tokenizer.encode_batch_fast(texts)
    for chunk, part, encoding in zip(chunks, packed.split(1), expected, strict=True):
        if part.input_ids.tolist() != encoding.ids:
            bad = [c for c in chunk if ours(f"a{c}b {c}") != theirs(f"a{c}b {c}")]
            pytest.fail(f"differs in U+{ord(chunk[0]):04X}...: {bad}")


@pytest.mark.parametrize("strip_accents", [True, False])
@pytest.mark.parametrize("chinese", [True, False])
def test_normalizer_options(strip_accents, chinese):
    options = {"strip_accents": strip_accents, "tokenize_chinese_chars": chinese}
    for lower in (True, False):
        pair = both(do_lower_case=lower, **options)
        for text in NASTY:
            assert_same(pair, text, **DETAILS)


@pytest.mark.parametrize("text", NASTY)
def test_nasty_texts(uncased, cased, text):
    for pair in (uncased, cased):
        assert_same(pair, text, **DETAILS)
        assert_same(pair, "one two", text, **DETAILS)
        assert_same(pair, [text], [text], **DETAILS)
        assert_same(pair, [text, "x"], is_split_into_words=True, **DETAILS)
        assert_same(pair, text, add_special_tokens=False, split_special_tokens=True, **DETAILS)


# A text is looked at in chunks of 8,192 bytes: what lies across their ends, or fills one.
LONG = {
    "words": "The caf\u00e9's Word, " * 1500,
    "no boundary": "\u65e5\u672cABC\u8a9e\u00c9clair\u3001" * 1200 + " End",
    "one word": "Ab" * 9000 + " end " + "\u00e9" * 9000,
    "marks": "e" + "\u0301\u0323" * 5000 + "x y",
    "removed": "a\u200d" * 5000 + "B c",
    "white space": (" " * 70 + "if" + "\n" * 61 + "()\t  x " + " \n\u00e9  ") * 120,
}


@pytest.mark.parametrize("name", LONG)
def test_texts_longer_than_a_chunk(uncased, cased, name):
    for pair in (uncased, cased):
        for shift in (0, 1, 2, 7):
            assert_same(pair, "." * shift + LONG[name], **DETAILS)
    assert_same(uncased, LONG[name], truncation=True, max_length=12, **DETAILS)


# Characters that interact with their neighbours, and the pieces that added tokens are made of.
_ALPHABET = st.one_of(
    st.characters(exclude_categories=["Cs"]),
    st.sampled_from("abIe \t\u0301\u0323\u0345\u0315\ua8ec\u302e\u1100\u1161\u11a8\uac01\u65e5"),
    st.sampled_from(["[MASK]", "[SEP]", "[mask]", "##", "\u0130", "\u0344", "\x00", "\u200d", "é"]),
)
_TEXTS = st.lists(_ALPHABET, max_size=30).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=_TEXTS, pair=st.none() | _TEXTS)
def test_random_text(uncased, cased, text, pair):
    for tokenizers in (uncased, cased):
        assert_same(tokenizers, text, pair, **DETAILS)


# Marks alone, so that reordering moves several; every surviving mark must keep its source.
_MARKS = (
    "a\x00\u200d\u00e9\u1ec7\u0301\u0323\u0345\u0315\ua8ec\u302e\u302f"
    "\U0001d165\U0001d16d\u0f73\u1b44"
)


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet=_MARKS, min_size=1, max_size=12))
def test_reordered_marks(every_mark_pair, text):
    assert_same(every_mark_pair, text, **DETAILS)


@pytest.fixture(scope="module")
def every_mark_pair():
    characters = [chr(c) for c in range(0x20000)]
    tokens = SPECIALS + characters[:0xD800] + characters[0xE000:]
    vocab = {token: id for id, token in enumerate([*tokens, *("##" + t for t in tokens[5:])])}
    return both(vocab)


# ---- Real text


_both_cached = functools.cache(both)  # since a vocabulary serves many corpora


def data_lines(path, column=None):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="\n") as file:
        lines = file.read().split("\n")
    return [line if column is None else line.split("\t")[column] for line in lines if line]


def assert_same_texts(pair, texts, **kwargs):
    """As assert_same, for many texts; names the first text that differs."""
    ours, theirs = (tokenizer(texts, **DETAILS, **kwargs) for tokenizer in pair)
    for name in theirs:
        for text, a, b in zip(texts, ours[name], theirs[name], strict=True):
            assert a == b, f"{name} differs for {text!r}"


@needs_data
@pytest.mark.parametrize("path", CORPORA, ids=lambda path: path.name.split(".")[0])
def test_corpora(path):
    lines = data_lines(path)
    lines = random.Random(0).sample(lines, min(80, len(lines)))
    for vocab in sorted(DATA.glob("vocab/*-vocab.txt")):
        lower = "uncased" in vocab.name or "chinese" in vocab.name
        assert_same_texts(_both_cached(vocab, do_lower_case=lower), lines)


@needs_data
def test_sentences(uncased):
    assert_same_texts(uncased, data_lines(DATA / "sst2/dev.tsv", 0))
    assert_same_texts(uncased, data_lines(DATA / "sst2/train_sentences.tsv.gz", 0)[:1500])
    assert_same_texts(uncased, data_lines(DATA / "ag_news/part1.tsv.gz", 2)[:1500])


@needs_data
@pytest.mark.parametrize("truncation", ["longest_first", "only_first", "only_second"])
def test_mrpc_pairs(uncased, truncation):
    rows = data_lines(DATA / "mrpc/dev.tsv")[1:201]
    texts, pairs = zip(*(row.split("\t")[3:5] for row in rows), strict=True)
    ours, theirs = (
        [
            outcome(tokenizer, a, b, truncation=truncation, max_length=40)
            for a, b in zip(texts, pairs, strict=True)
        ]
        for tokenizer in uncased
    )
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(b, BaseException):
            assert isinstance(a, ValueError)
        else:
            assert a == dict(b)
    assert any(isinstance(b, BaseException) for b in theirs) == (truncation != "longest_first")


# ---- Ids to text


def test_decode(uncased):
    ours, theirs = uncased
    ids = [theirs(text)["input_ids"] for text in [*NASTY, "Don't do not, it's we've they're I'm."]]
    generator = random.Random(0)
    ids += [[generator.randrange(31000) for _ in range(30)] for _ in range(200)]
    ids += [[], [2015, 2003], [10**9, 5]]
    for skip, clean in itertools.product([False, True], [None, False, True]):
        arguments = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": clean}
        assert ours.batch_decode(ids, **arguments) == theirs.batch_decode(ids, **arguments)
        assert ours.decode(ids[4], **arguments) == theirs.decode(ids[4], **arguments)
    assert ours.decode(torch.tensor(ids[4])) == theirs.decode(torch.tensor(ids[4]))
    assert ours.decode(np.array([ids[20]] * 2)) == theirs.decode(np.array([ids[20]] * 2))
    assert ours.decode(2003) == theirs.decode(2003)
    assert ours.convert_ids_to_tokens([0, 10**9]) == theirs.convert_ids_to_tokens([0, 10**9])
    assert ours.convert_ids_to_tokens(ids[4], True) == theirs.convert_ids_to_tokens(ids[4], True)
    assert ours.convert_ids_to_tokens(7) == theirs.convert_ids_to_tokens(7)
    tokens = ["one", "##s", "no such token", "[MASK]"]
    assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    assert ours.convert_tokens_to_ids("one") == theirs.convert_tokens_to_ids("one")
    with pytest.raises(ValueError, match="-100"):
        ours.decode([-100])


def test_tokenize_and_encode(uncased):
    ours, theirs = uncased
    for text in NASTY:
        assert ours.tokenize(text) == theirs.tokenize(text)
        assert ours.encode(text, "pair") == theirs.encode(text, "pair")
    assert ours.tokenize("a", "b", add_special_tokens=True) == theirs.tokenize(
        "a", "b", add_special_tokens=True
    )


def test_vocabulary(uncased):
    ours, theirs = uncased
    assert ours.get_vocab() == theirs.get_vocab()
    assert (len(ours), ours.vocab_size) == (len(theirs), theirs.vocab_size)
    names = ["unk", "sep", "pad", "cls", "mask", "bos", "eos"]
    for name in itertools.chain(
        (f"{n}_token" for n in names),
        (f"{n}_token_id" for n in names),
        ["all_special_tokens", "all_special_ids", "special_tokens_map", "extra_special_tokens",
         "model_max_length", "padding_side", "truncation_side", "model_input_names"],
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    for pair in (False, True):
        assert ours.num_special_tokens_to_add(pair) == theirs.num_special_tokens_to_add(pair)


# ---- Added tokens


ADDED = [
    {"content": "Quux"},
    {"content": "quu", "lstrip": True},
    {"content": "<l>", "lstrip": True, "special": True},
    {"content": "<r>", "rstrip": True, "normalized": False},
    {"content": "sw", "single_word": True},
    {"content": "S\u00e9", "single_word": True, "normalized": False, "special": True},
    {"content": "[CLS][SEP]"},
    {"content": "the", "normalized": False},
    {"content": "\u65e5\u672c"},
    {"content": "[MASK]", "lstrip": True, "special": True},
]
ADDED_TEXTS = [
    "quux QUUX aquuxb quuxquu  quu  x", "a  <l>  b<r>  c <r> <l><l> <L>", "sw asw swa sw. (sw)_sw",
    "S\u00e9 s\u00e9 aS\u00e9 S\u00e9\u0301 S\u00e9_ S\u00e9\u65e5", "[CLS][SEP] [CLS] the",
    "them bathe THE",     "\u65e5\u672c\u65e5 \u672c", "a [MASK] b \u00a0[MASK]\u2003<r>\x85\x1cx",
    "<r>  <l>  <r>  [MASK]",
]  # fmt: skip


@pytest.fixture(scope="module")
def with_added():
    ours, theirs = both()
    counts = ours.add_tokens([AddedToken(**token) for token in ADDED]), theirs.add_tokens(
        [transformers.AddedToken(**token) for token in ADDED]
    )  # fmt: skip
    assert counts[0] == counts[1]
    return ours, theirs


def test_added_tokens(with_added):
    ours, theirs = with_added
    assert (len(ours), ours.vocab_size) == (len(theirs), theirs.vocab_size)
    assert ours.get_vocab() == theirs.get_vocab()
    for text in [*ADDED_TEXTS, *NASTY]:
        assert_same(with_added, text, **DETAILS)
        assert_same(with_added, text, split_special_tokens=True, **DETAILS)
        assert_same(with_added, [text, "quux"], is_split_into_words=True, **DETAILS)
        ids = theirs(text)["input_ids"]
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip)


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(
        st.sampled_from([token["content"] for token in ADDED] + list(" a_\u0301\t.\x85"))
    ).map("".join)
)
def test_added_tokens_in_random_text(with_added, text):
    assert_same(with_added, text, **DETAILS)


def test_white_space_and_words_beside_added_tokens(with_added):
    """The matcher has its own classes: every code point beside a token that cares."""
    characters = [chr(c) for c in range(0x20000) if not 0xD800 <= c <= 0xDFFF]
    texts = [
        "".join(f"<r>{c}.{c}<l> {c}S\u00e9{c} " for c in characters[i : i + 512])
        for i in range(0, len(characters), 512)
    ]
    ours, theirs = (t(texts, return_offsets_mapping=True) for t in with_added)
    assert ours["offset_mapping"] == theirs["offset_mapping"]


def test_add_special_tokens():
    ours, theirs = both()
    for tokens in (
        {"extra_special_tokens": ["<e1>", "<E2>"]},
        {"bos_token": "<s>", "mask_token": "<mask>"},
        {"extra_special_tokens": ["<e3>"]},
    ):
        assert ours.add_special_tokens(tokens) == theirs.add_special_tokens(tokens)
        assert ours.all_special_tokens == theirs.all_special_tokens
        assert ours.mask_token_id == theirs.mask_token_id
    for tokenizer in (ours, theirs):
        tokenizer.pad_token_id = tokenizer.bos_token_id
    assert (ours.pad_token, ours.pad_token_id) == (theirs.pad_token, theirs.pad_token_id)
    assert ours.add_tokens(["plain"]) == theirs.add_tokens(["plain"])
    assert ours.add_tokens(["plain"], True) == theirs.add_tokens(["plain"], special_tokens=True)
    for text in ("<e1>x<E2> <e2> <s> <mask>[MASK] <e3>", "a plain PLAIN"):
        assert_same((ours, theirs), text, **DETAILS)
        assert_same((ours, theirs), text, split_special_tokens=True, **DETAILS)
        ids = theirs(text)["input_ids"]
        assert ours.decode(ids, True) == theirs.decode(ids, True)
    with pytest.raises(ValueError, match="not_a_name"):
        ours.add_special_tokens({"not_a_name": "x"})
    with pytest.raises(ValueError, match="must be a list, got str"):
        ours.add_special_tokens({"extra_special_tokens": "abc"})


def test_tokens_added_again():
    """The latest settings count; what was special once is skipped as such for good."""
    ours, theirs = both()
    for settings_ in (
        {"content": "fooBar", "normalized": True, "special": True},
        {"content": "fooBar", "lstrip": True},
        {"content": "fooBar", "lstrip": True},
        {"content": "fooBar", "special": True},
        {"content": "[MASK]", "normalized": True},
        {"content": "[MASK]", "normalized": False, "rstrip": True},
        {"content": "the", "special": True},
    ):
        added = ours.add_tokens(AddedToken(**settings_))
        assert added == theirs.add_tokens(transformers.AddedToken(**settings_))
        assert len(ours) == len(theirs)
        for text in ("a  fooBar FOOBAR  b", "a [MASK] [mask] b", "the bathe The"):
            assert_same((ours, theirs), text, **DETAILS)
            assert_same((ours, theirs), text, split_special_tokens=True, **DETAILS)
            ids = theirs(text)["input_ids"]
            assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
            for skip in (False, True):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip)


def test_refuses_added_tokens_that_match_everywhere():
    tokenizer = BertTokenizer(UNCASED_VOCAB)
    before = tokenizer("a b"), len(tokenizer)
    with pytest.raises(ValueError, match="empty once normalised"):
        tokenizer.add_tokens("\u0301")
    assert (tokenizer("a b"), len(tokenizer)) == before
    with pytest.raises(TypeError, match="int"):
        tokenizer.add_tokens([5])
    assert tokenizer.add_tokens([]) == tokenizer.add_tokens("") == 0


def test_copies_are_the_same(with_added):
    ours, _ = with_added
    for other in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours), copy.copy(ours)):
        for text in ADDED_TEXTS:
            assert other(text) == ours(text)


def test_imports_neither_torch_nor_transformers(tmp_path):
    code = (
        "import sys; from fastbert.tokenizer import BertTokenizer\n"
        "BertTokenizer({'[UNK]': 0})('a', return_tensors='np')\n"
        "print({'torch', 'transformers', 'tokenizers', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("set()", "")
