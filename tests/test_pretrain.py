"""Pretraining: the losses are those of the models, and a run is the same however it is run."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from safetensors.torch import load_file
from torchrun import on_two_ranks

import fastbert.pretrain
from fastbert import BertForPreTraining, BertTokenizer
from fastbert.cli import main
from fastbert.instances import Instances, hold_out
from fastbert.lamb import LAMB
from fastbert.masking import Vocabulary
from fastbert.pretrain import Recipe, pretrain
from fastbert.scored import Scored, evaluate, held_out_batches, loss_of
from fastbert.shards import Corpus

WORDS = [f"w{i}" for i in range(123)]  # and 5 special tokens: halves of whole SIMD vectors
OPTIONS = {
    "steps": 6, "size": "tiny", "batch_tokens": 512, "second_share": 0.34, "second_length": 256,
    "evaluations": 2, "held_out": 0.05, "log_every": 1, "dropout": 0.0, "quiet": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A vocabulary and a text in which a word tells the next one."""
    folder = tmp_path_factory.mktemp("data")
    vocab = {t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizer(vocab).save_pretrained(folder / "vocab")
    rng = np.random.default_rng(0)
    with (folder / "a.txt").open("w") as file:
        for _ in range(100):
            first = rng.integers(123)
            for _ in range(rng.integers(2, 12)):
                n = rng.integers(3, 30)
                file.write(" ".join(f"w{(first + 3 * i) % 123}" for i in range(n)) + "\n")
            file.write("\n")
    return folder


def run(data, out, **options):
    return pretrain([data / "a.txt"], vocab=data / "vocab", out=out, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "model"
    corpus = out.with_name("corpus")
    with pytest.MonkeyPatch.context() as patch:  # as conftest.py does for each test
        patch.delenv("TRITON_INTERPRET", raising=False)
        return out, corpus, run(data, out, corpus=corpus)


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_same(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_numbers_and_files(trained):
    out, _, numbers = trained
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json", "loss.png", "metrics.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "vocab.txt",
    ]  # fmt: skip
    assert not out.with_name("model.parts").exists()
    saved = json.loads((out / "metrics.json").read_text())
    assert saved == json.loads(json.dumps(numbers))
    assert [e["step"] for e in saved["history"]] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in saved["evaluations"]] == [3, 6]
    first = saved["history"][0]
    assert abs(first["mlm_loss"] - math.log(128)) < 0.2 and first["lr"] > 0
    assert first["loss"] == pytest.approx(first["mlm_loss"] + first["nsp_loss"])
    assert saved["metrics"]["perplexity"] == pytest.approx(math.exp(saved["metrics"]["mlm_loss"]))


def test_transformers_reads_the_model(trained):
    transformers = pytest.importorskip("transformers")
    out, *_ = trained
    ours = BertForPreTraining.from_pretrained(out)
    theirs = transformers.BertForPreTraining.from_pretrained(out).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    given = tokenizer("w1 w4 [MASK] w10", "w3 w6", return_tensors="pt")
    found, wanted = ours(**given), theirs(**given)
    exact = theirs.double()(**given)
    for name in ("prediction_logits", "seq_relationship_logits"):
        assert_as_accurate(found[name], wanted[name], exact[name])


def test_learns_from_what_is_around(data, tmp_path):
    """All words are as frequent: without context the loss of held-out ones stays at ln(123)."""
    numbers = run(data, tmp_path / "m", steps=150, batch_tokens=1024, second_share=0.0, lr=3e-3)
    assert numbers["metrics"]["mlm_loss"] < 0.9 * math.log(123)


# With the relationship of two texts, and of one text.
@pytest.mark.parametrize("nsp", [True, False])
def test_losses_are_the_models_own(data, trained, nsp):
    """Of a step of several batches: of the whole, as one batch's loss would be."""
    _, folder, _ = trained
    corpus, tokenizer = Corpus(folder), BertTokenizer.from_pretrained(data / "vocab")
    train, held = hold_out(corpus, 0.2)
    config = Recipe(steps=1, size="tiny", dropout=0.0).config(tokenizer)
    head = fastbert.BertForPreTraining if nsp else fastbert.BertForMaskedLM
    model = head(config).double()
    scored = Scored(model)
    instances = Instances(corpus, train, Vocabulary(tokenizer), 64, nsp, batch_tokens=512)
    batches = held_out_batches(instances, held, 1500)
    assert len(batches) == 3 or len(batches) == 4
    items = {n: sum(b.n_items[n] for b in batches) for n in batches[0].n_items}
    loss = sum(loss_of(scored, batch, items)[0] for batch in batches)

    logits, labels, relations, follows = [], [], [], []
    for batch in batches:
        out = model(batch.packed, output_logits=True)
        logits.append(out.prediction_logits if nsp else out.logits)
        labels.append(batch.labels["labels"])
        if nsp:
            relations.append(out.seq_relationship_logits)
            follows.append(batch.labels["next_sentence_label"])
    logits, labels = torch.cat(logits), torch.cat(labels)
    masked = F.cross_entropy(logits, labels)
    wanted = {"mlm_loss": masked}
    picked = labels != -100
    wanted["mlm_accuracy"] = (logits[picked].argmax(1) == labels[picked]).double().mean()
    wanted["perplexity"] = masked.exp()
    if nsp:
        relations, follows = torch.cat(relations), torch.cat(follows)
        wanted["nsp_loss"] = F.cross_entropy(relations, follows)
        wanted["nsp_accuracy"] = (relations.argmax(1) == follows).double().mean()
    wanted["loss"] = masked + wanted.get("nsp_loss", 0)
    found = evaluate(scored, batches, False)
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(loss, wanted["loss"])
    for name, value in wanted.items():
        torch.testing.assert_close(torch.tensor(found[name]).double(), value.detach())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lamb_is_its_formula(weight_decay):
    torch.manual_seed(1)
    start = [torch.randn(5, 3).double(), torch.randn(4).double(), torch.zeros(2, 2).double()]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(5)]
    params = [p.clone().requires_grad_() for p in start]
    lamb = LAMB(params, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=weight_decay)
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g
        lamb.step()
    for i, x in enumerate(start):
        m = v = torch.zeros_like(x)
        for t, step in enumerate(gradients, 1):
            m, v = 0.8 * m + 0.2 * step[i], 0.9 * v + 0.1 * step[i] ** 2
            u = m / (1 - 0.8**t) / ((v / (1 - 0.9**t)).sqrt() + 1e-3) + weight_decay * x
            ratio = x.norm() / u.norm() if weight_decay and x.norm() > 0 else 1.0
            x = x - 0.1 * ratio * u
        torch.testing.assert_close(params[i].detach(), x)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_stopped_and_resumed_is_the_same(data, trained, tmp_path, monkeypatch, optimizer):
    corpus = trained[1]
    changes = {"optimizer": optimizer, "corpus": corpus, "dropout": 0.1}
    run(data, tmp_path / "whole", **changes)
    calls = 0

    def stopped(*args):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return loss_of(*args)

    changes["save_every"] = 2
    monkeypatch.setattr("fastbert.pretrain.loss_of", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "m", **changes)
    monkeypatch.setattr("fastbert.pretrain.loss_of", loss_of)
    with pytest.raises(ValueError, match="holds a run that was stopped"):
        run(data, tmp_path / "m", **changes)
    with pytest.raises(ValueError, match="of other settings"):
        run(data, tmp_path / "m", **changes, resume=True, mask_rate=0.2)
    run(data, tmp_path / "m", **changes, resume=True)
    assert_same(tmp_path / "m", tmp_path / "whole")


# Without clipping, whose norm FSDP2 sums in another order, and dropout, whose numbers are a rank's.
ALIKE = {"max_grad_norm": 0.0}


@pytest.fixture(scope="module")
def on_one_rank(data, trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "model"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun gives each rank: others add in another order
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            run(data, out, **ALIKE, accumulate=2, corpus=trained[1])
    finally:
        torch.set_num_threads(threads)
    return out


def command_line(**options):
    named = {name.replace("_", "-"): value for name, value in options.items() if name != "quiet"}
    return [x for name, value in named.items() for x in (f"--{name}", value)]


def test_two_ranks_are_one_with_twice_the_batch(data, trained, on_one_rank, tmp_path):
    given = command_line(**OPTIONS, **ALIKE, vocab=data / "vocab", out=tmp_path / "m")
    on_two_ranks("-m", "fastbert.pretrain", trained[1], *given)
    assert_same(on_one_rank, tmp_path / "m")


def test_two_ranks_of_fsdp_are_one_too_and_go_on(data, trained, on_one_rank, tmp_path):
    given = command_line(**OPTIONS, **ALIKE, vocab=data / "vocab", out=tmp_path / "m")
    given = [trained[1], *given, "--save-every", 2, "--fsdp"]
    on_two_ranks(Path(__file__).parent / "support/two_pretraining.py", *given)
    checkpoint = tmp_path / "m.parts/checkpoints/step-000000004.pt"
    moment = torch.load(checkpoint, weights_only=True)["optimizer"]["state"][0]["exp_avg"]
    assert moment.shape == (128, 128)  # whole: that of the word embeddings
    on_two_ranks("-m", "fastbert.pretrain", *given, "--resume")
    assert_same(on_one_rank, tmp_path / "m")


def test_minutes_become_steps_and_trying_changes_nothing(data, trained, tmp_path, monkeypatch):
    tried = []

    def seconds(*args):
        tried.append(try_it(*args))
        return 9.0

    try_it = fastbert.pretrain._seconds_a_step
    monkeypatch.setattr("fastbert.pretrain._SECONDS_TRIED", 0.0)
    monkeypatch.setattr("fastbert.pretrain._seconds_a_step", seconds)
    changes = {"steps": None, "minutes": 1, "corpus": trained[1]}
    assert run(data, tmp_path / "m", **changes)["steps"] == round(0.95 * 60 / 9) == 6
    assert tried[0] > 0
    assert_same(tmp_path / "m", trained[0])


def test_one_text_and_sinusoidal_positions(data, trained, tmp_path):
    numbers = run(data, tmp_path / "m", nsp=False, positions="sinusoidal", corpus=trained[1],
                  masking="spans")  # fmt: skip
    assert "nsp_loss" not in numbers["metrics"]
    table = weights(tmp_path / "m")["bert.embeddings.position_embeddings.weight"]
    wanted = torch.tensor([math.sin(7 / 10000 ** (4 / 128)), math.cos(7 / 10000 ** (4 / 128))])
    torch.testing.assert_close(table[7, 4:6], wanted)


def test_sizes_are_googles():
    """Millions of parameters with a vocabulary of 30,522, as google-research/bert's README has."""
    wanted = {"tiny": 4.4, "mini": 11.3, "small": 29.1, "medium": 41.7, "base": 110.1}
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(30_517))]
    tokenizer = BertTokenizer({token: id for id, token in enumerate(tokens)})
    for size, millions in wanted.items():
        with torch.device("meta"):
            model = BertForPreTraining(Recipe(steps=1, size=size).config(tokenizer))
        assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) <= 0.1
    config = Recipe(steps=1, size="large").config(tokenizer)
    shape = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    assert (*shape, config.intermediate_size) == (24, 1024, 16, 4096)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "give steps or minutes, one of them"),
        ({"steps": 1, "minutes": 1}, "give steps or minutes, one of them"),
        ({"steps": 0}, "must be above 0, got 0"),
        ({"steps": 1, "size": "huge"}, "size must be one of tiny"),
        ({"steps": 1, "optimizer": "sgd"}, "optimizer must be adamw or lamb, got 'sgd'"),
    ],
)
def test_recipe_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_the_command_line_says_what_is_wrong(data, trained, tmp_path, capsys):
    out, corpus, _ = trained
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.txt").write_bytes(b"w1 w2\n\xfe\n")
    common = ["--vocab", str(data / "vocab"), "--steps", "1", "--size", "tiny"]
    new = str(tmp_path / "new")
    for args, message in (
        ([str(tmp_path / "empty.txt"), "--out", new], "no documents are left of"),
        ([str(tmp_path / "bad.txt"), "--out", new], "bad.txt, line 2: byte 0xfe"),
        ([str(tmp_path / "none.txt"), "--out", new], "does not exist"),
        ([str(corpus), "--out", str(out)], "exists already; --overwrite replaces it"),
        ([str(corpus), "--out", new, "--batch-tokens", "9"], "batch_tokens must be at least"),
    ):
        assert main(["pretrain", *args, *common]) == 1
        assert message in capsys.readouterr().err
        assert not Path(new).exists()
    assert main(["pretrain", str(corpus), "--out", new, *common, "--second-share", "0",
                 "--eval-tokens", "500"]) == 0  # fmt: skip
    assert "nsp_accuracy" in capsys.readouterr().out
