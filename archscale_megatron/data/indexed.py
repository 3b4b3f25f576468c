"""Megatron's indexed dataset (`.bin` + `.idx`), written as a stream, without torch.

`.bin` is every token id of every sequence, back to back, in the smallest dtype Megatron uses for the
vocabulary. `.idx` is, little endian:

    magic "MMIDIDX\\0\\0", version 1 (u64), dtype code (u8), S sequences (u64), D + 1 for D documents (u64),
    lengths int32[S], byte offsets int64[S], index of each document's first sequence int64[D + 1]

The bytes equal those of megatron-core 0.19.2's `IndexedDatasetBuilder` (core/datasets/indexed_dataset.py), fed as
Megatron's tools/preprocess_data.py feeds it: a document is one sequence, an empty document has none.
"""

import os
import struct
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

_MAGIC = b"MMIDIDX\x00\x00"
_DTYPE_CODE = {np.dtype(np.int32): 4, np.dtype(np.uint16): 8}
_CHUNK = 1 << 20  # documents of the index in memory at once


def dtype_for(vocab_size: int) -> np.dtype:
    """The dtype Megatron's DType.optimal_dtype picks for `vocab_size` ids."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


class IndexedDatasetWriter:
    """Writes `{prefix}.bin` and `{prefix}.idx` under temporary names; `publish` gives them their names.

    Memory does not grow with the number of documents: their lengths wait in an unnamed temporary file
    next to the output.
    """

    def __init__(self, prefix: str, vocab_size: int) -> None:
        self.prefix = prefix
        self.dtype = dtype_for(vocab_size)
        self.documents = self.sequences = self.tokens = 0
        self._bin = open(prefix + ".bin.partial", "wb")  # noqa: SIM115
        self._lengths = tempfile.TemporaryFile(dir=os.path.dirname(prefix) or ".")  # noqa: SIM115

    def write(self, ids: NDArray[np.integer], lengths: NDArray[np.integer]) -> None:
        """Append documents: `ids` [tokens] of all of them, `lengths` [documents], 0 for an empty document.

        Raises ValueError if an id does not fit the dtype (a vocabulary with holes), rather than wrapping it.
        """
        if ids.size and ids.max() > np.iinfo(self.dtype).max:
            raise ValueError(f"token id {ids.max()} does not fit {self.dtype}: the tokenizer's vocabulary has holes")
        self._bin.write(ids.astype(self.dtype, copy=False).data)
        self._lengths.write(lengths.astype(np.int32).data)
        self.documents += len(lengths)
        self.sequences += int(np.count_nonzero(lengths))
        self.tokens += ids.size

    def finish(self) -> None:
        """Write the index, still under its temporary name."""
        self._bin.close()
        with open(self.prefix + ".idx.partial", "wb") as index:
            code = _DTYPE_CODE[self.dtype]
            index.write(struct.pack("<9sQBQQ", _MAGIC, 1, code, self.sequences, self.documents + 1))
            for lengths in self._chunks():
                index.write(lengths[lengths > 0].data)
            offset = 0
            for lengths in self._chunks():
                ends = offset + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
                index.write((ends - lengths.astype(np.int64) * self.dtype.itemsize)[lengths > 0].data)
                offset = int(ends[-1])
            index.write(struct.pack("<q", 0))
            first = 0
            for lengths in self._chunks():
                ends = first + np.cumsum(lengths > 0, dtype=np.int64)
                index.write(ends.data)
                first = int(ends[-1])
        self._lengths.close()

    def _chunks(self) -> Iterator[NDArray[np.int32]]:
        self._lengths.seek(0)
        while chunk := self._lengths.read(4 * _CHUNK):
            yield np.frombuffer(chunk, np.int32)

    def discard(self) -> None:
        """Remove what was written. Does nothing after `publish`."""
        self._bin.close()
        self._lengths.close()
        for suffix in (".bin", ".idx"):
            if os.path.exists(self.prefix + suffix + ".partial"):
                os.remove(self.prefix + suffix + ".partial")


def publish(writers: Sequence[IndexedDatasetWriter]) -> None:
    """Give finished datasets their names, so that a kill at any moment leaves no .idx beside a wrong .bin."""
    for writer in writers:
        if os.path.exists(writer.prefix + ".idx"):
            os.remove(writer.prefix + ".idx")
    for suffix in (".bin", ".idx"):
        for writer in writers:
            os.replace(writer.prefix + suffix + ".partial", writer.prefix + suffix)
