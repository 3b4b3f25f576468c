"""Where pictures go: into files whose suffix says of which kind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_path(path: Path) -> None:
    """Raises ValueError, with the option `-o`, for a suffix that matplotlib cannot write or a directory that is not
    there."""
    from matplotlib.backend_bases import FigureCanvasBase

    suffix, kinds = path.suffix.removeprefix("."), FigureCanvasBase.get_supported_filetypes()
    if suffix.lower() not in kinds:
        problem = f"cannot write .{suffix}" if suffix else "needs a suffix"
        raise ValueError(f"-o {path}: {problem}; use one of {', '.join(kinds)}")
    if not path.parent.is_dir():
        raise ValueError(f"-o {path}: there is no directory {path.parent}; make it first")


def save(figure: Figure, path: Path, **options: Any) -> None:
    """Write `figure` into the file `path`; an existing one is replaced. Raises as `check_path`."""
    check_path(path)
    figure.savefig(path, **options)
