"""Which tokens pretraining hides: tokens, whole words or spans, another choice each time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbert.losses import IGNORED
from fastbert.shards import offsets
from fastbert.tokenizer import BertTokenizer

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]
MASKINGS = ("tokens", "words", "spans")
_LONGEST_SPAN, _SPAN_P = 10, 0.2  # words, and the geometric distribution of SpanBERT (Joshi 2020)


class Vocabulary:
    """What instances need to know of a tokenizer. Special tokens: also the unknown one."""

    def __init__(self, tokenizer: BertTokenizer) -> None:
        n = len(tokenizer)
        for name in ("cls_token", "sep_token", "mask_token"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"pretraining wants a tokenizer with a {name}, got None")
        self.cls, self.sep, self.mask = (
            int(tokenizer.convert_tokens_to_ids(token))  # type: ignore[arg-type]
            for token in (tokenizer.cls_token, tokenizer.sep_token, tokenizer.mask_token)
        )
        self.is_special = np.zeros(n, bool)
        self.is_special[tokenizer.all_special_ids] = True
        self.continues = np.zeros(n, bool)
        vocab = tokenizer.get_vocab()
        self.continues[[id for token, id in vocab.items() if token.startswith("##")]] = True
        known = np.zeros(n, bool)
        known[list(vocab.values())] = True
        self.plain = np.flatnonzero(known & ~self.is_special).astype(np.int32)


@dataclass(frozen=True)
class Masking:
    """Which tokens are to be guessed, and what stands in their place.

    kind: "tokens", whole "words", or "spans" of words as in SpanBERT. rate: the share of a
    sequence, [CLS] and [SEP] counted, as in google-research/bert; at least one token or word.
    `masked` of those become [MASK], `random` a token that is not special, the others stay: by
    chance for each token, in spans for each span.
    """

    kind: str = "tokens"
    rate: float = 0.15
    masked: float = 0.8
    random: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in MASKINGS:
            raise ValueError(f"masking must be one of {', '.join(MASKINGS)}, got {self.kind!r}")
        if not 0 < self.rate < 1:
            raise ValueError(f"the masking rate must be between 0 and 1, got {self.rate}")

    def apply(
        self, ids: NDArray[Any], lengths: Ints, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> tuple[NDArray[Any], Ints]:
        """(n_tokens,) ids of sequences of these lengths: (ids with masks, labels)."""
        special = vocabulary.is_special[ids]
        chosen, unit = self._choose(ids, lengths, special, vocabulary, rng)
        places = np.flatnonzero(chosen)
        fate = rng.random(len(places))
        if self.kind == "spans":
            fate = rng.random(unit[-1] + 1)[unit[places]]
        labels = np.full(len(ids), IGNORED, np.int64)
        labels[places] = ids[places]
        ids = ids.copy()
        ids[places[fate < self.masked]] = vocabulary.mask
        swapped = places[(fate >= self.masked) & (fate < self.masked + self.random)]
        ids[swapped] = vocabulary.plain[rng.integers(0, len(vocabulary.plain), len(swapped))]
        return ids, labels

    def _choose(
        self,
        ids: NDArray[Any],
        lengths: Ints,
        special: Flags,
        vocabulary: Vocabulary,
        rng: np.random.Generator,
    ) -> tuple[Flags, Ints]:
        """Whether each token is to be guessed, and the number of the unit that it is in.

        Units of a sequence are taken in random order until rate * length tokens are. Where one goes
        beyond that, a span is cut, as in SpanBERT, and a word is taken with the probability that
        makes the rate right in the mean.
        """
        starts = self._starts(ids, special, vocabulary, rng)
        first = np.flatnonzero(starts)
        unit = np.cumsum(starts) - 1
        sizes = np.diff(first, append=len(ids))
        n_units = np.bincount(np.repeat(np.arange(len(lengths)), lengths)[first])
        sequence = np.repeat(np.arange(len(n_units)), n_units)
        excluded = special[first]
        order = np.argsort(sequence + np.where(excluded, 0.99, 0.9 * rng.random(len(first))))
        sorted_sizes = sizes[order]
        before = np.cumsum(sorted_sizes) - sorted_sizes
        before -= np.repeat(before[offsets(n_units)[:-1]], n_units)
        left = np.maximum(1, np.rint(self.rate * lengths))[sequence] - before
        if self.kind == "spans":
            left = np.minimum(left, sorted_sizes)
        else:
            is_taken = (left > rng.random(len(order)) * sorted_sizes) | (before == 0)
            left = np.where(is_taken & (left > 0), sorted_sizes, 0)
        n_chosen = np.empty(len(first))
        n_chosen[order] = left
        n_chosen[excluded] = 0
        return np.arange(len(ids)) - first[unit] < n_chosen[unit], unit

    def _starts(
        self, ids: NDArray[Any], special: Flags, vocabulary: Vocabulary, rng: np.random.Generator
    ) -> Flags:
        """Where units start. Special tokens are units of their own."""
        if self.kind == "tokens":
            return np.ones(len(ids), bool)
        starts = ~vocabulary.continues[ids] | special
        starts[1:] |= special[:-1]
        if self.kind == "words":
            return starts
        words = np.flatnonzero(starts)
        lengths = np.minimum(rng.geometric(_SPAN_P, len(words)), _LONGEST_SPAN)
        borders = np.cumsum(lengths)
        is_border = np.zeros(len(words), bool)
        is_border[0] = True
        is_border[borders[borders < len(words)]] = True
        spans = special.copy()
        spans[1:] |= special[:-1]
        spans[words[is_border]] = True
        return spans
