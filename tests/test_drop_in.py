"""accelerate and restore: transformers' models give their own answers, by another way."""

import contextlib
import copy
import inspect
import io
import logging
import threading
from collections import Counter

import pytest
import torch
from accuracy import assert_as_accurate, relative_error
from torch import nn

import fastbert
from fastbert import drop_in

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 40, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "initializer_range": 0.4,
}  # fmt: skip
DISTIL_SIZES = {
    "vocab_size": 90, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64,
    "max_position_embeddings": 40, "dropout": 0.0, "attention_dropout": 0.0,
    "initializer_range": 0.4,
}  # fmt: skip
FAMILIES = {
    "BertModel": ("BertConfig", SIZES),
    "RobertaModel": ("RobertaConfig", {**SIZES, "pad_token_id": 1}),
    "XLMRobertaModel": ("XLMRobertaConfig", {**SIZES, "pad_token_id": 1}),
    "CamembertModel": ("CamembertConfig", {**SIZES, "pad_token_id": 1}),
    "DistilBertModel": ("DistilBertConfig", DISTIL_SIZES),
    "ElectraModel": ("ElectraConfig", {**SIZES, "embedding_size": 16}),
    "BertGenerationEncoder": ("BertGenerationConfig", SIZES),
}
LIMIT = 2e-5  # relative, of float32


def make(name="BertModel", config="BertConfig", **changes):
    torch.manual_seed(1)
    sizes = dict(FAMILIES.values()).get(config, SIZES)
    return getattr(transformers, name)(getattr(transformers, config)(**{**sizes, **changes})).eval()


@pytest.fixture
def model():
    return make()


@pytest.fixture
def batch():
    """One token; padding; a hole; a full row; an id inside that some family has for padding."""
    ids, mask = torch.randint(3, 90, (4, 11)), torch.ones(4, 11, dtype=torch.int64)
    mask[0, 1:] = mask[1, 9:] = mask[2, 3:6] = 0
    ids[3, 5] = ids[0, 1:] = 1
    return {"input_ids": ids, "attention_mask": mask}


def calls_of(model):
    """How often encoders in it took their own code, by reason."""
    states = [drop_in._STATES.get(module) for module in model.modules()]
    return sum((state.calls for state in states if state is not None), Counter())


def takes(model, given):
    """Whether the model's forward has these arguments, which differs between versions."""
    parameters = inspect.signature(model.forward).parameters
    return "kwargs" in parameters or given.keys() <= parameters.keys()


def assert_alike(found, wanted, mask=None):
    """Equal names and types; values within LIMIT at tokens, zeros elsewhere."""
    assert type(found) is type(wanted) and list(found.keys()) == list(wanted.keys())
    for name in list(wanted.keys()):
        for a, b in zip(
            *(x if isinstance(x, tuple) else (x,) for x in (found[name], wanted[name])), strict=True
        ):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            if mask is not None and a.shape[:2] == mask.shape:
                real = mask.bool()
                assert not a[~real].any(), name
                a, b = a[real], b[real]
            assert relative_error(a, b) < LIMIT, name


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("grad", [False, True])
def test_same_answers(name, grad, batch):
    model = make(name, FAMILIES[name][0])
    with torch.set_grad_enabled(grad):
        wanted = [model(**batch), model(**batch, output_hidden_states=True)]
        wanted_tuple = model(**batch, return_dict=False)
        report = fastbert.accelerate(model)
        assert_alike(model(**batch), wanted[0], batch["attention_mask"])
        assert_alike(model(**batch, output_hidden_states=True), wanted[1], batch["attention_mask"])
        found_tuple = model(**batch, return_dict=False)
    assert [type(x) for x in found_tuple] == [type(x) for x in wanted_tuple]
    assert list(report.fast) == [""] and not report.slow and not report.calls


@pytest.mark.parametrize("name", FAMILIES)
def test_same_gradients(name, batch):
    model = make(name, FAMILIES[name][0]).train()
    weights = torch.randn(4, 11, 32) * batch["attention_mask"][..., None]

    def gradients():
        model.zero_grad()
        (model(**batch).last_hidden_state * weights).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted = gradients()
    report = fastbert.accelerate(model)
    found = gradients()
    assert found.keys() == wanted.keys() and not report.calls
    scale = max(g.abs().max() for g in wanted.values())
    for key in wanted:  # those of keys' biases are zero but for rounding
        assert (found[key] - wanted[key]).abs().max() < 1e-4 * scale, key


@pytest.mark.parametrize(
    "name, changes", [("BertModel", {}), ("RobertaModel", {}), ("DistilBertModel", {})]
)
def test_other_inputs(name, changes, batch):
    """No mask; vectors in place of ids; positions; types; a mask of floats."""
    model = make(name, FAMILIES[name][0])
    ids, mask = batch.values()
    embeds = model.get_input_embeddings()(ids).detach()
    positions = torch.randint(2, 30, (4, 11))
    cases = [
        {"input_ids": ids},
        {"inputs_embeds": embeds, "attention_mask": mask},
        {"inputs_embeds": embeds},
        {"input_ids": ids, "attention_mask": mask.float(), "position_ids": positions},
        {"input_ids": ids, "attention_mask": mask.bool(), "position_ids": positions[:1]},
    ]
    if name == "BertModel":
        types = torch.randint(0, 2, (4, 11))
        cases.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": types})
    cases = [case for case in cases if takes(model, case)]
    with torch.no_grad():
        wanted = [model(**case) for case in cases]
        report = fastbert.accelerate(model)
        for case, own in zip(cases, wanted, strict=True):
            given = case.get("attention_mask")
            assert_alike(model(**case), own, given)
    assert not report.calls


def left_padded(batch):
    return {**batch, "attention_mask": batch["attention_mask"].flip(1)}


def masked_row(batch):
    mask = batch["attention_mask"].clone()
    mask[1] = 0
    return {**batch, "attention_mask": mask}


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda b: {**b, "output_attentions": True}, "attention weights are asked for"),
        (
            lambda b: {**b, "attention_mask": torch.ones(4, 1, 11, 11, dtype=torch.bool)},
            r"attention_mask is (4, 1, 11, 11)",
        ),
        (left_padded, "a row begins with padding, which heads read"),
        (masked_row, "a row begins with padding, which heads read"),
        (lambda b: {**b, "is_causal": True}, "is_causal is given"),
        (lambda b: {**b, "token_type_ids": torch.zeros(1, 11).long()}, "token_type_ids is (1, 11)"),
    ],
)
@torch.no_grad()
def test_own_code_where_it_must(model, batch, change, reason, caplog):
    model.set_attn_implementation("eager")
    try:
        wanted = model(**change(batch))
    except (TypeError, ValueError) as error:
        pytest.skip(f"this transformers refuses it: {error}")
    report = fastbert.accelerate(model)
    with caplog.at_level(logging.WARNING, "fastbert"):
        for _ in range(2):
            found = model(**change(batch))
    for name in list(wanted.keys()):
        pairs = zip(found[name], wanted[name], strict=True)
        assert all(torch.equal(a, b) and not a.isnan().any() for a, b in pairs)
    ((said, n),) = report.calls.items()
    assert reason in said and n == 2 and reason in str(report)
    (record,) = (record for record in caplog.records if record.name == "fastbert")
    assert reason in record.getMessage()


def test_refuses_what_the_model_refuses(model, batch):
    embeds, outcomes = torch.zeros(4, 11, 32), []
    fastbert.accelerate(model)
    with pytest.raises(ValueError, match=r"input_ids (or|and) inputs_embeds"):
        model(**batch, inputs_embeds=embeds)
    with pytest.raises(ValueError, match=r"input_ids (or|and) inputs_embeds"):
        model()
    with pytest.raises(TypeError, match="multiple values"):
        model(batch["input_ids"], input_ids=batch["input_ids"])
    for _ in range(2):  # transformers 5.23 takes no batch of no rows, others do
        try:
            found = model(**{name: value[:0] for name, value in batch.items()})
        except RuntimeError as error:
            found = str(error)
        fastbert.restore(model) if drop_in._is_fast(model) else None
        outcomes.append(found if isinstance(found, str) else found.last_hidden_state.shape)
    assert outcomes[0] == outcomes[1]
    fastbert.accelerate(model)
    with pytest.raises(IndexError):
        model(batch["input_ids"] + 90)


@torch.no_grad()
def test_hooks_see_what_they_would_see(model, batch):
    seen = []
    layer = model.encoder.layer[1]
    hook = layer.output.dense.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    report = fastbert.accelerate(model)
    model(**batch)
    assert seen == [(4, 11, 32)]
    assert report.calls == {"there are hooks on encoder.layer.1.output.dense": 1}
    hook.remove()
    model(**batch)
    assert report.calls.total() == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.modules.module, "_global_forward_hooks", {1: lambda *_: None})
        model(**batch)
    assert report.calls["there are hooks on all modules"] == 1


def test_hidden_states_have_gradients(model, batch):
    """They are on the way to the output, as people who explain models expect."""
    direction = torch.randn(
        model.config.hidden_size
    )  # squares of a layer norm add up to a constant

    def gradients():
        out = model(**batch, output_hidden_states=True)
        for state in out.hidden_states:
            state.retain_grad()
        (out.last_hidden_state * batch["attention_mask"][..., None] * direction).sum().backward()
        return [state.grad for state in out.hidden_states]

    wanted = gradients()
    report = fastbert.accelerate(model)
    found = gradients()
    real = batch["attention_mask"].bool()
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a[real], b[real]) < 1e-4
    assert not report.calls


def test_restore_leaves_nothing(model, batch):
    def state():
        return {
            n: (type(m), list(vars(m)), list(m._forward_hooks)) for n, m in model.named_modules()
        }

    before, weights = state(), model.state_dict()
    fastbert.accelerate(model)
    assert type(model) is not transformers.BertModel and isinstance(model, transformers.BertModel)
    assert type(model).__name__ == "BertModel" and repr(type(model)) == repr(transformers.BertModel)
    assert model.state_dict().keys() == weights.keys()
    with torch.no_grad():
        model(**batch)
    model.train()(**batch).last_hidden_state.sum().backward()
    fastbert.restore(model.eval())
    assert state() == before
    assert not drop_in._STATES.get(model)
    assert "_fastbert_of" not in vars(transformers.BertModel)
    assert transformers.BertModel.forward is not type(model).__mro__[1].forward


@torch.no_grad()
def test_copies_are_fast_too(model, batch, tmp_path):
    fastbert.accelerate(model)
    wanted = model(**batch).last_hidden_state
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    for made in copies:
        assert drop_in._is_fast(made)
        with torch.no_grad():
            for p in made.parameters():
                p.mul_(1.0)
        assert torch.equal(made(**batch).last_hidden_state, wanted)
        assert not calls_of(made)
        fastbert.restore(made)
        assert type(made) is transformers.BertModel
    assert drop_in._is_fast(model)
    model.save_pretrained(tmp_path)
    again = transformers.BertModel.from_pretrained(tmp_path)
    assert again.config.architectures == ["BertModel"]
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )


def replicated(module):
    """As torch.nn.parallel.replicate makes them: parameters are plain tensors of the replica."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replicated(child)
    for name, value in module._parameters.items():
        setattr(replica, name, value * 1.0)
    return replica


def test_replicas(model, batch):
    wanted = model(**batch).last_hidden_state
    fastbert.accelerate(model)
    replica = replicated(model)
    assert drop_in._is_fast(replica)
    found = replica(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    assert relative_error(found[real], wanted[real]) < LIMIT and not calls_of(replica)
    found[real].pow(2).sum().backward()
    assert model.encoder.layer[2].output.dense.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_a_forward_that_was_replaced(model, batch):
    """As Hugging Face's accelerate does it to bring weights in when they are needed."""
    report = fastbert.accelerate(model)
    dense = model.encoder.layer[1].output.dense
    own = dense.forward
    dense.forward = lambda x: 2 * own(x)
    found = model(**batch).last_hidden_state
    assert report.calls == {"the forward of encoder.layer.1.output.dense was replaced": 1}
    fastbert.restore(model)
    assert torch.equal(model(**batch).last_hidden_state, found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(model, batch, dtype):
    exact = copy.deepcopy(model).double()(**batch).last_hidden_state
    model.to(dtype)
    own = model(**batch).last_hidden_state
    report = fastbert.accelerate(model)
    found = model(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    assert_as_accurate(found[real], own[real], exact[real])
    assert not report.calls


@torch.no_grad()
def test_follows_its_weights(model, batch):
    report = fastbert.accelerate(model)
    for change in (
        lambda: model.encoder.layer[0].output.dense.weight.mul_(1.1),
        lambda: (
            model.encoder.layer[1].intermediate.dense.weight.data.mul_(1.1),
            model.train(),
            model.eval(),
        ),
        lambda: model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()}),
        lambda: setattr(model.encoder.layer[2].output, "dense", nn.Linear(64, 32)),
        lambda: model.encoder.layer.__delitem__(1),
        lambda: model.resize_token_embeddings(100),
        lambda: model.double(),
    ):
        model(**batch)
        change()
        found = model(**batch)
        fastbert.restore(model)
        assert_alike(found, model(**batch), batch["attention_mask"])
        fastbert.accelerate(model)
    assert not report.calls


def sequences_alone(model, ids, lengths):
    return torch.cat([model(x[None]).last_hidden_state[0] for x in ids.split(lengths)])


@torch.no_grad()
@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "DistilBertModel"])
def test_packed_arguments_of_transformers(name):
    """Which its own attention ignores on a CPU, so that sequences see each other."""
    model, lengths = make(name, FAMILIES[name][0]), [5, 1, 9]
    ids, bounds = torch.randint(3, 90, (15,)), torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    first = 2 if name == "RobertaModel" else 0
    positions = torch.cat([torch.arange(first, first + n) for n in lengths])
    given = {
        "input_ids": ids[None], "position_ids": positions[None], "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds, "max_length_q": 9, "max_length_k": 9,
    }  # fmt: skip
    wanted = sequences_alone(model, ids, lengths)
    poolers = [model(x[None]).get("pooler_output") for x in ids.split(lengths)]
    if takes(model, given):
        assert relative_error(model(**given).last_hidden_state[0], wanted) > 0.01
    report = fastbert.accelerate(model)
    found = model(**given)
    assert relative_error(found.last_hidden_state[0], wanted) < LIMIT
    if poolers[0] is not None:
        assert relative_error(found.pooler_output, torch.cat(poolers)) < LIMIT
    assert not report.calls
    with contextlib.suppress(TypeError):  # where the model itself takes no such argument
        model(**{**given, "cu_seq_lens_q": bounds + 1, "cu_seq_lens_k": bounds + 1})
    assert report.calls == {"cu_seq_lens_q does not rise from 0 to 15": 1}


@pytest.mark.parametrize(
    "name, config",
    [
        ("BertForSequenceClassification", "BertConfig"),
        ("BertForTokenClassification", "BertConfig"),
        ("BertForMaskedLM", "BertConfig"),
        ("RobertaForSequenceClassification", "RobertaConfig"),
        ("DistilBertForSequenceClassification", "DistilBertConfig"),
        ("ElectraForPreTraining", "ElectraConfig"),
    ],
)
def test_heads(name, config, batch):
    model = make(name, config)
    labels = torch.randint(0, 2, (4, 11)).where(batch["attention_mask"].bool(), torch.tensor(-100))
    if "Sequence" in name:
        labels = labels[:, 0]
    own = model(**batch, labels=labels)
    report = fastbert.accelerate(model)
    found = model(**batch, labels=labels)
    assert relative_error(found.loss, own.loss) < LIMIT
    real = (slice(None),) if "Sequence" in name else batch["attention_mask"].bool()
    assert relative_error(found.logits[real], own.logits[real]) < LIMIT
    assert len(report.fast) == 1 and not report.calls


def test_gradient_checkpointing(model, batch):
    model.train()

    def gradients():
        model.zero_grad()
        model(**batch).pooler_output.sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    wanted = gradients()
    report = fastbert.accelerate(model)
    n_runs = Counter()
    own = fastbert.layers.BertLayer.forward

    def counting(self, *args):
        n_runs["layer"] += 1
        return own(self, *args)

    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fastbert.layers.BertLayer, "forward", counting)
            n_runs.clear()
            found = gradients()
        assert n_runs["layer"] == 6  # three, and once more in the backward
        scale = max(g.abs().max() for g in wanted)
        assert all((a - b).abs().max() < 1e-4 * scale for a, b in zip(found, wanted, strict=True))
        assert not report.calls
    fastbert.restore(model)
    assert type(model.encoder.layer[0]).__dict__.get("_fastbert_of") is None


def test_dropout_and_autocast(batch):
    model = make(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model(**batch).last_hidden_state
        exact = copy.deepcopy(model).double()
    with torch.no_grad():
        exact = exact(**batch).last_hidden_state
    report = fastbert.accelerate(model)
    real = batch["attention_mask"].bool()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(**batch).last_hidden_state
    assert relative_error(found[real], exact[real]) < 2 * relative_error(wanted[real], exact[real])
    model.train()
    a, b = (model(**batch).last_hidden_state[real] for _ in range(2))
    assert not torch.equal(a, b) and not a.isnan().any()
    assert not report.calls


@torch.no_grad()
def test_eval_keeps_what_is_prepacked(model, batch):
    """Which sentence-transformers calls before each text; weights written through .data show."""
    fastbert.accelerate(model)
    layers = drop_in._STATES[model].borrowed.layers
    for _ in range(2):
        model.eval()(**batch)
    plans = [layer._plan for layer in layers]
    assert all(plan is not None for plan in plans)
    model.eval()(**batch)
    assert [layer._plan for layer in layers] == plans
    for p in model.encoder.layer[2].output.dense.parameters():
        p.data.mul_(1.01)
    found = model.eval()(**batch)
    fastbert.restore(model)
    assert_alike(found, model(**batch), batch["attention_mask"])


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "DistilBertModel"])
def test_with_kernels(name, batch, device):
    """As on a GPU, forward and backward; heads of 16, which attention's kernels take."""
    changes = {"n_heads": 2} if name == "DistilBertModel" else {"num_attention_heads": 2}
    model = make(name, FAMILIES[name][0], **changes).to(device)
    batch = {key: tensor.to(device) for key, tensor in batch.items()}
    real = batch["attention_mask"].bool()

    def outcome():
        model.zero_grad()
        out = model(**batch).last_hidden_state[real]
        out[:, :7].sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return out.detach(), gradients

    wanted, wanted_gradients = outcome()
    report = fastbert.accelerate(model)
    found, gradients = outcome()
    assert relative_error(found, wanted) < LIMIT and not report.calls
    assert gradients.keys() == wanted_gradients.keys()
    scale = max(g.abs().max() for g in wanted_gradients.values())
    for key, gradient in gradients.items():
        assert (gradient - wanted_gradients[key]).abs().max() < 1e-4 * scale, key


@torch.no_grad()
def test_many_threads(model, batch):
    fastbert.accelerate(model)
    wanted = model(**batch).last_hidden_state
    wrong = []

    def work():
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(model(**batch).last_hidden_state, wanted):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not calls_of(model)


@torch.no_grad()
def test_compiling_takes_the_models_own_code(model, batch):
    wanted = model(**batch).last_hidden_state
    fastbert.accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(**batch).last_hidden_state
    assert relative_error(found, wanted) < LIMIT


def test_functional_calls(model, batch):
    """Other weights in the same modules; transformed inputs."""
    others = {name: p * 1.1 for name, p in model.named_parameters()}
    real = batch["attention_mask"].bool()

    def vectors(weights):
        return torch.func.functional_call(model, weights, (), batch).last_hidden_state[real]

    def of_embeds(embeds):
        return model(inputs_embeds=embeds).pooler_output.sum()

    embeds = torch.randn(2, 5, 32)
    wanted, slope = vectors(others), torch.func.grad(of_embeds)(embeds)
    report = fastbert.accelerate(model)
    assert relative_error(vectors(others), wanted) < LIMIT and not report.calls
    with torch.no_grad():
        assert relative_error(vectors(others), wanted) < LIMIT
    assert relative_error(torch.func.grad(of_embeds)(embeds), slope) < LIMIT
    assert list(report.calls) == ["the call is one of torch.func's"]


def test_other_modules_in_a_layer(model, batch):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    scaled = Scaled(32, 32)
    model.encoder.layer[1].attention.self.query = scaled
    wanted = model(**batch)
    report = fastbert.accelerate(model)
    assert report.slow == {"encoder.layer.1": "query is Scaled, not a plain Linear"}
    assert torch.equal(model(**batch).last_hidden_state, wanted.last_hidden_state)
    assert list(report.calls) == ["encoder.layer.1: query is Scaled, not a plain Linear"]
    nn.utils.parametrizations.weight_norm(model.encoder.layer[0].output.dense)
    model(**batch)
    assert "encoder.layer.0: the output's dense layer is" in list(report.calls)[1]


@pytest.mark.parametrize("changes", [{"hidden_act": "silu"}, {"is_decoder": True}])
@torch.no_grad()
def test_what_is_not_supported(batch, changes):
    model = make(**changes)
    if "hidden_act" in changes:
        wanted = model(**batch).last_hidden_state
        report = fastbert.accelerate(model)
        assert "activation SiLU" in report.slow["encoder.layer.0"]
        assert torch.equal(model(**batch).last_hidden_state, wanted)
    else:
        with pytest.raises(
            ValueError, match=r"wants a model with one of.*BertModel.*it is a decoder"
        ):
            fastbert.accelerate(model)
        assert type(model) is transformers.BertModel


def test_refuses_what_has_no_encoder():
    with pytest.raises(ValueError, match=r"RobertaModel.*got Linear"):
        fastbert.accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="wants a model or a pipeline, got str"):
        fastbert.accelerate("bert-base-uncased")

    class Mine(transformers.BertModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(ValueError, match="its forward is not that of transformers' BertModel"):
        fastbert.accelerate(Mine(transformers.BertConfig(**SIZES)))


def test_an_error_midway_changes_nothing(monkeypatch):
    model = nn.ModuleList([make(), make("RobertaModel", "RobertaConfig")])
    own = drop_in.Borrowed.__init__

    def failing(self, encoder, family):
        if family.from_padding:
            raise MemoryError
        own(self, encoder, family)

    monkeypatch.setattr(drop_in.Borrowed, "__init__", failing)
    with pytest.raises(MemoryError):
        fastbert.accelerate(model)
    assert not any(map(drop_in._is_fast, model.modules()))
    monkeypatch.undo()
    assert list(fastbert.accelerate(model).fast) == ["0", "1"]


def test_lora(batch):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = make("BertForSequenceClassification")
    config = peft.LoraConfig(target_modules=["query", "value"], r=4, lora_dropout=0.0)
    model = peft.get_peft_model(base, config).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.5)

    def outcome():
        model.zero_grad()
        logits = model(**batch).logits
        logits.pow(2).sum().backward()
        return logits.detach(), {
            n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
        }

    wanted, wanted_gradients = outcome()
    report = fastbert.accelerate(model)
    found, gradients = outcome()
    assert relative_error(found, wanted) < LIMIT and not report.calls
    scale = max(g.abs().max() for g in wanted_gradients.values())
    assert any("lora_A" in name for name in gradients)
    for name, gradient in gradients.items():
        assert (gradient - wanted_gradients[name]).abs().max() < 1e-4 * scale, name
    with torch.no_grad():
        with model.disable_adapter():
            assert relative_error(model(**batch).logits, wanted) > 0.01
        assert relative_error(model(**batch).logits, wanted) < LIMIT
        model.merge_adapter()
        assert relative_error(model(**batch).logits, wanted) < LIMIT
        encoder = base.bert
        assert type(drop_in._STATES[encoder].borrowed.layers[0].attention.self.query) is nn.Linear
        model.unmerge_adapter()
        assert relative_error(model(**batch).logits, wanted) < LIMIT
        plain = model.merge_and_unload()
        assert relative_error(plain(**batch).logits, wanted) < LIMIT
    assert not report.calls
