"""What each of two processes does in tests of distributed training; they import it from here."""

import os

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.bert.modeling_bert import BertLayer

import fastbert

SIZES = {
    "vocab_size": 22, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3,
}  # fmt: skip


def small(name, **changes):
    """A model of transformers, always with the same weights."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**SIZES, **changes})
    return getattr(transformers, name)(config).eval()


def rank_batch(rank):
    torch.manual_seed(rank)
    ids, mask = torch.randint(5, 22, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    mask[0, 4:] = mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 1])}


KINDS = ["DDP", "FSDP"]
if torch.__version__ >= "2.8":  # before, FSDP2 wants a GPU
    KINDS += ["FSDP2", "FSDP2, then accelerate"]


def on_one_rank(rank, address, folder):
    """Save, for each kind, the gradients of one step after `accelerate`, and what was not fast."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save({kind: step(kind, rank) for kind in KINDS}, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def step(kind, rank):
    model = small("BertForSequenceClassification", num_labels=2).train()
    if kind == "FSDP2, then accelerate":
        shard(model)
    report = fastbert.accelerate(model)
    wrapped = model
    if kind == "DDP":
        wrapped = DistributedDataParallel(model)
    elif kind == "FSDP":
        wrapped = fsdp(model)
    elif kind == "FSDP2":
        shard(model)
    wrapped(**rank_batch(rank)).loss.backward()
    if kind == "FSDP":
        with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
            gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    else:
        gradients = {n: p.grad for n, p in model.named_parameters()}
    return {
        name.replace("_fsdp_wrapped_module.", ""): getattr(g, "full_tensor", lambda g=g: g)()
        for name, g in gradients.items()
    }, dict(report.calls)


def shard(model):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def fsdp(model):
    return FullyShardedDataParallel(
        model, auto_wrap_policy=ModuleWrapPolicy({BertLayer}), use_orig_params=True,
        device_id=torch.device("cpu"),
    )  # fmt: skip
