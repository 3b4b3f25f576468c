"""Gated Memory Unit (arXiv 2507.06607, section 2): gates the memory of an earlier layer, element by element."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from archscale_megatron.archs.architecture import Payload
from archscale_megatron.layers.backend import Linear, build_in_proj, build_out_proj, with_bias
from archscale_megatron.layers.norm import GatedRMSNorm
from archscale_megatron.layers.shared_state import SequenceContext, SharedState
from archscale_megatron.ops.gate import silu_gate


@dataclass
class GatedMemoryUnitSubmodules:
    in_proj: Linear
    out_proj: Linear


class GatedMemoryUnit(MegatronModule):
    """out_proj(silu(in_proj(x)) * memory), the product in fp32, and normed before out_proj if `normalize`.

    The memory's channels lie on the TP ranks as in_proj's output does, so nothing but the norm's sum is
    communicated for it.

    Args:
        memory_size: channels of the memory, over all TP ranks.
        normalize: for the memory of a scan whose own gated output is normed (Mamba-2, gated delta net).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedMemoryUnitSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        writes: Payload,
        memory_size: int,
        normalize: bool,
    ) -> None:
        super().__init__(config)
        hidden_size, tp_group = config.hidden_size, pg_collection.tp
        self.in_proj = build_in_proj(submodules.in_proj, hidden_size, memory_size, config, tp_group)
        self.norm = GatedRMSNorm(config, memory_size, tp_group) if normalize else None
        self.out_proj = build_out_proj(submodules.out_proj, memory_size, hidden_size, config, tp_group)

    def forward(
        self, hidden_states: Tensor, state: SharedState, context: SequenceContext
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] -> [s, b, h], from `state.memory` [s, b, memory_size / tp]."""
        gate, _ = self.in_proj(hidden_states)
        memory: Tensor = state.memory  # type: ignore[assignment]  # written before
        if self.norm is not None:
            return self.out_proj(self.norm(memory, gate))
        return self.out_proj(silu_gate(gate, memory))


def gmu_spec(backend: BackendSpecProvider, memory_size: int, normalize: bool, bias: bool) -> ModuleSpec:
    """The spec of a GMU layer's mixer; `bias` is of both projections."""
    submodules = GatedMemoryUnitSubmodules(
        in_proj=with_bias(backend.column_parallel_linear(), bias),
        out_proj=with_bias(backend.row_parallel_linear(), bias),
    )
    params = {"memory_size": memory_size, "normalize": normalize}
    return ModuleSpec(module=GatedMemoryUnit, submodules=submodules, params=params)
