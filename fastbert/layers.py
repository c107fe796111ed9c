"""The parts of BERT on packed tokens, named and nested as in transformers."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbert.config import BertConfig
from fastbert.inference import LayerPlan, can_plan, run
from fastbert.int8 import Int8Linear
from fastbert.kernels._triton import on_kernel_device
from fastbert.kernels.attention import Schedule, attention, attention_weights_ref, schedule
from fastbert.kernels.embeddings import embed
from fastbert.kernels.gelu import bias_gelu
from fastbert.kernels.layer_norm import layer_norm
from fastbert.kernels.linear_gelu import linear_gelu
from fastbert.watch import Planned, Watch, is_plain


class LayerNorm(nn.LayerNorm):
    """Layer norm of dropout(x) + residual."""

    def forward(self, x: Tensor, residual: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
        return layer_norm(x, self.weight, self.bias, residual, dropout_p, self.eps)


def _rate(dropout: nn.Dropout) -> float:
    """For an operation that drops by itself: 0.0 outside training."""
    return dropout.p if dropout.training else 0.0


class SinusoidalPositions(nn.Embedding):
    """PE(pos, 2i) = sin(pos / 10000^(2i / hidden)), PE(pos, 2i + 1) its cosine (Vaswani et al.
    2017, 3.5): a table like a learned one, and saved as it, but not trained."""

    def __init__(self, n_positions: int, hidden_size: int) -> None:
        super().__init__(n_positions, hidden_size)
        self.weight.requires_grad_(False)

    def reset_parameters(self) -> None:
        n_positions, hidden_size = self.weight.shape
        angle = torch.arange(n_positions, dtype=torch.float64)[:, None] / 10000 ** (
            torch.arange(0, hidden_size, 2, dtype=torch.float64) / hidden_size
        )
        table = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :hidden_size]
        with torch.no_grad():
            self.weight.copy_(table)


class BertEmbeddings(nn.Module):
    """Word, token type and position embeddings of packed tokens: to (n_tokens, hidden)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        is_fixed = config.position_embedding_type == "sinusoidal"
        self.position_embeddings = (SinusoidalPositions if is_fixed else nn.Embedding)(
            config.max_position_embeddings, config.hidden_size
        )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor,
        position_ids: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Ids (n_tokens,); inputs_embeds (n_tokens, hidden) in place of input_ids."""
        if input_ids is None or not self._is_plain():
            x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
            x = x + self.token_type_embeddings(token_type_ids)
            return self.dropout(self.LayerNorm(x + self.position_embeddings(position_ids)))
        return embed(
            input_ids, token_type_ids, position_ids,
            self.word_embeddings.weight, self.token_type_embeddings.weight,
            self.position_embeddings.weight, self.LayerNorm.weight, self.LayerNorm.bias,
            _rate(self.dropout), self.LayerNorm.eps, self.word_embeddings.padding_idx,
        )  # fmt: skip

    def _is_plain(self) -> bool:
        tables = (self.word_embeddings, self.position_embeddings, self.token_type_embeddings)
        return (
            all(is_plain(table, (nn.Embedding, SinusoidalPositions)) for table in tables)
            # `embed` leaves out the gradient of a row of words only; RoBERTa has one of positions.
            and not (
                torch.is_grad_enabled()
                and any(table.padding_idx is not None for table in tables[1:])
            )
            and is_plain(self.LayerNorm, (LayerNorm, nn.LayerNorm))
            and is_plain(self.dropout, nn.Dropout)
        )


class BertSelfAttention(Planned):
    """Attention, whose three projections are one product where a kernel takes its result."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)
        self._plan: tuple[Watch, Tensor, Tensor] | None = None

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        weights: list[Tensor] | None = None,
        schedule: Schedule | None = None,
    ) -> Tensor:
        """(n_tokens, hidden) to the same. A list given as `weights` gets the attention weights.
        schedule: of the batch, made where there is none."""
        heads = (self.num_attention_heads, self.attention_head_size)
        linears = (self.query, self.key, self.value)
        dropout_p = _rate(self.dropout)
        if weights is None and on_kernel_device(x) and all(map(_is_plain_linear, linears)):
            qkv = F.linear(x, *self._joined()).unflatten(-1, (3, *heads))
            out = attention(qkv, cu_seqlens, max_seqlen, dropout_p=dropout_p, schedule=schedule)
            return out.flatten(1)
        q, k, v = (linear(x).unflatten(-1, heads) for linear in linears)
        if weights is not None:
            weights.append(attention_weights_ref(q, k, cu_seqlens, max_seqlen))
        out = attention(q, k, v, cu_seqlens, max_seqlen, dropout_p=dropout_p, schedule=schedule)
        return out.flatten(1)

    def _joined(self) -> tuple[Tensor, Tensor]:
        """The three weights and biases as one. Kept for inference until one of them changes."""
        linears: list[Any] = [self.query, self.key, self.value]
        weights: list[Tensor] = [linear.weight for linear in linears]
        biases: list[Tensor] = [linear.bias for linear in linears]
        may_keep = not (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or getattr(self, "_is_replica", False)  # DataParallel's live for one forward
            or any(p.is_inference() for p in weights + biases)  # carry no version
        )
        if not may_keep:
            return torch.cat(weights), torch.cat(biases)
        plan = self._plan  # other threads may run the same layer
        if plan is None or not plan[0].unchanged():
            with torch.inference_mode(False), torch.no_grad():
                plan = Watch([self, *linears]), torch.cat(weights), torch.cat(biases)
            if weights[0].is_cuda and not torch.cuda.is_current_stream_capturing():
                torch.cuda.current_stream(weights[0].device).synchronize()  # others have streams
            self._plan = plan
        return plan[1:]


def _is_plain_linear(module: nn.Module) -> bool:
    return is_plain(module, nn.Linear)


class _Output(nn.Module):
    """A projection back into the residual stream: layer norm of dropout(dense(x)) + residual."""

    def __init__(self, in_features: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        x, norm = self.dense(x), self.LayerNorm
        if not is_plain(self.dropout, nn.Dropout):
            return norm(self.dropout(x) + residual)
        if type(norm) is LayerNorm:
            return norm(x, residual, _rate(self.dropout))
        if is_plain(norm, nn.LayerNorm):  # in a layer that is borrowed
            return layer_norm(x, norm.weight, norm.bias, residual, _rate(self.dropout), norm.eps)
        return norm(self.dropout(x) + residual)


class BertSelfOutput(_Output):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(config.hidden_size, config)


class BertOutput(_Output):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(config.intermediate_size, config)


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertSelfOutput(config)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        weights: list[Tensor] | None = None,
        schedule: Schedule | None = None,
    ) -> Tensor:
        return self.output(self.self(x, cu_seqlens, max_seqlen, weights, schedule), x)


class BertIntermediate(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = config.hidden_act

    def forward(self, x: Tensor) -> Tensor:
        if _is_plain_linear(self.dense):
            return linear_gelu(x, self.dense.weight, self.dense.bias, self.activation)
        return bias_gelu(self.dense(x), None, self.activation)


class BertLayer(Planned):
    """One post-norm BERT layer on packed tokens: (n_tokens, hidden) to the same."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)
        self._plan: LayerPlan | None = None

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        weights: list[Tensor] | None = None,
        schedule: Schedule | None = None,
    ) -> Tensor:
        x = self.attention(x, cu_seqlens, max_seqlen, weights, schedule)
        return self.output(self.intermediate(x), x)

    def plan(self) -> LayerPlan | None:
        """Today's weights prepacked for inference on a CPU; None where a module is not plain."""
        if self._plan is None or not self._plan.holds():
            self._plan = LayerPlan.of(self, _PLAIN)
        return self._plan


# What a plan knows the arithmetic of; not their subclasses, which may compute something else.
_PLAIN = (
    BertLayer, BertAttention, BertSelfAttention, BertSelfOutput, BertIntermediate, BertOutput,
    nn.Linear, Int8Linear, LayerNorm, nn.LayerNorm, nn.Dropout,
)  # fmt: skip


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.checkpoint_options: dict[str, Any] = {"use_reentrant": False}

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        hidden_states: list[Tensor] | None = None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """(n_tokens, hidden) to the same. Lists that are given get the states and the weights."""
        if hidden_states is None and weights is None and can_plan(x, self.training):
            return infer(self.layer, x, cu_seqlens, max_seqlen)
        tiles = schedule(cu_seqlens, max_seqlen, x.shape[0]) if on_kernel_device(x) else None
        args = (cu_seqlens, max_seqlen, weights, tiles)
        for layer in self.layer:
            if hidden_states is not None:
                hidden_states.append(x)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, x, *args, **self.checkpoint_options)
            else:
                x = layer(x, *args)
        if hidden_states is not None:
            hidden_states.append(x)
        return x


def infer(layers: Iterable[nn.Module], x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Pass (n_tokens, hidden) through BertLayers on a CPU, where `can_plan` holds."""
    all_layers: list[Any] = list(layers)
    steps = ((layer, layer.plan()) for layer in all_layers)
    for kind, group in groupby(steps, key=lambda s: s[1] and (s[1].dtype, s[1].most_rows)):
        some, planned = zip(*group, strict=True)
        if kind is not None:
            x = run(planned, x, cu_seqlens)
            continue
        for layer in some:
            x = layer(x, cu_seqlens, max_seqlen)
    return x


class BertPooler(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, first: Tensor) -> Tensor:
        """first: (n_seqs, hidden), the vectors of the sequences' first tokens."""
        return self.activation(self.dense(first))
