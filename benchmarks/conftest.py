"""The stopwatch that all benchmarks share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture
def timed(benchmark, request):
    """Time a function: `timed(function, group, tokens=...)`.

    One call first, to compile and to fill caches; then `rounds` calls, each to the end of the
    device's work. tokens: real ones a call; padding: the share of padding in what the usual
    implementation computes; flops, bytes: of a call, for shares of a limit.
    """

    def run(function, group, *, provider, rounds=5, **facts):
        def whole():
            result = function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return result

        benchmark.group = group
        benchmark.extra_info.update(provider=provider, **facts)
        return benchmark.pedantic(whole, rounds=rounds, warmup_rounds=1)

    return run
