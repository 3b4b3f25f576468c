"""One rank of a layout: Megatron builds its model and optimizer and runs a training step, on tensors without data."""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config, unwrap_model
from megatron.training import get_args
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.initialize import initialize_megatron
from megatron.training.training import setup_model_and_optimizer
from torch import Tensor

from archscale_megatron.archs.architecture import PIPE
from archscale_megatron.dryrun.fake import fake_tensors
from archscale_megatron.dryrun.kernels import fused_kernels
from archscale_megatron.dryrun.recorder import Recorder, storages_of
from archscale_megatron.dryrun.values import known_values
from archscale_megatron.model.config import HybridConfig
from archscale_megatron.mup.initialization import named_global_parameters
from archscale_megatron.training.step import forward_step, model_provider


@dataclass(frozen=True)
class Stage:
    """What a rank of one pipeline stage holds and sends.

    Attributes:
        rank: of the process that was built.
        layers: its part of the layer pattern, a segment for each virtual stage.
        parameters: how many it holds.
        whole_parameters: name in the whole model -> size over the ranks that hold a part of it.
        memory: bytes of "parameters", "gradients", "optimizer", and "activations": the most of everything else that
            exists at a time during the forward and backward passes of a step.
        sent: bytes that it sends a step, by kind: TP, PP, DP, EP (expert parallel), other.
    """

    rank: int
    layers: str
    parameters: int
    whole_parameters: dict[str, int]
    memory: dict[str, int]
    sent: dict[str, int]


def run_stage(args: argparse.Namespace, index: int, kernels: str) -> Stage:
    """Build pipeline stage `index` as its tensor- and data-parallel rank 0, and run a step. Once in a process.

    Args:
        args: Megatron's global arguments, checked.
        kernels: "fused" or "torch", see `kernels`.
    """
    pp, tp = args.pipeline_model_parallel_size, args.tensor_model_parallel_size
    args.rank = index * (tp if args.use_tp_pp_dp_mapping else args.world_size // pp)
    initialize_megatron(allow_no_cuda=True)
    recorder = Recorder(_kinds_of_groups())
    stand_ins = fused_kernels() if kernels == "fused" else contextlib.nullcontext()
    with fake_tensors(), known_values(), stand_ins, recorder:
        model, optimizer, _ = setup_model_and_optimizer(ModelType.encoder_or_decoder, _without_initial_values)
        recorder.peak = before = recorder.live
        sent = _forward_backward(args, model, optimizer, recorder)
        activations = recorder.peak - before
        recorder.sent.clear()
        # optimizer.step() without the norm of the gradients, of which ranks exchange one number.
        optimizer.prepare_grads()
        optimizer.step_with_ready_grads()
    parameters = [parameter for chunk in model for parameter in chunk.parameters()]
    return Stage(
        rank=args.rank,
        layers=PIPE.join(args.hybrid_layer_pattern.split(PIPE)[index::pp]),
        parameters=sum(parameter.numel() for parameter in parameters),
        whole_parameters={
            name: _whole_size(parameter)
            for chunk in unwrap_model(model)
            for name, parameter in named_global_parameters(chunk)
        },
        memory=_resident(parameters, optimizer) | {"activations": activations},
        sent={kind: round(size) for kind, size in (sent + recorder.sent).items()},
    )


def _without_initial_values(**options: Any) -> Any:
    args = get_args()
    config = core_transformer_config_from_args(args, HybridConfig)
    config.layer_pattern = args.hybrid_layer_pattern
    config.init_model_with_meta_device = True
    return model_provider(**options | {"config": config})


def _forward_backward(args: argparse.Namespace, model: list[Any], optimizer: Any, recorder: Recorder) -> Counter[str]:
    """Megatron's schedule over as many micro-batches as it takes for the most memory; returns what a rank sends for
    all micro-batches of a step. As in megatron.training.training.train and train_step."""
    once: Counter[str] = Counter()

    def finalize(*arguments: Any, **options: Any) -> None:
        earlier = recorder.sent.copy()
        finalize_model_grads(*arguments, **options)
        once.update(recorder.sent - earlier)

    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize
    if args.overlap_grad_reduce:
        waits = [chunk.no_sync for chunk in model]
        config.no_sync_func = waits if len(waits) > 1 else waits[0]
    for chunk in model:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()

    in_step = get_num_microbatches()
    # The first stage is full after as many micro-batches as there are stages; the interleaved schedule fills it
    # with those of a second round.
    run = min(in_step, args.pipeline_model_parallel_size * (1 if len(model) == 1 else 2))
    batches = [_batches(args.micro_batch_size, args.seq_length) for _ in model]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches if len(model) > 1 else batches[0],
        model=model,
        num_microbatches=run,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.decoder_seq_length,
        forward_only=False,
    )
    # Data-parallel ranks meet once a step, overlapped with the last micro-batch or not.
    once["DP"] = recorder.sent["DP"]
    return Counter({k: once[k] + (n - once[k]) * in_step / run for k, n in recorder.sent.items()})


def _batches(micro_batch_size: int, length: int) -> Iterator[dict[str, Tensor]]:
    tokens = torch.empty(micro_batch_size, length, dtype=torch.int64)
    loss_mask = torch.empty(micro_batch_size, length)
    while True:
        yield {"tokens": tokens, "labels": tokens, "position_ids": tokens, "loss_mask": loss_mask}


def _kinds_of_groups() -> dict[str, str]:
    groups = {
        "TP": [
            mpu.get_tensor_model_parallel_group(),
            mpu.get_expert_tensor_parallel_group(),
            mpu.get_tensor_and_context_parallel_group(),
        ],
        # The gradient of a tied embedding is summed over the first and the last stage.
        "PP": [mpu.get_pipeline_model_parallel_group(), mpu.get_embedding_group(check_initialized=False)],
        "DP": [
            mpu.get_data_parallel_group(),
            mpu.get_data_parallel_group(with_context_parallel=True),
            mpu.get_expert_data_parallel_group(),
        ],
        "EP": [mpu.get_expert_model_parallel_group(), mpu.get_expert_tensor_and_model_parallel_group()],
    }
    return {group.group_name: kind for kind, of_kind in groups.items() for group in of_kind if group is not None}


def _resident(parameters: list[Any], optimizer: Any) -> dict[str, int]:
    """Bytes of the tensors that exist all the time; what two share, such as a fp32 parameter that the optimizer
    updates in place, is the first one's."""
    tensors = {
        "parameters": parameters,
        "gradients": [parameter.main_grad for parameter in parameters],
        "optimizer": list(_states(optimizer)),
    }
    seen: set[int] = set()
    sizes = {}
    for name, of_kind in tensors.items():
        storages = storages_of(of_kind)
        sizes[name] = sum(size for storage, size in storages.items() if storage not in seen)
        seen |= set(storages)
    return sizes


def _states(optimizer: Any) -> Iterator[Tensor]:
    """Master weights and moments."""
    if hasattr(optimizer, "chained_optimizers"):
        for part in optimizer.chained_optimizers:
            yield from _states(part)
        return
    for group in optimizer.optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _whole_size(parameter: Any) -> int:
    """Elements of a parameter over the tensor- and expert-parallel ranks among which it is divided."""
    expert = not getattr(parameter, "allreduce", True)
    size = parameter.numel() * (mpu.get_expert_model_parallel_world_size() if expert else 1)
    if getattr(parameter, "tensor_model_parallel", False):
        tp = mpu.get_expert_tensor_parallel_world_size if expert else mpu.get_tensor_model_parallel_world_size
        size *= tp()
    return size
