"""The module spec of a model: what Megatron's HybridModel builds for each symbol of a pattern."""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec

from archscale_megatron.archs.architecture import (
    CROSS_ATTENTION,
    FULL_ATTENTION,
    GATED_DELTA_NET,
    GMU,
    MAMBA1,
    MAMBA2,
    MLP,
    MOE,
    WINDOW_ATTENTION,
    Architecture,
)
from archscale_megatron.layers.attention import cross_attention_spec, self_attention_spec
from archscale_megatron.layers.backend import backend_for
from archscale_megatron.layers.gated_delta_net import gated_delta_net_spec
from archscale_megatron.layers.gmu import gmu_spec
from archscale_megatron.layers.hybrid_layer import HybridLayer, HybridLayerSubmodules
from archscale_megatron.layers.mamba1 import mamba1_spec
from archscale_megatron.layers.mamba2 import mamba2_spec
from archscale_megatron.layers.mlp import mlp_spec
from archscale_megatron.layers.moe import moe_spec
from archscale_megatron.layers.norm import norm_class
from archscale_megatron.model.config import HybridConfig
from archscale_megatron.model.language_model import HybridLanguageModel
from archscale_megatron.model.stack import SharedStateStack
from archscale_megatron.mup.initialization import initialize_parameters


def stack_spec(config: HybridConfig) -> ModuleSpec:
    """The spec of the decoder: a mixer for each symbol, all in the same pre-norm residual layer."""
    arch: Architecture = config.architecture
    backend = backend_for(config)
    mixers = {
        MAMBA1: mamba1_spec(backend, arch.d_inner, arch.dt_rank, arch.state_size, arch.conv_kernel),
        WINDOW_ATTENTION: self_attention_spec(backend, arch.window, arch),
        FULL_ATTENTION: self_attention_spec(backend, arch.full_window, arch),
        MAMBA2: mamba2_spec(backend, arch.mamba2_heads, arch.mamba2_head_dim, arch.mamba2_state_size, arch.conv_kernel),
        GATED_DELTA_NET: gated_delta_net_spec(backend, arch.gdn_heads, arch.gdn_head_dim, arch.conv_kernel),
        GMU: gmu_spec(backend, arch.memory_size, arch.normalizes_memory, arch.linear_bias),
        CROSS_ATTENTION: cross_attention_spec(backend, arch.full_window, arch),
        MLP: mlp_spec(backend, arch.linear_bias),
        MOE: moe_spec(backend, arch, config.moe_grouped_gemm),
    }
    layers = {
        symbol: ModuleSpec(module=HybridLayer, submodules=HybridLayerSubmodules(norm=norm_class(config), mixer=mixer))
        for symbol, mixer in mixers.items()
    }
    return ModuleSpec(module=SharedStateStack, submodules=layers)


def build_model(
    config: HybridConfig,
    *,
    padded_vocab_size: int,
    max_sequence_length: int,
    seed: int,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> HybridLanguageModel:
    """One pipeline stage (or virtual stage) of the model, with its initial parameters.

    The parameters depend on `seed` alone, not on the parallel layout.
    """
    arch = config.architecture
    model = HybridLanguageModel(
        config,
        stack_spec(config),
        vocab_size=padded_vocab_size,
        max_sequence_length=max_sequence_length,
        hybrid_layer_pattern=config.layer_pattern,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        position_embedding_type="none" if arch.rotary_base is None else "rope",
        rotary_base=arch.rotary_base or 10000,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )
    if not config.init_model_with_meta_device:
        initialize_parameters(model, arch, config.parametrization, seed)
    return model
