"""The shape of a BERT, as `config.json` and google-research's `bert_config.json` give it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

HIDDEN_ACTS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
POSITIONS = ("absolute", "sinusoidal")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


@dataclass
class BertConfig:
    """Sizes and rates of a BERT, with the names and defaults of transformers' `BertConfig`.

    Keys that are not fields here are kept in `extra`, read as attributes and saved again. Raises
    ValueError on values no BERT can have. num_labels, id2label, label2id: each follows from the
    others; two labels when none is given, and new names where num_labels is not that of id2label.

    position_embedding_type: "absolute" positions are learned; "sinusoidal" ones are a fixed table.

    An assignment is checked as the constructor's values are. What a model has been made with does
    not change by it, as in transformers.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    position_embedding_type: str = "absolute"
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    use_cache: bool = True
    classifier_dropout: float | None = None
    is_decoder: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    problem_type: str | None = None
    num_labels: int | None = None  # a number once the configuration is made, as the next two
    id2label: Mapping[int, str] | None = None
    label2id: Mapping[str, int] | None = None
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        ):
            self._require(name, "a whole number of at least 1", lambda v: _is_int(v) and v >= 1)
        self._require("num_hidden_layers", "a whole number, 0 or more", lambda v: _is_int(v, 0))
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            self._require(name, "a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1)
        self._require(
            "classifier_dropout",
            "None or a number from 0 to 1",
            lambda v: v is None or (_is_number(v) and 0 <= v <= 1),
        )
        for name in ("initializer_range", "layer_norm_eps"):
            self._require(name, "a number of at least 0", lambda v: _is_number(v) and v >= 0)
        self._require(
            "position_embedding_type", f"one of {', '.join(POSITIONS)}", lambda v: v in POSITIONS
        )
        self._require("hidden_act", f"one of {', '.join(HIDDEN_ACTS)}", lambda v: v in HIDDEN_ACTS)
        self._require(
            "pad_token_id",
            f"None or an id below vocab_size = {self.vocab_size}",
            lambda v: v is None or (_is_int(v) and v < self.vocab_size),
        )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads = "
                f"{self.num_attention_heads}, got {self.hidden_size}"
            )
        self._name_labels()
        self._require(
            "problem_type",
            f"None or one of {', '.join(PROBLEM_TYPES)}",
            lambda v: v is None or v in PROBLEM_TYPES,
        )
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError("single_label_classification wants num_labels of at least 2, got 1")

    def __setattr__(self, name: str, value: Any) -> None:
        if "extra" not in self.__dict__:  # the constructor is at work, and checks at its end
            object.__setattr__(self, name, value)
        elif name in {f.name for f in fields(self)}:
            self.__dict__.update(self.replace(**{name: value}).__dict__)
        else:
            object.__setattr__(self, "extra", {**self.extra, name: value})

    def _name_labels(self) -> None:
        self._require(
            "num_labels",
            "None or a whole number of at least 1",
            lambda v: v is None or (_is_int(v) and v >= 1),
        )
        names, numbers = self.id2label, self.label2id
        if names is None and numbers is not None:
            names = {number: name for name, number in numbers.items()}
        if names is None or self.num_labels not in (None, len(names)):
            names, numbers = {i: f"LABEL_{i}" for i in range(self.num_labels or 2)}, None
        names = {int(i): name for i, name in names.items()}  # JSON's keys are strings
        if numbers is None:
            numbers = {name: i for i, name in names.items()}
        object.__setattr__(self, "label2id", numbers)
        object.__setattr__(self, "id2label", names)
        object.__setattr__(self, "num_labels", len(names))

    def _require(self, name: str, wanted: str, holds: Any) -> None:
        value = getattr(self, name)
        if not holds(value):
            raise ValueError(f"{name} must be {wanted}, got {value!r}")

    def __getattr__(self, name: str) -> Any:
        if name != "extra" and not name.startswith("__"):
            extra = self.__dict__.get("extra", {})
            if name in extra:
                return extra[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def model_type(self) -> str:
        return "bert"

    @property
    def use_return_dict(self) -> bool:
        return self.return_dict

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **changes: Any) -> BertConfig:
        """From the content of a configuration file; `changes` override it.

        Raises ValueError when `model_type` is there and is not "bert".
        """
        values = {**values, **changes}
        kind = values.pop("model_type", "bert")
        if kind != "bert":
            raise ValueError(f"model_type must be 'bert', got {kind!r}")
        known = {f.name for f in fields(cls)} - {"extra"}
        extra = {**values.pop("extra", {}), **{k: v for k, v in values.items() if k not in known}}
        return cls(**{k: v for k, v in values.items() if k in known}, extra=extra)

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **changes: Any) -> BertConfig:
        """From a folder with config.json or bert_config.json, or from a model id on the hub."""
        from fastbert.files import find_checkpoint

        return cls.from_file(find_checkpoint(name_or_path, weights=False).config_file, **changes)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **changes: Any) -> BertConfig:
        """From one JSON file. Errors name it."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError(f"wanted a JSON object, got {type(values).__name__}")
            return cls.from_dict(values, **changes)
        except (ValueError, TypeError) as error:  # JSON and UTF-8 errors are ValueErrors
            raise ValueError(f"{path} is not a BERT configuration: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds."""
        left_out = ("extra", "num_labels")  # as there: the number of labels is that of id2label
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        return {**values, **self.extra, "model_type": self.model_type}

    def replace(self, **changes: Any) -> BertConfig:
        """The same with other values, checked again."""
        if "id2label" in changes:  # the old names' number and inverse are not wanted
            changes = {"num_labels": None, "label2id": None, **changes}
        return replace(self, **changes)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, whole or not at all."""
        from fastbert.files import write_atomically

        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        with write_atomically(Path(folder) / "config.json") as path:
            path.write_text(text, encoding="utf-8")


def _is_int(value: Any, least: int | None = None) -> bool:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return is_int and (least is None or value >= least)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
