"""Forwards as CUDA graphs: used where they may be, and never with weights of yesterday.

Each test runs on a GPU where there is one, and everywhere with a stand-in for capture. That keeps
what a graph keeps, the memory of inputs and parameters, and calls the function again when replayed.
It shows which graph runs when, on what, and what comes back; not that kernels can be captured.
"""

import copy
import pickle
import random
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager

import pytest
import torch
from accuracy import assert_as_accurate
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert import BertConfig, BertModel, PackedBatch, graphs
from fastbert.graphs import Bucket, CudaCapture
from fastbert.inputs import EncoderInputs

VOCAB, LONGEST = 60, 300


class Counted(CudaCapture):
    """The real one."""

    captures = replays = 0

    def record(self, function, *inputs):
        outputs, replay = super().record(function, *inputs)
        Counted.captures += 1
        return outputs, lambda: self._replay(replay)

    def _replay(self, replay):
        Counted.replays += 1
        replay()


class StandIn:
    """One that needs no GPU."""

    captures = replays = 0
    model = None

    def __init__(self, device):
        self.running = False
        self.outputs = []

    @staticmethod
    def takes(x):
        return True

    takes_weight = takes

    def wait(self):
        pass

    @contextmanager
    def turn(self):
        assert not self.running
        self.running = True
        try:
            yield
        finally:
            self.running = False

    def record(self, function, *inputs):
        modules = [m for m in StandIn.model.modules() if m._parameters]
        memory = [{n: p.detach() for n, p in m._parameters.items()} for m in modules]
        outputs = function(*inputs)
        self.outputs += (output for output in outputs if output is not None)
        StandIn.captures += 1

        @torch.inference_mode(False)
        @torch.no_grad()
        def replay():
            StandIn.replays += 1
            now = [dict(m._parameters) for m in modules]
            for module, parameters in zip(modules, memory, strict=True):
                module._parameters.update(parameters)
            try:
                results = function(*inputs)
            finally:
                for module, parameters in zip(modules, now, strict=True):
                    module._parameters.update(parameters)
            for output in self.outputs:
                output.fill_(torch.nan)  # of the other graphs too: they share their memory
            for output, result in zip(outputs, results, strict=True):
                if output is not None:
                    output.copy_(result)

        return outputs, replay


GPU = pytest.param(
    Counted, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
)


@pytest.fixture(params=[StandIn, GPU], ids=["stand-in", "cuda"])
def capture(request, monkeypatch):
    monkeypatch.setattr(graphs, "CudaCapture", request.param)
    request.param.captures = request.param.replays = 0
    return request.param


@pytest.fixture
def model(capture):
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=96, max_position_embeddings=LONGEST,
    )  # fmt: skip
    StandIn.model = BertModel(config).eval().to("cpu" if capture is StandIn else "cuda")
    return StandIn.model


def batch_of(lengths, device="cpu"):
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    n_tokens = sum(lengths)
    batch = PackedBatch(
        torch.randint(VOCAB, (n_tokens,)),
        torch.randint(2, (n_tokens,)),
        torch.cat([torch.arange(0), *(torch.arange(n) for n in lengths)]),
        cu_seqlens,
        max(lengths, default=0),
    )
    return batch.to(device)


@contextmanager
def without_graphs(model):
    kept, model._graphs = model._graphs, graphs.Graphs(False)
    try:
        yield
    finally:
        model._graphs = kept


def results(model, *args, **kwargs):
    with torch.no_grad():
        out = model(*args, **kwargs)
    return out.last_hidden_state, out.pooler_output


def check(model, *args, **kwargs):
    """Equal to the forward that runs by itself; returns what came."""
    out = results(model, *args, **kwargs)
    with without_graphs(model):
        torch.testing.assert_close(out, results(model, *args, **kwargs))
    return out


def warm(model, batch):
    """Met often enough to be captured, and once more."""
    for _ in range(3):
        out = check(model, batch)
    return out


# One token, one sequence, one more than sizes of tokens (32, 128, 160), sequences (4, 16) and
# lengths (32, 64) take; empty sequences; short ones, of which more than one must fill up.
BATCHES = [
    [1], [31], [32], [33], [127], [128], [129], [160], [161], [300],
    [8] * 4, [8] * 5, [3] * 16, [3] * 17, [32, 1], [33, 1], [64, 64], [65, 64],
    [0, 5, 0, 0, 7, 0], [300, 1, 200, 1, 20], [2] * 130,
]  # fmt: skip


@pytest.mark.parametrize("lengths", BATCHES, ids=lambda lengths: f"{len(lengths)}x{max(lengths)}")
def test_equals_the_plain_forward(model, capture, lengths):
    for _ in range(4):
        check(model, batch_of(lengths, model.device))
    assert (capture.captures, capture.replays) == (1, 3)


def test_equals_the_plain_forward_on_many_random_batches(model, capture):
    generator = random.Random(0)
    buckets = set()
    for _ in range(60):
        longest = generator.choice([2, 20, 60])
        lengths = [generator.randint(0, longest) for _ in range(generator.randint(1, 20))]
        if sum(lengths):
            buckets.add(Bucket.of(sum(lengths), len(lengths), max(lengths)))
        check(model, batch_of(lengths, model.device))
    assert 5 < capture.captures <= len(buckets) and capture.replays > 20


def test_padded_input_with_holes(model, capture):
    for n_columns in (30, 28, 29):
        mask = torch.rand(5, n_columns) < 0.5
        mask[3] = False
        ids = torch.randint(VOCAB, mask.shape)
        hidden, _ = check(model, ids.to(model.device), mask.to(model.device))
        assert hidden.shape == (5, n_columns, 64) and not hidden[~mask].any()
    ids = torch.randint(VOCAB, (2, 7), dtype=torch.int32, device=model.device)
    for _ in range(3):
        check(model, ids)
    assert capture.captures == 2


def test_without_pooler_and_as_tuple(model, capture):
    model.pooler = None
    ids = torch.randint(VOCAB, (2, 7), device=model.device)
    with torch.no_grad():
        outs = [model(ids, return_dict=False) for _ in range(3)]
    assert capture.captures == 1
    torch.testing.assert_close(outs[0], outs[2])


def test_nothing_to_compute_runs_plainly(model, capture):
    nobody = batch_of([], model.device)
    empty = batch_of([0, 0], model.device)
    for _ in range(3):
        assert results(model, nobody)[0].shape == (0, 64)
        assert results(model, empty)[1].shape == (2, 64)
    assert capture.captures == 0


def test_a_batch_fits_its_bucket_and_fillers_are_short():
    generator = random.Random(0)
    for _ in range(2000):
        longest = generator.choice([1, 4, 40, 400])
        lengths = [generator.randint(0, longest) for _ in range(generator.randint(1, 40))]
        n_tokens = sum(lengths)
        if not n_tokens:
            continue
        bucket = Bucket.of(n_tokens, len(lengths), max(lengths))
        assert n_tokens <= bucket.n_tokens < max(n_tokens + 32, 1.25 * n_tokens)
        assert Bucket.of(*bucket) == bucket
        graph = graphs._Graph(bucket, torch.device("cpu"))
        batch = batch_of(lengths)
        graph.load(EncoderInputs.of_packed(batch), batch.input_ids)
        assert graph.ids.shape == (3, bucket.n_tokens)
        assert torch.equal(graph.ids[0, :n_tokens], batch.input_ids)
        filled = graph.cu_seqlens.diff()
        assert torch.equal(filled[: len(lengths)], batch.lengths)
        assert graph.cu_seqlens[0] == 0 and graph.cu_seqlens[-1] == bucket.n_tokens
        assert filled.min() >= 0 and filled.max() <= bucket.max_seqlen


def test_sizes_are_few():
    sizes = {Bucket.of(n, 1, 1).n_tokens for n in range(1, 4097)}
    assert len(sizes) == 24 and {32, 64, 96, 128, 160, 4096} <= sizes
    assert {Bucket.of(1, n, 1).n_seqs for n in range(1, 4097)} == {4**i for i in range(7)}
    assert {Bucket.of(1, 1, n).max_seqlen for n in range(1, 513)} == {32, 64, 128, 256, 512}


def test_captured_when_a_shape_comes_back(model, capture):
    for lengths, captures in (([20], 0), ([40], 0), ([21], 1), ([22], 1), ([41], 2), ([23], 2)):
        check(model, batch_of(lengths, model.device))
        assert capture.captures == captures


def test_the_number_of_graphs_is_bounded(model, capture, monkeypatch):
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 2)
    monkeypatch.setattr(graphs, "_IDLE", 10)
    shapes = [batch_of([n], model.device) for n in (20, 50, 80)]
    first, second, third = shapes
    warm(model, first)
    warm(model, second)
    for batch in (third,) * 4 + (first,) + (third,) * 2:
        check(model, batch)
    assert capture.captures == 2  # none has been idle for long
    for _ in range(8):
        check(model, first)
    check(model, third)  # the second gives way, not the first, which is older
    assert capture.captures == 3 and len(model._graphs._graphs) == 2
    check(model, first)
    assert capture.captures == 3
    check(model, second)
    assert capture.captures == 3


def change_in_place(model):
    model.encoder.layer[0].attention.self.key.weight.mul_(1.5)


def change_embeddings(model):
    model.embeddings.position_embeddings.weight.mul_(1.5)


def replace_parameter(model):
    dense = model.encoder.layer[0].intermediate.dense
    dense.weight = torch.nn.Parameter(dense.weight * 2)


def replace_data(model):
    dense = model.encoder.layer[0].output.dense
    dense.weight.data = dense.weight.data * 2


def write_behind_the_versions(model):
    model.pooler.dense.weight.data.mul_(2)
    model.encoder.layer[0].attention.self.key.weight.data.mul_(2)
    model.eval()


def load(model):
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})


def load_by_assignment(model):
    state = {k: v * 1.5 for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def to_half_and_back(model):
    model.bfloat16().float()


def part_to_half_and_back(model):
    model.encoder.bfloat16().float()


def exchange_module(model):
    model.set_input_embeddings(torch.nn.Embedding(VOCAB, 64, device=model.device).eval())


def exchange_layers(model):
    model.encoder.layer = model.encoder.layer[::-1].eval()


def train_a_step(model):
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    with torch.enable_grad():
        model(torch.ones(2, 5, dtype=torch.int64, device=model.device))[0].pow(2).sum().backward()
    optimizer.step()
    model.eval()


CHANGES = [
    change_in_place, change_embeddings, replace_parameter, replace_data, write_behind_the_versions,
    load, load_by_assignment, to_half_and_back, part_to_half_and_back, exchange_module,
    exchange_layers, train_a_step,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_follows_every_change(model, capture, change):
    batch = batch_of([20, 3], model.device)
    before, _ = warm(model, batch)
    with torch.no_grad():
        change(model)
    after, _ = check(model, batch)
    assert not torch.equal(before, after)
    warm(model, batch)
    check(model, batch)
    assert capture.captures == 2


def test_a_layer_that_makes_its_plan_anew_is_noticed(model, capture):
    batch = batch_of([20, 3], model.device)
    warm(model, batch)
    model.encoder.layer[1].output.dense.weight.data.mul_(2)
    model.encoder.layer[1].eval()  # of which the model learns nothing
    model.encoder.layer[1]._plan = object() if capture is Counted else None
    replays = capture.replays
    check(model, batch)
    check(model, batch)
    assert capture.replays <= replays + 1  # one, and its results thrown away


def test_weights_that_keep_changing_are_not_captured_each_time(model, capture):
    batch = batch_of([20], model.device)
    for _ in range(10):
        for _ in range(3):
            check(model, batch)
        with torch.no_grad():
            change_in_place(model)
    assert capture.captures == 3  # after 2, 4 and 8 more meetings, not 10 times


@pytest.mark.parametrize("change", ["double", "train"])
def test_moving_or_training_a_model_lets_go_of_memory(model, change):
    warm(model, batch_of([20], model.device))
    kept = model._graphs
    assert kept._graphs and kept._watch and kept._capture
    getattr(model, change)()
    assert not kept._graphs and kept._watch is None and kept._capture is None


def hook_on_dense(model):
    dense = model.encoder.layer[0].intermediate.dense
    return dense.register_forward_hook(lambda m, args, out: 2 * out)


def hook_on_model(model):
    return model.register_forward_pre_hook(lambda m, args: None)


def hook_on_all(model):
    return torch.nn.modules.module.register_module_forward_hook(lambda m, args, out: None)


class Undo:
    def __init__(self, remove):
        self.remove = remove


def one_dropout_trains(model):
    dropout = model.encoder.layer[0].output.dropout.train()
    dropout.p = 0.0
    return Undo(dropout.eval)


def wrapped_forward(model):
    norm = model.encoder.layer[0].output.LayerNorm
    forward = norm.forward
    norm.forward = lambda *args: forward(*args) + 1
    return Undo(lambda: norm.__dict__.pop("forward"))


def module_of_another_kind(model):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    attention = model.encoder.layer[0].attention.self
    value, attention.value = attention.value, Doubled(64, 64, device=model.device)
    return Undo(lambda: setattr(attention, "value", value))


OBSTACLES = [
    hook_on_dense, hook_on_model, hook_on_all, one_dropout_trains, wrapped_forward,
    module_of_another_kind,
]  # fmt: skip


# Before the first capture, which must not run hooks, and after it.
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("obstacle", OBSTACLES, ids=lambda obstacle: obstacle.__name__)
def test_what_is_not_plain_runs_itself(model, capture, obstacle, captured):
    batch = batch_of([20, 3], model.device)
    for _ in range(3 * captured):
        check(model, batch)
    handle = obstacle(model)
    try:
        for _ in range(4):
            check(model, batch)
        assert capture.captures == captured
    finally:
        handle.remove()
    for _ in range(9):
        check(model, batch)
    assert capture.captures == 1 + captured or (obstacle is hook_on_all and captured)


def test_hooks_run_as_often_as_without(model, capture):
    seen = []
    model.encoder.layer[1].register_forward_hook(lambda m, args, out: seen.append(out))
    for _ in range(4):
        results(model, batch_of([20, 3], model.device))
    assert len(seen) == 4


@pytest.mark.parametrize("arguments", [{"output_hidden_states": True}, {"output_attentions": True}])
def test_what_shows_the_inside_runs_plainly(model, capture, arguments):
    ids = torch.randint(VOCAB, (2, 7), device=model.device)
    with torch.no_grad():
        for _ in range(3):
            model(ids, **arguments)
    assert capture.captures == 0


class Seeing(TorchDispatchMode):
    """As those that count operations, or log them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


CONTEXTS = {
    "gradients": lambda device: torch.enable_grad(),
    "autocast": lambda device: torch.autocast(device, torch.bfloat16),
    "counting": lambda device: Seeing(),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_other_forwards_run_plainly(model, capture, context):
    ids = torch.randint(VOCAB, (2, 7), device=model.device)
    with torch.no_grad(), CONTEXTS[context](model.device.type):
        for _ in range(3):
            model(ids)
    assert capture.captures == 0


def test_vectors_in_place_of_ids_run_plainly(model, capture):
    vectors = torch.randn(2, 7, 64, device=model.device)
    for _ in range(3):
        check(model, inputs_embeds=vectors)
    assert capture.captures == 0


def test_gradients_are_there_after_graphs(model):
    batch = batch_of([20, 3], model.device)
    warm(model, batch)
    model(batch)[0].sum().backward()
    assert all(p.grad is not None for p in model.encoder.parameters())


def test_compiled_models_have_no_graphs(model, capture):
    compiled = torch.compile(model, backend="eager")
    batch = batch_of([20, 3], model.device)
    for _ in range(3):
        out = results(compiled, batch)
    assert capture.captures == 0
    torch.testing.assert_close(out, results(model, batch))


def test_results_are_inference_tensors_only_in_inference_mode(model, capture):
    batch = batch_of([20, 3], model.device)
    with torch.inference_mode():
        for _ in range(3):
            out = model(batch)[0]
            assert out.is_inference()
    assert capture.captures == 1
    out, _ = check(model, batch)
    assert not out.is_inference() and capture.captures == 1


def test_another_precision_is_another_graph(model, capture):
    batch = batch_of([20, 3], model.device)
    warm(model, batch)
    torch.set_float32_matmul_precision("high")
    try:
        for _ in range(3):
            results(model, batch)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert capture.captures == 2
    check(model, batch)
    assert capture.captures == 2


def test_off(model, capture):
    batch = batch_of([40], model.device)
    assert model.cuda_graphs == 4096
    warm(model, batch)
    model.cuda_graphs = False
    assert model.cuda_graphs == 0
    warm(model, batch)
    model.cuda_graphs = 39  # tokens
    warm(model, batch)
    warm(model, batch_of([2] * 40, model.device))
    assert capture.captures == 1
    model.cuda_graphs = 40
    warm(model, batch)
    assert capture.captures == 2
    assert BertModel(model.config, cuda_graphs=False).cuda_graphs == 0


def test_off_from_the_start(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert BertModel.from_pretrained(tmp_path).cuda_graphs == 4096
    assert BertModel.from_pretrained(tmp_path, cuda_graphs=False).cuda_graphs == 0


@pytest.mark.parametrize("wrong", [-1, 1.5, "yes", None])
def test_refuses(wrong):
    with pytest.raises(ValueError, match="cuda_graphs must be True, False or a number of tokens"):
        graphs.Graphs(wrong)


def test_earlier_results_stay(model):
    batches = [batch_of(lengths, model.device) for lengths in ([20, 3], [3, 20], [50], [60, 1])]
    for batch in batches:
        warm(model, batch)
    kept = [x for batch in batches for x in results(model, batch)]
    copies = [x.clone() for x in kept]
    for batch in reversed(batches):
        results(model, batch)
    assert all(map(torch.equal, kept, copies))


def test_one_sequence_does_not_change_another(model):
    lengths = [20, 3, 9]
    batch = batch_of(lengths, model.device)
    before, _ = warm(model, batch)
    batch.input_ids[20:23] = torch.randint(VOCAB, (3,))
    check(model, batch_of([9, 15, 7], model.device))  # leaves other tokens behind
    after, _ = check(model, batch)
    assert torch.equal(before[:20], after[:20]) and torch.equal(before[23:], after[23:])
    assert not torch.equal(before[20:23], after[20:23])


def test_copies_and_pickles_have_no_graphs(model, capture):
    batch = batch_of([20, 3], model.device)
    model.cuda_graphs = 100
    wanted = warm(model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other._graphs._graphs and other.cuda_graphs == 100
        torch.testing.assert_close(results(other, batch), wanted)
    check(model, batch)
    assert capture.captures == 1


def test_a_replica_does_not_use_the_graphs_of_another(model, capture):
    batch = batch_of([20, 3], model.device)
    warm(model, batch)
    replica = copy.copy(model)
    replica._modules = {**model._modules, "pooler": copy.deepcopy(model.pooler)}
    with torch.no_grad():
        replica.pooler.dense.weight.mul_(2)
    replays = capture.replays
    _, pooled = check(replica, batch)
    assert not torch.equal(pooled, check(model, batch)[1])
    assert (capture.captures, capture.replays) == (1, replays + 1)


def test_eval_before_each_call_leaves_a_shape_its_graph(model, capture):
    batch = batch_of([20, 3], model.device)
    for _ in range(2):
        check(model.eval(), batch)
    assert capture.captures == 1


def test_what_cannot_be_watched_is_not_looked_at_each_time(model, capture, monkeypatch):
    looks, look = [], graphs._watch_of
    monkeypatch.setattr(graphs, "_watch_of", lambda *args: looks.append(0) or look(*args))
    model.encoder.layer[0].register_forward_hook(lambda *args: None)
    for _ in range(30):
        check(model, batch_of([20, 3], model.device))
    assert capture.captures == 0 and len(looks) == 4  # after 2, then 4, 8 and 16 more


def test_heads_without_a_kernel_are_not_captured(capture):
    """Plain torch waits for the GPU to learn the lengths, which no capture can."""
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=1, num_attention_heads=3,
        intermediate_size=32, max_position_embeddings=LONGEST,
    )  # fmt: skip
    model = BertModel(config).eval().to("cpu" if capture is StandIn else "cuda")
    for _ in range(4):
        check(model, batch_of([20, 3], model.device))
    assert capture.captures == 0 and model.cuda_graphs


def test_ids_elsewhere_are_refused_as_without(model):
    warm(model, batch_of([20, 3], model.device))
    with torch.no_grad(), pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        model(torch.ones(2, 7, dtype=torch.int64, device="meta"))
    warm(model, batch_of([20, 3], model.device))


def test_what_cannot_be_captured_is_warned_about_once(model, capture, monkeypatch):
    def fail(*args):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(capture, "record", fail)
    batch = batch_of([20, 3], model.device)
    check(model, batch)
    with pytest.warns(UserWarning, match="without CUDA graphs.*RuntimeError: operation not"):
        check(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warm(model, batch)
    assert model.cuda_graphs == 0


def test_while_one_thread_runs_others_run_plainly(model, capture):
    batch = batch_of([20, 3], model.device)
    warm(model, batch)
    replays = capture.replays
    with model._graphs._lock:
        check(model, batch)
    assert capture.replays == replays


def test_threads(model, capture):
    """Each with batches of its own, of shapes that both have."""
    work = [[batch_of([n, n], model.device) for n in (3, 30, 12, 45)] for _ in range(2)]
    with without_graphs(model):
        wanted = [[results(model, batch) for batch in batches] for batches in work]
    if capture is Counted:
        torch.cuda.synchronize()  # before other streams read these
    wrong, start = [], threading.Barrier(2)

    def run(thread):
        stream = torch.cuda.Stream() if capture is Counted else None
        start.wait()
        with torch.cuda.stream(stream):
            for i in range(40):
                out = results(model, work[thread][i % 4])
                try:
                    torch.testing.assert_close(out, wanted[thread][i % 4])
                except AssertionError as error:
                    wrong.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and capture.replays > 10


gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu_only
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_accurate_as_plain(dtype):
    config = BertConfig(vocab_size=VOCAB, num_hidden_layers=3, max_position_embeddings=LONGEST)
    model = BertModel(config).eval().to("cuda", dtype)
    exact = BertModel(config, cuda_graphs=False).eval().to("cuda", torch.float64)
    exact.load_state_dict(model.state_dict())
    batch = batch_of([100, 3, 60, 1], "cuda")
    for _ in range(3):
        out = results(model, batch)
    assert model._graphs._graphs
    with without_graphs(model):
        baseline = results(model, batch)
    for found, plain, wanted in zip(out, baseline, results(exact, batch), strict=True):
        assert_as_accurate(found, plain, wanted)


@gpu_only
def test_streams_wait_for_each_other():
    """Two streams with long forwards that share memory."""
    config = BertConfig(vocab_size=VOCAB, num_hidden_layers=6, max_position_embeddings=LONGEST)
    model = BertModel(config).eval().to("cuda", torch.bfloat16)
    batches = [batch_of([250] * 12, "cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in batches]
    for batch in batches:
        for _ in range(3):
            results(model, batch)
    wanted = [results(model, batch) for batch in batches]
    torch.cuda.synchronize()
    for _ in range(20):
        out = []
        for batch, stream in zip(batches, streams, strict=True):
            with torch.cuda.stream(stream):
                out.append(results(model, batch))
        torch.cuda.synchronize()
        assert all(torch.equal(a[0], b[0]) for a, b in zip(out, wanted, strict=True))


@gpu_only
def test_graphs_share_memory():
    """Each has its results to itself, 1.5 MiB at most here, and the rest with all others."""
    config = BertConfig(vocab_size=VOCAB, num_hidden_layers=2, max_position_embeddings=LONGEST)
    model = BertModel(config).eval().to("cuda", torch.bfloat16)
    for _ in range(3):
        results(model, batch_of([256] * 4, "cuda"))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for n_seqs in range(1, 4):
        for _ in range(3):
            results(model, batch_of([256] * n_seqs, "cuda"))
    torch.cuda.empty_cache()
    assert len(model._graphs._graphs) == 4
    assert torch.cuda.memory_reserved() - before < 64 * 2**20
    model.cuda_graphs = False
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before


WAITS = """
import torch
from fastbert import BertConfig, BertModel
from fastbert.inputs import EncoderInputs

config = BertConfig(vocab_size=60, num_hidden_layers=1, max_position_embeddings=30)
model, first_tokens = BertModel(config).eval().to("cuda"), EncoderInputs.first_tokens

def waiting(inputs, x):
    x.sum().item()
    return first_tokens(inputs, x)

EncoderInputs.first_tokens = waiting
ids, stream = torch.ones(2, 20, dtype=torch.int64, device="cuda"), torch.cuda.current_stream()
with torch.no_grad():
    outs = [model(ids).last_hidden_state for _ in range(3)]
assert all(torch.equal(out, outs[0]) for out in outs)
assert torch.cuda.current_stream() == stream and model.cuda_graphs == 0
torch.rand(1, device="cuda").item()  # which a failed capture alone leaves refused
EncoderInputs.first_tokens = first_tokens
model.cuda_graphs = True
with torch.no_grad():
    outs = [model(ids).last_hidden_state for _ in range(3)]
assert model._graphs._graphs and all(torch.equal(out, outs[0]) for out in outs)
"""


@gpu_only
def test_a_forward_that_waits_for_the_gpu_cannot_be_captured():
    """In a process of its own, for what a capture that fails may leave behind."""
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "without CUDA graphs" in done.stderr
