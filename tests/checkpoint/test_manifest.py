"""checkpoint/manifest.py and writing.py: what is damaged is found, and named."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash

from archscale_megatron.checkpoint import CheckpointError, files, manifest, writing
from archscale_megatron.checkpoint.writing import DigestingFile
from tests.checkpoint.directories import write_checkpoint


def test_manifest_has_the_digest_of_each_file(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "iter_0000001")
    entries = json.loads((checkpoint / "manifest.json").read_text())["files"]
    contents = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != "manifest.json"}
    assert entries == {
        name: {"bytes": len(data), "digest": xxhash.xxh3_128(data).hexdigest()} for name, data in contents.items()
    }
    manifest.verify(checkpoint)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["__1_1.distcp", ".metadata", "metadata.json"])
@pytest.mark.parametrize(
    "harm, what",
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), r"truncated: [\d,]+ of [\d,]+ bytes"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "too long"),
        (flip, "its digest differs"),
    ],
    ids=["missing", "truncated", "longer", "flipped"],
)
def test_what_is_damaged_is_named(tmp_path: Path, name: str, harm: Callable[[Path], None], what: str) -> None:
    checkpoint = write_checkpoint(tmp_path / "iter_0000001")
    harm(checkpoint / name)
    with pytest.raises(CheckpointError, match=f"{name} is .*{what}"):
        manifest.verify(checkpoint)


def test_parts_verify_every_file_once(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "iter_0000001", files=5)
    for path in checkpoint.glob("*.distcp"):
        flip(path)
        found = []
        for part in range(3):
            try:
                manifest.verify(checkpoint, part, 3)
            except CheckpointError as error:
                found.append(str(error))
        assert len(found) == 1 and path.name in found[0]
        flip(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 1, "files": {"a": 3}}', "is damaged"),
        ('{"format": 2, "files": {}}', "format 2"),
        ('{"format": 1, "files": {"../a": {"bytes": 1, "digest": ""}}}', "names '../a', which is no file"),
    ],
)
def test_a_bad_manifest(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        manifest.verify(tmp_path)


def test_half_written(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "iter_0000001", whole=False)
    assert manifest.is_half_written(checkpoint)
    with pytest.raises(CheckpointError, match="is half-written: it has no manifest.json"):
        manifest.verify(checkpoint)
    for sidecar in checkpoint.glob("*.digest"):
        sidecar.unlink()
    assert not manifest.is_half_written(checkpoint)  # Megatron's own
    (checkpoint / "metadata.json").unlink()
    assert manifest.is_half_written(checkpoint)


def test_digest_of_what_torch_writes(tmp_path: Path) -> None:
    """Tensors, as the writer of torch_dist has them; and what fsync sees is all of it."""
    path = tmp_path / "__0_0.distcp"
    with DigestingFile(path, "wb") as file:
        for size in (3, 100_000):
            torch.save(torch.arange(size), file)
            assert os.fstat(file.fileno()).st_size == file.tell()
        with pytest.raises(io.UnsupportedOperation):
            file.seek(0)
    entry = manifest.own_digests(tmp_path, 0)["__0_0.distcp"]
    assert entry == {"bytes": path.stat().st_size, "digest": manifest.digest(path)}
    manifest.remove_own_sidecars(tmp_path, 0)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_no_digest_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), DigestingFile(tmp_path / "__0_0.distcp") as file:
        file.write(b"half")
        raise KeyError
    # A full disk, of which torch.save makes a RuntimeError, and a buffer that finds it out on closing.
    with pytest.raises(OSError, match="No space left"), DigestingFile("/dev/full") as file:
        torch.save(torch.arange(1_000_000), file)
    with pytest.raises(OSError, match="No space left"), DigestingFile("/dev/full") as file:
        file.write(b"little")
    assert [p.name for p in tmp_path.iterdir()] == ["__0_0.distcp"]


def test_replace_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tracker"
    files.replace(path, "4")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.replace(path, "6")
    assert path.read_text() == "4" and [p.name for p in tmp_path.iterdir()] == ["tracker"]


def test_errors_of_writer_threads_reach_the_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of several threads, of which Megatron raises an error itself, and keeps its class alone."""
    import queue

    def full(path: str, mode: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    from megatron.core.dist_checkpointing.strategies import filesystem_async

    monkeypatch.setattr(filesystem_async, "open", full)
    for threads in (1, 3):
        buckets = [(str(tmp_path / f"__0_{i}.distcp"), f"__0_{i}.distcp", ([], [])) for i in range(threads)]
        results: queue.Queue = queue.Queue()
        writing.write_preloaded_data_multithread([], False, 0, buckets, results)
        result = results.get_nowait()
        assert isinstance(result, RuntimeError) and "No space left" in str(result)
    monkeypatch.undo()
    writing.write_preloaded_data_multithread([], False, 0, buckets, results)
    assert results.get_nowait() == {0: [], 1: [], 2: []}
