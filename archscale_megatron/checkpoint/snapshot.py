"""What a checkpoint holds while training goes on: a copy that the process which writes it reads as well.

Megatron gives the tensors of an asynchronous save to a worker process. Those on a GPU are copied by the worker. Those
on the CPU are copied here, once, into memory that both processes map, and that is kept for the next save: memory that
was never touched costs several times the copy. It is anonymous, so that the size of /dev/shm does not matter.
"""

from __future__ import annotations

import io
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple

import torch

ALIGNMENT = 64  # bytes, of each tensor in a snapshot
COPIERS = 2  # threads; training waits for them


class Place(NamedTuple):
    """A tensor in a snapshot: where it starts, in bytes, and what it is."""

    start: int
    dtype: torch.dtype
    shape: torch.Size


class Memory:
    """`size` bytes that other processes can map too: pickled, it is the same memory."""

    def __init__(self, size: int, descriptor: int | None = None) -> None:
        self.size = size
        self._file = io.FileIO(os.memfd_create("checkpoint") if descriptor is None else descriptor, "r+")
        if descriptor is None:
            self._file.truncate(size)
        self._bytes = torch.frombuffer(mmap.mmap(self._file.fileno(), size), dtype=torch.uint8)

    def __reduce__(self) -> tuple[Any, ...]:
        return _map, (self.size, DupFd(self._file.fileno()))

    def __del__(self) -> None:
        self._file.close()

    def tensor(self, place: Place) -> torch.Tensor:
        """The tensor at `place`, which shares this memory and keeps it."""
        count = place.shape.numel() * place.dtype.itemsize
        return with_own_storage(self._bytes[place.start : place.start + count].view(place.dtype).view(place.shape))


def _map(size: int, descriptor: Any) -> Memory:
    return Memory(size, descriptor.detach())


_free: list[Memory] = []


def with_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same data on the CPU as a tensor that is all of its storage: what `torch.save` writes is then it alone.

    Shares the memory of `tensor`, unless that is not contiguous.
    """
    if not tensor.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return torch.from_numpy(flat.numpy()).view(tensor.dtype).view(tensor.shape)


def take(request: Any) -> Any:
    """Megatron's `AsyncRequest` with a snapshot in the place of the CPU tensors that training will change.

    The memory is free for another snapshot once the request is finalized: until then, another has memory of its own.
    """
    if request.preload_fn is None:
        return request
    rank, buckets, results = request.async_fn_args
    places: dict[tuple[int, torch.dtype, torch.Size], Place] = {}  # fp32 parameters are in it twice: as the optimizer's
    sources: list[torch.Tensor] = []
    size = 0

    def place_of(tensor: torch.Tensor) -> Place | torch.Tensor:
        nonlocal size
        if not tensor.is_cpu:
            return tensor
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape)
        if identity not in places:
            places[identity] = Place(size, tensor.dtype, tensor.shape)
            sources.append(tensor)
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return places[identity]

    buckets = [
        (path, name, (data, [(item, place_of(tensor)) for item, tensor in tensors]))
        for path, name, (data, tensors) in buckets
    ]
    memory = _memory(size)
    with ThreadPoolExecutor(COPIERS) as pool:
        for _ in pool.map(lambda source, place: memory.tensor(place).copy_(source), sources, places.values()):
            pass
    changes: dict[str, Any] = {"finalize_fns": [partial(_free.append, memory), *request.finalize_fns]}
    read = partial(preload, memory, buckets)
    if any(isinstance(tensor, torch.Tensor) for _, _, (_, tensors) in buckets for _, tensor in tensors):
        changes |= {"async_fn_args": [rank, None, results], "preload_fn": read}
    else:  # nothing to wait for
        write = partial(_write, request.async_fn, rank, read)
        changes |= {"async_fn": write, "async_fn_args": [results], "preload_fn": None}
    return request._replace(**changes)


def _write(megatrons_write: Any, rank: int, read: Any, results: Any) -> None:
    megatrons_write(rank, read(), results)


def _memory(size: int) -> Memory:
    for memory in _free:
        if memory.size >= size:
            _free.remove(memory)
            return memory
    _free.clear()  # too small
    return Memory(max(size, 1))


def preload(memory: Memory, buckets: list[Any]) -> list[Any]:
    """In the process that writes: what Megatron's `preload_tensors` returns, all tensors on the CPU."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    return FileSystemWriterAsync.preload_tensors(
        [
            (
                path,
                name,
                (data, [(item, memory.tensor(t) if isinstance(t, Place) else t) for item, t in tensors]),
            )
            for path, name, (data, tensors) in buckets
        ],
        True,
    )
