import pytest
import torch

from fastbert import PackedBatch, pack, unpack


@pytest.fixture
def batch():
    ids = torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0], [1, 2, 3, 4]])
    return pack(ids, torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]))


def test_pack_leaves_padding_out(batch):
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 1, 2, 3, 4]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert batch.token_type_ids.tolist() == [0] * 8
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 8] and batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 4 and type(batch.max_seqlen) is int
    assert len(batch) == 3 and batch.lengths.tolist() == [3, 1, 4]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_holes_and_left_padding_keep_their_columns(dtype):
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]).to(dtype)
    packed = pack(torch.arange(12).view(3, 4), mask, torch.ones(3, 4).long())
    assert packed.input_ids.tolist() == [0, 2, 3, 6, 7]
    assert packed.position_ids.tolist() == [0, 2, 3, 2, 3]
    assert packed.lengths.tolist() == [3, 2, 0]
    own = pack(torch.arange(12).view(3, 4), mask, position_ids=torch.tensor([[9, 8, 7, 6]]))
    assert own.position_ids.tolist() == [9, 7, 6, 7, 6]


def test_unpack_puts_padding_back(batch):
    padded = unpack(batch.input_ids, batch)
    assert padded.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0], [1, 2, 3, 4]]
    vectors = torch.randn(8, 2, requires_grad=True)
    wide = unpack(vectors, batch, total_length=6)
    assert wide.shape == (3, 6, 2) and wide[1, 1:].abs().max() == 0
    wide.sum().backward()
    assert torch.equal(vectors.grad, torch.ones(8, 2))


def test_split_cuts_between_sequences(batch):
    first, second = batch.split(2)
    assert (first.input_ids.tolist(), second.input_ids.tolist()) == ([5, 6, 7, 8], [1, 2, 3, 4])
    assert (first.max_seqlen, second.max_seqlen) == (3, 4)
    assert second.cu_seqlens.tolist() == [0, 4]
    assert [len(part) for part in batch.split([1, 0, 2])] == [1, 0, 2]
    with pytest.raises(ValueError, match=r"add up to 3 sequences, got \[1, 1\]"):
        batch.split([1, 1])
    with pytest.raises(ValueError, match="split_size must be at least 1, got 0"):
        batch.split(0)


def test_moves(batch):
    moved = batch.to("meta")
    assert moved.device.type == "meta" and moved.max_seqlen == 4
    assert batch.to("cpu").input_ids is batch.input_ids


def test_empty():
    empty = pack(torch.zeros(0, 5).long(), torch.zeros(0, 5))
    assert len(empty) == 0 and empty.max_seqlen == 0 and empty.split(4) == []
    assert unpack(empty.input_ids, empty).shape == (0, 0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input_ids": torch.ones(8)}, "input_ids must be int64 or int32, got torch.float32"),
        ({"position_ids": torch.ones(7).long()}, r"position_ids.*\(8,\), got \(7,\)"),
        ({"cu_seqlens": torch.tensor([0, 3, 4, 8])}, "cu_seqlens must be int32, got torch.int64"),
        ({"cu_seqlens": torch.tensor([0, 3, 4, 9]).int()}, "must rise from 0 to n_tokens = 8"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 8]).int()}, "must rise from 0 to n_tokens = 8"),
        ({"max_seqlen": 5}, "max_seqlen must be 4, got 5"),
        ({"token_type_ids": torch.ones(8, device="meta").long()}, "one device, got cpu, meta"),
    ],
)
def test_refuses(batch, change, message):
    with pytest.raises(ValueError, match=message):
        PackedBatch(**{**vars(batch), **change})


def test_pack_and_unpack_refuse(batch):
    ids = torch.ones(2, 4).long()
    with pytest.raises(ValueError, match=r"attention_mask must.*\(2, 4\), got \(2, 3\)"):
        pack(ids, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"input_ids must be \(n_seqs, length\), got \(4,\)"):
        pack(ids[0], torch.ones(4))
    with pytest.raises(ValueError, match=r"token_type_ids must be \(2, 4\), got \(1, 4\)"):
        pack(ids, torch.ones(2, 4), ids[:1])
    with pytest.raises(ValueError, match="at least the longest sequence, 4, got 3"):
        unpack(batch.input_ids, batch, total_length=3)
    with pytest.raises(ValueError, match="tensor must have n_tokens = 8 rows, got 7"):
        unpack(batch.input_ids[1:], batch)
