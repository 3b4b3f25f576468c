"""Saves tiny models, all their parameters random, from one layout, with their logits.

torchrun --nproc-per-node TENSOR*PIPELINE -m tests.hf.worker DIRECTORY TENSOR,PIPELINE MODEL.TIED ...

For each, DIRECTORY/MODEL.TIED is a run directory, and logits.pt in it are the logits [b, s, vocabulary].
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from archscale_megatron import cpu

cpu.install()

from archscale_megatron import megatron_patches  # noqa: E402

megatron_patches.apply()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import dist_checkpointing, mpu  # noqa: E402
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    gather_from_tensor_model_parallel_region,
    model_parallel_cuda_manual_seed,
)
from torch import Tensor  # noqa: E402

from archscale_megatron.archs.splits import split_by_compute  # noqa: E402
from archscale_megatron.checkpoint import manifest  # noqa: E402
from archscale_megatron.checkpoint.run_directory import write_architecture  # noqa: E402
from archscale_megatron.model.spec import build_model  # noqa: E402
from archscale_megatron.mup import initialization  # noqa: E402
from tests.hf.cases import BATCH, PADDED, SEQUENCE, VOCABULARY, architecture, directory_of, tokens  # noqa: E402
from tests.lively import lively_values  # noqa: E402
from tests.model.building import config_of  # noqa: E402

ITERATION = "iter_0000001"


def build(model: str, tied: bool) -> Any:
    """This rank's stage, with the same parameters at every layout."""
    arch = architecture(model, tied)
    tensor, pipeline = mpu.get_tensor_model_parallel_world_size(), mpu.get_pipeline_model_parallel_world_size()
    config = config_of(
        arch, layer_pattern=split_by_compute(arch, pipeline, SEQUENCE), is_hybrid_model=True,
        tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1, pipeline_model_parallel_size=pipeline,
        deallocate_pipeline_outputs=True,
    )  # fmt: skip
    return build_model(
        config,
        padded_vocab_size=PADDED,
        max_sequence_length=SEQUENCE,
        seed=1,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
    )


def logits_of(model: Any) -> Tensor | None:
    """[b, s, vocabulary] on the last stage."""

    def step(batches: Any, model: Any) -> tuple[Tensor, Any]:
        batch = next(batches)
        return model(batch, torch.arange(SEQUENCE).expand_as(batch), None), lambda output, **_: output

    found = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([tokens()]),
        model=model,
        num_microbatches=1,
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not mpu.is_pipeline_last_stage():
        return None
    return gather_from_tensor_model_parallel_region(found[0])[..., :VOCABULARY]


@torch.no_grad()
def main(directory: Path, layout: str, models: list[tuple[str, bool]]) -> None:
    dist.init_process_group("gloo")
    mpu.initialize_model_parallel(*map(int, layout.split(",")))
    model_parallel_cuda_manual_seed(1)
    initialization.initial_values = lambda name, shape, arch, parametrization, generator: lively_values(
        name, shape, generator
    )
    for name, tied in models:
        run_directory = directory / directory_of(name, tied)
        checkpoint = run_directory / ITERATION
        checkpoint.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        model = build(name, tied)
        dist_checkpointing.save(model.sharded_state_dict(), str(checkpoint))
        logits = logits_of(model)
        if dist.get_rank() == dist.get_world_size() - 1:
            assert logits is not None
            torch.save(logits.clone(), run_directory / "logits.pt")
            arch = architecture(name, tied)
            (checkpoint / "run.json").write_text(json.dumps({"format": 1, "architecture": dataclasses.asdict(arch)}))
            manifest.write(checkpoint, {})
            write_architecture(str(run_directory), arch)
            (run_directory / "latest_checkpointed_iteration.txt").write_text("1")
            print(run_directory.name, flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    cases = [argument.rsplit(".", 1) for argument in sys.argv[3:]]
    main(Path(sys.argv[1]), sys.argv[2], [(name, tied == "tied") for name, tied in cases])
