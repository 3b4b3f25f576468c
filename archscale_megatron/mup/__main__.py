"""What a parametrisation does: `python -m archscale_megatron.mup show | table | coord-check`."""

from __future__ import annotations

from archscale_megatron.command_line import Parser, run, start
from archscale_megatron.mup import coordinate_commands, show, table


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; exits with 2 and one line on standard error for bad input."""
    parser = Parser(prog="python -m archscale_megatron.mup", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="show | table | coord-check")
    for module in (show, table, coordinate_commands):
        module.add_commands(commands)
    args, training = parser.parse_known_args(arguments)
    if training and not hasattr(args, "training"):
        parser.error(f"unrecognized arguments: {' '.join(training)}")
    args.training = training
    return run(parser, args)


if __name__ == "__main__":
    start(main)
