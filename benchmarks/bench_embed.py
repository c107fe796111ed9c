"""Text to sentence vectors on a CPU, each library with its own tokenizer and habits."""

import numpy as np
import pytest
import torch
from demo import with_transformers
from peers import load_ctranslate2, load_onnxruntime, minilm_folder, sentences


def load_fastbert(folder, dtype=None):
    from fastbert import Embedder

    return Embedder.from_pretrained(folder, dtype=dtype).encode


def load_transformers(folder):
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    return lambda texts: with_transformers(texts, tokenizer, model.eval())


def load_sentence_transformers(folder):
    package = pytest.importorskip("sentence_transformers", reason="not installed")
    return package.SentenceTransformer(str(folder), device="cpu").encode


def with_tokenizers(load):
    """Hugging Face's tokenizer, another library's encoder, NumPy's mean."""

    def make(folder):
        from transformers import AutoTokenizer

        tokenizer, run = AutoTokenizer.from_pretrained(folder), load(folder)

        def encode(texts):
            vectors = []
            for i in range(0, len(texts), 32):
                batch = tokenizer(texts[i : i + 32], padding=True, truncation=True)
                ids, mask = torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"])
                weights = mask.numpy()[..., None]
                hidden = np.asarray(run(ids, mask))
                vectors.append((hidden * weights).sum(1) / weights.sum(1))
            vectors = np.concatenate(vectors)
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

        return encode

    return make


PROVIDERS = {
    "fastbert": load_fastbert,
    "fastbert bfloat16": lambda folder: load_fastbert(folder, torch.bfloat16),
    "transformers sdpa": load_transformers,
    "sentence-transformers": load_sentence_transformers,
    "onnxruntime": with_tokenizers(load_onnxruntime),
    "ctranslate2": with_tokenizers(load_ctranslate2),
}


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_embed(timed, provider):
    from transformers import AutoTokenizer

    texts, folder = sentences(1024), minilm_folder()
    encode = PROVIDERS[provider](folder)
    wanted = load_transformers(folder)(texts[:64])
    error = np.abs(np.asarray(encode(texts[:64])) - wanted).max()
    assert error < (2e-2 if "bfloat16" in provider else 1e-5), error

    tokenized = AutoTokenizer.from_pretrained(folder)(texts, truncation=True)["input_ids"]
    lengths = [len(ids) for ids in tokenized]
    padded = sum(max(lengths[i : i + 32]) * 32 for i in range(0, len(lengths), 32))
    timed(
        lambda: encode(texts),
        "MiniLM-L6, text to vectors, 1,024 news texts",
        provider=provider,
        rounds=5,
        tokens=sum(lengths),
        padding=1 - sum(lengths) / padded,
        error=float(error),
    )
