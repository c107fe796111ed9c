"""Instances for pretraining: google-research/bert's rules, nothing lost, masks as promised."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from fastbert import BertTokenizer
from fastbert.corpus import build_corpus
from fastbert.instances import (
    Instances,
    Pairs,
    PretrainingSteps,
    hold_out,
    plan_pairs,
    plan_texts,
    truncate,
)
from fastbert.masking import MASKINGS, Masking, Vocabulary
from fastbert.shards import Block, offsets

PLAIN = [f"w{i}" for i in range(60)] + [f"##p{i}" for i in range(30)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOKENIZER = BertTokenizer({token: i for i, token in enumerate(SPECIAL + PLAIN)})
VOCABULARY = Vocabulary(TOKENIZER)


def random_block(n_documents=30, seed=0):
    """Every token another one, so that what is where can be told."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 40, n_documents)
    lengths = rng.integers(1, 30, counts.sum())
    return Block(np.arange(lengths.sum()), offsets(lengths), offsets(counts))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """600 documents whose words may have up to three pieces behind the first."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    with (folder / "a.txt").open("w") as file:
        for _ in range(600):
            for _ in range(rng.integers(1, 30)):
                words = [
                    f"w{rng.integers(60)}"
                    + "".join(f"p{rng.integers(30)}" for _ in range(rng.integers(4)))
                    for _ in range(rng.integers(1, 15))
                ]
                file.write(" ".join(words) + "\n")
            file.write("\n")
    return build_corpus([folder / "a.txt"], TOKENIZER, folder / "c", show_progress=False)


def instances(corpus, **options):
    documents = np.arange(len(corpus.lengths))
    return Instances(corpus, documents, VOCABULARY, **{"max_length": 64, **options})


def epoch(source, number=0):
    blocks = range(len(source.blocks(number)))
    return [batch for block in blocks for batch in source.batches(number, block)]


# Several lengths of a target; 3 is shorter than most sentences.
@pytest.mark.parametrize("max_tokens", [3, 40, 125])
def test_pairs_are_those_of_googles_loop(max_tokens):
    """The loop of create_instances_from_document, its chances taken from what is to be tested."""
    block = random_block()
    pairs = plan_pairs(block, max_tokens, 0.0, np.random.default_rng(1))
    ends, documents = block.sentences.tolist(), block.documents.tolist()
    of = np.searchsorted(block.sentences[block.documents], pairs.a[0], "right") - 1
    n_by_choice = 0
    for document in range(len(documents) - 1):
        mine = [pairs[i] for i in np.flatnonzero(of == document)]
        i, stop = documents[document], documents[document + 1]
        for pair in mine:
            a0, a1, b0, b1 = (int(x) for x in (*pair.a, *pair.b))
            end = i + 1
            while end < stop and ends[end] - ends[i] < max_tokens:
                end += 1
            middle = ends.index(a1)
            assert a0 == ends[i] and (i < middle < end or (end == i + 1 == middle))
            if pair.is_random:
                n_by_choice += end > i + 1
                first = ends.index(b0)
                other = np.searchsorted(documents, first, "right") - 1
                last = first + 1
                while last < documents[other + 1] and ends[last] - b0 < max_tokens - (a1 - a0):
                    last += 1
                assert other != document and b1 == ends[last]
                i = middle
            else:
                assert end > i + 1 and (b0, b1) == (a1, ends[end])
                i = end
        assert i == stop  # all sentences, each once
    n_choices = n_by_choice + (~pairs.is_random).sum()
    if max_tokens > 3:
        assert abs(n_by_choice / n_choices - 0.5) < 4 * 0.5 / n_choices**0.5


def test_truncation_takes_from_the_longer_one_and_from_both_sides():
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 60, (2, 3000))
    start = np.full(3000, 1000)
    pairs = Pairs((start, start + a), (start, start + b), np.zeros(3000, bool))
    for room in (41, 40):
        cut = truncate(pairs, room, rng)
        for i, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=True)):
            while x + y > room:
                x, y = (x - 1, y) if x > y else (x, y - 1)
            assert ((cut.a[1] - cut.a[0])[i], (cut.b[1] - cut.b[0])[i]) == (x, y)
        front = (cut.a[0] - 1000).sum() / (a - (cut.a[1] - cut.a[0])).sum()
        assert abs(front - 0.5) < 0.02


@pytest.mark.parametrize("max_tokens, short", [(126, 0.0), (20, 0.1)])
def test_single_texts_are_every_token_once(max_tokens, short):
    block = random_block()
    texts = plan_texts(block, max_tokens, short, np.random.default_rng(0))
    order = np.argsort(texts.a[0])
    start, stop = texts.a[0][order], texts.a[1][order]
    assert start[0] == 0 and stop[-1] == len(block.tokens) and (start[1:] == stop[:-1]).all()
    assert (stop - start).max() <= max_tokens
    bounds = block.sentences[block.documents]
    inside = np.searchsorted(bounds, start, "right") == np.searchsorted(bounds, stop, "left")
    assert inside.all()
    if not short:  # whole sentences, as many as fit, since none here is longer than that
        assert np.isin(stop, block.sentences).all()
        following = block.sentences[np.searchsorted(block.sentences, stop, "right").clip(
            max=len(block.sentences) - 1)]  # fmt: skip
        assert ((following - start > max_tokens) | np.isin(stop, bounds)).all()


def test_short_targets_are_a_tenth():
    one = Block(np.arange(100_000), np.arange(100_001), np.array([0, 100_000]))
    texts = plan_texts(one, 100, 0.1, np.random.default_rng(0))
    lengths = texts.a[1] - texts.a[0]
    short = lengths[lengths < 100]
    assert abs(len(short) / len(lengths) - 0.1) < 4 * (0.1 * 0.9 / len(lengths)) ** 0.5
    assert abs(short.mean() - 51) < 4 * 29 / len(short) ** 0.5  # any length alike


@pytest.mark.parametrize("nsp", [True, False])
def test_batches_are_sequences_of_the_corpus(corpus, nsp):
    source = instances(corpus, nsp=nsp, batch_tokens=512)
    batches = epoch(source)
    text = corpus.read(source.documents).tokens.astype("<u2").tobytes()
    n_tokens = [batch.n_tokens for batch in batches]
    assert max(n_tokens) <= 512 and min(n_tokens[:-1]) > 512 - 64
    for batch in batches[::10]:
        packed, labels = batch.packed, batch.labels["labels"]
        type(packed)(*vars(packed).values())  # the checks that making it leaves out
        original = torch.where(labels == -100, packed.input_ids, labels)
        for a, b in pairwise(packed.cu_seqlens.tolist()):
            ids = original[a:b].tolist()
            assert ids[0] == VOCABULARY.cls and ids[-1] == VOCABULARY.sep
            assert packed.position_ids[a:b].tolist() == list(range(b - a))
            ends = [i for i, id in enumerate(ids) if id == VOCABULARY.sep]
            assert len(ends) == 1 + nsp and b - a <= 64
            types = [0] * (ends[0] + 1) + [1] * (b - a - ends[0] - 1)
            assert packed.token_type_ids[a:b].tolist() == types
            parts = [ids[1 : ends[0]], *([ids[ends[0] + 1 : -1]] if nsp else [])]
            assert all(np.array(part, "<u2").tobytes() in text for part in parts)
        assert batch.n_items["labels"] == (labels != -100).sum()
        if nsp:
            assert batch.n_items["sequences"] == len(packed)


def test_an_epoch_loses_and_repeats_nothing(corpus):
    source = instances(corpus, nsp=False, block_tokens=10_000)
    assert len(source.blocks(0)) > 3
    seen = np.zeros(len(TOKENIZER), int)
    for batch in epoch(source):
        labels = batch.labels["labels"]
        original = torch.where(labels == -100, batch.packed.input_ids, labels)
        seen += np.bincount(original, minlength=len(TOKENIZER))
    seen[[VOCABULARY.cls, VOCABULARY.sep]] = 0
    wanted = np.bincount(corpus.read(source.documents).tokens, minlength=len(TOKENIZER))
    assert seen.tolist() == wanted.tolist()
    assert sorted(np.concatenate(source.blocks(0))) == source.documents.tolist()


def same(xs, ys):
    return len(xs) == len(ys) and all(
        torch.equal(x.packed.input_ids, y.packed.input_ids)
        and torch.equal(x.labels["labels"], y.labels["labels"])
        for x, y in zip(xs, ys, strict=True)
    )


def test_an_epoch_is_reproducible_and_another_is_another(corpus):
    source = instances(corpus)
    assert same(epoch(source), epoch(instances(corpus)))
    assert not same(epoch(source), epoch(source, 1))
    assert not same(epoch(source), epoch(instances(corpus, seed=1)))


def test_half_of_the_second_texts_follow(corpus):
    labels = torch.cat([b.labels["next_sentence_label"] for b in epoch(instances(corpus))])
    # Chunks of one sentence add to the random ones; they are few: documents' last sentences.
    assert 0.5 - 0.03 < labels.float().mean() < 0.65


@pytest.mark.parametrize("kind", MASKINGS)
def test_masks(corpus, kind):
    """15%, of which 80% [MASK], 10% random, 10% as they were; whole words; never special ones."""
    batches = epoch(instances(corpus, masking=Masking(kind), max_length=128, batch_tokens=4096))
    ids = torch.cat([b.packed.input_ids for b in batches])
    labels = torch.cat([b.labels["labels"] for b in batches])
    chosen = labels != -100
    original = torch.where(chosen, labels, ids)
    special = torch.from_numpy(VOCABULARY.is_special)
    assert not special[original[chosen]].any()
    n, n_chosen = len(ids), int(chosen.sum())
    assert abs(n_chosen / n - 0.15) < 0.005
    assert (special[ids[chosen]] == (ids[chosen] == VOCABULARY.mask)).all()  # none is put there
    became_mask = (ids[chosen] == VOCABULARY.mask).float().mean()
    stayed = (ids[chosen] == labels[chosen]).float().mean()
    units = n_chosen / (4 if kind == "spans" else 1)  # those of a span share a fate
    for share, wanted in ((became_mask, 0.8), (stayed, 0.1 + 0.1 / len(PLAIN))):
        assert abs(share - wanted) < 4 * (wanted * (1 - wanted) / units) ** 0.5
    inside = torch.from_numpy(VOCABULARY.continues)[original]
    inside[1:] &= ~special[original[:-1]]  # what is behind [CLS] or [SEP] starts a word
    n_cut = int((chosen[1:] != chosen[:-1])[inside[1:]].sum())
    n_sequences = sum(len(b.packed) for b in batches)
    if kind == "tokens":
        assert n_cut > n_sequences
    else:  # the last span of a sequence ends where there are enough
        assert n_cut <= (n_sequences if kind == "spans" else 0)


def test_the_number_of_masks_is_googles():
    """max(1, round(0.15 * length)), exactly, where the units are tokens."""
    lengths = np.array([3, 4, 9, 10, 17, 64, 127])
    ids = np.full(lengths.sum(), VOCABULARY.plain[0])
    ids[offsets(lengths)[:-1]], ids[offsets(lengths)[1:] - 1] = VOCABULARY.cls, VOCABULARY.sep
    _, labels = Masking().apply(ids, lengths, VOCABULARY, np.random.default_rng(0))
    counts = [int((part != -100).sum()) for part in np.split(labels, offsets(lengths)[1:-1])]
    assert counts == [max(1, round(0.15 * n)) for n in lengths.tolist()]


def test_all_positions_are_masked_alike():
    lengths = np.full(4000, 20)
    ids = np.full(lengths.sum(), VOCABULARY.plain[0])
    ids[::20], ids[19::20] = VOCABULARY.cls, VOCABULARY.sep
    for kind in ("tokens", "words"):
        _, labels = Masking(kind).apply(ids, lengths, VOCABULARY, np.random.default_rng(0))
        share = (labels.reshape(4000, 20) != -100).mean(0)
        assert not share[[0, 19]].any()
        assert np.abs(share[1:19] - 3 / 18).max() < 4 * (1 / 6 * 5 / 6 / 4000) ** 0.5, kind


def test_spans_have_spanberts_lengths():
    """Geometric with p = 0.2, at most 10 words, but where a sequence ends."""
    lengths = np.array([200_000])
    ids = np.full(lengths.sum(), VOCABULARY.plain[0])
    masking = Masking("spans", rate=0.02)  # few enough that two seldom touch
    _, labels = masking.apply(ids, lengths, VOCABULARY, np.random.default_rng(0))
    chosen = np.flatnonzero(np.diff(np.r_[0, labels != -100, 0]))
    spans = chosen[1::2] - chosen[::2]
    wanted = 0.2 * 0.8 ** np.arange(9)
    wanted = np.append(wanted, 1 - wanted.sum())
    found = np.bincount(spans, minlength=11)[1:11] / len(spans)
    assert np.abs(found - wanted).max() < 0.04
    assert (spans > 10).mean() < 0.05


def test_unknown_tokens_are_not_guessed():
    ids = np.full(1000, TOKENIZER.unk_token_id)
    ids[::10] = VOCABULARY.plain[0]
    _, labels = Masking(rate=0.5).apply(ids, np.array([1000]), VOCABULARY, np.random.default_rng(0))
    assert ((labels != -100) == (ids == VOCABULARY.plain[0])).all()


def take(steps, n):
    source = iter(steps)
    return [next(source) for _ in range(n)]


def test_steps_go_on_where_their_state_says(corpus):
    def made():
        small = instances(corpus, batch_tokens=256, block_tokens=20_000)
        longer = instances(corpus, batch_tokens=256, max_length=128)
        return PretrainingSteps([(130, small), (0, longer)], accumulate=2)

    wanted = take(made(), 200)  # over blocks, and into the second phase
    assert max(b.packed.max_seqlen for step in wanted[:130] for b in step) <= 64
    assert max(b.packed.max_seqlen for step in wanted[130:] for b in step) > 64
    for n in (1, 77, 129, 130, 131, 180):
        before, after = made(), made()
        take(before, n)
        after.load_state_dict(before.state_dict())
        assert all(map(same, take(after, 5), wanted[n : n + 5]))


def test_ranks_share_out_what_one_would_see(corpus):
    phases = [(0, instances(corpus, batch_tokens=256, block_tokens=20_000))]
    alone = take(PretrainingSteps(phases, accumulate=4), 60)
    ranks = [take(PretrainingSteps(phases, accumulate=2, rank=r, n_ranks=2), 60) for r in (0, 1)]
    for whole, first, second in zip(alone, *ranks, strict=True):
        assert same(whole[::2], first) and same(whole[1::2], second)


def test_held_out_documents_are_others(corpus):
    train, held = hold_out(corpus, 0.05)
    assert sorted([*train, *held]) == list(range(len(corpus.lengths)))
    assert corpus.lengths[held].sum() >= 0.05 * corpus.lengths.sum() - corpus.lengths.max()
    assert not len(hold_out(corpus, 0)[1])
    with pytest.raises(ValueError, match="leaves nothing of 600 documents"):
        hold_out(corpus, 0.9999999)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_length": 7}, "max_length must be at least 8, got 7"),
        ({"batch_tokens": 63}, "batch_tokens must be at least max_length = 64, got 63"),
    ],
)
def test_refuses(corpus, options, message):
    with pytest.raises(ValueError, match=message):
        instances(corpus, **options)
    with pytest.raises(ValueError, match="masking must be one of"):
        Masking("letters")
