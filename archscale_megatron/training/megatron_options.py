"""Megatron's options where the models here leave no choice, or choose another default."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from megatron.core.transformer.enums import AttnBackend

from archscale_megatron import cpu
from archscale_megatron.archs.architecture import MOE, Architecture
from archscale_megatron.layers.backend import HAVE_TE
from archscale_megatron.ops import weight_gradient
from archscale_megatron.training.experts import EXPERT_RECOMPUTE_MODULES, FIXED_EXPERTS, expert_dimensions

VOCABULARY_MULTIPLE = 64  # ArchScale's padding
# Megatron's attribute -> what the models here have instead of a choice. An option that says otherwise is refused: the
# ones that would be ignored as well as those that would be wrong.
FIXED: dict[str, Any] = {
    # layers
    "swiglu": True, "squared_relu": False, "quick_geglu": False, "add_bias_linear": False,
    "layernorm_zero_centered_gamma": False, "group_query_attention": True,
    "qk_l2_norm": False, "qk_clip": False, "attention_output_gate": False,
    "multi_latent_attention": False,
    "softmax_type": "vanilla", "apply_query_key_layer_scaling": False, "window_size": None,
    "window_attn_skip_freq": None, "attention_backend": AttnBackend.auto, "mtp_num_layers": None,
    "experimental_attention_variant": None, "heterogeneous_layers_config_path": None, "spec": None,
    "hybrid_override_pattern": None, "rotary_percent": 1.0, "rotary_interleaved": False, "no_rope_freq": None,
    "rotary_seq_len_interpolation_factor": None, "use_rope_scaling": False, "fp16_lm_cross_entropy": False,
    # initial values
    "use_mup": False, "init_method_std": 0.02, "init_method_xavier_uniform": False, "embedding_init_method_std": None,
    "init_model_with_meta_device": False,
    # how it runs
    "context_parallel_size": 1, "hybrid_context_parallel": False, "tp_comm_overlap": False,
    "fine_grained_activation_offloading": False, "cuda_graph_impl": "none", "delay_wgrad_compute": False,
    "rampup_batch_size": None,  # Megatron ignores it
    # checkpoints
    "ckpt_format": "torch_dist", "auto_detect_ckpt_format": False, "async_strategy": "mcore",
    "non_persistent_save_interval": None, "non_persistent_ckpt_type": None,
    # data
    "reset_position_ids": False, "reset_attention_mask": False, "dataloader_inter_document_masking": False,
    "sft": False,
    **FIXED_EXPERTS,
}  # fmt: skip
RECOMPUTE_MODULES = ["core_attn"]
# What does here what an option of those does in Megatron.
INSTEAD = dict.fromkeys(
    ("reset_position_ids", "reset_attention_mask", "dataloader_inter_document_masking"), "--reset-at-eod"
) | {
    "rampup_batch_size": "--step-batch-size-schedule",
    "non_persistent_save_interval": "--keep-last and --save-retain-interval",
    "non_persistent_ckpt_type": "--keep-last and --save-retain-interval",
}
# Megatron's flags that change what a family has: attribute -> argument of `build_architecture`.
MEGATRON_OPTIONS = {
    "normalization": "normalization", "qk_layernorm": "qk_norm", "add_qkv_bias": "qkv_bias",
    "hidden_size": "hidden_size", "ffn_hidden_size": "ffn_hidden_size", "layernorm_epsilon": "norm_epsilon",
}  # fmt: skip


def refuse_contradictions(args: argparse.Namespace, arch: Architecture, explicit: dict[str, str]) -> None:
    """Raises ValueError if an option of Megatron's says otherwise than `arch`, or would be ignored.

    Args:
        explicit: attribute -> option, of what the user gave.
    """
    family = f"--train-model {arch.family} --depth {arch.depth}"
    dimensions: dict[str, tuple[Any, str | None]] = {
        "num_layers": (arch.depth, "--depth"),
        "num_attention_heads": (arch.num_attention_heads, "--num-heads"),
        "num_query_groups": (arch.num_query_groups, "--num-kv-heads"),
        "kv_channels": (arch.head_dim, "--head-dim"),
        **{name: (value, "--sparsity and --top-k") for name, value in expert_dimensions(arch).items()},
    }
    for name, (value, ours) in (dimensions | {k: (v, INSTEAD.get(k)) for k, v in FIXED.items()}).items():
        if name in explicit and getattr(args, name) != value:
            advice = f"leave it out, or use {ours}" if ours else "leave it out"
            raise ValueError(
                f"{explicit[name]} {getattr(args, name)} contradicts {family}, which has {value}; {advice}"
            )

    modules = args.recompute_modules or RECOMPUTE_MODULES
    legal = RECOMPUTE_MODULES + (EXPERT_RECOMPUTE_MODULES if MOE in arch.pattern else [])
    if args.recompute_granularity == "selective" and not set(modules) <= set(legal):
        raise ValueError(
            f"--recompute-modules {' '.join(modules)}: selective recompute knows "
            f"{', '.join(legal)} here; use these, or --recompute-granularity full"
        )


def defaults() -> dict[str, Any]:
    """What we choose where the user did not: ArchScale has no dropout, and a machine may lack fused kernels."""
    chosen: dict[str, Any] = {
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
        "dist_ckpt_optim_fully_reshardable": True,  # a checkpoint loads at any layout
        "use_persistent_ckpt_worker": True,  # without it, Megatron drops --async-save
        "exit_signal_handler": True,  # SIGTERM saves and exits
        "save_interval": 1000,
        "eval_interval": 1000,
        "transformer_impl": "transformer_engine" if HAVE_TE else "local",
        "apply_rope_fusion": HAVE_TE,  # Megatron's fused RoPE is Transformer Engine's
        "gradient_accumulation_fusion": not cpu.ACTIVE and weight_gradient.available(_device()),
        "masked_softmax_fusion": False,  # our attention has no separate softmax
        "no_persist_layer_norm": True,
        "moe_token_dispatcher_type": "alltoall",
    }
    if cpu.ACTIVE:
        chosen |= {
            "distributed_backend": "gloo",
            "moe_token_dispatcher_type": "allgather",  # all-to-all needs more of gloo than it has
            "transformer_impl": "local",
            "bias_swiglu_fusion": False,
            "bias_dropout_fusion": False,
        }
    return chosen


def _device() -> torch.device:
    """This rank's GPU, which Megatron makes the current one later."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
