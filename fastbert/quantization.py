"""`fastbert quantize`: a folder's int8 copy for CPUs, with what it loses and gains side by side.

    fastbert.quantize("out", "out-int8", "dev.tsv")

The copy is a folder that fastbert reads wherever it reads the one it was made of, on a CPU.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from fastbert.batches import select
from fastbert.config import BertConfig
from fastbert.conversion import copy_others
from fastbert.embed import Embedder
from fastbert.files import find_checkpoint, replace_folder
from fastbert.int8 import DESCRIPTION, MARK, quantize_tensors
from fastbert.kernels.linear_int8 import why_no_int8
from fastbert.model import BertModel
from fastbert.packing import PackedBatch
from fastbert.readers import FORMATS, TextSource
from fastbert.train import SETTINGS_NAME, load
from fastbert.weights import INT8_NAME, read_tensors, write_tensors

MOST_TEXTS = 2048  # of a file, for an encoder that was not trained for a task
# What is timed: a batch of so many tokens, and a few texts one at a time. Other work on the machine
# meets both models alike, as they take turns.
_TIMED_TOKENS, _TIMED_TEXTS = 2048, 5
_LEAST_ROUNDS, _MOST_ROUNDS, _SECONDS = 3, 15, 10.0

Numbers = dict[str, Any]
# Of the folder that was written: what was found of the float32 model and of the int8 one.
Compare = Callable[[Path], list[Numbers]]


def quantize(
    folder: str | Path,
    out: str | Path,
    data: str | Path | None = None,
    *,
    format: str | None = None,
    text: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Numbers:
    """Write the int8 copy of a model's folder to the new folder `out`, and compare the two.

    folder: what `fastbert train` wrote, or any encoder, also by its hub id. data: labelled examples
    for the former; for an encoder a file of texts, of which the first 2,048 count. Without data
    nothing is compared. format: of data, where its name does not say. text: its column of texts,
    for an encoder. The linear layers of the encoder become int8; embeddings, layer norms, pooler
    and head stay float32.

    Returns what `out`/metrics.json holds: "float32" and "int8", each with its "megabytes" of
    weights and, with data, "metrics", "tokens_per_second" and "milliseconds_a_text" on this CPU. An
    encoder's metrics are cosines with float32's vector of the same text. Raises ValueError where
    the folder is int8 already, where data do not fit, and where this CPU does not multiply int8.
    """
    why = why_no_int8()
    if why is not None:
        raise ValueError(why)
    checkpoint = find_checkpoint(folder)
    if checkpoint.kind == "int8":
        raise ValueError(f"{folder} is int8 already: name the float32 folder that it was made of")
    sources = [path for path in (folder, data) if path is not None and Path(path).exists()]
    is_trained = (checkpoint.folder / SETTINGS_NAME).is_file()
    if is_trained and text is not None:
        raise ValueError(f"{folder} knows its columns by {SETTINGS_NAME}, so no column {text!r}")
    with replace_folder(Path(out), overwrite, sources) as new:
        compare: Compare | None = None
        if data is not None:
            compare = (
                _trained(checkpoint.folder, data, format)
                if is_trained
                else _encoder(checkpoint.folder, data, format, text)
            )
        new.mkdir(parents=True)
        copy_others(checkpoint.folder, new)
        if is_trained:
            shutil.copyfile(checkpoint.folder / SETTINGS_NAME, new / SETTINGS_NAME)
        config = BertConfig.from_file(checkpoint.config_file)
        extra = {**config.extra, "dtype": "float32", MARK: DESCRIPTION}
        config.replace(extra=extra).save_pretrained(new)
        tensors = read_tensors(checkpoint)
        small = quantize_tensors(tensors)
        write_tensors(small, new / INT8_NAME)
        numbers: Numbers = {
            "model": str(folder),
            "data": None if data is None else str(data),
            "float32": {"megabytes": _megabytes(tensors.values())},
            "int8": {"megabytes": _megabytes(small.values())},
        }
        if compare is None:
            BertModel.from_pretrained(new, add_pooling_layer=False)  # whether it can be read
        else:
            for name, found in zip(("float32", "int8"), compare(new), strict=True):
                numbers[name] |= found
        numbers |= {
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "versions": {"fastbert": version("fastbert"), "torch": torch.__version__},
        }
        (new / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
        (new / "README.md").write_text(_card(numbers), encoding="utf-8")
    if not quiet:
        print(table(numbers), flush=True)
    return numbers


def _trained(folder: Path, data: str | Path, format: str | None) -> Compare:
    """By the scores of the task that it was trained for."""
    exact = load(folder, "cpu")
    encoded = exact.encode(data, format)

    def compare(new: Path) -> list[Numbers]:
        both = (exact, load(new, "cpu"))
        speeds = _speeds([each.model for each in both], encoded.packed)
        scores = [each.task.evaluate(each.model, encoded, each.batch_tokens) for each in both]
        return [{"metrics": m, **speed} for m, speed in zip(scores, speeds, strict=True)]

    return compare


def _encoder(folder: Path, data: str | Path, format: str | None, text: str | None) -> Compare:
    """By the cosines between the two vectors of a text."""
    if format not in (None, *FORMATS):
        raise ValueError(f"texts are read as one of {', '.join(FORMATS)}, got {format!r}")
    exact = Embedder.from_pretrained(folder, dtype=torch.float32, device="cpu")
    source = TextSource(data, column=text, format=format)
    texts = list(islice(source, MOST_TEXTS))
    if not texts:
        raise ValueError(f"{source.name} is empty: it has no texts")

    def compare(new: Path) -> list[Numbers]:
        both = (exact, Embedder.from_pretrained(new, device="cpu"))
        packed = exact.tokenizer.pack(texts, max_length=exact.max_length)
        speeds = _speeds([each.model for each in both], packed)
        vectors = [each.encode(texts).astype(np.float64) for each in both]
        first, second = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in vectors)
        cosines = (first * second).sum(1)
        scores = (
            {"cosine_mean": 1.0, "cosine_least": 1.0},
            {"cosine_mean": float(cosines.mean()), "cosine_least": float(cosines.min())},
        )
        return [{"metrics": m, **speed} for m, speed in zip(scores, speeds, strict=True)]

    return compare


@torch.inference_mode()
def _speeds(models: Sequence[Any], packed: PackedBatch) -> list[Numbers]:
    """Of the encoders, on sequences from all over the data: medians of turns taken."""
    step = max(1, packed.input_ids.numel() // _TIMED_TOKENS)
    index = list(range(0, len(packed), step))
    batch = select(packed, index)
    alone = [select(packed, [i]) for i in index[:: -(-len(index) // _TIMED_TEXTS)]]
    at_once = _times(models, [batch])
    one_by_one = _times(models, alone)
    return [
        {
            "tokens_per_second": round(batch.input_ids.numel() / a, 1),
            "milliseconds_a_text": round(1000 * b / len(alone), 3),
        }
        for a, b in zip(at_once, one_by_one, strict=True)
    ]


def _times(models: Sequence[Any], batches: list[PackedBatch]) -> list[float]:
    """Median seconds in which each model's encoder is through all the batches."""
    times: list[list[float]] = [[] for _ in models]
    end = time.perf_counter() + _SECONDS
    for turn in range(-1, _MOST_ROUNDS):  # the first prepacks weights, and does not count
        for model, own in zip(models, times, strict=True):
            start = time.perf_counter()
            for batch in batches:
                model.base_model(batch)
            if turn >= 0:
                own.append(time.perf_counter() - start)
        if turn + 1 >= _LEAST_ROUNDS and time.perf_counter() > end:
            break
    return [median(own) for own in times]


def _megabytes(tensors: Any) -> float:
    return round(sum(tensor.nbytes for tensor in tensors) / 1e6, 2)


def _rows(numbers: Numbers) -> list[tuple[str, str, str, str]]:
    """Name, float32, int8, and what changed."""
    a, b = numbers["float32"], numbers["int8"]
    scores = a.get("metrics", {})
    rows = [
        (name, f"{x:.4f}", f"{b['metrics'][name]:.4f}", f"{b['metrics'][name] - x:+.4f}")
        for name, x in scores.items()
        if isinstance(x, float)
    ]
    units = (
        ("tokens/s", "tokens_per_second", ",.0f"),
        ("ms for one text", "milliseconds_a_text", ",.2f"),
        ("MB of weights", "megabytes", ",.1f"),
    )
    return rows + [
        (shown, f"{a[key]:{form}}", f"{b[key]:{form}}", f"x {b[key] / a[key]:.2f}")
        for shown, key, form in units
        if key in a
    ]


def table(numbers: Numbers) -> str:
    """Both models side by side, for a terminal."""
    rows = [("", "float32", "int8", ""), *_rows(numbers)]
    lines = [f"  {name:24}{a:>10}{b:>10}{change:>10}".rstrip() for name, a, b, change in rows]
    if numbers["data"] is None:
        lines.append("  not compared: DATA, a file like the one it was trained on, does that")
    return "\n".join(lines)


def _card(numbers: Numbers) -> str:
    """README.md of the int8 folder."""
    name = Path(numbers["model"]).name
    lines = [
        "---",
        "library_name: fastbert",
        "tags: [fastbert, int8]",
        "---",
        "",
        f"# {name}, int8",
        "",
        f"Made of `{numbers['model']}` by `fastbert quantize`, version "
        f"{numbers['versions']['fastbert']}: the linear layers of the encoder are int8, everything "
        "else float32. For inference on a CPU with fastbert only: transformers cannot read this "
        "folder, and it can be neither trained nor made float32 again. Keep the folder that it was "
        "made of for GPUs, for transformers and for training.",
        "",
        "```python",
        "from fastbert import BertModel",
        "",
        'model = BertModel.from_pretrained("this folder")  # or a head',
        "```",
        "",
    ]
    if numbers["data"] is not None:
        what = f"On `{numbers['data']}`, {numbers['threads']} threads, {numbers['instructions']}:"
        lines += [what, ""]
    lines += ["| | float32 | int8 | |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {' | '.join(row)} |" for row in _rows(numbers)]
    return "\n".join([*lines, ""])
