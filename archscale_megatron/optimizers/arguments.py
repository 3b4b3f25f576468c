"""Megatron's arguments of Muon and MuonH: ArchScale's values, and what cannot be.

Momentum 0.95 with Nesterov's step, and 5 steps of Newton-Schulz, are of all releases of ArchScale. The update's scale
is that of the latest: sqrt(fan_out / fan_in), a change of the root-mean-square norm that does not depend on the width.
Megatron's momentum is an average, ArchScale's of 2026 a sum: their directions, and so the updates, are the same.
"""

from __future__ import annotations

import argparse
from typing import Any

OPTIMIZERS = ("adam", "sgd", "muon", "muonh")  # Megatron's others tell matrices by their shapes
MUON: dict[str, Any] = {
    "muon_momentum": 0.95, "muon_nesterov": True, "muon_num_ns_steps": 5, "muon_coefficient_type": "quintic",
    "muon_scale_mode": "unit_rms_norm",
    "muon_tp_mode": "duplicated",  # "blockwise" would orthogonalize each rank's part by itself: another algorithm
}  # fmt: skip
# Release -> what it has otherwise. In July 2025: scale 0.4 sqrt(max(fan_out, fan_in)), q, k and v as one matrix.
OF_RELEASE: dict[str, dict[str, Any]] = {
    "2025-07": {
        "muon_coefficient_type": "simple", "muon_scale_mode": "spectral", "muon_extra_scale_factor": 0.4,
        "muon_split_qkv": False,
    },
    "2026-03": {},
}  # fmt: skip
WITHOUT_EFFECT_ON_MUONH = ("muon_scale_mode", "muon_extra_scale_factor", "muon_scalar_optimizer")


def muon_arguments(release: str = "2026-03") -> dict[str, Any]:
    """Megatron's argument -> value, of Muon as in that release of ArchScale; MuonH is that of "2026-03"."""
    return MUON | OF_RELEASE[release]


def set_optimizer(args: argparse.Namespace, explicit: dict[str, str]) -> None:
    """Give Muon's arguments their values where neither the user nor a transfer law did.

    Args:
        explicit: attribute -> option, of what the user gave.
    Raises:
        ValueError: a value that Muon or MuonH cannot have, or that would be ignored.
    """
    if args.optimizer not in ("muon", "muonh"):
        return
    by_law = args.hyperparameters is not None
    release = args.parametrization.release if by_law and args.optimizer == "muon" else "2026-03"
    chosen = muon_arguments(release) | ({"weight_decay": 0.0} if args.optimizer == "muonh" else {})
    for name, value in chosen.items():
        if name not in explicit and not (by_law and name == "muon_momentum"):
            setattr(args, name, value)
    option = f"--optimizer {args.optimizer}"
    if args.fp16:
        raise ValueError(f"{option} has no loss scale, which --fp16 needs; use --bf16")
    if args.muon_tp_mode == "blockwise":
        raise ValueError(
            f"{option}: with --muon-tp-mode blockwise the update depends on --tensor-model-parallel-size; "
            "use duplicated or distributed"
        )
    if args.use_distributed_optimizer and not args.bf16:
        raise ValueError(
            f"{option} with --use-distributed-optimizer is Megatron's layer-wise optimizer, which is for --bf16; "
            "use --bf16, or leave out --use-distributed-optimizer"
        )
    if args.optimizer == "muonh":
        if args.weight_decay:
            raise ValueError(f"{option} keeps norms: --weight-decay {args.weight_decay} must be 0; leave it out")
        for name in WITHOUT_EFFECT_ON_MUONH:
            if name in explicit:
                raise ValueError(f"{explicit[name]} has no effect on {option}; leave it out")
