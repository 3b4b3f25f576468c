"""Trains tiny models for two steps in the layouts that fit this world size, and saves what came out.

torchrun --nproc-per-node N -m tests.parallel.worker DIRECTORY

For each model and layout of DIRECTORY/runs.json, rank 0 writes DIRECTORY/MODEL.LAYOUT.safetensors with whole tensors,
put together from all ranks: `loss.STEP`, `grad.STEP.NAME` (as the optimizer sees it), `param.NAME` (after the steps).
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from archscale_megatron import cpu

cpu.install()

from archscale_megatron import megatron_patches  # noqa: E402

megatron_patches.apply()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import mpu  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker, get_moe_metrics_tracker  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor  # noqa: E402

from archscale_megatron.archs.architecture import MOE  # noqa: E402
from archscale_megatron.model.config import HybridConfig  # noqa: E402
from archscale_megatron.model.spec import build_model  # noqa: E402
from archscale_megatron.mup.initialization import named_global_parameters, partition_of  # noqa: E402
from archscale_megatron.mup.overrides import optimizer_overrides  # noqa: E402
from archscale_megatron.mup.rules import Parametrization  # noqa: E402
from archscale_megatron.ops.documents import starts_of_documents  # noqa: E402
from archscale_megatron.optimizers.arguments import muon_arguments  # noqa: E402
from tests.model import building  # noqa: E402
from tests.parallel.layouts import (  # noqa: E402
    END_OF_DOCUMENT,
    GLOBAL_BATCH,
    LAYOUTS,
    REFERENCES,
    ROUNDED,
    RUNS,
    SEQUENCE_LENGTH,
    TINY,
    Layout,
    pattern_of,
    tiny,
)
from tests.process_groups import end_layout  # noqa: E402

STEPS = 2
# SP's initial weights are scaled so that every layer counts, and no update is large beside its weight.
WEIGHT_SCALE, UNTIED_EMBEDDING_SCALE, ZERO_REPLACEMENT = 3.0, 600.0, 0.3
AUX_LOSS_COEFFICIENT = 0.3  # enough to be seen in the gradients


def config_of(family: str, layout: Layout) -> HybridConfig:
    """The transformer config that Megatron's arguments would make for this layout."""
    parametrization = Parametrization(layout.parametrization, width_ratio=0.5, base_head_dim=16)
    arch = parametrization.apply(tiny(family, layout.tied))
    return building.config_of(
        arch,
        torch.bfloat16 if layout.bf16 else torch.float32,
        parametrization=parametrization,
        layer_pattern=pattern_of(arch, layout),
        is_hybrid_model=True,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        deallocate_pipeline_outputs=True,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        moe_aux_loss_coeff=AUX_LOSS_COEFFICIENT,
        **layout.config,
    )


def build_chunks(config: HybridConfig, layout: Layout) -> list[DistributedDataParallel]:
    """This rank's model chunks (one a virtual stage), ready for the optimizer."""
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=layout.optimizer == "adam",
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap,
        bucket_size=1000 if layout.overlap else None,  # most parameters wait for a gather of their own
    )
    chunks = []
    for v in range(layout.vpp):
        stage = v if layout.vpp > 1 else None
        model = build_model(
            config,
            padded_vocab_size=config.architecture.vocab_size,
            max_sequence_length=SEQUENCE_LENGTH,
            seed=1234,
            pre_process=mpu.is_pipeline_first_stage(ignore_virtual=stage is None, vp_stage=stage),
            post_process=mpu.is_pipeline_last_stage(ignore_virtual=stage is None, vp_stage=stage),
            vp_stage=stage,
        )
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and "norm" not in name:
                small = name.startswith("embedding") and not layout.tied
                scale = WEIGHT_SCALE if layout.parametrization == "sp" else 1.0
                parameter.data.mul_(UNTIED_EMBEDDING_SCALE if small else scale)
            elif not parameter.any():  # biases and sinks: beside 0, the rounding of an update is as large as itself
                parameter.data.fill_(ZERO_REPLACEMENT)
        if layout.rounded:
            generator = torch.Generator().manual_seed(layout.rounded)
            for parameter in model.parameters():
                move = torch.empty_like(parameter).uniform_(-(2**-24), 2**-24, generator=generator)
                parameter.data.copy_(parameter.data.double() * (1 + move.double()))
        chunks.append(DistributedDataParallel(config, ddp, Float16Module(config, model) if layout.bf16 else model))
    return chunks


def forward_step(batches: Any, model: Any, varlen: bool) -> tuple[Tensor, Any]:
    """Mean loss of one micro-batch."""
    tokens = next(batches)
    positions = torch.arange(SEQUENCE_LENGTH).expand(len(tokens), -1)
    starts = starts_of_documents(tokens[:, :-1], END_OF_DOCUMENT) if varlen else None
    losses = model(tokens[:, :-1], positions, starts, labels=tokens[:, 1:])
    return losses, lambda out: (out.mean(), {"loss": out.detach().float().mean()})


def unwrap(chunk: DistributedDataParallel) -> Any:
    module = chunk.module
    return module.module if isinstance(module, Float16Module) else module


def train(family: str, layout: Layout) -> dict[str, Tensor]:
    """Two steps; the whole tensors of this run, on rank 0."""
    config = config_of(family, layout)
    config.finalize_model_grads_func = finalize_model_grads
    chunks = build_chunks(config, layout)
    if layout.overlap:
        config.no_sync_func = chunks[0].no_sync
    # A large epsilon makes the update a smooth function of the gradient: otherwise the sign of a gradient that is all
    # but zero decides a whole step.
    optimizer_config = OptimizerConfig(
        optimizer=layout.optimizer, lr=1e-3, weight_decay=0.0 if layout.optimizer == "muonh" else 0.1, adam_eps=1e-4,
        clip_grad=1.0, use_distributed_optimizer=layout.optimizer == "adam", bf16=layout.bf16,
        params_dtype=config.params_dtype, overlap_param_gather=layout.overlap, muon_fp32_matmul_prec="highest",
        **muon_arguments(),
    )  # fmt: skip
    overrides = optimizer_overrides(config.parametrization, optimizer_config)
    optimizer = get_megatron_optimizer(optimizer_config, chunks, config_overrides=overrides)
    generator = torch.Generator().manual_seed(5)
    run: dict[str, Tensor] = {}
    for step in range(STEPS):
        tokens = torch.randint(TINY["vocab_size"], (GLOBAL_BATCH, SEQUENCE_LENGTH + 1), generator=generator)
        if layout.varlen:  # documents of 6 tokens on average
            tokens[torch.rand(tokens.shape, generator=generator) < 1 / 6] = END_OF_DOCUMENT
        micro_batches = tokens.split(layout.micro_batch)[mpu.get_data_parallel_rank() :: layout.dp]
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=partial(forward_step, varlen=layout.varlen),
            data_iterator=[iter(micro_batches) for _ in chunks] if layout.vpp > 1 else iter(micro_batches),
            model=chunks if layout.vpp > 1 else chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=SEQUENCE_LENGTH,
            micro_batch_size=layout.micro_batch,
            forward_only=False,
        )
        run[f"loss.{step}"] = mean_loss(losses)
        if MOE in config.layer_pattern:
            run[f"loss.{step}.balance"] = load_balancing_loss(config, len(micro_batches))
        if layout.optimizer == "adam":
            gather_gradient_shards(chunks)
        run |= whole_tensors(chunks, f"grad.{step}.", lambda p: p.main_grad)
        optimizer.step()
    if layout.overlap:
        for chunk in chunks:
            chunk.start_param_sync(force_sync=True)
    return run | whole_tensors(chunks, "param.", lambda p: p.data)


def mean_loss(losses: list[dict[str, Tensor]]) -> Tensor:
    """The mean over micro-batches and data-parallel ranks, on every rank."""
    total = torch.zeros(2)
    if losses and mpu.get_tensor_model_parallel_rank() == 0:
        total = torch.tensor([sum(x["loss"].item() for x in losses), len(losses)])
    dist.all_reduce(total)
    return total[0] / total[1]


def load_balancing_loss(config: HybridConfig, micro_batches: int) -> Tensor:
    """The mean over layers that Megatron logs, on every rank (training/training.py:2759)."""
    name = {"aux_loss": "load_balancing_loss", "global_aux_loss": "global_load_balancing_loss"}
    scalars: dict[str, Tensor] = {}
    get_moe_metrics_tracker().report(
        loss_scale=1 / micro_batches,
        iteration=0,
        force_initialize=True,
        track_names=name[config.moe_router_load_balancing_type],
        num_layers=config.layer_pattern.count(MOE),
        moe_layer_freq=1,
        total_loss_dict=scalars,
    )
    return next(iter(scalars.values()))


def gather_gradient_shards(chunks: list[DistributedDataParallel]) -> None:
    """The distributed optimizer leaves each data-parallel rank one shard of each reduced bucket."""
    group, expert_group = mpu.get_data_parallel_group(with_context_parallel=True), mpu.get_expert_data_parallel_group()
    for chunk in chunks:
        for group_, buffers in ((group, chunk.buffers), (expert_group, chunk.expert_parallel_buffers)):
            for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
                shard = bucket.grad_data.chunk(group_.size())[group_.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group_)


def whole_tensors(chunks: list[DistributedDataParallel], prefix: str, value: Any) -> dict[str, Tensor]:
    """Every parameter's tensor put together from all ranks, on rank 0 (elsewhere an empty dictionary).

    Copies that must agree are checked to agree bit for bit: data-parallel replicas, tensor-parallel replicas, and the
    two copies of a tied embedding.
    """
    local = {}
    for chunk in chunks:
        for name, parameter in named_global_parameters(unwrap(chunk)):
            split = partition_of(name, parameter)
            layout, rank = ((split.dim, split.blocks), split.rank) if split else (None, 0)
            local[name] = (layout, rank, value(parameter).detach().float().clone())
    everywhere: list[Any] | None = None if dist.get_rank() else [None] * dist.get_world_size()
    dist.gather_object(local, everywhere)
    if everywhere is None:
        return {}
    shards: dict[str, dict[int, Tensor]] = {}
    layouts: dict[str, tuple[int, tuple[int, ...]] | None] = {}
    for rank_dict in everywhere:
        for name, (layout, tp_rank, tensor) in rank_dict.items():
            layouts[name] = layout
            key = tp_rank if layout else 0
            known = shards.setdefault(name, {}).setdefault(key, tensor)
            assert torch.equal(known, tensor), f"{prefix}{name}: two copies differ"
    return {prefix + name: join(layouts[name], parts) for name, parts in shards.items()}


def join(layout: tuple[int, tuple[int, ...]] | None, parts: dict[int, Tensor]) -> Tensor:
    """The inverse of `mup.initialization.partition`."""
    if layout is None:
        return parts[0]
    dim, blocks = layout
    slices = [parts[rank].split([size // len(parts) for size in blocks], dim) for rank in sorted(parts)]
    return torch.cat([part for block in zip(*slices, strict=True) for part in block], dim).contiguous()


def main(directory: Path) -> None:
    dist.init_process_group("gloo")
    runs = [tuple(run) for run in json.loads((directory / RUNS).read_text())]
    for name, layout in (REFERENCES | ROUNDED | LAYOUTS).items():
        models = [model for model, layout_name in runs if layout_name == name]
        if layout.world_size != dist.get_world_size() or not models:
            continue
        mpu.initialize_model_parallel(
            layout.tp,
            layout.pp,
            layout.vpp if layout.vpp > 1 else None,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
        )
        model_parallel_cuda_manual_seed(1)
        for model in models:
            destroy_moe_metrics_tracker()
            run = train(model, layout)
            if dist.get_rank() == 0:
                save_file(run, directory / f"{model}.{name}.safetensors")
                print(f"{model} {name}", flush=True)
        end_layout()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
