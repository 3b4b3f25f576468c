"""What the mixers with a scan share: their convolution, parameters that stay in fp32, and their checkpoint."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from archscale_megatron.ops.causal_conv import causal_conv1d


class CausalConv1d(nn.Conv1d):
    """A depthwise causal convolution with its silu. A module that is called, because DDP waits for the parameters of
    a module when it is called (--overlap-param-gather)."""

    def __init__(self, channels: int, kernel: int, bias: bool = True, **options: Any) -> None:
        super().__init__(channels, channels, kernel, groups=channels, bias=bias, **options)

    def forward(self, x: Tensor, document_starts: Tensor | None) -> Tensor:  # type: ignore[override]
        """x [s, b, d] -> [s, b, d]."""
        return causal_conv1d(x, self.weight, self.bias, document_starts=document_starts)


class RecurrentMixer(MegatronModule):
    """A mixer whose parameters `partition` splits over the TP ranks, where Megatron's linears do not.

    The recurrence is sensitive to `fp32_parameters`: they stay in fp32 whatever the precision of the model.
    """

    fp32_parameters: ClassVar[tuple[str, ...]]
    tp_group: ProcessGroup

    def partition(self, name: str, dim: int = 0, blocks: dict[str, int] | None = None) -> None:
        """Mark a parameter as split along `dim`: each rank has a slice of the whole or, of a row of named `blocks`
        (given with their sizes over all ranks), a slice of each."""
        parameter: Any = self.get_parameter(name)
        if not hasattr(parameter, "partition_dim"):  # Megatron's linears have marked theirs
            set_tensor_model_parallel_attributes(parameter, True, dim, 1)
        if blocks is not None:
            parameter.partition_blocks = tuple(blocks.values())
            parameter.partition_names = tuple(blocks)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Keeps `fp32_parameters` in fp32 when the model is cast (Float16Module calls `.bfloat16()`)."""
        kept = {name: self.get_parameter(name).data for name in self.fp32_parameters}
        super()._apply(fn, recurse)
        for name, data in kept.items():
            parameter = self.get_parameter(name)
            if parameter.dtype != torch.float32:
                parameter.data = data.to(parameter.device)
        return self

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Every parameter as one global tensor, or as one a block, whatever the TP size."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        parameters: dict[str, Any] = dict(self.named_parameters())
        own = dict(parameters)
        sharded: ShardedStateDict = {}
        for child, module in self.named_children():
            if hasattr(module, "sharded_state_dict"):
                sharded |= module.sharded_state_dict(f"{prefix}{child}.", sharded_offsets, metadata)
                own = {name: p for name, p in own.items() if not name.startswith(f"{child}.")}
        dims = {name: p.partition_dim for name, p in own.items()}
        sharded |= make_sharded_tensors_for_checkpoint(
            own, prefix, dims, sharded_offsets, tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"]
        )
        for name, p in parameters.items():
            if hasattr(p, "partition_blocks"):
                sizes = [size // self.tp_group.size() for size in p.partition_blocks]
                key = f"{prefix}{name}"
                sharded[key] = _split_tensor_factory(sharded[key], sizes, list(p.partition_names), p.partition_dim)
        return sharded
