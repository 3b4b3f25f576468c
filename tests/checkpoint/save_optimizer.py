"""Saves a tiny model with random optimizer state, or loads it, and compares with what each rank knows on its own.

torchrun --nproc-per-node N -m tests.checkpoint.save_optimizer save|load DIRECTORY

The reference puts the states together by sums over all ranks of each one's piece among zeros. Buckets are small and
padded, so that cuts go through many parameters, some through one parameter several times.
"""

from __future__ import annotations

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
from megatron.core.dist_checkpointing.strategies.fully_parallel import (  # noqa: E402
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (  # noqa: E402
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from archscale_megatron.model.config import config_of  # noqa: E402
from archscale_megatron.model.spec import build_model  # noqa: E402
from tests.parallel.layouts import tiny  # noqa: E402

KEYS = ("param", "exp_avg", "exp_avg_sq")
FULLY_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable"}


def build(buckets: int) -> tuple[Any, Any]:
    """The model and its optimizer, whose moments differ on every rank."""
    config = config_of(tiny("sambay"), torch.float32)
    model = build_model(config, padded_vocab_size=config.architecture.vocab_size, max_sequence_length=64, seed=1)
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        bucket_size=sum(p.numel() for p in model.parameters()) // buckets,
    )
    model = DistributedDataParallel(config, ddp, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.0, use_distributed_optimizer=True), [model]
    )
    (inner,) = optimizer.chained_optimizers
    assert any(
        end - start > unpadded
        for (start, end), unpadded in zip(
            inner.buffers[0].bucket_indices, (b.numel_unpadded for b in inner.buffers[0].buckets), strict=True
        )
    ), "no bucket is padded"
    inner._init_optimizer_states_with_dummy_values()
    generator = torch.Generator().manual_seed(dist.get_rank())
    for group in inner.optimizer.param_groups:
        for part in group["params"]:
            for state in inner.optimizer.state[part].values():
                state.copy_(torch.randn(state.shape, generator=generator))
    return model.module, inner


def whole_states(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """name.KEY -> the state in the parameter's shape, on every rank."""
    states = {}
    for name, parameter in model.named_parameters():
        whole = {key: torch.zeros(parameter.numel()) for key in KEYS}
        if parameter in optimizer.model_param_gbuf_map:
            where = optimizer._get_model_param_range_map(parameter)["param"]
            for key, tensor in optimizer._get_main_param_and_optimizer_states(parameter).items():
                whole[key][where.start : where.end] = tensor.detach()
        for key, tensor in whole.items():
            dist.all_reduce(tensor)
            states[f"{key}.{name}"] = tensor.view(parameter.shape)
    return states


def state_dict(model: Any, optimizer: Any, is_loading: bool) -> dict[str, Any]:
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    metadata = FULLY_RESHARDABLE | {"dp_cp_group": group, "singleton_local_shards": False}
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    return state | {"optimizer": optimizer.sharded_state_dict(state["model"], is_loading, metadata=metadata)}


if __name__ == "__main__":
    action, directory = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    mpu.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    group = mpu.get_data_parallel_group(with_context_parallel=True)
    if action == "save":
        model, optimizer = build(buckets=8)
        strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), group)
        dist_checkpointing.save(state_dict(model, optimizer, False), str(directory), strategy)
        expected = whole_states(model, optimizer)
        if dist.get_rank() == 0:
            save_file(expected, directory.with_suffix(".safetensors"))
    else:
        for parallel in (False, True):
            model, optimizer = build(buckets=3)
            strategy = TorchDistLoadShardedStrategy()
            loaded = dist_checkpointing.load(
                state_dict(model, optimizer, True),
                str(directory),
                FullyParallelLoadStrategyWrapper(strategy, group) if parallel else strategy,
            )
            with torch.no_grad():
                optimizer.load_state_dict(loaded["optimizer"])
            found, expected = whole_states(model, optimizer), load_file(directory.with_suffix(".safetensors"))
            assert found.keys() == expected.keys()
            for name in expected:
                assert torch.equal(found[name], expected[name]), name
            print("loaded", flush=True)
    dist.barrier()
    dist.destroy_process_group()
