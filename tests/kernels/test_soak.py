"""A few of the random cases of tests/support/soak.py, of which 10,000 are run on a GPU."""

import pytest
import soak
import torch

ON_GPU = torch.cuda.is_available()
SMALL = 8


# Where kernels are interpreted, one small case of each operation.
@pytest.mark.parametrize("i", range(140 if ON_GPU else 7))
def test_case(i):
    _, error = soak.run_case(i, seed=11, longest=600 if ON_GPU else SMALL)
    assert error is None, error


def test_what_is_wrong_fails(monkeypatch):
    wrong = 1.1 if ON_GPU else 1.01  # the case is of bfloat16 on a GPU
    monkeypatch.setattr(soak, "pool", lambda x, *how: wrong * soak.pool_ref(x, *how))
    i = soak.CHECKS.index(soak.check_pool)
    draws, error = soak.run_case(i, longest=SMALL)
    assert draws == soak.DRAWS and error.startswith(f"case {i} of seed 0, check_pool: AssertionErr")
    monkeypatch.setattr(soak, "pool", lambda x, *how: soak.pool_ref(x, *how) + torch.rand(()))
    assert "two runs differ" in soak.run_case(i, longest=SMALL)[1]


def test_plain_torch_in_a_kernels_place_fails(monkeypatch):
    monkeypatch.setattr(soak._triton, "failures", {("pool", "GPU"): "OutOfResources"})
    draws, error = soak.run_case(soak.CHECKS.index(soak.check_pool), longest=SMALL)
    assert draws == 1 and "RuntimeError: no kernel" in error


def test_a_case_is_always_the_same(monkeypatch):
    seen = []
    monkeypatch.setattr(
        soak.Case, "check", lambda case, f, reference, *tensors: seen.append((f(*tensors), case))
    )
    quick = [soak.CHECKS.index(check) for check in (soak.check_layer_norm, soak.check_pool)]
    for i in (*quick, *quick):
        soak.run_case(i, longest=SMALL)
    for (x, case), (y, again) in zip(seen[:2], seen[2:], strict=True):
        assert torch.equal(x, y) and case.dtype == again.dtype
