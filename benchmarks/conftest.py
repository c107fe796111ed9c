"""The stopwatch that all benchmarks share."""

import gc
import math
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

STARTED = time.monotonic()
ON_GPU = torch.cuda.is_available()
LEAST_ROUND = 0.01  # seconds on a GPU; to wait for one to end takes 1e-5
WARM = 0.3  # seconds of work after which a GPU's clocks are up


def wait():
    """Until the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def pace(function, seconds=WARM):
    """Seconds that one call takes, the device's work included, once it is warm."""
    function()
    wait()
    fastest, start = math.inf, time.perf_counter()
    while (begin := time.perf_counter()) - start < seconds:
        function()
        wait()
        fastest = min(fastest, time.perf_counter() - begin)
    return fastest


def plan(seconds, alone=False):
    """(calls to one wait, rounds) for a function that takes `seconds`: about a second in all."""
    calls = 1 if alone else math.ceil(LEAST_ROUND / seconds)
    return calls, min(max(round(1 / (calls * seconds)), 5), 200)


@pytest.fixture(autouse=True)
def within_time():
    """Skip what would start later than BENCH_SECONDS after the beginning."""
    limit = float(os.environ.get("BENCH_SECONDS", "inf"))
    if time.monotonic() - STARTED > limit:
        pytest.skip(f"the {limit:.0f} seconds of BENCH_SECONDS are over")


@pytest.fixture
def timed(benchmark, request):
    """Time a function: `timed(function, group, tokens=...)`.

    One call first, to compile and to fill caches; then `rounds` calls, each to the end of the
    device's work. On a GPU rounds, where not given, last about a second in all, and one of a short
    function is many calls; alone: each call is waited for, as latency is felt.
    setup: called before each of these, untimed; what it gives, the function gets.
    tokens, bytes, flops: of a call, tokens real ones, flops and bytes the least there can be, for
    shares of a limit; padding: the share of padding in what the usual implementation computes;
    calls: how many a round of `function` is, of which the others are then for all; memory: True
    for the GPU's peak. untimed: the row is about something else than time.
    """

    def run(
        function, group, *, provider, rounds=None, setup=None, alone=False, memory=False, **facts
    ):
        calls = 1
        if ON_GPU and rounds is None and setup is None:
            calls, rounds = plan(pace(function), alone)
            if calls > 1:
                facts["calls"] = calls * facts.get("calls", 1)
                for name in ("tokens", "bytes", "flops"):
                    if name in facts:
                        facts[name] *= calls

        def whole(*args):
            for _ in range(calls):
                result = function(*args)
            wait()
            return result

        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        benchmark.group = group
        benchmark.extra_info.update(provider=provider, **facts)
        given = setup and (lambda: ((setup(),), {}))
        result = benchmark.pedantic(whole, setup=given, rounds=rounds or 5, warmup_rounds=1)
        if memory and ON_GPU:
            benchmark.extra_info["memory"] = torch.cuda.max_memory_allocated()
        return result

    yield run
    if ON_GPU:  # what is compiled holds on to the weights
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
