"""Pictures and the card of a model that was trained: matplotlib, where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_MOST_LABELS = 60  # in a picture that people can read


def plot_history(path: Path, numbers: dict[str, Any]) -> None:
    """The loss in training, and the evaluations beside it."""
    figure_of = _figure()
    if figure_of is None or not numbers["history"]:
        return
    figure = figure_of(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    history, evaluations = numbers["history"], numbers["evaluations"]
    axes.plot([e["step"] for e in history], [e["loss"] for e in history], label="training")
    steps = [e["step"] for e in evaluations]
    if evaluations and "loss" in evaluations[0]:
        axes.plot(steps, [e["loss"] for e in evaluations], "o-", label="dev")
    axes.set(
        xlabel="step", ylabel="loss", title=f"{Path(numbers['model']).name}: {numbers['task']}"
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_confusion(path: Path, confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> None:
    """True labels in rows, predicted ones in columns."""
    figure_of = _figure()
    if figure_of is None or len(labels) > _MOST_LABELS:
        return
    side = 3 + 0.5 * len(labels)
    figure = figure_of(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = [[n / max(1, sum(row)) for n in row] for row in confusion]
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true label")
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="predicted", ylabel="true")
    for i, row in enumerate(confusion):
        for j, n in enumerate(row):
            color = "white" if shares[i][j] > 0.5 else "black"
            axes.text(j, i, f"{n:,}", ha="center", va="center", color=color)
    figure.savefig(path, dpi=120)


def _figure() -> Any:
    """matplotlib's Figure, without its global state; None where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure


def model_card(numbers: dict[str, Any]) -> str:
    """README.md of the model folder, with the metadata that the Hugging Face hub reads."""
    task, teacher = numbers["task"], numbers.get("teacher")
    tag = {"tokens": "token-classification", "qa": "question-answering", "mlm": "fill-mask"}
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {tag.get(task, 'text-classification')}",
        "tags: [fastbert]",
        "---",
        "",
        f"# {Path(numbers['model']).name}, {'distilled' if teacher else 'fine-tuned'}: {task}",
        "",
        f"Trained with fastbert {numbers['versions']['fastbert']} from `{numbers['model']}` on "
        f"`{numbers['train']}`: {numbers['steps']:,} steps, {numbers['tokens']:,} tokens, "
        f"{numbers['seconds']:,.0f} s on {numbers['device']}.",
        "",
    ]
    if numbers["metrics"]:
        lines += [f"Scores on `{numbers['dev']}`:", "", "| score | value |", "| --- | --- |"]
        lines += [
            f"| {name} | {value:.4f} |"
            for name, value in numbers["metrics"].items()
            if isinstance(value, float)
        ]
        lines.append("")
    if teacher:
        student = {**numbers["student"], "metrics": numbers["metrics"] or {}}
        lines += [f"Its teacher was `{teacher['folder']}`:", ""]
        lines += ["| | teacher | student |", "| --- | ---: | ---: |"]
        lines += [
            f"| {name} | {teacher[key]:,} | {student[key]:,} |"
            for name, key in (("parameters", "parameters"), ("tokens/s", "tokens_per_second"))
        ]
        lines += [
            f"| {name} | {value:.4f} | {student['metrics'][name]:.4f} |"
            for name, value in teacher["metrics"].items()
        ]
        lines.append("")
    per_class = (numbers["metrics"] or {}).get("per_class")
    if per_class:
        lines += [
            "| label | precision | recall | F1 | examples |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {name} | {s['precision']:.4f} | {s['recall']:.4f} | {s['f1']:.4f} "
            f"| {s['support']:,.0f} |"
            for name, s in per_class.items()
        ]
        lines.append("")
    lines += ["Recipe: " + ", ".join(f"{k} {v}" for k, v in numbers["recipe"].items()) + ".", ""]
    if numbers["labels"] and len(numbers["labels"]) > 1:
        lines += ["Labels: " + ", ".join(numbers["labels"]) + ".", ""]
    lines += ["`metrics.json` has all numbers, `loss.png` the loss over the steps.", ""]
    return "\n".join(lines)
