"""Opens checkpoints at layouts, and saves what the engine says.

torchrun --nproc-per-node 4 -m tests.evaluation.megatron_worker DIRECTORY

DIRECTORY/found.pt: {(model, tied, (tensor, pipeline)): {"score", "greedy", "sampled"}}, the answers in the order of the
requests. All ranks must have the same.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from archscale_megatron.evaluation.megatron_engine import open_checkpoint
from tests.evaluation.megatron_cases import (
    BATCH_SIZE,
    CONTEXT,
    CONTINUED,
    GREEDY,
    LAYOUTS,
    SAMPLED,
    directory_of,
    prompts,
    requests,
)


def answers(directory: Path, layout: tuple[int, int], dtype: torch.dtype | None = None) -> dict[str, Any]:
    engine = open_checkpoint(directory, tensor=layout[0], pipeline=layout[1], dtype=dtype, batch_size=BATCH_SIZE)
    assert (engine.max_length, engine.end, engine.source["iteration"]) == (CONTEXT, (0,), None)
    scores = dict(engine.score(*requests()))
    kinds = (
        {"greedy": GREEDY, "sampled": SAMPLED} if directory.name in [directory_of(*case) for case in CONTINUED] else {}
    )
    texts = {name: dict(engine.generate(prompts(), sampling)) for name, sampling in kinds.items()}
    found = {"score": [(scores[i].logprobs, scores[i].greedy) for i in range(len(scores))]}
    return found | {name: [of[i].ids for i in range(len(of))] for name, of in texts.items()}


def main(directory: Path) -> None:
    found: dict[Any, Any] = {}
    for layout, cases in LAYOUTS.items():
        for model, tied in cases:
            found[model, tied, layout] = answers(directory / directory_of(model, tied), layout)
            process_groups = importlib.import_module("tests.process_groups")  # the first engine installs the CPU
            process_groups.end_layout()
    found["half"] = answers(directory / directory_of("sambay", True), (2, 2), torch.bfloat16)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    assert all(str(other) == str(found) for other in everywhere), "ranks differ"
    if dist.get_rank() == 0:
        torch.save(found, directory / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
