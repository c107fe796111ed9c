"""The checkpoint reader against a writer of its own, real files, and damage byte by byte."""

import json
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fastbert.tf_checkpoint import crc32c, find_prefix, load_tf_checkpoint, read_index

MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"
needs_models = pytest.mark.skipif(not MODELS.is_dir(), reason=f"{MODELS} is not there")

DTYPE_NUMBERS = {"float32": 1, "int32": 3, "string": 7, "int64": 9, "bfloat16": 14, "float16": 19}


# A writer for bundles, sharing nothing with the reader.


def byte_table() -> list[int]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


BYTE_TABLE = byte_table()


def crc_of(data: bytes) -> int:
    """crc32c a byte at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ BYTE_TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def masked_crc(data: bytes) -> bytes:
    crc = crc_of(data)
    rotated = (crc >> 15) | (crc << 17 & 0xFFFFFFFF)
    return struct.pack("<I", (rotated + 0xA282EAD8) % 2**32)


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number % 128 + 128])
        number //= 128
    return out + bytes([number])


def number_field(field: int, number: int) -> bytes:
    return varint(field << 3) + varint(number)


def bytes_field(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def entry_message(dtype, shape, shard, offset, data, more=b"") -> bytes:
    dims = b"".join(bytes_field(2, number_field(1, size)) for size in shape)
    message = number_field(1, DTYPE_NUMBERS[dtype]) + bytes_field(2, dims)
    message += number_field(3, shard) + number_field(4, offset) + number_field(5, len(data))
    return message + varint(6 << 3 | 5) + masked_crc(data) + more


def block(items, restart_every=3) -> bytes:
    out, restarts, last = b"", [], b""
    for i, (key, value) in enumerate(items):
        shared = 0
        if i % restart_every == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value))
        out += key[shared:] + value
        last = key
    restarts = restarts or [0]
    return out + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def table(items, items_per_block=4, compression=0) -> bytes:
    out, handles = b"", []

    def add(data):
        nonlocal out
        handle = varint(len(out)) + varint(len(data))
        data += bytes([compression])
        out += data + masked_crc(data)
        return handle

    for i in range(0, len(items), items_per_block):
        part = items[i : i + items_per_block]
        handles.append((part[-1][0], add(block(part))))
    footer = add(block([])) + add(block(handles, restart_every=1))
    return out + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def write_bundle(prefix, tensors, n_shards=1, header=b"", more=b"", **options) -> None:
    """tensors: name -> array, or (dtype, shape, bytes). They go to the data files in turn."""
    shards = [b"" for _ in range(n_shards)]
    items = [(b"", number_field(1, n_shards) + header + bytes_field(3, number_field(1, 1)))]
    for i, (name, value) in enumerate(sorted(tensors.items())):
        if isinstance(value, np.ndarray):
            value = (value.dtype.name, value.shape, value.tobytes())
        dtype, shape, data = value
        shard = i % n_shards
        message = entry_message(dtype, shape, shard, len(shards[shard]), data, more)
        items.append((name.encode(), message))
        shards[shard] += data
    Path(f"{prefix}.index").write_bytes(table(items, **options))
    for shard, data in enumerate(shards):
        Path(f"{prefix}.data-{shard:05d}-of-{n_shards:05d}").write_bytes(data)


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "bert/embeddings/word_embeddings": rng.normal(size=(7, 3)).astype(np.float32),
        "bert/encoder/layer_0/output/dense/kernel": rng.normal(size=(3, 5)).astype(np.float16),
        "bert/encoder/layer_0/output/dense/bias": np.arange(5, dtype=np.int32),
        "bert/pooler/dense/bias": np.array([2**40, -1], dtype=np.int64),
        "cls/scale": np.array(1.5, dtype=np.float32),
        "cls/nothing": np.zeros((0, 4), dtype=np.float32),
    }


def assert_same(loaded, expected):
    assert sorted(loaded) == sorted(expected)
    for name, array in expected.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array, strict=True)
        assert loaded[name].flags.writeable


# 2**18 is the chunk: below, at and above one and two of them.
@pytest.mark.parametrize("around", [0, 64, 1024, 2**18, 2**19])
def test_crc32c_is_that_of_a_byte_loop(around):
    data = np.random.default_rng(around).integers(0, 256, around + 9, dtype=np.uint8)
    for length in range(max(0, around - 2), around + 10, 1 if around < 2000 else 3):
        assert crc32c(data[:length]) == crc_of(data[:length].tobytes()), length


def test_crc32c_known_values():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(b"") == 0


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("items_per_block", [1, 4, 100])
def test_reads_what_was_written(tmp_path, tensors, n_shards, items_per_block):
    write_bundle(tmp_path / "m.ckpt", tensors, n_shards, items_per_block=items_per_block)
    assert_same(load_tf_checkpoint(tmp_path), tensors)
    entries = read_index(tmp_path / "m.ckpt")
    assert list(entries) == sorted(tensors)
    kernel = entries["bert/encoder/layer_0/output/dense/kernel"]
    assert (kernel.dtype, kernel.shape, kernel.size) == ("float16", (3, 5), 30)
    assert {entry.shard for entry in entries.values()} == set(range(n_shards))


def test_bfloat16_comes_as_float32(tmp_path):
    values = np.array([1.0, -2.5, 3.140625, np.inf], dtype=np.float32)  # exact in bfloat16
    high_halves = values.view(np.uint16)[1::2].tobytes()
    write_bundle(tmp_path / "m.ckpt", {"x": ("bfloat16", (4,), high_halves)})
    assert_same(load_tf_checkpoint(tmp_path / "m.ckpt"), {"x": values})


def test_leaves_out_optimizer_state(tmp_path, tensors):
    state = {
        f"{name}/{slot}": array
        for name, array in tensors.items()
        for slot in ("adam_m", "adam_v", "lamb_m", "Adam", "Adam_1", "Momentum")
    }
    state |= {name: np.array(3, np.int64) for name in ("global_step", "beta1_power")}
    write_bundle(tmp_path / "m.ckpt", tensors | state)
    assert_same(load_tf_checkpoint(tmp_path), tensors)
    assert len(read_index(tmp_path / "m.ckpt")) == len(tensors) + len(state)


def test_any_changed_index_byte_is_noticed(tmp_path, tensors):
    prefix = tmp_path / "m.ckpt"
    write_bundle(prefix, tensors)
    index = Path(f"{prefix}.index")
    good = index.read_bytes()
    unnoticed = []
    for at in range(len(good)):
        index.write_bytes(good[:at] + bytes([good[at] ^ 0x41]) + good[at + 1 :])
        try:
            assert_same(load_tf_checkpoint(prefix), tensors)
            unnoticed.append(at)
        except ValueError as error:
            assert str(index) in str(error)
    end = len(good) - 8  # the magic; zeros before it fill the footer
    assert unnoticed == list(range(len(good[:end].rstrip(b"\0")), end))


def test_any_changed_data_byte_is_noticed(tmp_path, tensors):
    prefix = tmp_path / "m.ckpt"
    write_bundle(prefix, tensors)
    data = Path(f"{prefix}.data-00000-of-00001")
    good = data.read_bytes()
    for at in range(len(good)):
        name = next(
            entry.name
            for entry in read_index(prefix).values()
            if entry.offset <= at < entry.offset + entry.size
        )
        data.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        with pytest.raises(ValueError, match=f"wrong checksum in {name}$"):
            load_tf_checkpoint(prefix)


def test_any_cut_is_noticed(tmp_path, tensors):
    prefix = tmp_path / "m.ckpt"
    write_bundle(prefix, tensors)
    index, data = Path(f"{prefix}.index"), Path(f"{prefix}.data-00000-of-00001")
    good_index, good_data = index.read_bytes(), data.read_bytes()
    for size in range(len(good_index)):
        index.write_bytes(good_index[:size])
        with pytest.raises(ValueError, match=r"m\.ckpt\.index"):
            load_tf_checkpoint(prefix)
    index.write_bytes(good_index)
    for size in range(len(good_data)):
        data.write_bytes(good_data[:size])
        with pytest.raises(ValueError, match=f"cut short: .* the file at byte {size}$"):
            load_tf_checkpoint(prefix)


def test_refuses_what_it_cannot_read(tmp_path, tensors):
    prefix = tmp_path / "m.ckpt"
    one = np.zeros(2, np.float32)

    write_bundle(prefix, tensors, compression=1)
    with pytest.raises(ValueError, match=r"compressed \(snappy\)"):
        load_tf_checkpoint(prefix)
    write_bundle(prefix, {"words": ("string", (1,), b"\1\2\3\4a")})
    with pytest.raises(ValueError, match="words is of TensorFlow type 7; wanted float32"):
        load_tf_checkpoint(prefix)
    write_bundle(prefix, {"_CHECKPOINTABLE_OBJECT_GRAPH": ("string", (), b"x"), "a": one})
    with pytest.raises(ValueError, match="TensorFlow-2 object checkpoint"):
        load_tf_checkpoint(prefix)
    write_bundle(prefix, {"a": ("float32", (3,), one.tobytes())})
    with pytest.raises(ValueError, match="takes 12 bytes, the index says 8"):
        load_tf_checkpoint(prefix)
    write_bundle(prefix, {"a": one}, header=number_field(2, 1))
    with pytest.raises(ValueError, match="big-endian"):
        load_tf_checkpoint(prefix)
    write_bundle(prefix, {"a": one}, more=bytes_field(7, b""))
    with pytest.raises(ValueError, match="a is saved in slices"):
        load_tf_checkpoint(prefix)
    Path(f"{prefix}.index").write_bytes(b"not a table " * 10)
    with pytest.raises(ValueError, match="must end with db4775248b80fb57"):
        load_tf_checkpoint(prefix)


def test_missing_data_file(tmp_path, tensors):
    write_bundle(tmp_path / "m.ckpt", tensors, n_shards=2)
    (tmp_path / "m.ckpt.data-00001-of-00002").unlink()
    with pytest.raises(FileNotFoundError, match="data-00001-of-00002 does not exist"):
        load_tf_checkpoint(tmp_path)


def test_finds_the_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \*.index file"):
        find_prefix(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"m\.ckpt-9\.index does not exist"):
        find_prefix(tmp_path / "m.ckpt-9")

    (tmp_path / "m.ckpt-1.index").touch()
    for given in (tmp_path, str(tmp_path), tmp_path / "m.ckpt-1", tmp_path / "m.ckpt-1.index"):
        assert find_prefix(given) == tmp_path / "m.ckpt-1"

    (tmp_path / "m.ckpt-2.index").touch()
    with pytest.raises(ValueError, match=r"holds 2 checkpoints \(m.ckpt-1, m.ckpt-2\)"):
        find_prefix(tmp_path)
    (tmp_path / "checkpoint").write_text(
        'model_checkpoint_path: "/away/m.ckpt-1"\nall_model_checkpoint_paths: "m.ckpt-2"\n'
    )
    assert find_prefix(tmp_path) == tmp_path / "m.ckpt-1"

    (tmp_path / "bert_model.ckpt.index").touch()
    assert find_prefix(tmp_path) == tmp_path / "bert_model.ckpt"


@needs_models
def test_real_checkpoint():
    folder = MODELS / "tf1_keras_bert_test_checkpoint"
    config = json.loads((folder / "bert_config.json").read_text())
    loaded = load_tf_checkpoint(folder)
    assert len(read_index(folder / "bert_model.ckpt")) == 139
    assert len(loaded) == 46
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    words = loaded["bert/embeddings/word_embeddings"]
    assert words.shape == (config["vocab_size"], hidden)
    assert loaded["bert/encoder/layer_1/intermediate/dense/kernel"].shape == (hidden, inner)
    assert loaded["cls/seq_relationship/output_weights"].shape == (2, hidden)
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in loaded.values())
    # TensorFlow's initializer: a normal distribution cut at two standard deviations of 0.02.
    assert 0.01 < words.std() < 0.02 and np.abs(words).max() < 0.06


@needs_models
def test_real_index_of_bert_base():
    folder = MODELS / "tf1_index_only_base12"
    entries = read_index(folder / "model.ckpt-40000")
    assert entries["bert/encoder/layer_11/output/dense/kernel"].shape == (3072, 768)
    ends = sorted((entry.offset, entry.offset + entry.size) for entry in entries.values())
    assert all(end == start for (_, end), (start, _) in pairwise(ends))
    with pytest.raises(FileNotFoundError, match="data-00000-of-00001 does not exist"):
        load_tf_checkpoint(folder)
