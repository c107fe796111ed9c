"""A step of masked-language-model training, as transformers' run_mlm.py --line_by_line takes it.

32 lines of English novels, cut at 128 tokens, ids at hand; a step draws masks, goes forward and
backward, and AdamW steps. run_mlm's collator pads to the longest line. Both have one model's
weights; the losses on the same masks are compared first.
"""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbert import BertConfig, BertForMaskedLM, BertTokenizer
from fastbert.loop import MicroBatch
from fastbert.losses import IGNORED
from fastbert.masking import Masking, Vocabulary
from fastbert.packing import pack
from fastbert.pretrain import SIZES
from fastbert.scored import Scored, loss_of

transformers = pytest.importorskip("transformers")

DATA = Path(__file__).parents[1].parent / "shared/data"
LINES, LONGEST = 32, 128


def lines(tokenizer):
    """The ids of 32 lines out of the middle of the novels, padded, and their mask."""
    text = gzip.decompress((DATA / "corpus/en_novels.txt.gz").read_bytes()).decode()
    chosen = [line for line in text.split("\n") if line.strip()][20_000 : 20_000 + LINES]
    rows = tokenizer(chosen, truncation=True, max_length=LONGEST, padding=True, return_tensors="pt")
    return rows["input_ids"], rows["attention_mask"]


def with_masks(packed, vocabulary, rng):
    """The batch with masks drawn: what fastbert.pretrain's loop takes."""
    lengths = packed.lengths.numpy().astype(np.int64)
    ids, labels = Masking().apply(packed.input_ids.numpy(), lengths, vocabulary, rng)
    hidden = replace(packed, input_ids=torch.from_numpy(ids))
    items = {"labels": float((labels != IGNORED).sum())}
    return MicroBatch(hidden, {"labels": torch.from_numpy(labels)}, items)


@pytest.mark.parametrize("provider", ["fastbert", "transformers sdpa"])
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def bench_pretraining(timed, size, provider, tmp_path):
    vocab = DATA / "vocab/bert-base-uncased-vocab.txt"
    if not vocab.is_file():
        pytest.skip(f"needs {vocab}")
    tokenizer = BertTokenizer(vocab)
    tokenizer.save_pretrained(tmp_path)
    ids, mask = lines(tokenizer)
    n_layers, hidden = SIZES[size]
    torch.manual_seed(0)
    ours = BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=n_layers,
            num_attention_heads=hidden // 64, intermediate_size=4 * hidden,
        )
    )  # fmt: skip
    packed, vocabulary = pack(ids, mask), Vocabulary(tokenizer)
    rng = np.random.default_rng(0)
    ours.save_pretrained(tmp_path)
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    collator = transformers.DataCollatorForLanguageModeling(
        transformers.AutoTokenizer.from_pretrained(tmp_path), mlm_probability=0.15
    )
    rows = [{"input_ids": row[real.bool()].tolist()} for row, real in zip(ids, mask, strict=True)]

    model = Scored(ours).eval()
    batch = with_masks(packed, vocabulary, np.random.default_rng(1))
    with torch.no_grad():
        found = loss_of(model, batch, batch.n_items)[0]
        padded_ids, labels = ids.clone(), torch.full_like(ids, IGNORED)
        padded_ids[mask.bool()] = batch.packed.input_ids
        labels[mask.bool()] = batch.labels["labels"]
        wanted = theirs.eval()(padded_ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)

    def step_fastbert():
        batch = with_masks(packed, vocabulary, rng)
        loss_of(model, batch, batch.n_items)[0].backward()

    def step_transformers():
        theirs(**collator(rows)).loss.backward()

    network = {"fastbert": model, "transformers sdpa": theirs}[provider].train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    take = {"fastbert": step_fastbert, "transformers sdpa": step_transformers}[provider]

    def step():
        take()
        optimizer.step()
        optimizer.zero_grad()

    timed(
        step,
        f"pretraining step, {size}, {LINES} lines of novels of up to {LONGEST} tokens",
        provider=provider,
        rounds=5 if size == "base" else 15,
        tokens=int(mask.sum()),
        padding=1 - int(mask.sum()) / mask.numel(),
    )
