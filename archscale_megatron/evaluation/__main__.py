"""`python -m archscale_megatron.evaluation COMMAND`."""

from __future__ import annotations

from archscale_megatron.command_line import run_commands, start
from archscale_megatron.evaluation import (
    compare,
    lm_eval_command,
    needles_command,
    perplexity,
    phonebook_command,
    reason,
    retrieval_plot,
)

MODULES = (lm_eval_command, needles_command, phonebook_command, perplexity, reason, compare, retrieval_plot)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    return run_commands("evaluation", "How good is a model?", MODULES, arguments)


if __name__ == "__main__":
    start(main)
