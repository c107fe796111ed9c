"""The commands as a user runs them: what they print, write and refuse, and a kill in the middle."""

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest

from fastbert import cli

MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"
COMMAND = [sys.executable, "-P", "-m", "fastbert"]


def save_model(folder, **sizes):
    """A random one-layer BERT that knows digits."""
    import torch

    from fastbert.config import BertConfig
    from fastbert.model import BertModel

    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(10))]
    vocab += [f"##{i}" for i in range(10)]
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocab))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab),
        num_hidden_layers=1,
        num_attention_heads=1,
        initializer_range=0.5,
        **sizes,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A BERT that is fast enough to embed 100,000 texts in a test."""
    folder = tmp_path_factory.mktemp("model")
    return save_model(folder, hidden_size=8, intermediate_size=8, max_position_embeddings=16)


@pytest.fixture
def run(capsys, monkeypatch):
    """Run one command in this process: (exit status, stdout, stderr)."""
    monkeypatch.delenv("FASTBERT_TRACEBACK", raising=False)

    def run(*args):
        try:
            status = cli.main([str(arg) for arg in args])
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def write_lines(path, n_lines):
    path.write_text("".join(f"{i} {i * 7919}\n" for i in range(n_lines)))
    return path


def refused(result, status, *words):
    """Hold a run to its status and to one line on stderr that has all `words`."""
    assert result[0] == status
    assert result[2].startswith("fastbert: error: ") and result[2].count("\n") == 1
    for word in words:
        assert str(word) in result[2]


def test_help_imports_nothing_slow():
    code = "import fastbert.cli, sys; print({'torch', 'numpy', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
    assert done.returncode == 0 and "embed" in done.stdout
    assert min(seconds) < 0.3


def test_every_option_has_help(run):
    for command in ("info", "embed", "convert", "vocab"):
        status, out, _ = run(command, "--help")
        assert status == 0 and out.startswith(f"usage: fastbert {command}")
    assert run("--version")[:2] == (0, f"fastbert {cli.version('fastbert')}\n")


@pytest.mark.parametrize(
    "line, words",
    [
        ("", ["COMMAND", "see fastbert --help"]),
        ("nonsense", ["invalid choice: 'nonsense'"]),
        ("embed", ["IN, --model, --out", "see fastbert embed --help"]),
        ("embed a.txt --model m --out a.bin", ["wanted a name in .npy, .parquet, .jsonl"]),
        ("embed a.txt --model m --out a.npy --max-length 0", ["at least 1, got '0'"]),
        ("embed a.txt --model m --out a.npy --pooling sum", ["invalid choice: 'sum'"]),
        ("embed a.txt --model m --out a.npy --oops", ["--oops"]),
    ],
)
def test_usage_errors(run, line, words):
    refused(run(*line.split()), 2, *words)


def test_info(run):
    import torch

    status, out, err = run("info")
    assert (status, err) == (0, "")
    assert f"  torch                 {torch.__version__}\n" in out
    assert "layer_norm" in out and "bfloat16: " in out

    status, out, _ = run("info", "--json")
    info = json.loads(out)
    assert info["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert info["cpu"]["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert len(info["gpus"]) == torch.cuda.device_count()
    assert {kernel["name"] for kernel in info["kernels"]} >= {"attention", "layer_norm", "gelu"}
    assert all(kernel["runs"] and kernel["why"] for kernel in info["kernels"])


@pytest.mark.parametrize("native, says", [(True, "in bfloat16"), (False, "in float32")])
def test_info_says_what_bfloat16_is_computed_in(monkeypatch, native, says):
    monkeypatch.setattr("fastbert.kernels.linear.native_bfloat16", lambda: native)
    assert f"computed {says}" in cli.collect_info()["cpu"]["bfloat16"]


def test_embed(run, model, tmp_path):
    source = tmp_path / "in.tsv"
    source.write_text("label\tsentence\n1\t1 2 3\n0\t\n1\t" + "7 " * 50 + "\n")
    out = tmp_path / "out.npy"
    status, printed, err = run("embed", source, "--model", model, "--out", out, "--normalize")
    assert (status, err) == (0, "")
    assert printed.splitlines()[0] == (
        f"{source}, column 'sentence' (a guess): mean pooling, normalized "
        "(no sentence-transformers files), at most 16 tokens, float32 on cpu"
    )
    assert "3 texts, 23 tokens, 1 texts cut" in printed.splitlines()[1]
    vectors = np.load(out)
    assert vectors.shape == (3, 8)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    metrics = json.loads((tmp_path / "out.npy.metrics.json").read_text())
    assert (metrics["texts"], metrics["tokens"], metrics["truncated"]) == (3, 23, 1)
    assert metrics["column"] == "sentence" and metrics["normalize"] is True

    again = tmp_path / "again.npy"
    options = ("--text", "label", "--no-normalize", "--pooling", "cls", "--dtype", "bfloat16")
    status, printed, _ = run("embed", source, "--model", model, "--out", again, *options)
    assert status == 0
    assert "column 'label': cls pooling, not normalized" in printed
    assert "bfloat16 on cpu" in printed
    assert np.array_equal(np.load(again)[0], np.load(again)[2])


def test_embed_errors_are_one_line(run, model, tmp_path):
    source = write_lines(tmp_path / "in.txt", 3)
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"1\n\xff\n")
    empty = tmp_path / "empty.txt"
    empty.touch()
    table = tmp_path / "in.csv"
    table.write_text("a,b\nx,y\n")
    out = tmp_path / "out.npy"

    def embed(source, *options, model=model):
        return run("embed", source, "--model", model, "--out", out, *options)

    refused(embed(tmp_path / "no.txt"), 1, "no.txt does not exist")
    refused(embed(source, model=tmp_path / "no"), 1, tmp_path / "no")
    refused(embed(bad), 1, bad, "line 2", "0xff", "--errors replace")
    refused(embed(empty), 1, "empty.txt is empty")
    refused(embed(table), 1, "--text", "a, b")
    refused(embed(table, "--text", "c"), 1, "no column 'c'", "a, b")
    refused(embed(source, "--max-length", 17), 1, "from 3 to 16", "got 17")
    refused(embed(source, "--device", "nonsense"), 1, "'nonsense' cannot be used")
    refused(embed("-", "--resume"), 1, "standard input cannot be read again")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == []

    assert embed(bad, "--errors", "replace")[0] == 0
    refused(embed(bad), 1, "out.npy exists already", "--overwrite")
    assert embed(source, "--overwrite")[0] == 0
    assert np.load(out).shape == (3, 8)


def test_other_errors_are_one_line_too(run, monkeypatch):
    def broken():
        raise RuntimeError("this\nand that")

    monkeypatch.setattr(cli, "collect_info", broken)
    result = run("info")
    refused(result, 1, "RuntimeError: this and that (FASTBERT_TRACEBACK=1 shows where)")
    assert "in broken" in run("info", "--traceback")[2]
    monkeypatch.setenv("FASTBERT_TRACEBACK", "1")
    assert "in broken" in run("info")[2]


def test_embed_reads_standard_input(model, tmp_path):
    lines = write_lines(tmp_path / "in.txt", 100)
    for source, data in ((lines, None), ("-", lines.read_bytes())):
        out = tmp_path / f"{'stdin' if data else 'file'}.npy"
        command = [*COMMAND, "embed", source, "--model", model, "--out", out]
        subprocess.run(command, input=data, check=True, capture_output=True)
    assert (tmp_path / "stdin.npy").read_bytes() == (tmp_path / "file.npy").read_bytes()


def start_embed(source, model, out, *options, **kwargs):
    command = [*COMMAND, "embed", source, "--model", model, "--out", out, *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, **kwargs)


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended too early: give it more to do"
        assert time.monotonic() < end
        time.sleep(0.002)


def test_kill_and_resume_give_the_same_bytes(model, tmp_path):
    source = write_lines(tmp_path / "in.txt", 100_000)  # 13 windows
    assert start_embed(source, model, tmp_path / "whole.npy").wait() == 0
    out, parts = tmp_path / "out.npy", tmp_path / "out.npy.parts"

    def finished():
        return sorted(parts.glob("[0-9]*.part"))

    for n_parts in (2, 7):
        process = start_embed(source, model, out, "--resume")
        wait_for(lambda n_parts=n_parts: len(finished()) >= n_parts, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in finished()}
    assert 7 <= len(kept) < 13

    process = start_embed(source, model, out, stderr=subprocess.PIPE)
    assert b"--resume goes on with it, --overwrite starts again" in process.communicate()[1]
    assert process.returncode == 1

    process = start_embed(source, model, out, "--resume")
    wait_for(lambda: len(finished()) > len(kept), process)
    assert {path: path.stat().st_mtime_ns for path in finished() if path in kept} == kept
    assert process.wait() == 0
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert not parts.exists()
    resumed = json.loads((tmp_path / "out.npy.metrics.json").read_text())
    whole = json.loads((tmp_path / "whole.npy.metrics.json").read_text())
    assert resumed["resumed_texts"] >= len(kept) * 8192
    assert resumed["tokens"] == whole["tokens"]


def test_ctrl_c_is_130_and_says_how_to_go_on(model, tmp_path):
    source = write_lines(tmp_path / "in.txt", 100_000)
    out = tmp_path / "out.npy"
    process = start_embed(source, model, out, stderr=subprocess.PIPE)
    wait_for(lambda: list(tmp_path.glob("out.npy.parts/*.part")), process)
    process.send_signal(signal.SIGINT)
    err = process.communicate()[1].decode()
    assert process.returncode == 130
    assert err == "fastbert: interrupted; --resume goes on with what is finished\n"


def test_bar_on_a_terminal(model, tmp_path):
    source = write_lines(tmp_path / "in.txt", 9000)
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    process = start_embed(source, model, tmp_path / "out.npy", stderr=follower)
    os.close(follower)
    shown = b""
    while True:
        try:
            data = os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
        shown += data
    os.close(leader)
    assert process.wait() == 0
    assert b"9000/9000" in shown and b"tokens/s" in shown


@pytest.mark.skipif(not MODELS.is_dir(), reason=f"{MODELS} is not there")
def test_convert(run, tmp_path):
    source, out = MODELS / "tf1_keras_bert_test_checkpoint", tmp_path / "out"
    status, printed, err = run("convert", source, out)
    assert (status, err) == (0, "")
    metrics = json.loads((out / "metrics.json").read_text())
    assert f"{metrics['tensors']} tensors" in printed
    assert metrics["parameters"] > 500
    assert {"config.json", "model.safetensors"} <= {path.name for path in out.iterdir()}
    before = (out / "model.safetensors").read_bytes()

    refused(run("convert", source, out), 1, "exists already; --overwrite")
    no_data = MODELS / "tf1_index_only_base12"
    refused(run("convert", no_data, out, "--overwrite"), 1, "data-00000-of-00001 does not exist")
    assert (out / "model.safetensors").read_bytes() == before
    assert run("convert", source, out, "--overwrite")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    refused(run("convert", out, out, "--overwrite"), 1, f"{out} holds {out}")
    refused(run("convert", source, tmp_path / "no" / "out"), 1, "does not exist")
