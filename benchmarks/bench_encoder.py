"""Token ids to token vectors on a CPU, against everything else that does it."""

import numpy as np
import pytest
import torch
from peers import PEERS, as_array, load_transformers, minilm_folder

from fastbert.kernels.linear import native_bfloat16


def lognormal(n, mean, longest=256, sigma=1.0):
    """Lengths of texts as they come, many short, few long: n quantiles, in random order."""
    points = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(n) + 0.5) / n)
    lengths = (np.log(mean) - sigma**2 / 2 + sigma * points).exp().round().clamp(3, longest)
    return lengths[torch.randperm(n, generator=torch.Generator().manual_seed(0))].int().tolist()


# name: (model, lengths of the sequences, sequences a batch)
WORKLOADS = {
    "MiniLM-L6, 512 mixed, batches of 32": ("minilm", lognormal(512, 40), 32),
    "MiniLM-L6, 8 x 128": ("minilm", [128] * 8, 8),
    "MiniLM-L6, 1 x 128": ("minilm", [128], 1),
    "MiniLM-L6, 1 x 16": ("minilm", [16], 1),
    "BERT-base, 16 mixed": ("base", lognormal(16, 60), 16),
    "BERT-base, 8 x 128": ("base", [128] * 8, 8),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    from fastbert import BertConfig, BertModel, BertTokenizer

    base = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = BertConfig()
    BertModel(config).save_pretrained(base)
    BertTokenizer.from_pretrained(minilm_folder()).save_pretrained(base)
    return {"minilm": minilm_folder(), "base": base}


def batches(lengths, size):
    generator = torch.Generator().manual_seed(0)
    for i in range(0, len(lengths), size):
        part = torch.tensor(lengths[i : i + size])
        mask = (torch.arange(int(part.max())) < part[:, None]).long()
        yield torch.randint(1000, 30000, mask.shape, generator=generator) * mask, mask


@pytest.mark.parametrize("provider", PEERS)
@pytest.mark.parametrize("workload", WORKLOADS)  # varies slowest: providers next to each other
def bench_encoder(timed, folders, provider, workload):
    if provider == "transformers sdpa bfloat16" and not native_bfloat16():
        pytest.skip("this CPU emulates bfloat16, which takes transformers minutes a round")
    name, lengths, size = WORKLOADS[workload]
    run, made = PEERS[provider](folders[name]), list(batches(lengths, size))
    wanted = as_array(load_transformers(folders[name])(*made[0]))
    real = made[0][1].bool().numpy()
    error = np.abs(as_array(run(*made[0])) - wanted)[real].max() / np.abs(wanted[real]).max()
    assert error < (5e-2 if "bfloat16" in provider else 2e-5), error

    padded = sum(mask.numel() for _, mask in made)
    repeats = max(1, 2000 // padded)  # short calls: several to a measurement
    timed(
        lambda: [run(*batch) for _ in range(repeats) for batch in made],
        workload,
        provider=provider,
        rounds=3 if padded > 50_000 else 9,
        tokens=sum(lengths) * repeats,
        padding=1 - sum(lengths) / padded,
        error=float(error),
    )
