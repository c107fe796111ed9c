"""Whole models on a GPU, and the same tests on a CPU with a small model, so that they are tried."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from accuracy import assert_as_accurate

from fastbert import BertConfig, BertModel, pack, unpack

transformers = pytest.importorskip("transformers")

BASE = dict(num_hidden_layers=4)  # else BERT-base
SMALL = dict(
    vocab_size=99,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=40,
)
TRAINED = dict(SMALL, hidden_size=256, intermediate_size=1024, max_position_embeddings=512)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@dataclass(frozen=True)
class Case:
    device: str
    dtype: torch.dtype
    sizes: dict
    trained: dict
    lengths: tuple  # block edges of attention among them

    def models(self, **changes):
        """Ours and transformers', with the same random weights, and that in float64."""
        values = {**self.sizes, **changes}
        theirs = transformers.BertModel(transformers.BertConfig(**values)).eval()
        with torch.no_grad():
            for p in theirs.parameters():
                if p.dim() == 1:  # biases and norms are not left at zero and one
                    p.add_(torch.randn_like(p), alpha=0.1)
        return self.given(theirs, BertModel(BertConfig(**values)))

    def given(self, theirs, ours):
        theirs = theirs.to(self.device, self.dtype)
        ours = ours.to(self.device, self.dtype).eval()
        ours.load_state_dict(theirs.state_dict())
        return ours, theirs, copy.deepcopy(theirs).double()

    def batch(self, vocab_size):
        lengths = torch.tensor(self.lengths, device=self.device)
        mask = (torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]).long()
        ids = torch.randint(1, vocab_size, mask.shape, device=self.device)
        types = torch.randint(0, 2, mask.shape, device=self.device)
        return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": types * mask}


def on_gpu(dtype):
    without = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    case = Case("cuda", dtype, BASE, TRAINED, (128, 512, 1, 127, 129, 300, 64, 17))
    return pytest.param(case, marks=without, id=f"cuda-{str(dtype).removeprefix('torch.')}")


CASES = [on_gpu(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
CASES.append(pytest.param(Case("cpu", torch.float32, SMALL, SMALL, (7, 40, 1, 7, 22)), id="cpu"))
every_case = pytest.mark.parametrize("case", CASES)
# Without gradients a model may run prepacked, or from a CUDA graph.
both_modes = pytest.mark.parametrize("grad", [False, True])


def vocab_of(model):
    return model.config.vocab_size


def settled(model, grad, *args, **inputs):
    """What `model` gives once CUDA graphs, if it will, have been captured for the shape."""
    with torch.set_grad_enabled(grad):
        for _ in range(1 if grad else 3):
            out = model(*args, **inputs)
    return out


@every_case
@both_modes
def test_forward_is_as_accurate_as_transformers(case, grad):
    ours, theirs, exact = case.models()
    inputs = case.batch(vocab_of(ours))
    real = inputs["attention_mask"].bool()
    outs = [settled(model, grad, **inputs) for model in (ours, theirs, exact)]
    assert_as_accurate(*(out.last_hidden_state[real] for out in outs))
    assert_as_accurate(*(out.pooler_output for out in outs))
    assert outs[0].last_hidden_state[~real].abs().sum() == 0


@every_case
@both_modes
def test_real_minilm_is_as_accurate_as_transformers(case, grad, minilm):
    theirs = transformers.BertModel.from_pretrained(minilm, dtype=case.dtype)
    ours, theirs, exact = case.given(theirs.eval(), BertModel.from_pretrained(minilm))
    inputs = case.batch(vocab_of(ours))
    real = inputs["attention_mask"].bool()
    outs = [settled(model, grad, **inputs) for model in (ours, theirs, exact)]
    assert_as_accurate(*(out.last_hidden_state[real] for out in outs))


@every_case
def test_gradients_are_as_accurate_as_transformers(case):
    models = case.models(**NO_DROPOUT)
    inputs = case.batch(vocab_of(models[0]))
    real = inputs["attention_mask"].bool()
    hidden = models[0].config.hidden_size
    dreal = torch.randn(int(real.sum()), hidden, device=case.device, dtype=case.dtype)
    dpooled = torch.randn(len(case.lengths), hidden, device=case.device, dtype=case.dtype)
    grads = []
    for model in models:
        out = model.train()(**inputs)
        douts = dreal.to(model.dtype), dpooled.to(model.dtype)
        torch.autograd.backward((out.last_hidden_state[real], out.pooler_output), douts)
        # Weight and bias together: the keys' biases alone have no gradient but rounding.
        grads.append({
            name: torch.cat([p.grad.flatten() for p in module.parameters(recurse=False)])
            for name, module in model.named_modules()
            if [*module.parameters(recurse=False)]
        })  # fmt: skip
    for name in grads[1]:
        try:
            assert_as_accurate(*(of_model[name] for of_model in grads))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@every_case
def test_packed_equals_padded(case):
    ours, _, _ = case.models()
    inputs = case.batch(vocab_of(ours))
    packed = pack(inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"])
    padded, flat = ours(**inputs), ours(packed)
    assert torch.equal(unpack(flat.last_hidden_state, packed), padded.last_hidden_state)
    assert torch.equal(flat.pooler_output, padded.pooler_output)


@every_case
@both_modes
def test_one_sequence_does_not_change_another(case, grad):
    ours, _, _ = case.models()
    inputs = case.batch(vocab_of(ours))
    before = settled(ours, grad, **inputs).last_hidden_state
    inputs["input_ids"][1] = inputs["input_ids"][1].flip(0)
    after = settled(ours, grad, **inputs).last_hidden_state
    assert not torch.equal(before[1], after[1])
    others = [i for i in range(len(before)) if i != 1]
    assert torch.equal(before[others], after[others])


@every_case
def test_one_sequence_has_no_gradient_in_another(case):
    ours, _, _ = case.models()
    inputs = case.batch(vocab_of(ours))
    vectors = ours.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    hidden = ours(inputs_embeds=vectors, **inputs).last_hidden_state
    (dvectors,) = torch.autograd.grad(hidden[1], vectors, torch.randn_like(hidden[1]))
    assert dvectors[1].abs().sum() > 0
    assert dvectors[[i for i in range(len(hidden)) if i != 1]].abs().sum() == 0


@every_case
def test_two_runs_give_the_same_bits(case):
    ours, _, _ = case.models()  # with dropout
    ours.train()
    inputs, runs = case.batch(vocab_of(ours)), []
    for _ in range(2):
        torch.manual_seed(1)
        ours.zero_grad()
        out = ours(**inputs)
        torch.manual_seed(2)
        douts = torch.randn_like(out.last_hidden_state), torch.randn_like(out.pooler_output)
        torch.autograd.backward((out.last_hidden_state, out.pooler_output), douts)
        runs.append([*out.to_tuple(), *(p.grad.clone() for p in ours.parameters())])
    assert all(map(torch.equal, *runs))


# Short inputs again and again are what CUDA graphs are for.
@every_case
def test_short_calls_keep_their_results_and_see_new_weights(case, monkeypatch):
    replays = []
    if case.device == "cuda":
        replay = torch.cuda.CUDAGraph.replay
        monkeypatch.setattr(
            torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(0), replay(graph))
        )
    models = case.models()
    layers = [model.encoder.layer for model in models]

    def check(ids):
        """As accurate as transformers, and as with gradients, which graphs have not."""
        wanted = [settled(model, False, ids).last_hidden_state for model in models]
        for grad in (False, True):
            out = settled(models[0], grad, ids).last_hidden_state.detach()
            assert_as_accurate(out, *wanted[1:])
        return wanted[0]

    shapes = [(1, n) for n in (16, 16, 13, 40, 16)]
    ids = [torch.randint(1, vocab_of(models[0]), shape, device=case.device) for shape in shapes]
    outs = [check(x) for x in ids]
    copies = [out.clone() for out in outs]
    for x, out in zip(ids, outs, strict=True):
        assert torch.equal(settled(models[0], False, x).last_hidden_state, out)
    assert all(map(torch.equal, outs, copies))  # no call wrote over what another gave

    with torch.no_grad():
        for layer in layers:  # written in place
            layer[0].output.dense.bias.add_(0.5)
    changed = check(ids[0])
    assert not torch.equal(changed, outs[0])
    for layer in layers:  # exchanged
        query = layer[1].attention.self.query
        query.weight = torch.nn.Parameter(-query.weight.detach())
    assert not torch.equal(check(ids[0]), changed)

    assert bool(replays) is (case.device == "cuda")
    replays.clear()
    models[0].cuda_graphs = False
    check(ids[0])
    assert not replays


@every_case
def test_two_threads_on_two_streams_change_no_bit(case):
    """Forwards and backwards of one model, each thread with a batch of its own."""
    ours, _, _ = case.models()

    def results(inputs):
        hidden, pooled = ours(**inputs).to_tuple()
        loss = hidden.float().square().sum() + pooled.float().square().sum()
        return hidden.detach(), *torch.autograd.grad(loss, list(ours.parameters()))

    batches = [case.batch(vocab_of(ours)) for _ in range(2)]
    wanted, wrong, start = [results(inputs) for inputs in batches], [], threading.Barrier(2)
    if case.device == "cuda":
        torch.cuda.synchronize()  # before other streams read these

    def run(thread):
        stream = torch.cuda.Stream() if case.device == "cuda" else None
        start.wait()
        with torch.cuda.stream(stream):
            for i in range(10):
                if not all(map(torch.equal, results(batches[thread]), wanted[thread])):
                    wrong.append((thread, i))

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(run, range(2)))
    assert not wrong


def losses(case, model, precision, batches):
    """Of a step with each of (inputs, labels), in mixed precision where that is a half."""
    model.to(case.device).train()
    optimizer, curve = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for inputs, labels in batches:
        with torch.autocast(case.device, precision, enabled=precision != torch.float32):
            hidden = model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
            logits = hidden @ model.get_input_embeddings().weight.T
        loss = torch.nn.functional.cross_entropy(logits.to(model.dtype), labels)
        (loss * 1024).backward()  # float16 has no small gradients
        for p in model.parameters():
            p.grad /= 1024
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.detach())
    return torch.stack(curve).double().cpu()


def trained(case):
    """Two models of the same weights, ours and transformers'."""
    values = {**case.trained, **NO_DROPOUT}
    torch.manual_seed(0)
    theirs = transformers.BertModel(transformers.BertConfig(**values), add_pooling_layer=False)
    ours = BertModel(BertConfig(**values), add_pooling_layer=False)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def permuted(inputs, vocab_size):
    """What is learned of each token."""
    return inputs["input_ids"][inputs["attention_mask"].bool()] * 7 % vocab_size


@every_case
def test_training_follows_the_loss_in_float64(case):
    """Each token's image under a permutation."""
    ours, theirs = trained(case)
    inputs = case.batch(vocab_of(ours))
    batches = [(inputs, permuted(inputs, vocab_of(ours)))] * 30
    curves = [
        losses(case, model, precision, batches)
        for model, precision in (
            (ours, case.dtype),
            (copy.deepcopy(theirs), case.dtype),
            (theirs.double(), torch.float32),
        )
    ]
    assert curves[2][-1] < 0.7 * curves[2][0]
    # Rounding makes two paths, of which one may by chance be nearer.
    assert_as_accurate(*curves, factor=4.0)


# Long enough on a GPU for paths to part: then only what is learned can be compared.
@every_case
def test_long_training_follows_float32(case):
    """New batches, a fifth of whose labels nobody can learn, so that the loss stays above zero."""
    ours, theirs = trained(case)
    n_steps, batches = 500 if case.device == "cuda" else 60, []
    for _ in range(n_steps):
        inputs = case.batch(vocab_of(ours))
        labels = permuted(inputs, vocab_of(ours))
        noise = torch.rand(labels.shape, device=case.device) < 0.2
        batches.append((inputs, torch.where(noise, torch.randint_like(labels, 99), labels)))
    found = losses(case, ours, case.dtype, batches)
    baseline = losses(case, copy.deepcopy(theirs), case.dtype, batches)
    wanted = losses(case, theirs, torch.float32, batches)
    assert wanted[-10:].mean() < 0.9 * wanted[:10].mean()
    late = slice(n_steps // 2, None)
    away, allowed = ((x - wanted)[late].abs().mean() for x in (found, baseline))
    assert away <= 2 * allowed + 0.01 * wanted[late].mean(), (away, allowed, wanted[-10:])
