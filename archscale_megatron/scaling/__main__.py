"""`python -m archscale_megatron.scaling sweep | plot-lr | fit-flops | fit-data | fit-chinchilla | plan`."""

from __future__ import annotations

from archscale_megatron.command_line import Parser, run, start
from archscale_megatron.scaling import fit_commands, plan, sweep_commands

MODULES = (sweep_commands, fit_commands, plan)
"""Each has `add_commands(commands)`, whose parsers set `run`, a function of the parsed arguments."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; exits with 2 and one line on standard error for bad input."""
    parser = Parser(prog="python -m archscale_megatron.scaling", description="Sweeps and scaling laws.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in MODULES:
        module.add_commands(commands)
    return run(parser, parser.parse_args(arguments))


if __name__ == "__main__":
    start(main)
