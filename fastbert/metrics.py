"""Scores of predictions, by scikit-learn, scipy and seqeval; SQuAD's by its own rules."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def classification(
    truth: NDArray[np.int64], predicted: NDArray[np.int64], names: Sequence[str]
) -> dict[str, Any]:
    """Of one label for each: numbers, and "per_class" and "confusion" (rows are the truth)."""
    from sklearn import metrics

    numbers = range(len(names))
    found: dict[str, Any] = {"accuracy": float(metrics.accuracy_score(truth, predicted))}
    found |= _averages(truth, predicted, labels=numbers)
    found["mcc"] = float(metrics.matthews_corrcoef(truth, predicted))
    found["per_class"] = _per_class(truth, predicted, names, labels=numbers)
    confusion = metrics.confusion_matrix(truth, predicted, labels=numbers)
    return {**found, "confusion": confusion.tolist()}


def multi_label(
    truth: NDArray[Any], predicted: NDArray[Any], names: Sequence[str]
) -> dict[str, Any]:
    """Of (n, n_labels) zeros and ones; "accuracy" counts rows that are right in all labels."""
    from sklearn import metrics

    found: dict[str, Any] = {
        "accuracy": float(metrics.accuracy_score(truth, predicted)),
        "hamming_loss": float(metrics.hamming_loss(truth, predicted)),
    }
    found |= _averages(truth, predicted)
    return {**found, "per_class": _per_class(truth, predicted, names)}


def _averages(truth: Any, predicted: Any, **options: Any) -> dict[str, float]:
    from sklearn.metrics import precision_recall_fscore_support

    found = {}
    for average in ("macro", "micro"):
        scores = precision_recall_fscore_support(
            truth, predicted, average=average, zero_division=0, **options
        )
        for name, score in zip(("precision", "recall", "f1"), scores, strict=False):
            found[f"{name}_{average}"] = float(score)
    return found


def _per_class(truth: Any, predicted: Any, names: Sequence[str], **options: Any) -> dict[str, Any]:
    from sklearn.metrics import precision_recall_fscore_support

    scores = precision_recall_fscore_support(truth, predicted, zero_division=0, **options)
    columns = ("precision", "recall", "f1", "support")
    return {
        name: dict(zip(columns, (float(score[i]) for score in scores), strict=True))
        for i, name in enumerate(names)
    }


def regression(truth: NDArray[Any], predicted: NDArray[Any]) -> dict[str, float]:
    """Correlations are 0 where one side is constant."""
    from scipy import stats

    error = predicted - truth
    varies = len(truth) > 1 and np.ptp(truth) > 0 and np.ptp(predicted) > 0
    return {
        "pearson": float(stats.pearsonr(truth, predicted)[0]) if varies else 0.0,
        "spearman": float(stats.spearmanr(truth, predicted)[0]) if varies else 0.0,
        "mse": float(np.mean(error**2)),
        "mae": float(np.mean(np.abs(error))),
    }


def entities(truth: list[list[str]], predicted: list[list[str]]) -> dict[str, Any]:
    """Of tags by sentence: of entities where tags are B-, I- and the like, and of words."""
    pairs = list(zip((t for s in truth for t in s), (t for s in predicted for t in s), strict=True))
    found: dict[str, Any] = {
        "word_accuracy": sum(a == b for a, b in pairs) / max(1, len(pairs)),
    }
    if not any(re.match(r"[BIESLU]-", tag) for sentence in truth for tag in sentence):
        return found
    try:
        from seqeval.metrics import classification_report
    except ImportError:
        raise ValueError("scores of entities need seqeval: pip install seqeval") from None
    report = classification_report(truth, predicted, output_dict=True, zero_division=0)
    names = {"precision": "precision", "recall": "recall", "f1-score": "f1"}

    def scores(row: dict[str, Any]) -> dict[str, float]:
        return {new: float(row[old]) for old, new in names.items()}

    found = {**scores(report["micro avg"]), **found, "f1_macro": scores(report["macro avg"])["f1"]}
    found["per_class"] = {
        kind: {**scores(row), "support": float(row["support"])}
        for kind, row in report.items()
        if not kind.endswith(" avg")
    }
    return found


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_IDEOGRAPH = re.compile("([\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_words(text: str) -> list[str]:
    """As SQuAD's evaluation reads an answer: lower case, no punctuation, no articles. Chinese
    characters and kana are words by themselves, as CMRC's evaluation has it."""
    text = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return _IDEOGRAPH.sub(r" \1 ", text).split()


def answers(truth: list[list[str]], predicted: list[str]) -> dict[str, float]:
    """Exact match and F1 in percent: of each question the best over its true answers, of which
    none stands for the answer ""."""
    exact, f1, has_answer = [], [], []
    for wanted, got in zip(truth, predicted, strict=True):
        words = squad_words(got)
        options = [squad_words(text) for text in wanted] or [[]]
        exact.append(max(float(option == words) for option in options))
        f1.append(max(_overlap(option, words) for option in options))
        has_answer.append(bool(wanted))
    found = {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(f1))}
    answerable = np.array(has_answer)
    if not answerable.all() and answerable.any():
        found["f1_answerable"] = 100 * float(np.mean(np.array(f1)[answerable]))
        found["accuracy_unanswerable"] = 100 * float(np.mean(np.array(exact)[~answerable]))
    return found


def _overlap(wanted: list[str], got: list[str]) -> float:
    if not wanted or not got:
        return float(wanted == got)
    common = sum((Counter(wanted) & Counter(got)).values())
    return 2 * common / (len(wanted) + len(got))
