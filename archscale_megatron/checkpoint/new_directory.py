"""A directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from archscale_megatron.checkpoint.files import sync


def check_new(target: str | Path) -> None:
    """Raise FileExistsError if `target` is already there, other than as an empty directory."""
    path = Path(target)
    if path.is_dir():
        if next(path.iterdir(), None) is not None:
            raise FileExistsError(f"{target}: not empty; give a new directory")
    elif path.exists() or path.is_symlink():
        raise FileExistsError(f"{target}: not a directory; give a new one")


@contextlib.contextmanager
def new_directory(target: str | Path) -> Iterator[Path]:
    """A temporary directory beside `target`, which becomes `target` at the end of the block.

    Its files must have been fsynced in the block or may be small: all are fsynced again. An exception in the block, or
    a full disk, leaves neither of the two.

    Raises:
        FileExistsError: as `check_new`.
        OSError: the parent cannot be written to.
    """
    check_new(target)
    path = Path(target).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield temporary
        for directory, _, files in os.walk(temporary):
            for name in (*files, "."):
                sync(Path(directory, name))
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp's is for this user alone
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)
