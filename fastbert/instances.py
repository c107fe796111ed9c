"""From a tokenised corpus to what pretraining reads: segments, masks, packed batches.

Segments follow google-research/bert's create_pretraining_data.py (Apache-2.0), whose rules are
computed here for all documents of a block at once. Nothing is stored: an epoch's instances and
masks follow from the seed, the epoch and where in it they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from fastbert.loop import MicroBatch
from fastbert.losses import IGNORED
from fastbert.masking import Flags, Ints, Masking, Vocabulary
from fastbert.packing import PackedBatch
from fastbert.shards import Block, Corpus, offsets


@dataclass(frozen=True)
class Pairs:
    """Two texts each: tokens a[0] to a[1] of a block, then b[0] to b[1]. Without a second text
    `b` is empty. is_random: whether the second one is from elsewhere."""

    a: tuple[Ints, Ints]
    b: tuple[Ints, Ints]
    is_random: Flags

    def __len__(self) -> int:
        return len(self.is_random)

    def __getitem__(self, index: Any) -> Pairs:
        a, b = ((low[index], high[index]) for low, high in (self.a, self.b))
        return Pairs(a, b, self.is_random[index])


def plan_pairs(
    block: Block, max_tokens: int, short_probability: float, rng: np.random.Generator
) -> Pairs:
    """Sentence pairs from every document, not yet truncated.

    A chunk is the next sentences of a document until there are max_tokens; with short_probability
    a target is drawn from 2 to max_tokens instead. It is cut between two of its sentences: what
    is before is the first text. In half of the cases, and where there is but one sentence, the
    second text is from another document of the block, to the same length, and the rest of the
    chunk is put back. In google's the target is drawn once a document, here for each chunk.
    """
    ends, documents = block.sentences, block.documents
    n_documents = len(documents) - 1
    cursor, active = documents[:-1].copy(), np.arange(n_documents)
    found: list[tuple[NDArray[Any], ...]] = []
    while n := len(active):
        start = cursor[active]
        target = _targets(n, max_tokens, short_probability, rng)
        stop = np.searchsorted(ends, ends[start] + target).clip(max=documents[active + 1])
        middle = start + rng.integers(1, np.maximum(stop - start, 2))
        is_random = (stop - start == 1) | (rng.random(n) < 0.5)
        other = active
        if n_documents > 1:
            other = (active + rng.integers(1, n_documents, n)) % n_documents
        first = rng.integers(documents[other], documents[other + 1])
        missing = np.maximum(target - (ends[middle] - ends[start]), 1)
        last = np.searchsorted(ends, ends[first] + missing).clip(max=documents[other + 1])
        b = np.where(is_random, first, middle), np.where(is_random, last, stop)
        found.append((ends[start], ends[middle], ends[b[0]], ends[b[1]], is_random))
        cursor[active] = np.where(is_random, middle, stop)
        active = active[cursor[active] < documents[active + 1]]
    a0, a1, b0, b1, random = (np.concatenate(column) for column in zip(*found, strict=True))
    return Pairs((a0, a1), (b0, b1), random)


def truncate(pairs: Pairs, max_tokens: int, rng: np.random.Generator) -> Pairs:
    """Take tokens from the longer text, of equal ones from the second, until max_tokens are left;
    each from the front or from the back by chance."""
    a, b = (high - low for low, high in (pairs.a, pairs.b))
    half = max_tokens // 2
    new_b = np.minimum(b, np.maximum(half, max_tokens - a))
    new_a = np.minimum(a, max_tokens - new_b)
    cut = []
    for (low, _), old, new in ((pairs.a, a, new_a), (pairs.b, b, new_b)):
        low = low + rng.binomial(old - new, 0.5)
        cut.append((low, low + new))
    return Pairs(cut[0], cut[1], pairs.is_random)


def plan_texts(
    block: Block, max_tokens: int, short_probability: float, rng: np.random.Generator
) -> Pairs:
    """Single texts: as many whole sentences of a document as fit, and parts of those that do not.

    Every token of the block is in exactly one.
    """
    bounds = block.sentences[block.documents]
    cursor, active = bounds[:-1].copy(), np.arange(len(bounds) - 1)
    found = []
    while n := len(active):
        start = cursor[active]
        most = start + _targets(n, max_tokens, short_probability, rng)
        stop = block.sentences[np.searchsorted(block.sentences, most, "right") - 1]
        stop = np.where(stop > start, stop, most).clip(max=bounds[active + 1])
        found.append((start, stop))
        cursor[active] = stop
        active = active[stop < bounds[active + 1]]
    start, stop = (np.concatenate(column) for column in zip(*found, strict=True))
    return Pairs((start, stop), (stop, stop), np.zeros(len(start), bool))


def _targets(n: int, max_tokens: int, short: float, rng: np.random.Generator) -> Ints:
    drawn = rng.integers(min(2, max_tokens), max_tokens + 1, n)
    return np.where(rng.random(n) < short, drawn, max_tokens)


@dataclass(frozen=True)
class Instances:
    """The batches of each epoch over some documents of a corpus.

    documents: their numbers. max_length: of a sequence, with its special tokens. nsp: pairs whose
    second text follows or not, else texts of one document. batch_tokens: most tokens of a batch.
    block_tokens: about so many are in memory, and their instances shuffled, at a time; which
    documents these are is another choice in each epoch.
    """

    corpus: Corpus
    documents: Ints
    vocabulary: Vocabulary
    max_length: int = 128
    nsp: bool = True
    masking: Masking = field(default_factory=Masking)
    batch_tokens: int = 8192
    short_probability: float = 0.1
    seed: int = 0
    block_tokens: int = 1 << 23
    _blocks: dict[int, list[Ints]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_length < 8:
            raise ValueError(f"max_length must be at least 8, got {self.max_length}")
        if self.batch_tokens < self.max_length:
            raise ValueError(
                f"batch_tokens must be at least max_length = {self.max_length}, "
                f"got {self.batch_tokens}"
            )
        if not len(self.documents):
            raise ValueError("pretraining wants at least one document, got none")

    def blocks(self, epoch: int) -> list[Ints]:
        """The documents of each block of an epoch."""
        if epoch not in self._blocks:
            documents = np.random.default_rng([self.seed, epoch]).permutation(self.documents)
            ends = np.cumsum(self.corpus.lengths[documents])
            n_blocks = max(1, round(int(ends[-1]) / self.block_tokens))
            cuts = np.searchsorted(ends, ends[-1] * np.arange(1, n_blocks) / n_blocks) + 1
            self._blocks.clear()  # one epoch's are kept
            self._blocks[epoch] = [part for part in np.split(documents, cuts) if len(part)]
        return self._blocks[epoch]

    def plan(self, block: Block, rng: np.random.Generator) -> Pairs:
        """Instances of a block in random order."""
        if self.nsp:
            room = self.max_length - 3
            pairs = plan_pairs(block, room, self.short_probability, rng)
            pairs = truncate(pairs, room, rng)
        else:
            pairs = plan_texts(block, self.max_length - 2, self.short_probability, rng)
        return pairs[rng.permutation(len(pairs))]

    def batches(self, epoch: int, block: int) -> Batches:
        """Those of a block of an epoch."""
        documents = self.blocks(epoch)[block]
        return Batches(self, self.corpus.read(documents), (self.seed, epoch, block))


class Batches(Sequence[MicroBatch]):
    """The batches of a block, each made when it is asked for."""

    def __init__(self, instances: Instances, block: Block, seed: tuple[int, ...]) -> None:
        self._of, self._seed = instances, seed
        self._pairs = instances.plan(block, np.random.default_rng(seed))
        vocabulary = instances.vocabulary
        specials = np.array([vocabulary.cls, vocabulary.sep], block.tokens.dtype)
        self._tokens = np.concatenate([block.tokens, specials])
        ends = np.cumsum(self._lengths(self._pairs))
        cuts, done = [0], 0
        while cuts[-1] < len(ends):
            cuts.append(int(np.searchsorted(ends, done + instances.batch_tokens, "right")))
            done = int(ends[cuts[-1] - 1])
        self._cuts = cuts

    def __len__(self) -> int:
        return len(self._cuts) - 1

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        pairs = self._pairs[self._cuts[number] : self._cuts[number + 1]]
        nsp, vocabulary, masking = self._of.nsp, self._of.vocabulary, self._of.masking
        # A sequence is five runs of tokens, [CLS] a [SEP] b [SEP], or the first three of them.
        n_runs = 5 if nsp else 3
        sources, counts = (np.ones((len(pairs), n_runs), np.int64) for _ in range(2))
        sources[:, 0] = len(self._tokens) - 2
        sources[:, 2::2] = len(self._tokens) - 1
        for column, (low, high) in zip(range(1, n_runs, 2), (pairs.a, pairs.b), strict=False):
            sources[:, column], counts[:, column] = low, high - low
        flat = counts.ravel()
        starts = offsets(flat)
        place = np.arange(starts[-1])
        source = place + np.repeat(sources.ravel() - starts[:-1], flat)
        ids = self._tokens[source].astype(np.int32)
        lengths = self._lengths(pairs)
        cu_seqlens = offsets(lengths)
        rng = np.random.default_rng((*self._seed, number))
        ids, labels = masking.apply(ids, lengths, vocabulary, rng)
        kinds = np.tile(np.arange(n_runs, dtype=np.int32) // 3, len(pairs))
        packed = PackedBatch.unchecked(
            torch.from_numpy(ids),
            torch.from_numpy(np.repeat(kinds, flat)),
            torch.from_numpy((place - np.repeat(cu_seqlens[:-1], lengths)).astype(np.int32)),
            torch.from_numpy(cu_seqlens.astype(np.int32)),
            int(lengths.max()),
        )
        of_batch = {"labels": torch.from_numpy(labels)}
        n_items = {"labels": float((labels != IGNORED).sum())}
        if nsp:
            of_batch["next_sentence_label"] = torch.from_numpy(pairs.is_random.astype(np.int64))
            n_items["sequences"] = float(len(pairs))
        return MicroBatch(packed, of_batch, n_items)

    def _lengths(self, pairs: Pairs) -> Ints:
        texts = pairs.a[1] - pairs.a[0] + pairs.b[1] - pairs.b[0]
        return texts + (3 if self._of.nsp else 2)


class PretrainingSteps:
    """Steps without end for fastbert.loop.fit: epoch after epoch.

    phases: each with its instances and the steps after which the next one begins; the last one
    goes on. accumulate: batches of a rank in a step. The ranks share out consecutive batches, so
    that n ranks see in a step what one rank sees with n times as many.
    """

    _start: ClassVar[dict[str, int]] = dict.fromkeys(
        ("step", "phase", "epoch", "block", "batch"), 0
    )

    def __init__(
        self,
        phases: Sequence[tuple[int, Instances]],
        *,
        accumulate: int = 1,
        rank: int = 0,
        n_ranks: int = 1,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {accumulate}")
        self.phases = list(phases)
        self.accumulate, self.rank, self.n_ranks = accumulate, rank, n_ranks
        self._state = dict(self._start)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = dict(state)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        steps = self._steps()
        with ThreadPoolExecutor(1) as pool:  # the next step is made while this one is computed
            ahead = pool.submit(next, steps)
            while True:
                step, state = ahead.result()
                ahead = pool.submit(next, steps)
                self._state = state
                yield step

    def _steps(self) -> Iterator[tuple[list[MicroBatch], dict[str, int]]]:
        """Steps, and the state after each."""
        state = dict(self._state)
        ends = np.cumsum([n for n, _ in self.phases[:-1]])
        places = self._places(state)
        while True:
            phase = int(np.searchsorted(ends, state["step"], "right"))
            if phase != state["phase"]:
                state = {**self._start, "step": state["step"], "phase": phase}
                places = self._places(state)
            step = []
            for i in range(self.accumulate * self.n_ranks):
                batches, number, after = next(places)
                if i % self.n_ranks == self.rank:
                    step.append(batches[number])
            state = {**state, **after, "step": state["step"] + 1}
            yield step, state

    def _places(self, state: dict[str, int]) -> Iterator[tuple[Batches, int, dict[str, int]]]:
        """Where each batch of a phase is, and from where to go on behind it."""
        instances = self.phases[state["phase"]][1]
        epoch, block, first = state["epoch"], state["block"], state["batch"]
        while True:
            batches = instances.batches(epoch, block)
            for number in range(first, len(batches)):
                yield batches, number, {"epoch": epoch, "block": block, "batch": number + 1}
            is_last = block + 1 == len(instances.blocks(epoch))
            epoch, block, first = (epoch + 1, 0, 0) if is_last else (epoch, block + 1, 0)


def hold_out(corpus: Corpus, share: float, seed: int = 0) -> tuple[Ints, Ints]:
    """Numbers of the documents to train on, and of others with about this share of the tokens.

    share: from 0, then none are held out, to below 1. Raises ValueError where there are too few.
    """
    n = len(corpus.lengths)
    order = np.random.default_rng([seed, n]).permutation(n)
    if not 0 <= share < 1:
        raise ValueError(f"the share to hold out must be from 0 to below 1, got {share}")
    if share == 0:
        return np.sort(order), order[:0]
    ends = np.cumsum(corpus.lengths[order])
    n_held = max(2, int(np.searchsorted(ends, share * ends[-1])) + 1)  # two: to pair texts of
    if n_held >= n:
        raise ValueError(f"a share of {share} to hold out leaves nothing of {n} documents")
    return np.sort(order[n_held:]), np.sort(order[:n_held])
