"""Whole models on a GPU against every way to run them with transformers: benchmarks/gpu.sh.

Every output is compared with float64 before it is timed. What the targets ask for comes first.
"""

import re
from collections import defaultdict
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from gpu_peers import (
    EAGER,
    NO_GRAPHS,
    PADDED_IN,
    PROVIDERS,
    SDPA,
    SDPA_COMPILED,
    VARLEN,
    Batch,
    load,
    variable_length,
)
from transformers import BertConfig, BertModel

from fastbert.graphs import MOST_TOKENS
from fastbert.kernels.attention import attention, schedule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
VOCAB = 30522
TOKENS = 65536  # real ones of a forward
LONGEST = 512
MATMUL, COPIED = 8192, 2**32  # the ceilings: sides of the matrices, bytes
COMPILE = {}  # torch.compile's options
CHECKED = 4  # sequences that are compared with float64


def shape(layers, hidden, heads):
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }


MODELS = {
    "BERT-large": shape(24, 1024, 16),
    "BERT-base": shape(12, 768, 12),
    "MiniLM-L6-H384": shape(6, 384, 12),
}


def forward_flops(config, lengths):
    """24 L H^2 + 4 L s H a token where the FFN is four times as wide: products, nothing else."""
    layers, hidden, wide = (
        config[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size")
    )
    a_token = 2 * layers * (4 * hidden**2 + 2 * hidden * wide)
    return sum(n * (a_token + 4 * layers * n * hidden) for n in lengths)


def attention_flops(lengths, n_heads, head_dim, *, backward=False):
    """Two products forward, five backward."""
    return sum((10 if backward else 4) * n**2 * n_heads * head_dim for n in lengths)


def spread(n_seqs, longest, fill, shortest=1):
    """Lengths up to `longest` and `fill` of it on average, many short, few long, in random order.

    longest * u ** (1 / fill - 1) for u evenly from 0 to 1, whose mean is fill * longest.
    """
    u = (torch.arange(n_seqs, dtype=torch.float64) + 0.5) / n_seqs
    lengths = (longest * u ** (1 / fill - 1)).round().clamp(shortest, longest).long()
    lengths[-1] = longest
    return lengths[torch.randperm(n_seqs, generator=torch.Generator().manual_seed(0))].tolist()


def relative_error(out, exact):
    out = out.detach().to("cpu", torch.float64)
    return ((out - exact).norm() / exact.norm()).item()


@lru_cache(1)
def weights(model, longest):
    """A configuration and random weights for it, on the CPU so that no peak counts them."""
    config = {"vocab_size": VOCAB, **MODELS[model], "max_position_embeddings": longest}
    torch.manual_seed(0)
    with torch.device(DEVICE):
        made = BertModel(BertConfig(**config), add_pooling_layer=False).to(DTYPE)
    return config, {name: tensor.cpu() for name, tensor in made.state_dict().items()}


@lru_cache(1)
def workload(model, lengths, longest=LONGEST):
    """Configuration, weights, batch; the float64 vectors of its first sequences; the error allowed.

    That is twice what transformers has with eager attention and these weights.
    """
    config, state = weights(model, longest)
    batch = Batch.of(lengths, DEVICE, config["vocab_size"])
    first, outputs = batch.first(CHECKED), []
    with torch.inference_mode():
        for dtype in (torch.float64, DTYPE):
            same = {name: tensor.to(dtype) for name, tensor in state.items()}
            plain = load(EAGER, config, same, DEVICE)
            outputs.append(plain.real(plain.run(first), first).to("cpu", torch.float64))
    exact, baseline = outputs
    allowed = 2 * relative_error(baseline, exact) + torch.finfo(DTYPE).eps
    return config, state, batch, exact, allowed


def time_forward(
    timed, group, model, provider, lengths, longest=LONGEST, options=COMPILE, **how
):  # fmt: skip
    config, state, batch, exact, allowed = workload(model, tuple(lengths), longest)
    made = load(provider, config, state, DEVICE, options)  # weights made in inference mode differ
    run = torch.inference_mode()(made.run)
    for _ in range(3):  # by then CUDA graphs are captured where they will be
        out = run(batch)
    if provider == "fastbert":
        is_graph = bool(made.model._graphs._graphs)
        assert is_graph is (DEVICE.type == "cuda" and batch.n_tokens <= MOST_TOKENS)
    error = relative_error(made.real(out, batch)[: len(exact)], exact)
    assert error <= allowed, (provider, error, allowed)
    timed(
        lambda: run(batch),
        group,
        provider=provider,
        tokens=batch.n_tokens,
        padding=batch.padding,
        flops=forward_flops(config, lengths),
        error=error,
        **how,
    )


# The ceilings: in every part, since parts may run on different machines.


def bench_ceiling_matmul(timed):
    a, b = torch.randn(2, MATMUL, MATMUL, dtype=DTYPE, device=DEVICE)
    timed(lambda: a @ b, "ceilings", provider=f"{MATMUL}^3 matmul", flops=2 * MATMUL**3)


def bench_ceiling_copy(timed):
    x = torch.randn(COPIED // 4, device=DEVICE)
    y = torch.empty_like(x)
    timed(lambda: y.copy_(x), "ceilings", provider="large copy", bytes=2 * x.nbytes)


# Attention by itself, 16 heads of 64.

N_HEADS, HEAD_DIM = 16, 64
ATTENTION = {
    "lengths of 128": (128, 1.0),
    "lengths of 512": (512, 1.0),
    "mixed lengths to 512": (512, 0.4),
}
DROPOUT = "fastbert, dropout 0.1"


def of_one_length(q, k, v, cu_seqlens, length):
    heads = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(0, 1)


def attention_provider(name, cu_seqlens, longest, n_tokens):
    if name.startswith("fastbert"):
        made = schedule(cu_seqlens, longest, n_tokens)  # once a batch, for all layers
        dropout_p = 0.1 if name == DROPOUT else 0.0
        return lambda *args: attention(*args, dropout_p=dropout_p, schedule=made)
    return of_one_length if name == "sdpa" else variable_length(name)


@pytest.mark.parametrize("provider", ["fastbert", "varlen_attn", DROPOUT, "sdpa", "flash-attn"])
@pytest.mark.parametrize("case", ATTENTION)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def bench_attention_kernel(timed, provider, case, direction):
    longest, fill = ATTENTION[case]
    if provider == "sdpa" and fill < 1:
        pytest.skip("sdpa takes sequences of one length")
    backward = direction == "backward"
    lengths = spread(max(1, round(TOKENS / longest / fill)), longest, fill)
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    attend = attention_provider(provider, cu_seqlens, longest, sum(lengths))
    torch.manual_seed(0)
    *qkv, dout = torch.randn(4, sum(lengths), N_HEADS, HEAD_DIM, dtype=DTYPE, device=DEVICE)
    qkv = [x.requires_grad_(backward) for x in qkv]
    out = attend(*qkv, cu_seqlens, longest)

    def backwards():
        return torch.autograd.grad(out, qkv, dout, retain_graph=True)

    if provider != DROPOUT:
        found = [out, *(backwards() if backward else [])]
        check_attention(found, qkv, dout, lengths[:CHECKED], backward)
    timed(
        backwards if backward else lambda: attend(*qkv, cu_seqlens, longest),
        f"attention {direction}, d=64, {case}",
        provider=provider,
        tokens=sum(lengths),
        padding=1 - sum(lengths) / (len(lengths) * longest),
        flops=attention_flops(lengths, N_HEADS, HEAD_DIM, backward=backward),
    )


def check_attention(found, qkv, dout, lengths, backward):
    """The first sequences' output and gradients against float64, and torch's in the same dtype."""
    n, wanted = sum(lengths), []
    for dtype in (torch.float64, DTYPE):
        part = [x[:n].detach().to(dtype).requires_grad_(backward) for x in qkv]
        one_by_one = zip(*(x.split(lengths) for x in part), strict=True)
        out = torch.cat([of_one_length(*heads, None, len(heads[0])) for heads in one_by_one])
        dpart = torch.autograd.grad(out, part, dout[:n].to(dtype)) if backward else []
        wanted.append([x.detach().to("cpu", torch.float64) for x in (out, *dpart)])
    for x, exact, baseline in zip(found, *wanted, strict=True):
        allowed = 2 * relative_error(baseline, exact) + torch.finfo(DTYPE).eps
        assert relative_error(x[:n], exact) <= allowed


# Forwards with 64k real tokens, lengths up to 512.


def time_fill(timed, model, fill, provider):
    lengths = spread(max(1, round(TOKENS / LONGEST / fill)), LONGEST, fill)
    group = f"{model}, forward, lengths to {LONGEST}, fill {fill}"
    time_forward(timed, group, model, provider, lengths)


SHORT = ("fastbert", VARLEN, SDPA)
FULL = (*PROVIDERS, PADDED_IN)
NOT_COMPILED = [name for name in FULL if not name.endswith(", compiled")]
INFERENCE = [("BERT-base", 0.4, name) for name in FULL]
INFERENCE += [(model, 1.0, name) for model in MODELS for name in SHORT]
FILLS = [
    (model, fill, name)
    for model in MODELS
    for fill in (0.2, 0.4, 0.6)
    if (model, fill) != ("BERT-base", 0.4)
    for name in (FULL if (model, fill) == ("MiniLM-L6-H384", 0.4) else NOT_COMPILED)
]


@pytest.mark.parametrize("model, fill, provider", INFERENCE)
def bench_inference(timed, model, fill, provider):
    time_fill(timed, model, fill, provider)


@pytest.mark.parametrize("model, fill, provider", FILLS)
def bench_fill(timed, model, fill, provider):
    time_fill(timed, model, fill, provider)


@pytest.mark.parametrize("provider", ["fastbert", NO_GRAPHS, SDPA_COMPILED, SDPA, EAGER])
@pytest.mark.parametrize("model", MODELS)
def bench_latency(timed, provider, model):
    if (model, provider) == ("BERT-large", SDPA_COMPILED):
        pytest.skip("to compile it takes a minute, and the smaller ones tell as much")
    options = {"mode": "reduce-overhead", **COMPILE}  # CUDA graphs
    group = f"{model}, 1 x 128, latency"
    time_forward(timed, group, model, provider, [128], options=options, alone=True)


@pytest.mark.parametrize("provider", SHORT)
@pytest.mark.parametrize("length", [32, 64, 128, 256, 512, 1024, 2048])
@pytest.mark.parametrize("model", MODELS)
def bench_length(timed, provider, length, model):
    lengths = [length] * max(1, TOKENS // length)
    group = f"{model}, forward, lengths of {length}"
    time_forward(timed, group, model, provider, lengths, longest=2048)


@pytest.mark.parametrize("provider", SHORT)
@pytest.mark.parametrize("n_seqs", [1, 8, 64, 512])
@pytest.mark.parametrize("model", MODELS)
def bench_batch(timed, provider, n_seqs, model):
    time_forward(timed, f"{model}, forward, {n_seqs} x 128", model, provider, [128] * n_seqs)


# Training steps: forward, backward, fused AdamW; weights in DTYPE, BERT's dropout of 0.1.

N_TRAINED = 32  # sequences a step
TRAINING = [("BERT-large", 0.4, name) for name in PROVIDERS]
TRAINING += [("BERT-large", 1.0, name) for name in SHORT]
TRAINING += [
    (model, 0.4, name) for model in ("BERT-base", "MiniLM-L6-H384") for name in (*SHORT, EAGER)
]


def gradient_norms(model):
    """Of each kind of parameter, over all layers: {"encoder.layer.attention...": norm}.

    Without the keys' biases, whose gradient is zero and rounding.
    """
    squares = defaultdict(float)
    for name, p in model.named_parameters():
        if not name.endswith("key.bias"):
            squares[re.sub(r"\.\d+", "", name)] += p.grad.double().square().sum().item()
    return {kind: total**0.5 for kind, total in squares.items()}


@lru_cache(2)
def usual_norms(model, lengths, attention_dropout):
    """Those of transformers with sdpa, and the gradient of the vectors that gives them."""
    config, state, batch, _, _ = workload(model, lengths)
    if not attention_dropout:
        config = {**config, "attention_probs_dropout_prob": 0.0}
    made = load(SDPA, config, state, DEVICE)
    made.model.train()
    torch.manual_seed(1)
    dreal = torch.randn(batch.n_tokens, config["hidden_size"], dtype=DTYPE, device=DEVICE)
    torch.autograd.backward(made.run(batch), made.as_given(dreal, batch))
    return gradient_norms(made.model), dreal.cpu()


def training_step(made, batch, dout):
    """A function: forward, backward of `dout`, which is as made.run gives, and an update."""
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-6, fused=True)

    def step():
        optimizer.zero_grad()
        torch.autograd.backward(made.run(batch), dout)
        optimizer.step()

    return step


@pytest.mark.parametrize("model, fill, provider", TRAINING)
def bench_training(timed, model, fill, provider):
    lengths = tuple(spread(N_TRAINED, LONGEST, fill))
    config, state, batch, _, _ = workload(model, lengths)
    usual, dreal = usual_norms(model, lengths, "varlen_attn" not in provider)  # it has none
    made = load(provider, config, state, DEVICE, COMPILE)
    made.model.train()
    dout = made.as_given(dreal.to(DEVICE), batch)
    step = training_step(made, batch, dout)

    # What is dropped differs, so only sizes can be compared: what is left out of the work shows.
    step()
    for kind, norm in gradient_norms(made.model).items():
        assert usual[kind] / 2 <= norm <= usual[kind] * 2, (kind, norm, usual[kind])
    timed(
        step,
        f"{model}, training step, lengths to {LONGEST}, fill {fill}",
        provider=provider,
        tokens=batch.n_tokens,
        padding=batch.padding,
        flops=3 * forward_flops(config, lengths),
        peak_memory=True,
    )
