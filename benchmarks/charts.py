"""Bars of a GPU's results: real tokens/s of each provider, a picture for each family of groups."""

import re
from pathlib import Path

# Name of the file: title, what of a group's name is the family, what is left to label its bars.
FAMILIES = {
    "fills": (
        "Forward, lengths to 512, by the share of real tokens",
        r"(.*), forward, .*, fill (.*)",
    ),
    "lengths": ("Forward, 64k tokens, by length", r"(.*), forward, lengths of (\d+)"),
    "batches": ("Forward, by sequences of 128 tokens", r"(.*), forward, (\d+) x 128"),
    "training": ("Training step, lengths to 512", r"(.*), training step, .*, fill (.*)"),
    "text": ("Text to vectors and scores", r"(.*), (text to vectors|CrossEncoder), .*"),
}


def families(results):
    """{name: {model: {label: {provider: tokens/s}}}} of what is there."""
    found = {}
    for row in results:
        for name, (_, pattern) in FAMILIES.items():
            match = re.fullmatch(pattern, row["group"])
            if match and "tokens_per_s" in row:
                of_model = found.setdefault(name, {}).setdefault(match[1], {})
                of_model.setdefault(match[2], {})[row["provider"]] = row["tokens_per_s"]
    return found


def draw(results, stem, folder):
    """Write FOLDER/STEM-<family>.png of each family; the files' names."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = []
    for name, models in families(results).items():
        figure, axes = pyplot.subplots(1, len(models), figsize=(5 * len(models), 4), squeeze=False)
        providers = list(
            dict.fromkeys(p for m in models.values() for bars in m.values() for p in bars)
        )
        providers.sort(key=lambda provider: provider != "fastbert")
        for axis, (model, bars) in zip(axes[0], models.items(), strict=True):
            labels = sorted(bars, key=lambda x: float(x) if re.fullmatch(r"[\d.]+", x) else 0)
            for i, provider in enumerate(providers):
                places = [x + 0.8 * (i + 0.5) / len(providers) - 0.4 for x in range(len(labels))]
                heights = [bars[label].get(provider, 0) / 1e6 for label in labels]
                axis.bar(places, heights, 0.8 / len(providers), label=provider)
            axis.set_xticks(range(len(labels)), labels)
            axis.set_title(model)
        axes[0][0].set_ylabel("million real tokens/s")
        figure.suptitle(FAMILIES[name][0])
        axis.legend(fontsize=7)
        figure.tight_layout()
        names.append(f"{stem}-{name}.png")
        figure.savefig(Path(folder) / names[-1], dpi=110)
        pyplot.close(figure)
    return names
