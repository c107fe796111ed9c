"""Distillation: the loss, what the student starts from, and folders that others read."""

import json
import random
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_models import save_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastbert.train
from fastbert import BertTokenizer
from fastbert.batches import by_budget
from fastbert.cli import main
from fastbert.distill import Distillation, Student
from fastbert.examples import read_examples
from fastbert.student import make_student, spaced
from fastbert.train import load, make_task

WORDS = ("good", "bad", "film", "book", "the", "was", "very", "ann", "bob", "saw", "in", "rome")
pytestmark = pytest.mark.filterwarnings("ignore:.*initialised afresh")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A folder of a model with random weights."""
    return save_model(tmp_path_factory.mktemp("fresh"), [*WORDS, "##s"], num_hidden_layers=2)


@pytest.fixture(scope="module")
def teacher(fresh, tmp_path_factory):
    """A folder of a model that was trained."""
    out = tmp_path_factory.mktemp("trained") / "teacher"
    options = dict(model=fresh, epochs=3, lr=5e-3, batch_size=16, quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)  # it is made before the tests' own do it
        fastbert.train.classify(rows_of("classify", 200), out=out, **options)
    return out


def rows_of(task, n, seed=0):
    """Examples of which a rule gives the label."""
    chance, rows = random.Random(seed), []
    for i in range(n):
        thing, quality = chance.choice(["film", "book"]), chance.choice(["good", "bad"])
        text = f"the {thing} was {'very ' * chance.randrange(4)}{quality}"
        name = chance.choice(["ann", "bob"])
        rows.append(
            {
                "classify": {"sentence": text, "label": quality},
                "multi": {"sentence": text, "label": f"{quality},{thing}"},
                "regression": {"text": text, "score": text.count("very") * 1.5},
                "tokens": {
                    "tokens": ["the"] * chance.randrange(3) + [name, "saw", "films"],
                    "tags": [],
                },
                "qa": {
                    "question": "in" if i % 2 else "the",
                    "context": (context := f"{name} saw {text}"),
                    "answers": {"text": [thing], "answer_start": [context.index(thing)]},
                },
            }[task]
        )
        if task == "tokens":
            rows[-1]["tags"] = ["PER" if w == name else "O" for w in rows[-1]["tokens"]]
    return rows


# The teacher's layers for students: half, a third, as many; 6 in 4 is not even, the last is last.
@pytest.mark.parametrize(
    "n_teacher, n_student, expected",
    [
        (6, 2, [3, 6]),
        (6, 3, [2, 4, 6]),
        (12, 4, [3, 6, 9, 12]),
        (12, 12, list(range(1, 13))),
        (6, 4, [2, 3, 5, 6]),
        (2, 4, [1, 1, 2, 2]),
    ],
)
def test_layers_are_evenly_spaced(n_teacher, n_student, expected):
    assert spaced(n_student, n_teacher) == expected


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def divergences(own, other, t):
    """Kullback and Leibler's, of each row, times the temperature's square."""
    p, q = softmax(other / t), softmax(own / t)
    return (p * np.log(p / q)).sum(-1) * t * t


def expected_loss(name, task, data, models, maps, hidden, teaching, t):
    """In numpy, a sequence at a time, from its own forward."""
    hard, soft, squares, n_tokens = [], [], [], 0
    for i, one in enumerate(data.packed.split(1)):
        outs = [m(one.input_ids[None], output_hidden_states=True,
                  token_type_ids=one.token_type_ids[None]) for m in models]  # fmt: skip
        start = int(data.packed.cu_seqlens[i])
        labels = next(iter(data.targets.values()))
        n_tokens += one.input_ids.numel()
        chosen = [0, *spaced(len(outs[0].hidden_states) - 1, len(outs[1].hidden_states) - 1)]
        for to, x, j in zip(maps, outs[0].hidden_states, chosen, strict=True):
            other = outs[1].hidden_states[j]
            squares.append(((to(x) - other) ** 2)[0].mean(1).detach().numpy())
        if name == "qa":
            for which, score in enumerate(("start_logits", "end_logits")):
                own, other = (out[score][0].detach().numpy() for out in outs)
                hard.append(-np.log(softmax(own)[labels[i, which]]))
                soft.append(divergences(own, other, t))
            continue
        own, other = (out.logits[0].detach().numpy() for out in outs)
        if name == "tokens":
            labels = labels[start : start + len(own)].numpy()
            real = labels != -100
            hard.extend(-np.log(softmax(own[real])[range(real.sum()), labels[real]]))
            soft.extend(divergences(own[real], other[real], t))
        elif name == "regression":
            hard.append((own[0] - float(labels[i])) ** 2)
            soft.append((own[0] - other[0]) ** 2)
        elif name == "multi":
            p, q = (1 / (1 + np.exp(-x)) for x in (own, own / t))
            y, wanted = labels[i].numpy(), 1 / (1 + np.exp(-other / t))
            hard.append(-(y * np.log(p) + (1 - y) * np.log(1 - p)).mean())
            soft.append(-(wanted * np.log(q) + (1 - wanted) * np.log(1 - q)).mean() * t * t)
        else:
            hard.append(-np.log(softmax(own)[labels[i]]))
            soft.append(divergences(own, other, t))
    n_states = len(maps)
    parts = np.mean(hard), np.mean(soft), np.concatenate(squares).sum() / n_tokens / n_states
    return np.dot([1 - teaching, teaching, hidden], parts)


# tokens: short windows, so that words are cut off. qa: two texts.
@pytest.mark.parametrize(
    "name, options",
    [
        ("classify", {}),
        ("multi", {}),
        ("regression", {}),
        ("tokens", {"max_length": 5}),
        ("qa", {}),
    ],
)
def test_loss_is_the_formula(fresh, name, options):
    """In float64; whole and cut into parts; gradients of the student and the maps alone."""
    task = make_task(
        {"multi": "classify"}.get(name, name),
        BertTokenizer.from_pretrained(fresh),
        multi_label=name == "multi",
        **options,
    )
    examples = read_examples(rows_of(name, 12), task.parts, optional=task.optional)
    task.fit_labels(examples)
    data = task.encode(examples)
    data.targets = {n: x.double() if x.is_floating_point() else x for n, x in data.targets.items()}
    large = task.head.from_pretrained(fresh, dtype=torch.float64, **task.config())
    large.requires_grad_(False)
    student = Student(
        make_student("1x64", task, large, torch.device("cpu"))[0], large, True
    ).double()
    assert [tuple(to.weight.shape) for to in student.maps] == [(32, 64)] * 2
    lesson = Distillation(task, large, 0.7, 0.4, 3.0)

    def gradients(budget):
        runs = by_budget(data.lengths, budget)
        batches = [lesson.collate(data, run, 0) for run in runs]
        items = {n: sum(batch.n_items[n] for batch in batches) for n in batches[0].n_items}
        student.zero_grad()
        total = 0.0
        for batch in batches:
            loss, parts = lesson.loss(student, batch, items)
            assert loss.dtype == torch.float64 and set(parts) == {
                "labels_loss", "logits_loss", "hidden_loss"
            }  # fmt: skip
            loss.backward()
            total += loss.item()
        return len(runs), total, {n: p.grad.clone() for n, p in student.named_parameters()}

    _, loss, whole = gradients(10_000)
    expected = expected_loss(name, task, data, (student.model, large), student.maps, 0.7, 0.4, 3.0)
    assert loss == pytest.approx(float(expected), rel=1e-10)
    n_runs, cut_loss, cut = gradients(30)
    assert n_runs > 2
    assert cut_loss == pytest.approx(loss)
    for n, grad in whole.items():
        torch.testing.assert_close(cut[n], grad, msg=n)
        assert grad.abs().max() > 0 or "key.bias" in n, n
    assert all(p.grad is None for p in large.parameters())


def test_maps_are_where_widths_differ(teacher):
    trained = load(teacher)
    same = make_student("1x32", trained.task, trained.model, torch.device("cpu"))[0]
    assert not list(Student(same, trained.model, True).maps.parameters())
    assert len(Student(same, trained.model, True).maps) == 2
    narrow, lr = make_student("3x16", trained.task, trained.model, torch.device("cpu"))
    assert lr is not None and lr > 1e-3  # of layers that have learned nothing yet
    assert len(Student(narrow, trained.model, False).maps) == 0


def test_a_student_of_the_same_width_starts_as_the_teachers_layers(teacher):
    trained = load(teacher)
    cpu = torch.device("cpu")
    batch = trained.task.tokenizer.pack(["the film was good", "bad"])
    same = make_student("2x32", trained.task, trained.model, cpu)[0]
    assert torch.equal(same(batch).logits, trained.model(batch).logits)
    half = make_student("1x32", trained.task, trained.model, cpu)[0].state_dict()
    whole = trained.model.state_dict()
    assert torch.equal(half.pop("bert.encoder.layer.0.output.dense.weight"),
                       whole["bert.encoder.layer.1.output.dense.weight"])  # fmt: skip
    assert all(torch.equal(x, whole[n]) for n, x in half.items() if ".layer." not in n)


def test_a_narrow_student_starts_with_the_principal_components(teacher):
    """No other embeddings as narrow have inner products that are nearer."""
    trained = load(teacher)
    large = trained.model.bert.embeddings.word_embeddings.weight.detach().double().numpy()
    small = make_student("1x8", trained.task, trained.model, torch.device("cpu"))[0]
    small = small.bert.embeddings.word_embeddings.weight.detach().double().numpy()
    values = np.linalg.svd(large, compute_uv=False)
    error = np.linalg.norm(large @ large.T - small @ small.T)
    np.testing.assert_allclose(error, np.linalg.norm(values[8:] ** 2), rtol=1e-5)


def test_a_student_comes_nearer_without_labels_and_others_read_it(teacher, tmp_path):
    texts = tmp_path / "raw.txt"
    texts.write_text("".join(f"{row['sentence']}\n" for row in rows_of("classify", 200)))
    dev = rows_of("classify", 40, seed=1)
    before = {n: x.clone() for n, x in load_file(teacher / "model.safetensors").items()}
    numbers = fastbert.train.distill(
        texts, teacher=teacher, student="1x16", dev=dev, out=tmp_path / "out", epochs=5, lr=5e-3,
        batch_size=16, log_every=1, quiet=True,
    )  # fmt: skip
    history = numbers["history"]
    assert "labels_loss" not in history[0]
    for part in ("logits_loss", "hidden_loss"):
        assert history[-1][part] < 0.5 * history[0][part]
    assert numbers["metrics"]["accuracy"] >= 0.95
    both = numbers["teacher"], numbers["student"]
    assert both[0]["metrics"]["accuracy"] >= 0.95
    assert both[0]["parameters"] == load(teacher).model.num_parameters() > both[1]["parameters"]
    assert all(each["tokens_per_second"] > 0 for each in both)
    out = tmp_path / "out"
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(numbers))
    assert f"| parameters | {both[0]['parameters']:,} |" in (out / "README.md").read_text()
    assert (out / "loss.png").exists() and not out.with_name("out.parts").exists()
    after = load_file(teacher / "model.safetensors")
    assert all(torch.equal(x, after[n]) for n, x in before.items())

    theirs = AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert set(theirs.state_dict()) >= set(load_file(out / "model.safetensors"))
    encoded = AutoTokenizer.from_pretrained(out)(dev[0]["sentence"], return_tensors="pt")
    ours = load(out).model(encoded["input_ids"]).logits
    with torch.no_grad():
        torch.testing.assert_close(ours, theirs(**encoded).logits, rtol=1e-4, atol=1e-4)
    assert fastbert.train.evaluate(out, dev) == numbers["metrics"]


# Of words and of windows, whose labels are not of texts.
@pytest.mark.parametrize("name, removed", [("tokens", "tags"), ("qa", "answers")])
def test_other_tasks_learn_without_labels(fresh, tmp_path, name, removed):
    rows, options = rows_of(name, 60), dict(lr=5e-3, batch_size=16, quiet=True)
    learned = fastbert.train.train_task(
        name, rows, dev=rows, model=fresh, out=tmp_path / "teacher", epochs=4, **options
    )
    bare = [{part: value for part, value in row.items() if part != removed} for row in rows]
    numbers = fastbert.train.distill(
        bare, teacher=tmp_path / "teacher", student="1x32", dev=rows, out=tmp_path / "out",
        epochs=4, log_every=1, **options,
    )  # fmt: skip
    metric = {"tokens": "word_accuracy", "qa": "f1"}[name]  # tags that are no entities
    assert numbers["teacher"]["metrics"][metric] == learned["metrics"][metric]
    assert numbers["history"][-1]["logits_loss"] < 0.5 * numbers["history"][0]["logits_loss"]
    with_labels = fastbert.train.distill(
        rows, teacher=tmp_path / "teacher", student="1x32", out=tmp_path / "more", epochs=1,
        **options,
    )  # fmt: skip
    assert with_labels["history"][-1]["labels_loss"] > 0
    assert len(fastbert.train.predict(tmp_path / "out", bare)) == 60


def test_a_stopped_run_goes_on_to_the_same_weights(teacher, tmp_path, monkeypatch):
    rows, dev = rows_of("classify", 120), rows_of("classify", 20, seed=1)
    options = dict(
        dev=dev, teacher=teacher, student="1x16", epochs=3, lr=5e-3, batch_size=16, quiet=True
    )
    whole = fastbert.train.distill(rows, out=tmp_path / "whole", **options)
    evaluate, calls = fastbert.train.SequenceTask.evaluate, iter([True, True, False])

    def stopped(*args):  # the first call is of the teacher
        if not next(calls):
            raise KeyboardInterrupt
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(fastbert.train.SequenceTask, "evaluate", stopped)
        with pytest.raises(KeyboardInterrupt):
            fastbert.train.distill(rows, out=tmp_path / "part", **options)
    assert not (tmp_path / "part").exists()
    other = {**options, "hidden": 2.0}
    with pytest.raises(ValueError, match=r"'distillation': \[0\.1"):
        fastbert.train.distill(rows, out=tmp_path / "part", resume=True, **other)
    resumed = fastbert.train.distill(rows, out=tmp_path / "part", resume=True, **options)
    assert resumed["history"] == whole["history"]
    a, b = (tmp_path / x / "model.safetensors" for x in ("whole", "part"))
    assert a.read_bytes() == b.read_bytes()


def test_a_model_of_a_folder_learns(teacher, fresh, tmp_path):
    """On labels that are all the other way round, of which the teacher's word counts nothing."""
    other = {"good": "bad", "bad": "good"}
    rows = rows_of("classify", 200)
    wrong = [{**row, "label": other[row["label"]]} for row in rows]
    fastbert.train.distill(
        wrong, teacher=teacher, student=fresh, out=tmp_path / "out", epochs=2, lr=5e-3,
        batch_size=16, teaching=0.0, hidden=0.0, quiet=True,
    )  # fmt: skip
    found = fastbert.train.predict(tmp_path / "out", rows)
    assert [p["label"] for p in found] == [row["label"] for row in wrong]


def test_errors(teacher, fresh, tmp_path):
    rows = rows_of("classify", 20)
    save_model(tmp_path / "other", [*WORDS[1:], "new", "##s"], num_hidden_layers=2)
    options = dict(teacher=teacher, student="1x16", out=tmp_path / "out", quiet=True)
    for changes, message in [
        ({"teacher": fresh}, "is not a folder of fastbert train"),
        ({"teacher": tmp_path / "none"}, "no such model folder"),
        ({"student": "smal"}, "student must be one of tiny, mini, .*, got 'smal'"),
        ({"student": tmp_path / "other"}, "must have the teacher's vocabulary, and .*other has"),
        ({"temperature": 0}, r"temperature above 0, got 0\.1, 0\.5 and 0"),
        ({"columns": {"label": "kind"}}, "has no column 'kind'"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            fastbert.train.distill(rows, **{**options, **changes})
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"row 20 .* unknown label 'dull'"):
        fastbert.train.distill([*rows, {"sentence": "a", "label": "dull"}], **options)
    fastbert.train.mlm(
        [row["sentence"] for row in rows], model=fresh, out=tmp_path / "mlm", epochs=1, quiet=True
    )
    with pytest.raises(ValueError, match=r"classify, pair, regression, tokens or qa: .* mlm"):
        fastbert.train.distill(rows, **{**options, "teacher": tmp_path / "mlm"})
    assert {p.name for p in tmp_path.iterdir()} == {"other", "mlm"}


def test_command_line(teacher, tmp_path, capsys):
    train = tmp_path / "train.tsv"
    rows = [f"{row['sentence']}\t{row['label']}\n" for row in rows_of("classify", 100)]
    train.write_text("review\tsentiment\n" + "".join(rows))
    command = ["train", "distill", str(train), "--teacher", str(teacher), "--student", "1x16"]
    command += ["--out", str(tmp_path / "out")]
    assert main([*command, "--dev", str(train), "--epochs", "1", "--lr", "5e-3"]) == 0
    printed = capsys.readouterr().out
    assert "text 'review' (a guess), label 'sentiment' (a guess)" in printed
    for who in ("teacher", "student"):
        assert re.search(rf"the {who}: [\d,]+ parameters, [\d,]+ tokens/s forward", printed)
    assert re.search(r"the teacher, .*teacher:\n  loss", printed)
    assert main([*command, "--overwrite", "--student", "tiny-ish"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
