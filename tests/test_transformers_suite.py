"""transformers' own tests of its models: the same outcomes with every encoder accelerated.

They are not in transformers' packages: give a checkout of its repository, of the installed version,
as FASTBERT_TRANSFORMERS_TESTS. They need the package parameterized. A model's tests take about a
minute, both ways.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

FOLDER = os.environ.get("FASTBERT_TRANSFORMERS_TESTS")
SUPPORT = Path(__file__).parent / "support"
FAILED = ("failure", "error")

pytestmark = pytest.mark.skipif(
    not FOLDER, reason="FASTBERT_TRANSFORMERS_TESTS is no folder of transformers' repository"
)


def run(model: str, report: Path, *options: str) -> dict[str, str]:
    """What became of each test of a model, by its name."""
    paths = os.pathsep.join(filter(None, (str(SUPPORT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pytest", "-p", "accelerate_everything", *options, "-q"]
    command += ["-p", "no:cacheprovider", "-W", "ignore", f"--junitxml={report}"]
    file = f"tests/models/{model}/test_modeling_{model}.py"
    done = subprocess.run(
        [*command, file],
        cwd=FOLDER,
        env={**os.environ, "PYTHONPATH": paths},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout[-4000:] + done.stderr[-4000:]  # 1: some failed
    print(done.stdout[-4000:])
    outcomes: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if outcomes.get(name) not in FAILED:  # subtests are cases of the same name
            tags = (part.tag for part in case if part.tag in (*FAILED, "skipped"))
            outcomes[name] = next(tags, "passed")
    return outcomes


@pytest.mark.parametrize("model", ["bert", "distilbert", "electra", "roberta", "xlm_roberta"])
def test_outcomes_are_those_without(model, tmp_path):
    own = run(model, tmp_path / "own.xml")
    fast = run(model, tmp_path / "fast.xml", "--accelerate")
    print(f"{model}: {dict(Counter(own.values()))}, accelerated {dict(Counter(fast.values()))}")
    assert Counter(own.values())["passed"] > 50  # that there was something to compare
    differing = {name: (own.get(name), fast.get(name)) for name in own.keys() | fast.keys()}
    differing = {name: both for name, both in differing.items() if both[0] != both[1]}
    print(differing)
    # Zeros at padding may pass where the model's own values there, of ids or of vectors, differ.
    differing = {n: both for n, both in differing.items() if both != ("failure", "passed")}
    assert not differing
