"""A Hugging Face folder that somebody else may have made: JSON and safetensors are read, and no code is run.

Every name in it is checked before a file is opened, and every header before a tensor is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors' names of the dtypes that weights may have."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$")
"""Tensors that old Llama folders hold although they follow from the config; they are left alone."""
NAMED_AT_MOST = 3  # tensors in one message


class HFError(ValueError):
    """A folder, or something that the user gave for it, cannot be used; the message is one line."""


class HFFolder:
    """The config and the weights of a folder.

    Attributes:
        path: the folder.
        config: what config.json holds.
    Raises:
        HFError: the folder, its config.json, its index or the header of a shard cannot be used, index and shards
            disagree, a name leads out of the folder, or the weights are pickles.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise HFError(f"{path}: no such folder")
        self._root = self.path.resolve()
        self.config = self.json(CONFIG)
        self._shard_of: dict[str, str] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}  # shape, safetensors' dtype
        self._open: tuple[str, Any] | None = None  # one shard at a time
        index = self._index()
        for shard in [WEIGHTS] if index is None else sorted(set(index.values())):
            self._add_shard(shard, index)
        for name, shard in (index or {}).items():
            if name not in self._headers:
                raise HFError(f"{self.path / shard}: lacks {name}, which {INDEX} says is there")

    def json(self, name: str) -> dict[str, Any]:
        """The object in the JSON file `name`; raises HFError."""
        path = self.file(name)
        try:
            value = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            raise HFError(f"{path}: not JSON ({error})") from None
        if not isinstance(value, dict):
            raise HFError(f"{path}: holds {type(value).__name__}, not an object")
        return value

    def file(self, name: str) -> Path:
        """The regular file `name` of the folder; raises HFError if it is not there, or is elsewhere."""
        path = self.path / name
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name or "\0" in name:
            raise HFError(f"{self.path}: refuses the file name {name!r}, which leads out of the folder")
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):
            raise HFError(f"{path}: no such file") from None
        if target.parent != self._root:
            raise HFError(
                f"{path}: a link to {target}, which is not in the folder; copy the folder with its files (cp -rL)"
            )
        if not target.is_file():
            raise HFError(f"{path}: not a file")
        return path

    def has(self, name: str) -> bool:
        """Whether the folder has an entry `name`, good or bad."""
        return (self.path / name).exists() or (self.path / name).is_symlink()

    def names(self) -> list[str]:
        """Names of the tensors, without those of `BUFFERS`."""
        return [name for name in self._headers if not BUFFERS.search(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`."""
        return self._header(name)[0]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the tensor `name`; raises HFError if no weight has such a one."""
        dtype = self._header(name)[1]
        if dtype not in DTYPES:
            raise HFError(f"{self.path}: {name} is {dtype}; weights are {_listed(DTYPES)}")
        return DTYPES[dtype]

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU; raises HFError if its shard cannot be read."""
        self._header(name)
        shard = self._shard_of[name]
        try:
            if self._open is None or self._open[0] != shard:
                self._open = None
                self._open = shard, safe_open(self.file(shard), framework="pt", backend="pread")
            return self._open[1].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise HFError(f"{self.path / shard}: {name} cannot be read ({_reason(error)})") from None

    def check(
        self, expected: Mapping[str, tuple[int, ...]], dtypes: Collection[torch.dtype] = tuple(DTYPES.values())
    ) -> None:
        """Raise HFError unless the folder has exactly the tensors `expected`, name -> shape, all of one of `dtypes`."""
        here = set(self.names())
        if missing := [name for name in expected if name not in here]:
            raise HFError(f"{self.path}: lacks {_listed(missing)}, which its {CONFIG} asks for")
        if extra := sorted(here - set(expected)):
            raise HFError(f"{self.path}: has {_listed(extra)}, which its {CONFIG} has no place for")
        for name, shape in expected.items():
            if self.shape(name) != tuple(shape):
                raise HFError(f"{self.path}: {name} is {list(self.shape(name))}; its {CONFIG} asks for {list(shape)}")
            if self.dtype(name) not in dtypes:
                raise HFError(
                    f"{self.path}: {name} is {_plain(self.dtype(name))}; legal: {_listed(map(_plain, dtypes))}"
                )

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        if name not in self._headers:
            raise HFError(f"{self.path}: lacks {name}")
        return self._headers[name]

    def _index(self) -> dict[str, str] | None:
        """Tensor -> shard, or None for a folder of one file."""
        single = self.has(WEIGHTS)
        if not self.has(INDEX):
            if not single:
                raise HFError(self._without_weights())
            return None
        index = self.json(INDEX).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(shard, str) for shard in index.values()):
            raise HFError(f"{self.path / INDEX}: has no weight_map of tensors to file names")
        shards = set(index.values())
        for shard in sorted(shards):
            if shard.endswith(PICKLES):
                raise HFError(self._pickled(shard))
            if not shard.endswith(".safetensors"):
                raise HFError(f"{self.path / INDEX}: names {shard!r}, which is no .safetensors file")
            self.file(shard)
        # Another reader may take what the index leaves out.
        if unnamed := sorted(path.name for path in self.path.glob("model*.safetensors") if path.name not in shards):
            raise HFError(f"{self.path / INDEX}: does not name {_listed(unnamed)}; remove what is not of this model")
        return index

    def _without_weights(self) -> str:
        pickles = sorted(path.name for path in self.path.iterdir() if path.name.endswith((*PICKLES, ".bin.index.json")))
        return self._pickled(pickles[0]) if pickles else f"{self.path}: has neither {WEIGHTS} nor {INDEX}"

    def _pickled(self, name: str) -> str:
        return (
            f"{self.path / name}: a pickle, which runs code when it is read; "
            "save the model again as safetensors (save_pretrained of transformers does)"
        )

    def _add_shard(self, shard: str, index: Mapping[str, str] | None) -> None:
        path = self.file(shard)
        try:
            with safe_open(path, framework="pt", backend="pread") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
                headers = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
        except (OSError, SafetensorError) as error:
            raise HFError(f"{path}: truncated or not a safetensors file ({_reason(error)})") from None
        for name in headers:
            if name in self._shard_of:
                raise HFError(f"{self.path}: both {self._shard_of[name]} and {shard} hold {name}")
            if index is not None and name not in index:
                raise HFError(f"{path}: holds {name}, which is not in {INDEX}")
        if index is not None:
            for name in headers:
                if index[name] != shard:
                    raise HFError(f"{path}: holds {name}, which {INDEX} says is in {index[name]}")
        self._shard_of |= dict.fromkeys(headers, shard)
        self._headers |= headers


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST + 1 else ""
    return ", ".join(names[:NAMED_AT_MOST] if more else names) + more


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0].removeprefix("Error while deserializing header: ")
