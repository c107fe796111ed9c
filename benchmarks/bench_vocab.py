"""Training a WordPiece vocabulary on a file, against HF tokenizers' trainer.

On one thread, which TOKENIZERS_PARALLELISM=false makes of HF's, and on all CPUs.
"""

import gzip
from pathlib import Path

import pytest

CORPUS = Path(__file__).parents[1].parent / "shared/data/corpus/en_novels.txt.gz"
SIZE = 30_000


def train_fastbert(path, num_threads=1):
    from fastbert import train_vocab

    return train_vocab(path, SIZE, num_threads=num_threads, show_progress=False).get_vocab()


def train_tokenizers(path, special_tokens=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=SIZE,
        min_frequency=2,
        limit_alphabet=1000,
        special_tokens=list(special_tokens),
        show_progress=False,
    )
    tokenizer.train([str(path)], trainer)
    return tokenizer.get_vocab()


PROVIDERS = {"fastbert": train_fastbert, "tokenizers": train_tokenizers}


@pytest.mark.parametrize("threads", ["one thread", "all CPUs"])
@pytest.mark.parametrize("provider", PROVIDERS)
def bench_vocab(timed, provider, threads, tmp_path, monkeypatch):
    if not CORPUS.is_file():
        pytest.skip(f"needs {CORPUS}")
    path = tmp_path / "en_novels.txt"
    path.write_bytes(gzip.decompress(CORPUS.read_bytes()))
    one = threads == "one thread"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false" if one else "true")
    options = {}
    if provider == "fastbert":
        options["num_threads"] = 1 if one else None
    elif one:
        # Its ids of "##a" depend on chance; as special tokens they are those of ours.
        ours = train_fastbert(path)
        first = [token for token in ours if len(token.removeprefix("##")) == 1 or token[0] == "["]
        assert train_tokenizers(path, first) == ours
    timed(
        lambda: PROVIDERS[provider](path, **options),
        f"WordPiece vocabulary of 30,000, 12 MB of English novels, {threads}",
        provider=provider,
        rounds=3,
        bytes=path.stat().st_size,
    )
