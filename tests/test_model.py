import copy
import math
import pickle

import pytest
import torch
from accuracy import assert_as_accurate, prepacks_bfloat16, relative_error

from fastbert import BertConfig, BertModel, pack, unpack

transformers = pytest.importorskip("transformers")

SMALL = dict(
    vocab_size=99,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=80,
    max_position_embeddings=40,
)
LENGTHS = (7, 40, 1, 7, 22)


def pair(dtype=torch.float32, **changes):
    """Ours and transformers', with the same random weights."""
    values = {**SMALL, **changes}
    theirs = transformers.BertModel(transformers.BertConfig(**values)).to(dtype).eval()
    with torch.no_grad():
        for p in theirs.parameters():  # biases and norms are not left at zero and one
            p.add_(torch.randn_like(p), alpha=0.1)
    ours = BertModel(BertConfig(**values)).to(dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def batch(lengths=LENGTHS, vocab=99, types=2):
    longest = max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return {
        "input_ids": torch.randint(0, vocab, mask.shape),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, types, mask.shape),
    }


def assert_equal_on_real_tokens(out, wanted, mask, limit=2e-5):
    real = mask.bool()
    assert relative_error(out.last_hidden_state[real], wanted.last_hidden_state[real]) < limit
    assert relative_error(out.pooler_output, wanted.pooler_output) < limit
    assert out.last_hidden_state[~real].abs().sum() == 0


# With gradients the modules run; without, the prepacked plan: both must be right.
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 24},
        {"hidden_size": 80, "num_attention_heads": 5, "intermediate_size": 33},
        {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
        {"hidden_act": "relu", "type_vocab_size": 5},
        {"hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 64},
        {"num_hidden_layers": 0, "pad_token_id": None},
    ],
)
def test_equals_transformers(changes, grad):
    ours, theirs = pair(**changes)
    inputs = batch(types=changes.get("type_vocab_size", 2))
    with torch.set_grad_enabled(grad):
        out, wanted = ours(**inputs), theirs(**inputs)
    assert_equal_on_real_tokens(out, wanted, inputs["attention_mask"])


def test_equals_transformers_on_the_real_minilm(minilm):
    ours = BertModel.from_pretrained(minilm)
    theirs = transformers.BertModel.from_pretrained(minilm).eval()
    inputs = batch(vocab=30522)
    with torch.inference_mode():
        out, wanted = ours(**inputs), theirs(**inputs)
    assert_equal_on_real_tokens(out, wanted, inputs["attention_mask"])


def test_equals_transformers_on_the_coldfire_checkpoint(shared):
    folder = shared / "models/hf_tiny_bert_coldfire"
    ours = BertModel.from_pretrained(folder, add_pooling_layer=False)
    theirs = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    inputs = batch(vocab=256)
    real = inputs["attention_mask"].bool()
    with torch.inference_mode():
        out, wanted = ours(**inputs), theirs(**inputs)
    assert relative_error(out[0][real], wanted[0][real]) < 2e-5
    assert out.pooler_output is None and list(out.keys()) == ["last_hidden_state"]


# Prepacked in bfloat16 as on a CPU that multiplies it (elsewhere emulated: slow, and as exact),
# prepacked in float32 as on other CPUs, and module by module.
@pytest.mark.parametrize("prepacked, native", [(True, True), (True, False), (False, False)])
def test_bfloat16_is_as_accurate_as_transformers(prepacked, native, monkeypatch):
    if native and not prepacks_bfloat16():
        pytest.skip("oneDNN has no bfloat16 on this CPU, not even emulated")
    monkeypatch.setattr("fastbert.inference.native_bfloat16", lambda: native)
    ours, theirs = pair(torch.bfloat16)
    exact = copy.deepcopy(theirs).double()
    inputs = batch()
    real = inputs["attention_mask"].bool()
    with torch.set_grad_enabled(not prepacked):
        out, baseline, wanted = ours(**inputs), theirs(**inputs), exact(**inputs)
    assert out.last_hidden_state.dtype == torch.bfloat16
    assert_as_accurate(out[0][real], baseline[0][real], wanted[0][real])


def test_float64_and_float16_run():
    for dtype in (torch.float64, torch.float16):
        ours, theirs = pair(dtype)
        inputs = batch()
        with torch.inference_mode():
            out, wanted = ours(**inputs), theirs(**inputs)
        limit = 1e-12 if dtype == torch.float64 else 2e-2
        assert_equal_on_real_tokens(out, wanted, inputs["attention_mask"], limit)


@torch.inference_mode()
def test_packed_equals_padded():
    ours, _ = pair()
    inputs = batch()
    out = ours(**inputs)
    packed = pack(inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"])
    flat = ours(packed)
    assert flat.last_hidden_state.shape == (sum(LENGTHS), 48)
    assert torch.equal(unpack(flat.last_hidden_state, packed), out.last_hidden_state)
    assert torch.equal(flat.pooler_output, out.pooler_output)


@torch.inference_mode()
def test_one_sequence_does_not_change_another():
    ours, _ = pair()
    inputs = batch()
    before = ours(**inputs).last_hidden_state
    inputs["input_ids"][1] = torch.randint(0, 99, (40,))
    after = ours(**inputs).last_hidden_state
    rows = [0, 2, 3, 4]
    assert torch.equal(before[rows], after[rows]) and not torch.equal(before[1], after[1])


@torch.inference_mode()
def test_masks_with_holes_and_left_padding_keep_their_columns():
    ours, theirs = pair()
    inputs = batch((10, 10, 10))
    inputs["attention_mask"] = torch.tensor(
        [[1, 1, 0, 1, 0, 0, 1, 1, 0, 1], [0] * 4 + [1] * 6, [0] * 10]
    )
    out, wanted = ours(**inputs), theirs(**inputs)
    real = inputs["attention_mask"].bool()
    assert relative_error(out[0][real], wanted[0][real]) < 2e-5
    assert out[0].isfinite().all() and out[0][~real].abs().sum() == 0
    assert out.pooler_output.isfinite().all()
    boolean = ours(**{**inputs, "attention_mask": real})
    assert torch.equal(boolean[0], out[0])


@torch.inference_mode()
def test_no_mask_own_positions_and_embeddings_given():
    ours, theirs = pair()
    ids = torch.randint(0, 99, (3, 9))
    everything = torch.ones(3, 9)
    assert_equal_on_real_tokens(ours(ids), theirs(ids), everything)
    positions = torch.randint(0, 40, (1, 9))
    given = {"position_ids": positions, "attention_mask": everything}
    assert_equal_on_real_tokens(ours(ids, **given), theirs(ids, **given), everything)
    vectors = torch.randn(3, 9, 48)
    out = ours(inputs_embeds=vectors, attention_mask=everything)
    wanted = theirs(inputs_embeds=vectors, attention_mask=everything)
    assert_equal_on_real_tokens(out, wanted, everything)


@torch.inference_mode()
def test_no_sequences_and_no_tokens():
    ours, _ = pair()
    assert ours(torch.zeros(0, 5).long())[0].shape == (0, 5, 48)
    out = ours(torch.ones(2, 5).long(), torch.zeros(2, 5))
    assert out[0].abs().sum() == 0 and out.pooler_output.shape == (2, 48)


@torch.inference_mode()
def test_hidden_states_and_attentions_equal_transformers():
    ours, theirs = pair()
    theirs.set_attn_implementation("eager")
    inputs = batch()
    inputs["attention_mask"][4, 3] = 0  # a hole: weights keep their columns
    asked = {"output_hidden_states": True, "output_attentions": True}
    out, wanted = ours(**inputs, **asked), theirs(**inputs, **asked)
    real = inputs["attention_mask"].bool()
    assert len(out.hidden_states) == 4 and len(out.attentions) == 3
    for ours_state, their_state in zip(out.hidden_states, wanted.hidden_states, strict=True):
        assert relative_error(ours_state[real], their_state[real]) < 2e-5
    both = real[:, None, :, None] & real[:, None, None, :]
    for ours_weights, their_weights in zip(out.attentions, wanted.attentions, strict=True):
        assert (ours_weights - their_weights * both).abs().max() < 1e-5
    assert torch.equal(out.last_hidden_state, out.hidden_states[-1])


def test_outputs_are_mapping_and_tuple():
    ours, _ = pair()
    ids = torch.ones(1, 4).long()
    out = ours(ids)
    assert out[0] is out.last_hidden_state and out["pooler_output"] is out[1]
    assert list(out) == out.keys() == ["last_hidden_state", "pooler_output"]
    assert len(out) == 2 and "attentions" not in out and out.get("attentions") is None
    hidden, pooled = ours(ids, return_dict=False)
    assert torch.equal(hidden, out[0]) and torch.equal(pooled, out[1])
    with pytest.raises(KeyError):
        out["attentions"]


def test_gradients_equal_transformers():
    ours, theirs = pair(torch.float64, pad_token_id=0)
    inputs = batch()
    inputs["input_ids"][0, 2] = 0  # a real [PAD]: its row gets no gradient
    weights = torch.randn(5, 40, 48, dtype=torch.float64) * inputs["attention_mask"][..., None]
    for model in (ours, theirs):
        out = model(**inputs)
        ((out[0] * weights).sum() + out[1].sum()).backward()
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name].grad, rtol=1e-9, atol=1e-9, msg=name)


def test_checkpointed_gradients_are_the_same():
    ours, _ = pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ours.train()
    inputs, grads = batch(), []
    for checkpointing in (False, True):
        (ours.gradient_checkpointing_enable if checkpointing else lambda: None)()
        ours.zero_grad()
        ours(**inputs).pooler_output.sum().backward()
        grads.append([p.grad.clone() for p in ours.parameters()])
    assert all(map(torch.equal, *grads))


def test_training_drops_and_evaluation_does_not():
    ours, _ = pair()
    ids = torch.randint(0, 99, (2, 9))
    assert torch.equal(ours(ids)[0], ours(ids)[0])
    ours.train()
    assert not torch.equal(ours(ids)[0], ours(ids)[0])


def test_names_are_those_of_transformers():
    ours, theirs = pair()
    assert {n: p.shape for n, p in ours.state_dict().items()} == {
        n: p.shape for n, p in theirs.state_dict().items()
    }
    paths = {name for name, _ in theirs.named_modules()}
    extra = {"intermediate_act_fn", "activation"}
    wanted = {p for p in paths if p.rsplit(".", 1)[-1] not in extra}
    assert wanted <= {name for name, _ in ours.named_modules()}
    assert ours.num_parameters() == theirs.num_parameters()
    assert ours.get_input_embeddings() is ours.embeddings.word_embeddings


def test_first_weights_are_berts():
    model = BertModel(BertConfig(**{**SMALL, "vocab_size": 5000, "initializer_range": 0.5}))
    word = model.embeddings.word_embeddings.weight
    assert word[0].abs().sum() == 0 and 0.49 < word[1:].std() < 0.51
    layer = model.encoder.layer[0]
    assert layer.output.dense.bias.abs().sum() == 0
    assert layer.output.LayerNorm.weight.eq(1).all()


def test_copies_and_pickles_after_use():
    ours, _ = pair()
    ids = torch.randint(0, 99, (2, 9))
    with torch.no_grad():
        out = ours(ids)[0]
        assert torch.equal(copy.deepcopy(ours)(ids)[0], out)
        assert torch.equal(pickle.loads(pickle.dumps(ours))(ids)[0], out)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"input_ids": None}, "exactly one of input_ids or inputs_embeds"),
        ({"inputs_embeds": torch.zeros(2, 5, 48)}, "exactly one of input_ids or inputs_embeds"),
        ({"input_ids": [[1, 2]]}, r"input_ids must be a tensor \(n_seqs, length\), got list"),
        ({"input_ids": torch.ones(5).long()}, r"input_ids must be \(n_seqs, length\), got \(5,\)"),
        ({"input_ids": torch.ones(2, 5)}, "input_ids must be int64 or int32, got torch.float32"),
        ({"input_ids": torch.full((2, 5), 99)}, r"from 0 to 98 \(vocab_size is 99\), got 99"),
        ({"input_ids": torch.full((2, 5), -1)}, "input_ids must be from 0 to 98.*got -1"),
        ({"input_ids": torch.ones(1, 41).long()}, "position_ids must be from 0 to 39.*got 40"),
        ({"token_type_ids": torch.full((2, 5), 2)}, "token_type_ids must be from 0 to 1.*got 2"),
        ({"token_type_ids": torch.ones(2, 4).long()}, r"must be \(2, 5\), got \(2, 4\)"),
        ({"position_ids": torch.ones(3, 5).long()}, r"\(2, 5\) or \(1, 5\), got \(3, 5\)"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must.*\(2, 5\), got \(2, 4\)"),
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, r"must be \(2, 5\), got \(2, 1, 5, 5\)"),
        ({"encoder_hidden_states": torch.ones(2, 5, 48)}, "encoder_hidden_states"),
        ({"cu_seq_lens_q": torch.ones(2)}, "wants a PackedBatch in place of cu_seq_lens_q"),
    ],
)
def test_refuses(arguments, message):
    model = BertModel(BertConfig(**SMALL))
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": torch.ones(2, 5).long(), **arguments})


def test_refuses_what_it_is_not():
    with pytest.raises(ValueError, match="add_cross_attention needs is_decoder=True, got False"):
        BertModel(BertConfig(**SMALL, add_cross_attention=True))
    model = BertModel(BertConfig(**SMALL))
    packed = pack(torch.ones(1, 3).long(), torch.ones(1, 3))
    with pytest.raises(ValueError, match="give nothing beside it"):
        model(packed, torch.ones(1, 3))


# 33 is odd: its last column is a sine.
@pytest.mark.parametrize("hidden", [32, 33])
def test_sinusoidal_positions_are_the_formula_and_stay(hidden):
    config = BertConfig(
        vocab_size=22, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, max_position_embeddings=40, position_embedding_type="sinusoidal",
    )  # fmt: skip
    model = BertModel(config)
    table = model.embeddings.position_embeddings.weight
    for pos, dim in ((0, 0), (0, 1), (7, 5), (39, 30), (39, hidden - 1)):
        angle = pos / 10000 ** (2 * (dim // 2) / hidden)
        wanted = math.cos(angle) if dim % 2 else math.sin(angle)
        assert table[pos, dim].item() == torch.tensor(wanted).float().item()
    model.train()(torch.tensor([[5, 6, 7]])).last_hidden_state.sum().backward()
    assert table.grad is None
    assert model.embeddings.word_embeddings.weight.grad is not None


def test_sinusoidal_positions_are_saved_and_transformers_reads_them(tmp_path):
    config = BertConfig(
        vocab_size=22, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=40, position_embedding_type="sinusoidal",
    )  # fmt: skip
    model = BertModel(config).eval()
    model.save_pretrained(tmp_path)
    again = BertModel.from_pretrained(tmp_path)
    assert again.config.position_embedding_type == "sinusoidal"
    assert not again.embeddings.position_embeddings.weight.requires_grad
    ids = torch.randint(5, 22, (2, 30))
    out = model(ids).last_hidden_state
    assert torch.equal(again(ids).last_hidden_state, out)
    theirs = transformers.BertModel.from_pretrained(tmp_path).eval()
    exact = copy.deepcopy(theirs).double()(ids).last_hidden_state
    assert_as_accurate(out, theirs(ids).last_hidden_state, exact)
