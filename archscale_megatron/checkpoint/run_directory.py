"""What model a checkpoint directory belongs to: `architecture.json` beside the checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.checkpoint import files, run_description
from archscale_megatron.checkpoint.resume import candidates

FILE_NAME = "architecture.json"
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Architecture) if f.default is not dataclasses.MISSING}


def check_run_directories(args: argparse.Namespace) -> None:
    """Refuse to load from, or save beside, checkpoints of another architecture.

    Raises:
        FileNotFoundError: `--load` does not exist.
        ValueError: a directory holds another architecture; names the fields that differ.
    """
    if args.load and not Path(args.load).is_dir() and args.load != args.save:
        raise FileNotFoundError(f"--load {args.load}: no such directory")
    for option in ("load", "save", "pretrained_checkpoint"):
        directory = getattr(args, option)
        stored = stored_architecture(Path(directory)) if directory else None
        if stored is not None:
            # A field that is newer than the directory had its default there.
            differing = _differences(_DEFAULTS | stored, dataclasses.asdict(args.architecture))
            if differing:
                raise ValueError(
                    f"--{option.replace('_', '-')} {directory} holds another architecture: {'; '.join(differing)}; "
                    "give its own options, or another directory"
                )


def stored_architecture(directory: Path) -> dict[str, Any] | None:
    """What the checkpoints in `directory` are of: its architecture.json, else what the newest of them says; or None."""
    if (directory / FILE_NAME).is_file():
        return json.loads((directory / FILE_NAME).read_text())
    for checkpoint in candidates(directory) if directory.is_dir() else []:
        run = run_description.read(checkpoint)
        if run is not None:
            return run.get("architecture")
    return None


def check_writable(directory: str) -> None:
    """Raises OSError with a clear message if nothing can be written into `directory`, which is made if need be."""
    probe = Path(directory) / f".writable.{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("checkpoints go here")
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"--save {directory}: cannot be written ({error.strerror}); give a directory that can, with room"
        ) from None


def write_architecture(directory: str, arch: Architecture) -> None:
    """Write `arch` into `directory`, whole or not at all. Called on one rank."""
    path = Path(directory) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, json.dumps(dataclasses.asdict(arch), indent=2) + "\n")


def _differences(stored: dict, given: dict) -> list[str]:
    return [
        f"{name} is {stored.get(name)!r} there and {given.get(name)!r} here"
        for name in dict.fromkeys([*given, *stored])
        if stored.get(name) != given.get(name)
    ]
