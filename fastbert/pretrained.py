"""What every model here has: loading, saving, first weights, embeddings that grow."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastbert.config import BertConfig
from fastbert.files import find_checkpoint
from fastbert.int8 import ADVICE, DESCRIPTION, MARK, check_move, exchange_linears, has_int8
from fastbert.layers import SinusoidalPositions
from fastbert.weights import (
    HEADS,
    INT8_NAME,
    WEIGHTS_NAME,
    match_tensors,
    read_tensors,
    write_tensors,
)

# Parts of names of encoders' tensors that a checkpoint may lack: then they are made afresh.
_MAY_LACK = ("pooler.", ".crossattention.")


class BertPreTrainedModel(nn.Module):
    """Loading, saving, first weights and embeddings, alike for every model here.

    `base_model` is the BertModel in it, or itself. `_tied_weights_keys`: names of parameters that,
    with `config.tie_word_embeddings`, are the parameter of the other name.
    """

    base_model_prefix = "bert"
    _tied_weights_keys: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        config: BertConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **arguments: Any,
    ) -> Any:
        """A model with the weights of a folder or of a model on the Hugging Face hub, in eval mode.

        Reads transformers' folders (safetensors or pytorch_model.bin, in shards or whole, with or
        without a head), google-research/bert's TensorFlow-1 ones, and the int8 ones of `fastbert
        quantize`, which are for float32 on a CPU and refused elsewhere. config: in place of the
        folder's. dtype: as stored when None. arguments: the constructor's
        (`add_pooling_layer=False`, `cuda_graphs=False`), and changes to the configuration
        (`num_labels=3`). ignore_mismatched_sizes: a head's weights of another shape are left out.
        output_loading_info: returns (model, {"missing_keys": [...], "unexpected_keys": [...]}).

        A head, pooler or cross-attention that is not in the file gets fresh weights, and a warning
        says so. Raises FileNotFoundError where config or weights are not found, and ValueError that
        names every other tensor that is missing, unexpected or of another shape.
        """
        checkpoint = find_checkpoint(name_or_path)
        config = config or BertConfig.from_file(checkpoint.config_file)
        of_config = {f.name for f in fields(BertConfig)} & arguments.keys()
        config = config.replace(**{name: arguments.pop(name) for name in of_config})
        if isinstance(dtype, str):
            dtype = _dtype(dtype)
        with torch.inference_mode(False):  # weights made in it would be of no use outside it
            with torch.device("meta"):
                model = cls(config, **arguments)
                if checkpoint.kind == "int8":
                    exchange_linears(model)
            tensors = read_tensors(checkpoint)
            missing, unused = model._load(tensors, ignore_mismatched_sizes)
            model.to(device=device, dtype=dtype).eval()
            if checkpoint.kind == "int8":
                model.requires_grad_(False)
        if missing:
            names = dict.fromkeys(re.sub(r"\blayer\.\d+\.", "layer.*.", name) for name in missing)
            hint = "; add_pooling_layer=False leaves it out" if model.base_model is model else ""
            warnings.warn(
                f"{checkpoint.folder} has no {', '.join(names)}: initialised afresh, so what they "
                f"compute means nothing before training{hint}",
                stacklevel=2,
            )
        info = {"missing_keys": missing, "unexpected_keys": unused}
        return (model, info) if output_loading_info else model

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors, each whole or not at all.

        Of tied weights one is written, the one that transformers writes too. An int8 model makes
        an int8 folder, and is refused with ValueError where there are float weights already.
        """
        extra = {name: value for name, value in self.config.extra.items() if name != MARK}
        extra["architectures"] = [type(self).__name__]
        extra["dtype"] = str(self.dtype).removeprefix("torch.")
        file = Path(folder) / WEIGHTS_NAME
        if has_int8(self):
            if file.exists():
                raise ValueError(f"int8 wants a folder of its own, got one with {file.name}")
            extra[MARK], file = DESCRIPTION, file.with_name(INT8_NAME)
        self.config.replace(extra=extra).save_pretrained(folder)
        tied = self._tied()
        state = {name: value for name, value in self.state_dict().items() if name not in tied}
        write_tensors(state, file)

    def _load(
        self, tensors: dict[str, Tensor], ignore_mismatched_sizes: bool = False
    ) -> tuple[list[str], list[str]]:
        """Take the weights of a checkpoint, which may be changed: (missing, unused names)."""
        tied = self._tied()
        wanted = {n: value.shape for n, value in self.state_dict().items() if n not in tied}
        for name, source in self._tied_weights_keys.items():
            if name in tied:
                if name in tensors:
                    tensors.setdefault(source, tensors.pop(name))
            elif name.endswith(".bias") and source in tensors:  # files before 2020 have but this
                tensors.setdefault(name, tensors[source].clone())
        if ignore_mismatched_sizes:
            for name in tensors.keys() & wanted.keys():
                if name.startswith(HEADS) and tensors[name].shape != wanted[name]:
                    del tensors[name]
        with_pooler = any("pooler." in name for name in wanted)
        may_have = HEADS if with_pooler else (*HEADS, "pooler.")
        chosen, missing, unused = match_tensors(tensors, wanted, _MAY_LACK, may_have)
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in missing):
            module = self.get_submodule(owner).to_empty(device="cpu", recurse=False)
            module.to(dtype=next(iter(chosen.values())).dtype)
            self._init_weights(module)
        self.load_state_dict(chosen, strict=False, assign=True)
        self.tie_weights()
        return missing, unused

    def _init_weights(self, module: nn.Module) -> None:
        """BERT's first weights: normal, `initializer_range` wide; zero biases; unit layer norms."""
        if isinstance(module, SinusoidalPositions):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        bias = module._parameters.get("bias")
        if bias is not None:
            nn.init.zeros_(bias)

    def tie_weights(self) -> None:
        """Make one parameter of those that are to be one, as `config.tie_word_embeddings` says."""
        if self.config.tie_word_embeddings:
            for name, source in self._tied_weights_keys.items():
                self._set_parameter(name, self.get_parameter(source))

    def _tied(self) -> dict[str, str]:
        """Those of `_tied_weights_keys` that are one parameter now."""
        if not self._tied_weights_keys:
            return {}
        found = dict(self.named_parameters(remove_duplicate=False))
        return {
            name: source
            for name, source in self._tied_weights_keys.items()
            if name in found and found[name] is found.get(source)
        }

    def _set_parameter(self, name: str, value: nn.Parameter) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self.get_submodule(owner)
        setattr(module, leaf, value)
        if isinstance(module, nn.Linear):
            module.out_features = value.shape[0]

    def train(self, mode: bool = True) -> Any:
        if mode and has_int8(self):
            raise ValueError(f"int8 cannot be trained: {ADVICE}")
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if has_int8(self):
            check_move(fn)
        tied = self._tied()
        super()._apply(fn, recurse)
        for name, source in tied.items():  # torch makes new parameters of those it cannot move
            if self.get_parameter(name) is not self.get_parameter(source):
                self._set_parameter(name, self.get_parameter(source))
        return self

    def _replace_config(self, **changes: Any) -> None:
        for module in self.modules():
            if isinstance(module, BertPreTrainedModel):
                module.config = module.config.replace(**changes)

    @property
    def base_model(self) -> Any:
        """The BertModel in this model, or this model where it is one."""
        return getattr(self, self.base_model_prefix, self)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Exchange the word embeddings; `tie_weights` then makes the head's the same again."""
        self.base_model.embeddings.word_embeddings = value

    def get_output_embeddings(self) -> nn.Linear | None:
        """The projection to the vocabulary, where there is one."""
        return None

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Make the vocabulary larger or smaller at its end: word embeddings, the head, its bias.

        new_num_tokens: as many as there are when None. pad_to_multiple_of: rounded up to one.
        mean_resizing: new rows are the mean of the old ones; otherwise as first weights are. New
        biases of tied weights are 0, as in transformers.
        `config.vocab_size` follows. Optimizers have to be made anew. Raises ValueError where a
        number is no whole number of at least 1.
        """
        embeddings = self.get_input_embeddings()
        size = embeddings.num_embeddings if new_num_tokens is None else new_num_tokens
        multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
        named = (("new_num_tokens", size), ("pad_to_multiple_of", multiple))
        for argument, number in named:
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{argument} must be a whole number of at least 1, got {number!r}")
        size = -(-size // multiple) * multiple
        if size == embeddings.num_embeddings:
            return embeddings
        tied = self._tied()
        named_parameters = dict(self.named_parameters(remove_duplicate=False))
        std = self.config.initializer_range
        for name, p in named_parameters.items():
            is_sized = p is embeddings.weight or name in (
                *self._tied_weights_keys.keys(),
                *self._tied_weights_keys.values(),
            )
            if is_sized and name not in tied:
                use_mean = mean_resizing and not (tied and p.dim() == 1)
                self._set_parameter(name, _resized(p, size, None if use_mean else std))
        for name, source in tied.items():
            self._set_parameter(name, self.get_parameter(source))
        embeddings.num_embeddings = size
        changes: dict[str, Any] = {"vocab_size": size}
        if embeddings.padding_idx is not None and embeddings.padding_idx >= size:
            embeddings.padding_idx = changes["pad_token_id"] = None
        self._replace_config(**changes)
        return embeddings

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Keep only each layer's input in training and compute the rest again in the backward.

        gradient_checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`; without a word on
        it, use_reentrant is False.
        """
        encoder = self.base_model.encoder
        encoder.checkpoint_options = {"use_reentrant": False} | (
            gradient_checkpointing_kwargs or {}
        )
        encoder.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.base_model.encoder.gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.base_model.encoder.gradient_checkpointing

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many there are; tied ones count once. exclude_embeddings: without nn.Embedding's."""
        tables = {
            id(module.weight)
            for module in self.modules()
            if exclude_embeddings and isinstance(module, nn.Embedding)
        }
        return sum(
            p.numel()
            for p in self.parameters()
            if (p.requires_grad or not only_trainable) and id(p) not in tables
        )


def _resized(p: nn.Parameter, size: int, std: float | None) -> nn.Parameter:
    """`size` rows; new ones are the mean of the old, or normal of this width; a bias's then 0."""
    kept = min(size, p.shape[0])
    with torch.no_grad():
        out = p.new_empty(size, *p.shape[1:])
        out[:kept] = p[:kept]
        if std is None:
            out[kept:] = p.double().mean(0).to(p.dtype)
        elif p.dim() == 1:
            out[kept:] = 0
        else:
            out[kept:].normal_(std=std)
    return nn.Parameter(out, p.requires_grad)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must name a floating dtype such as 'float32', got {name!r}")
    return dtype
