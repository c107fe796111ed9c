"""Where the time of a forward and of a training step goes: `profile_gpu.py [MODEL...]` on a GPU.

Kernels by kind, beside the least time that the measured ceilings allow for it, the most to be won
first: what the step would gain if that kind ran at its floor. Kept in RESULTS/profiles/<gpu>.json.
"""

import re
import sys

import bench_gpu
import report
import torch
from gpu_peers import Batch, load
from stopwatch import pace
from torch.profiler import ProfilerActivity, profile

N_STEPS = 3
FILL = 0.4
# The first that a kernel's name has.
KINDS = {
    "attention": "_attention_",
    "layer norm": "layer_norm",
    "activation": "(?<!linear_)gelu",
    "embeddings": "_embed|[sS]ort|[rR]adix",
    "optimizer": "[aA]dam|multi_tensor",
    "products": "gemm|nvjet|cutlass|xmma|cublas|splitK|linear|aten::(add)?mm",
    "copies and the rest": "",
}
IDLE = "nothing runs"


def kind_of(kernel):
    return next(kind for kind, words in KINDS.items() if re.search(words, kernel))


def floors(config, lengths, n_parameters, matmul, copy, trains):
    """Least seconds of each kind, by FLOP/s of the matmul and bytes/s of the copy."""
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    heads = config["num_attention_heads"]
    attention = layers * bench_gpu.attention_flops(lengths, heads, hidden // heads)
    products = bench_gpu.forward_flops(config, lengths) - attention
    row = sum(lengths) * hidden * bench_gpu.DTYPE.itemsize  # bytes of (n_tokens, hidden)
    return {
        "attention": attention * (3.5 if trains else 1) / matmul,
        "products": products * (3 if trains else 1) / matmul,
        "layer norm": 2 * layers * row * (8 if trains else 3) / copy,
        "activation": layers * 4 * row * (5 if trains else 2) / copy,
        "embeddings": row * (4 if trains else 2) / copy,
        "optimizer": 7 * n_parameters * bench_gpu.DTYPE.itemsize / copy if trains else 0.0,
    }


def gaps(seconds_of, floor, whole):
    """[(kind, seconds, floor, how many times faster all is at the floor)], the most first."""
    rows = [(IDLE, max(0.0, whole - sum(seconds_of.values())), 0.0)]
    rows += [(kind, seconds, floor.get(kind, 0.0)) for kind, seconds in seconds_of.items()]
    rows.sort(key=lambda row: row[2] - row[1])
    return [(*row, whole / (whole - max(0.0, row[1] - row[2]))) for row in rows]


def kernels_of(step):
    """Seconds of each kernel a step."""
    on_gpu = bench_gpu.DEVICE.type == "cuda"
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with profile(activities=activities) as profiled:
        for _ in range(N_STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    # The optimizer's step, for one, has a name on the GPU beside its kernels'.
    found = [e for e in profiled.key_averages() if not getattr(e, "is_user_annotation", False)]
    return {e.key: getattr(e, name) / 1e6 / N_STEPS for e in found if getattr(e, name) > 0}


def ceilings():
    """FLOP/s of the large product and bytes/s of the large copy."""
    rates = {}

    def timed(function, group, *, provider, **facts):
        ((what, amount),) = facts.items()
        rates[what] = amount / pace(function)

    bench_gpu.bench_ceiling_matmul(timed)
    bench_gpu.bench_ceiling_copy(timed)
    return rates["flops"], rates["bytes"]


def profiled(model, trains, matmul, copy):
    """The report of one step, as text and as what goes to the file."""
    n_seqs = bench_gpu.N_TRAINED if trains else round(bench_gpu.TOKENS / bench_gpu.LONGEST / FILL)
    lengths = bench_gpu.spread(max(1, n_seqs), bench_gpu.LONGEST, FILL)
    config, state = bench_gpu.weights(model, bench_gpu.LONGEST)
    batch = Batch.of(lengths, bench_gpu.DEVICE, config["vocab_size"])
    made = load("fastbert", config, state, bench_gpu.DEVICE)
    made.model.train(trains)
    if trains:
        step = bench_gpu.training_step(made, batch, torch.randn_like(made.run(batch)))
    else:
        step = torch.inference_mode()(lambda: made.run(batch))
    whole, kernels, seconds_of = pace(step), kernels_of(step), {}
    for name, seconds in kernels.items():
        seconds_of[kind_of(name)] = seconds_of.get(kind_of(name), 0.0) + seconds
    n_parameters = sum(p.numel() for p in made.model.parameters())
    floor = floors(config, lengths, n_parameters, matmul, copy, trains)
    rows = gaps(seconds_of, floor, whole)
    title = f"{model}, {'training step' if trains else 'forward'}, {sum(lengths)} tokens"
    text = f"\n{title}: {1e3 * whole:.3f} ms, floor {1e3 * sum(floor.values()):.3f} ms\n"
    for kind, seconds, least, gain in rows:
        text += f"  {kind:20} {1e3 * seconds:9.3f} ms, floor {1e3 * least:9.3f}: {gain:.2f}x\n"
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:40]
    for name, seconds in longest[:12]:
        text += f"    {1e3 * seconds:9.3f} ms  {name[:100]}\n"
    return text, {"title": title, "seconds": whole, "kinds": rows, "kernels": longest}


def main(models):
    if not torch.cuda.is_available() and bench_gpu.DEVICE.type == "cuda":
        sys.exit("profile_gpu.py: there is no GPU")
    matmul, copy = ceilings()
    print(f"ceilings: {matmul / 1e12:.0f} TFLOP/s, {copy / 1e12:.2f} TB/s")
    found = {"matmul": matmul, "copy": copy, "steps": []}
    for model in models:
        for trains in (False, True):
            text, facts = profiled(model, trains, matmul, copy)
            print(text, flush=True)
            found["steps"].append(facts)
    report.keep("profiles", "forward and training step", found)


if __name__ == "__main__":
    main(sys.argv[1:] or ["BERT-base", "BERT-large", "MiniLM-L6-H384"])
