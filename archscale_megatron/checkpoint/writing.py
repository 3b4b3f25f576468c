"""How does a rank write its data? With a digest, and so that its errors reach all ranks.

The functions take the places of Megatron's (see `megatron_patches`). They are at module level, so that a checkpoint
worker, which is a process of its own, finds them.
"""

from __future__ import annotations

import io
import json
import queue
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from archscale_megatron.checkpoint.manifest import sidecar

_megatrons_write = FileSystemWriterAsync.write_preloaded_data
_megatrons_write_all = FileSystemWriterAsync.write_preloaded_data_multithread
_errors: list[Exception] = []  # of the writer threads of this process


class DigestingFile(io.BufferedWriter):
    """A new file, written from the beginning to the end in a `with` block, that leaves its digest beside itself.

    After an error it leaves none, and the error is the file's own, whatever a caller in between made of it.
    """

    def __init__(self, path: str | Path, mode: str = "wb") -> None:
        super().__init__(io.FileIO(path, mode))
        self._path = Path(path)
        self._hash = xxhash.xxh3_128()
        self._bytes = 0
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            self._error = error
            raise
        self._hash.update(data)
        self._bytes += written
        return written

    def seek(self, offset: int, whence: int = 0) -> int:
        raise io.UnsupportedOperation(f"{self._path}: its digest is of what is written in order")

    def fileno(self) -> int:
        self.flush()  # fsync of the descriptor means all that was written
        return super().fileno()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, traceback)
        except OSError as closing:
            self._error = self._error or closing
        if self._error is not None:
            raise self._error
        if error is None:
            entry = {"bytes": self._bytes, "digest": self._hash.hexdigest()}
            sidecar(self._path).write_text(json.dumps(entry))


def write_preloaded_data(*args: Any, **kwargs: Any) -> Any:
    """Megatron's, which returns an error of a thread, of which its caller keeps the class alone."""
    output = _megatrons_write(*args, **kwargs)
    if isinstance(output[1], Exception):
        _errors.append(output[1])
    return output


def write_preloaded_data_multithread(
    transforms: Any, use_msc: bool, rank: int, write_buckets: Any, results: queue.Queue
) -> None:
    """Megatron's, which raises some errors where it should put them into `results`, so that other ranks would wait."""
    _errors.clear()
    own: queue.Queue = queue.Queue()
    result: Any
    try:
        _megatrons_write_all(transforms, use_msc, rank, write_buckets, own)
        result = own.get_nowait()
    except Exception as error:
        result = error
    results.put(RuntimeError(str(_errors[0])) if _errors else result)
