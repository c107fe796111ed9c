"""The training loop: what a step is, and that nothing is lost when it is killed."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from fastbert import BertConfig, BertForSequenceClassification, PackedBatch
from fastbert.loop import MicroBatch, Options, fit, parameter_groups

N_STEPS = 12
CONFIG = dict(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
    num_labels=3,
)


def batch_of(n_seqs, generator):
    lengths = torch.randint(2, 10, (n_seqs,), generator=generator)
    n = int(lengths.sum())
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    packed = PackedBatch(
        torch.randint(0, 50, (n,), generator=generator),
        torch.zeros(n, dtype=torch.int64),
        torch.cat([torch.arange(int(x)) for x in lengths]),
        ends,
        int(lengths.max()),
    )
    labels = torch.randint(0, 3, (n_seqs,), generator=generator)
    return MicroBatch(packed, {"labels": labels}, {"labels": n_seqs})


class RandomSteps:
    """Steps of 2 batches of 3 and 5 sequences, without an end; or, if whole, the same as one; or
    the batch of this rank of two."""

    def __init__(self, whole=False, rank=None):
        self.generator = torch.Generator().manual_seed(1)
        self.whole, self.rank = whole, rank

    def __iter__(self):
        while True:
            whole = batch_of(8, self.generator)
            if self.rank == 1:  # another number of batches than rank 0 has
                yield cut(cut(whole)[1], [2, 2, 1])
            else:
                yield [whole] if self.whole else cut(whole)[: None if self.rank is None else 1]

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


def cut(batch, sizes=(3, 5)):
    sizes = list(sizes)
    parts = zip(batch.packed.split(sizes), batch.labels["labels"].split(sizes), strict=True)
    return [MicroBatch(p, {"labels": x}, {"labels": len(x)}) for p, x in parts]


def loss_of(model, batch, n_items):
    out = model(batch.packed, labels=batch.labels["labels"], num_items_in_batch=n_items["labels"])
    correct = (out.logits.argmax(1) == batch.labels["labels"]).sum() / n_items["labels"]
    return out.loss, {"accuracy": correct}


@torch.no_grad()
def evaluate(model):
    logits = model(batch_of(8, torch.Generator().manual_seed(5)).packed).logits
    return {"spread": float(logits.std())}


def model_of(dropout=0.1):
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification(BertConfig(**CONFIG, **rates))


def run(folder, resume=False, **options):
    options = {"lr": 1e-2, "save_every": 1, "evaluate_every": 5, "log_every": 4} | options
    model = model_of()
    result = fit(
        model,
        RandomSteps(),
        options.pop("loss_of", loss_of),
        Options(N_STEPS, **options),
        folder,
        resume,
        evaluate,
        quiet=True,
    )
    return model, result


def assert_same_weights(model, state):
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_is_torchs_adamw_on_whole_steps(tmp_path):
    """Steps in two parts, against a loop of AdamW without weight decay on one dim, in float64."""
    options = Options(5, lr=1e-2, weight_decay=0.1, warmup=2, max_grad_norm=0.5)
    model, reference = model_of(0.0).double(), model_of(0.0).double()
    fit(model, RandomSteps(), loss_of, options, tmp_path, quiet=True)

    decayed = [p for p in reference.parameters() if p.dim() > 1]
    plain = [p for p in reference.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-2)
    batches = iter(RandomSteps(whole=True))
    reference.train()
    for factor in (1 / 3, 2 / 3, 1, 2 / 3, 1 / 3):
        (batch,) = next(batches)
        logits = reference(batch.packed).logits
        torch.nn.functional.cross_entropy(logits, batch.labels["labels"]).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        for group in adam.param_groups:
            group["lr"] = 1e-2 * factor
        adam.step()
        adam.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-9, atol=1e-9)


def test_history_is_of_whole_steps(tmp_path):
    _, result = run(tmp_path)
    assert [entry["step"] for entry in result.history] == [4, 8, 12]
    assert [entry["step"] for entry in result.evaluations] == [5, 10, 12]
    assert all(0 < entry["accuracy"] < 1 for entry in result.history)
    assert json.loads((tmp_path / "metrics.json").read_text())["history"] == result.history
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


# Runs of this file's `run` that kill themselves: nothing is flushed, nothing cleaned up.
KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads({threads})
torch.use_deterministic_algorithms(True, warn_only=True)
import test_loop
from pathlib import Path
n = {n}
real = {function}
def counted(*args, **kwargs):
    global n
    n -= 1
    if n == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
{function} = counted
test_loop.run(Path({folder!r}), resume=True, loss_of=lambda *a: test_loop.loss_of(*a))
"""


def killed_in(folder, function, n):
    text = textwrap.dedent(KILLED).format(
        tests=os.path.dirname(__file__),
        threads=torch.get_num_threads(),
        n=n,
        function=function,
        folder=str(folder),
    )
    done = subprocess.run([sys.executable, "-P", "-c", text], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_killed_twice_ends_the_same(tmp_path):
    """Once in the middle of a step, once where a checkpoint is written but not yet named."""
    whole, expected = run(tmp_path / "whole")
    killed_in(tmp_path / "killed", "test_loop.loss_of", 8)  # the second half of step 4
    killed_in(tmp_path / "killed", "os.replace", 7)
    left = {path.name[:4] for path in (tmp_path / "killed/checkpoints").iterdir()}
    assert left == {".ste", "step"}
    model, result = run(tmp_path / "killed", resume=True)
    assert_same_weights(model, whole.state_dict())
    assert result.history == expected.history
    assert result.evaluations == expected.evaluations
    assert not list((tmp_path / "killed/checkpoints").glob(".*"))


def test_damaged_checkpoint_falls_back(tmp_path):
    whole, _ = run(tmp_path)
    newest = tmp_path / "checkpoints/step-000000012.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"step-000000012\.pt cannot be read"):
        model, _ = run(tmp_path, resume=True)
    assert_same_weights(model, whole.state_dict())
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"PK")
    with (
        pytest.warns(UserWarning, match="cannot be read"),
        pytest.raises(ValueError, match="none of the checkpoints"),
    ):
        run(tmp_path, resume=True)


def test_no_space_left_is_one_error(tmp_path, monkeypatch):
    """The checkpoint before stays, and the run goes on from it when there is space again."""
    whole, _ = run(tmp_path / "whole")
    n = 0

    class Full:
        """Files in which 10,000 bytes have room, on a disk that is full from the 4th on."""

        def __init__(self, file):
            self.file, self.room = file, 10_000

        def write(self, data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    save = torch.save

    def full(state, file):
        nonlocal n
        n += 1
        save(state, Full(file) if n > 3 else file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"000000003\.pt is whole and stays") as error:
        run(tmp_path / "full")
    assert "No space left on device" in str(error.value)
    names = sorted(path.name for path in (tmp_path / "full/checkpoints").iterdir())
    assert names == ["step-000000002.pt", "step-000000003.pt"]
    monkeypatch.setattr(torch, "save", save)
    model, _ = run(tmp_path / "full", resume=True)
    assert_same_weights(model, whole.state_dict())


def test_refuses_other_settings_and_a_run_in_the_way(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match=r"lr was 0\.01 and is 0\.1"):
        run(tmp_path, resume=True, lr=0.1)
    with pytest.raises(ValueError, match="has checkpoints of a run"):
        run(tmp_path)


def test_keeps_the_best_and_stops(tmp_path):
    """Evaluations are made to be 3, 5, 4, 4: the second counts, and two without a better end it."""
    model, kept, values = model_of(), {}, iter([3.0, 5.0, 4.0, 4.0])

    def measured(model):
        value = next(values)
        kept[value] = {name: x.clone() for name, x in model.state_dict().items()}
        return {"score": value}

    options = Options(50, evaluate_every=2, metric="score", patience=2)
    result = fit(model, RandomSteps(), loss_of, options, tmp_path, evaluate=measured, quiet=True)
    assert (result.step, result.best_step, result.stopped_early) == (8, 4, True)
    assert_same_weights(model, kept[5.0])


def test_stops_where_the_loss_is_not_finite(tmp_path):
    def infinite(model, batch, n_items):
        return loss_of(model, batch, n_items)[0] * torch.inf, {}

    with pytest.raises(ValueError, match="the loss is nan near step 4"):
        run(tmp_path, loss_of=infinite)


RANK = """
import sys
sys.path.insert(0, {tests!r})
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from pathlib import Path
from test_loop import *
dist.init_process_group("gloo", init_method="file://{folder}/meet", rank={rank}, world_size=2)
folder, found = Path("{folder}"), []
for resume in (False, True):
    model = model_of(0.0).double()
    options = Options(6, lr=1e-2, log_every=1, save_every=4)
    result = fit(model, RandomSteps(rank={rank}), loss_of, options, folder, resume, quiet=True)
    found.append((model.state_dict(), result.history))
    if {rank} == 0 and not resume:
        (folder / "checkpoints/step-000000006.pt").unlink()  # the second goes on from step 4
    dist.barrier()
torch.save(found, folder / "rank-{rank}.pt")
dist.destroy_process_group()
"""


def test_two_ranks_are_one_with_twice_the_batch(tmp_path):
    """In float64, over gloo, ranks with different numbers of batches; then resumed."""
    model = model_of(0.0).double()
    options = Options(6, lr=1e-2, log_every=1)
    one = fit(model, RandomSteps(whole=True), loss_of, options, tmp_path / "one", quiet=True)
    tests = os.path.dirname(__file__)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", RANK.format(tests=tests, folder=tmp_path, rank=rank)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    for rank in (0, 1):
        (state, history), (resumed, its_history) = torch.load(tmp_path / f"rank-{rank}.pt")
        assert history == its_history
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value)
            assert torch.equal(resumed[name], state[name])
        for ours, expected in zip(history, one.history, strict=True):
            assert ours == pytest.approx(expected)


def test_groups():
    model = model_of()
    options = Options(1, lr=1.0, layer_decay=0.5, freeze=1)
    groups = parameter_groups(model, options)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    layers = model.bert.encoder.layer
    assert not any(p.requires_grad for p in layers[0].parameters())
    assert not any(p.requires_grad for p in model.bert.embeddings.parameters())
    assert {rates[id(p)] for p in layers[1].parameters()} == {0.5}
    assert {rates[id(p)] for p in model.classifier.parameters()} == {1.0}
    for group in groups:
        assert {p.dim() > 1 for p in group["params"]} == {group["weight_decay"] > 0}


# 10 steps with a warm-up of 2: up to 1, then down to 0 at the end, in the middle a half.
@pytest.mark.parametrize("schedule, middle", [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_schedules(schedule, middle):
    options = Options(10, schedule=schedule, warmup=0.2)
    rates = [options.rate(step) for step in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[6] == pytest.approx(middle)
    with pytest.raises(ValueError, match="schedule must be linear"):
        Options(1, schedule="steep")
