"""The prepacked plan is used where it may be, and never with weights or modules of yesterday."""

import subprocess
import sys

import pytest
import torch

from fastbert import BertConfig, BertModel
from fastbert.kernels.linear import can_prepack

pytestmark = pytest.mark.skipif(not can_prepack(), reason="torch was built without oneDNN")


@pytest.fixture
def model():
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config).eval()


IDS = torch.arange(1, 21).view(2, 10)


def planned(model):
    return model.encoder.layer[0]._plan is not None


def plain(model):
    """The answer of the modules one by one."""
    with torch.enable_grad():
        return model(IDS)[0].detach()


def check(model, used=True):
    with torch.no_grad():
        out = model(IDS)[0]
    assert planned(model) == used
    torch.testing.assert_close(out, plain(model))
    return out


def test_used_without_gradients_only(model):
    model(IDS)
    assert not planned(model)
    check(model)
    with torch.inference_mode():
        model(IDS)
    assert planned(model)
    model.train()
    assert not planned(model)


def change_in_place(model):
    model.encoder.layer[0].attention.self.key.weight.mul_(1.5)


def replace_parameter(model):
    dense = model.encoder.layer[0].intermediate.dense
    dense.weight = torch.nn.Parameter(dense.weight * 2)


def replace_data(model):
    dense = model.encoder.layer[0].output.dense
    dense.weight.data = dense.weight.data * 2


def load(model):
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})


def change_norm(model):
    model.encoder.layer[0].output.LayerNorm.bias.add_(1.0)


def to_half_and_back(model):
    model.bfloat16().float()


@pytest.mark.parametrize(
    "change",
    [change_in_place, replace_parameter, replace_data, load, change_norm, to_half_and_back],
)
def test_follows_every_change_of_weights(model, change):
    before = check(model)
    with torch.no_grad():
        change(model)
    after = check(model)
    assert not torch.equal(before, after)


# torch's fused optimizers write without counting it.
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_step_is_seen(model, kind, fused):
    before = check(model)
    optimizer = kind(model.parameters(), lr=0.1, fused=fused)
    model(IDS)[0].pow(2).sum().backward()
    optimizer.step()
    assert not torch.equal(before, check(model))


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_another_kind_of_module_runs_itself(model):
    before = check(model)
    attention = model.encoder.layer[0].attention.self
    other = Doubled(32, 32)
    other.load_state_dict(attention.value.state_dict())
    attention.value = other
    assert not torch.equal(before, check(model, used=False))


def test_hooks_run(model):
    before = check(model)
    dense = model.encoder.layer[0].intermediate.dense
    handle = dense.register_forward_hook(lambda module, args, out: out * 2)
    assert not torch.equal(before, check(model, used=False))
    handle.remove()
    assert torch.equal(before, check(model))


def test_a_hook_on_the_layer_itself_runs(model):
    seen = []
    model.encoder.layer[1].register_forward_hook(lambda module, args, out: seen.append(out))
    check(model)
    assert len(seen) == 2  # once planned, once plain


def test_a_hook_on_all_modules_runs(model):
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append(m))
    try:
        check(model, used=False)
    finally:
        handle.remove()
    assert model.encoder.layer[0].attention.self.query in seen


def test_a_dropout_that_trains_alone_drops(model):
    layer = model.encoder.layer[0]
    for dropout in (layer.output.dropout, layer.attention.self.dropout):
        check(model)
        dropout.p = 0.5
        dropout.train()  # as for Monte Carlo estimates, everything else in evaluation
        with torch.no_grad():
            assert not torch.equal(model(IDS)[0], model(IDS)[0])
        dropout.eval()


def test_hooks_of_the_embeddings_run(model):
    before, parts = check(model), model.embeddings
    for part in (parts.word_embeddings, parts.position_embeddings, parts.token_type_embeddings,
                 parts.LayerNorm, parts.dropout):  # fmt: skip
        handle = part.register_forward_hook(lambda module, args, out: out + torch.arange(32.0))
        assert not torch.equal(before, check(model)), part
        handle.remove()
    assert torch.equal(before, check(model))


class Shifted(torch.nn.Embedding):
    def forward(self, ids):
        return super().forward(ids + 1)


def test_another_kind_of_embedding_runs_itself(model):
    before = check(model)
    other = Shifted(50, 32)
    other.load_state_dict(model.get_input_embeddings().state_dict())
    model.set_input_embeddings(other)
    assert not torch.equal(before, check(model))


def test_a_wrapped_forward_runs(model):
    check(model)
    dense = model.encoder.layer[0].output.dense
    forward = dense.forward
    dense.forward = lambda x: forward(x) + 1
    check(model, used=False)


def test_autocast_is_left_to_the_modules(model):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(IDS)
    assert not planned(model)


def test_weights_made_in_inference_mode_have_no_versions(model):
    with torch.inference_mode():
        made = BertModel(model.config).eval()
        made(IDS)
        assert not planned(made)


# One piece and several; sizes at, below and above a piece and a step of the rounding.
@pytest.mark.parametrize(
    "lengths", [[1], [512, 511], [512, 512], [512, 512, 1], [300] * 7, [7] * 9]
)
def test_pieces_change_nothing(lengths):
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    model = BertModel(config).eval()
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(0, 50, mask.shape)
    with torch.no_grad():
        out = model(ids, mask)[0]
    with torch.enable_grad():
        torch.testing.assert_close(out, model(ids, mask)[0].detach())


MEMORY = """
import resource, sys, torch
from fastbert import BertConfig, BertModel
model = BertModel(BertConfig(hidden_size=384, intermediate_size=384, num_hidden_layers=1)).eval()
with torch.inference_mode():
    for i in range(300):
        model(torch.ones(1, 150 + i if sys.argv[1] == "different" else 450).long())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_memory_does_not_grow_with_every_number_of_tokens():
    def peak_mib(lengths):
        command = [sys.executable, "-P", "-c", MEMORY, lengths]
        return float(subprocess.run(command, capture_output=True, check=True).stdout)

    assert peak_mib("different") < peak_mib("equal") + 150  # unbounded: 600 more


def test_the_plan_is_not_in_the_state(model):
    keys = set(model.state_dict())
    check(model)
    assert set(model.state_dict()) == keys
