"""`python -m archscale_megatron.scaling sweep | plot-lr | fit-flops | fit-data | fit-chinchilla | plan`."""

from __future__ import annotations

from archscale_megatron.command_line import run_commands, start
from archscale_megatron.scaling import fit_commands, plan, sweep_commands


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    return run_commands("scaling", "Sweeps and scaling laws.", (sweep_commands, fit_commands, plan), arguments)


if __name__ == "__main__":
    start(main)
