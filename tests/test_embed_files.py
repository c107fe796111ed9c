"""Whole files: what is written, what a stop leaves behind, and that going on changes no byte."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastbert import embed_files
from fastbert.embed import Embedder
from fastbert.embed_files import embed_file, windows
from fastbert.packing import PackedBatch
from fastbert.readers import TextSource

HIDDEN = 6
TABLE = torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(0))


class LetterTokenizer:
    """An id a letter, between 1 and 2."""

    truncation_side = "right"

    def __init__(self):
        self.texts = []

    def pack(self, texts, *, max_length):
        self.texts += texts
        ids = [[1, *(ord(letter) for letter in text[: max_length - 2]), 2] for text in texts]
        flat = torch.tensor([id for sequence in ids for id in sequence])
        ends = torch.tensor([0, *map(len, ids)]).cumsum(0).int()
        return PackedBatch(flat, flat * 0, flat * 0, ends, max(map(len, ids)))


class TableModel(torch.nn.Module):
    """The vector of a token is its row of TABLE."""

    config = SimpleNamespace(max_position_embeddings=12, hidden_size=HIDDEN)

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(TABLE)

    def forward(self, packed):
        return SimpleNamespace(last_hidden_state=self.table[packed.input_ids])


def expected_vectors(texts):
    rows = [[1, *(ord(letter) for letter in text[:10]), 2] for text in texts]
    return np.stack([TABLE[row].double().mean(0).numpy() for row in rows]).astype(np.float32)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A file of 43 texts in windows of 10, and what embeds it."""
    monkeypatch.setattr(embed_files, "WINDOW_TEXTS", 10)
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdef "), rng.integers(0, 15))) for _ in range(43)]
    (tmp_path / "in.txt").write_text("".join(f"{text}\n" for text in texts))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    return Job(tmp_path, texts, model)


class Job:
    def __init__(self, folder, texts, model):
        self.folder, self.texts, self.model = folder, texts, model
        self.input = folder / "in.txt"
        self.tokenized = 0

    def run(self, name="out.npy", max_length=12, errors="strict", **options):
        tokenizer = LetterTokenizer()
        embedder = Embedder(TableModel(), tokenizer, max_length=max_length)
        source = TextSource(self.input, errors=errors)
        try:
            return embed_file(
                source, self.folder / name, embedder, self.model, batch_tokens=40, **options
            )
        finally:
            self.tokenized = len(tokenizer.texts)

    def left_over(self):
        """What is there beside the input, the model and finished outputs."""
        outputs = {"in.txt", "model", "out.npy", "out.npy.metrics.json"}
        return {path.name for path in self.folder.iterdir()} - outputs


class Stopped(BaseException):
    pass


def stop_at(monkeypatch, name, call, after):
    """Make the call-th os.<name> the last thing that happens."""
    original, calls = getattr(os, name), 0

    def stopping(*args):
        nonlocal calls
        calls += 1
        if calls > call or (calls == call and not after):
            raise Stopped
        result = original(*args)
        if calls == call:
            raise Stopped
        return result

    monkeypatch.setattr(os, name, stopping)


def test_npy(job):
    metrics = job.run()
    out = np.load(job.folder / "out.npy")
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected_vectors(job.texts), rtol=1e-6, atol=1e-7)
    assert metrics == json.loads((job.folder / "out.npy.metrics.json").read_text())
    lengths = [min(len(text), 10) + 2 for text in job.texts]
    assert (metrics["texts"], metrics["tokens"]) == (43, sum(lengths))
    assert metrics["truncated"] == sum(len(text) > 10 for text in job.texts) > 0
    assert metrics["tokens_per_second"] > 0 and metrics["padding_share"] == 0
    assert job.left_over() == set()


def test_jsonl_and_parquet_hold_the_same(job):
    parquet = pytest.importorskip("pyarrow.parquet")
    for name in ("out.npy", "out.jsonl", "out.parquet"):
        job.run(name)
    out = np.load(job.folder / "out.npy")

    rows = [json.loads(line) for line in (job.folder / "out.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(43))
    assert np.array_equal(np.array([row["embedding"] for row in rows], np.float32), out)

    table = parquet.read_table(job.folder / "out.parquet")
    assert table.schema.field("embedding").type.value_type == "float"
    assert table["row"].to_pylist() == list(range(43))
    assert np.array_equal(np.array(table["embedding"].to_pylist(), np.float32), out)
    assert parquet.read_metadata(job.folder / "out.parquet").num_row_groups == 5


@pytest.mark.parametrize("suffix", [".npy", ".jsonl", ".parquet"])
@pytest.mark.parametrize("after", [False, True])
def test_a_stop_anywhere_changes_no_byte(job, suffix, after, monkeypatch):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    name = f"out{suffix}"
    job.run(f"whole{suffix}")
    whole = (job.folder / f"whole{suffix}").read_bytes()
    stops = 0
    while True:
        with monkeypatch.context() as patch:
            stop_at(patch, "replace", stops + 1, after)
            try:
                job.run(name)
                break
            except Stopped:
                stops += 1
        if (job.folder / name).exists():
            assert (job.folder / name).read_bytes() == whole
        finished = len(list(job.folder.glob(f"{name}.parts/*.part")))
        try:
            job.run(name, resume=True)
            assert job.tokenized == 43 - min(43, 10 * finished)
        except ValueError as error:  # the very last step is after the run is complete
            assert "exists already" in str(error)
        assert (job.folder / name).read_bytes() == whole
        (job.folder / name).unlink()
        (job.folder / f"{name}.metrics.json").unlink()
    # state, 5 parts, state, OUT, metrics, folder
    assert stops == 10


def test_resume_after_several_stops(job, monkeypatch):
    job.run("whole.npy")
    for already in range(1, 5):  # the state is written, then one more part
        with monkeypatch.context() as patch:
            stop_at(patch, "replace", 3, after=False)
            with pytest.raises(Stopped):
                job.run(resume=True)
        assert len(list(job.folder.glob("out.npy.parts/*.part"))) == already
    metrics = job.run(resume=True)
    assert job.tokenized == 3
    assert metrics["resumed_texts"] == 40
    whole = json.loads((job.folder / "whole.npy.metrics.json").read_text())
    for key in ("texts", "tokens", "truncated"):
        assert metrics[key] == whole[key]
    assert (job.folder / "out.npy").read_bytes() == (job.folder / "whole.npy").read_bytes()


def stopped_after_two_parts(job, monkeypatch, **options):
    with monkeypatch.context() as patch:
        stop_at(patch, "replace", 3, after=True)
        with pytest.raises(Stopped):
            job.run(**options)


def change_the_input(job):
    job.input.write_text(job.input.read_text().replace("a", "b"))


def change_the_time(job):
    os.utime(job.input, (1, 1))


def change_the_config(job):
    (job.model / "config.json").write_text("{ }")


def change_the_weights(job):
    (job.model / "model.safetensors").write_bytes(b"other weights")


@pytest.mark.parametrize(
    "change, options, message",
    [
        (change_the_input, {}, "the input changed"),
        (change_the_time, {}, "the input changed, mtime was"),
        (change_the_config, {}, r"the model changed, config\.json was"),
        (change_the_weights, {}, r"the model changed, model\.safetensors was"),
        (None, {"max_length": 11}, "the options changed, max_length was 12, is 11"),
        (None, {"errors": "replace"}, "the options changed, errors was strict, is replace"),
    ],
)
def test_resume_refuses_what_changed(job, monkeypatch, change, options, message):
    stopped_after_two_parts(job, monkeypatch)
    if change:
        change(job)
    with pytest.raises(ValueError, match=f"cannot resume .*{message}.*--overwrite starts again"):
        job.run(resume=True, **options)
    assert not (job.folder / "out.npy").exists()
    job.run(overwrite=True, **options)
    assert job.tokenized == 43


def test_unfinished_run_is_not_forgotten(job, monkeypatch):
    stopped_after_two_parts(job, monkeypatch)
    with pytest.raises(ValueError, match="unfinished run: --resume goes on with it, --overwrite"):
        job.run()
    assert len(list(job.folder.glob("out.npy.parts/*.part"))) == 2


def test_old_output_stays_until_the_new_one_is_whole(job, monkeypatch):
    out = job.folder / "out.npy"
    out.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"out\.npy exists already; --overwrite replaces it"):
        job.run()
    with pytest.raises(ValueError, match="exists already"):
        job.run(resume=True)
    stopped_after_two_parts(job, monkeypatch, overwrite=True)
    assert out.read_bytes() == b"old"
    job.run(resume=True)  # --overwrite was given when it began
    assert job.tokenized == 23
    assert np.load(out).shape == (43, HIDDEN)


def test_output_that_came_in_between_is_not_replaced(job, monkeypatch):
    stopped_after_two_parts(job, monkeypatch)
    (job.folder / "out.npy").write_bytes(b"another's")
    with pytest.raises(ValueError, match="exists already"):
        job.run(resume=True)
    assert (job.folder / "out.npy").read_bytes() == b"another's"


def test_one_process_at_a_time(job, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    stopped_after_two_parts(job, monkeypatch)
    with (job.folder / "out.npy.parts" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match="another fastbert is at work on"):
                job.run(**options)
    job.run(resume=True)
    assert job.tokenized == 23


def test_damaged_part_is_noticed(job, monkeypatch):
    stopped_after_two_parts(job, monkeypatch)
    part = job.folder / "out.npy.parts" / "0000001.part"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"0000001\.part is damaged; --overwrite starts again"):
        job.run(resume=True)
    with part.open("wb") as file:
        np.save(file, np.array([9.0, 1, 0, 0]))
        np.save(file, np.zeros((9, HIDDEN), np.float32))
    with pytest.raises(ValueError, match="is of 9 texts, the input has 10 there"):
        job.run(resume=True)


def test_empty_input(job):
    job.input.write_text("")
    with pytest.raises(ValueError, match=r"in\.txt is empty: it has no texts"):
        job.run()
    assert job.left_over() == set()
    job.input.write_text("\n")
    assert job.run()["texts"] == 1


def test_bad_places(job):
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere for out\.npy does not"):
        job.run("nowhere/out.npy")


def test_windows_are_short_lists_read_one_at_a_time(monkeypatch):
    monkeypatch.setattr(embed_files, "WINDOW_TEXTS", 3)
    monkeypatch.setattr(embed_files, "_WINDOW_CHARACTERS", 10)
    read = []

    def texts():
        for text in ["a", "b", "c", "d" * 9, "e", "f", "g" * 99, "h"]:
            read.append(text)
            yield text

    cut = windows(texts())
    assert next(cut) == ["a", "b", "c"]
    assert read == ["a", "b", "c"]
    assert list(cut) == [["d" * 9, "e"], ["f", "g" * 99], ["h"]]
    assert list(windows(iter([]))) == []


def test_progress_lines(job, monkeypatch, capsys):
    now = iter(range(0, 10_000, 4))
    monkeypatch.setattr(embed_files, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    job.run()
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) < 20
    assert all(" of about " in line and "tokens/s" in line for line in lines)
