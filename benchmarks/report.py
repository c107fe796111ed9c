"""pytest-benchmark's JSON to a results file and a table: `report.py RUN.json`."""

import json
import math
import platform
import re
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

HERE = Path(__file__).parent
BASELINE = ("transformers sdpa", "a call a sequence", "tokenizers", "one thread")
MARKS = "<!-- {} of the table made by report.py -->"


def machine():
    """What the numbers were measured on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = re.search(r"model name\s*: (.*)", info.read_text())[1]
    packages = (
        "torch",
        "triton",
        "transformers",
        "sentence-transformers",
        "onnxruntime",
        "ctranslate2",
        "tokenizers",
        "tokie",
        "flash-tokenizer",
        "blingfire",
        "tensorflow-text",
    )
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "native bfloat16": torch.cpu._is_avx512_bf16_supported(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **versions,
        "date": date.today().isoformat(),
    }


def rows(run):
    """One dict a benchmark, with its ratio to the baseline of its group."""
    made = []
    for bench in run["benchmarks"]:
        stats, extra = bench["stats"], bench["extra_info"]
        row = {"group": bench["group"], **extra}
        made.append(row)
        if extra.get("untimed"):
            continue
        for name in ("median", "min", "max"):
            row[f"{name}_s"] = stats[name] / extra.get("calls", 1)
        row["rounds"] = stats["rounds"]
        for name in ("tokens", "bytes"):
            if name in extra:
                row[f"{name}_per_s"] = extra[name] / stats["median"]
    base = {r["group"]: r["median_s"] for r in made if r["provider"] in BASELINE and "rounds" in r}
    for row in made:
        timed = row["group"] in base and "rounds" in row
        row["ratio"] = base[row["group"]] / row["median_s"] if timed else None
    return made


def seconds(value):
    return f"{1e3 * value:,.1f} ms" if value >= 1e-3 else f"{1e6 * value:,.2f} us"


COLUMNS = {
    "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
    "MB/s": lambda row: f"{row['bytes_per_s'] / 1e6:,.1f}",
    "median": lambda row: seconds(row["median_s"]),
    "min to max": lambda row: f"{seconds(row['min_s'])} to {seconds(row['max_s'])}",
    "ratio": lambda row: f"{row['ratio']:.2f}" if row["ratio"] else "",
    "memory": lambda row: f"{row['memory'] / 1e6:,.0f} MB",
    # Rounded down: 100% is all of them.
    "exact": lambda row: f"{math.floor(1000 * row['exact']) / 10:.1f}%",
}


def cell(column, row):
    try:
        return COLUMNS[column](row)
    except KeyError:  # not measured
        return ""


def table(results):
    lines = []
    for group in dict.fromkeys(r["group"] for r in results):
        members = [r for r in results if r["group"] == group]
        members.sort(
            key=lambda r: r.get("median_s", r.get("memory", 2 - r.get("exact", -math.inf)))
        )
        columns = [c for c in COLUMNS if any(cell(c, r) for r in members)]
        padding = f", {members[0]['padding']:.0%} padding" if "padding" in members[0] else ""
        lines += ["", f"**{group}**{padding}", ""]
        lines += [f"| | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
        for row in members:
            lines.append(" | ".join(["| " + row["provider"], *(cell(c, row) for c in columns), ""]))
    return "\n".join(line.rstrip() for line in lines)


def measured(saved):
    """A results file as text: the machine, and a table of each group."""
    facts = ", ".join(f"{k} {v}" for k, v in saved["machine"].items())
    return f"Measured on: {facts}.\n{table(saved['results'])}\n"


def main(path):
    where, results = machine(), rows(json.loads(Path(path).read_text()))
    name = re.sub(r"[^a-z0-9]+", "-", (where["gpu"] or f"cpu {where['cpu']}").lower()).strip("-")
    out = HERE / "results" / f"{name}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"machine": where, "results": results}, indent=1) + "\n")
    # The machines that have been measured, each by its last run.
    files = sorted(out.parent.glob("*.json"))
    text = "\n".join(measured(json.loads(file.read_text())) for file in files)
    readme = HERE / "README.md"
    start, end = MARKS.format("Start"), MARKS.format("End")
    before, _, rest = readme.read_text().partition(start)
    after = rest.partition(end)[2]
    readme.write_text(f"{before}{start}\n{text}{end}{after}")
    print(measured({"machine": where, "results": results}))
    print(f"written to {out} and {readme}")


if __name__ == "__main__":
    main(sys.argv[1])
