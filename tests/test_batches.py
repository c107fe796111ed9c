"""Steps of packed sequences: all of them once an epoch, cut by tokens, resumable."""

from itertools import islice

import numpy as np
import pytest
import torch

from fastbert import PackedBatch
from fastbert.batches import TokenBatches, by_budget, select
from fastbert.loop import MicroBatch

LENGTHS = np.random.default_rng(0).integers(1, 40, 101)


def batches(**options):
    """Steps whose batches hold nothing but the numbers of their sequences."""
    return TokenBatches(LENGTHS, lambda index, epoch: index.tolist(), epochs=2, **options)


def of_step(step):
    return [i for batch in step for i in batch]


# By sequences; by tokens; sorted by length within 5 steps.
@pytest.mark.parametrize(
    "options", [{"batch_size": 8}, {"batch_size": None, "step_tokens": 200}, {"window": 5}]
)
def test_every_epoch_has_all_in_another_order(options):
    source = batches(**options)
    steps = list(source)
    assert len(steps) == len(source)
    first = source.steps_of_epoch[0]
    epochs = [[i for s in part for i in of_step(s)] for part in (steps[:first], steps[first:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(101))
    assert epochs[0] != epochs[1]
    assert list(batches(**options)) == steps
    assert list(batches(**options, seed=1)) != steps


def test_budgets_hold():
    steps = list(batches(batch_size=None, step_tokens=200, batch_tokens=50))
    for step in steps:
        assert LENGTHS[of_step(step)].sum() <= 200
        assert all(LENGTHS[batch].sum() <= 50 for batch in step)
    assert np.mean([LENGTHS[of_step(step)].sum() for step in steps]) > 150
    runs = by_budget(np.array([5, 100, 3, 3, 3]), 8)
    assert [run.tolist() for run in runs] == [[0], [1], [2, 3], [4]]


def test_cuts_change_nothing_but_the_cuts():
    whole, cut = batches(batch_tokens=10_000), batches(batch_tokens=60)
    assert [of_step(step) for step in whole] == [of_step(step) for step in cut]


def test_windows_make_lengths_alike():
    def spread(source):
        return np.mean([np.ptp(LENGTHS[of_step(step)]) for step in source])

    assert spread(batches(batch_size=8, window=6)) < 0.5 * spread(batches(batch_size=8))


# After no step, in the first epoch, at its end, in the second.
@pytest.mark.parametrize("n_done", [0, 5, 13, 20])
def test_goes_on_where_it_was(n_done):
    steps = list(batches(batch_size=8))
    source = batches(batch_size=8)
    assert list(islice(source, n_done)) == steps[:n_done]
    other = batches(batch_size=8)
    other.load_state_dict(source.state_dict())
    assert list(other) == steps[n_done:]


def test_ranks_share_each_step():
    whole = [of_step(step) for step in batches()]
    parts = [[of_step(step) for step in batches(rank=r, n_ranks=2)] for r in (0, 1)]
    for step, a, b in zip(whole, *parts, strict=True):
        assert sorted(a + b) == sorted(step)
        assert abs(len(a) - len(b)) <= 1


def test_half_an_epoch():
    source = TokenBatches(LENGTHS, lambda index, epoch: index.tolist(), epochs=0.5, batch_size=8)
    assert len(source) == len(list(source)) == 6  # of 13


def test_select_is_what_split_gives():
    lengths = torch.tensor([3, 0, 5, 2])
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    ids = torch.arange(10, dtype=torch.int32)
    packed = PackedBatch(ids, ids % 2, ids + 1, ends, 5)
    parts = packed.split(1)
    chosen = select(packed, [2, 1, 0])
    for name in ("input_ids", "token_type_ids", "position_ids"):
        expected = torch.cat([getattr(parts[i], name) for i in (2, 1, 0)]).long()
        assert torch.equal(getattr(chosen, name), expected)
    assert chosen.lengths.tolist() == [5, 0, 3]
    assert MicroBatch(chosen, {}, {}).n_tokens == 8


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_tokens": 0}, {"window": 0}])
def test_refuses(options):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        batches(**options)
