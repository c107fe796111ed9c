"""Inference on a GPU as CUDA graphs: all the kernels of a forward launched in one call.

With few tokens the GPU is done sooner than Python has launched the next kernel. A graph is recorded
for one shape, so a batch is filled up to one of few shapes. As with the prepacked plans of a CPU, a
graph is used only where nothing can tell the difference.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert.inputs import EncoderInputs
from fastbert.kernels._triton import allows_tf32, failures, next_power_of_2, on_kernel_device
from fastbert.kernels.attention import HEAD_DIMS
from fastbert.layers import BertSelfAttention
from fastbert.watch import Watch, any_global_hooks

# Not measured yet: where a GPU works longer than launching takes; how many shapes a service has.
MOST_TOKENS = 4096
_MOST_GRAPHS = 64
# A capture takes as long as some hundred forwards. So a shape must be met twice first, and twice as
# often as before after each change of weights, which makes graphs worthless. Where there are too
# many shapes, one gives way when it has not been met in so many forwards.
_MOST_PATIENCE = 1024
_IDLE = 100 * _MOST_GRAPHS

Outputs = tuple[Tensor, Tensor | None]  # last_hidden_state, pooler_output


class Bucket(NamedTuple):
    """The shape of a graph: tokens, sequences beside those that fill up, length of the longest."""

    n_tokens: int
    n_seqs: int
    max_seqlen: int

    @classmethod
    def of(cls, n_tokens: int, n_seqs: int, max_seqlen: int) -> Bucket:
        """The smallest that a batch fits: at most a fifth, or 31, of its tokens fill it up."""
        step = _step(n_tokens)
        return cls(
            -(-n_tokens // step) * step,
            4 ** -(-(n_seqs - 1).bit_length() // 2),  # empty ones cost next to nothing
            max(32, next_power_of_2(max_seqlen)),
        )

    @property
    def most_fillers(self) -> int:
        """Sequences that tokens which fill up can take, none of which is over max_seqlen."""
        return -(-(_step(self.n_tokens) - 1) // self.max_seqlen)


def _step(n_tokens: int) -> int:
    """Quarters between powers of two, from 128 on."""
    return max(32, next_power_of_2(n_tokens) // 8)


class _Graph:
    """A forward of one shape that reads and writes always the same memory."""

    def __init__(self, bucket: Bucket, device: torch.device) -> None:
        self.bucket = bucket
        self.last_run = 0
        n_seqs = bucket.n_seqs + bucket.most_fillers
        self.ids = torch.zeros(3, bucket.n_tokens, dtype=torch.int64, device=device)
        self.cu_seqlens = torch.zeros(n_seqs + 1, dtype=torch.int32, device=device)
        self.outputs: Outputs
        self.replay: Callable[[], None]

    def load(self, inputs: EncoderInputs, ids: Tensor) -> None:
        """Copy a batch in. What other batches have left behind it makes sequences of its own."""
        n_tokens, n_bounds = ids.numel(), inputs.cu_seqlens.numel()
        given = [ids, inputs.token_type_ids, inputs.position_ids]
        torch._foreach_copy_(list(self.ids[:, :n_tokens].unbind()), given)
        self.cu_seqlens[:n_bounds].copy_(inputs.cu_seqlens)
        rest, step = self.cu_seqlens[n_bounds:], self.bucket.max_seqlen
        last = n_tokens + step * rest.numel()
        torch.arange(n_tokens + step, last + 1, step, out=rest).clamp_(max=self.bucket.n_tokens)

    def results(self, n_tokens: int, n_seqs: int) -> Outputs:
        x, pooled = self.outputs
        return x[:n_tokens].clone(), None if pooled is None else pooled[:n_seqs].clone()


class CudaCapture:
    """Graphs of one GPU that share memory, so that one at a time may run.

    The only part that tests without a GPU put another in place of.
    """

    _one_in_the_process = threading.Lock()  # as torch asks for

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()
            self._done = torch.cuda.Event()

    @staticmethod
    def takes(x: Tensor) -> bool:
        """Whether forwards on the device of `x` can be captured now."""
        return x.is_cuda and not torch.cuda.is_current_stream_capturing()

    @staticmethod
    def takes_weight(weight: Tensor) -> bool:
        return on_kernel_device(weight)

    def wait(self) -> None:
        """Until the GPU has read what graphs read."""
        self._done.synchronize()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """What is launched inside runs after the last turn, whatever stream that was on."""
        with torch.cuda.device(self._device):
            torch.cuda.current_stream().wait_event(self._done)
            try:
                yield
            finally:
                self._done.record()

    def record(
        self, function: Callable[..., Outputs], *inputs: Tensor
    ) -> tuple[Outputs, Callable[[], None]]:
        """What function(*inputs) returns, and what computes it anew from what `inputs` hold then.

        Raises RuntimeError where something in it cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        # The outer stream context puts the stream back where that of a failed capture does not.
        with self._one_in_the_process, torch.cuda.stream(self._stream):
            # Compiles kernels, and makes what is kept from one call to the next. With copies, so
            # that nothing that is kept for these addresses is found, and left out, when capturing.
            for _ in range(2):
                function(*(x.clone() for x in inputs))
            options: Any = {"stream": self._stream, "capture_error_mode": "thread_local"}
            try:
                with torch.cuda.graph(graph, self._pool, **options):
                    outputs = function(*inputs)
            except RuntimeError:
                # torch (2.11) still takes all for captured: no more random numbers, memory kept.
                with suppress(RuntimeError, AttributeError):  # torch before 2.8 has another name
                    torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)
                with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), **options):
                    inputs[0].clone()
                raise
        current.wait_stream(self._stream)
        return outputs, graph.replay


class Graphs:
    """The graphs of one model, made when needed.

    most_tokens: of a forward that may be a graph. True: where it pays. False, or 0: none is.
    Copies and pickles of it have no graphs yet.
    """

    def __init__(self, most_tokens: bool | int) -> None:
        if most_tokens is True:
            most_tokens = MOST_TOKENS
        if not isinstance(most_tokens, int) or most_tokens < 0:
            raise ValueError(
                f"cuda_graphs must be True, False or a number of tokens, got {most_tokens!r}"
            )
        self.most_tokens = int(most_tokens)
        self._lock = threading.Lock()
        self._patience = 2
        self._n_runs = 0
        self._met: Counter[tuple[Bucket, bool]] = Counter()  # a few thousand shapes at most
        self._graphs: OrderedDict[tuple[Bucket, bool], _Graph] = OrderedDict()
        self._capture: CudaCapture | None = None
        self._drop()

    def __reduce__(self) -> tuple[type[Graphs], tuple[int]]:
        return Graphs, (self.most_tokens,)

    def clear(self) -> None:
        """Give all graphs and their memory back, and what was kept of the weights."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        # A service that calls eval() each time has no graph to lose, and shall get to its first.
        if self._graphs:
            self._wait_longer()
        if self._capture is not None:
            self._capture.wait()  # a stream may use again what is freed here
        self._graphs.clear()
        self._watch: Watch | None = None
        self._device: torch.device | None = None
        self._plans: list[tuple[dict[str, Any], Any]] = []
        self._capture = None

    def _wait_longer(self) -> None:
        self._patience = min(2 * self._patience, _MOST_PATIENCE)
        self._met.clear()

    def run(self, model: Any, inputs: EncoderInputs) -> Outputs | None:
        """What `model._encode(inputs)` returns; None where no graph can be or should be used."""
        ids = inputs.input_ids
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or ids is None:
            return None
        n_tokens, n_seqs = ids.numel(), inputs.cu_seqlens.numel() - 1
        if (
            not 0 < n_tokens <= self.most_tokens
            or not 0 < n_seqs <= self.most_tokens
            or type(ids) is not Tensor
            or not CudaCapture.takes(ids)
            or torch.is_autocast_enabled(ids.device.type)
            or inputs.token_type_ids.device != ids.device
            or inputs.position_ids.device != ids.device
            or torch.jit.is_tracing()
            or torch._C._len_torch_dispatch_stack()  # those want to see each operation
            or any_global_hooks()
            or not self._lock.acquire(blocking=False)  # another thread has its batch in a graph
        ):
            return None
        try:
            return self._run(model, inputs, ids, n_seqs)
        finally:
            self._lock.release()

    def _run(self, model: Any, inputs: EncoderInputs, ids: Tensor, n_seqs: int) -> Outputs | None:
        if self._watch is not None and (
            self._watch.modules[0] is not model  # a replica, which has this as an attribute too
            or self._device != ids.device
        ):
            if not self._holds():
                self._drop()
            return None
        self._n_runs += 1
        bucket = Bucket.of(ids.numel(), n_seqs, inputs.max_seqlen)
        key = (bucket, allows_tf32())
        if key not in self._graphs and not self._add(key, model, inputs, ids):
            return None
        graph = self._graphs[key]
        self._graphs.move_to_end(key)
        graph.last_run = self._n_runs
        assert self._capture is not None
        with self._capture.turn():
            graph.load(inputs, ids)
            graph.replay()
            # Looked at while the GPU works: what it reads is kept, so that it can do no harm.
            if self._holds():
                return graph.results(ids.numel(), n_seqs)
        self._drop()
        return None

    def _add(
        self, key: tuple[Bucket, bool], model: Any, inputs: EncoderInputs, ids: Tensor
    ) -> bool:
        """Capture a graph if it is worth its time and can be done."""
        self._met[key] += 1
        if self._met[key] < self._patience:
            return False
        is_full = len(self._graphs) >= _MOST_GRAPHS
        if is_full and self._n_runs - next(iter(self._graphs.values())).last_run < _IDLE:
            return False
        if self._watch is None:
            self._watch, self._device = _watch_of(model, ids.device), ids.device
        if self._watch is None or not self._holds():
            self._wait_longer()
            self._drop()
            return False
        try:
            with torch.inference_mode(False), torch.no_grad():
                graph = self._captured(key[0], model, inputs, ids)
        except RuntimeError as error:
            warnings.warn(
                "the model runs without CUDA graphs, as it cannot be captured: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
            self.most_tokens = 0
            self._drop()
            return False
        if is_full:
            self._graphs.popitem(last=False)  # after the capture: an empty pool is gone for good
        self._graphs[key] = graph
        return True

    def _captured(self, bucket: Bucket, model: Any, inputs: EncoderInputs, ids: Tensor) -> _Graph:
        def encode(ids: Tensor, cu_seqlens: Tensor) -> Outputs:
            input_ids, types, positions = ids
            return model._encode(
                EncoderInputs(input_ids, types, positions, None, cu_seqlens, bucket.max_seqlen)
            )

        if self._capture is None:
            self._capture = CudaCapture(ids.device)
        graph = _Graph(bucket, ids.device)
        with self._capture.turn():
            graph.load(inputs, ids)
            graph.outputs, graph.replay = self._capture.record(encode, graph.ids, graph.cu_seqlens)
        assert self._watch is not None
        made = (names for names in self._watch.attributes if "_plan" in names)
        self._plans = [(names, names["_plan"]) for names in made]
        return graph

    def _holds(self) -> bool:
        """Whether the graphs compute what the model does today."""
        assert self._watch is not None
        # What a layer has made of its weights (`_plan`) is what the graphs read, not what it will
        # make the next time, even if the weights are the same.
        plans = all(names.get("_plan") is plan for names, plan in self._plans)
        return plans and self._watch.unchanged()


def _watch_of(model: nn.Module, device: torch.device) -> Watch | None:
    """None where a module or a parameter is not what the graphs' makers know."""
    modules, parameters = list(model.modules()), list(model.parameters())
    if not parameters or not all(_is_known(type(module)) for module in modules):
        return None
    # In a kernel's place plain torch waits for the GPU to learn the lengths.
    sizes = {m.attention_head_size for m in modules if isinstance(m, BertSelfAttention)}
    if failures or not sizes <= set(HEAD_DIMS):
        return None
    for p in parameters:
        if type(p) is not nn.Parameter or p.is_inference() or p.device != device:
            return None
        if not CudaCapture.takes_weight(p):
            return None
    return Watch(modules)


def _is_known(kind: type) -> bool:
    """Whether modules of a class do nothing but launch kernels, the same every time."""
    name = kind.__module__
    return name in ("fastbert.model", "fastbert.layers") or name.startswith("torch.nn.modules.")
