"""Vectors of a whole file, in bounded memory, a window of texts at a time.

Every finished window is a file in the work folder `OUT.parts`, so that a run that was killed goes
on after the last of them. OUT itself appears at the end, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from fastbert.embed import WINDOW_TEXTS, Embedder, read_json
from fastbert.files import write_atomically
from fastbert.readers import TextSource, import_pyarrow

_WINDOW_CHARACTERS = 1 << 25  # a window of long texts ends before WINDOW_TEXTS


def embed_file(
    source: TextSource,
    out: Path,
    embedder: Embedder,
    model: Path,
    *,
    batch_tokens: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the vectors of `source` to `out` and their numbers to `out`.metrics.json.

    model: the folder that `embedder` was read from. With resume, an unfinished run goes on.
    Returns the numbers. Raises ValueError when `out` or an unfinished run is in the way, or when
    what the unfinished run began with has changed.
    """
    if out.suffix == ".parquet":
        import_pyarrow()  # better missed now than in an hour
    batch_tokens = batch_tokens or embedder.default_batch_tokens
    options = {
        "fastbert": version("fastbert"),
        "torch": torch.__version__,
        "input format": source.format,
        "column": source.column,
        "errors": source.errors,
        "output format": out.suffix,
        "pooling": embedder.pooling,
        "normalize": embedder.normalize,
        "prompt": embedder.prompt,
        "lower": embedder.lower,
        "max_length": embedder.max_length,
        "dtype": str(embedder.dtype).removeprefix("torch."),
        "device": embedder.device.type,
        "batch_tokens": batch_tokens,
    }
    identity = {
        "the input": {} if source.is_stdin else file_identity(source.path),
        "the model": model_identity(model),
        "the options": options,
    }
    with Parts(out, identity, resume=resume, overwrite=overwrite) as parts:
        resumed = sum(int(part[0]) for part in parts.counts())
        with Progress(source.share_read, done=resumed) as progress:
            start, finished, overlaps = 0.0, parts.finished, embedder.device.type == "cuda"

            def unfinished() -> Iterator[list[str]]:
                nonlocal start
                for number, texts in enumerate(windows(source)):
                    progress.texts_read += len(texts)
                    if number < finished:
                        parts.check(number, len(texts))
                        continue
                    if number == finished or not overlaps:  # reading is no part of the time
                        start = time.perf_counter()
                    yield texts

            for encoded in embedder.encode_windows(unfinished(), batch_tokens, progress.advance):
                parts.add(encoded.vectors, encoded.tokens, encoded.truncated, start)
                start = time.perf_counter()
        counts = np.sum([*parts.counts(), np.zeros(4)], axis=0)
        texts_done, tokens, truncated = (int(count) for count in counts[:3])
        if not texts_done:
            raise ValueError(f"{source.name} is empty: it has no texts")
        seconds = float(counts[3])
        metrics = {
            "input": source.name,
            "output": str(out),
            "model": str(model),
            "texts": texts_done,
            "tokens": tokens,
            "truncated": truncated,
            "padding_share": 0.0,
            "seconds": round(seconds, 3),
            "texts_per_second": round(texts_done / seconds, 1),
            "tokens_per_second": round(tokens / seconds, 1),
            "resumed_texts": resumed,
            "hidden_size": embedder.model.config.hidden_size,
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            **options,
        }
        parts.finish(metrics)
    return metrics


def windows(texts: TextSource) -> Iterator[list[str]]:
    """Cut into lists, at the same places in every run."""
    window: list[str] = []
    characters = 0
    for text in texts:
        window.append(text)
        characters += len(text)
        if len(window) == WINDOW_TEXTS or characters >= _WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def file_identity(path: Path) -> dict[str, Any]:
    """What tells whether a file is still the same, without reading all of it."""
    stat = path.stat()
    with path.open("rb") as file:
        ends = file.read(1 << 16)
        file.seek(max(0, stat.st_size - (1 << 16)))
        ends += file.read(1 << 16)
    digest = hashlib.sha256(ends).hexdigest()
    return {"size": stat.st_size, "mtime": stat.st_mtime_ns, "first and last bytes": digest}


def model_identity(folder: Path) -> dict[str, Any]:
    """The content of a model's small files, the size and time of its weight files."""
    identity: dict[str, Any] = {"path": str(folder.resolve())}
    for path in sorted(folder.iterdir()):
        is_small = path.suffix in (".json", ".txt") and not path.name.endswith("metrics.json")
        if is_small and path.is_file():
            identity[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix in (".safetensors", ".bin") or ".ckpt" in path.name:
            identity[path.name] = [path.stat().st_size, path.stat().st_mtime_ns]
    return identity


class Parts:
    """The work folder of one output: `state.json` says what it is for, a file a finished window.

    A context manager: inside it the folder is this process's alone. A part is two NumPy arrays one
    after the other: counts (texts, tokens, truncated texts, seconds), then the vectors.
    """

    def __init__(
        self, out: Path, identity: dict[str, Any], *, resume: bool, overwrite: bool
    ) -> None:
        self.out = out
        self.folder = out.with_name(out.name + ".parts")
        self.identity = json.loads(json.dumps(identity))
        self.resume = resume
        self.overwrite = overwrite
        self.finished = 0  # parts that are there
        self._lock: IO[str] | None = None

    def __enter__(self) -> Parts:
        check_output(self.out, resume=self.resume, overwrite=self.overwrite)
        self.folder.mkdir(exist_ok=True)
        self._lock = _locked(self.folder / "lock", self.out)
        path = self.folder / "state.json"
        if self.resume and path.is_file():
            state = read_json(path)
            self._require_same(state["identity"])
            self.overwrite = self.overwrite or state["overwrite"]
            while self._path(self.finished).exists():
                self.finished += 1
        else:
            for path in self.folder.iterdir():
                if path.name != "lock":
                    path.unlink()
        if self.out.exists() and not self.overwrite:
            raise ValueError(f"{self.out} exists already; --overwrite replaces it")
        self._write_state()
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()
        if not self.finished:  # nothing to go on with
            shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, vectors: np.ndarray, tokens: int, truncated: int, start: float) -> None:
        """Keep a window's vectors; it is finished once this returns."""
        with write_atomically(self._path(self.finished)) as path, path.open("wb") as file:
            seconds = time.perf_counter() - start
            np.save(file, np.array([len(vectors), tokens, truncated, seconds]))
            np.save(file, vectors)
        self.finished += 1

    def counts(self) -> Iterator[np.ndarray]:
        """(texts, tokens, truncated texts, seconds) of each part."""
        return (self._arrays(number, 1)[0] for number in range(self.finished))

    def vectors(self) -> Iterator[np.ndarray]:
        """(n_texts, hidden) float32 of each part."""
        return (self._arrays(number, 2)[1] for number in range(self.finished))

    def check(self, number: int, n_texts: int) -> None:
        """Refuse a finished window that is not of `n_texts` texts."""
        found = int(self._arrays(number, 1)[0][0])
        if found != n_texts:
            raise ValueError(
                f"{self._path(number)} is of {found} texts, the input has {n_texts} there; "
                "--overwrite starts again"
            )

    def _arrays(self, number: int, n_arrays: int) -> list[np.ndarray]:
        path = self._path(number)
        try:
            with path.open("rb") as file:
                return [np.load(file) for _ in range(n_arrays)]
        except (ValueError, EOFError):
            raise ValueError(f"{path} is damaged; --overwrite starts again") from None

    def finish(self, metrics: dict[str, Any]) -> None:
        """Put OUT together, write the metrics, remove the folder."""
        self.overwrite = True  # from here on OUT may be what this run itself put there
        self._write_state()
        whole = self.folder / "whole"
        n_texts, hidden_size = metrics["texts"], metrics["hidden_size"]
        with whole.open("wb") as file:
            _WRITERS[self.out.suffix](file, self.vectors(), (n_texts, hidden_size))
            file.flush()
            os.fsync(file.fileno())
        os.replace(whole, self.out)
        with write_atomically(self.out.with_name(self.out.name + ".metrics.json")) as path:
            path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        done = self.folder.with_name(self.folder.name + ".done")
        shutil.rmtree(done, ignore_errors=True)
        os.replace(self.folder, done)  # at once, where removing takes a while
        shutil.rmtree(done)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:07d}.part"

    def _write_state(self) -> None:
        with write_atomically(self.folder / "state.json") as path:
            state = {"identity": self.identity, "overwrite": self.overwrite}
            path.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    def _require_same(self, before: dict[str, Any]) -> None:
        for part, now in self.identity.items():
            was = before.get(part, {})
            for key in sorted(now.keys() | was.keys()):
                if was.get(key) != now.get(key):
                    raise ValueError(
                        f"cannot resume {self.out}: {part} changed, {key} was {was.get(key)}, "
                        f"is {now.get(key)}; --overwrite starts again"
                    )


def check_output(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse to write `out` where something is in the way."""
    if not out.parent.is_dir():
        raise FileNotFoundError(f"the folder {out.parent} for {out.name} does not exist")
    parts = out.with_name(out.name + ".parts")
    if overwrite:
        return
    if parts.exists() and not resume:
        raise ValueError(
            f"{parts} is an unfinished run: --resume goes on with it, --overwrite starts again"
        )
    if out.exists() and not parts.exists():
        raise ValueError(f"{out} exists already; --overwrite replaces it")


def _locked(path: Path, out: Path) -> IO[str]:
    """An open file that no other process has locked; the lock ends with the process."""
    file = path.open("w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        pass
    except OSError:
        file.close()
        raise ValueError(f"another fastbert is at work on {out}") from None
    return file


def _write_npy(file: IO[bytes], parts: Iterator[np.ndarray], shape: tuple[int, int]) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for vectors in parts:
        file.write(vectors.astype("<f4", copy=False).tobytes())


def _write_jsonl(file: IO[bytes], parts: Iterator[np.ndarray], shape: tuple[int, int]) -> None:
    # Nine digits bring every float32 back.
    line = '{"row": %d, "embedding": [' + ", ".join(["%.9g"] * shape[1]) + "]}\n"
    row = 0
    for vectors in parts:
        for vector in vectors.tolist():
            file.write((line % (row, *vector)).encode())
            row += 1


def _write_parquet(file: IO[bytes], parts: Iterator[np.ndarray], shape: tuple[int, int]) -> None:
    pa, parquet = import_pyarrow()
    schema = pa.schema([("row", pa.int64()), ("embedding", pa.list_(pa.float32()))])
    row = 0
    with parquet.ParquetWriter(file, schema) as writer:
        for vectors in parts:
            ends = np.arange(len(vectors) + 1, dtype=np.int32) * shape[1]
            rows = np.arange(row, row + len(vectors))
            lists = pa.ListArray.from_arrays(pa.array(ends), pa.array(vectors.reshape(-1)))
            writer.write_table(pa.table([pa.array(rows), lists], schema=schema))
            row += len(vectors)


_WRITERS: dict[str, Callable[[IO[bytes], Iterator[np.ndarray], tuple[int, int]], None]] = {
    ".npy": _write_npy,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}


class Progress:
    """How far it is, on stderr: a bar on a terminal, else a line every ten seconds.

    share_read: how much of the input has been read; with `texts_read`, which the caller keeps, it
    tells about how many texts there are.
    """

    def __init__(self, share_read: Callable[[], float | None], done: int = 0) -> None:
        self.texts_read = 0
        self._share_read = share_read
        self._first = self._done = done
        self._tokens = 0
        self._start = self._last = time.perf_counter()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(initial=done, unit=" texts", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, n_texts: int, n_tokens: int) -> None:
        """`n_texts` more texts are done."""
        self._done += n_texts
        self._tokens += n_tokens
        now = time.perf_counter()
        seconds = now - self._start
        share = self._share_read()
        total = round(self.texts_read / share) if share else None
        speed = f"{self._tokens / seconds:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.total = total
            self._bar.set_postfix_str(speed, refresh=False)
            self._bar.update(n_texts)
        elif now - self._last >= 10:
            self._last = now
            line = f"{self._done:,} texts, {speed}"
            if total is not None:
                left = (total - self._done) * seconds / (self._done - self._first)
                line = f"{self._done:,} of about {total:,} texts, {speed}, {left:,.0f} s left"
            print(line, file=sys.stderr, flush=True)
