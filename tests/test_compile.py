"""The whole model, traced: its kernels are operations that torch sees through."""

import pytest
import torch

from fastbert import BertConfig, BertModel, PackedBatch, pack

CONFIG = BertConfig(
    vocab_size=50, hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
    intermediate_size=64,
)  # fmt: skip


@pytest.fixture(params=["kernels", "plain torch"])
def model(request, device, monkeypatch):
    if request.param == "kernels":
        monkeypatch.undo()  # what keeps kernels to their own tests
    elif device.type == "cuda":
        monkeypatch.setattr("fastbert.kernels._triton.why_not", lambda device: "not in this test")
    return BertModel(CONFIG).to(device).eval()


def batch(device, *lengths):
    ids = torch.randint(0, 50, (len(lengths), max(lengths)))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return pack(ids, mask.long()).to(device)


def outputs(model, packed):
    out = model(packed)
    return out.last_hidden_state, out.pooler_output


def test_compiles_whole_and_trains(model, device):
    packed = batch(device, 9, 4, 1)
    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")
    parameters = [p for p in model.parameters() if p.requires_grad]
    results = []
    for function in (outputs, compiled):
        out, pooled = function(model, packed)
        results.append(torch.autograd.grad(out.square().sum() + pooled.sum(), parameters))
    largest = max(gradient.abs().max() for gradient in results[0])
    for wanted, found in zip(*results, strict=True):  # keys' biases have none but rounding
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6 * float(largest))


def test_another_batch_needs_no_other_graph(model, device):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(outputs, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for lengths in ((9, 4, 1), (3, 8, 2, 7), (5, 5), (6, 1, 3, 9, 2), (7, 11)):
            packed = batch(device, *lengths)
            torch.testing.assert_close(compiled(model, packed), outputs(model, packed))
    assert counter.frame_count <= 3  # of one sequence, or few, and of any number


def test_exports(model, device):
    class Vectors(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, token_type_ids, position_ids, cu_seqlens):
            packed = PackedBatch.unchecked(input_ids, token_type_ids, position_ids, cu_seqlens, 16)
            return self.model(packed).last_hidden_state

    def tensors(*lengths):
        packed = batch(device, *lengths)
        return packed.input_ids, packed.token_type_ids, packed.position_ids, packed.cu_seqlens

    n_tokens, n_bounds = torch.export.Dim("n_tokens", min=2), torch.export.Dim("n_bounds", min=3)
    shapes = {0: n_tokens}, {0: n_tokens}, {0: n_tokens}, {0: n_bounds}
    module = Vectors().eval()
    with torch.no_grad():
        program = torch.export.export(module, tensors(9, 4, 1), dynamic_shapes=shapes)
        for lengths in ((9, 4, 1), (16, 2), (3, 3, 3, 3)):
            args = tensors(*lengths)
            torch.testing.assert_close(program.module()(*args), module(*args))
