"""The `fastbert` command. Imports what is slow (torch, numpy) only inside the commands."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastbert.cli_pretrain import add_pretrain
from fastbert.cli_quantize import add_quantize
from fastbert.cli_train import add_evaluate, add_predict, add_train
from fastbert.files import replace_folder
from fastbert.readers import FORMATS, TextSource

if TYPE_CHECKING:
    import torch

_OUTPUTS = (".npy", ".parquet", ".jsonl")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 after an error, 130 after Ctrl-C.

    A usage error raises SystemExit(2). Every error is one line on stderr.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt as interrupt:
        print(f"fastbert: interrupted{interrupt}", file=sys.stderr)
        return 130
    except Exception as error:
        if args.traceback or os.environ.get("FASTBERT_TRACEBACK"):
            traceback.print_exc()
        print(f"fastbert: error: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError)) and text:
        return text
    return f"{type(error).__name__}: {text} (FASTBERT_TRACEBACK=1 shows where)"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"fastbert: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastbert", description="BERT made fast without changing it.")
    parser.add_argument("--version", action="version", version=f"fastbert {version('fastbert')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    adds = (
        _add_info,
        _add_embed,
        add_train,
        add_evaluate,
        add_predict,
        add_quantize,
        _add_convert,
        _add_vocab,
        add_pretrain,
    )
    for add in adds:
        command = add(commands)
        command.add_argument(
            "--traceback", action="store_true", help="show where in the code an error arose"
        )
    return parser


def _add_info(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "info",
        help="versions, devices, and which kernels run",
        description="Show versions, devices, and which kernels run here or why they do not.",
    )
    command.add_argument("--json", action="store_true", help="print it as JSON")
    command.set_defaults(run=_info)
    return command


def _info(args: argparse.Namespace) -> None:
    info = collect_info()
    if args.json:
        print(json.dumps(info, indent=2))
        return
    print("versions")
    for name, number in info["versions"].items():
        print(f"  {name:22}{number or 'not installed'}")
    cpu = info["cpu"]
    print("devices")
    print(f"  {'cpu':22}{cpu['name']}, {cpu['threads']} threads, {cpu['instructions']}")
    print(f"  {'':22}bfloat16: {cpu['bfloat16']}")
    for i, gpu in enumerate(info["gpus"]):
        print(f"  {f'cuda:{i}':22}{gpu['name']}, {gpu['gib']} GiB, compute {gpu['capability']}")
    if not info["gpus"]:
        print(f"  {'gpu':22}none that torch can use")
    print("tokenizer")
    print(f"  {'instructions':22}{info['tokenizer']['instructions']}")
    print("kernels")
    for kernel in info["kernels"]:
        print(f"  {kernel['name']:22}{kernel['runs']}: {kernel['why']}")


def collect_info() -> dict[str, Any]:
    """What `fastbert info` shows."""
    import torch

    from fastbert._tokenizer import instructions

    names = ("fastbert", "torch", "triton", "transformers", "sentence-transformers")
    gpus = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        gpus.append(
            {
                "name": properties.name,
                "gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    facts = _cpu_facts()
    return {
        "versions": {"python": platform.python_version(), **{n: _version(n) for n in names}},
        "cpu": {
            "name": facts.get("model name") or platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "bfloat16": _bfloat16(),
        },
        "gpus": gpus,
        "tokenizer": {"instructions": instructions()},
        "kernels": kernel_status(),
    }


def kernel_status() -> list[dict[str, str]]:
    """For each operation of fastbert.kernels: its name, what runs, and why."""
    import pkgutil
    from importlib import import_module

    import torch

    import fastbert.kernels
    from fastbert.kernels import _triton
    from fastbert.kernels.linear import can_prepack
    from fastbert.kernels.linear_int8 import why_no_int8

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = _triton.why_not(device)
    if device.type == "cuda" and problem is None:
        _try_kernels(device)
    failed = {operation: error for (operation, _), error in _triton.failures.items()}
    status = {}
    for module in pkgutil.iter_modules(fastbert.kernels.__path__):
        names = vars(import_module(f"fastbert.kernels.{module.name}"))
        if module.name.startswith("_") or not any(n.endswith("_kernel") for n in names):
            continue
        why = problem or failed.get(module.name)
        status[module.name] = ("plain torch", why) if why else ("Triton", f"compiled for {device}")
    status["linear"] = (
        ("oneDNN", "weights prepacked, for inference on a CPU; plain torch elsewhere")
        if can_prepack()
        else ("plain torch", "this torch was built without oneDNN's prepacked product")
    )
    why = why_no_int8()
    status["linear_int8"] = ("nothing", why) if why else ("oneDNN", "int8 folders, on a CPU")
    return [{"name": n, "runs": runs, "why": why} for n, (runs, why) in sorted(status.items())]


def _try_kernels(device: torch.device) -> None:
    """Run every operation on a GPU, so that `failures` has those that cannot be compiled."""
    import warnings

    import torch

    from fastbert import BertConfig, BertModel
    from fastbert.kernels.cross_entropy import linear_cross_entropy
    from fastbert.kernels.pooling import pool

    config = BertConfig(vocab_size=64, hidden_size=64, num_attention_heads=1, num_hidden_layers=1)
    model = BertModel(config).to(device, torch.bfloat16).train()
    ids = torch.ones(2, 16, dtype=torch.int64, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hidden = model(ids).last_hidden_state.flatten(0, 1)
        cu_seqlens = torch.tensor([0, 16, 32], dtype=torch.int32, device=device)
        word = model.get_input_embeddings().weight
        loss = linear_cross_entropy(hidden, word, None, ids.flatten()).loss
        (loss + pool(hidden, cu_seqlens).sum()).backward()


def _cpu_facts() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _bfloat16() -> str:
    from fastbert.kernels.linear import native_bfloat16

    if native_bfloat16():
        return "computed in bfloat16, which this CPU multiplies itself"
    return "computed in float32, at its speed (this CPU has no avx512_bf16 or AMX)"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _add_embed(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "embed",
        help="make a vector of each text of a file",
        description="Make a vector of each text of a file. Vector i belongs to text i; rows are "
        "counted from 0. A run that was stopped goes on with --resume.",
    )
    command.add_argument(
        "input",
        metavar="IN",
        help=".txt (a line a text), .csv, .tsv (a header line, no quoting), .jsonl or .parquet; "
        "all but the last also as .gz; - reads lines from standard input",
    )
    command.add_argument(
        "--model", required=True, metavar="M", help="a model's folder or its Hugging Face Hub id"
    )
    command.add_argument(
        "--out",
        required=True,
        type=_output,
        metavar="OUT",
        help=".npy (float32, texts x hidden), or .parquet or .jsonl with row and embedding",
    )
    command.add_argument(
        "--text", metavar="COL", help="the column with the text (default: guessed, and said)"
    )
    command.add_argument(
        "--format",
        choices=FORMATS,
        help="what IN is, where its name does not say",
    )
    command.add_argument(
        "--errors",
        choices=("strict", "replace"),
        default="strict",
        help="bytes that are not UTF-8: stop with an error (the default), or put U+FFFD there",
    )
    command.add_argument(
        "--pooling",
        choices=("auto", "mean", "cls", "max"),
        default="auto",
        help="how token vectors become one; auto asks the model's 1_Pooling/config.json, else mean",
    )
    command.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        default="auto",
        help="make vectors of length 1, or not (default: as the model's modules.json says)",
    )
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    command.add_argument("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    command.add_argument(
        "--max-length",
        type=_positive,
        metavar="N",
        help="tokens of a text that are read; what is beyond is cut (default: the model's own)",
    )
    command.add_argument(
        "--batch-tokens",
        type=_positive,
        metavar="N",
        help="tokens in one forward pass; fewer take less memory (default: by the device)",
    )
    command.add_argument(
        "--resume", action="store_true", help="go on with the run that was stopped"
    )
    command.add_argument(
        "--overwrite",
        action="store_true",
        help="replace OUT once the new one is complete; forget a run that was stopped",
    )
    command.set_defaults(run=_embed)
    return command


def _embed(args: argparse.Namespace) -> None:
    source = TextSource(args.input, column=args.text, format=args.format, errors=args.errors)
    if source.is_stdin and args.resume:
        raise ValueError("standard input cannot be read again, so --resume cannot go on with it")

    import torch

    from fastbert.embed import Embedder, read_settings
    from fastbert.embed_files import check_output, embed_file
    from fastbert.files import model_folder

    check_output(args.out, resume=args.resume, overwrite=args.overwrite)
    settings = read_settings(model_folder(args.model), args.pooling)
    embedder = Embedder.from_pretrained(
        args.model,
        dtype=getattr(torch, args.dtype),
        device=args.device,
        pooling=args.pooling,
        normalize=args.normalize,
        max_length=args.max_length,
    )
    column = ""
    if source.format != "txt":
        column = f", column {source.column!r}{' (a guess)' if source.guessed else ''}"
    print(
        f"{source.name}{column}: {embedder.pooling} pooling, "
        f"{'' if embedder.normalize else 'not '}normalized ({settings.source}), "
        f"at most {embedder.max_length} tokens, {args.dtype} on {embedder.device}",
        flush=True,
    )
    try:
        metrics = embed_file(
            source,
            args.out,
            embedder,
            settings.transformer,
            batch_tokens=args.batch_tokens,
            resume=args.resume,
            overwrite=args.overwrite,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; --resume goes on with what is finished") from None
    print(
        f"{args.out}: {metrics['texts']:,} texts, {metrics['tokens']:,} tokens, "
        f"{metrics['truncated']:,} texts cut, {metrics['seconds']:,.1f} s, "
        f"{metrics['texts_per_second']:,.0f} texts/s, "
        f"{metrics['tokens_per_second']:,.0f} tokens/s"
    )


def _add_convert(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "convert",
        help="a TensorFlow-1 or PyTorch checkpoint to a safetensors folder",
        description="Write a checkpoint as a folder with config.json and model.safetensors, which "
        "fastbert and transformers read. TensorFlow is not needed.",
    )
    command.add_argument(
        "src",
        metavar="SRC",
        help="a folder with bert_config.json and bert_model.ckpt.*, or with config.json and "
        "pytorch_model.bin; or a Hugging Face Hub id",
    )
    command.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    command.add_argument(
        "--overwrite", action="store_true", help="replace OUT once the new one is complete"
    )
    command.set_defaults(run=_convert)
    return command


def _convert(args: argparse.Namespace) -> None:
    src, out = args.src, args.out
    with replace_folder(out, args.overwrite, [src]) as new:
        from fastbert.conversion import convert

        start = time.perf_counter()
        report = {"source": src, **convert(src, new)}
        report["seconds"] = round(time.perf_counter() - start, 3)
        _write_metrics(new, report)
    print(
        f"{out}: {report['architecture']}, {report['tensors']:,} tensors, "
        f"{report['parameters']:,} parameters, from {report['format']}"
    )
    if report["missing"]:
        print(f"not in {src}: {', '.join(report['missing'])}")


def _add_vocab(commands: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(
        "vocab",
        help="train a WordPiece vocabulary on text files",
        description="Train a WordPiece vocabulary, the one that HF tokenizers trains, and write it "
        "as a tokenizer's folder, which fastbert and transformers read.",
    )
    command.add_argument(
        "files", nargs="+", metavar="FILES", help="as IN of fastbert embed; - is standard input"
    )
    command.add_argument(
        "--size", type=_positive, default=30000, metavar="N", help="tokens (default: 30000)"
    )
    command.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the folder to write"
    )
    command.add_argument("--text", metavar="COL", help="the column with the text, in tables")
    command.add_argument("--format", choices=FORMATS, help="what FILES are, where names do not say")
    command.add_argument(
        "--errors",
        choices=("strict", "replace"),
        default="strict",
        help="bytes that are not UTF-8: stop with an error (the default), or leave them out",
    )
    command.add_argument("--cased", action="store_true", help="keep upper case, and accents")
    command.add_argument(
        "--strip-accents",
        action=argparse.BooleanOptionalAction,
        help="drop accents, or keep them (default: drop them unless --cased)",
    )
    command.add_argument(
        "--min-frequency",
        type=_positive,
        default=2,
        metavar="N",
        help="how often a pair must occur to become a token (default: 2)",
    )
    command.add_argument(
        "--limit-alphabet",
        type=_positive,
        default=1000,
        metavar="N",
        help="characters to keep, the most frequent ones (default: 1000)",
    )
    command.add_argument(
        "--threads", type=_positive, metavar="N", help="to count words (default: all CPUs)"
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace DIR once the new one is complete"
    )
    command.set_defaults(run=_vocab)
    return command


def _vocab(args: argparse.Namespace) -> None:
    files, out = args.files, args.out
    sources = [
        TextSource(f, column=args.text, format=args.format, errors=args.errors) for f in files
    ]
    options = {
        "do_lower_case": not args.cased,
        "strip_accents": args.strip_accents,
        "min_frequency": args.min_frequency,
        "limit_alphabet": args.limit_alphabet,
    }
    numbers: dict[str, Any] = {}
    with replace_folder(out, args.overwrite, files) as new:
        from fastbert.vocab import train_vocab

        tokenizer = train_vocab(
            sources, args.size, num_threads=args.threads, metrics=numbers, **options
        )
        if not numbers["distinct_words"]:
            raise ValueError(f"there are no words in {', '.join(files)}")
        tokenizer.save_pretrained(new)
        _write_metrics(new, {"files": files, "size": args.size, **options, **numbers})
    print(
        f"{out}: {numbers['tokens']:,} tokens, from {numbers['texts']:,} texts with "
        f"{numbers['distinct_words']:,} distinct words, "
        f"{numbers['seconds_counting'] + numbers['seconds_merging']:,.1f} s"
    )


def _write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    text = json.dumps(metrics, indent=2) + "\n"
    (folder / "metrics.json").write_text(text, encoding="utf-8")


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix not in _OUTPUTS:
        raise argparse.ArgumentTypeError(f"wanted a name in {', '.join(_OUTPUTS)}, got {text!r}")
    return path


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number of at least 1, got {text!r}")
    return int(text)
