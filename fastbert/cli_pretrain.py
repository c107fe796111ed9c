"""`fastbert pretrain`: what its options are, and what it prints. Imports nothing slow."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

_SIZES = ("tiny", "mini", "small", "medium", "base", "large")
_HYGIENE = ("duplicates", "near_duplicates", "min_tokens", "max_tokens", "languages")


def add_pretrain(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "pretrain",
        help="pretrain a BERT on text files",
        description="Pretrain a BERT on text files: masked tokens, and whether a text follows "
        "another. Writes a folder that fastbert and transformers read, with its numbers. On more "
        "GPUs or machines: torchrun --nproc-per-node N -m fastbert.pretrain, same options.",
    )
    command.add_argument(
        "files",
        nargs="+",
        metavar="FILES",
        help=".txt or .txt.gz: a sentence or paragraph a line, an empty line between documents; "
        "tables: a document a row; or the folder of a corpus that --corpus kept",
    )
    command.add_argument("--vocab", required=True, metavar="DIR", help="of fastbert vocab")
    command.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the folder to write"
    )
    length = command.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, metavar="N")
    length.add_argument("--minutes", type=float, metavar="M", help="about so long, on this machine")
    command.add_argument("--size", choices=_SIZES, default="small", help="(default: small)")
    command.add_argument(
        "--nsp", action=argparse.BooleanOptionalAction, default=True,
        help="pairs of texts of which half follow each other, or single texts",
    )  # fmt: skip
    _add_recipe(command)
    _add_text(command)
    command.add_argument(
        "--resume", action="store_true", help="go on with the run that was stopped"
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace DIR once the new one is complete"
    )
    command.set_defaults(run=_pretrain)
    return command


def _add_recipe(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("how to train")
    add = group.add_argument
    add("--max-length", type=int, default=128, metavar="N", help="tokens of a sequence (128)")
    add("--second-length", type=int, default=512, metavar="N", help="and in the last steps (512)")
    add("--second-share", type=float, default=0.1, metavar="X", help="which share of them (0.1)")
    add("--batch-tokens", type=int, metavar="N", help="in one forward (default: by the device)")
    add("--accumulate", type=int, default=1, metavar="N", help="forwards of a rank in a step")
    add("--masking", choices=("tokens", "words", "spans"), default="tokens")
    add("--mask-rate", type=float, default=0.15, metavar="X")
    add("--optimizer", choices=("adamw", "lamb"), default="adamw")
    add("--lr", type=float, metavar="X", help="learning rate (default: by the size)")
    add("--schedule", choices=("linear", "cosine", "constant"), default="linear")
    add("--warmup", type=float, default=0.1, metavar="X", help="steps, or a share of them")
    add("--weight-decay", type=float, default=0.01, metavar="X")
    add("--max-grad-norm", type=float, default=1.0, metavar="X", help="0: any")
    add("--dropout", type=float, default=0.1, metavar="X")
    add("--positions", choices=("absolute", "sinusoidal"), default="absolute")
    add("--fsdp", action="store_true", help="share out the weights over the ranks")
    add("--dtype", choices=("float32", "bfloat16"), help="of autocast")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add(
        "--held-out", type=float, default=0.01, metavar="X", help="share of the text to evaluate on"
    )
    add("--eval-tokens", type=int, default=1 << 17, metavar="N", help="at most so many of it")
    add("--evaluations", type=int, default=10, metavar="N", help="in the run")
    add("--seed", type=int, default=0, metavar="N")
    add("--save-seconds", type=float, default=300.0, metavar="S", help="between checkpoints")
    add("--save-every", type=int, default=0, metavar="N", help="steps between checkpoints")
    add("--log-every", type=int, default=20, metavar="N", help="steps between numbers kept")
    add("--tensorboard", action="store_true", help="its files, in DIR/tensorboard")


def _add_text(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("the text")
    add = group.add_argument
    add("--corpus", type=Path, metavar="DIR", help="keep the tokenised text there")
    add("--max-sentence", type=int, default=64, metavar="N",
        help="cut lines of more tokens behind sentences (64; 0: never)")  # fmt: skip
    add("--duplicates", choices=("keep", "documents", "lines"), default="keep",
        help="leave out documents, or lines of at least 64 bytes, that came before")  # fmt: skip
    add(
        "--near-duplicates",
        type=float,
        metavar="X",
        help="leave out documents so similar, e.g. 0.8",
    )
    add("--min-tokens", type=int, default=1, metavar="N", help="of a document")
    add("--max-tokens", type=int, metavar="N", help="of a document")
    add(
        "--languages", nargs="+", default=(), metavar="CODE", help="leave out others than, e.g., en"
    )


def _pretrain(args: argparse.Namespace) -> None:
    from fastbert.hygiene import Hygiene
    from fastbert.pretrain import pretrain

    options = vars(args).copy()
    for name in ("run", "traceback"):
        options.pop(name)
    cleaning = {name: options.pop(name) for name in _HYGIENE}
    hygiene = Hygiene(**{**cleaning, "languages": tuple(cleaning["languages"])})
    options["max_sentence"] = options["max_sentence"] or None
    try:
        numbers = pretrain(options.pop("files"), hygiene=hygiene, **options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; --resume goes on from the last checkpoint") from None
    if os.environ.get("RANK", "0") != "0":
        return
    print(
        f"{args.out}: {numbers['steps']:,} steps, {numbers['tokens']:,} tokens, "
        f"{numbers['seconds']:,.1f} s, {numbers['tokens_per_second']:,} tokens/s"
    )
    for reason, n in numbers["corpus"]["left_out"].items():
        print(f"  left out, {reason}: {n:,}")
    for name, value in numbers["metrics"].items():
        print(f"  {name:24}{value:.4f}")
