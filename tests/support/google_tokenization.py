"""What google-research/bert's tokenization.py does, restated plainly as an oracle for tests.

After https://github.com/google-research/bert/blob/master/tokenization.py (BasicTokenizer, then
WordpieceTokenizer); it follows the Unicode version of the Python that runs it.
"""

import unicodedata

_CATEGORY = {c: unicodedata.category(chr(c)) for c in range(0x110000)}
_ASCII_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_CJK = [(0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF),
        (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0x2F800, 0x2FA1F)]  # fmt: skip

# As str.translate takes them: None deletes.
_CLEANED = {
    **{c: None for c, category in _CATEGORY.items() if category in ("Cc", "Cf")},
    **{c: " " for c, category in _CATEGORY.items() if category == "Zs" or chr(c) in "\t\n\r"},
    0xFFFD: None,
}
_CJK_APART = {c: f" {chr(c)} " for first, last in _CJK for c in range(first, last + 1)}
_WITHOUT_MARKS = {c: None for c, category in _CATEGORY.items() if category == "Mn"}
_PUNCTUATION_APART = {
    c: f" {chr(c)} "
    for c, category in _CATEGORY.items()
    if category.startswith("P") or chr(c) in _ASCII_PUNCTUATION
}


def google_words(text: str, lower: bool) -> list[str]:
    """Words and single punctuation characters."""
    words = []
    for token in text.translate(_CLEANED).translate(_CJK_APART).split():
        if lower:
            token = unicodedata.normalize("NFD", token.lower()).translate(_WITHOUT_MARKS)
        words += token.translate(_PUNCTUATION_APART).split()
    return words


def google_pieces(word: str, vocab: dict[str, int], max_chars: int = 200) -> list[str]:
    """The longest piece that the vocabulary has, then the longest of the rest, and so on."""
    pieces: list[str] = []
    start = 0
    while start < len(word) <= max_chars:
        for end in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:end]
            if piece in vocab:
                break
        else:
            return ["[UNK]"]
        pieces.append(piece)
        start = end
    return pieces or ["[UNK]"]


def google_tokens(text: str, vocab: dict[str, int], lower: bool) -> list[str]:
    return [piece for word in google_words(text, lower) for piece in google_pieces(word, vocab)]
