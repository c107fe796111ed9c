"""What sweeps share: compiling on many cores first, a bounded time, and a record of all of it.

SWEEP_SECONDS: what would be timed later is not, and keeps the launch it has.
RESULTS/sweeps/<gpu>.json gets what was timed and the lines to paste.
"""

import os
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import report
import torch
import triton

from fastbert.kernels import _triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SECONDS = float(os.environ.get("SWEEP_SECONDS", "inf"))
START = time.monotonic()
# "2/8": of a process that only compiles, every eighth of the candidates.
PART, PARTS = map(int, os.environ.get("SWEEP_PART", "0/0").split("/"))
seen = {"timed": [], "table": []}


def timings(what, prepare, n_steps=1):
    """Medians in ms of the steps that prepare() gives, the first n_steps of them.

    inf where there is no time left, or a kernel cannot be had.
    """
    found, n = [float("inf")] * n_steps, len(seen["timed"])
    try:
        if PARTS:
            found = [float(n)] * n_steps
            for step in prepare() if n % PARTS == PART else ():
                step()
        elif time.monotonic() - START < SECONDS:
            found = [stopwatch(step) for step in prepare()]
    except (*_triton._compile_errors(), RuntimeError) as error:
        what = f"{what}: {type(error).__name__}"
    if _triton.failures:  # what was timed is plain torch, as all that follows would be
        what, found = f"{what}: {_triton.failures}", [float("inf")] * n_steps
        _triton.failures.clear()
    seen["timed"].append((str(what), *(ms if ms < float("inf") else None for ms in found)))
    return found


def stopwatch(step):
    return triton.testing.do_bench(step, warmup=10, rep=50, return_mode="median")


def best(times, otherwise):
    """What of `times` is the fastest; `otherwise` where nothing was timed."""
    fastest = min(times, key=times.__getitem__, default=otherwise)
    return otherwise if times.get(fastest, float("inf")) == float("inf") else fastest


def paste(line):
    """A line of the table, or about it."""
    seen["table"].append(line)
    print(line, flush=True)


def run(file, sweep):
    """Compile all candidates on many cores, then sweep() and keep what it saw."""
    if DEVICE == "cpu":
        sys.exit(f"{Path(file).name}: there is no GPU")
    if PARTS:
        return sweep()
    n = min(8, os.cpu_count() or 1)
    compiling = [
        subprocess.Popen(
            [sys.executable, file],
            env={**os.environ, "SWEEP_PART": f"{i}/{n}"},
            stdout=subprocess.DEVNULL,
        )
        for i in range(n)
    ]
    for process in compiling:
        try:
            process.wait(
                max(0.0, SECONDS / 2 + START - time.monotonic()) if SECONDS < 1e9 else None
            )
        except subprocess.TimeoutExpired:
            process.kill()
    gpu = torch.cuda.get_device_name()
    paste(
        f"# From benchmarks/{Path(file).name} on {gpu}, torch {torch.__version__}, "
        f"triton {triton.__version__}, {date.today()}."
    )
    try:
        sweep()
    finally:
        left_out = sum(None in ms for _, *ms in seen["timed"])
        paste(
            f"# {left_out} of {len(seen['timed'])} timings failed, or were left out for lack of "
            "time."
        )
        report.keep("sweeps", Path(file).stem, seen)
