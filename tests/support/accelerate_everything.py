"""A pytest plugin that runs tests of transformers with every encoder accelerated as it is made.

`pytest -p accelerate_everything --accelerate` in a checkout of transformers, with the folder of
this file on PYTHONPATH. Without the option encoders stay as they are: what to compare with. Either
way each test begins with the same seeds, also of the generator of those tests' inputs.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from functools import wraps
from importlib import import_module
from typing import Any

import pytest

import fastbert.drop_in as drop_in
from fastbert.borrowed import FAMILIES

_MODULES = {
    "BertModel": "bert",
    "RobertaModel": "roberta",
    "XLMRobertaModel": "xlm_roberta",
    "CamembertModel": "camembert",
    "DistilBertModel": "distilbert",
    "ElectraModel": "electra",
    "BertGenerationEncoder": "bert_generation",
}
counts: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accelerate", action="store_true", help="accelerate every encoder")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--accelerate"):
        return
    for name in FAMILIES:
        module = import_module(f"transformers.models.{_MODULES[name]}.modeling_{_MODULES[name]}")
        _accelerate_when_made(getattr(module, name))
    _count(drop_in, "_run", lambda *_: "fast calls")
    _count(drop_in._State, "note", lambda _state, _encoder, why: f"own code, {why}")


@pytest.fixture(autouse=True)
def same_seeds() -> None:
    import numpy
    import torch

    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    common = sys.modules.get("tests.test_modeling_common")
    if common is not None:
        common.global_rng.seed(0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for what, n in counts.most_common():
        terminalreporter.write_line(f"accelerate_everything: {n} {what}")


def _accelerate_when_made(kind: Any) -> None:
    own = kind.__init__

    @wraps(own)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        if type(self) is not kind:
            counts["made by a subclass"] += 1
        elif drop_in._decodes(self.config):
            counts["decoders left alone"] += 1
        else:
            drop_in.accelerate(self)
            counts["encoders accelerated"] += 1

    kind.__init__ = __init__


def _count(owner: Any, name: str, what: Any) -> None:
    own = getattr(owner, name)

    @wraps(own)
    def counted(*args: Any) -> Any:
        counts[what(*args)] += 1
        return own(*args)

    setattr(owner, name, counted)
