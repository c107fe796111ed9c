"""One BERT with the same weights, run by fastbert and by transformers in all the ways it can be.

Nothing here asks for a GPU by itself, so that tests can try it with small models on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

import fastbert
from fastbert import PackedBatch


@dataclass(frozen=True)
class Batch:
    """The same sequences padded and packed."""

    input_ids: Tensor  # (n_seqs, longest)
    attention_mask: Tensor
    packed: PackedBatch
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, lengths, device, vocab_size):
        generator = torch.Generator().manual_seed(0)
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        ids = torch.randint(1, vocab_size, mask.shape, generator=generator) * mask
        packed = fastbert.pack(ids, mask).to(device)
        return cls(ids.to(device), mask.to(device), packed, tuple(lengths))

    def first(self, n_seqs):
        """Some of the sequences."""
        lengths = self.lengths[:n_seqs]
        part = slice(n_seqs), slice(max(lengths))
        packed = self.packed.split([len(lengths), len(self.lengths) - len(lengths)])[0]
        return Batch(self.input_ids[part], self.attention_mask[part], packed, lengths)

    @property
    def n_tokens(self):
        return sum(self.lengths)

    @property
    def padding(self):
        return 1 - self.n_tokens / self.input_ids.numel()


@dataclass(frozen=True)
class Provider:
    """model: has the parameters. run: a Batch to (n_tokens, hidden), or to a padded tensor."""

    model: nn.Module
    run: Callable[[Batch], Tensor]
    is_packed: bool

    def real(self, hidden, batch):
        """(n_tokens, hidden) of what `run` gives."""
        return hidden if self.is_packed else hidden[batch.attention_mask.bool()]

    def as_given(self, real, batch):
        """What `run` gives, with zeros at padding, of (n_tokens, hidden)."""
        if self.is_packed:
            return real
        out = real.new_zeros(*batch.input_ids.shape, real.shape[-1])
        out[batch.attention_mask.bool()] = real
        return out


@cache
def variable_length(kind):
    """Attention on packed sequences: (q, k, v, cu_seqlens, max_seqlen, dropout_p) to as q."""
    if kind == "flash-attn":
        flash = pytest.importorskip("flash_attn", reason="flash-attn is not installed")

        def run(q, k, v, cu_seqlens, max_seqlen, dropout_p=0.0):
            bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
            return flash.flash_attn_varlen_func(q, k, v, *bounds, dropout_p=dropout_p)

        return run
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch has no varlen_attn")

    def run(q, k, v, cu_seqlens, max_seqlen, dropout_p=0.0):
        # It has no dropout, so in training it does less than it is asked to.
        return varlen.varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)

    return run


def packed_attention(
    attend, module, query, key, value, attention_mask, *,
    cu_seq_lens_q, max_length_q, dropout=0.0, **_,
):  # fmt: skip
    """As transformers calls it, with tensors (1, n_heads, n_tokens, head_dim)."""
    assert attention_mask is None and query.shape[0] == 1
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(q, k, v, cu_seq_lens_q, max_length_q, dropout)[None], None


def packed_implementation(name, attend):
    """Register attention on packed sequences; gives what `attn_implementation` is then.

    There is no mask function for it, so transformers makes no mask, which is what it needs.
    """
    from transformers import AttentionInterface

    name = "packed_" + name.replace("-", "_").replace("flash", "fa")  # "flash" is refused
    AttentionInterface.register(name, partial(packed_attention, attend))
    return name


def load_fastbert(config, state, device, from_padded=False, graphs=True):
    dtype = next(iter(state.values())).dtype
    with torch.device(device):
        model = fastbert.BertModel(fastbert.BertConfig(**config), add_pooling_layer=False)
    model.to(dtype).eval().load_state_dict(state)
    if not graphs:
        model.cuda_graphs = False

    def run(batch):
        given = (batch.input_ids, batch.attention_mask) if from_padded else (batch.packed,)
        return model(*given).last_hidden_state

    return Provider(model, run, not from_padded)


def load_transformers(config, state, device, implementation, packed=None, compiled=None):
    """packed: attention on packed sequences; None pads. compiled: torch.compile's options."""
    import transformers

    dtype = next(iter(state.values())).dtype
    if packed:
        implementation = packed_implementation(implementation, packed)
    values = transformers.BertConfig(**config, attn_implementation=implementation)
    with torch.device(device):
        model = transformers.BertModel(values, add_pooling_layer=False)
    assert model.config._attn_implementation == implementation
    model.to(dtype).eval().load_state_dict(state)
    call = model if compiled is None else torch.compile(model, **compiled)

    def run_packed(batch):
        given = batch.packed
        out = call(
            given.input_ids[None],
            token_type_ids=given.token_type_ids[None],
            position_ids=given.position_ids[None],
            cu_seq_lens_q=given.cu_seqlens,
            max_length_q=given.max_seqlen,
        )
        return out.last_hidden_state[0]

    def run_padded(batch):
        return call(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state

    return Provider(model, run_packed if packed else run_padded, bool(packed))


EAGER, SDPA, SDPA_COMPILED = (
    "transformers eager", "transformers sdpa", "transformers sdpa, compiled",
)  # fmt: skip
VARLEN, VARLEN_COMPILED = "packed varlen_attn", "packed varlen_attn, compiled"
PADDED_IN, NO_GRAPHS = "fastbert, padded in and out", "fastbert, without graphs"
PROVIDERS = ("fastbert", EAGER, SDPA, SDPA_COMPILED, VARLEN, VARLEN_COMPILED, "packed flash-attn")


def load(provider, config, state, device, options=None):
    """options: torch.compile's, for providers that are compiled."""
    if provider.startswith("fastbert"):
        return load_fastbert(config, state, device, provider == PADDED_IN, provider != NO_GRAPHS)
    compiled = (options or {}) if provider.endswith(", compiled") else None
    kind, name = provider.removesuffix(", compiled").split()
    packed = variable_length(name) if kind == "packed" else None
    return load_transformers(config, state, device, name, packed, compiled)
