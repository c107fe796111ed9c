"""Making models of transformers fast where they stand: `accelerate` and `restore`.

An encoder's class becomes a subclass of it, for that one object, whose forward packs the tokens,
runs fastbert's layers on the encoder's own modules and puts the padding back. Copies, replicas and
pickles of the object stay what they are, since all that they need is in their class.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastbert.borrowed import FAMILIES, Borrowed, Family, family_of, unwrapped
from fastbert.inference import can_plan
from fastbert.inputs import EncoderInputs
from fastbert.kernels._triton import on_kernel_device
from fastbert.kernels.attention import schedule
from fastbert.layers import infer
from fastbert.watch import any_global_hooks, is_plain

_log = logging.getLogger("fastbert")

_WARN = "warn_if_padding_and_no_attention_mask"  # which encoders of transformers 4 call
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_READ = {
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds",
    "output_attentions", "output_hidden_states", "return_dict", *_PACKED,
}  # fmt: skip
# None of these is the configuration's where they are parameters, and "no" where they are **kwargs.
_ASKED = {"output_attentions", "output_hidden_states", "return_dict"}
# What an encoder is given and does not read: it decodes nothing and has no loss.
_UNREAD = {"use_cache", "num_items_in_batch", "return_loss"}


@dataclass
class Acceleration:
    """What `accelerate` made fast, by the names of modules, and what not, with the reason.

    fast: what each encoder is. slow: encoders that stay as they were, and layers that make every
    call take the model's own code. calls: how often it did so since, by reason.
    """

    fast: dict[str, str] = field(default_factory=dict)
    slow: dict[str, str] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"fast: {name or 'the model'} ({what})" for name, what in self.fast.items()]
        lines += [f"not fast: {name}: {reason}" for name, reason in self.slow.items()]
        lines += [f"{n} calls took the model's own code: {why}" for why, n in self.calls.items()]
        return "\n".join(lines)


def accelerate(model: Any) -> Acceleration:
    """Make the encoders in `model` run on packed tokens, in place. `restore` undoes it.

    model: a BERT, RoBERTa, XLM-RoBERTa, CamemBERT, DistilBERT, ELECTRA or BertGeneration of
    transformers, bare or with a head; a SentenceTransformer or CrossEncoder; a model wrapped by
    peft; or a pipeline, anything whose `model` is such. Weights, state dict, configuration, class
    names and outputs stay its own; padded positions of outputs are zeros.

    A call that the fast path cannot serve with the model's own answer takes the model's own code:
    attention weights, masks that are not (n_seqs, length), rows that begin with padding, caches,
    hooks inside the encoder, layers made of other modules. The logger "fastbert" says so once for
    each reason, and the report counts. What is compiled or traced is the model's own code as well.
    `cu_seq_lens_q` and its like (of transformers' DataCollatorWithFlattening) are honoured: the
    pooler then gives a row for each sequence.

    Raises ValueError, and changes nothing, where there is no encoder to make fast.
    """
    report, changes = Acceleration(), []
    for name, encoder in _root(model).named_modules():
        found = family_of(encoder)
        if found is None:
            continue
        if _is_fast(encoder):
            state = _state_of(encoder)
            report.calls = state.calls
        elif reason := _why_never(encoder, found[1]):
            report.slow[name] = reason
            continue
        else:
            state = _State(encoder, found[0])
            changes.append((encoder, state))
        n_layers = len(state.borrowed.owners)
        report.fast[name] = f"{found[1].__name__}, {n_layers} layers"
        for layer, reason in state.borrowed.reasons.items():
            report.slow[f"{name}.{layer}".strip(".")] = reason
    if not report.fast:
        slow = "".join(f"; {name or 'the model'}: {reason}" for name, reason in report.slow.items())
        raise ValueError(
            f"accelerate wants a model with one of transformers' {', '.join(FAMILIES)} in it, "
            f"got {type(model).__name__}{slow}"
        )
    for encoder, state in changes:
        state.calls = report.calls
        _STATES[encoder] = state
        own: Any = type(encoder)
        encoder.__class__ = _fast_class(own)
    return report


def restore(model: Any) -> None:
    """Undo `accelerate`. Raises ValueError where a class has been put on top of it since."""
    modules: list[Any] = [m for m in _root(model).modules() if _is_fast(m)]
    for module in modules:
        if "_fastbert_of" not in vars(type(module)):
            raise ValueError(
                f"restore wants the class that accelerate gave, got {type(module).__name__}, "
                "which was put on top of it: undo that first"
            )
    for module in modules:
        module.__class__ = type(module)._fastbert_of
        _STATES.pop(module, None)


def _root(model: Any) -> nn.Module:
    for candidate in (model, getattr(model, "model", None)):
        if isinstance(candidate, nn.Module):
            return candidate
    raise ValueError(f"accelerate wants a model or a pipeline, got {type(model).__name__}")


def _is_fast(module: Any) -> bool:
    return hasattr(type(module), "_fastbert_of")


def _why_never(encoder: Any, kind: type[nn.Module]) -> str | None:
    if _decodes(encoder.config):
        return "it is a decoder"
    if "forward" in vars(encoder) or type(encoder).forward is not kind.forward:
        return f"its forward is not that of transformers' {kind.__name__}"
    return None


class _State:
    """What is kept for one accelerated encoder."""

    def __init__(self, encoder: nn.Module, family: Family) -> None:
        self.family = family
        self.calls: Counter[str] = Counter()
        self.borrowed = Borrowed(encoder, family)

    def renew(self, encoder: nn.Module) -> Borrowed:
        """The layers as they are now."""
        borrowed = self.borrowed
        if not borrowed.unchanged():
            borrowed = self.borrowed = Borrowed(encoder, self.family)
        return borrowed

    def note(self, encoder: nn.Module, reason: str) -> None:
        if reason not in self.calls:
            _log.warning("%s takes its own code: %s", type(encoder).__name__, reason)
        self.calls[reason] += 1


_STATES: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()


def _state_of(encoder: nn.Module) -> _State:
    """Its state, made anew for copies, replicas and what comes from a file."""
    state = _STATES.get(encoder)
    if state is None:
        found = family_of(encoder)
        assert found is not None
        state = _STATES[encoder] = _State(encoder, found[0])
    return state


@cache
def _fast_class(kind: Any) -> Any:
    """The class of an encoder, with another forward; so alike that nobody takes it for another."""
    own: Callable = kind.forward
    parameters = _parameters(kind)
    names = tuple(parameters)[1:]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    warns = _WARN in inspect.unwrap(own).__code__.co_names

    @wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return own(self, *args, **kwargs)
        state = _state_of(self)
        reason: str | None
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        unknown = () if takes_any or given.keys() & _PACKED else given.keys() - set(names)
        if unknown or len(given) < len(args) + len(kwargs):
            reason = "its arguments do not fit"  # which its own code refuses
        else:
            given = {
                name: value
                for name, value in given.items()
                if value is not None or (name in _ASKED and name not in names)
            }
            reason = _why_not(self, given) or state.renew(self).why_not()
        if reason is None:
            found = _inputs(self, state.family, given)
            if isinstance(found, EncoderInputs):
                if warns and "input_ids" in given:
                    getattr(self, _WARN)(given["input_ids"], given.get("attention_mask"))
                return _run(self, state, found, given)
            reason = found
        state.note(self, reason)
        return own(self, *args, **kwargs)

    def train(self: Any, mode: bool = True) -> Any:
        # What is kept of weights misses those who write through .data, as in fastbert's own layers.
        if self in _STATES:
            _STATES[self].borrowed.forget(is_same_mode=mode == self.training)
        return kind.train(self, mode)

    return _subclass(kind, forward=forward, train=train)


@cache
def _fast_layer_class(kind: Any) -> Any:
    """The class of a layer that runs a borrowed one when it is given that.

    For layers that have to be called: those that are sharded or recomputed in the backward.
    """
    own: Callable = kind.forward

    @wraps(own)
    def forward(self: Any, *args: Any, borrowed: Any = None, **kwargs: Any) -> Any:
        if borrowed is None:
            return own(self, *args, **kwargs)
        layer, *others = borrowed
        return layer(*args, *others)

    return _subclass(kind, forward=forward)


@cache
def _parameters(kind: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind.forward).parameters


def _subclass(kind: Any, **methods: Callable) -> Any:
    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        _, _, *rest = kind.__reduce_ex__(self, protocol)
        return _made_anew, (kind, "train" in methods), *rest

    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(
        kind.__name__,
        (kind,),
        {**names, **methods, "__reduce_ex__": __reduce_ex__, "_fastbert_of": kind},
    )


def _made_anew(kind: Any, is_encoder: bool) -> Any:
    """What a copy or a pickle of an accelerated object begins with."""
    made = _fast_class(kind) if is_encoder else _fast_layer_class(kind)
    return made.__new__(made)


def _why_not(encoder: Any, given: dict[str, Any]) -> str | None:
    """Why the model's own code must serve this call; None where the arguments are no reason."""
    config = encoder.config
    states = given.get("output_hidden_states", config.output_hidden_states)
    if _decodes(config):
        return "it decodes"
    if given.get("output_attentions", config.output_attentions):
        return "attention weights are asked for"
    if not _knows_states(states):
        return f"output_hidden_states is {type(states).__name__}"
    if getattr(config, "torchscript", False):
        return "its configuration is for torchscript"
    for name in given:
        if name not in _READ and name not in _UNREAD:
            return f"{name} is given"
    if any_global_hooks():
        return "there are hooks on all modules"
    return None


def _knows_states(asked: Any) -> bool:
    """Whether `asked`, for hidden states, is all, none, or numbers that transformers knows."""
    if asked is None or isinstance(asked, bool):
        return True
    numbers = asked if isinstance(asked, list | tuple) else [asked]
    return _can_choose_states() and all(type(number) is int for number in numbers)


@cache
def _can_choose_states() -> bool:
    try:
        from transformers.utils.output_capturing import selected_hidden_states  # noqa: F401
    except ImportError:
        return False
    return True


def _decodes(config: Any) -> bool:
    return getattr(config, "is_decoder", False) or getattr(config, "is_causal", False)


def _inputs(encoder: Any, family: Family, given: dict[str, Any]) -> EncoderInputs | str:
    """The packed inputs, or why the model's own code must serve these."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    main = ids if embeds is None else embeds
    if (ids is None) == (embeds is None) or type(main) is not Tensor or main.numel() == 0:
        return "there is not one tensor of input_ids or inputs_embeds with something in it"
    if torch._C._functorch.is_functorch_wrapped_tensor(main):
        return "the call is one of torch.func's"
    if main.dim() != (2 if embeds is None else 3):
        return f"inputs are {tuple(main.shape)}"
    if embeds is None and main.dtype not in (torch.int64, torch.int32):
        return f"input_ids are {main.dtype}"
    shape, row = tuple(main.shape[:2]), (1, main.shape[1])
    mask, types, positions = (
        given.get(name) for name in ("attention_mask", "token_type_ids", "position_ids")
    )
    for name, tensor, shapes in (
        ("attention_mask", mask, (shape,)),
        ("token_type_ids", types, (shape,)),
        ("position_ids", positions, (shape, row)),
    ):
        if tensor is None:
            continue
        if type(tensor) is not Tensor or tensor.device != main.device:
            return f"{name} is not a tensor on {main.device}"
        if tuple(tensor.shape) not in shapes:
            return f"{name} is {tuple(tensor.shape)}"
    if positions is None and family.from_padding:
        first = encoder.embeddings.padding_idx
        if ids is None:
            positions = torch.arange(first + 1, first + 1 + shape[1], device=main.device)[None]
        else:
            real = ids.ne(first).int()
            positions = (real.cumsum(1).type_as(real) * real).long() + first
    if any(name in given for name in _PACKED):
        found = _given_bounds(given, main)
        if isinstance(found, str):
            return found
        bounds, longest = found
        inputs = EncoderInputs.of_padded(ids, None, types, positions, embeds)
        return inputs.with_bounds(bounds, longest)
    inputs = EncoderInputs.of_padded(ids, mask, types, positions, embeds)
    if not inputs.starts:
        return "a row begins with padding, which heads read"
    return inputs


def _given_bounds(given: dict[str, Any], main: Tensor) -> tuple[Tensor, int] | str:
    """cu_seqlens and the longest length that transformers' packed arguments say."""
    missing = [name for name in _PACKED if name not in given]
    if missing:
        return f"{missing[0]} is missing"
    bounds, of_keys = given["cu_seq_lens_q"], given["cu_seq_lens_k"]
    if main.shape[0] != 1 or "attention_mask" in given:
        return "cu_seq_lens_q is given with more than one row, or with a mask"
    for x in (bounds, of_keys):
        if not isinstance(x, Tensor) or x.device != main.device or x.dim() != 1 or len(x) < 2:
            return f"cu_seq_lens_q and cu_seq_lens_k are not both (n_seqs + 1,) on {main.device}"
    if bounds.shape != of_keys.shape:
        return "cu_seq_lens_k is not cu_seq_lens_q"
    lengths, apart = bounds.diff(), (bounds != of_keys).sum()
    seen = [bounds[0], bounds[-1], lengths.min(), lengths.max(), apart]
    first, last, shortest, longest, apart = torch.stack(seen).tolist()  # the one wait for a GPU
    if apart:
        return "cu_seq_lens_k is not cu_seq_lens_q"
    if (first, last) != (0, main.shape[1]) or shortest < 0:
        return f"cu_seq_lens_q does not rise from 0 to {main.shape[1]}"
    return bounds.int(), longest


def _run(encoder: Any, state: _State, inputs: EncoderInputs, given: dict[str, Any]) -> Any:
    asked = given.get("output_hidden_states", encoder.config.output_hidden_states)
    states: list[Tensor | None] | None = [] if asked else None
    n = len(state.borrowed.layers) + 1
    numbers = range(n) if asked is True else [asked] if isinstance(asked, int) else asked
    wanted = {number % n for number in numbers if -n <= number < n} if asked else set()
    if states is None:
        inputs = inputs.by_length()
    x = _embedded(encoder, state, inputs)
    if states is None and can_plan(x, encoder.training):
        x = infer(state.borrowed.layers, x, inputs.cu_seqlens, inputs.max_seqlen)
    else:
        x = _through_layers(state.borrowed, x, inputs, states, wanted)
    out = inputs.restore(x)
    results: dict[str, Any] = {"last_hidden_state": out}
    if getattr(encoder, "pooler", None) is not None:
        is_packed = any(name in given for name in _PACKED)
        results["pooler_output"] = encoder.pooler(
            inputs.first_tokens(x)[:, None] if is_packed else out
        )
    if states is not None:
        results["hidden_states"] = (*states, out if n - 1 in wanted else None)
    import transformers.modeling_outputs

    output = getattr(transformers.modeling_outputs, state.family.output)(**results)
    if given.get("return_dict", encoder.config.return_dict) is not False:
        return output
    kind: Any = type(encoder)
    values = output.to_tuple()
    if (
        "Pooling" in state.family.output
        and "pooler_output" not in results
        and "return_dict" in _parameters(kind)
    ):
        values = (values[0], None, *values[1:])  # as encoders of transformers 4, for their heads
    return values


def _embedded(encoder: Any, state: _State, inputs: EncoderInputs) -> Tensor:
    """(n_tokens, hidden): what the first layer is given."""
    parts, borrowed = encoder.embeddings, state.borrowed.embeddings
    kind: Any = type(parts)
    # DistilBERT's of transformers 4 take columns for positions: those of packed tokens are others.
    is_own = kind.__module__.startswith("transformers.")
    of_columns = is_own and "position_ids" not in _parameters(kind)
    has_kernel = on_kernel_device(parts.word_embeddings.weight)
    if borrowed is not None and has_kernel and is_plain(parts, kind):  # else it must be called
        x = borrowed(
            inputs.input_ids, inputs.token_type_ids, inputs.position_ids, inputs.inputs_embeds
        )
    elif of_columns:
        embeds = inputs.inputs_embeds
        x = parts.word_embeddings(inputs.input_ids) if embeds is None else embeds
        x = parts.dropout(parts.LayerNorm(x + parts.position_embeddings(inputs.position_ids)))
    else:
        args = {
            "input_ids": inputs.input_ids,
            "inputs_embeds": inputs.inputs_embeds,
            "position_ids": inputs.position_ids,
        }
        if state.family.has_types:
            args["token_type_ids"] = inputs.token_type_ids
        x = parts(**{name: None if t is None else t[None] for name, t in args.items()})[0]
    project = getattr(encoder, "embeddings_project", None)
    return x if project is None else project(x)


def _through_layers(
    borrowed: Borrowed,
    x: Tensor,
    inputs: EncoderInputs,
    states: list[Tensor | None] | None,
    wanted: set[int],
) -> Tensor:
    """What the last layer makes; what those before it are given goes to `states`, where wanted."""
    cu_seqlens, max_seqlen = inputs.cu_seqlens, inputs.max_seqlen
    tiles = schedule(cu_seqlens, max_seqlen, x.shape[0]) if on_kernel_device(x) else None
    others = (cu_seqlens, max_seqlen, None, tiles)
    for number, (owner, layer) in enumerate(zip(borrowed.owners, borrowed.layers, strict=True)):
        if states is not None:
            kept = inputs.restore(x) if number in wanted else None
            states.append(kept)
            if kept is not None and x.requires_grad:
                x = inputs.pick(kept)  # so that gradients in it are those of the output
        if _must_be_called(owner):
            inner = unwrapped(owner)
            if not _is_fast(inner):
                own: Any = type(inner)
                inner.__class__ = _fast_layer_class(own)
            x = owner(x, borrowed=(layer, *others))
        else:
            x = layer(x, *others)
    return x


def _must_be_called(owner: Any) -> bool:
    """Whether calling the layer does more than computing it: sharding, recomputing."""
    is_recomputed = getattr(owner, "gradient_checkpointing", False) and owner.training
    return is_recomputed or unwrapped(owner) is not owner or bool(owner._forward_pre_hooks)
