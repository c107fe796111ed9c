"""Training a WordPiece vocabulary on files, against HF tokenizers' trainer on one thread.

HF's threads are rayon's, whose number is read once a process: so this process is given one.
"""

import gzip
import os
from pathlib import Path

os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

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


PROVIDERS = {
    "fastbert": train_fastbert,
    "fastbert, 2 threads": lambda path: train_fastbert(path, 2),
    "tokenizers": train_tokenizers,
}


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_vocab(timed, provider, tmp_path):
    if not CORPUS.is_file():
        pytest.skip(f"needs {CORPUS}")
    path = tmp_path / "en_novels.txt"
    path.write_bytes(gzip.decompress(CORPUS.read_bytes()))
    if provider == "tokenizers":
        # Its ids of "##a" depend on chance; as special tokens they are those of ours.
        ours = train_fastbert(path)
        first = [token for token in ours if len(token.removeprefix("##")) == 1 or token[0] == "["]
        assert train_tokenizers(path, first) == ours
    timed(
        lambda: PROVIDERS[provider](path),
        "WordPiece vocabulary of 30,000, 12 MB of English novels",
        provider=provider,
        rounds=3,
        bytes=path.stat().st_size,
    )
