"""What model a checkpoint directory belongs to: `architecture.json` beside the checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path

from archscale_megatron.archs.architecture import Architecture

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
    for option in ("load", "save"):
        directory = getattr(args, option)
        if directory and (Path(directory) / FILE_NAME).is_file():
            # A field that is newer than the directory had its default there.
            stored = _DEFAULTS | json.loads((Path(directory) / FILE_NAME).read_text())
            differing = _differences(stored, dataclasses.asdict(args.architecture))
            if differing:
                raise ValueError(
                    f"--{option} {directory} holds another architecture: {'; '.join(differing)}; "
                    "give its own options, or another directory"
                )


def write_architecture(directory: str, arch: Architecture) -> None:
    """Write `arch` into `directory`, whole or not at all. Called on one rank."""
    path = Path(directory) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(dataclasses.asdict(arch), indent=2) + "\n")
    temporary.replace(path)


def _differences(stored: dict, given: dict) -> list[str]:
    return [
        f"{name} is {stored.get(name)!r} there and {given.get(name)!r} here"
        for name in dict.fromkeys([*given, *stored])
        if stored.get(name) != given.get(name)
    ]
