import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastbert import BertConfig, BertModel, convert
from fastbert.weights import read_tensors

transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=20,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
)


@pytest.fixture
def theirs():
    return transformers.BertModel(transformers.BertConfig(**SIZES)).eval()


@pytest.fixture
def folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def assert_same(model, wanted):
    state = model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


def rewrite(folder, change):
    """Pass the folder's tensors through `change`."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def test_saved_and_read_again_is_bit_equal(folder, theirs, tmp_path):
    ours = BertModel.from_pretrained(folder)
    assert not ours.training and ours.dtype == torch.float32
    ours.save_pretrained(tmp_path / "ours")
    assert_same(BertModel.from_pretrained(tmp_path / "ours"), theirs.state_dict())
    back, info = transformers.BertModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert_same(back, theirs.state_dict())
    assert not any(info.values())
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {"config.json", "model.safetensors"}


def test_shards(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same(BertModel.from_pretrained(tmp_path), theirs.state_dict())
    first = min(tmp_path.glob("model-*.safetensors"))
    first.unlink()
    with pytest.raises(FileNotFoundError, match=f"names files that are not there: {first.name}"):
        BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("legacy_zip", [True, False])
def test_pytorch_file(folder, theirs, legacy_zip):
    state = theirs.state_dict()
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): v
        for n, v in state.items()
    }
    old["embeddings.position_ids"] = torch.arange(12)[None]
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(old, path, _use_new_zipfile_serialization=not legacy_zip)
    assert_same(BertModel.from_pretrained(folder), state)


@pytest.mark.parametrize("kind", ["BertForPreTraining", "BertForSequenceClassification"])
def test_a_headed_checkpoint(kind, tmp_path):
    headed = getattr(transformers, kind)(transformers.BertConfig(**SIZES))
    headed.save_pretrained(tmp_path)
    without = kind != "BertForPreTraining"
    with warnings.catch_warnings():
        if not without:
            warnings.simplefilter("error")
        model, info = BertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert_same(model, headed.bert.state_dict())
    assert info["missing_keys"] == [] and len(info["unexpected_keys"]) > 1
    assert not any(name.startswith("bert.") for name in info["unexpected_keys"])


def test_dtype_and_device(folder):
    model = BertModel.from_pretrained(folder, dtype="bfloat16", device="meta")
    assert model.dtype == torch.bfloat16 and model.device.type == "meta"
    assert BertModel.from_pretrained(folder, dtype=torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="floating dtype such as 'float32', got 'int8'"):
        BertModel.from_pretrained(folder, dtype="int8")


def test_a_missing_pooler_is_made_and_said(folder):
    rewrite(folder, lambda t: {n: v for n, v in t.items() if not n.startswith("pooler.")})
    with pytest.warns(UserWarning, match=r"no pooler\.dense\.weight, pooler\.dense\.bias: init"):
        model, info = BertModel.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == ["pooler.dense.weight", "pooler.dense.bias"]
    assert 0.01 < model.pooler.dense.weight.std() < 0.03 and model.pooler.dense.bias.eq(0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BertModel.from_pretrained(folder, add_pooling_layer=False)


def test_a_pooler_not_wanted_is_left_out(folder):
    model, info = BertModel.from_pretrained(
        folder, add_pooling_layer=False, output_loading_info=True
    )
    assert model.pooler is None
    assert info["unexpected_keys"] == ["pooler.dense.bias", "pooler.dense.weight"]


def test_all_that_does_not_fit_is_listed(folder):
    def change(tensors):
        tensors["encoder.layer.7.output.dense.bias"] = torch.zeros(16)
        tensors["embeddings.LayerNorm.bias"] = torch.zeros(15)
        del tensors["encoder.layer.1.attention.self.key.weight"]
        return tensors

    rewrite(folder, change)
    with pytest.raises(ValueError) as error:
        BertModel.from_pretrained(folder)
    message = str(error.value)
    assert "missing encoder.layer.1.attention.self.key.weight" in message
    assert "unexpected encoder.layer.7.output.dense.bias" in message
    assert "embeddings.LayerNorm.bias has shape (15,), wanted (16,)" in message


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "noise"])
def test_a_damaged_file_is_named(folder, theirs, name, damage):
    path = folder / name
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    if name.endswith("bin"):
        (folder / "model.safetensors").unlink()
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-100], "empty": b"", "noise": b"\x93" * 4000}[damage])
    with pytest.raises(ValueError, match=f"{name} is truncated or not a file of weights"):
        BertModel.from_pretrained(folder)


class Evil:
    def __reduce__(self):
        return (print, ("a pickle ran code",))


def test_a_pickle_runs_no_code(folder, capfd):
    (folder / "model.safetensors").unlink()
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is truncated or not a file of"):
        BertModel.from_pretrained(folder)
    assert "ran code" not in capfd.readouterr().out


def test_no_weights(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights: looked for model\.safetensors"):
        BertModel.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="wanted a model folder or hub id, got the file"):
        BertModel.from_pretrained(folder / "config.json")


def test_a_failed_save_leaves_the_old_file(folder, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def fail(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("no space left on device")

    model = BertModel.from_pretrained(folder)
    monkeypatch.setattr("fastbert.weights.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(folder.glob(".*"))


def test_tensorflow_names_cover_a_whole_pretraining_checkpoint(shared, tmp_path):
    source = shared / "models/tf1_keras_bert_test_checkpoint"
    report = convert(source, tmp_path / "out")
    assert report["architecture"] == "BertForPreTraining" and report["missing"] == []
    theirs, info = transformers.BertForPreTraining.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    direct, converted = (
        BertModel.from_pretrained(source),
        BertModel.from_pretrained(tmp_path / "out"),
    )
    assert_same(direct, converted.state_dict())
    ids = torch.randint(0, 15, (3, 16))
    with torch.no_grad():
        out, wanted = direct(ids), theirs.bert.eval()(ids)
    torch.testing.assert_close(out[0], wanted[0], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(out[1], wanted[1], rtol=2e-5, atol=1e-6)
    assert (tmp_path / "out/vocab.txt").read_bytes() == (source / "vocab.txt").read_bytes()


def test_tensorflow_kernels_are_transposed(shared):
    from fastbert.files import find_checkpoint
    from fastbert.tf_checkpoint import load_tf_checkpoint

    source = shared / "models/tf1_keras_bert_test_checkpoint"
    kernel = load_tf_checkpoint(source)["bert/encoder/layer_1/intermediate/dense/kernel"]
    tensors = read_tensors(find_checkpoint(source))
    assert kernel.shape == (4, 16)
    ours = tensors["bert.encoder.layer.1.intermediate.dense.weight"]
    assert torch.equal(ours, torch.from_numpy(kernel).T)


def test_tensorflow_without_its_data(shared):
    with pytest.raises(FileNotFoundError, match=r"model\.ckpt-40000\.data-00000-of-00001"):
        BertModel.from_pretrained(shared / "models/tf1_index_only_base12")


def test_convert_keeps_heads_and_refuses_to_overwrite(tmp_path):
    headed = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).eval()
    headed.save_pretrained(tmp_path / "in")
    (tmp_path / "in/vocab.txt").write_text("[PAD]\n")
    report = convert(tmp_path / "in", tmp_path / "out")
    assert report["architecture"] == "BertForMaskedLM" and report["format"] == "safetensors"
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [
        "BertForMaskedLM"
    ]
    back = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out")
    assert_same(back, headed.state_dict())
    with pytest.raises(FileExistsError, match="exists already: give the name of a new folder"):
        convert(tmp_path / "in", tmp_path / "out")


def test_convert_leaves_nothing_behind_after_an_error(tmp_path):
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path / "in")
    rewrite(tmp_path / "in", lambda t: {n: v for n, v in t.items() if "layer.1" not in n})
    with pytest.raises(ValueError, match=r"missing encoder\.layer\.1"):
        convert(tmp_path / "in", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
