"""Int8 folders: what they hold, who reads them, how near they are, and what is refused."""

import csv
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastbert
import fastbert.train
from fastbert import BertConfig, BertModel, BertTokenizer
from fastbert.cli import main
from fastbert.embed import Embedder
from fastbert.int8 import Int8Linear, usual_device
from fastbert.kernels.linear_int8 import why_no_int8
from fastbert.quantization import quantize

pytestmark = [
    pytest.mark.skipif(why_no_int8() is not None, reason=str(why_no_int8())),
    pytest.mark.filterwarnings("ignore:.*initialised afresh"),
]
WORDS = ("good", "bad", "film", "book", "the", "was", "very", "not")
NAME = "model.int8.safetensors"
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
ROWS = [
    (f"the {thing} was {'very ' * n}{quality}", label)
    for thing in ("film", "book")
    for quality, label in (("good", "yes"), ("bad", "no"))
    for n in range(5)
]


def save_encoder(folder, **changes):
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocab), **SIZES, **changes)).save_pretrained(folder)
    BertTokenizer({token: i for i, token in enumerate(vocab)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{a}\t{b}\n" for a, b in ROWS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(encoder, data):
    """The float32 folder and the int8 one, and the numbers of making it."""
    folder, out = encoder.parent / "trained", encoder.parent / "int8"
    options = {"epochs": 20, "batch_size": 10, "lr": 2e-3, "quiet": True, "device": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)  # this fixture comes before conftest's
        fastbert.train.classify(data, model=encoder, out=folder, **options)
        return folder, out, quantize(folder, out, data, quiet=True)


def test_the_folder_holds_int8_and_all_the_rest(trained):
    folder, out, numbers = trained
    before, after = load_file(folder / "model.safetensors"), load_file(out / NAME)
    linear = {n for n, v in before.items() if ".layer." in n and v.dim() == 2}
    assert len(linear) == 12
    assert after.keys() == before.keys() | {f"{n}_scale" for n in linear}
    for name, value in before.items():
        if name in linear:
            made = after[name].double() * after[f"{name}_scale"].double()[:, None]
            step = value.abs().amax(1, keepdim=True).double() / 127
            assert after[name].dtype == torch.int8
            assert ((made - value).abs() <= 0.501 * step).all()
        else:
            assert torch.equal(after[name], value)
    files = {path.name for path in out.iterdir()}
    assert files >= {"config.json", "fastbert_task.json", "tokenizer.json", "metrics.json"}
    assert "model.safetensors" not in files
    assert json.loads((out / "config.json").read_text())["quantization"]["method"]
    assert json.loads((out / "metrics.json").read_text()) == numbers
    assert numbers["int8"]["megabytes"] < numbers["float32"]["megabytes"]
    assert f"| {numbers['int8']['metrics']['accuracy']:.4f} |" in (out / "README.md").read_text()


def test_both_are_scored_on_the_data(trained, data):
    folder, out, numbers = trained
    assert numbers["float32"]["metrics"] == fastbert.train.load(folder, "cpu").evaluate(data)
    assert numbers["int8"]["metrics"] == fastbert.train.evaluate(out, data)
    assert numbers["float32"]["metrics"]["accuracy"] == 1.0
    assert numbers["int8"]["metrics"]["accuracy"] >= 0.95
    assert numbers["int8"]["metrics"]["loss"] != numbers["float32"]["metrics"]["loss"]
    for column in ("float32", "int8"):
        assert numbers[column]["tokens_per_second"] > 0
        assert numbers[column]["milliseconds_a_text"] > 0


def test_from_the_command_line(trained, data, tmp_path, capsys):
    folder, _, _ = trained
    out = tmp_path / "new"
    assert main(["quantize", str(folder), str(data), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for word in ("float32", "int8", "accuracy", "tokens/s", "ms for one text", "MB of weights"):
        assert word in shown
    assert main(["evaluate", str(out), str(data)]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(["predict", str(out), "--text", "the film was very good"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] == "yes"
    assert main(["embed", str(data), "--model", str(out), "--out", str(tmp_path / "v.npy")]) == 0
    assert np.load(tmp_path / "v.npy").shape == (len(ROWS), 32)
    assert main(["quantize", str(folder), "--out", str(tmp_path / "b")]) == 0
    assert "not compared" in capsys.readouterr().out
    assert (tmp_path / "b" / NAME).read_bytes() == (out / NAME).read_bytes()


def test_saved_again_it_is_the_same(trained, tmp_path):
    _, out, _ = trained
    model = fastbert.train.load(out).model
    model.save_pretrained(tmp_path)
    first, second = load_file(out / NAME), load_file(tmp_path / NAME)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype and torch.equal(value, second[name])
    assert (tmp_path / "config.json").read_text() == (out / "config.json").read_text()


def test_an_encoder_is_compared_by_its_vectors(encoder, data, tmp_path, capsys):
    numbers = quantize(encoder, tmp_path / "a", data)
    texts = [text for text, _ in ROWS]
    exact, small = (
        Embedder.from_pretrained(folder, device="cpu").encode(texts).astype(np.float64)
        for folder in (encoder, tmp_path / "a")
    )
    cosines = (exact * small).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(small, axis=1)
    found = numbers["int8"]["metrics"]
    assert found["cosine_mean"] == pytest.approx(cosines.mean(), abs=1e-6)
    assert found["cosine_least"] == pytest.approx(cosines.min(), abs=1e-6)
    assert 0.99 < found["cosine_least"] < 1.0
    assert "cosine_least" in capsys.readouterr().out


def test_layers_are_planned_and_near_the_modules_one_by_one(trained):
    _, out, _ = trained
    model = BertModel.from_pretrained(out)
    ids = torch.randint(5, 13, (3, 20))
    plain = model(ids).last_hidden_state  # with gradients on: no plan
    assert not any(layer._plan for layer in model.encoder.layer)
    with torch.inference_mode():
        planned = model(ids).last_hidden_state
        several = model(ids, output_hidden_states=True).hidden_states
    assert all(layer._plan for layer in model.encoder.layer)
    # Rounding, of which a number of 63 may come out one higher or lower.
    torch.testing.assert_close(planned, plain, rtol=0.02, atol=0.05)
    torch.testing.assert_close(several[-1], plain)
    with torch.no_grad():  # other weights in place are noticed
        for module in model.modules():
            if isinstance(module, Int8Linear):
                module.weight_scale.mul_(0.5)
        changed = model(ids).last_hidden_state
    assert (changed - planned).abs().max() > 0.1


def test_not_for_gpus_half_precision_and_training(trained, data, tmp_path):
    _, out, _ = trained
    for_cpu = "int8 folders are for float32 inference on a CPU"
    with pytest.raises(ValueError, match=for_cpu):
        BertModel.from_pretrained(out, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"{for_cpu}.*got meta|{for_cpu}.*got cuda"):
        BertModel.from_pretrained(out, device="cuda" if torch.cuda.is_available() else "meta")
    model = BertModel.from_pretrained(out)
    for move in (model.half, model.double, lambda: model.to(torch.bfloat16)):
        with pytest.raises(ValueError, match=for_cpu):
            move()
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.int8}
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="int8 cannot be trained"):
        model.train()
    assert not model.training
    embeds = torch.randn(1, 4, 32, requires_grad=True)
    with pytest.raises(ValueError, match="int8 has no gradients"):
        model(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="cannot be trained"):
        fastbert.train.classify(data, model=out, out=tmp_path / "x", quiet=True)
    assert not list(tmp_path.iterdir())


def test_runs_on_the_cpu_where_nobody_names_a_device(trained, monkeypatch):
    folder, out, _ = trained
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert usual_device(BertConfig.from_pretrained(folder)) == "cuda"
    assert usual_device(BertConfig.from_pretrained(out)) == "cpu"
    assert fastbert.train.load(out).model.device.type == "cpu"
    assert Embedder.from_pretrained(out).device.type == "cpu"


def test_transformers_does_not_take_the_numbers_for_weights(trained):
    from transformers import AutoModel

    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModel.from_pretrained(trained[1])


def test_bad_input_is_one_line_and_leaves_nothing(trained, encoder, data, tmp_path, capsys):
    folder, out, _ = trained
    wrong = tmp_path / "wrong.tsv"
    wrong.write_text("words\tlabel\na\tyes\n", encoding="utf-8")
    empty = tmp_path / "empty.txt"
    empty.touch()
    new = tmp_path / "new"
    for command, message in (
        ([folder, wrong], "no column"),
        ([encoder, empty], "is empty"),
        ([encoder, data, "--text", "nothing"], "nothing"),
        ([encoder, tmp_path / "missing.txt"], "does not exist"),
        ([encoder, data, "--format", "conll"], "conll"),
        ([folder, data, "--text", "text"], "fastbert_task.json"),
        ([out, data], "is int8 already"),
        ([tmp_path / "missing"], "no such model folder"),
    ):
        assert main(["quantize", *map(str, command), "--out", str(new)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("fastbert: error: ") and error.count("\n") == 1
        assert message in error
        assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "wrong.tsv"]
    new.mkdir()
    assert main(["quantize", str(encoder), "--out", str(new)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["quantize", str(encoder), "--out", str(new), "--overwrite"]) == 0
    assert (new / NAME).is_file()
    assert main(["convert", str(new), str(tmp_path / "back")]) == 1
    assert "float32 weights are not in it" in capsys.readouterr().err


def test_refuses_weights_and_models_that_int8_is_not_for(encoder, tmp_path):
    model = BertModel.from_pretrained(encoder)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense\.weight: .*finite"):
        quantize(tmp_path / "nan", tmp_path / "x")
    save_encoder(tmp_path / "decoder", is_decoder=True)
    with pytest.raises(ValueError, match="for encoders"):
        quantize(tmp_path / "decoder", tmp_path / "x")
    quantize(encoder, tmp_path / "int8", quiet=True)
    with pytest.raises(ValueError, match="a folder of its own"):
        BertModel.from_pretrained(tmp_path / "int8").save_pretrained(tmp_path / "nan")
    assert not (tmp_path / "x").exists()


def test_a_real_model_keeps_its_judgement(minilm, shared, tmp_path):
    """Spearman's rank correlation on pairs of STS-B's dev set, and cosines with float32."""
    stats = pytest.importorskip("scipy.stats", reason="needs scipy")
    with open(shared / "data/stsb/en_dev.tsv", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1::3]
    quantize(minilm, tmp_path / "int8", quiet=True)
    texts, gold = [text for row in rows for text in row[:2]], [float(row[2]) for row in rows]
    rho, vectors = [], []
    for folder in (minilm, tmp_path / "int8"):
        made = Embedder.from_pretrained(folder, device="cpu", normalize=True).encode(texts)
        rho.append(stats.spearmanr((made[::2] * made[1::2]).sum(1), gold).statistic)
        vectors.append(made)
    assert rho[0] > 0.8
    assert abs(rho[0] - rho[1]) < 0.005
    assert (vectors[0] * vectors[1]).sum(1).min() > 0.98
