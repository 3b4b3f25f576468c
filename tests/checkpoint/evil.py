"""Checkpoints that run code where they are unpickled: it makes a directory."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemWriter

PLACES = (".metadata", "common_state", "rng_state", "common.pt")


class Evil:
    """Makes the directory `ran` when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.ran),)


def write_evil(directory: Path, place: str, ran: Path) -> Path:
    """A torch_dist checkpoint in which `place` is evil: the metadata, or an object among the data."""
    import torch

    directory.mkdir(parents=True)
    objects: dict[str, Any] = {"common_state/shard_0_1": [{"iteration": 1}], "rng_state/shard_0_1": [{}]}
    if place.endswith("_state"):
        objects[f"{place}/shard_0_1"] = Evil(ran)
    checkpoint.save(objects, storage_writer=FileSystemWriter(directory), no_dist=True)
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    if place == ".metadata":
        (directory / ".metadata").write_bytes(pickle.dumps(Evil(ran)))
    if place == "common.pt":
        torch.save(Evil(ran), directory / place)
    assert not ran.exists()
    return directory
