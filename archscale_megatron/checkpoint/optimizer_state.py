"""Which rank saves and loads which state of the distributed optimizer, for a checkpoint that loads at any layout.

Megatron's fully reshardable format wants the state of a parameter whole, in the parameter's shape. The distributed
optimizer has cut its buckets into equal parts, one a data-parallel rank, wherever that falls; but most parameters lie
in one part. These are saved from where they are, and loaded to where they belong. Only what a cut goes through is sent
to be saved, to the rank that has most of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

Pieces = dict[int, range]
"""Data-parallel rank -> the elements of a flattened parameter whose state it has; in order."""


def sharded_state(
    optimizer: Any, model_sharded_state_dict: dict[str, Any], is_loading: bool = False
) -> dict[int, dict[str, Any]]:
    """This rank's share of the optimizer state: number of the parameter -> name of the state -> ShardedTensor (or the
    factory of several, as for the parameter). All data-parallel ranks call it.

    The numbers are those that Megatron's `load_parameter_state_from_fully_reshardable` counts. Tensors are fp32, in the
    shape of the parameter, and the optimizer's own where the state is whole here: save them before the next step.

    Args:
        optimizer: Megatron's `DistributedOptimizer`.
        model_sharded_state_dict: of the model, with the parameters themselves as data.
        is_loading: every rank that has a part of a state has the tensor; else only the rank that saves it.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    sharded, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    of_parameter = {base.data: base for base in nested_values(sharded)}
    keys = ("param", *optimizer.optimizer_state_keys)
    group = optimizer.data_parallel_group
    rank = group.rank()

    state: dict[int, dict[str, Any]] = {}
    for number, (parameter, pieces) in enumerate(_parameters(optimizer)):
        if rank not in pieces:
            continue
        of_model = of_parameter[parameter]
        shape = of_model.data.shape
        owner = max(pieces, key=lambda r: len(pieces[r]))
        states = optimizer._get_main_param_and_optimizer_states(parameter)
        tensors = [states[key].detach().float() for key in keys]
        if len(pieces) > 1 and is_loading:
            tensors = [torch.empty(shape.numel()) for _ in tensors]
        elif len(pieces) > 1:
            tensors = _put_together(tensors, pieces, owner, group)
        # The last coordinate is the data-parallel rank's; the others are the parameter's.
        copy = optimizer.distributed_optimizer_instance_id if rank == owner else 1 + rank
        state[number] = {}
        for key, tensor in zip(keys, tensors, strict=False):  # where they are sent away, there are none
            changes = {
                "key": f"optimizer.state.{key}.{of_model.key}",
                "data": tensor.view(shape),
                "replica_id": (*of_model.replica_id[:-1], copy),
            }
            if not isinstance(of_model, ShardedTensorFactory):
                changes["dtype"] = tensor.dtype
            state[number][key] = replace(of_model, **changes)
            state[number][key].validate_metadata_integrity()
    return state


def _parameters(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, Pieces]]:
    """Every parameter of the optimizer's buffers, with its pieces; the same on all data-parallel ranks."""
    ranks = optimizer.data_parallel_group.size()
    for buffer in optimizer.buffers:
        for parameter, (start, end, bucket) in buffer.param_index_map.items():
            bucket_start, bucket_end = buffer.bucket_indices[bucket]
            part = (bucket_end - bucket_start) // ranks
            pieces = {}
            for rank in range((start - bucket_start) // part, (end - 1 - bucket_start) // part + 1):
                first = bucket_start + rank * part
                pieces[rank] = range(max(start, first) - start, min(end, first + part) - start)
            yield parameter, pieces


def _put_together(
    tensors: list[torch.Tensor], pieces: Pieces, owner: int, group: dist.ProcessGroup
) -> list[torch.Tensor]:
    """Of states of which `tensors`, flat, are this rank's piece: the whole ones, flat and on the CPU, on the rank
    `owner`, and nothing on the others. Every rank of `pieces` calls it."""
    device = torch.cuda.current_device()  # where the group communicates
    rank = group.rank()

    def exchange(operation: Any, of_peers: dict[int, list[torch.Tensor]]) -> None:
        messages = [
            dist.P2POp(operation, tensor, dist.get_global_rank(group, peer), group)
            for peer, sent in of_peers.items()
            for tensor in sent
        ]
        for work in dist.batch_isend_irecv(messages):
            work.wait()

    if rank != owner:
        exchange(dist.isend, {owner: [tensor.to(device).contiguous() for tensor in tensors]})
        return []
    received = {
        peer: [torch.empty(len(piece), device=device) for _ in tensors]
        for peer, piece in pieces.items()
        if peer != rank
    }
    exchange(dist.irecv, received)
    received[rank] = tensors
    return [torch.cat([received[peer][i].cpu() for peer in pieces]) for i in range(len(tensors))]
