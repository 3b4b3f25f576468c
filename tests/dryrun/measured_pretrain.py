"""pretrain_archscale.py on real processes, measured twice: by torch's allocator, and by the dry run's own recorder.

    torchrun ... measured_pretrain.py DIRECTORY OPTIONS...

Rank N writes DIRECTORY/N.json with what each of them saw of the second step: bytes held when it begins (weights,
gradients, optimizer: "resident"), and the most above that until its forward and backward passes are done
("activations"); and what the recorder saw of messages in these passes ("sent").
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pretrain_archscale  # noqa: E402  # puts the CPU in the GPU's place

# isort: split
import torch  # noqa: E402
from megatron.training import training  # noqa: E402

from archscale_megatron.dryrun.recorder import Recorder  # noqa: E402


def allocated(profiler: Any, begin: int, end: int) -> dict[str, int]:
    """From the allocator's events; times in nanoseconds."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events)
    resident = peak = live = sum(size for at, size in changes if at < begin)
    for at, size in changes:
        if begin <= at < end:
            live += size
            peak = max(peak, live)
    return {"resident": resident, "activations": peak - resident}


def main() -> None:
    directory = Path(sys.argv.pop(1))
    get_schedule = training.get_forward_backward_func
    recorder = Recorder({})
    step: dict[str, Any] = {}

    def get_measured_schedule(*arguments: Any, **options: Any) -> Callable[..., Any]:
        schedule = get_schedule(*arguments, **options)

        def measured(*arguments: Any, **options: Any) -> Any:
            gc.collect()
            torch.distributed.barrier()
            time.sleep(0.5)  # gloo's threads free what they have sent a little later
            step["begin"], step["resident"] = time.time_ns(), recorder.live
            recorder.peak = recorder.live
            recorder.sent.clear()
            result = schedule(*arguments, **options)
            step["end"], step["activations"] = time.time_ns(), recorder.peak - step["resident"]
            step["sent"] = dict(recorder.sent)
            return result

        return measured

    training.get_forward_backward_func = get_measured_schedule
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler, recorder:
        pretrain_archscale.main()
    begin, end = step.pop("begin"), step.pop("end")
    found = {"allocator": allocated(profiler, begin, end), "recorder": step}
    (directory / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
