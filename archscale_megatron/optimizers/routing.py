"""Which optimizer updates which parameter: a parameter's class decides, not its shape.

    --optimizer   matrices   other 2-D parameters, but the input embedding   the rest
    adam          AdamW      AdamW                                           AdamW
    muon          Muon       AdamW                                           AdamW
    muonh         MuonH      AdamH                                           AdamW

Matrices are the classes `MATRICES` of `mup.classes`: what ArchScale gives to Muon. The other 2-D parameters are the
output layer, unless it is the embedding, and the state decay A_log of Mamba-1. Megatron's rule, all that is 2-D but
embedding and output layer, would orthogonalize A_log.

A fused projection is one matrix, but for those that are projections of their own in ArchScale's models: queries, keys
and values of attention (`--muon-no-split-qkv`: one matrix, as in July 2025), and all of a gated delta net's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.optimizer.emerging_optimizers import EmergingOptimizerEntry, TensorParallelMuon, _kwargs_from_config
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from archscale_megatron.mup.classes import MATRICES, ParameterClass, parameter_class
from archscale_megatron.optimizers.muonh import ADAMH, MuonH


def optimizer_of(name: str, parameter: Any, optimizer: str) -> str:
    """The optimizer of one parameter in a run with `--optimizer OPTIMIZER`: that, or "adam", or "adamh".

    Args:
        name: within the model or its wrappers, with local or global numbers of layers and experts.
        parameter: this rank's part of it.
    Raises:
        ValueError: `name` has no class.
    """
    kind = parameter_class(name)
    if optimizer not in ("muon", "muonh") or kind in MATRICES:
        return optimizer
    embedding = kind is ParameterClass.EMBEDDING or getattr(parameter, "shared_embedding", False)
    return ADAMH if optimizer == "muonh" and parameter.dim() == 2 and not embedding else "adam"


def overrides(optimizer: str) -> dict[ParamKey, dict[str, str]]:
    """What Megatron's parameter groups have in common with the optimizer that they go to.

    A checkpoint's groups are told apart by their `optimizer`, among others; matrices go without.
    """
    values = {"adam": {"optimizer": "adam"}, ADAMH: {"optimizer": optimizer, "algorithm": ADAMH}}

    def goes_to(other: str, parameter: Any, name: str) -> bool:
        return optimizer_of(name, parameter, optimizer) == other

    return {
        ParamKey(
            with_name_predicate=ParamWithNamePredicate(name=f"{optimizer}: {other}", fn=partial(goes_to, other))
        ): v
        for other, v in values.items()
    }


def entries() -> dict[str, EmergingOptimizerEntry]:
    """Muon and MuonH for Megatron's registry of optimizers (core/optimizer/emerging_optimizers.py)."""
    return {
        "muon": EmergingOptimizerEntry(
            TensorParallelMuon, config_to_kwargs=_muon_arguments, default_param_overrides=overrides("muon")
        ),
        "muonh": EmergingOptimizerEntry(
            MuonH, config_to_kwargs=_muonh_arguments, default_param_overrides=overrides("muonh")
        ),
    }


def _muon_arguments(config: Any, model_chunks: list[Any], pg_collection: Any) -> dict[str, Any]:
    for chunk in model_chunks:
        for name, parameter in chunk.named_parameters():
            if name.endswith("linear_qkv.weight"):  # Megatron has marked it, a gated delta net has marked its own
                parameter.is_qkv = config.muon_split_qkv
    return _kwargs_from_config(TensorParallelMuon, "muon", config) | {
        "split_qkv": True,
        "is_qkv_fn": lambda parameter: getattr(parameter, "is_qkv", False),
        "pg_collection": pg_collection,
    }


def _muonh_arguments(config: Any, model_chunks: list[Any], pg_collection: Any) -> dict[str, Any]:
    for chunk in model_chunks:
        for name, parameter in chunk.named_parameters():
            if optimizer_of(name, parameter, "muonh") != "adam" and not parameter.any():
                raise ValueError(
                    f"MuonH keeps the norm of {name}, which is zero: it would never change; "
                    "give it initial values that are not zero, or use another optimizer"
                )
    muon = _muon_arguments(config, model_chunks, pg_collection)
    return muon | {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps}
