"""Which checkpoints of a run stay?

The last `--keep-last` of them, and each whose iteration is a multiple of `--save-retain-interval`. Megatron deletes
the checkpoint before the newest and no other, so that what an interrupted run left would stay for ever; here the
directory itself says what there is.
"""

from __future__ import annotations

import re
import shutil
import threading
import uuid
from collections.abc import Collection
from pathlib import Path

from archscale_megatron.checkpoint import files, manifest

DELETED = ".deleted-"  # hidden name of what is going away
REPLACED = ".replaced-"  # of a whole one, while another of the same iteration is written


def iteration_of(checkpoint: Path) -> int | None:
    """4 of `iter_0000004`; None of a name that is none of a checkpoint."""
    match = re.fullmatch(r"iter_(\d{7,})", checkpoint.name)
    return int(match[1]) if match else None


def checkpoints(directory: Path) -> dict[int, Path]:
    """Iteration -> directory in a run directory, whole or not, in order."""
    found = ((iteration_of(path), path) for path in directory.iterdir() if path.is_dir())
    return dict(sorted((iteration, path) for iteration, path in found if iteration is not None))


def expired(
    directory: Path, newest: int, keep_last: int | None, permanent: int | None, pending: Collection[Path] = ()
) -> list[Path]:
    """What may go now that the checkpoint of iteration `newest` is whole, in order.

    Checkpoints beyond `newest` belong to a run that was rewound, and stay, as does what has no manifest but might
    be whole: Megatron's own. Half-written ones before `newest` go.

    Args:
        keep_last: None keeps all; but where `permanent` is given, 1, as in Megatron.
        permanent: multiples of it stay.
        pending: asynchronous saves that still write.
    """
    if keep_last is None and permanent is None:
        return []
    older = {i: p for i, p in checkpoints(directory).items() if i < newest and not p.is_symlink() and p not in pending}
    whole = [i for i, path in older.items() if (path / manifest.FILE_NAME).is_file()]
    kept = whole[-(keep_last or 1) + 1 :] if (keep_last or 1) > 1 else []
    return [
        path
        for iteration, path in older.items()
        if (iteration in whole and iteration not in kept and not (permanent and iteration % permanent == 0))
        or manifest.is_half_written(path)
    ]


def delete(checkpoint: Path) -> None:
    """Make it invisible at once, and delete it in a thread; an end in between leaves a hidden directory."""
    hidden = checkpoint.with_name(f"{DELETED}{checkpoint.name}-{uuid.uuid4().hex[:8]}")
    checkpoint.rename(hidden)
    files.sync(hidden.parent)
    _remove([hidden])


def make_room(checkpoint: Path) -> None:
    """Before a save into `checkpoint`: what is there is put aside if it is whole, and deleted otherwise."""
    if (checkpoint / manifest.FILE_NAME).is_file():
        put_back(checkpoint)
        checkpoint.rename(_aside(checkpoint))
    elif checkpoint.exists():
        delete(checkpoint)


def put_back(checkpoint: Path) -> None:
    """After a save into `checkpoint`, or the end of the program in it: of what was put aside and what is there now, the
    whole one stays."""
    aside = _aside(checkpoint)
    if not aside.exists():
        return
    if (checkpoint / manifest.FILE_NAME).is_file():
        delete(aside)
        return
    if checkpoint.exists():
        delete(checkpoint)
    aside.rename(checkpoint)


def put_all_back(directory: Path) -> None:
    """When a run starts again."""
    for aside in directory.glob(REPLACED + "*"):
        put_back(directory / aside.name.removeprefix(REPLACED))


def _aside(checkpoint: Path) -> Path:
    return checkpoint.with_name(REPLACED + checkpoint.name)


def sweep(directory: Path) -> None:
    """Delete what an interrupted deletion left."""
    _remove(list(directory.glob(DELETED + "*")))


def _remove(hidden: list[Path]) -> None:
    def run() -> None:
        for path in hidden:
            path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)

    if hidden:
        threading.Thread(target=run, name="deletion of checkpoints").start()
