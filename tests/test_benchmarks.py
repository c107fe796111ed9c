"""The GPU suite rehearsed on a CPU: small models, made-up times, everything but the speed."""

import gzip
import itertools
import json
import os
import re
import subprocess
from pathlib import Path

import bench_fp8
import bench_gpu
import bench_layer_norm
import bench_text
import charts
import fine_tuning
import gpu_peers
import measure_training
import profile_gpu
import pytest
import report
import stopwatch
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(report.__file__).parent
TINY = {
    "BERT-large": bench_gpu.shape(2, 64, 2),
    "BERT-base": bench_gpu.shape(2, 32, 2),
    "MiniLM-L6-H384": bench_gpu.shape(1, 32, 1),
}


def masked_attention(q, k, v, cu_seqlens, max_seqlen, dropout_p=0.0):
    """What stands in for varlen_attn, which needs a GPU: all pairs of tokens, most masked."""
    of_sequence = torch.searchsorted(cu_seqlens, torch.arange(q.shape[0]), right=True)
    heads = (x.transpose(0, 1) for x in (q, k, v))
    mask = of_sequence[:, None] == of_sequence
    return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(0, 1)


@pytest.fixture
def small(monkeypatch):
    """The suite with small models on the CPU, and torch.compile switched off."""

    def stand_in(kind):
        return masked_attention if kind == "varlen_attn" else pytest.skip("no flash-attn")

    changes = dict(
        DEVICE=torch.device("cpu"), DTYPE=torch.float32, MODELS=TINY, VOCAB=99, TOKENS=1024,
        MATMUL=8, COPIED=64, N_HEADS=2, N_TRAINED=4,
    )  # fmt: skip
    monkeypatch.setattr(bench_text, "N_TEXTS", 16)
    monkeypatch.setattr(bench_text, "N_CANDIDATES", 4)
    monkeypatch.setattr(report, "TEXT", report.TEXT.replace("16384", "16"))
    for name, value in changes.items():
        monkeypatch.setattr(bench_gpu, name, value)
    monkeypatch.setitem(bench_gpu.COMPILE, "disable", True)
    for module in (bench_gpu, gpu_peers):
        monkeypatch.setattr(module, "variable_length", stand_in)
    caches = (bench_gpu.weights, bench_gpu.workload, bench_gpu.usual_norms, bench_text.folder)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def cases(function):
    """What pytest would call it with."""
    marks = [mark for mark in function.pytestmark if mark.name == "parametrize"]
    names = [re.split(r",\s*", mark.args[0]) for mark in marks]
    for values in itertools.product(*(mark.args[1] for mark in marks)):
        arguments = {}
        for name, value in zip(names, values, strict=True):
            arguments |= dict(zip(name, value if len(name) > 1 else [value], strict=True))
        yield arguments


def made_up(runs):
    """A stopwatch that calls once: fastbert takes 10 ms, a step 1 GB, others double and 3 GB."""

    def timed(function, group, *, provider, alone=False, peak_memory=False, **facts):
        function()
        ours = provider == "fastbert"
        seconds = 0.011 if provider == bench_gpu.DROPOUT else 0.01 if ours else 0.02
        if peak_memory:
            facts["memory"] = 1e9 if ours else 3e9
        stats = dict.fromkeys(("median", "min", "max"), seconds) | {"rounds": 1}
        extra = {"provider": provider, **facts}
        runs.append({"group": group, "extra_info": extra, "stats": stats})

    return timed


def test_the_suite_fills_every_row_of_the_targets(small):
    runs = []
    timed = made_up(runs)
    bench_gpu.bench_ceiling_matmul(timed)
    bench_gpu.bench_ceiling_copy(timed)
    for function, wanted in (
        (bench_layer_norm.bench_layer_norm, {"hidden": 1024}),
        (bench_gpu.bench_attention_kernel, {}),
        (bench_gpu.bench_inference, {}),
        (bench_gpu.bench_latency, {}),
        (bench_gpu.bench_training, {}),
        (bench_gpu.bench_fill, {"model": "MiniLM-L6-H384", "fill": 0.2}),
        (bench_gpu.bench_length, {"model": "MiniLM-L6-H384", "length": 2048}),
        (bench_gpu.bench_batch, {"model": "MiniLM-L6-H384", "n_seqs": 8}),
        (bench_text.bench_embedding, {"model": "MiniLM-L6-H384"}),
        (bench_text.bench_ranking, {"model": "BERT-base"}),
    ):
        for arguments in cases(function):
            if wanted.items() <= arguments.items():
                try:
                    function(timed, **arguments)
                except pytest.skip.Exception:
                    continue
    results = report.rows({"benchmarks": runs}, on_gpu=True)
    text = report.targets(results)
    assert "not measured" not in text, text
    lines = text.splitlines()[2:]
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip(" |") for line in lines}
    assert cells[f"{report.ATTEND_512}, vs varlen_attn"] == "2.00x"
    assert cells["attention dropout's extra cost, lengths of 512, both ways, at most"] == "10%"
    assert cells["BERT-base, 1 x 128, latency, at most"] == "10.00 ms"
    assert re.search(r"peak memory .* \| 33% \|", text)
    for row in results:
        if row["group"].startswith("BERT") and "Cross" not in row["group"]:
            assert 0 <= row["padding"] < 1 and row["tokens"] > 0 and row["share"] > 0


# By hand: 24 L H^2 + 4 L s H a token, in the numbers 188.7, 654 and 26 million.
@pytest.mark.parametrize(
    "model, a_token",
    [
        ("BERT-base", 24 * 12 * 768**2 + 4 * 12 * 512 * 768),
        ("BERT-large", 654_311_424),
        ("MiniLM-L6-H384", 25_952_256),
    ],
)
def test_flops_of_a_forward(model, a_token):
    config = bench_gpu.MODELS[model]
    assert bench_gpu.forward_flops(config, [512, 512]) == 1024 * a_token
    # Attention is quadratic, the rest is not.
    more = bench_gpu.forward_flops(config, [1024]) - bench_gpu.forward_flops(config, [512, 512])
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    assert more == 4 * layers * hidden * (1024**2 - 2 * 512**2)


def test_flops_of_attention_are_those_that_are_counted():
    counter = FlopCounterMode(display=False)
    lengths, heads, dim = [7, 3], 2, 16
    q, k, v = (torch.randn(10, heads, dim, requires_grad=True) for _ in range(3))
    forward = bench_gpu.attention_flops(lengths, heads, dim)
    with counter:
        for a, b in ((0, 7), (7, 10)):
            scores = torch.einsum("qhd,khd->hqk", q[a:b], k[a:b])
            torch.einsum("hqk,khd->qhd", scores, v[a:b])
    assert counter.get_total_flops() == forward == (7 * 7 + 3 * 3) * 4 * heads * dim
    # The scores once more, and two products for each of the forward's two.
    assert bench_gpu.attention_flops(lengths, heads, dim, backward=True) == 2.5 * forward


@pytest.mark.parametrize("fill", [0.2, 0.4, 0.6, 1.0])
def test_lengths_fill_what_they_should(fill):
    lengths = bench_gpu.spread(round(128 / fill), 512, fill)
    assert max(lengths) == 512 and min(lengths) >= 1
    assert sum(lengths) / (512 * len(lengths)) == pytest.approx(fill, rel=0.01)
    assert fill == 1 or sorted(lengths) != lengths  # many batches come unsorted


TINIEST = {**bench_gpu.shape(2, 64, 4), "vocab_size": 99, "max_position_embeddings": 40}


def random_state():
    """Weights whose biases and norms are not left at zero and one."""
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**TINIEST), add_pooling_layer=False)
    return {name: x + 0.1 * torch.randn_like(x) for name, x in model.state_dict().items()}


# Compiled in one graph, as on a GPU; what its kernels would be is another matter.
@pytest.mark.parametrize("compiled", [None, {"backend": "eager", "fullgraph": True}])
def test_the_packed_peer_is_the_padded_model(compiled):
    state = random_state()
    batch = gpu_peers.Batch.of([3, 40, 1, 17], "cpu", 99)
    packed = gpu_peers.load_transformers(TINIEST, state, "cpu", "test", masked_attention, compiled)
    padded = gpu_peers.load(gpu_peers.EAGER, TINIEST, state, "cpu")
    dreal = torch.randn(batch.n_tokens, 64)
    grads = []
    for provider in (packed, padded):
        out = provider.run(batch)
        assert (out.dim() == 2) is provider.is_packed
        torch.autograd.backward(out, provider.as_given(dreal, batch))
        grads.append((provider.real(out, batch), dict(provider.model.named_parameters())))
    (out, ours), (wanted, theirs) = grads
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    for name, p in theirs.items():
        torch.testing.assert_close(ours[name].grad, p.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_what_computes_something_else_is_not_timed(small, monkeypatch):
    monkeypatch.setattr(gpu_peers, "variable_length", lambda kind: lambda q, k, v, *_: q + k + v)
    with pytest.raises(AssertionError, match="packed varlen_attn"):
        bench_gpu.bench_inference(made_up([]), "MiniLM-L6-H384", 1.0, "packed varlen_attn")
    with pytest.raises(AssertionError, match=r"query\.weight"):
        bench_gpu.bench_training(made_up([]), "BERT-large", 1.0, "packed varlen_attn")


def run_of(group, *providers, **extra):
    """pytest-benchmark's JSON of one group: (provider, seconds)."""
    made = [
        {
            "group": group,
            "extra_info": {"provider": provider, **extra},
            "stats": {"median": seconds, "min": seconds, "max": seconds, "rounds": 5},
        }
        for provider, seconds in providers
    ]
    return {"benchmarks": made}


def test_shares_and_ratios():
    ceilings = run_of("ceilings", ("8192^3 matmul", 0.5), flops=400.0)["benchmarks"]
    ceilings += run_of("ceilings", ("large copy", 0.5), bytes=40.0)["benchmarks"]
    # A round of ten calls.
    norm = run_of("norm", ("fastbert", 1.0), ("torch", 3.0), bytes=60.0, calls=10)["benchmarks"]
    model = run_of("model", ("fastbert", 2.0), flops=800.0, tokens=6)["benchmarks"]
    rows = report.rows({"benchmarks": ceilings + norm + model}, on_gpu=True)
    by_name = {(row["group"], row["provider"]): row for row in rows}
    assert by_name["norm", "fastbert"]["median_s"] == 0.1
    assert by_name["norm", "fastbert"]["share"] == 60 / 80
    assert by_name["norm", "torch"]["gain"] == pytest.approx(3)
    assert by_name["norm", "torch"]["share"] == 20 / 80
    assert by_name["model", "fastbert"]["share"] == 400 / 800
    assert by_name["model", "fastbert"]["tokens_per_s"] == 3
    text = report.table(rows)
    assert "| torch |" in text and "| 25% | 3.00 |" in text
    # On a CPU nothing of this is there.
    row = report.rows({"benchmarks": norm})[0]
    assert "share" not in row and "gain" not in row


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU for the report, and a folder of results."""
    where = {"gpu": "NVIDIA H200", "driver": "1.2", "date": "2026-01-01"}
    monkeypatch.setattr(report, "machine", lambda: dict(where))
    monkeypatch.setenv("RESULTS", str(tmp_path / "results"))
    return where


def test_parts_go_to_one_file(gpu, tmp_path, capsys):
    readme = (BENCHMARKS / "README.md").read_text()
    first, again = tmp_path / "first.json", tmp_path / "again.json"
    runs = run_of("a", ("fastbert", 1.0), ("torch", 2.0))["benchmarks"]
    first.write_text(
        json.dumps({"benchmarks": runs + run_of("b", ("fastbert", 1.0))["benchmarks"]})
    )
    again.write_text(json.dumps(run_of("a", ("fastbert", 3.0))))
    report.main(first)
    gpu.update(date="2026-01-02")
    report.main(again)
    out = tmp_path / "results/nvidia-h200.json"
    saved = json.loads(out.read_text())
    assert saved["machine"]["date"] == "2026-01-01 / 2026-01-02"
    assert saved["machine"]["gpu"] == "NVIDIA H200"
    rows = {(row["group"], row["provider"]): row["median_s"] for row in saved["results"]}
    assert rows == {("b", "fastbert"): 1.0, ("a", "fastbert"): 3.0}  # the old group is gone whole
    report.main(out)  # as brought back from another machine: changes nothing
    assert json.loads(out.read_text()) == saved
    assert (BENCHMARKS / "README.md").read_text() == readme
    assert "| fastbert |" in capsys.readouterr().out


def test_readme_is_what_report_makes_of_the_results():
    saved = [json.loads(file.read_text()) for file in sorted(BENCHMARKS.glob("results/*.json"))]
    text = (BENCHMARKS / "README.md").read_text()
    cpus, gpus = report.tables(saved)
    n_gpus = sum(s["machine"]["gpu"] is not None for s in saved)
    counts = [tables.count("Measured on: ") for tables in (cpus, gpus)]
    assert counts == [len(saved) - n_gpus, n_gpus] and counts[0] > 0
    assert report.between(report.between(text, report.MARKS, cpus), report.GPU_MARKS, gpus) == text
    first = (BENCHMARKS.parent / "README.md").read_text()
    assert report.between(first, report.FIRST_MARKS, report.first_page(saved)) == first
    for where, marks in (
        (text, report.MARKS), (text, report.GPU_MARKS), (first, report.FIRST_MARKS)
    ):  # fmt: skip
        assert where.count(marks.format("Start")) == where.count(marks.format("End")) == 1


def test_pictures_and_the_first_page(tmp_path):
    """What a GPU's results are shown as, of made-up ones."""
    group = f"{report.BASE}, {report.MIXED}"
    runs = run_of(group, ("fastbert", 0.5), ("transformers sdpa", 1.5), tokens=100, padding=0.6)
    runs = runs["benchmarks"] + run_of("BERT-base, forward, lengths of 64", ("fastbert", 1.0),
                                       tokens=100)["benchmarks"]  # fmt: skip
    results = report.rows({"benchmarks": runs}, on_gpu=True)
    where = dict.fromkeys(("torch", "triton", "transformers", "date"), "1")
    saved = {"machine": {**where, "gpu": "NVIDIA H200"}, "results": results}
    page = report.first_page([{**saved, "machine": {"gpu": None}}, saved])
    assert f"| {group} | 60% | **200** | 3.00x |" in page and page.count("| BERT") == 1
    fills = {"BERT-base": {"0.4": {"fastbert": 200.0, "transformers sdpa": 100 / 1.5}}}
    assert charts.families(results)["fills"] == fills
    names = charts.draw(results, "nvidia-h200", tmp_path)
    assert names == ["nvidia-h200-fills.png", "nvidia-h200-lengths.png"]
    for name in names:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"](results/{name})" in report.measured(saved)


def test_every_benchmark_is_in_one_part_of_the_suite():
    words = re.findall(r'measure \w+ "(bench_[\w ]+)"', (BENCHMARKS / "gpu.sh").read_text())
    chosen = sorted(name for part in words for name in part.split(" or "))
    elsewhere = ["bench_drop_in", "bench_embedding", "bench_fp8", "bench_ranking"]
    assert chosen == sorted(
        elsewhere
        + [
            name
            for name in vars(bench_gpu)
            if name.startswith("bench_") and not name.startswith("bench_ceiling")
        ]
    )


def test_every_part_runs_files_that_are_there(tmp_path):
    """gpu.sh with something in Python's place that says yes to everything."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$SWEEP_SECONDS $@" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    command = ["bash", str(BENCHMARKS / "gpu.sh")]
    env = {**os.environ, "PYTHON": str(python), "RESULTS": str(tmp_path / "results")}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text()
    files = set(re.findall(r"(?:benchmarks|tests)/[\w/]+(?:\.py)?", calls))
    assert len(files) > 20 and all((BENCHMARKS.parent / file).exists() for file in files)
    sweeps = {str(file.relative_to(BENCHMARKS.parent)) for file in BENCHMARKS.glob("sweep_*.py")}
    assert sweeps <= files and "450 benchmarks/sweep_attention.py" in calls
    unknown = subprocess.run([*command, "nothing"], env=env, capture_output=True, text=True)
    assert unknown.returncode == 1 and "no part nothing" in unknown.stderr


@pytest.mark.parametrize("trains", [False, True])
def test_profile(small, monkeypatch, trains):
    monkeypatch.setattr(profile_gpu, "pace", lambda step: (step(), 1.0)[1])
    text, facts = profile_gpu.profiled("MiniLM-L6-H384", trains, 1e12, 1e11)
    by_kind = {kind: (seconds, floor) for kind, seconds, floor, _ in facts["kinds"]}
    config, lengths = bench_gpu.MODELS["MiniLM-L6-H384"], [512, 512]
    assert by_kind["products"][0] > 0 and "products" in text and "aten::" in text
    floors = profile_gpu.floors(config, lengths, 10, 1e12, 1e11, trains)
    least = floors["products"] + floors["attention"] / (3.5 / 3 if trains else 1)
    flops = bench_gpu.forward_flops(config, lengths) * (3 if trains else 1)
    assert least == pytest.approx(flops / 1e12)
    assert (floors["optimizer"] > 0) is trains


def test_gaps_come_in_the_order_of_what_is_won():
    kernels = {
        "_attention_short_fwd_kernel": 2.0,
        "sm90_xmma_gemm_bf16bf16_bf16f32": 5.0,
        "nvjet_tst_128x256_64x4": 1.0,
        "_layer_norm_fwd_kernel": 1.0,
        "void at::native::vectorized_elementwise_kernel": 0.5,
    }
    seconds_of = {}
    for name, seconds in kernels.items():
        seconds_of[profile_gpu.kind_of(name)] = (
            seconds_of.get(profile_gpu.kind_of(name), 0) + seconds
        )
    assert profile_gpu.kind_of("_linear_gelu_fwd_kernel") == "products"
    assert profile_gpu.kind_of("_bias_gelu_bwd_kernel") == "activation"
    assert seconds_of["products"] == 6 and seconds_of["copies and the rest"] == 0.5
    rows = profile_gpu.gaps(seconds_of, {"products": 4.0, "attention": 0.5}, 10.0)
    assert rows[0] == ("products", 6.0, 4.0, 10 / 8) and rows[1][0] == "attention"
    assert (profile_gpu.IDLE, 0.5, 0.0, 10 / 9.5) in rows


def test_fp8(small, monkeypatch):
    """Quantised for real; the product of rows and scales by its formula."""

    def scaled(a, b, a_scale, b_scale, out_dtype, use_fast_accum):
        assert a_scale.shape == (len(a), 1) and b_scale.shape == (1, b.shape[1])
        return ((a.float() * a_scale) @ (b.float() * b_scale)).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled)
    runs = []
    for provider in bench_fp8.PROVIDERS:
        bench_fp8.bench_fp8(made_up(runs), "BERT-base", 64, provider)
    assert [run["extra_info"]["error"] > 0.01 for run in runs] == [False, True, True]
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: 0.9 * scaled(*args, **kwargs))
    with pytest.raises(AssertionError):
        bench_fp8.bench_fp8(made_up([]), "BERT-base", 64, "FP8, products alone")


def test_training_as_users_run_it(small, tmp_path, monkeypatch):
    for folder in ("corpus", "sst2"):
        (tmp_path / folder).mkdir()
    novels = "".join(f"{a} and {b} went on .\n" for a in "abcdef" for b in "uvwxyz") + "\n"
    with gzip.open(tmp_path / "corpus/en_novels.txt.gz", "wt") as file:
        file.write(novels * 40)
    (pretrained,) = measure_training.pretraining(
        tmp_path, 0.01, size="tiny", batch_tokens=512, device="cpu", quiet=True
    )
    extra = pretrained["extra_info"]
    assert extra["tokens"] > 0 and extra["flops"] > 0 and pretrained["stats"]["median"] > 0
    rows = [
        "sentence\tlabel",
        *(f"{'good' if i % 2 else 'bad'} film{' !' * (i % 3)}\t{i % 2}" for i in range(64)),
    ]
    (tmp_path / "sst2/dev.tsv").write_text("\n".join(rows))
    with gzip.open(tmp_path / "sst2/train.tsv.gz", "wt") as file:
        file.write("\n".join(rows) + "\n")
    monkeypatch.setattr(fine_tuning, "DATA", tmp_path)
    monkeypatch.setenv("MODEL", bench_text.folder("MiniLM-L6-H384", "encoder").name)
    found = measure_training.finetuning("cpu")
    made = report.rows({"benchmarks": [pretrained, *found]}, on_gpu=True)
    assert [row["provider"] for row in made[1:]] == ["fastbert", "transformers Trainer"]
    assert all(0 <= row["accuracy"] <= 1 and row["gain"] > 0 for row in made[1:])
    assert all(0 < row["padding"] < 1 for row in made[1:])
    assert "accuracy" in report.table(made)


def test_stopwatch_plans_rounds():
    assert stopwatch.plan(20e-6) == (500, 100)  # 500 launches to one wait, a second in all
    assert stopwatch.plan(20e-6, alone=True) == (1, 200)
    assert stopwatch.plan(0.1) == (1, 10) and stopwatch.plan(3.0) == (1, 5)
    calls = []
    assert 0 < stopwatch.pace(lambda: calls.append(0), seconds=0.01) < 0.01 and len(calls) > 2
