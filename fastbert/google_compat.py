"""What google-research/bert's tokenization.py does with characters.

It cleans the text, puts spaces around CJK characters and splits it at white space; of each token it
takes `str.lower`, then NFD without marks (Mn), and splits that at punctuation. All of it is by the
Unicode version of the Python that runs it, so the tables are made from that, in about 0.3 s.
"""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections import defaultdict
from typing import Any

from fastbert import _tokenizer

MAX_WORD_CHARS = 200

_REMOVED, _SPACE, _CJK, _PUNCTUATION, _MARK = 1, 2, 4, 8, 16  # CharFlags in csrc/unicode.h
_FLAGS = defaultdict(int, dict.fromkeys(("Cc", "Cf"), _REMOVED))
_FLAGS.update(dict.fromkeys(("Zs", "Zl", "Zp"), _SPACE))
_FLAGS.update(dict.fromkeys(("Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po"), _PUNCTUATION))
_CJK_BLOCKS = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
               (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF),
               (0x2F800, 0x2FA1F))  # fmt: skip

# What cleaning removes and `str.lower` does not ignore around a sigma.
_REMOVED_BY_SIGMA = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")


@functools.cache
def unicode_tables(lower: bool, strip_accents: bool) -> _tokenizer.UnicodeTables:
    """Tables for a normalizer that is to strip accents and not to lowercase, whatever these say.

    What it takes for the decomposition of a character is its lowercase, decomposed.
    """

    def fold(text: str) -> str:
        text = text.lower() if lower else text
        return unicodedata.normalize("NFD", text) if strip_accents else text

    everything = "".join(map(chr, range(0x110000)))
    flag_of = _FLAGS | {"Mn": _MARK if strip_accents else 0}
    flags = bytearray(map(flag_of.__getitem__, map(unicodedata.category, everything)))
    for characters, flag in (("\t\n\r", _SPACE), ("\ufffd", _REMOVED),
                             (string.punctuation, _PUNCTUATION)):  # fmt: skip
        for c in characters:
            flags[ord(c)] = flag
    for first, last in _CJK_BLOCKS:
        for code in range(first, last + 1):
            flags[code] |= _CJK
    pages = [everything[i : i + 256] for i in range(0, len(everything), 256)]
    changed = [page for page in pages if fold(page) != page]
    return _tokenizer.UnicodeTables(
        flags=bytes(flags),
        combining=bytes(map(unicodedata.combining, everything) if strip_accents else 0x110000),
        decompositions=[(c, fold(c)) for page in changed for c in page if fold(c) != c],
    )


def with_lower_sigmas(texts: Any, errors: str) -> Any:
    """Texts, in lists or not, with the capital sigmas in lowercase, which may be the final one.

    Only of these does `str.lower` look at the characters around. errors: as for bytes.decode.
    """
    if hasattr(texts, "to_pylist"):  # an Arrow array
        texts = texts.to_pylist()
    if isinstance(texts, list | tuple):
        return [with_lower_sigmas(text, errors) for text in texts]
    if isinstance(texts, bytes | bytearray | memoryview):
        texts = bytes(texts).decode("utf-8", errors)
    if not isinstance(texts, str) or "\u03a3" not in texts:
        return texts
    # As many characters as in the text: a soft hyphen is ignored, and U+0130 alone becomes two.
    seen = _REMOVED_BY_SIGMA.sub("\xad", texts).replace("\u0130", "I").lower()
    return re.sub("\u03a3", lambda sigma: seen[sigma.start()], texts)
