"""Megatron's transformer config, plus which architecture it belongs to and how that is cut into stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from archscale_megatron.archs.architecture import Architecture, Payload
from archscale_megatron.archs.splits import payloads
from archscale_megatron.layers.moe import moe_config
from archscale_megatron.model.payload import packed_width
from archscale_megatron.mup.rules import Parametrization


@dataclass
class HybridConfig(TransformerConfig):
    """
    Attributes:
        architecture: what the model is.
        parametrization: how it is initialised, and its optimizer's groups (its multipliers are in `architecture`).
        layer_pattern: `architecture.pattern` with a pipe at each boundary of (virtual) pipeline stages.
        chunked_cross_entropy: the loss from blocks of the vocabulary, without all logits at once (`ops`).
        label_smoothing: weight of the mean over the vocabulary in the loss, in [0, 1).
    """

    architecture: Architecture = None  # type: ignore[assignment]  # required, but behind fields with defaults
    parametrization: Parametrization = Parametrization()
    layer_pattern: str = ""
    chunked_cross_entropy: bool = False
    label_smoothing: float = 0.0

    @property
    def boundary_payloads(self) -> list[Payload]:
        """What crosses each boundary, in order."""
        return payloads(self.architecture, self.layer_pattern)

    def boundary_width(self, payload: Payload) -> int:
        """Channels of the tensor that carries `payload` over a boundary (see `model.payload`).

        Each boundary has its own width in 1F1B. The interleaved schedule passes all boundaries through
        one call, so there all are as wide as the widest.
        """
        interleaved = self.virtual_pipeline_model_parallel_size is not None
        candidates = self.boundary_payloads if interleaved else [payload]
        return max(packed_width(self.architecture, p, self) for p in candidates)


def config_of(arch: Architecture, dtype: torch.dtype = torch.float32, **options: Any) -> HybridConfig:
    """What training/arguments.py makes of `arch` without Transformer Engine; `options` are other attributes.

    For models that are built without Megatron's arguments.
    """
    half = dtype != torch.float32
    defaults: dict[str, Any] = {
        "architecture": arch, "layer_pattern": arch.pattern, "num_layers": len(arch.pattern),
        "hidden_size": arch.hidden_size, "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads, "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.head_dim, "softmax_scale": arch.softmax_scale,
        "layernorm_epsilon": arch.norm_epsilon, "normalization": arch.normalization,
        "qk_layernorm": arch.qk_norm, "add_qkv_bias": arch.qkv_bias,
        "gated_linear_unit": True, "activation_func": torch.nn.functional.silu, "add_bias_linear": False,
        "transformer_impl": "local", "hidden_dropout": 0.0, "attention_dropout": 0.0, "perform_initialization": False,
        "moe_router_dtype": "fp32", "moe_token_dispatcher_type": "alltoall", **moe_config(arch),
        "bf16": half, "params_dtype": dtype, "pipeline_dtype": torch.float32, "fp32_residual_connection": half,
    }  # fmt: skip
    return HybridConfig(**defaults | options)
