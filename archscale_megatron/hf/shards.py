"""Tensors into safetensors shards with an index, each tensor as it comes."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archscale_megatron.checkpoint.files import sync
from archscale_megatron.hf.folder import DTYPES, INDEX, WEIGHTS, HFError

MAX_SHARD_BYTES = 5_000_000_000
Entry = tuple[str, tuple[int, ...], torch.dtype]
"""Name, shape and dtype of a tensor."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_shards(
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]],
    expected: Sequence[Entry],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `tensors`, which are `expected` in the same order, into `directory`, which is a `new_directory`.

    What goes into which shard follows from `expected` alone, so that `tensors` may make each tensor when it is asked
    for; it is written before the next is. No shard has more than `max_shard_bytes` of weights, unless it is a single
    tensor. One shard is `model.safetensors`, without an index.

    Raises:
        HFError: the disk has too little room, or a file cannot be written.
        ValueError: a tensor is not the one that `expected` has in its place.
    """
    total = sum(map(_bytes, expected))
    if total > (free := shutil.disk_usage(directory).free):
        raise HFError(f"{directory.parent}: the weights take {total:,} bytes, and the disk has {free:,} left")
    shards = _split(expected, max_shard_bytes)
    names = [
        WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    arriving = _checked(tensors, expected)
    for name, shard in zip(names, shards, strict=True):
        try:
            _write(directory / name, shard, arriving)
        except OSError as error:
            raise HFError(f"{directory.parent}: cannot write {name} ({error})") from None
    next(arriving, None)  # the end of `tensors` is checked too
    if len(shards) > 1:
        weight_map = {entry[0]: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write(path: Path, shard: Sequence[Entry], arriving: Iterator[Tensor]) -> None:
    """The file that `safetensors.torch.save_file` makes of the next tensors; that one would hold all of them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in sorted(shard, key=lambda entry: (-entry[2].itemsize, entry[0])):  # so that all are aligned
        begin, end = end, end + _bytes(entry)
        header[entry[0]] = {"dtype": NAMES[entry[2]], "shape": list(entry[1]), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        _write_at(file.fileno(), memoryview(struct.pack("<Q", len(text)) + text), 0)
        for name, _, _ in shard:
            data = memoryview(next(arriving).reshape(-1).view(torch.uint8).numpy())
            _write_at(file.fileno(), data, 8 + len(text) + header[name]["data_offsets"][0])


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:  # one call writes 2 GiB at most
        written = os.pwrite(file, data, offset)
        # The disk starts now, not at the end: that nobody needs these pages makes Linux write them.
        os.posix_fadvise(file, offset, written, os.POSIX_FADV_DONTNEED)
        data, offset = data[written:], offset + written


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, indented as transformers does, and fsync it."""
    path.write_text(json.dumps(value, indent=2) + "\n")
    sync(path)


def _split(expected: Sequence[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in expected:
        if shards[-1] and size + _bytes(entry) > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += _bytes(entry)
    return shards


def _bytes(entry: Entry) -> int:
    return math.prod(entry[1]) * entry[2].itemsize


def _checked(tensors: Iterable[tuple[str, Tensor]], expected: Sequence[Entry]) -> Iterator[Tensor]:
    """The tensors, each dense."""
    for entry, (name, tensor) in zip(expected, tensors, strict=True):
        if entry != (given := (name, tuple(tensor.shape), tensor.dtype)):
            raise ValueError(f"the tensor {given} came in the place of {entry}")
        yield tensor.detach().contiguous()
