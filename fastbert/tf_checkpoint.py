"""Reads TensorFlow checkpoints (tensor bundles: `.index` and `.data-*` files) without TensorFlow.

The index is a LevelDB table (github.com/google/leveldb, doc/table_format.md) whose values are the
protobuf messages of tensorflow/core/protobuf/tensor_bundle.proto.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from operator import xor
from pathlib import Path

import numpy as np

_FOOTER_SIZE = 48
_MAGIC = 0xDB4775248B80FB57
_BLOCK_TRAILER_SIZE = 5  # compression type, masked crc32c

# Values of tensorflow/core/framework/types.proto that a BERT checkpoint can hold. NumPy has no
# bfloat16: its bits are read as uint16 and returned as float32.
_DTYPES = {1: "float32", 3: "int32", 9: "int64", 14: "bfloat16", 19: "float16"}

_NOT_A_WEIGHT = re.compile(
    r"/(adam|lamb)_[mv]$"
    r"|/(Adam|AdamW|LAMB|Momentum|Adagrad|RMSProp|AdaFactor)(_\d+)?$"
    r"|^(global_step|beta[12]_power|loss_scale|current_loss_scale|good_steps)$"
)


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `size` bytes from `offset` of data file number `shard`.

    dtype: a NumPy name, or bfloat16. crc: the masked crc32c of the bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int


def load_tf_checkpoint(folder_or_prefix: str | Path) -> dict[str, np.ndarray]:
    """All variables of a checkpoint under their TensorFlow names, optimizer state left out.

    folder_or_prefix: a folder with one checkpoint, or `.../bert_model.ckpt`. Arrays own their
    memory; bfloat16 comes as float32. Every checksum is checked.

    Raises FileNotFoundError for a missing file and ValueError for a damaged one.
    """
    prefix = find_prefix(folder_or_prefix)
    entries, n_shards = _read_bundle(prefix)
    if "_CHECKPOINTABLE_OBJECT_GRAPH" in entries:
        raise ValueError(
            f"{prefix} is a TensorFlow-2 object checkpoint; wanted a TensorFlow-1 one, "
            "with names like bert/embeddings/word_embeddings"
        )
    wanted = [entry for entry in entries.values() if not _NOT_A_WEIGHT.search(entry.name)]
    tensors = {}
    for entry in sorted(wanted, key=lambda entry: (entry.shard, entry.offset)):
        path = Path(f"{prefix}.data-{entry.shard:05d}-of-{n_shards:05d}")
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; the index says {entry.name} is in it")
        tensors[entry.name] = _read_tensor(path, entry)
    return {entry.name: tensors[entry.name] for entry in wanted}


def find_prefix(folder_or_prefix: str | Path) -> Path:
    """The path of a checkpoint without `.index`.

    In a folder: bert_model.ckpt, else the only `*.index` there, else the one that the text file
    `checkpoint` names.
    """
    path = Path(folder_or_prefix)
    if not path.is_dir():
        prefix = path.with_suffix("") if path.suffix == ".index" else path
        if not Path(f"{prefix}.index").is_file():
            raise FileNotFoundError(f"no TensorFlow checkpoint: {prefix}.index does not exist")
        return prefix
    names = sorted(found.stem for found in path.glob("*.index"))
    if "bert_model.ckpt" in names:
        return path / "bert_model.ckpt"
    if len(names) == 1:
        return path / names[0]
    if not names:
        raise FileNotFoundError(f"no TensorFlow checkpoint: no *.index file in {path}")
    if (path / "checkpoint").is_file():
        text = (path / "checkpoint").read_text(encoding="utf-8", errors="replace")
        latest = re.search(r'^model_checkpoint_path: "(.*)"', text, re.MULTILINE)
        if latest and (name := latest[1].rpartition("/")[2]) in names:
            return path / name
    raise ValueError(
        f"{path} holds {len(names)} checkpoints ({', '.join(names)}); "
        f"name one, as in {path / names[-1]}"
    )


def read_index(prefix: str | Path) -> dict[str, Entry]:
    """The tensors that `<prefix>.index` lists, optimizer state included, in the order of names."""
    return _read_bundle(Path(prefix))[0]


def _read_bundle(prefix: Path) -> tuple[dict[str, Entry], int]:
    """The entries of an index, and how many data files there are."""
    path = Path(f"{prefix}.index")
    if not path.is_file():
        raise FileNotFoundError(f"no TensorFlow checkpoint: {path} does not exist")
    try:
        return _parse_bundle(path.read_bytes())
    except (IndexError, struct.error):  # something ended before all of it was read
        raise ValueError(f"{path} is damaged: a record in it is cut short") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parse_bundle(data: bytes) -> tuple[dict[str, Entry], int]:
    if len(data) < _FOOTER_SIZE:
        raise ValueError(f"an index has at least {_FOOTER_SIZE} bytes, this one has {len(data)}")
    footer = data[-_FOOTER_SIZE:]
    (magic,) = struct.unpack("<Q", footer[-8:])
    if magic != _MAGIC:
        raise ValueError(
            f"not a checkpoint index, or cut short: it must end with {_MAGIC:016x}, "
            f"it ends with {magic:016x}"
        )
    meta_offset, meta_size, at = _handle(footer, 0)
    list(_block(data, meta_offset, meta_size))  # empty in bundles; only its checksum is of use
    index_offset, index_size, _ = _handle(footer, at)
    entries = {}
    n_shards = 0
    for _, handle in _block(data, index_offset, index_size):
        offset, size, _ = _handle(handle, 0)
        for key, value in _block(data, offset, size):
            if key:
                name = key.decode("utf-8", "replace")
                entries[name] = _parse_entry(name, value)
            else:
                n_shards = _parse_header(value)
    if n_shards < 1:
        raise ValueError("the header that says how many data files there are is missing")
    return entries, n_shards


def _handle(buffer: bytes, at: int) -> tuple[int, int, int]:
    """Offset and size of a block, and where the handle ends."""
    offset, at = _varint(buffer, at)
    size, at = _varint(buffer, at)
    return offset, size, at


def _block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of one block. A key leaves out what it shares with the one before it."""
    end = offset + size
    if end + _BLOCK_TRAILER_SIZE > len(data) - _FOOTER_SIZE:
        raise ValueError(f"a block should end at byte {end}, past the end of the table")
    (crc,) = struct.unpack_from("<I", data, end + 1)
    if masked(crc32c(data[offset : end + 1])) != crc:
        raise ValueError(f"damaged: wrong checksum in the block at byte {offset}")
    if data[end] != 0:
        kind = {1: "snappy"}.get(data[end], f"type {data[end]}")
        raise ValueError(f"its blocks are compressed ({kind}); only uncompressed ones can be read")
    block = data[offset:end]
    (n_restarts,) = struct.unpack_from("<I", block, size - 4)
    end, at, key = size - 4 * (n_restarts + 1), 0, b""
    while at < end:
        shared, at = _varint(block, at)
        unshared, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at : at + unshared]
        at += unshared + length
        yield key, block[at - length : at]


def _parse_header(message: bytes) -> int:
    fields = _fields(message)
    if fields.get(2, [0])[-1] != 0:
        raise ValueError("the tensors are big-endian; only little-endian ones can be read")
    return fields.get(1, [0])[-1]


def _parse_entry(name: str, message: bytes) -> Entry:
    fields = _fields(message)
    if 7 in fields:
        raise ValueError(f"{name} is saved in slices (a partitioned variable), which is not read")
    number = fields.get(1, [0])[-1]
    shape = []
    for dimension in _fields(fields.get(2, [b""])[-1]).get(2, []):
        shape.append(_fields(dimension).get(1, [0])[-1])
    shard, offset, size, crc = (fields.get(i, [0])[-1] for i in (3, 4, 5, 6))
    dtype = _DTYPES.get(number, f"TensorFlow type {number}")
    return Entry(name, dtype, tuple(shape), shard, offset, size, crc)


def _fields(message: bytes) -> dict[int, list]:
    """A protobuf message by field number: integers, and bytes for anything with a length."""
    fields: dict[int, list] = {}
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        value: int | bytes
        if kind == 0:
            value, at = _varint(message, at)
        elif kind == 2:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            (value,) = struct.unpack_from("<Q" if kind == 1 else "<I", message, at)
            at += size
        else:
            raise ValueError(f"damaged: protobuf has no wire type {kind}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _varint(buffer: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = buffer[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7


def _read_tensor(path: Path, entry: Entry) -> np.ndarray:
    if entry.dtype not in _DTYPES.values():
        raise ValueError(
            f"{path}: {entry.name} is of {entry.dtype}; wanted {', '.join(_DTYPES.values())}"
        )
    stored = np.dtype("uint16" if entry.dtype == "bfloat16" else entry.dtype).newbyteorder("<")
    expected = math.prod(entry.shape) * stored.itemsize
    if entry.size != expected:
        raise ValueError(
            f"{path}: {entry.name} {entry.shape} of {entry.dtype} takes {expected} bytes, "
            f"the index says {entry.size}"
        )
    end, file_size = entry.offset + entry.size, path.stat().st_size
    if end > file_size:
        raise ValueError(
            f"{path} is cut short: {entry.name} ends at byte {end}, the file at byte {file_size}"
        )
    raw = np.fromfile(path, np.uint8, entry.size, offset=entry.offset)
    if masked(crc32c(raw)) != entry.crc:
        raise ValueError(f"{path} is damaged: wrong checksum in {entry.name}")
    values = raw.view(stored).reshape(entry.shape)
    if entry.dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(entry.dtype, copy=False)


def masked(crc: int) -> int:
    """A crc32c as LevelDB and TensorFlow store it."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes | np.ndarray) -> int:
    """The crc32c (Castagnoli) of bytes or of a uint8 array.

    Without its inversions a crc is linear over xor: the crc of a row of words is that of its left
    half, carried over as many zero bytes as the right half is long, xor that of its right half. So
    whole arrays are folded in half, with two table lookups a word, until one word is left.
    """
    raw = np.frombuffer(data, np.uint8)
    crc = 0
    start = 0
    while start < raw.size:  # the odd chunk comes first: zeros in front of it change nothing
        stop = start + ((raw.size - start) % _CHUNK or _CHUNK)
        words = np.zeros(1 << max(0, (stop - start - 1).bit_length() - 2), "<u4")
        words.view(np.uint8)[words.nbytes - (stop - start) :] = raw[start:stop]
        while words.size > 1:
            left, right = np.split(words, 2)
            low, high = _carry_tables(left.nbytes.bit_length() - 1)
            pairs = left.view("<u2")
            words = low.take(pairs[0::2]) ^ high.take(pairs[1::2]) ^ right
        crc = _carry(crc, _CHUNK) ^ int(words[0])
        start = stop
    return _carry(crc, 4) ^ _carry(0xFFFFFFFF, raw.size) ^ 0xFFFFFFFF


_CHUNK = 1 << 18  # bytes folded at a time: they and the tables stay in cache


def _carry(crc: int, n_bytes: int) -> int:
    """What becomes of a crc when `n_bytes` zero bytes follow."""
    for k in range(n_bytes.bit_length()):
        if n_bytes >> k & 1:
            crc = _apply(_carry_bits(k), crc)
    return crc


def _apply(bits: Sequence[int], crc: int) -> int:
    return reduce(xor, (bits[i] for i in range(32) if crc >> i & 1), 0)


@cache
def _carry_bits(k: int) -> list[int]:
    """What 2**k zero bytes make of each of the 32 bits of a crc."""
    if k > 0:
        bits = _carry_bits(k - 1)
        return [_apply(bits, bit) for bit in bits]
    bits = [1 << i for i in range(32)]
    for _ in range(8):
        bits = [bit >> 1 ^ 0x82F63B78 * (bit & 1) for bit in bits]
    return bits


@cache
def _carry_tables(k: int) -> tuple[np.ndarray, np.ndarray]:
    """What 2**k zero bytes make of each low and of each high half of a crc."""
    tables = [np.zeros(1, np.uint32), np.zeros(1, np.uint32)]
    for i, bit in enumerate(_carry_bits(k)):
        half = tables[i // 16]
        tables[i // 16] = np.concatenate([half, half ^ np.uint32(bit)])
    return tables[0], tables[1]
