import json

import pytest

from fastbert import BertConfig


def test_defaults_are_bert_base_as_in_transformers():
    transformers = pytest.importorskip("transformers")
    ours, theirs = BertConfig(), transformers.BertConfig()
    for name in (f for f in ours.to_dict() if f not in ("output_attentions", "return_dict")):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_reads_every_published_configuration(shared):
    files = sorted((shared / "data/configs").glob("*.json"))
    assert files
    for path in files:
        config, values = BertConfig.from_file(path), json.loads(path.read_text())
        assert {name: getattr(config, name) for name in values} == values


def test_saved_and_read_again_is_the_same(tmp_path):
    config = BertConfig(hidden_size=48, num_attention_heads=3, extra={"id2label": {"0": "no"}})
    config.save_pretrained(tmp_path / "new")
    assert BertConfig.from_pretrained(tmp_path / "new") == config
    assert config.id2label == {"0": "no"}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["config.json"]


def test_changes_are_checked_again():
    assert BertConfig().replace(num_hidden_layers=0).num_hidden_layers == 0
    with pytest.raises(ValueError, match=r"num_hidden_layers must be a whole number.*got -1"):
        BertConfig().replace(num_hidden_layers=-1)
    with pytest.raises(AttributeError, match="no attribute 'heads'"):
        _ = BertConfig().heads


@pytest.mark.parametrize(
    "values, message",
    [
        ({"vocab_size": 0}, "vocab_size must be a whole number of at least 1, got 0"),
        ({"hidden_size": "768"}, "hidden_size must be a whole number of at least 1, got '768'"),
        ({"hidden_size": 100}, "hidden_size must be a multiple of num_attention_heads = 12"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob must be a number from 0 to 1, got 1.5"),
        ({"hidden_act": "swish"}, "hidden_act must be one of gelu, .*got 'swish'"),
        ({"pad_token_id": 30522}, "pad_token_id must be None or an id below.*got 30522"),
        ({"model_type": "roberta"}, "model_type must be 'bert', got 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "must be 'absolute', got 'relative_key'"),
    ],
)
def test_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        BertConfig.from_dict(values)


@pytest.mark.parametrize("text", ["", "[1]", '{"vocab_size": 1', "\xff"])
def test_a_file_that_is_no_configuration_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json is not a BERT configuration"):
        BertConfig.from_file(path)


def test_no_configuration(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json or bert_config\.json"):
        BertConfig.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        BertConfig.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a model that the hub"):
        BertConfig.from_pretrained("no-such-org/no-such-model")
