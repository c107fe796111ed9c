import json

import pytest

from fastbert import BertConfig


def test_defaults_are_bert_base_as_in_transformers():
    transformers = pytest.importorskip("transformers")
    ours, theirs = BertConfig(), transformers.BertConfig()
    not_there = ("output_attentions", "position_embedding_type", "return_dict")
    for name in (f for f in ours.to_dict() if f not in not_there):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_reads_every_published_configuration(shared):
    files = sorted((shared / "data/configs").glob("*.json"))
    assert files
    for path in files:
        config, values = BertConfig.from_file(path), json.loads(path.read_text())
        assert {name: getattr(config, name) for name in values} == values


def test_saved_and_read_again_is_the_same(tmp_path):
    config = BertConfig(
        hidden_size=48, num_attention_heads=3, id2label={0: "no"}, extra={"task": "x"}
    )
    config.save_pretrained(tmp_path / "new")
    assert BertConfig.from_pretrained(tmp_path / "new") == config
    assert config.task == "x" and config.num_labels == 1
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["config.json"]


def test_assignments_are_checked_and_saved(tmp_path):
    config = BertConfig()
    config.num_labels, config.task, config.use_cache = 3, "x", False
    assert config.id2label[2] == "LABEL_2" and config.task == "x"
    with pytest.raises(ValueError, match="hidden_size must be a whole number of at least 1, got 0"):
        config.hidden_size = 0
    assert config.hidden_size == 768
    config.save_pretrained(tmp_path)
    assert BertConfig.from_pretrained(tmp_path) == config != BertConfig()


def test_labels_follow_from_each_other():
    assert BertConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    named = BertConfig.from_dict({"id2label": {"0": "no", "1": "maybe", "2": "yes"}})
    assert named.num_labels == 3 and named.label2id == {"no": 0, "maybe": 1, "yes": 2}
    assert BertConfig(label2id={"a": 0, "b": 1}).id2label == {0: "a", 1: "b"}
    assert named.replace(id2label={0: "a"}).label2id == {"a": 0}
    assert named.replace(num_labels=3) == named
    assert named.replace(num_labels=2) == BertConfig()
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertConfig.from_dict(named.to_dict())
    assert (theirs.num_labels, theirs.id2label) == (3, named.id2label)


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
        ({"num_labels": 0}, "num_labels must be None or a whole number of at least 1, got 0"),
        ({"classifier_dropout": 2}, "classifier_dropout must be None or a number from 0.*got 2"),
        ({"problem_type": "ranking"}, "problem_type must be None or one of regression,.*'ranking'"),
        (
            {"problem_type": "single_label_classification", "num_labels": 1},
            "num_labels of at least 2, got 1",
        ),
        ({"pad_token_id": 30522}, "pad_token_id must be None or an id below.*got 30522"),
        ({"model_type": "roberta"}, "model_type must be 'bert', got 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "must be one of .*got .relative_key."),
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
