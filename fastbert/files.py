"""Finding a model's files, and writing files whole or not at all. Imports no torch, no numpy."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CONFIG_NAMES = ("config.json", "bert_config.json")
# In the order of preference: the first that is there is read.
_WEIGHTS = (
    ("safetensors", "model.safetensors.index.json"),
    ("safetensors", "model.safetensors"),
    ("pytorch", "pytorch_model.bin.index.json"),
    ("pytorch", "pytorch_model.bin"),
    ("int8", "model.int8.safetensors"),  # fastbert.int8
)
_SMALL_FILES = ["*.json", "*.txt"]


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's configuration and weights are."""

    folder: Path
    config_file: Path
    kind: Literal["safetensors", "pytorch", "int8", "tensorflow"] | None = None
    weight_files: tuple[Path, ...] = ()


def model_folder(
    name_or_path: str | os.PathLike[str], patterns: Sequence[str] = _SMALL_FILES
) -> Path:
    """The folder itself, or the local copy of a model on the Hugging Face hub.

    patterns: which files to fetch from the hub. Raises FileNotFoundError when it is neither.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    name = os.fspath(name_or_path)
    if path.exists():
        raise FileNotFoundError(f"wanted a model folder or hub id, got the file {name}")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name:
        raise FileNotFoundError(f"no such model folder: {name!r}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's errors share no narrower base across its versions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{name!r} is neither a folder here nor a model that the hub gives: {reason}"
        ) from error


def find_checkpoint(name_or_path: str | os.PathLike[str], weights: bool = True) -> Checkpoint:
    """Find configuration and weights in a folder or on the hub.

    weights: False finds the configuration only. Raises FileNotFoundError that lists what was looked
    for.
    """
    patterns = [*_SMALL_FILES, *(["*.safetensors"] if weights else [])]
    folder = model_folder(name_or_path, patterns)
    config_file = next((folder / n for n in CONFIG_NAMES if (folder / n).is_file()), None)
    if config_file is None:
        raise FileNotFoundError(f"{folder} has no {' or '.join(CONFIG_NAMES)}")
    if not weights:
        return Checkpoint(folder, config_file)
    found = _find_weights(folder, config_file)
    if found is None and not Path(name_or_path).expanduser().is_dir():
        folder = model_folder(name_or_path, [*_SMALL_FILES, "pytorch_model*.bin", "*.ckpt*"])
        found = _find_weights(folder, config_file)
    if found is None:
        names = ", ".join(name for _, name in _WEIGHTS)
        raise FileNotFoundError(
            f"{folder} has no weights: looked for {names} and TensorFlow's *.index"
        )
    return found


def _find_weights(folder: Path, config_file: Path) -> Checkpoint | None:
    for kind, name in _WEIGHTS:
        path = folder / name
        if not path.is_file():
            continue
        shards = _shards(path) if name.endswith(".index.json") else [path]
        return Checkpoint(folder, config_file, kind, tuple(shards))  # type: ignore[arg-type]
    if any(folder.glob("*.index")):
        return Checkpoint(folder, config_file, "tensorflow")
    return None


def _shards(index: Path) -> list[Path]:
    """The files that an index names, all of which must be there."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of weights: {error!r}") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names files that are not there: {', '.join(missing)}")
    return [index.parent / name for name in names]


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to, renamed to `path` at the end.

    After an error nothing is left and an earlier `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_can_write(out: Path, overwrite: bool) -> None:
    """Refuse an `out` that is there and not to be replaced, or has no parent."""
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already; --overwrite replaces it")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder {out.parent} for {out.name} does not exist")


@contextmanager
def replace_folder(
    out: Path, overwrite: bool, sources: Sequence[str | os.PathLike[str]]
) -> Iterator[Path]:
    """The name of a temporary folder beside `out` to write, renamed to `out` at the end.

    After an error nothing is left and an earlier `out` is as it was. Raises ValueError where `out`
    is there and not to be replaced, or holds one of `sources`; FileNotFoundError without a parent.
    """
    check_can_write(out, overwrite)
    for source in map(Path, sources):
        if out.resolve() in (source.resolve(), *source.resolve().parents):
            raise ValueError(f"{out} holds {source} and cannot be replaced; name another folder")
    new, old = (out.with_name(f".{out.name}.{what}") for what in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    try:
        yield new
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(out, old)
        os.replace(new, out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
