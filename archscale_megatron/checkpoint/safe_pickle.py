"""What a checkpoint says is read without running what it says.

torch's format has pickles in it: the file `.metadata`, and objects among the data (random states, arguments, counters).
The first is read with a list of the classes that are allowed, the others as `torch.load(weights_only=True)` does.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.checkpoint import CheckpointError
from archscale_megatron.mup.rules import Parametrization
from archscale_megatron.mup.transfer import BaseHyperparameters, Hyperparameters

METADATA = ".metadata"

# What torch.distributed.checkpoint and Megatron write there: dataclasses and enums, and torch's own constructors.
_CHECKPOINT = "torch.distributed.checkpoint."
ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13's
    *((_CHECKPOINT + "filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *(
        (_CHECKPOINT + "metadata", name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        (_CHECKPOINT + "planner", name)
        for name in ("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
}  # fmt: skip
OURS: list[Any] = [
    Architecture,
    Parametrization,
    BaseHyperparameters,
    Hyperparameters,
]  # of our arguments, which Megatron saves


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            constant = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
            if not isinstance(constant, torch.dtype):
                raise CheckpointError(f"holds {module}.{name}, which may run code")
        return super().find_class(module, name)


def read_metadata(checkpoint: Path) -> Metadata:
    """The `.metadata` file: which tensors there are, and in which files.

    Raises:
        CheckpointError: it names a class that is not allowed, is no metadata, or points out of the checkpoint.
    """
    path = Path(checkpoint) / METADATA
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: this is no torch_dist checkpoint") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}; it was not read") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{path} is damaged: {first_line(error)}") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise CheckpointError(f"{path} holds {type(metadata).__name__}, not a checkpoint's metadata")
    for info in (metadata.storage_data or {}).values():
        name = getattr(info, "relative_path", None)
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise CheckpointError(f"{path} points to {name!r}, which is no file of the checkpoint")
    return metadata


def load_object(file: Any, name: str) -> Any:
    """`torch.load` of an object among a checkpoint's data, with Megatron's list of allowed classes and ours.

    Raises:
        CheckpointError: `name` holds a class that is not allowed, or is damaged.
    """
    from megatron.core import rerun_state_machine  # megatron.core adds its classes to torch's list, but for these two

    allowed = [*OURS, rerun_state_machine.Call, rerun_state_machine.Caller]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"holds {refused[1]}, which may run code" if refused else "is damaged"
        raise CheckpointError(f"{name} in the checkpoint {what}; it was not read") from None


def check_loadable(value: Any, name: str) -> None:
    """Raises CheckpointError if `load_object` could not read `value` again: before a run saves it, not after."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    load_object(file, name)


def first_line(error: BaseException) -> str:
    """The first line of its message, or its class."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
