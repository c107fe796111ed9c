"""BertLMHeadModel and BertModel as a decoder against transformers', and against themselves."""

import copy
import warnings

import pytest
import torch
from accuracy import assert_as_accurate, relative_error
from safetensors.torch import load_file

from fastbert import BertConfig, BertForMaskedLM, BertLMHeadModel, BertModel, pack, unpack
from fastbert.decoder import KeyValueCache

transformers = pytest.importorskip(
    "transformers", "5", reason="transformers 4 has no causal mask in float64"
)

SMALL = dict(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    max_position_embeddings=24,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    is_decoder=True,
)
LENGTHS, SOURCE_LENGTHS = (7, 12, 1, 4), (3, 9, 5, 1)
EXACT = 1e-12  # float64

both = pytest.mark.parametrize("cross", [False, True], ids=["alone", "after a source"])


def pair(tmp_path, cross=False, kind="BertLMHeadModel", **changes):
    """Ours, read from what transformers has written, and transformers', in float64."""
    values = {**SMALL, "add_cross_attention": cross, **changes}
    theirs = getattr(transformers, kind)(transformers.BertConfig(**values))
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = {"BertLMHeadModel": BertLMHeadModel, "BertModel": BertModel}[kind]
    return ours.from_pretrained(tmp_path / "theirs", dtype="float64"), theirs.double().eval()


def mask_of(lengths):
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def source():
    mask = mask_of(SOURCE_LENGTHS)
    states = torch.randn(*mask.shape, 32, dtype=torch.float64)
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


def batch(cross, mask=None):
    mask = mask_of(LENGTHS) if mask is None else mask
    given = {"input_ids": torch.randint(0, 50, mask.shape), "attention_mask": mask}
    return given | source() if cross else given


def labels_of(given):
    ids, mask = given["input_ids"], given["attention_mask"]
    return ids.masked_fill((mask == 0) | (torch.rand(mask.shape) < 0.3), -100)


# right and left padding, holes
MASKS = {
    "right": mask_of(LENGTHS),
    "left": mask_of(LENGTHS).flip(1),
    "holes": torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 1, 0], [1] * 6]),
}


@both
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_logits_loss_and_gradients_equal_transformers(mask, cross, tmp_path):
    ours, theirs = pair(tmp_path, cross)
    given = batch(cross, mask)
    labels = labels_of(given)
    out, wanted = ours(**given, labels=labels), theirs(**given, labels=labels)
    real = mask.bool()
    assert out.keys() == list(wanted.keys()) == ["loss", "logits"]
    assert relative_error(out.logits[real], wanted.logits[real]) < EXACT
    assert out.logits[~real].abs().sum() == 0
    # transformers gives a token, or padding, the label of the next column, not of the next token
    if mask is MASKS["right"]:
        assert relative_error(out.loss, wanted.loss) < 1e-6  # theirs is float32
    ours(**given, labels=labels).loss.backward()
    shifted = torch.full_like(labels, -100)
    for row, columns in enumerate(real):
        at = columns.nonzero().squeeze(1)
        shifted[row, at[:-1]] = labels[row, at[1:]]
    loss = torch.nn.functional.cross_entropy(wanted.logits.flatten(0, 1), shifted.flatten())
    assert relative_error(out.loss, loss) < EXACT
    loss.backward()
    grads = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, grads[name].grad, rtol=1e-9, atol=1e-12, msg=name)


@both
def test_packed_equals_padded(cross, tmp_path):
    ours, _ = pair(tmp_path, cross)
    given = batch(cross)
    labels = labels_of(given)
    real = given["attention_mask"].bool()
    packed = pack(given["input_ids"], given["attention_mask"])
    wanted = ours(**given, labels=labels)
    padded_source = {k: v for k, v in given.items() if k.startswith("encoder")}
    sources = [padded_source]
    if cross:
        mask = given["encoder_attention_mask"]
        states = given["encoder_hidden_states"][mask.bool()]
        of = pack(torch.zeros_like(mask), mask)
        sources.append({"encoder_hidden_states": states, "encoder_attention_mask": of})
    for given_source in sources:
        out = ours(packed, **given_source, labels=labels[real])
        assert relative_error(out.loss, wanted.loss) < EXACT
        assert relative_error(unpack(out.logits, packed), wanted.logits) < EXACT
        again = ours(**{**given, **given_source}, labels=labels)
        assert relative_error(again.logits, wanted.logits) < EXACT
    out = ours(packed, **sources[-1], output_hidden_states=True, output_attentions=True)
    assert relative_error(unpack(out.logits, packed), wanted.logits) < EXACT
    assert out.hidden_states[0].shape == (sum(LENGTHS), 32)
    assert out.attentions[0].shape == (4, 2, 12, 12) and out.past_key_values is None


@both
@torch.no_grad()
def test_steps_with_a_cache_equal_the_whole_and_transformers(cross, tmp_path):
    ours, theirs = pair(tmp_path, cross)
    given = batch(cross, torch.ones(4, 10).long())
    of_source = source() if cross else {}
    whole = ours(**given | of_source).logits
    cache = their_cache = None
    done = 0
    for n_new in (4, 1, 3, 1, 1):  # a prompt, tokens one by one, several at once
        ids = given["input_ids"][:, done : done + n_new]
        done += n_new
        out = ours(ids, past_key_values=cache, **of_source)
        wanted = theirs(ids, past_key_values=their_cache, use_cache=True, **of_source)
        cache, their_cache = out.past_key_values, wanted.past_key_values
        assert cache.get_seq_length() == their_cache.get_seq_length() == done
        assert relative_error(out.logits, whole[:, done - n_new : done]) < EXACT
        assert relative_error(out.logits, wanted.logits) < EXACT
    assert len(cache.source) == (2 if cross else 0)


@both
@pytest.mark.parametrize("mask", [MASKS["right"], MASKS["left"]], ids=["right", "left"])
@torch.no_grad()
def test_steps_after_padded_prompts(mask, cross, tmp_path):
    ours, theirs = pair(tmp_path, cross)
    given = batch(cross, mask)
    of_source = {k: v for k, v in given.items() if k.startswith("encoder")}
    cache = ours(**given).past_key_values
    their_cache = theirs(**given, use_cache=True).past_key_values
    for _ in range(2):
        ids = torch.randint(0, 50, (4, 1))
        mask = torch.cat([mask, torch.ones(4, 1).long()], 1)
        positions = mask.sum(1, keepdim=True) - 1
        step = {"attention_mask": mask, "position_ids": positions, **of_source}
        out = ours(ids, past_key_values=cache, **step)
        wanted = theirs(ids, past_key_values=their_cache, use_cache=True, **step)
        assert relative_error(out.logits, wanted.logits) < EXACT
        # without a mask and without the source again: the cache knows them
        again = ours(ids, past_key_values=cache, position_ids=positions).logits
        assert torch.equal(again, out.logits)
        cache, their_cache = out.past_key_values, wanted.past_key_values
    # each as if alone: the cache of two sequences, in another order
    rows = torch.tensor([3, 1])
    chosen = ours(ids[rows], past_key_values=cache.select(rows), position_ids=positions[rows] + 1)
    everything = ours(ids, past_key_values=cache, position_ids=positions + 1)
    assert relative_error(chosen.logits, everything.logits[rows]) < EXACT


@torch.no_grad()
def test_a_step_with_padding_in_it(tmp_path):
    ours, theirs = pair(tmp_path)
    ids = torch.randint(0, 50, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    cache = ours(ids[:, :3]).past_key_values
    out = ours(ids[:, 3:], mask, past_key_values=cache, output_hidden_states=True)
    wanted = theirs(ids, mask).logits[:, 3:]
    real = mask[:, 3:].bool()
    assert relative_error(out.logits[real], wanted[real]) < EXACT
    assert out.logits[~real].abs().sum() == 0 and out.hidden_states[1][~real].abs().sum() == 0
    after = ours(ids[:, :1], past_key_values=out.past_key_values).logits
    whole = theirs(
        torch.cat([ids, ids[:, :1]], 1), torch.cat([mask, mask[:, :1]], 1)
    ).logits[:, -1:]  # fmt: skip
    assert relative_error(after, whole) < EXACT


@both
@torch.no_grad()
def test_states_and_attentions_equal_transformers(cross, tmp_path):
    ours, theirs = pair(tmp_path, cross)
    theirs.set_attn_implementation("eager")
    given = batch(cross)
    asked = {"output_hidden_states": True, "output_attentions": True}
    out, wanted = ours(**given, **asked), theirs(**given, **asked)
    assert out.keys() == list(wanted.keys())
    mask = given["attention_mask"]
    for found, value in zip(out.hidden_states, wanted.hidden_states, strict=True):
        assert relative_error(found, value * mask[..., None]) < EXACT
    names = ["attentions", "cross_attentions"][: 2 if cross else 1]
    for name in names:
        for found, value in zip(out[name], wanted[name], strict=True):
            assert (found - value * mask[:, None, :, None]).abs().max() < EXACT
    assert relative_error(out.logits, ours(**given).logits) < EXACT


@both
@pytest.mark.filterwarnings("error::UserWarning")
def test_files_are_read_both_ways(cross, tmp_path):
    ours, theirs = pair(tmp_path, cross)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    ours.float().save_pretrained(tmp_path / "ours")
    written, wanted = (
        load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs")
    )
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)
    back, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()) and back.config.add_cross_attention is cross


@both
@torch.no_grad()
def test_the_model_without_head_decodes_too(cross, tmp_path):
    ours, theirs = pair(tmp_path, cross, "BertModel")
    given = batch(cross)
    out, wanted = ours(**given), theirs(**given)
    real = given["attention_mask"].bool()
    assert out.keys() == list(wanted.keys())
    assert relative_error(out[0][real], wanted[0][real]) < EXACT
    assert relative_error(out.pooler_output, wanted.pooler_output) < EXACT
    step = ours(given["input_ids"][:, :1], past_key_values=out.past_key_values)
    assert step.last_hidden_state.shape == (4, 1, 32)
    assert "past_key_values" not in ours(**given, use_cache=False)
    assert "past_key_values" not in ours.train()(**given)


@torch.no_grad()
def test_what_comes_later_and_other_sequences_change_nothing(tmp_path):
    ours, _ = pair(tmp_path)
    given = batch(False, torch.ones(2, 9).long())
    before = ours(**given).logits
    given["input_ids"][0, 5:] = torch.randint(0, 50, (4,))
    after = ours(**given).logits
    assert torch.equal(before[1], after[1]) and torch.equal(before[0, :5], after[0, :5])
    assert not torch.equal(before[0, 5:], after[0, 5:])


@torch.no_grad()
def test_an_empty_source_adds_nothing_and_no_source_is_left_out(tmp_path):
    ours, theirs = pair(tmp_path, cross=True)
    given = batch(True)
    given["encoder_attention_mask"][2] = 0
    out = ours(**given)
    weights = ours(**given, output_attentions=True)
    assert out.logits.isfinite().all() and relative_error(weights.logits, out.logits) < EXACT
    assert weights.cross_attentions[0][2].abs().sum() == 0
    alone = {name: given[name] for name in ("input_ids", "attention_mask")}
    real = given["attention_mask"].bool()
    assert relative_error(ours(**alone).logits[real], theirs(**alone).logits[real]) < EXACT


@torch.no_grad()
def test_logits_to_keep(tmp_path):
    ours, _ = pair(tmp_path)
    given = batch(False, MASKS["left"])
    whole = ours(**given).logits
    assert torch.equal(ours(**given, logits_to_keep=12).logits, whole)
    assert relative_error(ours(**given, logits_to_keep=1).logits, whole[:, -1:]) < EXACT
    columns = torch.tensor([0, 5])
    assert relative_error(ours(**given, logits_to_keep=columns).logits, whole[:, columns]) < EXACT


def test_training(tmp_path):
    ours, _ = pair(tmp_path, cross=True)
    given = batch(True)
    labels = labels_of(given)
    wanted = ours(**given, labels=labels).loss
    ours.train()
    out = ours(**given, labels=labels)
    assert out.keys() == ["loss"] and relative_error(out.loss, wanted) < EXACT
    out.loss.backward()
    grads = {name: p.grad for name, p in ours.named_parameters()}
    ours.zero_grad()
    ours.gradient_checkpointing_enable()
    n_items = 0
    for row in range(4):
        n_items += (labels[row, 1 : LENGTHS[row]] != -100).sum()
    for row in range(4):  # one sequence at a time, with checkpoints
        part = {name: x[row : row + 1] for name, x in {**given, "labels": labels}.items()}
        ours(**part, num_items_in_batch=n_items).loss.backward()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.interpreted
def test_kernels_are_as_accurate_as_plain_torch(device, tmp_path, monkeypatch):
    exact, _ = pair(tmp_path, cross=True)
    given = batch(True)
    labels = labels_of(given)
    results = []
    for dtype, has_kernels in (
        (torch.float32, True),
        (torch.float32, False),
        (torch.float64, False),
    ):
        if not has_kernels:
            monkeypatch.setattr("fastbert.kernels._triton.why_not", lambda device: "not wanted")
        model = copy.deepcopy(exact).to(device, dtype)
        inputs = {
            n: x.to(device, dtype if x.is_floating_point() else None) for n, x in given.items()
        }
        out = model(**inputs, labels=labels.to(device))
        out.loss.backward()
        results.append([out.logits.detach(), *(p.grad for p in model.parameters())])
    for triple in zip(*results, strict=True):
        assert_as_accurate(*triple, factor=4.0)  # sums of few rows in another order


def test_dropout_is_on_in_training_only():
    changes = {"attention_probs_dropout_prob": 0.5}
    model = BertLMHeadModel(BertConfig(**{**SMALL, **changes}))
    ids = torch.randint(0, 50, (2, 9))
    for asked in ({}, {"output_attentions": True}):
        assert torch.equal(model.eval()(ids, **asked).logits, model(ids, **asked).logits)
        assert not torch.equal(model.train()(ids, **asked).logits, model(ids, **asked).logits)


@torch.no_grad()
def test_without_is_decoder_it_sees_both_sides_and_says_so(tmp_path):
    with pytest.warns(UserWarning, match="is_decoder=True, got False"):
        ours, theirs = pair(tmp_path, is_decoder=False)
    given = batch(False)
    real = given["attention_mask"].bool()
    labels = labels_of(given)
    out, wanted = ours(**given, labels=labels), theirs(**given, labels=labels)
    assert relative_error(out.logits[real], wanted.logits[real]) < EXACT
    assert relative_error(out.loss, wanted.loss) < 1e-6
    with pytest.warns(UserWarning, match="is_decoder=False, got True"):
        causal = BertForMaskedLM(BertConfig(**SMALL)).eval()
    ids = torch.randint(0, 50, (1, 6))
    longer = causal(ids).logits
    assert relative_error(causal(ids[:, :4]).logits, longer[:, :4]) < 1e-5


def test_an_encoders_checkpoint_starts_a_decoder(tmp_path):
    values = {**SMALL, "is_decoder": False}
    base = BertForMaskedLM(BertConfig(**values))
    base.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"has no bert\.encoder\.layer\.\*\.crossattention\.") as w:
        model, info = BertLMHeadModel.from_pretrained(
            tmp_path, is_decoder=True, add_cross_attention=True, output_loading_info=True
        )
    assert len(w) == 1 and all(".crossattention." in name for name in info["missing_keys"])
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in base.state_dict().items())
    norm = model.bert.encoder.layer[1].crossattention.output.LayerNorm
    assert norm.weight.eq(1).all() and norm.bias.eq(0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BertLMHeadModel.from_pretrained(tmp_path, is_decoder=True)


def test_no_sequences_and_no_tokens():
    model = BertLMHeadModel(BertConfig(**SMALL, add_cross_attention=True)).eval()
    states = torch.zeros(0, 3, 32)
    out = model(torch.zeros(0, 5).long(), encoder_hidden_states=states)
    assert out.logits.shape == (0, 5, 50)
    out = model(torch.ones(2, 5).long(), torch.zeros(2, 5))
    assert out.logits.shape == (2, 5, 50) and out.logits.abs().sum() == 0


def test_compiles_whole():
    model = BertLMHeadModel(BertConfig(**SMALL)).eval()
    packed = pack(torch.randint(0, 50, (4, 12)), mask_of(LENGTHS))
    compiled = torch.compile(lambda x: model(x).logits, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(packed), model(packed).logits)


IDS = torch.ones(2, 5).long()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"encoder_hidden_states": torch.ones(3, 5, 32)},
         r"encoder_hidden_states must be \(2, source_length, 32\).*got \(3, 5, 32\)"),
        ({"encoder_hidden_states": torch.ones(7, 32), "encoder_attention_mask": pack(IDS, IDS)},
         r"or \(n_tokens, 32\) with the PackedBatch of 2 sequences.*got \(7, 32\)"),
        ({"encoder_hidden_states": torch.ones(2, 4, 32), "encoder_attention_mask": IDS},
         r"encoder_attention_mask must be \(2, 4\), got \(2, 5\)"),
        ({"past_key_values": ((IDS, IDS),)}, "must be what a forward returned, got tuple"),
        ({"input_ids": pack(IDS, IDS), "use_cache": True}, "use_cache=True wants padded input"),
        ({"input_ids": pack(IDS, IDS), "logits_to_keep": 1}, "logits_to_keep wants padded input"),
        ({"labels": IDS * 50}, "labels must be from 0 to 49 or .*-100, got 50"),
    ],
)  # fmt: skip
def test_refuses(arguments, message):
    model = BertLMHeadModel(BertConfig(**SMALL, add_cross_attention=True))
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": IDS, **arguments})


def test_refuses_a_cache_that_does_not_fit():
    model = BertLMHeadModel(BertConfig(**SMALL)).eval()
    cache = model(IDS).past_key_values
    assert isinstance(cache, KeyValueCache)
    with pytest.raises(ValueError, match="are of 2 sequences, the input is of 1"):
        model(IDS[:1], past_key_values=cache)
    with pytest.raises(ValueError, match=r"of all tokens, \(2, 10\) with the 5 of.*got \(2, 5\)"):
        model(IDS, IDS, past_key_values=cache)
    with pytest.raises(ValueError, match="want padded input"):
        model(pack(IDS, IDS), past_key_values=cache)
    with pytest.raises(ValueError, match="add_cross_attention, got False"):
        model(IDS, encoder_hidden_states=torch.ones(2, 3, 32))
