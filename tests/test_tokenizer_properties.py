"""What holds of every text, of every number of threads, and after a fork."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import NASTY, UNCASED_VOCAB, WORDS

from fastbert.packing import unpack
from fastbert.tokenizer import BertTokenizer

TOKENIZER = BertTokenizer(UNCASED_VOCAB)
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ASCII = st.text(st.characters(max_codepoint=126), max_size=60)
BATCHES = st.lists(ANY | ASCII | st.sampled_from(NASTY), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(text=ASCII)
def test_offsets_slice_the_text(text):
    found = TOKENIZER(text, add_special_tokens=False, split_special_tokens=True,
                      return_offsets_mapping=True)  # fmt: skip
    for token, (begin, end) in zip(found.tokens(), found.offset_mapping, strict=True):
        if token != "[UNK]":
            piece = "".join(c for c in text[begin:end].lower() if c.isprintable())
            assert piece == token.removeprefix("##") or piece == token


@settings(max_examples=300, deadline=None)
@given(words=st.lists(st.sampled_from(["run", "##s", "unaffable", "\u65e5", "don", "42"])))
def test_decoded_text_has_the_same_ids(words):
    """Of what has no [UNK] and no punctuation, since decoding joins that."""
    ids = TOKENIZER(" ".join(words).replace(" ##", ""), add_special_tokens=False).input_ids
    if TOKENIZER.unk_token_id not in ids and not {"#"} & set(TOKENIZER.decode(ids)):
        assert TOKENIZER(TOKENIZER.decode(ids), add_special_tokens=False).input_ids == ids


@settings(max_examples=200, deadline=None)
@given(texts=BATCHES, max_length=st.sampled_from([3, 5, 16, 512]))
def test_batch_single_packed_padded_and_bytes_are_equal(texts, max_length):
    packed = TOKENIZER.pack(texts, max_length=max_length)
    padded = TOKENIZER(
        texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt"
    )
    assert torch.equal(unpack(packed.input_ids, packed), padded.input_ids)
    in_bytes = TOKENIZER.pack([text.encode() for text in texts], max_length=max_length)
    assert torch.equal(in_bytes.input_ids, packed.input_ids)
    for text, part in zip(texts, packed.split(1), strict=True):
        assert TOKENIZER.encode_arrays(text, max_length=max_length)[0].tolist() == (
            part.input_ids.tolist()
        )


def lengths_of(arguments):
    texts, max_length, num_threads = arguments
    packed = TOKENIZER.pack(texts, max_length=max_length, num_threads=num_threads)
    return packed.input_ids.tolist()


def test_threads_with_lengths_of_their_own():
    texts = [f"{word} {i} [MASK] caf\u00e9 " * (i % 40) for i, word in enumerate(WORDS * 40)]
    calls = [(texts, 3 + i % 8 * 7, 1 + i % 3) for i in range(64)]
    expected = list(map(lengths_of, calls[:24]))  # all there are
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lengths_of, calls))
    for i, ids in enumerate(found):
        assert ids == expected[i % 24]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_after_fork():
    call = ([" ".join(WORDS) * 50] * 200, 512, 2)
    expected = lengths_of(call)  # the pool is running then
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(lengths_of, [call] * 4, chunksize=1) == [expected] * 4


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork_while_threads_encode():
    call = ([" ".join(WORDS) * 50] * 200, 512, 2)
    expected = lengths_of(call)
    done = threading.Event()

    def encode():
        while not done.is_set():
            lengths_of(call)

    threads = [threading.Thread(target=encode) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                signal.alarm(60)  # ends a child that hangs
                try:
                    os._exit(0 if lengths_of(call) == expected else 1)
                finally:
                    os._exit(2)
            assert os.waitpid(pid, 0)[1] == 0
    finally:
        done.set()
        for thread in threads:
            thread.join()


def test_exit_after_threads_is_silent():
    code = (
        "from fastbert import BertTokenizer\n"
        f"tokenizer = BertTokenizer({str(UNCASED_VOCAB)!r})\n"
        "texts = ['one two three ' * 100] * 1000\n"
        "print(len(tokenizer.pack(texts, num_threads=4)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "1000", "")


def test_exit_while_daemon_threads_encode_is_silent():
    """Each asks for the GIL when Python has ended already."""
    code = (
        "import threading, time\n"
        "from fastbert.tokenizer import BertTokenizer\n"
        "tokenizer = BertTokenizer({'[UNK]': 0})\n"
        "def encode():\n"
        "    while True: tokenizer.encode_arrays(['a b c ' * 200] * 300, num_threads=3)\n"
        "for _ in range(3): threading.Thread(target=encode, daemon=True).start()\n"
        "time.sleep(0.2)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
