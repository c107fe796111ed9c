"""`fastbert quantize`: what its options are."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastbert.cli_train import FORMATS


def add_quantize(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "quantize",
        help="an int8 copy of a model for CPUs, and what it loses and gains",
        description="Write an int8 copy of a model's folder, for faster inference on a CPU, and "
        "print both side by side: scores, speed on this CPU, size. fastbert embed, evaluate and "
        "predict read the copy; transformers does not, so keep DIR.",
    )
    command.add_argument(
        "folder", metavar="DIR", help="a folder of fastbert train, or any encoder's, or its hub id"
    )
    command.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="to compare on: labelled examples as for fastbert evaluate; for an encoder that was "
        "not trained for a task, texts as for fastbert embed, of which the first 2,048 count "
        "(default: nothing is compared)",
    )
    command.add_argument(
        "--out", required=True, type=Path, metavar="NEW", help="the folder to write"
    )
    command.add_argument(
        "--text", metavar="COL", help="the column with the text, for an encoder (default: guessed)"
    )
    command.add_argument("--format", choices=FORMATS, help="what DATA is, if not as named")
    command.add_argument(
        "--overwrite", action="store_true", help="replace NEW once the new one is complete"
    )
    command.set_defaults(run=_quantize)
    return command


def _quantize(args: argparse.Namespace) -> None:
    from fastbert.quantization import quantize

    print(f"{args.folder} to int8", flush=True)
    quantize(
        args.folder,
        args.out,
        args.data,
        format=args.format,
        text=args.text,
        overwrite=args.overwrite,
    )
    print(f"{args.out}: written", flush=True)
