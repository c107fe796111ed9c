"""Reading and writing the tensors of checkpoints, under transformers' names for them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastbert.files import Checkpoint, write_atomically

WEIGHTS_NAME = "model.safetensors"
INT8_NAME = "model.int8.safetensors"  # what fastbert.int8 reads
PREFIX = "bert."
# Tensors that belong to a head on top of the encoder, not to the encoder.
HEADS = ("cls.", "classifier.", "qa_outputs.")

# google-research/bert's names (TensorFlow) to ours, tried in order on the whole name.
_TF_NAMES = (
    (r"/", "."),
    (r"^output_(weights|bias)$", r"classifier.\1"),
    (r"^cls\.squad\.output_(weights|bias)$", r"qa_outputs.\1"),
    (r"\boutput_(weights|bias)$", r"\1"),
    (r"\blayer_(\d+)\.", r"layer.\1."),
    (r"_embeddings$", "_embeddings.weight"),
    (r"\.(kernel|gamma|weights)$", ".weight"),
    (r"\.beta$", ".bias"),
)
# Names in PyTorch files of before 2019.
_LEGACY_NAMES = ((r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))


def _rename(name: str, rules: Iterable[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def from_tensorflow(variables: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """google-research/bert's variables under our names; kernels, (in, out) there, transposed."""
    tensors = {}
    for name, value in variables.items():
        value = value.t().contiguous() if name.endswith("/kernel") else value
        tensors[_rename(name, _TF_NAMES)] = value
    return tensors


def read_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors of a checkpoint on the CPU, under today's names, `bert.` prefix as in the file.

    Raises ValueError that names the file when one is truncated, corrupt or not what it should be.
    """
    if checkpoint.kind == "tensorflow":
        from fastbert.tf_checkpoint import load_tf_checkpoint

        variables = load_tf_checkpoint(checkpoint.folder)
        return from_tensorflow({n: torch.from_numpy(v) for n, v in variables.items()})
    tensors: dict[str, Tensor] = {}
    for path in checkpoint.weight_files:
        tensors.update(_read_file(path, checkpoint.kind != "pytorch"))
    tensors = {_rename(name, _LEGACY_NAMES): value for name, value in tensors.items()}
    # A buffer that versions of transformers before 4.31 saved.
    return {n: v for n, v in tensors.items() if not n.endswith("embeddings.position_ids")}


def _read_file(path: Path, is_safetensors: bool) -> dict[str, Tensor]:
    try:
        if is_safetensors:
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is truncated or not a file of weights: {reason}") from error
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise ValueError(f"{path} must hold a state dict, a dict of tensors")
    return tensors


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one safetensors file, whole or not at all. Tensors that share memory are refused."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with write_atomically(path) as temporary:
        save_file(tensors, os.fspath(temporary), metadata={"format": "pt"})


def match_tensors(
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, torch.Size],
    may_lack: tuple[str, ...] = (),
    may_have: tuple[str, ...] = HEADS,
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Choose the tensors that a model takes: (chosen, missing, unused names).

    wanted: names and shapes. Where any name begins with `bert.`, here or in `tensors`, all the
    encoder's do, and what does not is a head. may_lack: parts of names of the encoder that may be
    missing, as all of a head may. may_have: beginnings of those that may be left over, as other
    heads may. Raises ValueError that lists every other missing, unexpected and mis-shaped tensor.
    """
    here, there = (
        PREFIX if any(name.startswith(PREFIX) for name in names) else ""
        for names in (wanted, tensors)
    )
    stored = {n: there + n.removeprefix(here) if n.startswith(here) else n for n in wanted}
    chosen = {n: tensors[name] for n, name in stored.items() if name in tensors}
    missing = [n for n in wanted if n not in chosen]
    unused = sorted(tensors.keys() - {stored[n] for n in chosen})
    problems = [
        f"missing {n}"
        for n in missing
        if n.startswith(here) and not any(part in n for part in may_lack)
    ]
    problems += [
        f"unexpected {n}"
        for n in unused
        if n.startswith(there) and not n.removeprefix(there).startswith(may_have)
    ]
    problems += [
        f"{n} has shape {tuple(chosen[n].shape)}, wanted {tuple(wanted[n])}"
        for n in chosen
        if chosen[n].shape != wanted[n]
    ]
    if problems:
        raise ValueError("the weights do not fit the configuration: " + "; ".join(problems))
    return chosen, missing, unused
