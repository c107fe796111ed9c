"""The fixture that all benchmarks are timed with."""

import gc
import os
import time
from contextlib import suppress

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from stopwatch import pace, plan, wait

STARTED = time.monotonic()
ON_GPU = torch.cuda.is_available()


def pytest_collection_modifyitems(items):
    """What torch compiles comes last, as each takes a minute or two of BENCH_SECONDS."""
    items.sort(key=lambda item: ", compiled" in item.name)


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
    calls: how many a round of `function` is, of which the others are then for all; peak_memory:
    whether to add the GPU's as `memory`, bytes. untimed: the row is about something else than time.
    """

    def run(
        function,
        group,
        *,
        provider,
        rounds=None,
        setup=None,
        alone=False,
        peak_memory=False,
        **facts,
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
        try:
            result = benchmark.pedantic(whole, setup=given, rounds=rounds or 5, warmup_rounds=1)
        except BaseException:  # one without a round would be the end of the others' results
            benchmark.has_error = True
            raise
        if peak_memory and ON_GPU:
            benchmark.extra_info["memory"] = torch.cuda.max_memory_allocated()
        return result

    yield run
    if ON_GPU:  # what is compiled holds on to the weights
        torch.compiler.reset()
        gc.collect()
        with suppress(RuntimeError):  # after a capture that failed
            torch.cuda.empty_cache()
