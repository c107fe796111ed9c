"""Layers of other packages' encoders as fastbert's: the same modules, another arithmetic.

A borrowed layer holds the very linears, norms and dropouts of the layer it stands for, so that
whatever happens to those, training, moving, loading, sharding, has happened to it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastbert.layers import (
    BertAttention,
    BertEmbeddings,
    BertIntermediate,
    BertLayer,
    BertOutput,
    BertSelfAttention,
    BertSelfOutput,
)
from fastbert.watch import Structure, hooks_of

# Dtypes that a plan for CPUs has, as NumPy's of the same size.
_NUMPY = {torch.float32: torch.float32, torch.bfloat16: torch.int16}


class CannotBorrowError(ValueError):
    """Why a layer is not one that fastbert computes."""


@dataclass(frozen=True)
class Family:
    """Encoders that share the names and places of their modules.

    layers: the path to the list of layers. borrow: makes a BertLayer of one of them.
    output: the class of its results in transformers.modeling_outputs. has_types: whether embeddings
    take token_type_ids. from_padding: whether positions are counted from padding_idx + 1, over
    tokens that are not padding.
    """

    layers: str
    borrow: Callable[[nn.Module], BertLayer]
    output: str = "BaseModelOutputWithPoolingAndCrossAttentions"
    has_types: bool = True
    from_padding: bool = False


# Their activations by the name of the class; "gelu_new" and "gelu_pytorch_tanh" are one formula.
_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_new",
    "GELUTanh": "gelu_new",
    "PytorchGELUTanh": "gelu_new",
    "ReLU": "relu",
}


def _bert(layer: Any) -> BertLayer:
    attention, inner, output = layer.attention, layer.intermediate, layer.output
    heads = attention.self
    if getattr(heads, "position_embedding_type", None) not in ("absolute", None):
        raise CannotBorrowError("positions are relative")
    return _assemble(
        (heads.query, heads.key, heads.value),
        (heads.num_attention_heads, heads.attention_head_size),
        heads.dropout,
        (attention.output.dense, attention.output.LayerNorm, attention.output.dropout),
        (inner.dense, inner.intermediate_act_fn),
        (output.dense, output.LayerNorm, output.dropout),
    )


def _distilbert(layer: Any) -> BertLayer:
    heads, inner = layer.attention, layer.ffn
    return _assemble(
        (heads.q_lin, heads.k_lin, heads.v_lin),
        (heads.n_heads, heads.dim // heads.n_heads),
        heads.dropout,
        (heads.out_lin, layer.sa_layer_norm, nn.Dropout(0.0)),
        (inner.lin1, inner.activation),
        (inner.lin2, layer.output_layer_norm, inner.dropout),
    )


def _assemble(
    qkv: tuple[Any, Any, Any],
    heads: tuple[int, int],
    dropout: nn.Module,
    attention_output: tuple[Any, Any, Any],
    inner: tuple[Any, Any],
    output: tuple[Any, Any, Any],
) -> BertLayer:
    """heads: their number and size. The outputs: dense, norm, dropout. inner: dense, activation."""
    for name, linear in zip(("query", "key", "value"), qkv, strict=True):
        _check(linear, name)
    for name, (dense, norm, drop) in (("attention", attention_output), ("output", output)):
        _check(dense, f"the {name}'s dense layer")
        _check_kind(norm, nn.LayerNorm, f"the {name}'s norm")
        _check_kind(drop, nn.Dropout, f"the {name}'s dropout")
    _check_kind(dropout, nn.Dropout, "attention's dropout")
    dense, activation = inner
    _check(dense, "the intermediate dense layer")
    name = type(activation).__name__
    if name not in _ACTIVATIONS:
        raise CannotBorrowError(f"activation {name} is none of {', '.join(_ACTIVATIONS)}")
    query, key, value = map(_merged, qkv)
    return _module(
        BertLayer,
        attention=_module(
            BertAttention,
            self=_module(
                BertSelfAttention,
                num_attention_heads=heads[0],
                attention_head_size=heads[1],
                query=query,
                key=key,
                value=value,
                dropout=dropout,
                _plan=None,
            ),
            output=_output(BertSelfOutput, *attention_output),
        ),
        intermediate=_module(BertIntermediate, dense=_merged(dense), activation=_ACTIVATIONS[name]),
        output=_output(BertOutput, *output),
        _plan=None,
    )


def _output(kind: type[nn.Module], dense: nn.Module, norm: nn.Module, dropout: nn.Module) -> Any:
    return _module(kind, dense=_merged(dense), LayerNorm=norm, dropout=dropout)


def _module(kind: type[nn.Module], **attributes: Any) -> Any:
    """One of `kind` with these attributes and no others: its parameters are not made."""
    module: Any = kind.__new__(kind)
    nn.Module.__init__(module)
    module.training = False  # its own; those it is made of have theirs
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def _check(linear: nn.Module, name: str) -> None:
    if is_lora(linear):
        _check(linear.base_layer, name)  # type: ignore[arg-type]
        return
    _check_kind(linear, nn.Linear, name)
    if linear.bias is None:
        raise CannotBorrowError(f"{name} has no bias")


def _check_kind(module: nn.Module, kind: type[nn.Module], name: str) -> None:
    if type(module) is not kind:
        raise CannotBorrowError(f"{name} is {type(module).__name__}, not a plain {kind.__name__}")


def is_lora(module: Any) -> bool:
    """peft's, whose own forward takes packed tokens as well."""
    kind = type(module)
    return kind.__name__ == "Linear" and kind.__module__ == "peft.tuners.lora.layer"


def _merged(module: Any) -> nn.Module:
    """The linear inside one of peft's where its adapters are merged, and nothing is to be added."""
    is_merged = is_lora(module) and module.merged and not module.disable_adapters
    return module.base_layer if is_merged else module


_PAST = "BaseModelOutputWithPastAndCrossAttentions"
_ROBERTA = Family("encoder.layer", _bert, from_padding=True)
FAMILIES = {
    "BertModel": Family("encoder.layer", _bert),
    "RobertaModel": _ROBERTA,
    "XLMRobertaModel": _ROBERTA,
    "CamembertModel": _ROBERTA,
    "DistilBertModel": Family("transformer.layer", _distilbert, "BaseModelOutput", has_types=False),
    "ElectraModel": Family("encoder.layer", _bert, _PAST),
    "BertGenerationEncoder": Family("encoder.layer", _bert, _PAST, has_types=False),
}


def family_of(module: nn.Module) -> tuple[Family, type] | None:
    """The family of an encoder, and its class in transformers; None where it is none."""
    for kind in type(module).__mro__:
        if kind.__name__ in FAMILIES and kind.__module__.startswith("transformers.models."):
            return FAMILIES[kind.__name__], kind
    return None


class Borrowed:
    """What is borrowed of an encoder, and whether it still is what the encoder computes.

    embeddings: None where there are no token types, which fastbert's always have.
    """

    def __init__(self, encoder: Any, family: Family) -> None:
        self._list = encoder.get_submodule(family.layers)
        self.owners = list(self._list)
        self.layers: list[BertLayer] = []
        self.reasons: dict[str, str] = {}  # by the name of the layer, why it is not borrowed
        for i, owner in enumerate(self.owners):
            owner = unwrapped(owner)
            try:
                _check_classes(owner)
                self.layers.append(family.borrow(owner))
            except (CannotBorrowError, AttributeError) as error:
                self.reasons[f"{family.layers}.{i}"] = str(error)
        self.embeddings: BertEmbeddings | None = None
        if family.has_types:
            names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
            parts = {n: getattr(encoder.embeddings, n) for n in (*names, "LayerNorm", "dropout")}
            self.embeddings = _module(BertEmbeddings, **parts)
        self._named = {
            f"{prefix}.{name}".strip("."): module
            for prefix, part in (("embeddings", encoder.embeddings), (family.layers, self._list))
            for name, module in part.named_modules()
        }
        self._structure = Structure(list(self._named.values()))
        self._loras = [(m, _lora_state(m)) for m in self._named.values() if is_lora(m)]
        self._shells = set(self.owners) | {encoder.embeddings}
        self._seen: bytes | None = None

    def unchanged(self) -> bool:
        """Whether these still are the modules that layers were borrowed from."""
        return self._structure.same() and all(_lora_state(m) == state for m, state in self._loras)

    def forget(self, is_same_mode: bool) -> None:
        """Drop what is kept of weights. Where the mode stays as it is, as it does in each call of
        sentence-transformers' encode, only if some of their values are others than last time."""
        seen, self._seen = self._seen, self._values() if is_same_mode else None
        if seen is None or seen != self._seen:
            for layer in self.layers:
                layer._plan = layer.attention.self._plan = None

    def _values(self) -> bytes | None:
        """Sixteen values of each weight, evenly spread; None where looking at them takes time."""
        values = []
        for layer in self.layers:
            for p in layer.parameters():
                if p.device.type != "cpu" or p.dtype not in _NUMPY or not p.is_contiguous():
                    return None
                flat = p.detach().view(_NUMPY[p.dtype]).view(-1).numpy()
                values.append(flat[:: max(1, flat.size // 16)].tobytes())
        return b"".join(values)

    def why_not(self) -> str | None:
        """Why the encoder cannot be computed by what is borrowed; None where it can."""
        for name, reason in self.reasons.items():
            return f"{name}: {reason}"
        if any("forward" in attributes for attributes in self._structure.attributes):
            replaced = (name for name, m in self._named.items() if "forward" in vars(m))
            return f"the forward of {next(replaced)} was replaced"
        if any(self._structure.hooks):
            for name, module in self._named.items():
                for hook in (h for hooks in hooks_of(module) for h in hooks.values()):
                    if not _is_harmless(hook, module in self._shells):
                        return f"there are hooks on {name}"
        return None


def unwrapped(layer: nn.Module) -> nn.Module:
    """The layer inside torch's FullyShardedDataParallel."""
    return getattr(layer, "_fsdp_wrapped_module", layer)


def _is_harmless(hook: Any, on_shell: bool) -> bool:
    """Whether a hook is run, or has nothing to see, where the modules inside are not called."""
    where = getattr(hook, "__module__", None) or ""
    if where == "transformers.utils.output_capturing":
        return True  # of a call with attention weights, which takes the model's own code
    if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
        return True  # transformers' and peft's for checkpoints: only marks the embeddings' output
    return on_shell and where.startswith("torch.distributed.")  # sharding: layers are called then


def _lora_state(module: Any) -> tuple[bool, bool]:
    return bool(module.merged), bool(module.disable_adapters)


def _check_classes(owner: nn.Module) -> None:
    """Refuse a layer of which some part has a class from elsewhere, with another arithmetic."""
    known = ("transformers.", "torch.", "peft.tuners.lora.")
    for module in owner.modules():
        if module._modules and not type(module).__module__.startswith(known):
            raise CannotBorrowError(f"{type(module).__name__} is not a class of transformers")
