"""pytest-benchmark's JSON to a results file and a table: `report.py RUN.json`."""

import json
import platform
import re
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

HERE = Path(__file__).parent
BASELINE = ("transformers sdpa", "a call a sequence")
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
        made.append(
            {
                "group": bench["group"],
                **extra,
                "median_s": stats["median"],
                "min_s": stats["min"],
                "max_s": stats["max"],
                "rounds": stats["rounds"],
                "tokens_per_s": extra["tokens"] / stats["median"],
            }
        )
    base = {r["group"]: r["median_s"] for r in made if r["provider"] in BASELINE}
    for row in made:
        row["ratio"] = base[row["group"]] / row["median_s"] if row["group"] in base else None
    return made


def table(results):
    lines = []
    for group in dict.fromkeys(r["group"] for r in results):
        members = [r for r in results if r["group"] == group]
        lines += ["", f"**{group}**, {members[0]['padding']:.0%} padding", ""]
        lines += ["| | tokens/s | median | min to max | ratio |", "|---|---:|---:|---:|---:|"]
        for r in sorted(members, key=lambda r: r["median_s"]):
            ms = [f"{1e3 * r[k]:,.1f} ms" for k in ("median_s", "min_s", "max_s")]
            ratio = f"{r['ratio']:.2f}" if r["ratio"] else ""
            name = r["provider"]
            lines.append(
                f"| {name} | {r['tokens_per_s']:,.0f} | {ms[0]} | {ms[1]} to {ms[2]} | {ratio} |"
            )
    return "\n".join(lines)


def main(path):
    where, results = machine(), rows(json.loads(Path(path).read_text()))
    name = re.sub(r"[^a-z0-9]+", "-", (where["gpu"] or f"cpu {where['cpu']}").lower()).strip("-")
    out = HERE / "results" / f"{name}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"machine": where, "results": results}, indent=1) + "\n")
    facts = ", ".join(f"{k} {v}" for k, v in where.items())
    text = f"Measured on: {facts}.\n{table(results)}\n"
    readme = HERE / "README.md"
    start, end = MARKS.format("Start"), MARKS.format("End")
    before, _, rest = readme.read_text().partition(start)
    after = rest.partition(end)[2]
    readme.write_text(f"{before}{start}\n{text}{end}{after}")
    print(text, f"\nwritten to {out} and {readme}", sep="")


if __name__ == "__main__":
    main(sys.argv[1])
