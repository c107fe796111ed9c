"""Fine-tuning: each task's labels, losses and scores, and folders that others read."""

import json
import random
import re

import numpy as np
import pytest
import torch
from small_models import save_model
from torchrun import on_two_ranks
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import fastbert.train
from fastbert import BertForMaskedLM, BertTokenizer, metrics
from fastbert.batches import by_budget
from fastbert.cli import main
from fastbert.examples import read_examples
from fastbert.losses import IGNORED
from fastbert.train import make_task, read_dev

WORDS = (
    *("good", "bad", "film", "book", "the", "a", "was", "is", "very", "not", "who", "saw"),
    *("it", "ann", "bob", "paris", "rome", "in", ",", "?", "##s"),
)
pytestmark = pytest.mark.filterwarnings("ignore:.*initialised afresh")
AUTO = {
    "classify": AutoModelForSequenceClassification,
    "pair": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "qa": AutoModelForQuestionAnswering,
    "mlm": AutoModelForMaskedLM,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder of a model with random weights that a few hundred steps can teach something."""
    return save_model(tmp_path_factory.mktemp("tiny"), WORDS)


def rows_of(task, n, seed=0):
    """Examples of which a rule gives the label."""
    chance = random.Random(seed)
    rows = []
    for i in range(n):
        thing, quality = chance.choice(["film", "book"]), chance.choice(["good", "bad"])
        text = f"the {thing} was {'very ' * chance.randrange(3)}{quality}"
        name, place = chance.choice(["ann", "bob"]), chance.choice(["paris", "rome"])
        rows.append(
            {
                "classify": {"sentence": text, "label": quality},
                "multi": {"sentence": text, "label": f"{quality},{thing}"},
                "pair": {
                    "sentence1": text,
                    "sentence2": (other := chance.choice(["a film", "a book"])),
                    "label": "same" if thing in other else "other",
                },
                "regression": {"text": text, "score": text.count("very") * 1.5},
                "tokens": {
                    "tokens": f"{name} saw it in {place}s".split(),
                    "tags": ["B-PER", "O", "O", "O", "B-LOC"],
                },
                "qa": {
                    "id": str(i),
                    "question": "who saw it ?" if i % 2 else "in ?",
                    "context": (context := f"{name} saw it in {place}"),
                    "answers": {
                        "text": [name if i % 2 else place],
                        "answer_start": [0 if i % 2 else context.index(place)],
                    },
                },
                "mlm": {"text": text},
            }[task]
        )
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def data_of(name, folder, n=24, **options):
    task_name = {"multi": "classify"}.get(name, name)
    task = make_task(
        task_name, BertTokenizer.from_pretrained(folder), multi_label=name == "multi", **options
    )
    examples = read_examples(rows_of(name, n), task.parts, optional=task.optional)
    task.fit_labels(examples)
    return task, task.encode(examples)


# Weighted classes: items are sums of weights. tokens: short windows, so that words are cut off.
@pytest.mark.parametrize(
    "name, options",
    [
        ("classify", {"class_weights": "balanced", "label_smoothing": 0.1}),
        ("multi", {}),
        ("regression", {}),
        ("tokens", {"max_length": 6}),
        ("qa", {}),
        ("mlm", {}),
    ],
)
def test_loss_and_gradients_do_not_depend_on_the_cut(tiny, name, options):
    task, data = data_of(name, tiny, **options)
    model = task.head.from_pretrained(tiny, dtype=torch.float64, **task.config()).train()

    def gradients(budget):
        runs = by_budget(data.lengths, budget)
        batches = [task.collate(data, run, 0) for run in runs]
        items = {"labels": sum(batch.n_items["labels"] for batch in batches)}
        model.zero_grad()
        total = 0.0
        for batch in batches:
            loss, _ = task.loss(model, batch, items)
            loss.backward()
            total += loss.item()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return len(runs), total, found

    (_, loss, whole), (n_runs, cut_loss, cut) = gradients(10_000), gradients(40)
    assert n_runs > 3
    assert cut_loss == pytest.approx(loss)
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b)


def test_weighted_loss_is_torchs(tiny):
    task, data = data_of("classify", tiny, class_weights="balanced")
    model = task.head.from_pretrained(tiny, **task.config()).eval()
    batch = task.collate(data, np.arange(24), 0)
    loss, _ = task.loss(model, batch, batch.n_items)
    labels = batch.labels["labels"]
    weights = 24 / (2 * labels.bincount())
    expected = torch.nn.functional.cross_entropy(model(batch.packed).logits, labels, weights)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", ["classify", "multi", "pair", "regression", "tokens", "qa", "mlm"])
def test_learns_and_others_read_the_folder(tiny, tmp_path, name):
    train = write(tmp_path / "train.jsonl", rows_of(name, 400))
    dev = write(tmp_path / "dev.jsonl", rows_of(name, 60, seed=1))
    task = {"multi": "classify"}.get(name, name)
    options = {"multi_label": True} if name == "multi" else {}
    numbers = fastbert.train.train_task(
        task,
        train,
        dev=dev,
        model=tiny,
        out=tmp_path / "out",
        epochs=4,
        lr=5e-3,
        batch_size=16,
        quiet=True,
        **options,
    )
    out = tmp_path / "out"
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(numbers))
    wanted = {"regression": ("spearman", 0.9), "mlm": ("accuracy", 0.4), "qa": ("f1", 90)}
    wanted |= {"tokens": ("f1", 0.95), "multi": ("f1_micro", 0.95)}
    metric, least = wanted.get(name, ("accuracy", 0.95))
    assert numbers["metrics"][metric] >= least
    assert fastbert.train.evaluate(out, dev) == numbers["metrics"]
    assert (out / "README.md").read_text().count(f"{numbers['metrics'][metric]:.4f}")
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "confusion.png").exists() == (name in ("classify", "pair"))
    assert not out.with_name("out.parts").exists()

    theirs = AUTO[task].from_pretrained(out).eval()
    trained = fastbert.train.load(out)
    assert theirs.config.id2label == dict(trained.model.config.id2label)
    row = rows_of(name, 1, seed=2)[0]
    texts = [row[c] for c in trained.task.columns.values() if isinstance(row[c], str)]
    if name == "tokens":
        texts = [" ".join(row["tokens"])]
    texts = texts[: 2 if name == "pair" else 1]
    encoded = AutoTokenizer.from_pretrained(out)(*texts, return_tensors="pt")
    ours = trained.model(encoded["input_ids"], token_type_ids=encoded["token_type_ids"])
    with torch.no_grad():
        logits = theirs(**encoded)[0]
    torch.testing.assert_close(ours[0].detach(), logits, rtol=1e-4, atol=1e-4)


def test_predictions(tiny, tmp_path):
    rows = rows_of("classify", 300)
    fastbert.train.classify(rows, model=tiny, out=tmp_path / "out", epochs=2, lr=5e-3, quiet=True)
    found = fastbert.train.predict(tmp_path / "out", rows[:20])
    assert [p["label"] for p in found] == [row["label"] for row in rows[:20]]
    assert all(0.5 < p["score"] <= 1 for p in found)


def test_a_stopped_run_goes_on_to_the_same_weights(tiny, tmp_path, monkeypatch):
    rows, dev = rows_of("classify", 120), rows_of("classify", 20, seed=1)
    options = dict(dev=dev, model=tiny, epochs=3, lr=5e-3, batch_size=16, quiet=True)
    whole = fastbert.train.classify(rows, out=tmp_path / "whole", **options)

    evaluate, calls = fastbert.train.SequenceTask.evaluate, iter([True, False])

    def stopped(*args):
        if not next(calls):
            raise KeyboardInterrupt
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(fastbert.train.SequenceTask, "evaluate", stopped)
        with pytest.raises(KeyboardInterrupt):
            fastbert.train.classify(rows, out=tmp_path / "part", **options)
    assert not (tmp_path / "part").exists()
    with pytest.raises(ValueError, match="holds a run that was stopped: --resume"):
        fastbert.train.classify(rows, out=tmp_path / "part", **options)
    with pytest.raises(ValueError, match=r"lr was 0\.005 and is 0\.01"):
        fastbert.train.classify(rows, out=tmp_path / "part", resume=True, **{**options, "lr": 1e-2})
    resumed = fastbert.train.classify(rows, out=tmp_path / "part", resume=True, **options)
    assert resumed["history"] == whole["history"]
    a, b = (tmp_path / x / "model.safetensors" for x in ("whole", "part"))
    assert a.read_bytes() == b.read_bytes()


def test_two_ranks_are_one(tiny, tmp_path):
    """Each takes every second sequence of a step: the losses are those of one rank."""
    model = BertForMaskedLM.from_pretrained(tiny)
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    model.save_pretrained(tmp_path / "model")
    BertTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "model")
    train = write(tmp_path / "train.jsonl", rows_of("classify", 50))
    dev = write(tmp_path / "dev.jsonl", rows_of("classify", 20, seed=1))
    options = {"dev": dev, "model": tmp_path / "model", "epochs": 2, "lr": 1e-3, "batch_size": 8}
    one = fastbert.train.classify(train, out=tmp_path / "one", log_every=1, quiet=True, **options)
    options |= {"out": tmp_path / "two", "log_every": 1, "device": "cpu"}
    named = [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", v)]
    said = on_two_ranks("-m", "fastbert.train", "classify", train, *named)
    assert said.count("2 labels: bad, good") == said.count("14 steps, ") == 1
    two = json.loads((tmp_path / "two/metrics.json").read_text())
    for name in ("loss", "tokens"):
        alike = pytest.approx([entry[name] for entry in one["history"]], rel=1e-4)
        assert [entry[name] for entry in two["history"]] == alike
    assert two["metrics"]["accuracy"] == one["metrics"]["accuracy"]


def test_words_are_labelled_at_their_first_token(tiny):
    """Against the word numbers of transformers' tokenizer, each word in one window only."""
    task, data = data_of("tokens", tiny, n=10, max_length=6)
    theirs = AutoTokenizer.from_pretrained(tiny)
    rows = rows_of("tokens", 10)
    found = theirs(
        [row["tokens"] for row in rows],
        is_split_into_words=True,
        truncation=True,
        max_length=6,
        return_overflowing_tokens=True,
    )
    assert len(data.packed) == len(found["input_ids"]) > 10
    assert data.packed.input_ids.tolist() == [i for ids in found["input_ids"] for i in ids]
    expected, seen = [], set()
    for window, example in enumerate(found["overflow_to_sample_mapping"]):
        for word in found.word_ids(window):
            new = word is not None and (example, word) not in seen
            seen.add((example, word))
            tag = rows[example]["tags"][word] if new else None
            expected.append(IGNORED if tag is None else task.labels.index(tag))
    assert data.targets["labels"].tolist() == expected


def test_windows_of_questions(shared, minilm):
    """On real paragraphs: windows' labels are where the answers are, and scores that say so give
    them back, whichever window has them."""
    task = make_task("qa", BertTokenizer.from_pretrained(minilm), max_length=96, stride=32)
    examples = read_examples(
        shared / "data/squad/dev_articles.json.gz", task.parts, optional=task.optional
    )
    data = task.encode(examples)
    windows, positions = data.spots, data.targets["positions"]
    assert len(data.packed) > 2 * len(examples)
    found = set()
    for i, (first, last) in enumerate(positions.tolist()):
        if first:
            example, offset = windows.example[i], windows.first[i]
            start, end = windows.spans[i][first - offset][0], windows.spans[i][last - offset][1]
            text = examples.columns["answers"][example]["text"][0]
            context = examples.columns["context"][example]
            assert text in context[start:end] and len(context[start:end]) < len(text) + 12
            found.add(example)
    assert found == set(range(len(examples)))

    class Oracle(torch.nn.Module):
        """Scores that are high where the labels are: it knows a window by its tokens."""

        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))
            parts = data.packed.split(1)
            self.known = {
                tuple(part.input_ids.tolist()): p.tolist()
                for part, p in zip(parts, positions, strict=True)
            }

        def forward(self, packed):
            logits = torch.zeros(2, packed.input_ids.numel())
            for part, at in zip(packed.split(1), packed.cu_seqlens.tolist(), strict=False):
                start, end = self.known[tuple(part.input_ids.tolist())]
                logits[0, at + start], logits[1, at + end] = 10, 10
            return type("Out", (), {"start_logits": logits[0], "end_logits": logits[1]})

    predicted = task.predict(Oracle(), data, 8192)
    right = [
        metrics.squad_words(p["answer"]) == metrics.squad_words(answers["text"][0])
        for p, answers in zip(predicted, examples.columns["answers"], strict=True)
    ]
    assert np.mean(right) > 0.97  # some answers are longer than 30 tokens or end inside a word
    assert all(p["answer"] == c[p["start"] : p["end"]] for p, c in zip(
        predicted, examples.columns["context"], strict=True))  # fmt: skip


@pytest.mark.parametrize("masking", ["tokens", "words"])
def test_masks(tiny, masking, monkeypatch):
    monkeypatch.setattr("fastbert.masked._BLOCK_TOKENS", 5000)  # several blocks
    task, data = data_of("mlm", tiny, n=2000, masking=masking)
    index = np.arange(2000)
    batch = task.collate(data, index, 0)
    labels, ids = batch.labels["labels"], batch.packed.input_ids
    original = data.packed.input_ids.long()
    chosen = labels != IGNORED
    assert torch.equal(labels[chosen], original[chosen])
    assert torch.equal(ids[~chosen], original[~chosen])
    assert not set(task.tokenizer.all_special_ids) & set(labels[chosen].tolist())
    mask_id, n_plain = task.tokenizer.mask_token_id, len(task.tokenizer) - 5
    n, wanted = int(chosen.sum()), (0.15 * data.lengths).round().clip(1).sum()
    assert n == (wanted if masking == "tokens" else pytest.approx(wanted, rel=0.03))
    share = float((ids[chosen] == mask_id).sum()) / n
    assert share == pytest.approx(0.8, abs=4 * (0.16 / n) ** 0.5)
    kept = float((ids[chosen] == original[chosen]).sum()) / n
    assert kept == pytest.approx(0.1 + 0.1 / n_plain, abs=4 * (0.09 / n) ** 0.5)
    assert not torch.equal(task.collate(data, index, 1).labels["labels"], labels)
    again, _ = data_of("mlm", tiny, n=2000, masking=masking)
    part = again.collate(data, index[1500:1520], 0).labels["labels"]
    start = int(data.packed.cu_seqlens[1500])
    assert torch.equal(part, labels[start : start + len(part)])


def test_texts_of_unknown_words_are_not_masked(tiny):
    task, _ = data_of("mlm", tiny)
    with pytest.raises(ValueError, match="the vocabulary knows no word of it"):
        task.encode(read_examples(["zebra", "yak"], ("text",)))


def test_r_drop_is_the_papers(tiny):
    """Both cross entropies' mean and alpha times the mean of both divergences (Liang et al.)."""
    task, data = data_of("classify", tiny, r_drop=0.7)
    model = task.head.from_pretrained(tiny, classifier_dropout=0.3, **task.config()).train()
    batch = task.collate(data, np.arange(24), 0)
    torch.manual_seed(3)
    loss, _ = task.loss(model, batch, batch.n_items)
    torch.manual_seed(3)
    a, b = (model(batch.packed).logits.log_softmax(1) for _ in range(2))
    labels, divergence = batch.labels["labels"], torch.nn.functional.kl_div
    both = [divergence(x, y, log_target=True, reduction="batchmean") for x, y in ((a, b), (b, a))]
    nll = torch.nn.functional.nll_loss
    expected = (nll(a, labels) + nll(b, labels)) / 2 + 0.7 * (both[0] + both[1]) / 2
    torch.testing.assert_close(loss, expected)


def test_a_student_learns_what_the_teacher_says(tiny, tmp_path):
    """The teacher's word alone, on labels that are all the other way round."""
    rows = rows_of("classify", 200)
    options = dict(model=tiny, epochs=2, lr=5e-3, batch_size=16, quiet=True)
    fastbert.train.classify(rows, out=tmp_path / "teacher", **options)
    other = {"good": "bad", "bad": "good"}
    wrong = [{**row, "label": other[row["label"]]} for row in rows]
    options |= {"out": tmp_path / "student", "teacher": tmp_path / "teacher", "teaching": 1.0}
    fastbert.train.classify(wrong, **options, temperature=3.0)
    found = fastbert.train.predict(tmp_path / "student", rows)
    assert [p["label"] for p in found] == [row["label"] for row in rows]
    with pytest.raises(ValueError, match=r"the teacher's labels must be \['a', 'b'\], got"):
        fastbert.train.classify([("x", "a"), ("y", "b")], **options, overwrite=True)


def test_lora_trains_adapters_and_merges_them(tiny, tmp_path):
    pytest.importorskip("peft")
    rows = rows_of("classify", 100)
    options = dict(model=tiny, epochs=1, quiet=True)
    fastbert.train.classify(rows, out=tmp_path / "out", lora=2, **options)
    before = BertForMaskedLM.from_pretrained(tiny).bert.state_dict()
    after = fastbert.train.load(tmp_path / "out").model.bert.state_dict()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {f"encoder.layer.0.attention.self.{n}.weight" for n in ("query", "value")}


# Answers of SQuAD's evaluation: case, articles and punctuation do not count; the best truth does.
def test_scores_of_answers():
    truth = [["the Eiffel Tower!", "tower"], ["in 1984"], [], ["北京"]]
    found = metrics.answers(truth, ["eiffel tower", "1984", "", "北大"])
    assert found["exact_match"] == 50.0
    assert found["f1"] == pytest.approx(100 * (1 + 2 / 3 + 1 + 1 / 2) / 4)
    assert found["accuracy_unanswerable"] == 100.0


def test_scores_of_entities():
    truth = [["B-PER", "I-PER", "O"], ["B-LOC", "O"]]
    found = metrics.entities(truth, [["B-PER", "O", "O"], ["B-LOC", "B-LOC"]])
    assert (found["precision"], found["recall"]) == (1 / 3, 1 / 2)
    assert found["word_accuracy"] == 3 / 5
    assert set(found["per_class"]) == {"PER", "LOC"}


def test_command_line(tiny, tmp_path, capsys):
    text = "sentence\tlabel\n" + "".join(
        f"{row['sentence']}\t{row['label']}\n" for row in rows_of("classify", 200)
    )
    train, out = tmp_path / "train.tsv", tmp_path / "out"
    train.write_text(text)
    command = ["train", "classify", str(train), "--model", str(tiny), "--out", str(out)]
    options = ["--dev", str(train), "--lr", "5e-3", "--epochs", "2", "--class-weights", "balanced"]
    assert main([*command, *options]) == 0
    printed = capsys.readouterr()
    assert "text 'sentence' (a guess), label 'label' (a guess)" in printed.out
    assert re.search(r"step \d+/\d+  loss [\d.]+  [\d,]+ tokens/s  0 s left", printed.err)
    assert main(["evaluate", str(out), str(train), "--out", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores == json.loads((out / "metrics.json").read_text())["metrics"]
    capsys.readouterr()
    assert main(["predict", str(out), "--text", "the film was very bad"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] == "bad"
    assert (
        main(["predict", str(out), "--file", str(train), "--out", str(tmp_path / "p.jsonl")]) == 0
    )
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 200

    other = tmp_path / "other.tsv"
    other.write_text("sentence\tlabel\na film\tgood\na book\tdull\n")
    for arguments, message in [
        ([*command], r"out exists already; --overwrite replaces it"),
        ([*command[:-1], str(tmp_path / "new"), "--dev", str(other)],
         r"other\.tsv, line 3: unknown label 'dull'; in training there were bad, good"),
        ([*command[:-1], str(tmp_path / "new"), "--label", "kind"], r"has no column 'kind'"),
        (["evaluate", str(tiny), str(train)], r"is not a folder of fastbert train"),
        (["predict", str(out), "--text", "a", "--text-pair", "b"], r"the model wants text"),
    ]:  # fmt: skip
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {
        "train.tsv", "out", "other.tsv", "scores.json", "p.jsonl"
    }  # fmt: skip


def test_other_columns_are_guessed_again(tiny):
    task, _ = data_of("classify", tiny)
    task.columns = {"text": "sentence", "label": "label"}
    found = read_dev(task, [{"review": "good", "label": "good"}])
    assert found.columns["text"] == ["good"]
    with pytest.raises(ValueError, match="has no column 'sentence'"):
        read_dev(task, [{"x": "good", "label": "good"}])
