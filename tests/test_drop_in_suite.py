"""What transformers' own tests found in accelerated models, without needing those tests."""

import pytest
import torch
from accuracy import relative_error

import fastbert
from fastbert import drop_in

transformers = pytest.importorskip("transformers")

LIMIT = 2e-5  # relative, of float32


@pytest.fixture
def model():
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=16, initializer_range=0.4,
    )  # fmt: skip
    return transformers.BertModel(config).eval()


@pytest.fixture
def batch():
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, 4:] = 0
    return {"input_ids": torch.randint(1, 50, (2, 7)), "attention_mask": mask}


@pytest.mark.parametrize("asked", [[0, -1], (2,), 1, -2, [], 0, [9, -9]])
@pytest.mark.parametrize("grad", [False, True])
def test_hidden_states_by_number(model, batch, asked, grad):
    """As transformers 5 knows them: None where a state is not asked for. Earlier: all of them."""
    with torch.set_grad_enabled(grad):
        wanted = model(**batch, output_hidden_states=asked)
        report = fastbert.accelerate(model)
        found = model(**batch, output_hidden_states=asked)
    assert list(found.keys()) == list(wanted.keys())
    assert not (drop_in._can_choose_states() and report.calls)
    real = batch["attention_mask"].bool()
    for a, b in zip(found.get("hidden_states", ()), wanted.get("hidden_states", ()), strict=True):
        assert (a is None) == (b is None)
        assert a is None or relative_error(a[real], b[real]) < LIMIT


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions", "return_dict"])
@pytest.mark.parametrize("set_to", [True, False])
def test_none_asks_for_what_it_does_in_the_model(model, batch, name, set_to):
    """Where it is a parameter, for what the configuration says; in **kwargs, for nothing."""
    model.set_attn_implementation("eager")  # which has attention weights
    setattr(model.config, name, set_to)
    with torch.no_grad():
        wanted = model(**batch, **{name: None})
        fastbert.accelerate(model)
        found = model(**batch, **{name: None})
    assert type(found) is type(wanted) and len(found) == len(wanted)


def test_configured_for_torchscript(model, batch):
    """Tuples in the versions that know torchscript."""
    model.config.torchscript = True
    with torch.no_grad():
        wanted = model(**batch)
        fastbert.accelerate(model)
        assert type(model(**batch)) is type(wanted)
