"""How tests build a model without the command line."""

from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.layers.moe import moe_config
from archscale_megatron.model.config import HybridConfig
from archscale_megatron.model.spec import build_model


def config_of(arch: Architecture, dtype: torch.dtype = torch.float32, **options: Any) -> HybridConfig:
    """What training/arguments.py makes of `arch`; `options` are other attributes of the config."""
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


def build(arch: Architecture, dtype: torch.dtype = torch.float32, seed: int = 1, **options: Any) -> HybridModel:
    """The whole model in one process, its vocabulary not padded."""
    config = config_of(arch, dtype, **options)
    return build_model(config, padded_vocab_size=arch.vocab_size, max_sequence_length=64, seed=seed)
