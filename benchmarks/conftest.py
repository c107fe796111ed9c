"""The stopwatch that all benchmarks share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture
def timed(benchmark, request):
    """Time a function: `timed(function, group, tokens=...)`.

    One call first, to compile and to fill caches; then `rounds` calls, each to the end of the
    device's work. setup: called before each of these, untimed; what it gives, the function gets.
    tokens or bytes: real ones a round; padding: the share of padding in what the usual
    implementation computes; flops: of a round, for shares of a limit; calls: how many a round is.
    untimed: the row is about something else than time.
    """

    def run(function, group, *, provider, rounds=5, setup=None, **facts):
        def whole(*args):
            result = function(*args)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return result

        benchmark.group = group
        benchmark.extra_info.update(provider=provider, **facts)
        given = setup and (lambda: ((setup(),), {}))
        return benchmark.pedantic(whole, setup=given, rounds=rounds, warmup_rounds=1)

    return run
