"""Every head against transformers': names, files, logits, losses, gradients; and on its own."""

import copy
import pickle
import warnings

import pytest
import torch
from accuracy import relative_error
from safetensors.torch import load_file, save_file

import fastbert
from fastbert import BertConfig, PackedBatch, pack, unpack

transformers = pytest.importorskip("transformers", reason="compares with transformers")

SMALL = dict(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    max_position_embeddings=24,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
LENGTHS = (7, 12, 1, 4)
N = len(LENGTHS)


def token_labels(n_classes, mask):
    """At about half of the real tokens."""
    labels = torch.randint(0, n_classes, mask.shape)
    return labels.masked_fill((torch.rand(mask.shape) < 0.5) | (mask == 0), -100)


# Each: class, changes of the configuration, labels of a batch with this mask.
CASES = {
    "pretraining": (
        "BertForPreTraining",
        {},
        lambda mask: {
            "labels": token_labels(50, mask),
            "next_sentence_label": torch.tensor([0, 1, 1, 0]),
        },
    ),
    "mlm": ("BertForMaskedLM", {}, lambda mask: {"labels": token_labels(50, mask)}),
    "mlm untied": (
        "BertForMaskedLM",
        {"tie_word_embeddings": False, "hidden_act": "relu"},
        lambda mask: {"labels": token_labels(50, mask)},
    ),
    "nsp": (
        "BertForNextSentencePrediction",
        {},
        lambda mask: {"labels": torch.tensor([0, 1, 1, 0])},
    ),
    "one label": (
        "BertForSequenceClassification",
        {"num_labels": 3, "classifier_dropout": 0.0},
        lambda mask: {"labels": torch.tensor([2, 0, 1, 1])},
    ),
    "labels": (
        "BertForSequenceClassification",
        {"num_labels": 3},
        lambda mask: {"labels": torch.randint(0, 2, (N, 3)).double()},
    ),
    "number": (
        "BertForSequenceClassification",
        {"num_labels": 1},
        lambda mask: {"labels": torch.randn(N).double()},
    ),
    "numbers": (
        "BertForSequenceClassification",
        {"num_labels": 2, "problem_type": "regression"},
        lambda mask: {"labels": torch.randn(N, 2).double()},
    ),
    "tokens": (
        "BertForTokenClassification",
        {"num_labels": 5},
        lambda mask: {"labels": token_labels(5, mask)},
    ),
    "choice": ("BertForMultipleChoice", {}, lambda mask: {"labels": torch.tensor([1, 0])}),
    "answer": (
        "BertForQuestionAnswering",
        {},
        lambda mask: {
            "start_positions": torch.tensor([3, 2, 0, 90]),
            "end_positions": torch.tensor([4, 11, 0, -1]),
        },
    ),
}
of_tokens = ("mlm", "tokens", "answer")
every_case = pytest.mark.parametrize("case", CASES)


def pair(case, tmp_path, **changes):
    """Ours, read from what transformers has written, and transformers', in float64."""
    kind, of_case, _ = CASES[case]
    if case == "mlm untied" and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 has one bias where there are two without tied embeddings")
    theirs = getattr(transformers, kind)(transformers.BertConfig(**SMALL, **of_case, **changes))
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = getattr(fastbert, kind).from_pretrained(tmp_path / "theirs", dtype="float64")
    return ours, theirs.double().eval()


def mask_of(lengths):
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def batch(lengths=LENGTHS, n_choices=None):
    mask = mask_of(lengths)
    given = {
        "input_ids": torch.randint(0, 50, mask.shape),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, mask.shape),
    }
    if n_choices:
        given = {name: x.unflatten(0, (-1, n_choices)) for name, x in given.items()}
    return given


def inputs_of(case, lengths=LENGTHS):
    given = batch(lengths, 2 if case == "choice" else None)
    return given, CASES[case][2](given["attention_mask"])


def packed_of(given, labels):
    """The same batch and labels without padding."""
    flat = {name: x.flatten(0, -2) for name, x in given.items()}
    mask = flat["attention_mask"]
    packed = pack(flat["input_ids"], mask, flat["token_type_ids"])
    return packed, {n: x[mask.bool()] if x.shape == mask.shape else x for n, x in labels.items()}


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@every_case
def test_logits_losses_and_gradients_equal_transformers(case, tmp_path):
    ours, theirs = pair(case, tmp_path)
    # transformers' loss of an answer takes padding for a candidate: compared without any
    given, labels = inputs_of(case, (12,) * N if case == "answer" else LENGTHS)
    out, wanted = ours(**given, **labels), theirs(**given, **labels)
    assert out.keys() == list(wanted.keys())
    real = given["attention_mask"].bool()
    for name in out:
        found, value = out[name], wanted[name]
        assert found.shape == value.shape
        if found.shape[:2] == real.shape and case != "choice":
            assert found[~real].abs().sum() == 0
            found, value = found[real], value[real]
        assert relative_error(found, value) < 1e-12, name
    out.loss.backward()
    wanted.loss.backward()
    found, value = gradients(ours), gradients(theirs)
    assert found.keys() == value.keys()
    for name in value:
        torch.testing.assert_close(found[name], value[name], rtol=1e-9, atol=1e-12, msg=name)


@every_case
def test_packed_equals_padded(case, tmp_path):
    ours, _ = pair(case, tmp_path)
    given, labels = inputs_of(case)
    packed, packed_labels = packed_of(given, labels)
    out, flat = ours(**given, **labels), ours(packed, **packed_labels)
    assert out.keys() == flat.keys()
    assert relative_error(flat.loss, out.loss) < 1e-12
    for name in out:
        found = flat[name]
        if found.shape[:1] == packed.input_ids.shape:
            found = unpack(found, packed)
        assert found.shape == out[name].shape
        assert relative_error(found, out[name]) < 1e-12


@every_case
@pytest.mark.filterwarnings("error::UserWarning")
def test_files_are_read_both_ways(case, tmp_path):
    ours, theirs = pair(case, tmp_path)
    ours.float().save_pretrained(tmp_path / "ours")
    written, wanted = (
        load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs")
    )
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    state = back.state_dict()
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    assert back.config.problem_type == ours.config.problem_type
    assert back.config.id2label == ours.config.id2label
    assert {n for n, _ in theirs.named_modules()} - {n for n, _ in ours.named_modules()} <= {
        f"{owner}.{name}"
        for owner in ("bert.encoder.layer.0.intermediate", "bert.encoder.layer.1.intermediate",
                      "cls.predictions.transform")
        for name in ("intermediate_act_fn", "transform_act_fn")
    }  # fmt: skip


@pytest.mark.parametrize("case", [case for case in CASES if case != "answer"])
def test_accumulated_gradients_are_those_of_the_whole_batch(case, tmp_path):
    ours, _ = pair(case, tmp_path)
    given, labels = inputs_of(case)
    ours(**given, **labels).loss.backward()
    wanted = gradients(ours)
    ours.zero_grad()
    counts = {"num_items_in_batch": (labels.get("labels", torch.zeros(N)) != -100).sum()}
    if case == "labels" or case == "numbers":
        counts["num_items_in_batch"] = labels["labels"].numel()
    if case == "pretraining":
        counts["num_sequences_in_batch"] = N
    loss = 0.0
    for i in range(len(given["input_ids"])):
        part = {name: x[i : i + 1] for name, x in {**given, **labels}.items()}
        part_loss = ours(**part, **counts).loss
        part_loss.backward()
        loss += part_loss.item()
    assert loss == pytest.approx(ours(**given, **labels).loss.item(), rel=1e-12)
    for name, grad in gradients(ours).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-9, atol=1e-12, msg=name)


def test_answers_accumulate_too(tmp_path):
    ours, _ = pair("answer", tmp_path)
    given = batch()
    labels = {"start_positions": torch.tensor([3, 2, 0, 1]), "end_positions": torch.zeros(N).long()}
    parts = [
        ours(**{k: x[i : i + 1] for k, x in {**given, **labels}.items()}, num_items_in_batch=N).loss
        for i in range(N)
    ]
    assert relative_error(sum(parts), ours(**given, **labels).loss) < 1e-12


def test_without_the_number_of_sequences_the_second_loss_is_shared_out(tmp_path):
    ours, _ = pair("pretraining", tmp_path)
    given, labels = inputs_of("pretraining")
    whole = ours(**given, **labels).loss
    n_items = (labels["labels"] != -100).sum()
    once = ours(**given, **labels, num_items_in_batch=n_items).loss
    half = ours(**given, **labels, num_items_in_batch=2 * n_items).loss
    assert relative_error(once, whole) < 1e-12 and relative_error(2 * half, whole) < 1e-12


def test_padding_is_no_candidate_for_an_answer(tmp_path):
    ours, theirs = pair("answer", tmp_path)
    given = batch()
    start, end = torch.tensor([3, 2, 0, 9]), torch.tensor([6, 12, 0, 3])  # 9 and 12 are none
    out = ours(**given, start_positions=start, end_positions=end)
    wanted = theirs(**given)
    padding = ~given["attention_mask"].bool()
    losses = []
    for logits, target, counted in (
        (wanted.start_logits, start, [0, 1, 2]),
        (wanted.end_logits, end, [0, 2, 3]),
    ):
        scores = logits.masked_fill(padding, -torch.inf).log_softmax(1)
        losses.append(-scores[counted, target[counted]].mean())
    assert relative_error(out.loss, sum(losses) / 2) < 1e-12
    out.loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(ours).values())


def test_left_padding_holes_and_empty_rows(tmp_path):
    ours, theirs = pair("tokens", tmp_path)
    given = batch((8,) * N)
    given["attention_mask"] = torch.tensor(
        [[0, 0, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1, 0, 0], [0] * 8, [1] * 8]
    )
    labels = token_labels(5, given["attention_mask"])
    out, wanted = ours(**given, labels=labels), theirs(**given, labels=labels)
    real = given["attention_mask"].bool()
    assert relative_error(out.logits[real], wanted.logits[real]) < 1e-12
    assert relative_error(out.loss, wanted.loss) < 1e-12
    labels = labels.masked_fill(~real, 3)  # labels of padding
    assert torch.equal(ours(**given, labels=labels).loss, out.loss)
    answers, _ = pair("answer", tmp_path)
    positions = torch.tensor([2, 0, 1, 7])
    loss = answers(**given, start_positions=positions, end_positions=positions).loss
    loss.backward()
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients(answers).values())


@pytest.mark.parametrize("case", ["mlm", "pretraining"])
def test_training_computes_logits_where_labels_are(case, tmp_path):
    ours, _ = pair(case, tmp_path)
    given, labels = inputs_of(case)
    name = "prediction_logits" if case == "pretraining" else "logits"
    evaluated = ours(**given, **labels)
    ours.train()
    out = ours(**given, **labels)
    assert out[0] is out.loss and relative_error(out.loss, evaluated.loss) < 1e-12
    assert getattr(out, name) is None and name not in out
    for asked in ({"output_logits": True}, {"return_dict": False}):
        logits = ours(**given, **labels, **asked)[1]
        assert relative_error(logits, evaluated[name]) < 1e-12
    assert name in ours(**given)
    assert name not in ours.eval()(**given, **labels, output_logits=False)


def test_a_head_of_another_kind_gives_the_same_loss(tmp_path):
    ours, _ = pair("mlm", tmp_path)
    given, labels = inputs_of("mlm")
    before = ours(**given, **labels).loss
    seen = []
    handle = ours.cls.predictions.decoder.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    after = ours.train()(**given, **labels).loss
    handle.remove()
    assert seen == [(labels["labels"] != -100).sum()] and relative_error(after, before) < 1e-12


def test_problem_type_is_learnt_from_the_first_labels():
    ids = torch.ones(2, 3).long()
    for n, labels, wanted in (
        (1, torch.rand(2), "regression"),
        (3, torch.tensor([0, 1]).int(), "single_label_classification"),
        (3, torch.rand(2, 3), "multi_label_classification"),
    ):
        config = BertConfig(**SMALL, num_labels=n)
        model = fastbert.BertForSequenceClassification(config)
        model(ids, labels=labels)
        assert model.config.problem_type == model.bert.config.problem_type == wanted
        assert config.problem_type is None


def test_bfloat16_losses_are_float32():
    given, labels = inputs_of("tokens")
    model = fastbert.BertForTokenClassification(BertConfig(**SMALL, num_labels=5)).bfloat16()
    out = model(**given, **labels)
    assert out.loss.dtype == torch.float32 and out.logits.dtype == torch.bfloat16


def test_outputs_and_states(tmp_path):
    ours, theirs = pair("one label", tmp_path)
    theirs.set_attn_implementation("eager")
    given, labels = inputs_of("one label")
    asked = {"output_hidden_states": True, "output_attentions": True}
    out, wanted = ours(**given, **labels, **asked), theirs(**given, **labels, **asked)
    assert list(out) == out.keys() == ["loss", "logits", "hidden_states", "attentions"]
    assert list(wanted) == list(out) and out["logits"] is out[1] is out.logits
    mask = given["attention_mask"]
    for found, value in zip(out.hidden_states, wanted.hidden_states, strict=True):
        assert relative_error(found, value * mask[..., None]) < 1e-12
    both = mask[:, None, :, None] * mask[:, None, None, :]
    for found, value in zip(out.attentions, wanted.attentions, strict=True):
        assert (found - value * both).abs().max() < 1e-12
    loss, logits = ours(**given, **labels, return_dict=False)
    assert torch.equal(logits, out.logits) and torch.equal(loss, out.loss)
    assert [torch.equal(x, y) for x, y in zip(out.to_tuple()[:2], (loss, logits), strict=True)]


def assert_tied(model):
    head = model.cls.predictions
    assert head.decoder.weight is model.get_input_embeddings().weight
    assert head.decoder.bias is head.bias
    assert head.bias.shape[0] == head.decoder.out_features == model.config.vocab_size
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size


def test_tied_weights_stay_tied(tmp_path):
    ours, _ = pair("mlm", tmp_path)
    assert_tied(ours)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours.to(torch.float32)):
        assert_tied(other)
    assert_tied(copy.deepcopy(ours).to("meta"))
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        assert_tied(copy.deepcopy(ours).half())
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert ours.num_parameters() == sum(p.numel() for p in ours.parameters())
    other = fastbert.BertForMaskedLM(ours.config)
    assert_tied(other)
    other.load_state_dict(ours.state_dict())
    assert_tied(other)
    untied = fastbert.BertForMaskedLM(BertConfig(**SMALL, tie_word_embeddings=False))
    assert untied.num_parameters() == other.num_parameters() + 50 * 32 + 50


# larger, smaller, rounded up
@pytest.mark.parametrize("case", ["mlm", "mlm untied"])
@pytest.mark.parametrize("new, multiple, size", [(57, None, 57), (40, None, 40), (None, 64, 64)])
def test_resized_embeddings_equal_transformers(case, new, multiple, size, tmp_path):
    ours, theirs = pair(case, tmp_path)
    assert ours.resize_token_embeddings() is ours.get_input_embeddings()
    for model in (ours, theirs):
        table = model.resize_token_embeddings(new, pad_to_multiple_of=multiple)
        assert table is model.get_input_embeddings() and table.weight.shape == (size, 32)
        assert model.config.vocab_size == size
    if case == "mlm":
        assert_tied(ours)
    given = batch()
    given["input_ids"] %= min(size, 50)
    real = given["attention_mask"].bool()
    out, wanted = ours(**given).logits[real], theirs(**given).logits[real]
    assert out.shape == wanted.shape
    # transformers adds noise of width 3e-5 to the mean of the old rows
    kept = min(size, 50)
    assert relative_error(out[:, :kept], wanted[:, :kept]) < 1e-12
    if size > kept:
        assert relative_error(out[:, kept:], wanted[:, kept:]) < 1e-3
    ours.save_pretrained(tmp_path / "resized")
    again = type(ours).from_pretrained(tmp_path / "resized")
    assert torch.equal(again(**given).logits[real], out)


def test_what_every_model_has():
    model = fastbert.BertForTokenClassification(BertConfig(**SMALL))
    assert model.base_model is model.bert and model.bert.base_model is model.bert
    assert model.base_model_prefix == "bert" and model.get_output_embeddings() is None
    table = torch.nn.Embedding(50, 32)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table is model.bert.embeddings.word_embeddings
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    tables = (50 + 2 + 24) * 32
    assert model.num_parameters() - model.num_parameters(exclude_embeddings=True) == tables
    model.classifier.requires_grad_(False)
    assert model.num_parameters() - model.num_parameters(only_trainable=True) == 2 * 32 + 2
    head = fastbert.BertForMaskedLM(BertConfig(**SMALL))
    linear = torch.nn.Linear(32, 50)
    head.set_output_embeddings(linear)
    assert head.get_output_embeddings() is linear and head.cls.predictions.bias is linear.bias


@pytest.mark.parametrize("options", [None, {"use_reentrant": True}])
def test_gradient_checkpointing(options, tmp_path):
    ours, _ = pair("one label", tmp_path)
    given, labels = inputs_of("one label")
    ours.train()(**given, **labels).loss.backward()
    wanted = gradients(ours)
    ours.zero_grad()
    assert not ours.is_gradient_checkpointing
    ours.gradient_checkpointing_enable(options)
    assert ours.is_gradient_checkpointing
    n_calls = []
    ours.bert.encoder.layer[0].register_forward_pre_hook(lambda *_: n_calls.append(1))
    ours(**given, **labels).loss.backward()
    assert len(n_calls) == 2
    for name, grad in gradients(ours).items():
        assert torch.equal(grad, wanted[name])
    ours.gradient_checkpointing_disable()
    assert not ours.is_gradient_checkpointing


def test_a_base_checkpoint_gets_a_fresh_head_and_says_so(tmp_path):
    base = fastbert.BertModel(BertConfig(**SMALL), add_pooling_layer=False).bfloat16()
    base.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="has no bert.pooler.dense.weight, .*classifier") as seen:
        model, info = fastbert.BertForSequenceClassification.from_pretrained(
            tmp_path, num_labels=7, output_loading_info=True
        )
    assert len(seen) == 1 and model.classifier.weight.shape == (7, 32)
    assert info["missing_keys"] == [
        "bert.pooler.dense.weight", "bert.pooler.dense.bias",
        "classifier.weight", "classifier.bias",
    ]  # fmt: skip
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert 0.01 < model.classifier.weight.std() < 0.03 and model.classifier.bias.eq(0).all()
    for name, value in base.state_dict().items():
        assert torch.equal(model.bert.state_dict()[name], value)
    with pytest.warns(UserWarning, match="cls.predictions.bias"):
        assert_tied(fastbert.BertForMaskedLM.from_pretrained(tmp_path))


def test_a_checkpoint_with_another_head(tmp_path):
    fastbert.BertForPreTraining(BertConfig(**SMALL)).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = fastbert.BertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert_tied(model)
    assert {name.split(".")[1] for name in info["unexpected_keys"]} == {
        "pooler",
        "seq_relationship",
    }
    with pytest.warns(UserWarning, match=r"has no classifier\.weight, classifier\.bias"):
        model = fastbert.BertForSequenceClassification.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifier.weight has shape \(2, 32\), wanted \(3, 32"):
        fastbert.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    with pytest.warns(UserWarning, match=r"has no classifier\.weight, classifier\.bias"):
        model = fastbert.BertForSequenceClassification.from_pretrained(
            tmp_path, num_labels=3, ignore_mismatched_sizes=True
        )
    assert model.config.num_labels == 3


def test_names_of_old_files(tmp_path):
    ours, _ = pair("mlm", tmp_path)
    path = tmp_path / "theirs/model.safetensors"
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): v
        for n, v in load_file(path).items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(24)[None]
    old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"].clone()
    save_file(old, path)
    again, info = type(ours).from_pretrained(
        tmp_path / "theirs", dtype="float64", output_loading_info=True
    )
    assert_tied(again)
    assert info == {"missing_keys": [], "unexpected_keys": []}
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in ours.state_dict().items())
    # untied, with the one bias that files before 2020 have
    untied = type(ours).from_pretrained(tmp_path / "theirs", tie_word_embeddings=False)
    head = untied.cls.predictions
    assert torch.equal(head.decoder.bias, head.bias) and head.decoder.bias is not head.bias


def test_heads_of_a_tensorflow_checkpoint(shared, tmp_path):
    source = shared / "models/tf1_keras_bert_test_checkpoint"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = fastbert.BertForPreTraining.from_pretrained(source)
    fastbert.convert(source, tmp_path / "out")
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path / "out").eval()
    state = ours.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[n], value) for n, value in theirs.state_dict().items())
    ids = torch.randint(0, 15, (3, 16))
    with torch.no_grad():
        for found, value in zip(ours(ids).to_tuple(), theirs(ids).to_tuple(), strict=True):
            assert relative_error(found, value) < 2e-5


def test_trainer_gives_the_losses_of_transformers_also_in_small_batches(tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    kind, _, _ = CASES["one label"]
    theirs = getattr(transformers, kind)(transformers.BertConfig(**SMALL))
    theirs.save_pretrained(tmp_path / "model")
    rows = [
        {"input_ids": torch.randint(0, 50, (n,)), "labels": torch.tensor(n % 2)}
        for n in (3, 5, 8, 2, 9, 4, 7, 6)
    ]

    def collate(rows):
        longest = max(len(row["input_ids"]) for row in rows)
        padded = [
            torch.nn.functional.pad(row["input_ids"], (0, longest - len(row["input_ids"])))
            for row in rows
        ]
        mask = mask_of([len(row["input_ids"]) for row in rows])
        labels = torch.stack([row["labels"] for row in rows])
        return {"input_ids": torch.stack(padded), "attention_mask": mask, "labels": labels}

    losses = []
    for package, n_rows in ((transformers, 8), (fastbert, 8), (fastbert, 1)):
        model = getattr(package, kind).from_pretrained(tmp_path / "model")
        arguments = transformers.TrainingArguments(
            tmp_path / "out", per_device_train_batch_size=n_rows, learning_rate=1e-3, max_steps=4,
            gradient_accumulation_steps=8 // n_rows, logging_steps=1, save_strategy="no",
            report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        assert trainer.predict(rows).predictions.shape == (8, 2)
    assert len(set(losses[0])) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_adapters_of_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="compares with peft's adapters")
    ours, theirs = pair("mlm", tmp_path)
    given, labels = inputs_of("mlm")
    plain = ours(**given, **labels).loss
    # the decoder's adapter makes it a module that is not plain
    lora = peft.LoraConfig(target_modules=["query", "value", "decoder"], init_lora_weights=False)
    ours, theirs = (peft.get_peft_model(model, lora) for model in (ours, theirs))
    ours.load_state_dict(theirs.state_dict())
    out, wanted = ours.train()(**given, **labels), theirs(**given, **labels)
    assert relative_error(out.loss, wanted.loss) < 1e-12 < relative_error(out.loss, plain)
    out.loss.backward()
    wanted.loss.backward()
    found, value = gradients(ours), gradients(theirs)
    assert found.keys() == value.keys() and len(found) > 2
    for name in value:
        torch.testing.assert_close(found[name], value[name], rtol=1e-9, atol=1e-12, msg=name)
    with ours.disable_adapter():
        assert relative_error(ours(**given, **labels).loss, plain) < 1e-12


def compiled_batch(*lengths):
    mask = mask_of(lengths)
    return pack(torch.randint(0, 50, mask.shape), mask)


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "BertForMaskedLM"])
def test_compiles_whole_and_exports(kind):
    model = getattr(fastbert, kind)(BertConfig(**SMALL)).eval()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, token_type_ids, position_ids, cu_seqlens):
            return self.model(
                PackedBatch.unchecked(input_ids, token_type_ids, position_ids, cu_seqlens, 16)
            ).logits

    def tensors(*lengths):
        packed = compiled_batch(*lengths)
        return packed.input_ids, packed.token_type_ids, packed.position_ids, packed.cu_seqlens

    compiled = torch.compile(lambda packed: model(packed).logits, fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    n_tokens, n_bounds = torch.export.Dim("n_tokens", min=2), torch.export.Dim("n_bounds", min=3)
    shapes = {0: n_tokens}, {0: n_tokens}, {0: n_tokens}, {0: n_bounds}
    module = Logits().eval()
    with torch.no_grad():
        packed = compiled_batch(9, 4, 1)
        torch.testing.assert_close(compiled(packed), model(packed).logits)
        program = torch.export.export(module, tensors(9, 4, 1), dynamic_shapes=shapes)
        for lengths in ((9, 4, 1), (16, 2), (3, 3, 3, 3)):
            args = tensors(*lengths)
            torch.testing.assert_close(program.module()(*args), module(*args))


@pytest.mark.parametrize("case", ["mlm", "one label"])
def test_compiles_whole_and_trains(case, tmp_path):
    ours, _ = pair(case, tmp_path)
    given, labels = inputs_of(case)
    packed, labels = packed_of(given, labels)
    loss = ours.train()(packed, **labels).loss
    compiled = torch.compile(
        lambda *args, **kwargs: ours(*args, **kwargs).loss, fullgraph=True, backend="aot_eager"
    )
    assert relative_error(compiled(packed, **labels), loss) < 1e-12


IDS = torch.ones(2, 5).long()


@pytest.mark.parametrize(
    "kind, arguments, message",
    [
        ("MaskedLM", {"labels": IDS[:, :4]}, r"labels must be \(2, 5\), got \(2, 4\)"),
        ("MaskedLM", {"labels": IDS * 50}, "labels must be from 0 to 49 or .*-100, got 50"),
        ("MaskedLM", {"labels": IDS.float()}, "labels must be whole numbers.*got torch.float32"),
        ("PreTraining", {"labels": IDS, "next_sentence_label": IDS[0]},
         r"next_sentence_label must be \(2,\), got \(5,\)"),
        ("NextSentencePrediction", {"labels": torch.tensor([0, 2])}, "from 0 to 1 or -100, got 2"),
        ("SequenceClassification", {"labels": torch.tensor([0, -1])}, "from 0 to 1 or.*got -1"),
        ("SequenceClassification", {"labels": torch.rand(2)},
         r"labels must be \(2, 2\) for multi_label_classification, got \(2,\)"),
        ("TokenClassification", {"labels": IDS * 2}, "from 0 to 1 or -100, got 2"),
        ("QuestionAnswering", {"start_positions": IDS, "end_positions": IDS[:, 0]},
         r"start_positions must be \(2,\), got \(2, 5\)"),
        ("MultipleChoice", {}, r"input_ids must be \(n, num_choices, length\), got \(2, 5\)"),
        ("MaskedLM", {"encoder_hidden_states": torch.ones(2, 5, 32)}, "encoder_hidden_states"),
        ("MaskedLM", {"input_ids": None}, "exactly one of input_ids or inputs_embeds"),
    ],
)  # fmt: skip
def test_refuses(kind, arguments, message):
    model = getattr(fastbert, f"BertFor{kind}")(BertConfig(**SMALL))
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": IDS, **arguments})


def test_refuses_packed_labels_and_choices_that_do_not_fit():
    packed = pack(IDS, IDS)
    with pytest.raises(ValueError, match=r"labels must be \(10,\), got \(2, 5\)"):
        fastbert.BertForTokenClassification(BertConfig(**SMALL))(packed, labels=IDS)
    model = fastbert.BertForMultipleChoice(BertConfig(**SMALL))
    assert model(packed, num_choices=2).logits.shape == (1, 2)
    with pytest.raises(ValueError, match="needs num_choices, got None"):
        model(packed)
    with pytest.raises(ValueError, match="multiple of num_choices = 3, got 2"):
        model(packed, num_choices=3)
    with pytest.raises(ValueError, match="num_labels must be 2, a start and an end, got 3"):
        fastbert.BertForQuestionAnswering(BertConfig(**SMALL, num_labels=3))
    for size in (0, 2.5):
        with pytest.raises(ValueError, match="new_num_tokens must be a whole number of at least"):
            model.resize_token_embeddings(size)
