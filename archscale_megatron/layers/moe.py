"""A mixture of SwiGLU experts in the place of the MLP: Megatron's, behind the interface of a mixer.

    routed(x) = sum over the chosen experts i of w_i SwiGLU_i(x),  w = softmax of the chosen experts' logits (fp32)
    y = routed(x) + shared(x)

With SqrtGate (arXiv 2603.28743), which keeps the variance of a sum of independent outputs, the weights are sqrt(w) and
y = (routed(x) + shared(x)) / sqrt(2). The load-balancing loss of a layer (arXiv 2101.03961) is

    coefficient * E * sum over experts i of P_i f_i

with E routed experts, P_i the mean over tokens of expert i in the softmax of all logits, and f_i its part of all
choices. The tokens are those of a micro-batch on one data-parallel rank (`aux_loss`), or on all of them
(`global_aux_loss`).
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from archscale_megatron.archs.architecture import MOE, Architecture, Payload
from archscale_megatron.layers.hybrid_layer import scaled
from archscale_megatron.layers.shared_state import SequenceContext, SharedState


class Router(TopKRouter):
    """Megatron's router, with SqrtGate, and the global auxiliary loss as ArchScale defines it.

    Args:
        sqrt_gate: weigh experts with the square roots of their probabilities.
        logit_multiplier: of the logits, before any softmax (`mup.rules`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        is_mtp_layer: bool = False,
        *,
        sqrt_gate: bool,
        logit_multiplier: float,
    ) -> None:
        super().__init__(config, pg_collection, is_mtp_layer)
        self.sqrt_gate = sqrt_gate
        self.logit_multiplier = logit_multiplier

    def gating(self, input: Tensor) -> Tensor:
        """[s, b, h] -> logits [s, b, experts]."""
        return scaled(super().gating(input), self.logit_multiplier)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits fp32 [s, b, experts] -> weights fp32 and choices bool, [s b, experts] each."""
        weights, choices = super().routing(logits, padding_mask=padding_mask)
        if self.sqrt_gate:
            weights = torch.where(choices, (weights + 1e-30).sqrt(), 0.0)
        return weights, choices

    def get_aux_loss_coeff(self, aux_loss_type: str) -> float:
        """Megatron averages over the data-parallel ranks what for the global loss is a sum over them."""
        coefficient = super().get_aux_loss_coeff(aux_loss_type)
        if aux_loss_type == "global_aux_loss":
            coefficient *= self.tp_dp_cp_group.size() / self.tp_cp_group.size()
        return coefficient

    def _apply_global_aux_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        # Each micro-batch has its own counts; Megatron's are a running mean over those of a step.
        self.reset_global_aux_loss_tracker()
        return super()._apply_global_aux_loss(*args, **kwargs)


class MoEMixer(MoELayer):
    """Megatron's layer of experts, without token dropping.

    Args:
        pattern: the symbols of the whole model.
        sqrt_gate: as in `Router`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        writes: Payload,
        pattern: str,
        sqrt_gate: bool,
    ) -> None:
        del writes
        super().__init__(config, submodules, layer_number, pg_collection)
        self.sqrt_gate = sqrt_gate
        for name, parameter in self.experts.named_parameters():
            # Megatron puts experts into an optimizer of their own where there is expert parallelism. Here always: a
            # checkpoint has the same parts at every layout.
            parameter.allreduce = False
            if "linear_fc1" in name:  # gate and up, also where Megatron says 1 (extensions/transformer_engine.py:124)
                parameter.partition_stride = 2
        # Megatron logs the losses of a hybrid model's experts by their own numbers (training/training.py:2774).
        self.router.config = copy.copy(config)
        self.router.config.num_layers = pattern.count(MOE)
        self.router.set_layer_number(pattern[:layer_number].count(MOE))

    def forward(
        self, hidden_states: Tensor, state: SharedState, context: SequenceContext
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s, b, h] (s / tp under sequence parallelism) -> the same shape."""
        return super().forward(hidden_states)

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """The routed experts' sum, and the shared expert's output -> the layer's output, [s, b, h] each."""
        output = super().postprocess(output, shared_expert_output)
        return output * math.sqrt(0.5) if self.sqrt_gate and self.use_shared_expert else output


def moe_spec(backend: BackendSpecProvider, arch: Architecture, grouped_gemm: bool) -> ModuleSpec:
    """The spec of an expert layer's mixer.

    Args:
        grouped_gemm: one grouped product for all experts of a rank (Transformer Engine), not one product each.
    """
    shared = MLPSubmodules(linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear())
    submodules = MoESubmodules(
        experts=backend.grouped_mlp_modules(grouped_gemm),
        shared_experts=partial(SharedExpertMLP, submodules=shared),
        router=partial(Router, sqrt_gate=arch.sqrt_gate, logit_multiplier=arch.router_multiplier),
    )
    return ModuleSpec(
        module=MoEMixer, submodules=submodules, params={"pattern": arch.pattern, "sqrt_gate": arch.sqrt_gate}
    )


def moe_config(arch: Architecture) -> dict[str, Any]:
    """What `arch` says of the experts, under the names of Megatron's config; Nones without experts."""
    if MOE not in arch.pattern:
        return {"num_moe_experts": None, "moe_ffn_hidden_size": None, "moe_shared_expert_intermediate_size": None}
    return {
        "num_moe_experts": arch.num_experts,
        "moe_router_topk": arch.experts_per_token,
        "moe_ffn_hidden_size": arch.expert_ffn_size,
        "moe_shared_expert_intermediate_size": arch.expert_ffn_size if arch.shared_expert else None,
    }
