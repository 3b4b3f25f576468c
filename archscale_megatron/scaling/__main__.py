"""`python -m archscale_megatron.scaling sweep | plot-lr | fit-flops | fit-data | fit-chinchilla | plan`."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import NoReturn

from archscale_megatron.scaling import fit_commands, plan, sweep_commands

MODULES = (sweep_commands, fit_commands, plan)
"""Each has `add_commands(commands)`, whose parsers set `run`, a function of the parsed arguments."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line on standard error, without argparse's usage before it."""
        self.exit(2, f"scaling: error: {message}\n")


def main(arguments: list[str] | None = None) -> None:
    """Run one command; exits with code 2 and one line on standard error if an argument cannot be."""
    parser = _Parser(prog="python -m archscale_megatron.scaling", description="Sweeps and scaling laws.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in MODULES:
        module.add_commands(commands)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    main(sys.argv[1:])
