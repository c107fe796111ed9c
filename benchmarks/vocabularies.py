"""Vocabularies trained here beside the published ones: unknown tokens, tokens a character.

    python benchmarks/vocabularies.py

Each is trained on the first nine tenths of a corpus's lines and read against the last tenth, and
against newspapers of the language (NTREX), which are of another kind. Characters are those that
are no white space. Published: bert-base-chinese (in lower case) and -multilingual-cased.
"""

import gzip
from pathlib import Path

from fastbert import BertTokenizer, train_vocab

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared/data"
MARKS = "<!-- {} of the table made by vocabularies.py -->"
SIZES = (8_000, 30_000)
# corpus, NTREX's code, lower case, published
LANGUAGES = {
    "Chinese": ("zh_wiki", "zho-CN", True, "bert-base-chinese"),
    "German": ("de_novels", "deu", False, "bert-base-multilingual-cased"),
    "Japanese": ("ja_soseki", "jpn", False, "bert-base-multilingual-cased"),
    "Russian": ("ru_novels", "rus", False, "bert-base-multilingual-cased"),
}


def lines(name):
    text = gzip.decompress((DATA / f"corpus/{name}.txt.gz").read_bytes()).decode()
    return [line for line in text.split("\n") if line.strip()]


def measured(tokenizer, texts):
    """(share of tokens that are unknown, tokens a character)."""
    ids = tokenizer.pack(texts, max_length=10**6).input_ids
    n_tokens = ids.numel() - 2 * len(texts)  # without [CLS] and [SEP]
    unknown = int((ids == tokenizer.unk_token_id).sum())
    return unknown / n_tokens, n_tokens / sum(len("".join(text.split())) for text in texts)


def rows():
    for language, (corpus, code, lower, published) in LANGUAGES.items():
        texts, news = lines(corpus), lines(f"ntrex/{code}")
        cut = len(texts) * 9 // 10
        train, held_out = texts[:cut], texts[cut:]
        found = {published: BertTokenizer(DATA / f"vocab/{published}-vocab.txt", lower)}
        for size in SIZES:
            trained = train_vocab(
                iter(train), size, do_lower_case=lower, limit_alphabet=6000, show_progress=False
            )
            found[f"trained here, {size:,}"] = trained
        for name, tokenizer in found.items():
            own, other = measured(tokenizer, held_out), measured(tokenizer, news)
            yield (
                f"| {language} | {name} | {len(tokenizer):,} | {own[0]:.2%} | {own[1]:.3f} "
                f"| {other[0]:.2%} | {other[1]:.3f} |"
            )


def main():
    from report import between

    head = [
        "| | vocabulary | tokens | unknown | tokens a character | unknown, news | a character |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    table = "\n".join([*head, *rows()]) + "\n"
    print(table)
    readme = HERE / "README.md"
    readme.write_text(between(readme.read_text(), MARKS, table))


if __name__ == "__main__":
    main()
