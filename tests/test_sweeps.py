"""Sweeps of launches, rehearsed on a CPU: small sizes, made-up times, lines that can be pasted."""

import copy
import importlib
import itertools
import json
import re

import pytest
import report
import sweep
import torch

from fastbert.kernels import (
    attention,
    cross_entropy,
    embeddings,
    gelu,
    layer_norm,
    linear_gelu,
    pooling,
)

SMALL = {
    "attention": (attention, {"N_TOKENS": 512, "HIDDEN": 128, "GRID": [(64, 16, 1)]}),
    "cross_entropy": (cross_entropy, {}),
    "embeddings": (embeddings, {"N_TOKENS": 8, "SIZES": (9, 2, 9)}),
    "gelu": (gelu, {"N_BYTES": 2**10, "N_TOKENS": [2, 4, 8], "HIDDEN": (8, 16, 24)}),
    "layer_norm": (layer_norm, {"N_BYTES": 2**14}),
    "pooling": (pooling, {"MANY": 16}),
}


@pytest.fixture(params=SMALL)
def swept(request, monkeypatch):
    """A sweep's module, and that of the kernels, whose launches it may exchange."""
    module, (kernels, sizes) = (
        importlib.import_module(f"sweep_{request.param}"),
        SMALL[request.param],
    )
    for name, value in {**sizes, "DTYPE": torch.float32}.items():
        monkeypatch.setattr(module, name, value)
    for name in ("_LAUNCHES", "_CHUNK", "_FORWARD", "_BACKWARD", "_POOL", "_NORMALIZE", "_launch"):
        if hasattr(kernels, name):
            monkeypatch.setattr(kernels, name, copy.copy(getattr(kernels, name)))
    for name in ("_LAUNCH", "_TMA_LAUNCHES"):
        monkeypatch.setattr(linear_gelu, name, getattr(linear_gelu, name))
    monkeypatch.setattr(cross_entropy, "_MOST_LOGITS", 2**17)
    monkeypatch.setattr(attention, "_forward", lambda q, *args: (q, q[..., 0]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
    monkeypatch.setattr(sweep, "seen", {"timed": [], "table": []})
    return module, kernels


def pasted(kernels):
    """What the lines that begin with a bracket, or give a name, are in Python."""
    lines = [line.split("  #")[0].strip() for line in sweep.seen["table"]]
    of_rows = linear_gelu if kernels is gelu else kernels
    rows = [eval(line, vars(of_rows))[0] for line in lines if re.match(r"\(\d", line)]
    named = dict(line.split(" = ") for line in lines if line.startswith("_") and line[-1] == ")")
    return rows, {name: eval(value, vars(kernels)) for name, value in named.items()}


@pytest.mark.parametrize("rising", [True, False])
def test_gives_the_fastest(swept, monkeypatch, rising):
    module, kernels = swept
    old = getattr(kernels, "_LAUNCHES", None)
    times = itertools.count(1, 1) if rising else itertools.count(10_000, -1)
    monkeypatch.setattr(sweep, "stopwatch", lambda step: float(next(times)))
    module.main()
    assert len(sweep.seen["timed"]) > 10
    rows, named = pasted(kernels)
    if kernels is attention:
        assert [row[:2] for row in rows] == [(2, 64), (2, 32), (2, 128)]
        first, *_, last = module.candidates()
        assert all(row[2].dq == (first if rising else last) for row in rows)
        assert all(row[2].most_fwd == (128 if rising else 0) for row in rows)
    elif old:
        assert [row[0] for row in rows] == [row[0] for row in old]
        kind = type(old[0][-1])
        assert all(isinstance(x, kind) for row in rows for x in row[1:])
        assert all(len(row) == len(of) for row, of in zip(rows, old, strict=True))
    else:
        assert len(named) == 2 and all(type(x).__name__ == "_Launch" for x in named.values())
    if kernels is gelu:
        wins = [line for line in sweep.seen["table"] if "won at" in line]
        assert len(wins) == (0 if rising else 3) and [row[0] for row in rows] == [8, 4, 2]
        assert all("(2, 8)" in line for line in wins)


def test_without_time_all_stays(swept, monkeypatch):
    module, kernels = swept
    monkeypatch.setattr(sweep, "SECONDS", 0.0)
    old = getattr(kernels, "_LAUNCHES", None)
    named_before = {n: getattr(kernels, n, None) for n in ("_FORWARD", "_POOL", "_NORMALIZE")}
    module.main()
    assert all(set(ms) == {None} for _, *ms in sweep.seen["timed"])
    rows, named = pasted(kernels)
    if kernels is attention:
        kept = {dim: row for size, dim, row in old["hopper"] if size == 2}
        for _, dim, row in rows:
            assert (row.fwd, row.dq, row.dkv) == (kept[dim].fwd, kept[dim].dq, kept[dim].dkv)
    elif old:
        assert tuple(rows) == tuple(old)
    for name, value in named.items():
        assert value == named_before.get(name, value)


def test_parts_compile_everything_once(monkeypatch):
    called = []
    for part in range(3):
        monkeypatch.setattr(sweep, "seen", {"timed": [], "table": []})
        monkeypatch.setattr(sweep, "PART", part)
        monkeypatch.setattr(sweep, "PARTS", 3)
        for i in range(10):
            sweep.timings(i, lambda i=i: [lambda: called.append(i)])
    assert sorted(called) == list(range(10))


def test_plain_torch_is_not_the_fastest(monkeypatch):
    """What runs in a kernel's place where that cannot be compiled."""
    monkeypatch.setattr(sweep, "seen", {"timed": [], "table": []})
    monkeypatch.setattr(sweep._triton, "failures", {})
    monkeypatch.setattr(sweep, "stopwatch", lambda step: step() or 1.0)

    def fail():
        sweep._triton.failures["layer_norm", "GPU"] = "OutOfResources"

    times = {
        name: sweep.timings(name, lambda step=step: [step])[0]
        for name, step in (("fails", fail), ("runs", lambda: None))
    }
    assert (
        sweep.best(times, "old") == "runs" and sweep.best({"fails": times["fails"]}, "old") == "old"
    )
    assert "OutOfResources" in sweep.seen["timed"][0][0]


def test_what_was_seen_is_kept_by_name(monkeypatch, tmp_path):
    where = {"gpu": "NVIDIA H200"}
    monkeypatch.setattr(report, "machine", lambda: where)
    monkeypatch.setenv("RESULTS", str(tmp_path))
    for name in ("sweep_a", "sweep_b"):
        report.keep("sweeps", name, {"table": [name]})
    saved = json.loads((tmp_path / "sweeps/nvidia-h200.json").read_text())
    assert saved == {n: {"machine": where, "table": [n]} for n in ("sweep_a", "sweep_b")}
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match=r"sweep_a.py: there is no GPU"):
            sweep.run("sweep_a.py", None)
