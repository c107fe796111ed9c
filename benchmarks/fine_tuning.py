"""Fine-tuning beside transformers' Trainer: the same data, weights, seeds, epochs and batches.

    python benchmarks/fine_tuning.py [TASK ...] [--seeds 3] [--threads 1]

Each run is a process of its own, and the two take turns. Seconds are from texts and labels in
memory to trained weights, tokenizing included, imports and evaluation not; wall and CPU time. Both
keep the last weights. Trainer pads to the longest of a batch, as is usual. What is found is added
to fine_tuning/<machine>.json, from which the table in README.md is made.

It takes an hour or two, so it is no part of `make bench`.
"""

import argparse
import csv
import gzip
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers import minilm_folder, shared_folder
from stopwatch import wait

HERE = Path(__file__).parent
DATA = (shared_folder() or Path()) / "data"
MARKS = "<!-- {} of the table made by fine_tuning.py -->"
MINILM, OWN = "MiniLM-L6", "tiny, random weights, own vocabulary"

# kind, files, columns, score, model, epochs, learning rate, longest
TASKS = {
    "sst2": ("classify", "sst2/train_sentences.tsv.gz", "sst2/dev.tsv", ("sentence", "label"),
             "accuracy", MINILM, 1, 1e-4, 128),
    "stsb": ("regression", "stsb/en_train.tsv.gz", "stsb/en_dev.tsv",
             ("sentence1", "sentence2", "score"), "spearman", MINILM, 1, 1e-4, 128),
    "wnut17": ("tokens", "ner/wnut17_train.conll", "ner/wnut17_dev.conll", (), "f1", MINILM, 2,
               3e-4, 128),
    "chnsenticorp": ("classify", "chnsenticorp/train.tsv.gz", "chnsenticorp/dev.tsv",
                     ("text", "label"), "accuracy", OWN, 2, 1e-3, 256),
    "mrpc": ("pair", "mrpc/train.tsv", "mrpc/dev.tsv", ("#1 String", "#2 String", "Quality"),
             "f1", MINILM, 2, 1e-4, 128),
}  # fmt: skip
BATCH = 32


def read(name, columns):
    """Columns of a file as lists; of CoNLL files words and tags of each sentence."""
    path = DATA / name
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if not columns:
        sentences = [part.split("\n") for part in text.decode().strip().split("\n\n")]
        rows = [[line.split("\t") for line in sentence] for sentence in sentences]
        return [[[pair[i] for pair in sentence] for sentence in rows] for i in (0, 1)]
    lines = text.decode().splitlines()
    rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [[row[column] for row in rows] for column in columns]


def model_folder(name, texts, folder):
    """MiniLM's, or one with a vocabulary of these texts and random weights."""
    if name == MINILM:
        return Path(os.environ.get("MODEL") or minilm_folder())
    import torch

    import fastbert

    tokenizer = fastbert.train_vocab(iter(texts), 8000, limit_alphabet=6000, show_progress=False)
    config = fastbert.BertConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=512,
    )  # fmt: skip
    torch.manual_seed(0)
    fastbert.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def scored(kind, truth, predicted):
    """The task's score by the libraries that both sides' scores come from."""
    if kind == "tokens":
        from seqeval.metrics import f1_score as entity_f1

        return float(entity_f1(truth, predicted))
    if kind == "regression":
        from scipy.stats import spearmanr

        return float(spearmanr([float(x) for x in truth], predicted).statistic)
    if kind == "pair":
        from sklearn.metrics import f1_score

        return float(f1_score(truth, predicted, pos_label="1"))
    return float(statistics.mean(a == b for a, b in zip(truth, predicted, strict=True)))


def by_fastbert(kind, train, dev, model, epochs, lr, longest, seed, folder, device):
    from fastbert import train as fastbert_train

    parts = {"tokens": ("words", "tags"), "classify": ("text", "label")}
    parts = parts.get(kind, ("text", "text_pair", "label"))
    columns = {part: part for part in parts}
    rows = [dict(zip(parts, row, strict=True)) for row in zip(*train, strict=True)]
    start = time.perf_counter(), time.process_time()
    numbers = fastbert_train.train_task(
        kind, rows, model=model, out=folder / "out",
        columns=columns, epochs=epochs, lr=lr, max_length=longest, batch_size=BATCH, seed=seed,
        quiet=True, device=device, dtype="bfloat16" if device == "cuda" else None,
    )  # fmt: skip
    spent = time.perf_counter() - start[0], time.process_time() - start[1]
    inputs = [dict(zip(parts, row, strict=False)) for row in zip(*dev[:-1], strict=True)]
    found = fastbert_train.load(folder / "out", device).predict(inputs, columns=columns)
    name = {"tokens": "tags", "regression": "score"}.get(kind, "label")
    assert numbers["steps"] == -(-len(train[0]) // BATCH) * epochs
    return spent, [row[name] for row in found], None


def by_trainer(kind, train, dev, model, epochs, lr, longest, seed, folder, device):
    import numpy as np
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.set_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    labels = (
        []
        if kind == "regression"
        else sorted({x for y in train[-1] for x in (y if kind == "tokens" else [y])})
    )
    numbers = {label: i for i, label in enumerate(labels)}
    auto = transformers.AutoModelForTokenClassification
    if kind != "tokens":
        auto = transformers.AutoModelForSequenceClassification
    network = auto.from_pretrained(model, num_labels=len(labels) or 1)

    def encode(columns, labelled):
        options = {"truncation": True, "max_length": longest}
        if kind == "tokens":
            rows = tokenizer(columns[0], is_split_into_words=True, **options)
            targets = []
            for i, tags in enumerate(columns[1]):
                words = rows.word_ids(i)
                first = [
                    a != b and a is not None for a, b in zip(words, [None, *words], strict=False)
                ]
                targets.append(
                    [
                        numbers.get(tags[w], 0) if is_first else -100
                        for w, is_first in zip(words, first, strict=True)
                    ]
                )
        else:
            rows = tokenizer(*columns[:-1], **options)
            targets = [float(x) if kind == "regression" else numbers[x] for x in columns[-1]]
        names = list(rows)
        made = [{name: rows[name][i] for name in names} for i in range(len(columns[0]))]
        return [
            row | ({"labels": y} if labelled or kind == "tokens" else {})
            for row, y in zip(made, targets, strict=True)
        ]

    real, all_tokens = 0, 0
    collator = transformers.DataCollatorWithPadding(tokenizer)
    if kind == "tokens":
        collator = transformers.DataCollatorForTokenClassification(tokenizer)

    def collate(rows):
        nonlocal real, all_tokens
        batch = collator(rows)
        real += int(batch["attention_mask"].sum())
        all_tokens += batch["attention_mask"].numel()
        return batch

    start = time.perf_counter(), time.process_time()
    arguments = transformers.TrainingArguments(
        output_dir=folder / "trainer", per_device_train_batch_size=BATCH, learning_rate=lr,
        num_train_epochs=epochs, warmup_steps=0.1, weight_decay=0.01, seed=seed,
        per_device_eval_batch_size=64, save_strategy="no", report_to=[], disable_tqdm=True,
        logging_strategy="no", use_cpu=device == "cpu", bf16=device == "cuda",
    )  # fmt: skip
    trainer = transformers.Trainer(
        network, arguments, train_dataset=encode(train, True), data_collator=collate
    )
    trainer.train()
    wait()
    spent = time.perf_counter() - start[0], time.process_time() - start[1]
    padding = 1 - real / all_tokens
    assert trainer.state.global_step == -(-len(train[0]) // BATCH) * epochs
    found = trainer.predict(encode(dev, kind == "tokens"))
    logits = found.predictions
    if kind == "regression":
        return spent, logits[:, 0].tolist(), padding
    chosen = logits.argmax(-1)
    if kind != "tokens":
        return spent, [labels[i] for i in chosen], padding
    predicted = []
    for tags, row, targets in zip(dev[1], chosen, found.label_ids, strict=True):
        named = [labels[i] for i in row[np.asarray(targets) != -100]]
        predicted.append(named + ["O"] * (len(tags) - len(named)))  # beyond the longest
    return spent, predicted, padding


BY = {"fastbert": by_fastbert, "Trainer": by_trainer}


def one(task, by, seed, device="cpu"):
    """One run of what is described as in TASKS: its score and its time. On a GPU in bfloat16."""
    kind, train_file, dev_file, columns, _, model, epochs, lr, longest = task
    train, dev = read(train_file, columns), read(dev_file, columns)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start = model_folder(model, train[0], folder / "start")
        spent, predicted, padding = BY[by](
            kind, train, dev, start, epochs, lr, longest, seed, folder, device
        )
    score = scored(kind, dev[-1], predicted)
    return {"by": by, "seed": seed, "score": score, "seconds": round(spent[0], 2),
            "cpu_seconds": round(spent[1], 2), "padding": padding}  # fmt: skip


def table(saved):
    lines = [
        "| | score | fastbert | Trainer | seconds | Trainer's | ratio | of CPU time | padding |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for task, (_, _, _, _, score, model, epochs, _, _) in TASKS.items():
        runs = {by: [r for r in saved["runs"] if (r["task"], r["by"]) == (task, by)] for by in BY}
        if not all(runs.values()):
            continue
        mean, middle = {}, {}
        for by, rows in runs.items():
            values = [row["score"] for row in rows]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            mean[by] = f"{statistics.mean(values):.4f}{spread} ({len(values)})"
            middle[by] = [statistics.median(r[k] for r in rows) for k in ("seconds", "cpu_seconds")]
        a, b = middle["fastbert"], middle["Trainer"]
        padding = runs["Trainer"][0]["padding"]
        spent = f"{a[0]:.0f} | {b[0]:.0f} | {b[0] / a[0]:.2f} | {b[1] / a[1]:.2f}"
        lines.append(
            f"| {task}, {model}, {epochs} epochs | {score} "
            f"| {mean['fastbert']} | {mean['Trainer']} | {spent} | {padding:.0%} |"
        )
    facts = ", ".join(f"{k} {v}" for k, v in saved["machine"].items())
    return f"Measured on: {facts}.\n\n" + "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="*", default=list(TASKS), metavar="TASK")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--one", nargs=2, metavar=("BY", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(TASKS[args.tasks[0]], args.one[0], int(args.one[1]))))
        return
    from report import between, machine

    where = {**machine(), "threads": args.threads}
    name = re.sub(r"[^a-z0-9]+", "-", where["cpu"].lower()).strip("-")
    out = HERE / "fine_tuning" / f"{name}.json"
    out.parent.mkdir(exist_ok=True)
    saved = json.loads(out.read_text()) if out.is_file() else {"runs": []}
    saved["machine"] = where
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1",
                   "RAYON_NUM_THREADS": str(args.threads)}  # fmt: skip
    known = {(row["task"], row["by"], row["seed"]) for row in saved["runs"]}
    for seed, task, by in itertools.product(range(args.seeds), args.tasks, BY):
        if (task, by, seed) in known:
            continue
        command = [sys.executable, __file__, task, "--one", by, str(seed)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        row = {"task": task, **json.loads(done.stdout.splitlines()[-1])}
        print(json.dumps(row), flush=True)
        saved["runs"].append(row)
        out.write_text(json.dumps(saved, indent=1) + "\n")
    readme = HERE / "README.md"
    readme.write_text(between(readme.read_text(), MARKS, table(saved)))


if __name__ == "__main__":
    main()
