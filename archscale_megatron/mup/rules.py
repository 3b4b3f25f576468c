"""SP, μP, μP++ and HyperP as data: class of a parameter -> (initial values, learning rate, weight decay).

Table 6 of arXiv 2507.06607, in the terms of ArchScale's code of July 2025 (e77b786). `w` is the hidden size over that
of the base model, L the number of layers (each a mixer and an MLP):

                      SP                    μP                   μP++                      HyperP
    embedding init    N(0, 0.02^2) tied, N(0, 1e-4^2) untied
    output init       N(0, 0.02^2)          0                    0                         N(0, 0.02^2)
    matrix init       N(0, 0.02^2)          U(±1/sqrt(fan_in))   U(±1/sqrt(fan_in))        U(±1/sqrt(fan_in))
      last of branch  / sqrt(2L)            / sqrt(2L) if tied   / sqrt(2L) if tied        / sqrt(2L) if tied
    vector LR         1                     1                    1                         1
    matrix LR         1                     1/w                  1/w                       1
    all LRs by depth  1                     1                    sqrt(d0/d)                sqrt(d0/d)
    vector decay      yes                   yes                  no                        no
    matrix decay      yes                   yes                  yes                       no
    logits            1                     1/w                  1/w                       1
    residual branches 1                     1                    1/sqrt(2L)                1/sqrt(2L)
    softmax scale     1/sqrt(d)             sqrt(d0)/d           sqrt(d0)/d                sqrt(d0)/d

The last row is in head sizes.

HyperP (arXiv 2603.28743) is for MuonH, which keeps the norm of every matrix. The release "2026-03" of ArchScale
(df4e070) starts an untied output layer from N(0, 0.02^2) and convolutions without bias, and gives Muon's matrices the
learning rate of the vectors. Its slips are not copied: SP without the 1/sqrt(2L), and that factor on more than last
projections when tied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from archscale_megatron.archs.architecture import MAMBA1, MAMBA2, Architecture
from archscale_megatron.mup.classes import ParameterClass, parameter_class
from archscale_megatron.mup.distributions import (
    Distribution,
    constant,
    inverse_softplus_of_step,
    log_range,
    log_uniform,
    normal,
    uniform,
)

Name = Literal["sp", "mup", "mup++", "hyperp"]
Release = Literal["2025-07", "2026-03"]
C = ParameterClass
NAMES: tuple[Name, ...] = ("sp", "mup", "mup++", "hyperp")
RELEASES: tuple[Release, ...] = ("2025-07", "2026-03")


@dataclass(frozen=True)
class Whole:
    """A parameter as the whole model has it: its global name and shape, and the model."""

    name: str
    shape: tuple[int, ...]
    arch: Architecture


@dataclass(frozen=True)
class Parametrization:
    """How a run scales its initial values, learning rates and weight decay with the size of the model.

    Attributes:
        name: "sp", "mup" (widths alone), "mup++" (and depths), "hyperp".
        width_ratio: hidden size over that of the base model; d / d0 where the width is in proportion to the depth.
        base_head_dim: head size at which attention logits are q.k / sqrt(head size).
        init_scale: factor of the matrices' bounds (ArchScale's w_init0).
        release: of ArchScale, whose rules these are.
        muon: matrices are updated by Muon or MuonH.
        independent_weight_decay: decay is the same of all classes that have any, whatever their learning rates.
    """

    name: Name = "sp"
    width_ratio: float = 1.0
    base_head_dim: int = 128
    init_scale: float = 1.0
    release: Release = "2025-07"
    muon: bool = False
    independent_weight_decay: bool = False

    @property
    def scales_with_depth(self) -> bool:
        """Whether learning rates have a factor sqrt(d0/d), and residual branches one of 1/sqrt(2L)."""
        return self.name in ("mup++", "hyperp")

    @property
    def rules(self) -> Mapping[ParameterClass, Rule]:
        """The table."""
        table = TABLES[self.name]
        return table if self.release == "2025-07" else {**table, **CHANGES_OF_2026[self.name]}

    def initial(self, name: str, shape: tuple[int, ...], arch: Architecture) -> Distribution:
        """The distribution of the parameter `name` (global numbers) of `arch`, whose whole shape is `shape`."""
        return self.rules[parameter_class(name)].init(Whole(name, shape, arch), self)

    def learning_rate_multiplier(self, kind: ParameterClass) -> float:
        """Of the run's learning rate, for parameters of this class."""
        if self.muon and self.release == "2026-03":
            return 1.0  # an orthogonal update has the right size at every width
        return 1 / self.width_ratio if self.rules[kind].learning_rate == "1/w" else 1.0

    def decays(self, kind: ParameterClass) -> bool:
        """Whether parameters of this class have weight decay."""
        return self.rules[kind].weight_decay

    def weight_decay_multiplier(self, kind: ParameterClass) -> float:
        """Of the run's weight decay, by which AdamW multiplies the learning rate, for parameters of this class."""
        if not self.decays(kind):
            return 0.0
        return 1 / self.learning_rate_multiplier(kind) if self.independent_weight_decay else 1.0

    def apply(self, arch: Architecture) -> Architecture:
        """`arch` with the forward multipliers of this parametrisation."""
        if self.name == "sp":
            return arch
        output = 1.0 if self.name == "hyperp" else 1 / self.width_ratio
        return replace(
            arch,
            logit_multiplier=output,
            residual_multiplier=1 / math.sqrt(2 * arch.depth) if self.scales_with_depth else 1.0,
            softmax_scale=math.sqrt(self.base_head_dim) / arch.head_dim,
            router_multiplier=1.0 if self.muon else output,
        )


Init = Callable[[Whole, Parametrization], Distribution]


@dataclass(frozen=True)
class Rule:
    """Of one class: initial values, factor of the learning rate, weight decay or none."""

    init: Init
    learning_rate: Literal["1", "1/w"]
    weight_decay: bool


def _embedding(whole: Whole, _: Parametrization) -> Distribution:
    return normal(0.02 if whole.arch.tied_embeddings else 1e-4)


def _normal(whole: Whole, _: Parametrization) -> Distribution:
    return normal(0.02)


def _normal_over_depth(whole: Whole, _: Parametrization) -> Distribution:
    return normal(0.02 / math.sqrt(2 * whole.arch.depth))


def _fan_in(whole: Whole, run: Parametrization) -> Distribution:
    """torch's own for linear layers; `whole.shape` is [out, in], over all ranks."""
    return uniform(run.init_scale / math.sqrt(whole.shape[1]))


def _fan_in_last(whole: Whole, run: Parametrization) -> Distribution:
    """With tied embeddings ArchScale divides last projections by sqrt(2L) at the start, besides the multiplier."""
    depth = 2 * whole.arch.depth if whole.arch.tied_embeddings else 1
    return uniform(run.init_scale / math.sqrt(whole.shape[1] * depth))


def _zero(*_: object) -> Distribution:
    return constant(0.0)


def _one(*_: object) -> Distribution:
    return constant(1.0)


def _norm(whole: Whole, _: Parametrization) -> Distribution:
    return constant(0.0 if whole.name.endswith("bias") else 1.0)


def _conv(whole: Whole, _: Parametrization) -> Distribution:
    """torch's own for depthwise convolutions, weight and bias."""
    return uniform(whole.arch.conv_kernel**-0.5)


def _conv_without_bias(whole: Whole, run: Parametrization) -> Distribution:
    return constant(0.0) if whole.name.endswith("bias") else _conv(whole, run)


def _step_bias(*_: object) -> Distribution:
    return inverse_softplus_of_step()


def _decay(whole: Whole, _: Parametrization) -> Distribution:
    """A_log of Mamba-1 (one a channel and state), of Mamba-2 and of gated delta nets (one a head)."""
    mixer = whole.arch.pattern[int(whole.name.split(".")[2])]
    if mixer == MAMBA1:
        return log_range(whole.shape[1])
    return log_uniform(1.0 if mixer == MAMBA2 else 0.0, 16.0)


def _lambda(*_: object) -> Distribution:
    return normal(0.1)


def _vectors(weight_decay: bool) -> dict[ParameterClass, Rule]:
    """All that scales like a vector with the width, embedding and output layer apart."""
    inits: dict[ParameterClass, Init] = {
        C.NORM: _norm, C.BIAS: _zero, C.CONV: _conv, C.STEP_BIAS: _step_bias, C.DECAY: _decay, C.SKIP: _one,
        C.LAMBDA: _lambda, C.SINK: _zero,
    }  # fmt: skip
    return {kind: Rule(init, "1", weight_decay) for kind, init in inits.items()}


TABLES: Mapping[Name, Mapping[ParameterClass, Rule]] = MappingProxyType(
    {
        "sp": {
            C.EMBEDDING: Rule(_embedding, "1", True),
            C.OUTPUT: Rule(_normal, "1", True),
            C.MATRIX: Rule(_normal, "1", True),
            C.LAST_MATRIX: Rule(_normal_over_depth, "1", True),
            C.ROUTER: Rule(_normal, "1", True),
            **_vectors(weight_decay=True),
        },
        "mup": {
            C.EMBEDDING: Rule(_embedding, "1", True),
            C.OUTPUT: Rule(_zero, "1", True),
            C.MATRIX: Rule(_fan_in, "1/w", True),
            C.LAST_MATRIX: Rule(_fan_in_last, "1/w", True),
            C.ROUTER: Rule(_normal, "1/w", True),
            **_vectors(weight_decay=True),
        },
        "mup++": {
            C.EMBEDDING: Rule(_embedding, "1", False),
            C.OUTPUT: Rule(_zero, "1", False),
            C.MATRIX: Rule(_fan_in, "1/w", True),
            C.LAST_MATRIX: Rule(_fan_in_last, "1/w", True),
            C.ROUTER: Rule(_normal, "1/w", True),
            **_vectors(weight_decay=False),
        },
        "hyperp": {
            C.EMBEDDING: Rule(_embedding, "1", False),
            C.OUTPUT: Rule(_normal, "1", False),
            C.MATRIX: Rule(_fan_in, "1", False),
            C.LAST_MATRIX: Rule(_fan_in_last, "1", False),
            C.ROUTER: Rule(_fan_in, "1", False),
            **_vectors(weight_decay=False),
        },
    }
)
CHANGES_OF_2026: Mapping[Name, Mapping[ParameterClass, Rule]] = {
    name: {
        C.OUTPUT: replace(table[C.OUTPUT], init=_normal),
        C.CONV: replace(table[C.CONV], init=_conv_without_bias),
    }
    for name, table in TABLES.items()
}
