"""What a tokenizer is asked for and gives, against transformers.BertTokenizerFast."""

import contextlib
import copy
import ctypes
import itertools
import pickle
import random

import numpy as np
import pyarrow as pa
import pytest
import torch
from tokenizer_cases import DETAILS, NASTY, UNCASED_VOCAB, WORDS, assert_same, both

from fastbert.tokenizer import BertTokenizer


@pytest.fixture(scope="module")
def uncased():
    return both()


# ---- Arguments


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
            with pytest.warns(UserWarning) if with_warning else contextlib.nullcontext():
                assert_same(uncased, batch, **DETAILS, **arguments, **extra)
                assert_same(uncased, batch[0], **DETAILS, **arguments, **extra)


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
    pair = both(**options)
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


@pytest.mark.parametrize("max_length", [2, 3])
def test_refuses_bad_words_behind_the_cut(uncased, max_length):
    words = ["one", "two", "\ud800"]
    for tokenizer in uncased:
        with pytest.raises(TypeError):
            tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)


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


# Short texts are read together, up to 8,192 bytes at once and in blocks of 64; long ones, and those
# with added tokens in them, alone.
SHORT = [*NASTY, "", "ends white \n\t ", "   begins white", "[MASK]ed", "x[SEP]", "[ MASK ]"]
SHORT += [("ab. c  " * 20)[:n] for n in range(60, 70)] + [(" " * n + "end") for n in range(61, 66)]
SHORT += [(c * 512)[:n] for c in ("a ", "\u65e5") for n in (170, 171, 256, 257, 511, 512)]
SHORT += ["\u00e9" * 512, "\u00e9 " * 257, "\U0001f600" * 128, "\U0001f600 " * 65]


def test_short_texts_between_others(uncased):
    """Each has the tokens that it has alone, in any order, and cut."""
    ours, theirs = uncased
    texts = random.Random(0).sample(SHORT, len(SHORT)) * 3
    texts[len(SHORT) :: 7] = [""] * len(texts[len(SHORT) :: 7])
    for options in (
        {"truncation": True, "max_length": 512},
        {"truncation": "only_first", "max_length": 5},
        {"truncation": True, "max_length": 3, "add_special_tokens": False},
        {"truncation": True, "max_length": 2},
        {"add_special_tokens": False},
        {"truncation": True, "max_length": 4, "return_overflowing_tokens": True},
        {"truncation": True, "max_length": 6, "stride": 1},
    ):
        expected = theirs(texts, **options)["input_ids"]
        assert ours(texts, **options)["input_ids"] == expected, options
    batch = ours.pack(texts, max_length=7, num_threads=1)
    expected = theirs(texts, truncation=True, max_length=7)["input_ids"]
    assert [row.input_ids.tolist() for row in batch.split(1)] == expected


@pytest.mark.parametrize("bad", ["a\ud800", b"a\xff"])
def test_refuses_one_of_many_short_texts(uncased, bad):
    ours, _ = uncased
    good = ours.pack(SHORT)
    with pytest.raises(
        (TypeError, ValueError), match=r"^text 40: must be .* at (byte|character) 1$"
    ):
        ours.pack([*SHORT[:40], bad, "after"])
    assert_same_batch(ours.pack(SHORT), good)  # nothing is left of the texts before it


def test_short_texts_that_grow_where_they_are_read(uncased):
    """The widest of each kind, so many that they fill several chunks."""
    ours, _ = uncased
    grow = [b"\xff" * 511, "\u00e9" * 511, "\u0800" * 255, "\U00010000" * 127]
    plain = [t.decode(errors="replace") if isinstance(t, bytes) else t for t in grow]
    expected = [ours(text + "x")["input_ids"] for text in plain]
    batch = ours.pack([t + (b"x" if isinstance(t, bytes) else "x") for t in grow] * 30,
                      errors="replace")  # fmt: skip
    assert [row.input_ids.tolist() for row in batch.split(1)] == expected * 30


def test_pack_edges(uncased):
    ours, _ = uncased
    empty = ours.pack([])
    assert len(empty) == 0 and empty.input_ids.numel() == 0 and empty.max_seqlen == 0
    assert ours.pack([""]).input_ids.tolist() == [ours.cls_token_id, ours.sep_token_id]
    with pytest.raises(TypeError, match="texts must be a list of str or an Arrow array, got str"):
        ours.pack("one")
    with pytest.raises(TypeError, match="text 1 must be str or bytes, got NoneType"):
        ours.pack(["one", None])
    with pytest.raises(ValueError, match="1 texts do not go with 2"):
        ours.pack(["one"], ["two", "three"])
    with pytest.raises(ValueError, match="max_length"):
        ours.pack(["one"], max_length=2)
    with pytest.raises(ValueError, match="num_threads"):
        ours.pack(["one"], num_threads=0)


# ---- Texts that are no str


BYTES = [text.encode() for text in NASTY]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: BYTES, id="bytes"),
        pytest.param(lambda: [memoryview(b"<" + text)[1:] for text in BYTES], id="memoryview"),
        pytest.param(lambda: pa.array(NASTY), id="string"),
        pytest.param(lambda: pa.array(NASTY, pa.large_string()), id="large_string"),
        pytest.param(lambda: pa.array(NASTY, pa.string_view()), id="string_view"),
        pytest.param(lambda: pa.array(BYTES, pa.binary()), id="binary"),
        pytest.param(lambda: pa.array(["x", *NASTY, "y"])[1:-1], id="sliced"),
        pytest.param(lambda: pa.chunked_array([NASTY[:5], [], NASTY[5:]]), id="chunked"),
    ],
)
def test_pack_reads_texts_where_they_are(uncased, make):
    ours, _ = uncased
    texts = make()
    assert_same_batch(ours.pack(texts), ours.pack(NASTY))
    assert_same_batch(ours.pack(texts, texts), ours.pack(NASTY, NASTY))


def assert_same_batch(batch, other):
    for name in ("input_ids", "token_type_ids", "position_ids", "cu_seqlens"):
        assert torch.equal(getattr(batch, name), getattr(other, name)), name
    assert batch.max_seqlen == other.max_seqlen


def test_pack_reads_every_kind_of_str(uncased):
    """CPython keeps texts as 1, 2 or 4 bytes a character; some have their UTF-8 beside it."""
    ours, _ = uncased
    texts = ["ascii", "caf\u00e9 " * 20, "\u65e5x" + "ascii " * 9, "\U0001f600 " + "ab" * 40, ""]
    expected = ours.pack([text.encode() for text in texts])
    assert_same_batch(ours.pack(texts), expected)
    cached = ["".join(text) for text in texts]
    for text in cached:  # ctypes' py_object has CPython encode it and keep that
        ctypes.pythonapi.PyUnicode_AsUTF8AndSize(ctypes.py_object(text), None)
    assert_same_batch(ours.pack(cached), expected)


# Cut, overlong, surrogate, too large, tails without a beginning; see the Unicode standard, 3.9.
BAD_UTF8 = [b"\xff", b"a\xc3", b"\xe2\x82", b"\xc0\xafb", b"\xed\xa0\x80", b"\xf4\x90\x80\x80x",
            b"\xf0\x9f\x98", b"\x80\x80ok", b"\xe2\x28\xa1", b"12345678\xf8"]  # fmt: skip


@pytest.mark.parametrize("text", BAD_UTF8)
def test_bytes_that_are_not_utf8(uncased, text):
    ours, _ = uncased
    with pytest.raises(UnicodeDecodeError) as python:
        text.decode()
    with pytest.raises(
        ValueError, match=f"text 1: must be UTF-8, .* at byte {python.value.start}$"
    ):
        ours.pack([b"fine", text])
    with pytest.raises(ValueError, match="text 0: must be UTF-8"):
        ours.pack(pa.array([text], pa.binary()))
    # The vocabulary has no U+FFFD, and cleaning removes it: [UNK] would show it too.
    assert_same_batch(
        ours.pack([text], errors="replace"), ours.pack([text.decode(errors="replace")])
    )


def test_pack_dtypes_and_memory(uncased):
    ours, _ = uncased
    wide, narrow = (ours.pack(NASTY, dtype=dtype) for dtype in (None, torch.int32))
    for name in ("input_ids", "token_type_ids", "position_ids"):
        assert getattr(wide, name).dtype == torch.int64
        assert getattr(narrow, name).dtype == torch.int32
        assert torch.equal(getattr(wide, name), getattr(narrow, name).long())
    assert (
        wide.input_ids.untyped_storage().data_ptr()
        == wide.position_ids.untyped_storage().data_ptr()
    )
    pairs = ours.pack([("one", "two"), "three"])
    assert pairs.token_type_ids.tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match=r"dtype must be .*float32"):
        ours.pack(["one"], dtype=torch.float32)
    if torch.cuda.is_available():
        pinned = ours.pack(NASTY, pin_memory=True)
        assert torch.equal(pinned.input_ids, wide.input_ids)
        assert pinned.input_ids.is_pinned() and pinned.cu_seqlens.is_pinned()


def test_refuses_bad_arrow(uncased):
    ours, _ = uncased
    with pytest.raises(ValueError, match="got a null at 1"):
        ours.pack(pa.array(["a", None]))
    with pytest.raises(ValueError, match="strings, got one of Arrow format 'l'"):
        ours.pack(pa.array([1, 2]))
    with pytest.raises(ValueError, match="dictionary"):
        ours.pack(pa.array(["a", "a"]).dictionary_encode())
    with pytest.raises(ValueError, match="2 texts do not go with 1"):
        ours.pack(pa.array(["a", "b"]), pa.array(["c"]))
    with pytest.raises(TypeError, match="text_pairs must be an Arrow array"):
        ours.pack(pa.array(["a"]), ["c"])
    with pytest.raises(ValueError, match="errors must be one of 'strict', 'replace'"):
        ours.pack([b"a"], errors="ignore")


def test_encode_arrays(uncased):
    ours, theirs = uncased
    for texts in (NASTY, "a query, \u00e9 [MASK]ed", "long " * 5000):
        ids, cu_seqlens = ours.encode_arrays(texts, max_length=40)
        rows = [texts] if isinstance(texts, str) else texts
        expected = theirs(rows, truncation=True, max_length=40, return_offsets_mapping=True)
        assert ids.tolist() == list(itertools.chain(*expected["input_ids"]))
        assert (ids.dtype, cu_seqlens.dtype) == (np.int64, np.int32)
        assert np.diff(cu_seqlens).tolist() == list(map(len, expected["input_ids"]))
        spans = ours.encode_arrays(texts, max_length=40, offsets=True)[2]
        assert list(map(tuple, spans)) == list(itertools.chain(*expected["offset_mapping"]))
    left = copy.copy(ours)
    left.truncation_side = "left"
    assert (
        left.encode_arrays("one two three", max_length=4)[0].tolist()
        == left("one two three", truncation=True, max_length=4).input_ids
    )
    with pytest.raises(TypeError, match="lone surrogate at character 1"):
        ours.encode_arrays("a\ud800")
    with pytest.raises(ValueError, match="max_length"):
        ours.encode_arrays("a", max_length=2)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        ours.encode_arrays("a", max_length=2**70)
    with pytest.raises(TypeError, match="'<' not supported"):
        ours.encode_arrays("a", max_length="5")
    with pytest.raises(TypeError, match="texts must be a list"):
        ours.encode_arrays(5)
