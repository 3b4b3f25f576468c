"""Commands of `evaluation` in this process."""

from __future__ import annotations

import argparse
from typing import Any


def run(module: Any, *arguments: object) -> None:
    """Run the one command of `module`; its errors are raised."""
    parser = argparse.ArgumentParser()
    module.add_commands(parser.add_subparsers())
    args = parser.parse_args([module.__name__.rpartition(".")[2], *map(str, arguments)])
    args.run(args)
