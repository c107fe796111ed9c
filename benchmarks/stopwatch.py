"""How long something takes, on a GPU to the end of its work."""

import math
import time

import torch

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
