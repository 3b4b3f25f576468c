"""What a parametrisation does: `python -m archscale_megatron.mup show | table | coord-check`."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import NoReturn

from archscale_megatron.mup import coordinate_commands, show, table


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line on standard error, without argparse's usage before it."""
        self.exit(2, f"mup: error: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; exits with 2 and one line on standard error for bad input."""
    parser = _Parser(prog="python -m archscale_megatron.mup", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="show | table | coord-check")
    for module in (show, table, coordinate_commands):
        module.add_commands(commands)
    args, training = parser.parse_known_args(arguments)
    if training and not hasattr(args, "training"):
        parser.error(f"unrecognized arguments: {' '.join(training)}")
    args.training = training
    try:
        return args.run(args) or 0
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    sys.exit(main(sys.argv[1:]))
