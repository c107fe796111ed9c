"""Any BERT checkpoint to a folder that fastbert and transformers read."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch

from fastbert.config import BertConfig
from fastbert.files import find_checkpoint
from fastbert.model import BertModel
from fastbert.weights import PREFIX, WEIGHTS_NAME, match_tensors, read_tensors, write_tensors

# Beside config and weights: what a tokenizer or sentence-transformers reads.
_COPIED = (
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling",
    "2_Normalize",
)
# Which of transformers' classes has a head of these names; the first that fits.
_HEADED = (
    ("cls.seq_relationship.", "BertForPreTraining"),
    ("cls.predictions.", "BertForMaskedLM"),
    ("classifier.", "BertForSequenceClassification"),
    ("qa_outputs.", "BertForQuestionAnswering"),
)


def convert(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> dict[str, Any]:
    """Write `source`'s configuration, tensors and tokenizer files to the new folder `out`.

    source: a folder or hub id with a TensorFlow-1, PyTorch or safetensors BERT, with or without a
    head; heads are kept. Returns {format, architecture, tensors, parameters, missing}: missing
    names the pooler's tensors where the source has none. Raises FileExistsError when `out` has
    anything in it, ValueError when the tensors are not those of the configuration. `out` appears
    when it is complete.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists already: give the name of a new folder")
    checkpoint = find_checkpoint(source)
    if checkpoint.kind == "int8":
        raise ValueError(f"{source} is an int8 folder: its float32 weights are not in it")
    config = BertConfig.from_file(checkpoint.config_file)
    tensors = read_tensors(checkpoint)
    if all(name.startswith(PREFIX) for name in tensors):
        tensors = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in BertModel(config).state_dict().items()}
    _, missing, unused = match_tensors(tensors, wanted, may_lack=("pooler.",))
    architecture = next(
        (name for head, name in _HEADED if any(n.startswith(head) for n in unused)), "BertModel"
    )

    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        config.replace(extra={**config.extra, "architectures": [architecture]}).save_pretrained(
            temporary
        )
        # Tied tensors share memory, which safetensors refuses: each gets its own.
        separate = {name: value.clone() for name, value in tensors.items()}
        write_tensors(separate, temporary / WEIGHTS_NAME)
        copy_others(checkpoint.folder, temporary)
        if out.is_dir():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {
        "format": checkpoint.kind,
        "architecture": architecture,
        "tensors": len(tensors),
        "parameters": sum(value.numel() for value in tensors.values()),
        "missing": missing,
    }


def copy_others(source: Path, out: Path) -> None:
    """Copy what a tokenizer or sentence-transformers reads of a model's folder."""
    for name in _COPIED:
        path = source / name
        if path.is_dir():
            shutil.copytree(path, out / name)
        elif path.is_file():
            shutil.copyfile(path, out / name)
