"""Programs with several commands, `python -m archscale_megatron.PROGRAM COMMAND`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line on standard error, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2; the line starts with the program's name."""
        self.exit(2, f"{self.prog.rpartition('archscale_megatron.')[2].split()[0]}: error: {message}\n")


def run(parser: Parser, args: argparse.Namespace) -> int:
    """Call `args.run(args)`, and return its exit code; its OSError and ValueError are errors of the input."""
    try:
        return args.run(args) or 0
    except (OSError, ValueError) as error:
        parser.error(str(error))


def run_commands(program: str, description: str, modules: Iterable[Any], arguments: list[str] | None) -> int:
    """Run one command of a program and return its exit code; exits with 2 and one line on standard error for bad input.

    Args:
        modules: each has `add_commands(commands)`, whose parsers set `run`, a function of the parsed arguments.
    """
    parser = Parser(prog=f"python -m archscale_megatron.{program}", description=description)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in modules:
        module.add_commands(commands)
    return run(parser, parser.parse_args(arguments))


def start(main: Callable[[], int]) -> NoReturn:
    """Run a program, and exit with the code that it returns."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
    sys.exit(main())
