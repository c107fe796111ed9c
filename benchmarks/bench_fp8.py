"""Is FP8 worth having? A layer's products with e4m3 rows, by torch._scaled_mm, against bfloat16.

Weights are quantised before the clock starts, rows of the input inside of it. Nothing of fastbert
uses this: it is worth a try from 1.25 times bfloat16 on.
"""

import bench_gpu
import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

E4M3 = torch.float8_e4m3fn
PROVIDERS = ("fastbert", "FP8, with quantising", "FP8, products alone")


def quantised(x):
    """Rows of x as e4m3, and what they are to be multiplied by, (n_rows, 1) float32."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(E4M3).max
    return (x.float() / scale).to(E4M3), scale


def product(x, weight):
    """x @ weight.T of two pairs as `quantised` gives them."""
    (rows, scale), (columns, column_scale) = x, weight
    return torch._scaled_mm(
        rows, columns.T, scale, column_scale.T, out_dtype=bench_gpu.DTYPE, use_fast_accum=True
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("n_tokens", [16384, 65536])
@pytest.mark.parametrize("model", ["BERT-base", "BERT-large"])
def bench_fp8(timed, model, n_tokens, provider):
    if bench_gpu.DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no FP8")
    hidden = bench_gpu.MODELS[model]["hidden_size"]
    torch.manual_seed(0)
    where = {"device": bench_gpu.DEVICE, "dtype": bench_gpu.DTYPE}
    pairs = [  # of one layer: query, key and value; the mixed; up; down
        [
            torch.randn(n_tokens, n_in * hidden, **where),
            torch.randn(n_out * hidden, n_in * hidden, **where) / hidden**0.5,
        ]
        for n_in, n_out in ((1, 3), (1, 1), (1, 4), (4, 1))
    ]
    quantise = torch.compile(quantised, dynamic=False, **bench_gpu.COMPILE)
    weights = [quantise(weight) for _, weight in pairs]
    inputs = [quantise(x) for x, _ in pairs]

    def run():
        if provider == "fastbert":
            return [x @ weight.T for x, weight in pairs]
        if provider == "FP8, products alone":
            return [product(*pair) for pair in zip(inputs, weights, strict=True)]
        return [product(quantise(x), w) for (x, _), w in zip(pairs, weights, strict=True)]

    x, weight = (tensor[:256].double() for tensor in pairs[0])
    error = bench_gpu.relative_error(run()[0][:256, :256], (x @ weight.T).cpu())
    assert error < 0.06, error  # three bits behind the point, both sides
    timed(
        run,
        f"{model}, products of a layer, {n_tokens} tokens",
        provider=provider,
        tokens=n_tokens,
        flops=sum(2 * x.shape[0] * weight.numel() for x, weight in pairs),
        error=error,
    )
