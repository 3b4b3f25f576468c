"""Megatron's optimizer groups from a parametrisation: learning rate and weight decay of each class of parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from archscale_megatron.mup.classes import ParameterClass, parameter_class
from archscale_megatron.mup.rules import Parametrization

Overrides = dict[ParamKey, dict[str, Any]]


def optimizer_overrides(parametrization: Parametrization, config: OptimizerConfig) -> Overrides:
    """One predicate a class; classes that are treated alike end up in one group.

    They take the place of Megatron's own (no weight decay of biases and vectors), which `get_megatron_optimizer` adds
    only where it is given none. Adam's epsilon is the same for all: ArchScale does not scale it.
    """
    return {_of_class(kind): _group(parametrization, kind, config) for kind in ParameterClass}


def _of_class(kind: ParameterClass) -> ParamKey:
    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=kind.value, fn=partial(_is_of_class, kind)))


def _is_of_class(kind: ParameterClass, parameter: Any, name: str) -> bool:
    return parameter_class(name) is kind


def _group(parametrization: Parametrization, kind: ParameterClass, config: OptimizerConfig) -> dict[str, Any]:
    """What differs from the run's own; the learning rate that is logged is that of the groups without their own."""
    multiplier = parametrization.learning_rate_multiplier(kind)
    group: dict[str, Any] = {}
    if multiplier != 1:
        group = {"max_lr": multiplier * config.lr, "min_lr": multiplier * (config.min_lr or 0.0)}
    if (decay := parametrization.weight_decay_multiplier(kind)) != 1:
        group["wd_mult"] = decay
    return group
