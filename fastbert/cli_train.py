"""`fastbert train`, `evaluate` and `predict`: what their options are, and what they print."""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

FORMATS = ("csv", "tsv", "jsonl", "txt", "parquet", "conll", "squad")
_TASKS = {
    "classify": "one label of several, of a text",
    "pair": "one label of several, of two texts",
    "regression": "a number, of a text or of two",
    "tokens": "a tag for each word: named entities, parts of speech",
    "qa": "where in a text the answer to a question is",
    "mlm": "masked tokens, to adapt a model to texts of a kind",
}
_COLUMNS = {
    "text": ("classify", "pair", "regression", "mlm", "distill"),
    "text_pair": ("classify", "pair", "regression", "distill"),
    "label": ("classify", "pair", "regression", "distill"),
    "words": ("tokens", "distill"),
    "tags": ("tokens", "distill"),
    "question": ("qa", "distill"),
    "context": ("qa", "distill"),
    "answers": ("qa", "distill"),
}


def add_train(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "train",
        help="fine-tune a model on a file of examples",
        description="Fine-tune a model on a file of examples, and write a folder that fastbert and "
        "transformers read, with scores, pictures and a card. A run that was stopped goes on with "
        "--resume, to the same weights. On more GPUs or machines: torchrun --nproc-per-node N -m "
        "fastbert.train, same options.",
    )
    tasks = command.add_subparsers(title="tasks", metavar="TASK", required=True)
    for name, what in _TASKS.items():
        _add_task(tasks, name, what)
    _add_distill(tasks)
    return command


def _add_task(tasks: Any, name: str, what: str) -> None:
    task = tasks.add_parser(name, help=what, description=f"Train for {what}.")
    files = "SQuAD's .json, .jsonl, .parquet" if name == "qa" else ".csv, .tsv, .jsonl, .parquet"
    files = f".conll or .txt (a word and its tag a line), {files}" if name == "tokens" else files
    task.add_argument("train", metavar="TRAIN", help=f"{files}; text ones also as .gz")
    task.add_argument("--model", required=True, metavar="M", help="a model's folder or its hub id")
    _add_files(task)
    _add_columns(task, name)
    _add_recipe(task)
    if name in ("classify", "pair"):
        task.add_argument("--multi-label", action="store_true", help="any number of labels each")
        task.add_argument("--class-weights", choices=("balanced",), help="rare labels count more")
        task.add_argument("--label-smoothing", type=float, default=0.0, metavar="X")
        task.add_argument("--r-drop", type=float, default=0.0, metavar="X", help="e.g. 1")
    if name in ("classify", "pair", "regression"):
        task.add_argument(
            "--teacher", metavar="DIR", help="a trained folder whose scores are learned as well"
        )
        task.add_argument("--teaching", type=float, default=0.5, metavar="X", help="their share")
        task.add_argument("--temperature", type=float, default=2.0, metavar="T", help="of theirs")
    if name == "mlm":
        task.add_argument(
            "--masking", choices=("tokens", "words", "spans"), default="tokens", help="what is hid"
        )
        task.add_argument("--mask-rate", type=float, default=0.15, metavar="X", help="share of it")
    if name == "qa":
        task.add_argument("--stride", type=int, metavar="N", help="tokens that windows share")
        task.add_argument(
            "--max-answer-length", type=int, default=30, metavar="N", help="in tokens"
        )
    task.set_defaults(run=_train, task=name)


def _add_distill(tasks: Any) -> None:
    task = tasks.add_parser(
        "distill",
        help="a small model, which learns from a trained one",
        description="Train a small model to say what a trained one says: it learns the teacher's "
        "logits and hidden states of each text, and the labels where there are some. The task, "
        "its labels and its tokenizer are the teacher's.",
    )
    task.add_argument(
        "train",
        metavar="TRAIN",
        help="examples of the teacher's task, with labels or without: .txt will do",
    )
    task.add_argument(
        "--teacher", required=True, metavar="DIR", help="a folder that fastbert train wrote"
    )
    task.add_argument(
        "--student", required=True, metavar="S",
        help="tiny, mini, small, medium or base; layers and width, such as 3x384 (one of the "
        "teacher's width starts as some of its layers); or the folder of a model with its words",
    )  # fmt: skip
    _add_files(task)
    task.add_argument(
        "--hidden", type=float, default=0.1, metavar="X",
        help="the weight of the hidden states; 0: logits only (default: 0.1)",
    )  # fmt: skip
    task.add_argument(
        "--teaching", type=float, default=0.5, metavar="X",
        help="the share of the logits; the rest is the labels' (default: 0.5)",
    )  # fmt: skip
    task.add_argument(
        "--temperature", type=float, default=2.0, metavar="T", help="of the logits (default: 2)"
    )
    _add_columns(task, "distill", "the teacher's")
    _add_recipe(task, with_lora=False)
    task.set_defaults(run=_train, task="distill")


def _add_files(task: argparse.ArgumentParser) -> None:
    task.add_argument("--dev", metavar="DEV", help="examples to evaluate on; the best model counts")
    task.add_argument("--out", required=True, type=Path, metavar="DIR", help="the folder to write")
    task.add_argument("--format", choices=FORMATS, help="what TRAIN and DEV are, if not as named")
    task.add_argument("--resume", action="store_true", help="go on with the run that was stopped")
    task.add_argument(
        "--overwrite", action="store_true", help="replace DIR once the new one is complete"
    )
    task.add_argument("--traceback", action="store_true", help="show where an error arose")


def _add_columns(
    task: argparse.ArgumentParser, name: str, default: str = "guessed, and said"
) -> None:
    for part, of in _COLUMNS.items():
        if name in of:
            may_miss = part == "text_pair" and name == "classify"
            task.add_argument(
                f"--{part.replace('_', '-')}",
                metavar="COL",
                dest=f"column_{part}",
                help=f"the column with the {part.replace('_', ' ')} "
                f"(default: {'none' if may_miss else default})",
            )


def _add_recipe(task: argparse.ArgumentParser, with_lora: bool = True) -> None:
    group = task.add_argument_group("how to train")
    group.add_argument("--epochs", type=float, default=3, metavar="N", help="(default: 3)")
    group.add_argument("--lr", type=float, help="learning rate (default: by the model's size)")
    group.add_argument("--batch-size", type=int, default=32, metavar="N", help="sequences a step")
    group.add_argument(
        "--step-tokens", type=int, metavar="N", help="tokens a step, in place of --batch-size"
    )
    group.add_argument(
        "--batch-tokens", type=int, default=8192, metavar="N",
        help="tokens in one forward: fewer take less memory, and change nothing else",
    )  # fmt: skip
    group.add_argument("--max-length", type=int, default=512, metavar="N", help="of a text, tokens")
    group.add_argument(
        "--window", type=int, default=1, metavar="N", help="sort by length within so many steps"
    )
    group.add_argument("--weight-decay", type=float, default=0.01, metavar="X")
    group.add_argument("--schedule", choices=("linear", "cosine", "constant"), default="linear")
    group.add_argument("--warmup", type=float, default=0.1, metavar="X", help="steps, or a share")
    group.add_argument("--max-grad-norm", type=float, default=1.0, metavar="X", help="0: any")
    group.add_argument("--layer-decay", type=float, default=1.0, metavar="X", help="e.g. 0.9")
    group.add_argument(
        "--freeze", type=int, default=0, metavar="N", help="lowest layers; -1: all but the head"
    )
    if with_lora:
        group.add_argument(
            "--lora", type=int, default=0, metavar="R", help="train adapters, by peft"
        )
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="of autocast")
    group.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    group.add_argument("--evaluations", type=int, default=1, metavar="N", help="in an epoch")
    group.add_argument(
        "--patience", type=int, default=0, metavar="N", help="stop after N without a better one"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N")
    group.add_argument("--save-seconds", type=float, default=300.0, metavar="S", help="checkpoints")
    group.add_argument("--save-every", type=int, default=0, metavar="N", help="checkpoints, steps")
    group.add_argument("--log-every", type=int, default=20, metavar="N", help="numbers kept, steps")
    group.add_argument("--tensorboard", action="store_true", help="its files, in DIR/tensorboard")


def _train(args: argparse.Namespace) -> None:
    from fastbert.train import distill, train_task

    options = vars(args).copy()
    for name in ("run", "task", "traceback"):
        options.pop(name)
    train = options.pop("train")
    columns = {
        name.removeprefix("column_"): options.pop(name)
        for name in list(options)
        if name.startswith("column_")
    }
    columns = {part: name for part, name in columns.items() if name is not None}
    train_it = distill if args.task == "distill" else partial(train_task, args.task)
    try:
        numbers = train_it(train, columns=columns, **options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; --resume goes on from the last checkpoint") from None
    if os.environ.get("RANK", "0") != "0":
        return
    print(
        f"{args.out}: {numbers['steps']:,} steps, {numbers['seconds']:,.1f} s, "
        f"{numbers['tokens_per_second']:,} tokens/s"
    )
    if numbers["metrics"]:
        print(_scores(numbers["metrics"]))
    if "teacher" in numbers and numbers["metrics"]:
        print(f"the teacher, {args.teacher}:\n{_scores(numbers['teacher']['metrics'])}")


def add_evaluate(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "evaluate",
        help="scores of a trained model on a file",
        description="Scores of a folder that fastbert train wrote on a file of labelled examples.",
    )
    command.add_argument("folder", metavar="DIR")
    command.add_argument("data", metavar="DATA")
    command.add_argument("--format", choices=FORMATS, help="what DATA is, if not as named")
    command.add_argument("--out", type=Path, metavar="FILE", help="where to write them as JSON")
    command.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    command.set_defaults(run=_evaluate)
    return command


def _evaluate(args: argparse.Namespace) -> None:
    from fastbert.files import write_atomically
    from fastbert.train import load

    found = load(args.folder, args.device).evaluate(args.data, args.format)
    print(_scores(found))
    if args.out is not None:
        with write_atomically(args.out) as path:
            path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def add_predict(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "predict",
        help="what a trained model says of a text or a file",
        description="What the model of a folder that fastbert train wrote says: a JSON object a "
        "line, in the order of the input.",
    )
    command.add_argument("folder", metavar="DIR")
    given = command.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", help="the text; words for tokens; the question for qa")
    given.add_argument("--file", metavar="F", help="a file like the one it was trained on")
    command.add_argument("--text-pair", metavar="TEXT", help="the second text; the context for qa")
    command.add_argument("--format", choices=FORMATS, help="what F is, if not as named")
    command.add_argument("--out", type=Path, metavar="FILE", help="(default: standard output)")
    command.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    command.set_defaults(run=_predict)
    return command


def _predict(args: argparse.Namespace) -> None:
    from fastbert.files import write_atomically
    from fastbert.train import load

    trained = load(args.folder, args.device)
    if args.text is not None:
        parts = trained.task.inputs
        values = [args.text] if args.text_pair is None else [args.text, args.text_pair]
        if len(values) != len(parts):
            raise ValueError(
                f"the model wants {' and '.join(parts)}: {len(parts)} of --text and --text-pair, "
                f"got {len(values)}"
            )
        columns = {part: part for part in parts}
        found = trained.predict([dict(zip(parts, values, strict=True))], columns=columns)
    else:
        found = trained.predict(args.file, args.format)
    lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in found)
    if args.out is None:
        sys.stdout.write(lines)
    else:
        with write_atomically(args.out) as path:
            path.write_text(lines, encoding="utf-8")


def _scores(metrics: dict[str, Any]) -> str:
    return "\n".join(
        f"  {name:24}{value:.4f}" for name, value in metrics.items() if isinstance(value, float)
    )
