"""The encoder's layers where kernels run: a GPU, or the CPU with Triton's interpreter."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from fastbert import BertConfig, BertModel
from fastbert.kernels import _triton
from fastbert.layers import BertSelfAttention

pytestmark = pytest.mark.interpreted
CONFIG = BertConfig(
    vocab_size=50, hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
    intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


@pytest.fixture
def model(device):
    return BertModel(CONFIG).to(device)


@pytest.fixture
def batch(device):
    ids = torch.randint(0, 50, (3, 9), device=device)
    mask = torch.ones_like(ids)
    mask[0, 4:] = mask[1, :3] = 0
    return ids, mask


def plain(model, *batch, monkeypatch):
    """The same in plain torch."""
    with monkeypatch.context() as patch:
        patch.setattr(_triton, "why_not", lambda device: "not for this test")
        return model(*batch).last_hidden_state


def test_trains_as_plain_torch_does(model, batch, monkeypatch):
    model.train()
    found = model(*batch).last_hidden_state
    wanted = plain(model, *batch, monkeypatch=monkeypatch)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(found)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = [
        torch.autograd.grad((out * weights).sum(), parameters, allow_unused=True)
        for out in (found, wanted)
    ]
    for name, a, b in zip(names, *grads, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@torch.no_grad()
def test_joined_projections_follow_their_weights(device):
    """In place, through .data and eval(), assigned, exchanged, hooked."""
    layer = BertSelfAttention(CONFIG).to(device).eval()
    x = torch.randn(9, 32, device=device)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32, device=device)

    def check():
        before = layer(x, cu_seqlens, 5)
        fresh = copy.deepcopy(layer)
        assert fresh._plan is None
        torch.testing.assert_close(before, fresh(x, cu_seqlens, 5))
        return before

    seen = [check()]
    assert layer._plan is not None
    kept = layer._plan[1]
    seen.append(check())
    assert layer._plan[1] is kept
    layer.query.weight.mul_(1.5)
    seen.append(check())
    layer.key.weight.data.mul_(1.5)
    layer.eval()
    seen.append(check())
    state = {name: tensor + 1 for name, tensor in layer.value.state_dict().items()}
    layer.value.load_state_dict(state, assign=True)
    seen.append(check())
    layer.value = nn.Linear(32, 32, device=device)
    seen.append(check())
    layer.value.register_forward_hook(lambda module, args, out: out * 2)
    seen.append(check())
    changed = [not torch.equal(a, b) for a, b in pairwise(seen)]
    assert changed == [False] + [True] * 5


def test_a_replica_joins_its_own_projections(device):
    """As torch.nn.DataParallel makes them: with the attributes of the original, other weights."""
    layer = BertSelfAttention(CONFIG).eval().to(device)
    x, bounds = torch.randn(5, 32, device=device), torch.tensor([0, 5], dtype=torch.int32)
    with torch.no_grad():
        out = layer(x, bounds.to(device), 5)
        replica = layer._replicate_for_data_parallel()
        for name, part in layer.named_children():
            other = replica._modules[name] = part._replicate_for_data_parallel()
            other._parameters = {n: p.detach() * 2 for n, p in part.named_parameters()}
        twice = replica(x, bounds.to(device), 5)
        assert not torch.equal(out, twice)
        assert torch.equal(out, layer(x, bounds.to(device), 5))


def test_what_was_joined_does_not_outlive_a_change_of_dtype(device):
    layer = BertSelfAttention(CONFIG).eval().to(device)
    with torch.no_grad():
        layer(torch.randn(5, 32, device=device), torch.tensor([0, 5]).int().to(device), 5)
    assert layer._plan is not None and layer.half()._plan is None


def test_other_projections_keep_their_own_forward(device):
    """As peft's, which wraps nn.Linear."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = BertSelfAttention(CONFIG).to(device)
    x = torch.randn(4, 32, device=device)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32, device=device)
    before = layer(x, cu_seqlens, 4)
    layer.value.__class__ = Doubled
    torch.testing.assert_close(layer(x, cu_seqlens, 4), 2 * before)


def test_one_inference_tensor_is_no_reason_to_keep(device):
    with torch.inference_mode():
        layer = BertSelfAttention(CONFIG).to(device)
        x = torch.randn(4, 32, device=device)
        cu_seqlens = torch.tensor([0, 4], dtype=torch.int32, device=device)
        before = layer(x, cu_seqlens, 4)
        layer.query.weight.mul_(3)
        assert not torch.equal(layer(x, cu_seqlens, 4), before)
