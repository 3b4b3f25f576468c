"""pretrain_archscale.py, measured: what each rank has allocated, as torch's allocator reports it to the profiler.

    torchrun ... measured_pretrain.py DIRECTORY OPTIONS...

Rank N writes DIRECTORY/N.json: bytes allocated when the second step begins ("resident": weights, gradients, optimizer),
and the most above that until its forward and backward passes are done ("activations").
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pretrain_archscale  # noqa: E402  # puts the CPU in the GPU's place

import torch  # noqa: E402
from megatron.training import training  # noqa: E402

STEP = 2


def allocated(profiler: Any, nanoseconds: list[int]) -> list[tuple[int, int]]:
    """For each interval between two times: bytes allocated at its start, and the most above that within it."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events)
    result = []
    for begin, end in zip(nanoseconds, nanoseconds[1:], strict=False):
        before = live = sum(size for at, size in changes if at < begin)
        peak = live
        for at, size in changes:
            if begin <= at < end:
                live += size
                peak = max(peak, live)
        result.append((before, peak - before))
    return result


def main() -> None:
    directory = Path(sys.argv.pop(1))
    get_schedule = training.get_forward_backward_func
    steps: list[tuple[int, int]] = []

    def get_measured_schedule(*arguments: Any, **options: Any) -> Callable[..., Any]:
        schedule = get_schedule(*arguments, **options)

        def measured(*arguments: Any, **options: Any) -> Any:
            begin = time.time_ns()
            result = schedule(*arguments, **options)
            steps.append((begin, time.time_ns()))
            return result

        return measured

    training.get_forward_backward_func = get_measured_schedule
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        pretrain_archscale.main()
    ((resident, activations),) = allocated(profiler, list(steps[STEP - 1]))
    found = {"resident": resident, "activations": activations}
    (directory / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
