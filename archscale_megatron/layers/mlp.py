"""The SwiGLU MLP: Megatron's, behind the interface of a mixer."""

from __future__ import annotations

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from archscale_megatron.archs.architecture import Payload
from archscale_megatron.layers.backend import with_bias
from archscale_megatron.layers.shared_state import SequenceContext, SharedState
from archscale_megatron.ops.swiglu import swiglu


class MLPMixer(MLP):
    """fc2(silu(gate) * up), where fc1's rows are the gate's, then the up branch's.

    When it writes the shared state, the memory is the up branch.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        writes: Payload,
    ) -> None:
        del layer_number
        super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=pg_collection.tp)
        self.writes_memory = "memory" in writes
        self.has_bias = self.linear_fc1.bias is not None

    def forward(
        self, hidden_states: Tensor, state: SharedState, context: SequenceContext
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] -> the same shape."""
        if self.config.bias_activation_fusion and self.has_bias and not self.writes_memory:
            return super().forward(hidden_states)  # compiled for a GPU, where it adds the bias on the way
        gate_up, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            gate_up = gate_up + bias
        if self.writes_memory:
            state.memory = gate_up.chunk(2, dim=-1)[1]
        return self.linear_fc2(swiglu(gate_up))


def mlp_spec(backend: BackendSpecProvider, bias: bool) -> ModuleSpec:
    """The spec of an MLP layer's mixer; `bias` is of both projections."""
    submodules = MLPSubmodules(
        linear_fc1=with_bias(backend.column_parallel_linear(), bias),
        linear_fc2=with_bias(backend.row_parallel_linear(), bias),
    )
    return ModuleSpec(module=MLPMixer, submodules=submodules)
