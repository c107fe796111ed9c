"""accelerate in the programs people have: sentence-transformers, Trainer, pipelines, DDP, FSDP."""

import copy
import csv

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accuracy import relative_error
from two_processes import small

import fastbert
from fastbert import drop_in

transformers = pytest.importorskip("transformers")

LIMIT = 2e-5
WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat", "and",
    "dog", "ran", "far", "from", "it", "##s", "##ing", "of", "to", "in",
]  # fmt: skip
TEXTS = ["the cat sat on a mat", "dog", "it ran far from the dog and a cat and the mat", "cats ran"]


@pytest.fixture
def tokenizer(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))


def fast_encoders(model):
    """How many there are; none may have taken its own code."""
    states = [drop_in._STATES[m] for m in model.modules() if drop_in._is_fast(m)]
    assert not any(state.calls for state in states), [state.calls for state in states]
    return len({id(state) for state in states})


def ranks(x):
    return x.argsort().argsort()


def test_sentence_transformer(minilm, shared):
    """Vectors of STS-B's pairs, and the ranking of the pairs by them."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    with open(shared / "data/stsb/en_dev.tsv", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:301]
    model = sentence_transformers.SentenceTransformer(str(minilm), device="cpu")

    def vectors():
        return [model.encode([row[i] for row in rows], convert_to_tensor=True) for i in (0, 1)]

    wanted = vectors()
    report = fastbert.accelerate(model)
    found = vectors()
    assert len(report.fast) == 1 and not report.slow and fast_encoders(model) == 1
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) < LIMIT
    similar = [torch.cosine_similarity(*pair) for pair in (found, wanted)]
    # The same order, but for pairs that are closer than rounding.
    moved = ranks(similar[0]) != ranks(similar[1])
    assert (similar[1].sort().values.diff().min() < 1e-6) or not moved.any()
    assert moved.float().mean() < 0.02
    fastbert.restore(model)
    assert torch.equal(vectors()[0], wanted[0])


def test_cross_encoder(tokenizer, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    small("BertForSequenceClassification", num_labels=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = sentence_transformers.CrossEncoder(str(tmp_path), device="cpu")
    pairs = [(a, b) for a in TEXTS for b in TEXTS]
    wanted = model.predict(pairs, convert_to_tensor=True)
    report = fastbert.accelerate(model)
    found = model.predict(pairs, convert_to_tensor=True)
    assert relative_error(found, wanted) < LIMIT and len(report.fast) == 1 and not report.calls


@pytest.mark.parametrize(
    "task, name",
    [
        ("text-classification", "BertForSequenceClassification"),
        ("token-classification", "BertForTokenClassification"),
        ("fill-mask", "BertForMaskedLM"),
        ("feature-extraction", "BertModel"),
    ],
)
def test_pipelines(task, name, tokenizer):
    pipeline = transformers.pipeline(task, model=small(name), tokenizer=tokenizer, device="cpu")
    texts = [text + " [MASK]" for text in TEXTS] if task == "fill-mask" else TEXTS
    wanted = pipeline(texts, batch_size=4)
    report = fastbert.accelerate(pipeline)
    found = pipeline(texts, batch_size=4)

    def parts(x):
        """All that is in it, in order."""
        if isinstance(x, dict):
            x = list(x.values())
        return [part for y in x for part in parts(y)] if isinstance(x, (list, tuple)) else [x]

    if task == "feature-extraction":  # vectors of padding are the pipeline's too
        lengths = [len(tokenizer(text).input_ids) for text in texts]
        found, wanted = (
            [[row[:n] for row in x] for x, n in zip(out, lengths, strict=True)]
            for out in (found, wanted)
        )
    found, wanted = parts(found), parts(wanted)
    numbers = [i for i, x in enumerate(wanted) if not isinstance(x, (str, int, type(None)))]
    a, b = (torch.tensor([float(x[i]) for i in numbers]) for x in (found, wanted))
    assert relative_error(a, b) < LIMIT and len(numbers) > 3
    assert all(found[i] == x for i, x in enumerate(wanted) if i not in numbers)
    assert len(report.fast) == 1 and not report.calls


def test_trainer(tokenizer, tmp_path):
    """The same curve of losses, and the same weights saved."""
    pytest.importorskip(
        "accelerate", reason="transformers' Trainer needs Hugging Face's accelerate"
    )
    torch.manual_seed(0)
    data = [
        {
            **tokenizer(" ".join(WORDS[5 + (i * k) % 12] for k in range(1, 3 + i % 9))),
            "label": i % 2,
        }
        for i in range(48)
    ]

    def train(model):
        arguments = transformers.TrainingArguments(
            tmp_path / "out", num_train_epochs=2, per_device_train_batch_size=8, logging_steps=1,
            learning_rate=1e-3, report_to="none", save_strategy="no", use_cpu=True, seed=3,
            disable_tqdm=True, gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=data,
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
        )  # fmt: skip
        trainer.train()
        trainer.save_model(tmp_path / "saved")
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    model = small("BertForSequenceClassification", num_labels=2)
    other = copy.deepcopy(model)
    wanted = train(model)
    report = fastbert.accelerate(other)
    found = train(other)
    assert len(found) == 6 and len(set(found)) > 3
    assert all(abs(a - b) < 1e-4 for a, b in zip(found, wanted, strict=True))
    assert not report.calls
    saved = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    for a, b in zip(saved.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes(tmp_path):
    """Gradients are the mean over ranks of those of the model by itself, however it is shared."""
    two_processes = pytest.importorskip("two_processes", reason="needs torch's FSDP2")
    model = small("BertForSequenceClassification", num_labels=2).train()
    for rank in range(2):
        (model(**two_processes.rank_batch(rank)).loss / 2).backward()
    mp.spawn(two_processes.on_one_rank, (f"file://{tmp_path}/meet", str(tmp_path)), nprocs=2)
    scale = max(p.grad.abs().max() for p in model.parameters())
    for rank in range(2):
        for kind, (gradients, calls) in torch.load(tmp_path / f"{rank}.pt").items():
            assert not calls, kind
            for name, p in model.named_parameters():
                assert (gradients[name] - p.grad).abs().max() < 1e-4 * scale, (kind, name)
