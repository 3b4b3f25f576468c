"""The model's tensors of a checkpoint, one at a time and whole, whatever layout wrote it; and a checkpoint of tensors.

Neither needs a model. Reading needs no process group either.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.checkpoint import CheckpointError, manifest, run_description
from archscale_megatron.checkpoint.files import replace
from archscale_megatron.checkpoint.new_directory import check_new, new_directory
from archscale_megatron.checkpoint.resume import RELEASE, TRACKER
from archscale_megatron.checkpoint.run_directory import FILE_NAME as ARCHITECTURE
from archscale_megatron.checkpoint.run_directory import write_architecture
from archscale_megatron.checkpoint.safe_pickle import first_line, read_metadata

MODEL = ("embedding.", "decoder.", "output_layer.")
"""How the names of the model's tensors start; those of the optimizer's state have a word before."""
LINEAR = re.compile(r"(.*\.(?:in_proj|out_proj|linear_\w+))\.weight")
"""The weight of one of Megatron's linear layers, or a block of it."""


class CheckpointTensors:
    """The model in a checkpoint directory (`iter_0000123`, `release`).

    A tensor's name is Megatron's: that of the parameter, with the layer's number in the whole model. Of what tensor
    parallelism splits, each tensor is the whole, with the rows of all ranks in their order; fused projections of MLPs
    and of Mamba-1 are [gate | up] and [x | z], blocks of Mamba-2 and gated delta nets are tensors of their own
    (`in_proj.weight.z`), experts are one tensor [experts, rows, columns]. Rows of the vocabulary may be padded.

    Attributes:
        run: what made the checkpoint (`run.json`); empty for one older than that file.
        architecture: what the model is.
    Raises:
        CheckpointError: no checkpoint, or it does not say what its architecture is.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._path = checkpoint
        metadata = read_metadata(checkpoint)
        self._storage = metadata.storage_data
        self._tensors = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and name.startswith(MODEL)
        }
        self.run: dict[str, Any] = run_description.read(checkpoint) or {}
        self.architecture = self._architecture()

    def names(self) -> list[str]:
        """Names of the model's tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor `name`."""
        return tuple(self._entry(name).size)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the tensor `name`."""
        return self._entry(name).properties.dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor `name`, on the CPU; raises CheckpointError if its files cannot be read."""
        entry = self._entry(name)
        if len(entry.chunks) == 1 and entry.chunks[0].sizes == entry.size:
            return self._read_chunk(name, entry.chunks[0])
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            place = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            tensor[place] = self._read_chunk(name, chunk)
        return tensor

    def _read_chunk(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        """What one rank wrote of a tensor, as `torch.save` writes it, somewhere in a file."""
        try:
            info = self._storage[MetadataIndex(name, chunk.offsets)]
            with (self._path / info.relative_path).open("rb", buffering=0) as file:
                view = cast(IO[bytes], _create_file_view(file, info.offset, info.length))
                tensor = torch.load(view, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file raises nearly anything
            raise CheckpointError(f"{self._path}: {name} cannot be read ({first_line(error)})") from None
        if not isinstance(tensor, Tensor) or tensor.shape != chunk.sizes:
            raise CheckpointError(f"{self._path}: {name} cannot be read (not what .metadata says)")
        return tensor

    def _entry(self, name: str) -> TensorStorageMetadata:
        if name not in self._tensors:
            raise CheckpointError(f"{self._path} has no tensor {name}")
        return self._tensors[name]

    def _architecture(self) -> Architecture:
        stored = self.run.get("architecture")
        beside = self._path.resolve().parent / ARCHITECTURE
        try:
            if stored is None:
                stored = json.loads(beside.read_text())
            return Architecture(**stored)
        except FileNotFoundError:
            raise CheckpointError(
                f"{self._path} does not say what its architecture is: it has no {run_description.FILE_NAME}, and "
                f"beside it is no {ARCHITECTURE}"
            ) from None
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{self._path} is of an architecture that this release has not: {error}") from None


def write_release(
    directory: Path, arch: Architecture, tensors: Iterable[tuple[str, Tensor]], run: dict[str, Any]
) -> None:
    """Write a run directory with one checkpoint, from which training starts at iteration 0 (`--load`), at any layout.

    The process must be ready for Megatron (`single_process.prepare`).

    Args:
        directory: new, or empty. It appears whole or not at all.
        tensors: every parameter of the model, named and shaped as `CheckpointTensors` does, the vocabulary not padded.
        run: what becomes `run.json`, with `arch` in it.
    Raises:
        FileExistsError: `directory` is there, and not empty.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    from archscale_megatron.single_process import process_groups

    check_new(directory)
    sharded = {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors}
    # Megatron wants what a Transformer Engine layer may have besides its weights, of every linear layer: nothing.
    objects = {
        f"{name}{number}": ShardedObject(f"{name}._extra_state", None, (count,), (number,))
        for name, count in _linears(sharded).items()
        for number in range(count)
    }
    # Megatron takes the queries, keys and values of a checkpoint without a version to be in an order of old.
    content = {"model": sharded | objects, "checkpoint_version": 3.0, "iteration": 0, "args": _compared(arch)}
    with new_directory(directory) as temporary:
        checkpoint = temporary / RELEASE
        checkpoint.mkdir()
        with process_groups():
            dist_checkpointing.save(content, str(checkpoint))
        described = run | {"architecture": dataclasses.asdict(arch)}
        replace(checkpoint / run_description.FILE_NAME, json.dumps(described, indent=1) + "\n")
        manifest.write(checkpoint, manifest.own_digests(checkpoint, 0))
        manifest.remove_own_sidecars(checkpoint, 0)
        write_architecture(str(temporary), arch)
        replace(temporary / TRACKER, RELEASE)


def _linears(tensors: dict[str, Any]) -> dict[str, int]:
    """Name of each of Megatron's linear layers -> how many of them are one tensor (experts)."""
    found = {"output_layer": 1}  # of tied embeddings too
    for name, tensor in tensors.items():
        if match := LINEAR.match(name):
            found[match[1]] = tensor.global_shape[0] if ".experts.experts." in name else 1
    return found


def _compared(arch: Architecture) -> argparse.Namespace:
    """What Megatron compares when it loads; without the pattern it takes the checkpoint for one of its GPTModel."""
    return argparse.Namespace(
        num_layers=len(arch.pattern),
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_attention_heads,
        hybrid_layer_pattern=arch.pattern,
    )
