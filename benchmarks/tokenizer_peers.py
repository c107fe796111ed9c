"""Other WordPiece tokenizers, each with the calls that it has, on one thread.

A peer is made for a vocabulary: `Peer(name of a vocabulary)`. Its calls give what its library
gives, `ids` makes lists of it afterwards; a peer lacks the calls that its library lacks.

    packed(texts)   ids without padding, not truncated
    padded(texts)   64 columns: (ids, mask), int64
    offsets(texts)  as packed, and where each token is in its text
    query(text)     one text: its ids as an array
"""

import functools
import gc
import os
import re
import tempfile
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np

DATA = Path(__file__).parents[1].parent / "shared/data"
LENGTH = 64
UNK, CLS, SEP = 100, 101, 102  # in all of these vocabularies


def vocab_file(vocab):
    return DATA / f"vocab/{vocab}-vocab.txt"


def lowercase(vocab):
    return not vocab.endswith("-cased")


def transformers_tokenizer(vocab):
    from transformers import BertTokenizerFast

    return BertTokenizerFast(vocab=str(vocab_file(vocab)), do_lower_case=lowercase(vocab))


@functools.cache
def tokenizer_json(vocab):
    folder = tempfile.TemporaryDirectory()
    path = os.path.join(folder.name, "tokenizer.json")
    transformers_tokenizer(vocab).backend_tokenizer.save(path)
    return path, folder  # the folder lives as long as the cache


class Fastbert:
    package = "fastbert"
    has_caches = True

    def __init__(self, vocab):
        from fastbert import BertTokenizer

        self.tokenizer = BertTokenizer(vocab_file(vocab), do_lower_case=lowercase(vocab))

    def packed(self, texts, num_threads=1):
        return self.tokenizer.pack(texts, max_length=10**6, num_threads=num_threads)

    def padded(self, texts):
        batch = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        return batch["input_ids"], batch["attention_mask"]

    def offsets(self, texts):
        return self.tokenizer.encode_arrays(texts, max_length=10**6, offsets=True, num_threads=1)

    def query(self, text):
        return self.tokenizer.encode_arrays(text)[0]

    def ids(self, out):
        arrays = out[:2] if isinstance(out, tuple) else (out.input_ids, out.cu_seqlens)
        return rows(*(array.tolist() for array in arrays))

    def spans(self, out):
        return rows([tuple(span) for span in out[2].tolist()], out[1].tolist())


def rows(values, bounds):
    return [values[a:b] for a, b in pairwise(bounds)]


class Transformers:
    package = "transformers"
    has_caches = False

    def __init__(self, vocab):
        self.tokenizer = transformers_tokenizer(vocab)

    def packed(self, texts):
        return self.tokenizer(texts)

    def padded(self, texts):
        batch = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np"
        )
        return batch["input_ids"], batch["attention_mask"]

    def offsets(self, texts):
        return self.tokenizer(texts, return_offsets_mapping=True)

    def query(self, text):
        return self.tokenizer(text, return_tensors="np")["input_ids"][0]

    def ids(self, out):
        return out["input_ids"]


class HuggingFace:
    package = "tokenizers"
    has_caches = False

    def __init__(self, vocab):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(tokenizer_json(vocab)[0])

    def packed(self, texts):
        return self.tokenizer.encode_batch_fast(texts)

    def padded(self, texts):
        if self.tokenizer.truncation is None:
            self.tokenizer.enable_truncation(LENGTH)
            self.tokenizer.enable_padding(length=LENGTH)
        rows = self.packed(texts)
        ids = np.array([row.ids for row in rows], np.int64)
        return ids, np.array([row.attention_mask for row in rows], np.int64)

    def offsets(self, texts):
        return self.tokenizer.encode_batch(texts)

    def query(self, text):
        return np.array(self.tokenizer.encode(text).ids, np.int64)

    def ids(self, out):
        return [row.ids for row in out]

    def spans(self, out):
        return [row.offsets for row in out]


class Tokie(HuggingFace):
    """It has as many threads as there are CPUs, whatever RAYON_NUM_THREADS: it needs pinning."""

    package = "tokie"
    has_caches = True

    def __init__(self, vocab):
        import tokie

        self.tokenizer = tokie.Tokenizer.from_json(tokenizer_json(vocab)[0])

    def packed(self, texts):
        return self.tokenizer.encode_batch(texts)

    def offsets(self, texts):
        return [self.tokenizer.encode_with_offsets(text) for text in texts]


class Flash:
    package = "flash_tokenizer"
    has_caches = False

    def __init__(self, vocab):
        from flash_tokenizer import BertTokenizerFlash

        path = str(vocab_file(vocab))
        self.tokenizer = BertTokenizerFlash(path, lowercase(vocab), model_max_length=10**6)

    def packed(self, texts):
        return self.tokenizer(
            texts, padding="longest", max_length=10**6, do_multiprocess=False,
            return_token_type_ids=False, return_attention_mask=False,
        )  # fmt: skip

    def padded(self, texts):
        batch = self.tokenizer(
            texts, padding="max_length", max_length=LENGTH, do_multiprocess=False,
            return_tensors="np", return_token_type_ids=False,
        )  # fmt: skip
        return batch.input_ids.astype(np.int64), batch.attention_mask.astype(np.int64)

    def query(self, text):
        return np.array(self.packed(text).input_ids[0])

    def ids(self, out):
        return out.input_ids


class BlingFire:
    """Its vocabularies are its own, compiled; [CLS] and [SEP] are left to the caller."""

    package = "blingfire"
    has_caches = False
    MODELS = {  # noqa: RUF012
        "bert-base-uncased": "bert_base_tok.bin",
        "bert-base-chinese": "bert_chinese.bin",
        "bert-base-multilingual-cased": "bert_multi_cased.bin",
    }

    def __init__(self, vocab):
        import blingfire

        self.blingfire = blingfire
        folder = Path(blingfire.__file__).parent
        self.model = blingfire.load_model(str(folder / self.MODELS[vocab]))

    def packed(self, texts):
        return [self.query(text) for text in texts]

    def offsets(self, texts):
        encode, model = self.blingfire.utf8text_to_ids_with_offsets, self.model
        return [encode(model, text.encode(), len(text) + 2, UNK, True) for text in texts]

    def query(self, text):
        # Room for a token a character.
        return self.blingfire.text_to_ids(self.model, text, len(text) + 2, UNK, True)

    def ids(self, out):
        rows = (row[0] if isinstance(row, tuple) else row for row in out)
        return [[CLS, *row.tolist(), SEP] for row in rows]


class TensorFlowText:
    """[CLS] and [SEP] are left to the caller."""

    package = "tensorflow_text"
    has_caches = False

    def __init__(self, vocab):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        import tensorflow as tf
        import tensorflow_text as text

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        tokens = vocab_file(vocab).read_text("utf-8").split("\n")[:-1]
        lower = lowercase(vocab)
        self.tokenizer = text.FastBertTokenizer(tokens, lower_case_nfd_strip_accents=lower)

    def packed(self, texts):
        return self.tokenizer.tokenize(texts)

    def offsets(self, texts):
        return self.tokenizer.tokenize_with_offsets(texts)

    def query(self, text):
        return self.tokenizer.tokenize([text]).flat_values.numpy()

    def ids(self, out):
        tokens = out[0] if isinstance(out, tuple | list) else out
        return [[CLS, *row, SEP] for row in tokens.to_list()]


PEERS = {
    "fastbert": Fastbert,
    "tokie": Tokie,
    "tensorflow-text": TensorFlowText,
    "flash-tokenizer": Flash,
    "blingfire": BlingFire,
    "tokenizers": HuggingFace,
    "transformers": Transformers,
}


def installed(peer):
    try:
        import_module(PEERS[peer].package)
    except ImportError:
        return False
    return True


def memory(peer, vocab, texts):
    """Bytes that `packed` adds to this process at its peak, with what it gives."""

    def status(name):
        return 1024 * int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1])

    tokenizer = PEERS[peer](vocab)
    tokenizer.packed(texts[:10])
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    out = tokenizer.packed(texts)
    peak = status("VmHWM")
    del out
    return peak - before
