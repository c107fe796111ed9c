"""Text in, vectors or scores out, on a GPU: tokenizer, transfers and model together.

Random weights in bfloat16; news where SHARED (or shared beside or in the repository) has them, else
this folder's sentences again and again. "the model alone" has all tokens on the GPU before the
clock starts: its time over fastbert's is the share of the model's own rate that is kept.
"""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import bench_gpu
import numpy as np
import pytest
import torch
from peers import sentences, shared_folder

import fastbert
from fastbert.embed import batch_sizes, sort_and_shorten

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

N_TEXTS, N_QUERIES, N_CANDIDATES = 16384, 8, 100
WINDOW = 65536  # tokens of a forward, and texts are sorted by length, as Embedder has them
ALONE = "the model alone"


def tokenizer():
    """bert-base-uncased's where its vocabulary is at hand, else one of the texts' own."""
    path = (shared_folder() or Path()) / "data/vocab/bert-base-uncased-vocab.txt"
    if path.is_file():
        return fastbert.BertTokenizer(path)
    return fastbert.train_vocab(iter(sentences(1024)), 8000, show_progress=False)


@cache
def folder(model, kind):
    """A folder, there for as long as the process, of random weights and a tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    words, path = tokenizer(), TemporaryDirectory()
    config = BertConfig(
        vocab_size=len(words), num_labels=1, max_position_embeddings=bench_gpu.LONGEST,
        **bench_gpu.MODELS[model],
    )  # fmt: skip
    torch.manual_seed(0)
    net = (BertForSequenceClassification if kind == "ranker" else BertModel)(config)
    net.to(bench_gpu.DTYPE).save_pretrained(path.name)
    words.save_pretrained(path.name)
    return path


def sentence_transformer(path):
    package = pytest.importorskip("sentence_transformers", reason="not installed")
    options = {"model_kwargs": {"dtype": bench_gpu.DTYPE}, "device": str(bench_gpu.DEVICE)}
    return package.SentenceTransformer(path, **options)


@pytest.mark.parametrize("provider", ["fastbert", ALONE, "sentence-transformers", "accelerated"])
@pytest.mark.parametrize("model", ["MiniLM-L6-H384", "BERT-base"])
def bench_embedding(timed, provider, model):
    given, path = sentences(N_TEXTS), folder(model, "encoder").name
    exact = fastbert.Embedder.from_pretrained(path, dtype=torch.float32, device="cpu")
    ours = fastbert.Embedder.from_pretrained(path, dtype=bench_gpu.DTYPE, device=bench_gpu.DEVICE)
    packed = ours.tokenizer.pack(given, max_length=ours.max_length)
    if provider in ("fastbert", ALONE):
        encode = ours.encode
    else:
        peer = sentence_transformer(path)
        if provider == "accelerated":
            assert not fastbert.accelerate(peer).slow

        def encode(given):
            return peer.encode(given, batch_size=256, show_progress_bar=False)

    wanted = exact.encode(given[:64])
    error = float(np.abs(encode(given[:64]) - wanted).max() / np.abs(wanted).max())
    assert error < 5e-2, error
    order = packed.lengths.argsort(descending=True)
    if provider == ALONE:
        sizes = batch_sizes(packed.lengths[order].tolist(), WINDOW)
        where = {"device": bench_gpu.DEVICE, "sizes": sizes}
        batches = sort_and_shorten(packed, order, ours.max_length, **where)

        def encode(given):
            with torch.inference_mode():
                for batch in batches:
                    ours.model(batch)

    lengths = packed.lengths.tolist()
    timed(
        lambda: encode(given),
        f"{model}, text to vectors, {N_TEXTS} texts",
        provider=provider,
        rounds=5,
        tokens=sum(lengths),
        flops=bench_gpu.forward_flops(bench_gpu.MODELS[model], lengths),
        error=error,
    )


@pytest.mark.parametrize("provider", ["fastbert", "transformers sdpa"])
@pytest.mark.parametrize("model", ["MiniLM-L6-H384", "BERT-base"])
def bench_ranking(timed, provider, model):
    """A CrossEncoder before and after accelerate, with pairs of texts in."""
    package = pytest.importorskip("sentence_transformers", reason="not installed")
    ranker = package.CrossEncoder(
        folder(model, "ranker").name, model_kwargs={"dtype": bench_gpu.DTYPE},
        device=str(bench_gpu.DEVICE), max_length=256,
    )  # fmt: skip
    given = sentences(N_QUERIES * (1 + N_CANDIDATES))
    pairs = [
        (query, text)
        for i, query in enumerate(given[:N_QUERIES])
        for text in given[N_QUERIES + i * N_CANDIDATES :][:N_CANDIDATES]
    ]

    def predict(pairs):
        scores = [
            ranker.predict(pairs[i : i + N_CANDIDATES], batch_size=N_CANDIDATES)
            for i in range(0, len(pairs), N_CANDIDATES)
        ]
        return np.concatenate(scores)

    wanted = predict(pairs[:N_CANDIDATES])
    if provider == "fastbert":
        assert not fastbert.accelerate(ranker).slow
    error = float(np.abs(predict(pairs[:N_CANDIDATES]) - wanted).max() / np.abs(wanted).max())
    assert error < 5e-2, error
    packed = tokenizer().pack(*map(list, zip(*pairs, strict=True)), max_length=256)
    timed(
        lambda: predict(pairs),
        f"{model}, CrossEncoder, {N_QUERIES} queries of {N_CANDIDATES} candidates",
        provider=provider,
        rounds=5,
        tokens=len(packed.input_ids),
        error=error,
    )
