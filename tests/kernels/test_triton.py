"""Which path is taken, and what becomes of kernels that cannot be compiled."""

import os
import re
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastbert.cli import kernel_status
from fastbert.kernels import _triton
from fastbert.kernels._triton import Kernel, allows_tf32, architecture, jit, run, tl, why_not


@jit("n")
def _double_kernel(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, _twice(tl.load(x_ptr + i, mask=i < n, other=0.0)), mask=i < n)


@jit()
def _twice(x):
    return 2 * x


def test_a_kernel_is_made_when_it_is_launched(device):
    x = torch.arange(5.0, device=device)
    _double_kernel[(1,)](x, 4, BLOCK=8)
    assert x.tolist() == [0.0, 2.0, 4.0, 6.0, 4.0]
    assert not isinstance(_twice, Kernel)  # made with it


LATE = """
from fastbert.kernels._triton import jit, tl

@jit()
def outer_kernel(x_ptr):
    tl.store(x_ptr, inner(tl.load(x_ptr)))

@jit()
def inner(x):
    return 3 * x
"""


def test_threads_may_launch_a_kernel_for_the_first_time_together(monkeypatch, tmp_path):
    import triton

    (tmp_path / "late.py").write_text(LATE)
    monkeypatch.syspath_prepend(tmp_path)
    late, make = import_module("late"), triton.jit

    def slowly(*args, **options):
        time.sleep(0.05)
        return make(*args, **options)

    monkeypatch.setattr(triton, "jit", slowly)
    kernel = late.outer_kernel

    def finds_what_it_calls(i):
        time.sleep(0.03 * i)
        kernel.jitted()
        return not isinstance(late.inner, Kernel)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(finds_what_it_calls, range(4)))


def test_triton_is_imported_at_the_first_launch():
    code = (
        "import sys, torch, fastbert; from fastbert import BertModel; "
        "from fastbert.kernels.layer_norm import layer_norm; "
        "layer_norm(torch.ones(2, 4), torch.ones(4), torch.ones(4)); "
        "assert not [m for m in sys.modules if m.split('.')[0] == 'triton']"
    )
    env = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    subprocess.run([sys.executable, "-P", "-c", code], check=True, env=env)


def test_why_no_kernel_runs(monkeypatch):
    assert "meta" in why_not(torch.device("meta"))
    monkeypatch.setattr(_triton, "is_interpreted", lambda: False)
    assert why_not(torch.device("cpu")) == "kernels need a GPU"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(torch.version, "hip", None)
    assert why_not(torch.device("cuda", 63)) == (
        "kernels need compute capability 8.0, Tesla T4 has 7.5"
    )
    monkeypatch.setattr(_triton, "_HAS_TRITON", False)
    assert why_not(torch.device("cuda", 63)) == "triton is not installed"


@pytest.mark.parametrize(
    "capability, hip, wanted",
    [
        ((8, 0), None, "ampere"),
        ((8, 9), None, "ampere"),
        ((9, 0), None, "hopper"),
        ((10, 3), None, "blackwell"),
        ((12, 0), None, "ampere"),  # Blackwell without a data centre's matrix units
        ((9, 4), "6.4", "amd"),
    ],
)
def test_architecture(capability, hip, wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert architecture.__wrapped__(torch.device("cuda", 0)) == wanted
    assert architecture(torch.device("cpu")) == "hopper"


@pytest.fixture
def gpu(monkeypatch):
    """Something that says it is a tensor on a GPU."""
    monkeypatch.setattr(_triton, "failures", {})
    monkeypatch.setattr(_triton, "on_kernel_device", lambda x: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU")
    return SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16)


def test_what_cannot_be_compiled_runs_in_plain_torch(gpu, monkeypatch):
    """One warning that names kernel, GPU and error; not tried again; `fastbert info` lists it."""
    from triton.runtime.errors import OutOfResources

    calls = []

    def kernels(x, n):
        calls.append(n)
        raise OutOfResources(300_000, 232_448, "shared memory")

    with pytest.warns(UserWarning, match="layer_norm .*plain torch.*Test GPU.*shared memory"):
        assert run("layer_norm", kernels, lambda x, n: n + 1, gpu, 1) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run("layer_norm", kernels, lambda x, n: n + 1, gpu, 2) == 3
        assert run("other", lambda x, n: n, None, gpu, 5) == 5
    assert calls == [1]
    (status,) = (s for s in kernel_status() if s["name"] == "layer_norm")
    assert status["runs"] == "plain torch" and "shared memory" in status["why"]


@pytest.mark.parametrize("name", [m.stem for m in Path(_triton.__file__).parent.glob("[!_]*.py")])
def test_kernels_that_fail_are_listed_by_the_name_of_their_module(name):
    source = Path(import_module(f"fastbert.kernels.{name}").__file__).read_text("utf-8")
    assert set(re.findall(r'\brun\(\s*"(\w+)"', source)) <= {name}


def test_other_errors_are_the_callers(gpu):
    with pytest.raises(ZeroDivisionError):
        run("layer_norm", lambda x: 1 / 0, lambda x: 0, gpu)
    assert not _triton.failures


REHEARSED = """
import torch
from fastbert.kernels._triton import jit, run, tl

@jit()
def good_kernel(x_ptr):
    tl.store(x_ptr, 1.0)

@jit()
def bad_kernel(x_ptr):
    tl.store(x_ptr, not_there)

def test_numbers_are_not_looked_at():
    x = torch.zeros(1, device="cuda")
    good_kernel[(1,)](x)
    assert x.item() == 1

def test_what_cannot_be_compiled_fails():
    bad_kernel[(1,)](torch.zeros(1, device="cuda"))
"""


def test_a_gpu_that_only_compiles(tmp_path):
    """make rehearse-gpu."""
    pytest.importorskip("triton", minversion="3.6", reason="its drivers are others")
    (tmp_path / "test_it.py").write_text(REHEARSED)
    support = str(Path(__file__).parents[1] / "support")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([support, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-P", "-m", "pytest", "-p", "compiling_gpu", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "NameError" in done.stdout and "1 compiled in" in done.stdout


# torch's settings old and new, which do not mix, each in a process of its own; all start from off.
@pytest.mark.parametrize(
    "name, on, off",
    [
        ("matmul.allow_tf32", "True", "False"),
        ("matmul.fp32_precision", "'tf32'", "'ieee'"),
        ("torch.backends.fp32_precision", "'tf32'", "'ieee'"),
    ],
)
def test_tf32_is_allowed_as_torch_is_told(name, on, off):
    if name.endswith("fp32_precision") and not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("torch has no fp32_precision before 2.9")
    code = f"""
import torch
from fastbert.kernels._triton import allows_tf32
matmul = torch.backends.cuda.matmul
print(allows_tf32())
{name} = {on}
print(allows_tf32())
{name} = {off}
print(allows_tf32())
"""
    command = [sys.executable, "-P", "-c", code]
    assert subprocess.check_output(command, text=True).split() == ["False", "True", "False"]


def test_tf32_is_allowed_by_float32_matmul_precision():
    assert not allows_tf32()
    for precision in ("high", "medium"):
        torch.set_float32_matmul_precision(precision)
        try:
            assert allows_tf32()
        finally:
            torch.set_float32_matmul_precision("highest")
    assert not allows_tf32()
