"""Sentence vectors: a BERT, its tokenizer, and how the model wants its tokens pooled."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbert.files import model_folder
from fastbert.kernels.pooling import MODES, pool
from fastbert.packing import PackedBatch

WINDOW_TEXTS = 8192  # texts tokenized and sorted by length together
_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}

# What sentence-transformers calls a pooling; the booleans are what it wrote up to version 5.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class SentenceSettings:
    """What a model folder says about making a vector of a text.

    transformer: the folder of the BERT itself. max_length: in tokens; None where nothing says.
    lower: texts are lowercased first. prompt: goes before each text. source: what said so.
    """

    transformer: Path
    pooling: str
    normalize: bool
    max_length: int | None
    lower: bool
    prompt: str
    source: str


@dataclass(frozen=True)
class Encoded:
    """Vectors, (n_texts, hidden) float32, how many tokens went in, how many texts were cut."""

    vectors: np.ndarray
    tokens: int
    truncated: int


class Embedder:
    """Makes a vector of each text: `Embedder.from_pretrained(folder).encode(texts)`.

    pooling: "mean", "max" or "cls". normalize: to length 1. max_length: tokens of a text that are
    read, special ones included. lower: lowercase the texts first. prompt: goes before each text.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        pooling: str = "mean",
        normalize: bool = False,
        max_length: int = 512,
        lower: bool = False,
        prompt: str = "",
    ) -> None:
        if pooling not in MODES:
            raise ValueError(f"pooling must be one of {', '.join(MODES)}, got {pooling!r}")
        positions = model.config.max_position_embeddings
        if not 3 <= max_length <= positions:
            raise ValueError(
                f"max_length must be from 3 to {positions}, the positions that the model has, "
                f"got {max_length}"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.normalize = normalize
        self.max_length = max_length
        self.lower = lower
        self.prompt = prompt

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        pooling: str = "auto",
        normalize: bool | str = "auto",
        max_length: int | None = None,
    ) -> Embedder:
        """A BERT or a sentence-transformers model, from a folder or the Hugging Face Hub.

        dtype: None keeps the checkpoint's. device: None takes a GPU where there is one. "auto" and
        None go by the files of sentence-transformers, else mean pooling without normalisation.
        """
        from fastbert.config import BertConfig
        from fastbert.int8 import usual_device
        from fastbert.model import BertModel
        from fastbert.tokenizer import BertTokenizer

        folder = model_folder(folder_or_hub_id)
        settings = read_settings(folder, pooling)
        config = BertConfig.from_pretrained(settings.transformer)
        device = _usable(device or usual_device(config))
        is_whole = settings.transformer == folder  # then the hub id serves, which fetches weights
        name = folder_or_hub_id if is_whole else settings.transformer
        model = BertModel.from_pretrained(name, dtype=dtype, device=device, add_pooling_layer=False)
        tokenizer = BertTokenizer.from_pretrained(name)
        limits = (settings.max_length, model.config.max_position_embeddings)
        return cls(
            model,
            tokenizer,
            pooling=settings.pooling,
            normalize=settings.normalize if normalize == "auto" else bool(normalize),
            max_length=max_length or min(limit for limit in limits if limit),
            lower=settings.lower and not tokenizer.do_lower_case,
            prompt=settings.prompt,
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def default_batch_tokens(self) -> int:
        return _BATCH_TOKENS.get(self.device.type, 4096)

    def encode(self, texts: Sequence[str], *, batch_tokens: int | None = None) -> np.ndarray:
        """(n_texts, hidden) float32, in the order of `texts`.

        batch_tokens: tokens in one forward pass, where one text does not hold more by itself.
        """
        if isinstance(texts, str):
            raise ValueError("texts must be a sequence of strings, got one string")
        texts = list(texts)
        windows = (texts[i : i + WINDOW_TEXTS] for i in range(0, len(texts), WINDOW_TEXTS))
        vectors = [np.zeros((0, self.model.config.hidden_size), np.float32)]
        vectors += (encoded.vectors for encoded in self.encode_windows(windows, batch_tokens))
        return np.concatenate(vectors)

    def encode_windows(
        self,
        windows: Iterable[list[str]],
        batch_tokens: int | None = None,
        on_batch: Callable[[int, int], None] = lambda n_texts, n_tokens: None,
    ) -> Iterator[Encoded]:
        """Of each window: tokenize and sort all of its texts, then run them.

        on_batch: hears of every forward how many texts and tokens it is. On a GPU the next window
        is tokenized while one is computed, and nothing waits for it before.
        """
        running: Callable[[], Encoded] | None = None
        try:
            for texts in windows:
                started = self._start(texts, batch_tokens or self.default_batch_tokens, on_batch)
                if running is not None:
                    yield running()
                running = started
                if self.device.type != "cuda":
                    yield running()
                    running = None
        except Exception:  # of the next window: this one is not lost
            if running is not None:
                yield running()
            raise
        if running is not None:
            yield running()

    @torch.inference_mode()
    def _start(
        self, texts: list[str], batch_tokens: int, on_batch: Callable[[int, int], None]
    ) -> Callable[[], Encoded]:
        """Start on a window; gives what waits for its end."""
        if self.lower or self.prompt:
            texts = [self.prompt + (text.lower() if self.lower else text) for text in texts]
        device, on_gpu = self.device, self.device.type == "cuda"
        # One token more than is read tells a text that is cut from one that just fits.
        pinned = {"pin_memory": True} if on_gpu else {}
        packed = self.tokenizer.pack(texts, max_length=self.max_length + 1, **pinned)
        lengths = packed.lengths.clamp(max=self.max_length)
        order = torch.argsort(lengths, descending=True, stable=True)
        cut_left = self.tokenizer.truncation_side == "left"
        sizes = batch_sizes(lengths[order].tolist(), batch_tokens)
        pooled = []
        for batch in sort_and_shorten(packed, order, self.max_length, cut_left, device, sizes):
            hidden = self.model(batch).last_hidden_state
            pooled.append(pool(hidden.float(), batch.cu_seqlens, self.pooling, self.normalize))
            on_batch(len(batch), batch.input_ids.numel())
        result, done = torch.cat(pooled), None
        if on_gpu:
            host = torch.empty_like(result, device="cpu", pin_memory=True)
            host.copy_(result, non_blocking=True)
            done = torch.cuda.current_stream(device).record_event()
        else:
            host = result.cpu()

        def finish() -> Encoded:
            if done is not None:
                done.synchronize()
            vectors = np.empty(host.shape, np.float32)
            vectors[order.numpy()] = host.numpy()
            truncated = int((packed.lengths > self.max_length).sum())  # `packed` is kept till here
            return Encoded(vectors, int(lengths.sum()), truncated)

        return finish


def _usable(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used: {reason}") from None


def sort_and_shorten(
    packed: PackedBatch,
    order: torch.Tensor,
    max_length: int,
    cut_left: bool = False,
    device: torch.device | None = None,
    sizes: list[int] | None = None,
) -> list[PackedBatch]:
    """The sequences in another order, none longer than `max_length`, in batches on `device`.

    The first and last token, [CLS] and [SEP], stay: a sequence that is too long loses tokens after
    the first with `cut_left`, else before the last. sizes: sequences in each batch; None: all in
    one. What there is a number of for each token is made on the device, which nothing waits for.
    """
    old_lengths = packed.lengths[order].long()
    lengths = old_lengths.clamp(max=max_length)
    ends = lengths.cumsum(0)
    starts = packed.cu_seqlens[:-1][order].long()
    device, n_tokens = device or order.device, int(ends[-1])
    on_gpu = device.type == "cuda"

    def moved(x: torch.Tensor) -> torch.Tensor:
        return (x.pin_memory() if on_gpu else x).to(device, non_blocking=on_gpu)

    numbers = [lengths, ends - lengths, lengths - 1, starts, old_lengths - lengths]
    repeats, *there = moved(torch.stack(numbers)).unbind()
    begin, last, start, cut = (x.repeat_interleave(repeats, output_size=n_tokens) for x in there)
    position = torch.arange(n_tokens, device=device) - begin
    index = start + position + (position >= (1 if cut_left else last)) * cut
    here, bounds = packed.to(device, non_blocking=on_gpu), torch.cat([ends.new_zeros(1), ends])
    whole = PackedBatch(
        here.input_ids[index],
        here.token_type_ids[index],
        position.to(packed.position_ids.dtype),
        moved(bounds.int()),
        int(lengths.max()),
    )
    return whole.cut(sizes or [len(whole)], bounds.tolist())


def batch_sizes(lengths: list[int], batch_tokens: int) -> list[int]:
    """How many sequences go into each batch: as many as `batch_tokens` allows, at least one."""
    sizes: list[int] = []
    room = 0
    for length in lengths:
        if length > room or not sizes:
            sizes.append(0)
            room = max(batch_tokens, length)
        sizes[-1] += 1
        room -= length
    return sizes


def read_settings(folder: Path, pooling: str = "auto") -> SentenceSettings:
    """How a folder saved by sentence-transformers, or any BERT folder, makes vectors.

    Raises ValueError when that takes a step that fastbert does not have, unless `pooling` says
    what to do instead.
    """
    transformer, pooling_folder, normalize = folder, folder / "1_Pooling", False
    if (folder / "modules.json").is_file():
        for module in read_json(folder / "modules.json"):
            kind, path = module["type"].rpartition(".")[2], folder / module["path"]
            if kind in ("Transformer", "BERT"):
                transformer = path
            elif kind == "Pooling":
                pooling_folder = path
            elif kind == "Normalize":
                normalize = True
            elif kind != "Dropout" and pooling == "auto":
                raise ValueError(
                    f"{folder} has a {kind} module, which fastbert does not run; "
                    f"name a pooling ({', '.join(MODES)}) to leave it out"
                )
    else:
        normalize = (folder / "2_Normalize").is_dir()

    source, mode, include_prompt = "no sentence-transformers files", "mean", True
    if (pooling_folder / "config.json").is_file():
        config = read_json(pooling_folder / "config.json")
        flags = [mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)]
        modes = config.get("pooling_mode", flags or ["mean"])
        mode = modes if isinstance(modes, str) else "+".join(modes)
        include_prompt = config.get("include_prompt", True)
        source = f"{pooling_folder.name}/config.json"
        if mode not in MODES and pooling == "auto":
            raise ValueError(
                f"{folder} wants {mode} pooling, which fastbert does not have; "
                f"name another ({', '.join(MODES)})"
            )

    sentence = _read_if_there(transformer / "sentence_bert_config.json")
    tokenizer = _read_if_there(transformer / "tokenizer_config.json")
    prompts = _read_if_there(folder / "config_sentence_transformers.json")
    prompt = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name"), "")
    if prompt and not include_prompt:
        raise ValueError(f"{folder} leaves its prompt out of the pooling, which fastbert cannot")
    return SentenceSettings(
        transformer=transformer,
        pooling=mode if pooling == "auto" else pooling,
        normalize=normalize,
        max_length=sentence.get("max_seq_length") or tokenizer.get("model_max_length"),
        lower=bool(sentence.get("do_lower_case")),
        prompt=prompt,
        source=source,
    )


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ValueError with its name."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
