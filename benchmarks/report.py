"""pytest-benchmark's JSON to a results file and tables: `report.py RUN.json...`.

A group of rows replaces the one of that name in the machine's file, as parts of the suite come one
by one. What is written elsewhere, by RESULTS=FOLDER on another machine, is taken in with
`report.py FOLDER/MACHINE.json`.
"""

import json
import math
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from charts import draw, families

HERE = Path(__file__).parent
BASELINE = ("transformers sdpa", "a call a sequence", "tokenizers", "one thread")
MARKS = "<!-- {} of the table made by report.py -->"
GPU_MARKS = "<!-- {} of the GPU tables made by report.py -->"
FIRST_MARKS = "<!-- {} of the GPU table made by benchmarks/report.py -->"


def machine():
    """What the numbers were measured on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = re.search(r"model name\s*: (.*)", info.read_text())[1]
    gpu = {"gpu": None}
    if torch.cuda.is_available():
        gpu = {"gpu": torch.cuda.get_device_name(), "driver": driver(), "cuda": torch.version.cuda}
    packages = (
        ("torch", "triton", "transformers", "flash-attn")
        if gpu["gpu"]
        else (
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
        **gpu,
        "python": platform.python_version(),
        **versions,
        "date": date.today().isoformat(),
    }


def driver():
    """The NVIDIA driver's version."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(asked, text=True).split()[0]
    return "unknown"


def rows(run, on_gpu=False):
    """One dict a benchmark, with its ratio to the baseline of its group.

    On a GPU: with how much longer it takes than fastbert does, and its share of the ceiling that
    the same run measured.
    """
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
        for name in ("tokens", "bytes", *["flops"] * on_gpu):
            if name in extra:
                row[f"{name}_per_s"] = extra[name] / stats["median"]
    base = {r["group"]: r["median_s"] for r in made if r["provider"] in BASELINE and "rounds" in r}
    for row in made:
        timed = row["group"] in base and "rounds" in row
        row["ratio"] = base[row["group"]] / row["median_s"] if timed else None
    if on_gpu:
        compare(made)
    return made


def compare(made):
    """Put in the ratio to fastbert, and the share of the limit: of products, else of a copy."""
    ceilings = [row for row in made if row["group"] == "ceilings"]
    ours = {row["group"]: row["median_s"] for row in made if row["provider"] == "fastbert"}
    for row in made:
        if row["group"] in ours:
            row["gain"] = row["median_s"] / ours[row["group"]]
        for rate in ("bytes_per_s", "flops_per_s"):
            limit = next((c[rate] for c in ceilings if rate in c), None)
            if limit and rate in row and row not in ceilings:
                row["limit_per_s"], row["share"] = limit, row[rate] / limit


def seconds(value):
    return f"{1e3 * value:,.1f} ms" if value >= 1e-3 else f"{1e6 * value:,.2f} us"


COLUMNS = {
    "tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
    "MB/s": lambda row: f"{row['bytes_per_s'] / 1e6:,.1f}",
    "median": lambda row: seconds(row["median_s"]),
    "min to max": lambda row: f"{seconds(row['min_s'])} to {seconds(row['max_s'])}",
    "ratio": lambda row: f"{row['ratio']:.2f}" if row["ratio"] and "gain" not in row else "",
    "TFLOP/s": lambda row: f"{row['flops_per_s'] / 1e12:,.0f}",
    "of the ceiling": lambda row: f"{row['share']:.0%}",
    "x fastbert's time": lambda row: f"{row['gain']:.2f}",
    "memory": lambda row: f"{row['memory'] / 1e6:,.0f} MB",
    "accuracy": lambda row: f"{row['accuracy']:.3f}",
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


def gain(group, peer):
    return "{:.2f}x", lambda rows: rows[group, peer]["gain"]


def share(*groups):
    return "{:.0%}", lambda rows: min(rows[group, "fastbert"]["share"] for group in groups)


def milliseconds(group):
    return "{:.2f} ms", lambda rows: 1e3 * rows[group, "fastbert"]["median_s"]


def memory(group, peer):
    return "{:.0%}", lambda rows: rows[group, "fastbert"]["memory"] / rows[group, peer]["memory"]


def speed(group, other):
    return (
        "{:.2f}",
        lambda rows: (
            rows[group, "fastbert"]["tokens_per_s"] / rows[other, "fastbert"]["tokens_per_s"]
        ),
    )


def extra(provider, *groups):
    """What `provider` takes more than fastbert, over all groups."""
    return (
        "{:.0%}",
        lambda rows: (
            sum(rows[group, provider]["median_s"] for group in groups)
            / sum(rows[group, "fastbert"]["median_s"] for group in groups)
            - 1
        ),
    )


# What issues ask for, by the names of benchmarks' groups: measure, target, stretch, (how it is
# written, what it is, of {(group, provider): row}; KeyError where that is not measured).
ATTEND_128, ATTEND_512, ATTEND_BACK = (
    f"attention {which}"
    for which in (
        "forward, d=64, lengths of 128",
        "forward, d=64, lengths of 512",
        "backward, d=64, lengths of 512",
    )
)
NORM, NORM_BACK = (
    [f"layer norm + residual, 1024 columns, dropout {p}, {way}" for p in (0.0, 0.1)]
    for way in ("forward", "backward")
)
LARGE, BASE, MINI = "BERT-large", "BERT-base", "MiniLM-L6-H384"
UNIFORM, MIXED = (f"forward, lengths to 512, fill {fill}" for fill in (1.0, 0.4))
STEP, MIXED_STEP = (f"{LARGE}, training step, lengths to 512, fill {fill}" for fill in (1.0, 0.4))
EAGER, COMPILED = "transformers eager", "transformers sdpa, compiled"
PACKED, PACKED_COMPILED = "packed varlen_attn", "packed varlen_attn, compiled"
TEXT = "MiniLM-L6-H384, text to vectors, 16384 texts"
TARGETS = (
    (f"{ATTEND_128}, vs varlen_attn", 1.3, 2, gain(ATTEND_128, "varlen_attn")),
    (f"{ATTEND_512}, vs varlen_attn", 1.15, 1.35, gain(ATTEND_512, "varlen_attn")),
    (f"{ATTEND_BACK}, vs varlen_attn", 1.15, 1.35, gain(ATTEND_BACK, "varlen_attn")),
    ("attention dropout's extra cost, lengths of 512, both ways, at most", 0.2, 0.1,
     extra("fastbert, dropout 0.1", ATTEND_512, ATTEND_BACK)),
    ("layer norm + residual (+ dropout), forward, share of the copy", 0.85, 0.92, share(*NORM)),
    ("the same, backward", 0.7, 0.85, share(*NORM_BACK)),
    (f"{LARGE}, forward, 128 x 512, share of the matmul", 0.7, 0.78, share(f"{LARGE}, {UNIFORM}")),
    (f"{BASE}, forward, 128 x 512, share of the matmul", 0.65, 0.73, share(f"{BASE}, {UNIFORM}")),
    (f"{MINI}, forward, 128 x 512, share of the matmul", 0.45, 0.6, share(f"{MINI}, {UNIFORM}")),
    (f"{BASE}, real tokens/s at fill 0.4 over those at fill 1", 0.92, 0.97,
     speed(f"{BASE}, {MIXED}", f"{BASE}, {UNIFORM}")),
    (f"{BASE}, {MIXED}, vs {EAGER}", 5, 7, gain(f"{BASE}, {MIXED}", EAGER)),
    (f"{BASE}, {MIXED}, vs {COMPILED}", 2.5, 3.2, gain(f"{BASE}, {MIXED}", COMPILED)),
    (f"{BASE}, {MIXED}, vs {PACKED}", 1.4, 1.7, gain(f"{BASE}, {MIXED}", PACKED)),
    (f"{BASE}, {MIXED}, vs {PACKED_COMPILED}", 1.15, 1.3,
     gain(f"{BASE}, {MIXED}", PACKED_COMPILED)),
    (f"{TEXT}, share of the model's own rate", 0.8, 0.9,
     ("{:.0%}", lambda rows: rows[TEXT, "the model alone"]["gain"])),
    (f"{STEP}, share of the matmul", 0.52, 0.62, share(STEP)),
    (f"{MIXED_STEP}, vs {EAGER}", 4, 5, gain(MIXED_STEP, EAGER)),
    (f"{MIXED_STEP}, vs {COMPILED}", 2, 2.5, gain(MIXED_STEP, COMPILED)),
    (f"{MIXED_STEP}, peak memory over that of {EAGER}, at most", 0.4, 0.25,
     memory(MIXED_STEP, EAGER)),
    (f"{LARGE}, 1 x 128, latency, at most", 0.5, 0.33, milliseconds(f"{LARGE}, 1 x 128, latency")),
    (f"{BASE}, 1 x 128, latency, at most", 0.25, 0.15, milliseconds(f"{BASE}, 1 x 128, latency")),
    (f"{MINI}, 1 x 128, latency, at most", 0.12, 0.08, milliseconds(f"{MINI}, 1 x 128, latency")),
)  # fmt: skip


def targets(results):
    """The table of what is aimed at and what was measured."""
    by_name = {(row["group"], row["provider"]): row for row in results}
    lines = ["| measure | target | stretch | measured |", "|---|---:|---:|---:|"]
    for measure, target, stretch, (form, value) in TARGETS:
        try:
            measured = form.format(value(by_name))
        except KeyError:
            measured = "not measured"
        lines.append(f"| {measure} | {form.format(target)} | {form.format(stretch)} | {measured} |")
    return "\n".join(lines) + "\n"


def merged(old, new):
    """Two results of a machine: the newer of groups of one name, all that machines differ in."""
    groups = {row["group"] for row in new["results"]}
    kept = [row for row in old["results"] if row["group"] not in groups]
    where = {**old["machine"], **new["machine"]}
    for name, value in old["machine"].items():
        if str(where[name]) != str(value):
            several = str(value).split(" / ")
            where[name] = " / ".join(dict.fromkeys([*several, str(where[name])]))
    return {"machine": where, "results": kept + new["results"]}


def measured(saved):
    """A results file as text: the machine, and a table of each group; of a GPU pictures as well."""
    facts = ", ".join(f"{k} {v}" for k, v in saved["machine"].items())
    first = ""
    if saved["machine"]["gpu"]:
        stem = Path(file_name(saved["machine"])).stem
        pictures = (
            f"![{name}](results/{stem}-{name}.png)\n" for name in families(saved["results"])
        )
        first = f"\n{targets(saved['results'])}\n{''.join(pictures)}"
    return f"Measured on: {facts}.\n{first}{table(saved['results'])}\n"


FIRST_PAGE = (
    *(f"{model}, {MIXED}" for model in (MINI, BASE, LARGE)), f"{LARGE}, {UNIFORM}", MIXED_STEP,
    TEXT, "BERT-base, CrossEncoder, 8 queries of 100 candidates",
)  # fmt: skip
PEERS = ("transformers sdpa", COMPILED, PACKED, PACKED_COMPILED, "sentence-transformers")


def first_page(saved):
    """The README's tables: of each GPU fastbert's tokens/s, and how many times a peer's."""
    text = ""
    for of_gpu in (s for s in saved if s["machine"]["gpu"]):
        where, by_name = (
            of_gpu["machine"],
            {(r["group"], r["provider"]): r for r in of_gpu["results"]},
        )
        there = [group for group in FIRST_PAGE if (group, "fastbert") in by_name]
        text += f"Real tokens/s on one {where['gpu']}, and how many times those of others:\n\n"
        text += (
            f"| | padding | fastbert | {' | '.join(PEERS)} |\n|---|{'---:|' * (2 + len(PEERS))}\n"
        )
        for group in there:
            ours = by_name[group, "fastbert"]
            padding = f"{ours['padding']:.0%}" if "padding" in ours else ""
            gains = (by_name.get((group, peer), {}).get("gain") for peer in PEERS)
            cells = [f"{gain:.2f}x" if gain else "" for gain in gains]
            cells = [padding, f"**{ours['tokens_per_s']:,.0f}**", *cells]
            text += f"| {group} | {' | '.join(cells)} |\n"
        versions = ", ".join(f"{k} {where[k]}" for k in ("torch", "triton", "transformers", "date"))
        text += f"\nbfloat16, random weights, {versions}; more in benchmarks/README.md.\n"
    return text


def between(text, marks, new):
    """`text` with what is between two marks exchanged."""
    start, end = marks.format("Start"), marks.format("End")
    before, _, rest = text.partition(start)
    return f"{before}{start}\n{new}{end}{rest.partition(end)[2]}"


def tables(saved):
    """The texts for CPUs and for GPUs, of all results files."""
    cpus = [measured(s) for s in saved if not s["machine"]["gpu"]]
    gpus = [measured(s) for s in saved if s["machine"]["gpu"]]
    return "\n".join(cpus), "\n".join(gpus) or f"Nothing is measured yet.\n\n{targets([])}"


def file_name(where):
    """Of a machine's results, with what a CPU's name may hide."""
    title = where["gpu"] or f"cpu {where['cpu']}{' bfloat16' * where['native bfloat16']}"
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") + ".json"


def keep(folder, name, facts):
    """Put `facts` of `name`, which are no times of benchmarks, into RESULTS/FOLDER/MACHINE.json."""
    where = machine()
    path = Path(os.environ.get("RESULTS", HERE / "results")) / folder / file_name(where)
    path.parent.mkdir(exist_ok=True, parents=True)
    saved = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**saved, name: {"machine": where, **facts}}, indent=1) + "\n")


def main(path):
    saved = json.loads(Path(path).read_text())
    if "benchmarks" in saved:
        where = machine()
        saved = {"machine": where, "results": rows(saved, bool(where["gpu"]))}
    folder = Path(os.environ.get("RESULTS", HERE / "results"))
    out = folder / file_name(saved["machine"])
    out.parent.mkdir(exist_ok=True, parents=True)
    print(measured(saved))
    if out.is_file():
        saved = merged(json.loads(out.read_text()), saved)
    out.write_text(json.dumps(saved, indent=1) + "\n")
    print(f"written to {out}")
    if folder.resolve() == (HERE / "results").resolve():
        # The machines that have been measured, each by its last run.
        all_saved = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
        text = tables(all_saved)
        readme = HERE / "README.md"
        new = between(between(readme.read_text(), MARKS, text[0]), GPU_MARKS, text[1])
        readme.write_text(new)
        first = HERE.parent / "README.md"
        first.write_text(between(first.read_text(), FIRST_MARKS, first_page(all_saved)))
        if saved["machine"]["gpu"]:
            draw(saved["results"], out.stem, folder)
        print(f"written to {readme} and {first}")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(argument)
