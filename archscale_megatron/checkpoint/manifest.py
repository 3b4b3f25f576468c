"""Is a checkpoint whole? `manifest.json`: the size and the digest of each of its files.

Whoever writes a file computes its digest on the way, and leaves it beside the file. The manifest is written last, so
that a checkpoint without one is half-written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from archscale_megatron.checkpoint import CheckpointError
from archscale_megatron.checkpoint.files import replace, sync

FILE_NAME = "manifest.json"
SUFFIX = ".digest"  # of the file beside a data file, until the manifest is there
FORMAT = 1
CHUNK = 1 << 22  # bytes read at once

Entry = dict[str, Any]
"""{"bytes": int, "digest": hexadecimal xxh3_128}"""


def own_digests(checkpoint: Path, rank: int) -> dict[str, Entry]:
    """File name -> entry, of the data files that rank `rank` wrote."""
    found = checkpoint.glob(f"*__{rank}_*{SUFFIX}")
    return {path.name.removesuffix(SUFFIX): json.loads(path.read_text()) for path in found}


def remove_own_sidecars(checkpoint: Path, rank: int) -> None:
    """Once the manifest is there."""
    for path in checkpoint.glob(f"*__{rank}_*{SUFFIX}"):
        path.unlink(missing_ok=True)


def write(checkpoint: Path, digests: Mapping[str, Entry]) -> None:
    """Write the manifest; files that are not in `digests` are read, so let them be small, or this process's own."""
    files = dict(digests)
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and path.name not in files and path.name != FILE_NAME and path.suffix != SUFFIX:
            sync(path)
            files[path.name] = {"bytes": path.stat().st_size, "digest": digest(path)}
    sync(checkpoint)
    sync(checkpoint.parent)
    content = {"format": FORMAT, "algorithm": "xxh3_128", "files": dict(sorted(files.items()))}
    replace(checkpoint / FILE_NAME, json.dumps(content, indent=1) + "\n")


def digest(path: Path, progress: Callable[[int], object] = lambda count: None) -> str:
    """xxh3_128 of a file, hexadecimal; `progress` is told the bytes of each chunk."""
    state = xxhash.xxh3_128()
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
            progress(count)
    return state.hexdigest()


def is_half_written(checkpoint: Path) -> bool:
    """Without a manifest, and no checkpoint of Megatron's own, which ends with metadata.json."""
    if (checkpoint / FILE_NAME).is_file():
        return False
    ours = (checkpoint / "run.json").is_file() or any(checkpoint.glob(f"*{SUFFIX}"))
    return ours or not (checkpoint / "metadata.json").is_file()


def read(checkpoint: Path) -> dict[str, Entry]:
    """File name -> entry.

    Raises:
        CheckpointError: there is no manifest, or it is damaged.
    """
    path = checkpoint / FILE_NAME
    if not path.is_file():
        raise CheckpointError(f"{checkpoint} is half-written: it has no {FILE_NAME}, which is written last")
    try:
        content = json.loads(path.read_text())
        files = {name: {"bytes": int(e["bytes"]), "digest": str(e["digest"])} for name, e in content["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is damaged: it is not what a checkpoint's manifest looks like") from None
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {content.get('format')}, this release reads {FORMAT}")
    for name in files:
        if not name or name in (".", "..") or "/" in name or "\\" in name:
            raise CheckpointError(f"{path} names {name!r}, which is no file of the checkpoint")
    return files


def check_sizes(checkpoint: Path) -> dict[str, Entry]:
    """The manifest, after a look at each file's size, which is fast.

    Raises:
        CheckpointError: names the file that is missing or has another size.
    """
    files = read(checkpoint)
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != entry["bytes"]:
            what = "truncated" if size < entry["bytes"] else "too long"
            raise CheckpointError(f"{path} is {what}: {size:,} of {entry['bytes']:,} bytes")
    return files


def verify(
    checkpoint: Path, part: int = 0, parts: int = 1, progress: Callable[[int], object] = lambda count: None
) -> None:
    """Compare every file with the manifest: of all of them the size, of one part in `parts` the digest.

    Raises:
        CheckpointError: names the bad file, and what is wrong with it.
    """
    files = check_sizes(checkpoint)
    largest_first = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    for name in largest_first[part::parts]:
        if digest(checkpoint / name, progress) != files[name]["digest"]:
            raise CheckpointError(f"{checkpoint / name} is damaged: its digest differs from the manifest's")


def sidecar(path: Path) -> Path:
    """Where the digest of a data file waits for the manifest."""
    return path.with_name(path.name + SUFFIX)
