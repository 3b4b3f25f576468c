"""What Megatron's arguments of experts are set to."""

from __future__ import annotations

import argparse
from typing import Any

from archscale_megatron.archs.architecture import MOE, Architecture
from archscale_megatron.layers.moe import moe_config

# As `FIXED` of training/arguments.py.
FIXED_EXPERTS: dict[str, Any] = {
    "moe_layer_freq": 1, "moe_router_dtype": "fp32", "moe_router_pre_softmax": False, "moe_latent_size": None,
    "moe_router_score_function": "softmax", "moe_router_topk_scaling_factor": None, "moe_router_num_groups": None,
    "moe_router_group_topk": None, "moe_router_enable_expert_bias": False, "moe_shared_expert_gate": False,
    "moe_use_upcycling": False, "use_grouped_gemm_for_shared_expert": False, "moe_single_grouped_weight": False,
    "moe_mlp_glu_interleave_size": None, "moe_shared_expert_glu_interleave_size": None,
}  # fmt: skip
EXPERT_RECOMPUTE_MODULES = ["moe", "shared_experts"]
LOAD_BALANCING = ["aux_loss", "seq_aux_loss", "global_aux_loss", "none"]
AUX_LOSS_COEFFICIENT = 1e-3  # ArchScale's default


def expert_dimensions(arch: Architecture) -> dict[str, Any]:
    """`layers.moe.moe_config` under the names of Megatron's arguments."""
    return {"num_experts" if name == "num_moe_experts" else name: value for name, value in moe_config(arch).items()}


def set_experts(args: argparse.Namespace, arch: Architecture, explicit: dict[str, str]) -> None:
    """Set Megatron's arguments of experts, of their layout, and of the balance of their load.

    Args:
        args: changed in place; `transformer_impl` and the layout must be set.
        explicit: what the user gave (see `training.arguments.explicit_options`).
    Raises:
        ValueError: something contradicts the architecture or something else.
    """
    for name, value in expert_dimensions(arch).items():
        setattr(args, name, value)
    if MOE not in arch.pattern:
        if args.global_aux:
            raise ValueError(f"--global-aux: {arch.family} has no experts; leave it out")
        return
    _check_layout(args, arch)
    if args.moe_grouped_gemm and args.transformer_impl != "transformer_engine":
        raise ValueError("--moe-grouped-gemm: needs --transformer-impl transformer_engine; leave it out")
    args.moe_grouped_gemm = args.transformer_impl == "transformer_engine"
    _set_load_balancing(args, explicit)


def _check_layout(args: argparse.Namespace, arch: Architecture) -> None:
    tp, ep, experts = args.tensor_model_parallel_size, args.expert_model_parallel_size, arch.num_experts
    if tp > 1 and not args.sequence_parallel:
        raise ValueError(f"--tensor-model-parallel-size {tp}: experts need --sequence-parallel with it")
    group = ep * (args.expert_tensor_parallel_size or tp) * args.pipeline_model_parallel_size
    if experts % ep:
        shared = f" ({arch.sparsity} x {arch.top_k} less the shared one)" if arch.shared_expert else ""
        legal = ", ".join(str(size) for size in range(1, experts + 1) if experts % size == 0)
        raise ValueError(
            f"--expert-model-parallel-size {ep}: {arch.family} routes to {experts} experts{shared}; use {legal}"
        )
    if args.world_size % group:
        raise ValueError(
            f"{args.world_size} processes cannot be divided into expert x tensor x pipeline parallel groups of "
            f"{ep} x {args.expert_tensor_parallel_size or tp} x {args.pipeline_model_parallel_size}; "
            f"start a multiple of {group}"
        )


def _set_load_balancing(args: argparse.Namespace, explicit: dict[str, str]) -> None:
    if args.global_aux:
        if "moe_router_load_balancing_type" in explicit:
            raise ValueError("--global-aux: says what --moe-router-load-balancing-type says; give one of them")
        args.moe_router_load_balancing_type = "global_aux_loss"
    kinds = args.moe_router_load_balancing_type
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not set(kinds) <= set(LOAD_BALANCING):
        raise ValueError(
            f"--moe-router-load-balancing-type {' '.join(kinds)}: changes how tokens are routed; "
            f"use {', '.join(LOAD_BALANCING)}"
        )
    if "moe_aux_loss_coeff" not in explicit and kinds != ["none"]:
        args.moe_aux_loss_coeff = [AUX_LOSS_COEFFICIENT] * len(kinds)
