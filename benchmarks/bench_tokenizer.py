"""Text to ids on one core, against everything else that does it for BERT."""

import csv
import functools
import gzip
import importlib.util
import multiprocessing
import os
import random
import sysconfig
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from tokenizer_peers import DATA, LENGTH, PEERS, installed, memory, vocab_file

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real texts: {DATA} is not there")
UNCASED, CHINESE, CASED = "bert-base-uncased", "bert-base-chinese", "bert-base-multilingual-cased"
SLOW = "tokenizers", "transformers"
LARGEST = 4_000_000  # bytes timed of one kind of text


# ---- Texts


def size(texts):
    return sum(len(text.encode()) for text in texts)


def lines(name):
    path = DATA / name
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return [line.rstrip("\n") for line in file if line.strip()]


def columns(name, *wanted):
    rows = csv.DictReader(lines(name), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [". ".join(row[column] for column in wanted) for row in rows]


def tweets():
    texts, words = [], []
    for part in ("train", "dev", "test"):
        for line in (DATA / f"ner/wnut17_{part}.conll").read_text("utf-8").split("\n"):
            if line.strip():
                words.append(line.split("\t")[0])
            elif words:
                texts.append(" ".join(words))
                words = []
    return texts


def code():
    """The standard library of this Python, cut between lines to texts of about 1 kB."""
    texts, text = [], ""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for line in path.read_text("utf-8").splitlines(keepends=True):
            text += line
            if len(text) >= 1000:
                texts.append(text)
                text = ""
    return texts


def korean():
    """The constitution and bills that konlpy ships; Python code of it is not run."""
    spec = importlib.util.find_spec("konlpy")
    if spec is None:
        pytest.skip("the Korean texts are konlpy's, which is not installed")
    files = sorted(Path(spec.origin).parent.glob("data/corpus/ko*/*.txt"))
    return [line for path in files for line in path.read_text("utf-8").splitlines() if line.strip()]


# name: (texts, vocabulary)
WORKLOADS = {
    "English prose": (lambda: lines("corpus/en_novels.txt.gz"), UNCASED),
    "SST-2": (lambda: columns("sst2/train.tsv.gz", "sentence"), UNCASED),
    "AG News": (lambda: columns("ag_news/part1.tsv.gz", "title", "description"), UNCASED),
    "tweets": (tweets, UNCASED),
    "code": (code, UNCASED),
    "Chinese Wikipedia": (lambda: lines("corpus/zh_wiki.txt.gz"), CHINESE),
    "Chinese reviews": (lambda: columns("chnsenticorp/train.tsv.gz", "text"), CHINESE),
    "Japanese": (lambda: lines("corpus/ja_soseki.txt.gz"), CASED),
    "Korean": (korean, CASED),
    "Russian": (lambda: lines("corpus/ru_novels.txt.gz"), CASED),
    "German": (lambda: lines("corpus/de_novels.txt.gz"), CASED),
    "Arabic": (lambda: lines("corpus/ntrex/arb.txt.gz"), CASED),
    "Hindi": (lambda: lines("corpus/ntrex/hin.txt.gz"), CASED),
}


def at_most(n_bytes, texts):
    kept = []
    for text in texts:
        n_bytes -= len(text.encode())
        if n_bytes < 0:
            break
        kept.append(text)
    return kept


@functools.lru_cache(1)
def halves(workload):
    """Texts to fill caches with, and unseen ones to time."""
    texts = WORKLOADS[workload][0]()
    middle = len(texts) // 2
    return at_most(LARGEST, texts[:middle]), at_most(LARGEST, texts[middle:])


# ---- Timing


@pytest.fixture(autouse=True)
def cpus(monkeypatch):
    """One core for everybody; gives those that there are."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("needs to pin this thread, and the threads it makes, to one core")
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    yield before
    os.sched_setaffinity(0, before)


@functools.lru_cache(1)
def made(peer, vocab, call):
    return PEERS[peer](vocab)


def rows(tokenizer, call, outs):
    """Lists of ids, of what `tokenizer` gave."""
    if call == "padded":
        return [row for ids, _ in outs for row in ids.tolist()]
    if call == "query":
        # Two of the peers leave these to the caller.
        return [ids.tolist() if ids[0] == 101 else [101, *ids.tolist(), 102] for ids in outs]
    return [row for out in outs for row in tokenizer.ids(out)]


def run(tokenizer, call, arguments):
    return [getattr(tokenizer, call)(argument) for argument in arguments]


WANTED = {}  # of one group


def wanted(group, vocab, call, arguments):
    if group not in WANTED:
        WANTED.clear()
        tokenizer = PEERS["tokenizers"](vocab)
        WANTED[group] = rows(tokenizer, call, run(tokenizer, call, arguments))
    return WANTED[group]


def compare(timed, group, peer, vocab, call, arguments, *, warm=(), **facts):
    """Time `call` of a peer for each of `arguments`, after those of `warm`.

    Peers with caches are made and warmed anew for each round, when that of the round before is
    gone: to free a large vocabulary empties the CPU's caches.
    """
    facts = {"provider": peer, "rounds": 3 if peer in SLOW else 9, **facts}
    if not installed(peer):
        timed(lambda: None, group, provider=f"{peer} (not installed)", untimed=True)
        return
    if not hasattr(PEERS[peer], call):
        pytest.skip(f"{peer} has no call for this")

    held = []

    def prepare():
        held.clear()
        if not PEERS[peer].has_caches:
            held.append(made(peer, vocab, call))
            return
        held.append(PEERS[peer](vocab))
        run(held[0], call, warm)

    prepare()
    found = rows(held[0], call, run(held[0], call, arguments))
    expected = wanted(group, vocab, call, arguments)
    same = [a == b for a, b in zip(found, expected, strict=True)]
    assert peer != "fastbert" or all(same)
    timed(
        lambda _: run(held[0], call, arguments),
        group,
        setup=prepare,
        exact=sum(same) / len(same),
        **facts,
    )


COLD = "fastbert, cold caches"


@pytest.mark.parametrize("peer", ["fastbert", COLD, *list(PEERS)[1:]])
@pytest.mark.parametrize("workload", WORKLOADS)
def bench_packed(timed, peer, workload):
    warm, texts = halves(workload)
    vocab = WORKLOADS[workload][1]
    group, facts = f"{workload} to packed ids", {"provider": peer, "bytes": size(texts)}
    warm, peer = ([], "fastbert") if peer == COLD else ([warm], peer)
    compare(timed, group, peer, vocab, "packed", [texts], warm=warm, **facts)


def batches(texts):
    return [texts[i : i + 128] for i in range(0, len(texts) - 127, 128)]


@pytest.mark.parametrize("peer", PEERS)
def bench_padded(timed, peer):
    warm, texts = map(batches, halves("AG News"))
    group = f"AG News, padded int64 128 x {LENGTH}"
    facts = {"warm": warm, "bytes": sum(map(size, texts))}
    compare(timed, group, peer, UNCASED, "padded", texts, **facts)


@pytest.mark.parametrize("peer", PEERS)
def bench_offsets(timed, peer):
    warm, texts = halves("AG News")
    if peer == "fastbert":
        ours, theirs = (PEERS[p](UNCASED) for p in (peer, "tokenizers"))
        assert ours.spans(ours.offsets(texts)) == theirs.spans(theirs.offsets(texts))
    facts = {"warm": [warm], "bytes": size(texts)}
    compare(timed, "AG News, with offsets", peer, UNCASED, "offsets", [texts], **facts)


@pytest.mark.parametrize("peer", PEERS)
def bench_query(timed, peer):
    warm, texts = ([t for t in half if 55 <= len(t) <= 65][:1000] for half in halves("SST-2"))
    facts = {"warm": warm, "bytes": size(texts), "calls": len(texts)}
    compare(timed, "a query of 60 bytes, to an array", peer, UNCASED, "query", texts, **facts)


@pytest.mark.parametrize("num_threads", [1, 2])
def bench_threads(timed, cpus, num_threads):
    if len(cpus) < 2:
        pytest.skip("needs two cores")
    os.sched_setaffinity(0, cpus)
    warm, texts = halves("English prose")
    tokenizer = PEERS["fastbert"](UNCASED)
    for _ in range(3):  # so that each thread has seen most of it
        tokenizer.packed(warm, num_threads)
    timed(
        lambda: tokenizer.packed(texts, num_threads),
        "English prose, fastbert's threads",
        provider=("one thread", "two threads")[num_threads - 1],
        rounds=25,
        bytes=size(texts),
    )


# ---- Worst cases, memory, exactness


def without_spaces():
    """10 MB of letters: one word."""
    letters = "".join(filter(str.isalpha, "".join(lines("corpus/en_novels.txt.gz")).lower()))
    return [(letters * 2)[:10_000_000]]


def near_misses():
    """Words of 100 characters that are in pieces up to the last character, which is in none."""
    pieces = vocab_file(UNCASED).read_text("utf-8").split("\n")
    pieces = [p[2:-1] for p in pieces if p.startswith("##") and len(p) > 9 and p.isascii()]
    choose = random.Random(0).choice
    words = ["".join(choose(pieces) for _ in range(20))[:99] + "\u16a0" for _ in range(10_000)]
    return [" ".join(words[i : i + 10]) for i in range(0, len(words), 10)]


WORST = {"10 MB without a space": without_spaces, "words of 100 that nearly match": near_misses}


@pytest.mark.parametrize("peer", ["fastbert", "tokenizers"])
@pytest.mark.parametrize("case", WORST)
def bench_worst(timed, peer, case):
    texts = WORST[case]()
    compare(
        timed,
        case,
        peer,
        UNCASED,
        "packed",
        [texts],
        rounds=1 if peer in SLOW else 9,
        bytes=size(texts),
    )


@pytest.mark.parametrize("peer", ["fastbert", "transformers"])
def bench_overflow(timed, peer):
    words = " ".join(lines("corpus/en_novels.txt.gz")[:500]).split()
    pair = " ".join(words[:4000]), " ".join(words[4000:8000])
    options = {"truncation": True, "max_length": 256, "stride": 64, "padding": True}
    options |= {"return_overflowing_tokens": True, "return_tensors": "np"}
    first, other = (PEERS[p](UNCASED).tokenizer for p in (peer, "transformers"))
    found, expected = (tokenizer(*pair, **options)["input_ids"] for tokenizer in (first, other))
    assert (found == expected).all()
    timed(
        lambda: first(*pair, **options),
        f"a pair of 4,000 words each, {len(found):,} windows of 256, stride 64",
        provider=peer,
        rounds=1 if peer in SLOW else 9,
    )


@pytest.mark.parametrize("peer", PEERS)
def bench_memory(timed, peer):
    texts = at_most(8_000_000, lines("corpus/en_novels.txt.gz"))
    group = "memory for 8 MB of English prose, in lines"
    if not installed(peer):
        timed(lambda: None, group, provider=f"{peer} (not installed)", untimed=True)
        return
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        added = process.submit(memory, peer, UNCASED, texts).result()
    timed(lambda: None, group, provider=peer, untimed=True, memory=added)


def nasty_texts():
    """What once broke some tokenizer, and random characters of all kinds."""
    from tokenizer_cases import NASTY

    blocks = [(0x20, 0x7F), (0x61, 0x7B), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530)]
    blocks += [(0x900, 0xE80), (0x1100, 0x1200), (0x2000, 0x2070), (0x3000, 0x3100)]
    blocks += [(0x4E00, 0xA000), (0xAC00, 0xD7A4), (0x0, 0xD800), (0x1F300, 0x20000)]
    draw = random.Random(0)

    def word():
        mixed = draw.choices(blocks, k=2)
        return "".join(chr(draw.randrange(*draw.choice(mixed))) for _ in range(draw.randint(1, 8)))

    texts = [" ".join(word() for _ in range(draw.randint(1, 5))) for _ in range(1670 - len(NASTY))]
    return NASTY + texts


@pytest.mark.parametrize("peer", PEERS)
def bench_exactness(timed, peer):
    texts = nasty_texts()
    group = f"equal ids on {len(texts):,} nasty texts"
    compare(timed, group, peer, UNCASED, "packed", [texts], untimed=True)
