"""Run directories without Megatron: checkpoints of a few small files."""

from __future__ import annotations

from pathlib import Path

from archscale_megatron.checkpoint import manifest
from archscale_megatron.checkpoint.resume import TRACKER
from archscale_megatron.checkpoint.writing import DigestingFile


def write_checkpoint(path: Path, *, data: bytes = b"weights" * 1000, files: int = 3, whole: bool = True) -> Path:
    """A checkpoint of `files` data files of two ranks; without its manifest, if not `whole`."""
    path.mkdir(parents=True)
    for number in range(files):
        with DigestingFile(path / f"__{number % 2}_{number}.distcp") as file:
            file.write(data)
            file.write(str(number).encode())
    (path / ".metadata").write_bytes(b"names")
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    if whole:
        manifest.write(path, manifest.own_digests(path, 0) | manifest.own_digests(path, 1))
        for rank in range(2):
            manifest.remove_own_sidecars(path, rank)
    return path


def write_run(path: Path, *iterations: int, tracker: str | None = None) -> Path:
    """A run directory with whole checkpoints."""
    for iteration in iterations:
        write_checkpoint(path / f"iter_{iteration:07d}")
    path.mkdir(exist_ok=True)
    (path / TRACKER).write_text(tracker if tracker is not None else str(max(iterations)))
    return path
