"""What a forward and a training step cost the host, without a GPU: `python measure_host.py`.

Kernels are bound and launched as on a GPU, but do nothing (tests/support/compiling_gpu.py), and
products are so small that they take next to no time: what is left is Python, torch and Triton,
which a GPU waits for where there are few tokens and no CUDA graph. 12 layers, best of many.
"""

import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests/support"))

import compiling_gpu
import torch
import transformers

import fastbert

SIZES = dict(
    vocab_size=99, hidden_size=128, num_hidden_layers=12, num_attention_heads=2,
    intermediate_size=128, max_position_embeddings=128,
)  # fmt: skip


def fastest(function, n=60):
    """Microseconds."""
    times = []
    for _ in range(n):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e6 * min(times)


def main():
    compiling_gpu.pretend()
    torch.set_num_threads(1)
    theirs, accelerated = (
        transformers.BertModel(transformers.BertConfig(**SIZES, attn_implementation="sdpa"))
        for _ in range(2)
    )
    fastbert.accelerate(accelerated)
    ours = fastbert.BertModel(fastbert.BertConfig(**SIZES), cuda_graphs=False)
    ids = torch.randint(1, 99, (1, 16))
    packed = fastbert.pack(ids, torch.ones_like(ids))
    ways = {
        "fastbert": lambda: ours(packed),
        "accelerated": lambda: accelerated(ids, attention_mask=torch.ones_like(ids)),
        "transformers sdpa": lambda: theirs(ids, attention_mask=torch.ones_like(ids)),
    }
    for model in (ours, theirs, accelerated):
        model.eval()
    for name, run in ways.items():
        print(f"forward        {name:18} {fastest(torch.inference_mode()(run)):8.0f} us")
    for model in (ours, theirs, accelerated):
        model.train()
    for name, run in ways.items():
        took = fastest(lambda run=run: run().last_hidden_state.sum().backward())
        print(f"with backward  {name:18} {took:8.0f} us")


if __name__ == "__main__":
    main()
