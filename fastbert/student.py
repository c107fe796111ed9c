"""What a student of a teacher is before it learns.

One as wide as the teacher starts as some of its layers (Sanh et al. 2019, "DistilBERT"), a narrower
one with the principal components of the teacher's embeddings.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbert.pretrain import SIZES
from fastbert.tasks import Task
from fastbert.tokenizer import BertTokenizer
from fastbert.train import load_head


def spaced(n_layers: int, n_teacher: int) -> list[int]:
    """The teacher's layer, counted from 1, for each of the student's: evenly spaced, the last for
    the last."""
    return [-(-i * n_teacher // n_layers) for i in range(1, n_layers + 1)]


def make_student(
    name: str, task: Task, teacher: Any, device: torch.device
) -> tuple[Any, float | None]:
    """A model with the task's head that is to learn, of a size or out of a folder; and a learning
    rate where its layers have learned nothing yet, which takes a higher one."""
    lr: float | None = None
    of_size = re.fullmatch(r"(\d+)x(\d+)", name)
    if name in SIZES or of_size:
        n_layers, width = SIZES[name] if of_size is None else map(int, of_size.groups())
        changes = {"num_hidden_layers": n_layers, "hidden_size": width}
        if width != teacher.config.hidden_size:
            heads = max(1, width // 64)
            lr = 1e-3 * 128 / width  # tiny learned nothing in two epochs of 6,920 sentences at 3e-4
            changes |= {"num_attention_heads": heads, "intermediate_size": 4 * width}
        model = task.head(teacher.config.replace(**changes))
        start(model, teacher)
        return model.to(device).eval(), lr
    if not Path(name).expanduser().is_dir() and "/" not in name:
        raise ValueError(
            f"student must be one of {', '.join(SIZES)}, layers and width such as 3x384, or a "
            f"model's folder, got {name!r}"
        )
    if BertTokenizer.from_pretrained(name).get_vocab() != task.tokenizer.get_vocab():
        raise ValueError(f"the student must have the teacher's vocabulary, and {name} has another")
    return load_head(task, name, device), None


def start(student: Any, teacher: Any) -> None:
    """First weights out of the teacher's: all of them where the widths agree, of evenly spaced
    layers; else, where the student is narrower, the embeddings' principal components."""
    own, other = student.config, teacher.config
    if own.hidden_size == other.hidden_size:
        chosen = spaced(own.num_hidden_layers, other.num_hidden_layers)

        def source(name: str) -> str:
            return re.sub(r"(?<=layer\.)\d+", lambda number: str(chosen[int(number[0])] - 1), name)

        state = teacher.state_dict()
        student.load_state_dict({name: state[source(name)] for name in student.state_dict()})
    elif own.hidden_size < other.hidden_size:
        words = teacher.bert.embeddings.word_embeddings.weight.double()
        _, directions = torch.linalg.eigh(words.T @ words)  # eigenvalues rise
        directions = directions[:, -own.hidden_size :]
        tables = dict(teacher.bert.embeddings.named_children())
        for name, table in student.bert.embeddings.named_children():
            if isinstance(table, nn.Embedding):
                with torch.no_grad():
                    table.weight.copy_(tables[name].weight.double() @ directions)
