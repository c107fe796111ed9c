"""Write unicode_tables.cpp: what HF tokenizers does with every code point, seen from outside.

    python csrc/generate_unicode_tables.py > csrc/unicode_tables.cpp

Each table is measured: every code point is put through the normalizer, the pre-tokenizer or the
added-token matcher, so the tables hold whatever Unicode versions those were built with. Only the
numbers of the combining classes come from Python's unicodedata; their order is checked.
"""

import sys
import unicodedata
from collections.abc import Callable, Iterable

import tokenizers
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
PAGE = 256

REMOVED, SPACE, CJK, PUNCTUATION, MARK, DECOMPOSES, LOWERS, COMBINING = (1 << i for i in range(8))
WHITE_SPACE, WORD = 1, 2


def bert_normalizer(**steps: bool) -> Callable[[str], str]:
    off = {"clean_text": False, "handle_chinese_chars": False, "strip_accents": False}
    return normalizers.BertNormalizer(**{**off, "lowercase": False, **steps}).normalize_str


def hangul(c: int) -> str:
    """The Unicode standard's formula (section 3.12), which the C++ code uses instead of a table."""
    lead, rest = divmod(c - 0xAC00, 21 * 28)
    vowel, tail = divmod(rest, 28)
    return chr(0x1100 + lead) + chr(0x1161 + vowel) + (chr(0x11A7 + tail) if tail else "")


def combining_classes(nfd: Callable[[str], str]) -> dict[int, int]:
    """Canonical combining classes, for the code points that the normalizer does reorder."""
    iota, overlay = "\u0345", "\u0338"  # the highest class, 240, and the lowest, 1
    classes = {}
    for c in CODE_POINTS:
        moves = nfd(iota + chr(c)) == chr(c) + iota or nfd(chr(c) + overlay) == overlay + chr(c)
        if moves or chr(c) == overlay:
            classes[c] = unicodedata.combining(chr(c))
        elif unicodedata.combining(chr(c)) == 1 and nfd(chr(c)) == chr(c):
            classes[c] = 1  # cannot move past the overlay of the same class
    one_of_each = {value: c for c, value in classes.items()}
    for c, value in classes.items():
        for other, witness in one_of_each.items():
            swaps = nfd(chr(c) + chr(witness)) == chr(witness) + chr(c) != chr(c) + chr(witness)
            if nfd(chr(witness)) == chr(witness) and nfd(chr(c)) == chr(c):
                assert swaps == (0 < other < value), (hex(c), value, other)
    return classes


def matcher_classes() -> dict[int, int]:
    r"""What `\s` and `\w` are where added tokens are matched (strip, single_word)."""
    word, strip = "\ue000", "\ue001"
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.add_tokens(
        [
            AddedToken(word, single_word=True, normalized=False),
            AddedToken(strip, rstrip=True, normalized=False),
        ]
    )
    word_id, strip_id = map(tokenizer.token_to_id, (word, strip))
    classes = {}
    for start in range(0, len(CODE_POINTS), 4096):
        chunk = CODE_POINTS[start : start + 4096]
        found = tokenizer.encode("".join(f"{strip}{chr(c)}. {word}{chr(c)}. " for c in chunk))
        spans = {}
        for token, (begin, end) in zip(found.ids, found.offsets, strict=True):
            if token in (word_id, strip_id):
                spans[begin] = end
        for i, c in enumerate(chunk):
            space = spans[8 * i] - 8 * i == 2
            in_word = 8 * i + 4 not in spans
            classes[c] = WHITE_SPACE * space | WORD * in_word
    return classes


def two_stage(name: str, ctype: str, values: Iterable[int]) -> str:
    """`name`_pages[c >> 8] is the page of c in `name`; equal pages are stored once."""
    values = list(values)
    pages: dict[tuple[int, ...], int] = {}
    index = [
        pages.setdefault(tuple(values[i : i + PAGE]), len(pages))
        for i in range(0, len(values), PAGE)
    ]
    flat = [value for page in pages for value in page]
    return array(f"{name}_pages", "uint16_t", index) + array(name, ctype, flat)


def array(name: str, ctype: str, values: list[int]) -> str:
    lines, line = [], ""
    for value in values:
        text = f"{value},"
        if len(line) + len(text) > 98:
            lines.append(line)
            line = ""
        line += text
    return f"const {ctype} {name}[] = {{\n" + "\n".join([*lines, line]) + "\n};\n"


def mapping(name: str, images: dict[int, str]) -> str:
    """`name`_index[c], if not 0, is where in `name`_pool the size and then the image of c is."""
    pool, starts = [0], {}
    for c, image in images.items():
        starts[c] = len(pool)
        pool += [len(image), *map(ord, image)]
    assert len(pool) < 1 << 16
    index = (starts.get(c, 0) for c in range(0x110000))
    return two_stage(f"{name}_index", "uint16_t", index) + array(f"{name}_pool", "char32_t", pool)


def main() -> None:
    clean = bert_normalizer(clean_text=True)
    chinese = bert_normalizer(handle_chinese_chars=True)
    strip = bert_normalizer(strip_accents=True)
    lower = bert_normalizer(lowercase=True)
    nfd = normalizers.NFD().normalize_str
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str

    decompositions = {c: nfd(chr(c)) for c in CODE_POINTS if nfd(chr(c)) != chr(c)}
    lowercase = {c: lower(chr(c)) for c in CODE_POINTS if lower(chr(c)) != chr(c)}
    combining = combining_classes(nfd)
    marks = {c for c in CODE_POINTS if c not in decompositions and not strip(chr(c))}

    flags = [0] * 0x110000
    for c in CODE_POINTS:
        cleaned = clean(f"a{chr(c)}b")
        flags[c] = (
            REMOVED * (cleaned == "ab")
            | SPACE * (cleaned == "a b")
            | CJK * (chinese(chr(c)) != chr(c))
            | PUNCTUATION * (len(split(f"a{chr(c)}b")) == 3)
            | MARK * (c in marks)
            | DECOMPOSES * (c in decompositions)
            | LOWERS * (c in lowercase)
            | COMBINING * (c in combining)
        )
        assert strip(chr(c)) == "".join(d for d in nfd(chr(c)) if ord(d) not in marks), hex(c)
    for c in range(0xAC00, 0xD7A4):
        assert decompositions.pop(c) == hangul(c), hex(c)

    matched = matcher_classes()
    python = ".".join(map(str, sys.version_info[:2]))
    sys.stdout.write(
        "// Made by csrc/generate_unicode_tables.py. Do not edit.\n"
        f"// From tokenizers {tokenizers.__version__}, Python {python}, "
        f"unicodedata {unicodedata.unidata_version}.\n"
        + '\n#include "unicode_tables.h"\n\nnamespace fastbert {\n\n'
        + two_stage("flags", "uint8_t", flags)
        + two_stage("combining", "uint8_t", (combining.get(c, 0) for c in range(0x110000)))
        + two_stage("matcher", "uint8_t", (matched.get(c, 0) for c in range(0x110000)))
        + mapping("decomposition", decompositions)
        + mapping("lowercase", lowercase)
        + "\n}  // namespace fastbert\n"
    )


if __name__ == "__main__":
    main()
