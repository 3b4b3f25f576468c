"""One hybrid layer: pre-norm, a mixer, the residual sum."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from archscale_megatron.archs.architecture import Payload
from archscale_megatron.layers.shared_state import SequenceContext, SharedState
from archscale_megatron.ops.residual import residual_add


@dataclass
class HybridLayerSubmodules:
    """norm(config, hidden_size, eps), and mixer(config, layer_number, pg_collection, writes), whose
    forward(x, state, context) returns (output, bias or None)."""

    norm: ModuleSpec | type
    mixer: ModuleSpec


class HybridLayer(MegatronModule):
    """x + dropout(residual_multiplier * mixer(norm(x))), summed in the dtype of the residual stream (fp32).

    Args:
        layer_number: 1-based global index of this hybrid layer, as in Megatron.
        writes: what this layer's mixer writes into the shared state: of "memory" and "kv".
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridLayerSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        writes: Payload,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.norm = build_module(
            submodules.norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )
        self.mixer = build_module(
            submodules.mixer,
            config=config,
            layer_number=layer_number,
            pg_collection=pg_collection,
            writes=writes,
        )

    def forward(self, hidden_states: Tensor, state: SharedState, context: SequenceContext) -> Tensor:
        """hidden_states [s, b, h] (s / tp under sequence parallelism) -> the same shape and dtype."""
        normed, residual = self.norm(hidden_states, with_residual=True)
        output, bias = self.mixer(normed, state, context)
        multiplier = self.config.architecture.residual_multiplier
        if self.config.hidden_dropout == 0:
            return residual_add(residual, output, bias, multiplier)
        output, bias = scaled(output, multiplier), None if bias is None else scaled(bias, multiplier)
        add = get_bias_dropout_add(self.training, self.config.bias_dropout_fusion)
        return add((output, bias), residual, self.config.hidden_dropout)


def scaled(x: Tensor, multiplier: float) -> Tensor:
    """multiplier * x; x itself if the multiplier is 1."""
    return x if multiplier == 1 else x * multiplier
