"""`python -m archscale_megatron.hf export | import`."""

from __future__ import annotations

from archscale_megatron.command_line import run_commands, start
from archscale_megatron.hf import export, importing


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    return run_commands("hf", "Models in Hugging Face's folders.", (export, importing), arguments)


if __name__ == "__main__":
    start(main)
