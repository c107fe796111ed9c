"""What transformers' own tests found in accelerated models, without needing those tests."""

import pytest
import torch
from accuracy import relative_error

import fastbert
from fastbert import drop_in

transformers = pytest.importorskip("transformers")

LIMIT = 2e-5  # relative, of float32


SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 16, "initializer_range": 0.4,
}  # fmt: skip
DISTIL_SIZES = {
    "vocab_size": 50, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64,
    "max_position_embeddings": 16, "initializer_range": 0.4,
}  # fmt: skip


def make(name, **options):
    torch.manual_seed(1)
    kind = getattr(transformers, name)
    sizes = DISTIL_SIZES if "Distil" in name else SIZES
    config = kind.config_class(**sizes, attn_implementation="eager")  # which has attention weights
    return kind(config, **options).eval()


@pytest.fixture
def model():
    return make("BertModel")


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


@pytest.mark.parametrize(
    "name, options",
    [
        ("BertModel", {"add_pooling_layer": False}),  # in version 4 None is its second
        ("BertForQuestionAnswering", {}),  # which hands on what is after the second
        ("RobertaModel", {"add_pooling_layer": False}),
        ("ElectraModel", {}),  # which never has a pooler
        ("DistilBertForTokenClassification", {}),
    ],
)
def test_tuples_without_a_pooler(batch, name, options):
    model = make(name, **options)
    asked = {"return_dict": False, "output_hidden_states": True}
    with torch.no_grad():
        wanted = model(**batch, **asked)
        report = fastbert.accelerate(model)
        found = model(**batch, **asked)
    assert not report.calls and list(map(type, found)) == list(map(type, wanted))
    real = batch["attention_mask"].bool()
    assert relative_error(found[0][real], wanted[0][real]) < LIMIT
    states = zip(found[-1], wanted[-1], strict=True)
    assert all(relative_error(a[real], b[real]) < LIMIT for a, b in states)


@pytest.mark.parametrize("name", ["BertModel", "DistilBertModel"])
@pytest.mark.parametrize("argument", ["position_ids", "token_type_ids"])
def test_takes_the_arguments_that_the_model_takes(batch, name, argument):
    """In version 4 encoders have no **kwargs, and DistilBERT's no positions."""
    model, outcomes = make(name), []
    given = {**batch, argument: torch.zeros(2, 7, dtype=torch.int64)}
    for _ in range(2):
        with torch.no_grad():
            try:
                outcomes.append(model(**given).last_hidden_state[batch["attention_mask"].bool()])
            except TypeError:
                outcomes.append(None)
        if not drop_in._is_fast(model):
            fastbert.accelerate(model)
    wanted, found = outcomes
    assert (found is None) == (wanted is None)
    assert found is None or relative_error(found, wanted) < LIMIT


def test_warns_where_the_model_does(model, batch, monkeypatch):
    """Of padding without a mask: version 4."""
    seen = []
    monkeypatch.setattr(
        transformers.PreTrainedModel,
        "warn_if_padding_and_no_attention_mask",
        lambda self, ids, mask: seen.append((ids.shape, mask)),
    )
    counts = []
    for _ in range(2):
        with torch.no_grad():
            model(batch["input_ids"])
        counts.append(len(seen))
        seen.clear()
        if not drop_in._is_fast(model):
            report = fastbert.accelerate(model)
    assert counts[0] == counts[1] and not report.calls
