"""Runs every command of `evaluation` that has an engine, at several layouts.

torchrun --nproc-per-node 4 -m tests.evaluation.split_worker LAYOUT... -- ARGUMENTS OF ONE COMMAND -- OF THE NEXT ...

LAYOUT is tensor,pipeline. In the arguments, LAYOUT stands for it.
"""

from __future__ import annotations

import itertools
import sys

from archscale_megatron.evaluation.__main__ import main


def split(arguments: list[str]) -> list[list[str]]:
    groups = itertools.groupby(arguments, key="--".__eq__)
    return [list(group) for separates, group in groups if not separates]


def run(layouts: list[str], commands: list[list[str]]) -> None:
    for layout in layouts:
        tensor, pipeline = layout.split(",")
        options = ["--tensor-model-parallel-size", tensor, "--pipeline-model-parallel-size", pipeline]
        for command in commands:
            assert main([argument.replace("LAYOUT", layout) for argument in command] + options) == 0
            if (tensor, pipeline) != ("1", "1"):
                from tests.process_groups import end_layout

                end_layout()


if __name__ == "__main__":
    first, *others = split(sys.argv[1:])
    run(first, others)
