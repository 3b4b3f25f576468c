"""Do the sizes of activations, and of their changes in training, stay the same as a model gets wider or deeper?

Of each quantity and step that `mup.coordinates` measures, the slope of log(size) against log(width), and against
log(depth), by least squares. What a slope may be follows from arXiv 2203.03466 (appendix J) for widths and from arXiv
2310.02244 for depths; see `limits`. All models have heads of the same size, and as many as the width needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from archscale_megatron.archs.architecture import MOE, Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.mup.rules import Parametrization

Axis = Literal["width", "depth"]
Model = tuple[int, int]  # width and depth

EMBEDDING, STREAM, LOGITS = "embedding", "residual stream", "logits"  # besides the kinds of layer
VOCABULARY = 256  # bytes
SEQUENCE = 64  # tokens
HEAD_DIM = 8
TOLERANCE = 0.25
"""How far a slope may lie from what theory says of it. One seed's slopes under μP++ have standard deviations up to 0.15
over six seeds (attention's changes against the width, sambay, 64 to 256 wide); the mean of four has half of it."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is compared.

    Attributes:
        family, tied: of the models.
        parametrization: of all of them; its ratio of widths and its base head size are set for each model.
        widths, depths: sizes, at least one of each; the least of each are those of the base model.
        steps, learning_rate: of the base model's training; that of the others follows from the parametrisation.
        seeds: of the initial values, over which sizes are averaged.
    """

    family: str
    parametrization: Parametrization
    widths: Sequence[int]
    depths: Sequence[int]
    tied: bool = False
    steps: int = 4
    seeds: int = 4
    learning_rate: float = 2e-3

    @property
    def axes(self) -> dict[Axis, list[Model]]:
        """The models of each axis along which there are several, smallest first."""
        width, depth = min(self.widths), min(self.depths)
        models: dict[Axis, list[Model]] = {
            "width": [(w, depth) for w in sorted(set(self.widths))],
            "depth": [(width, d) for d in sorted(set(self.depths))],
        }
        return {axis: of_axis for axis, of_axis in models.items() if len(of_axis) > 1}

    @property
    def models(self) -> list[Model]:
        """Each once."""
        return list(dict.fromkeys(model for of_axis in self.axes.values() for model in of_axis))

    @property
    def architectures(self) -> dict[Model, Architecture]:
        """Of each model; raises ValueError for one that the family cannot have."""
        return {model: architecture(self.family, *model, self.tied) for model in self.models}


@dataclass(frozen=True)
class Sizes:
    """Root mean squares over all elements, and all layers of a kind.

    Attributes:
        initial: quantity -> size before the first step.
        changes: quantity -> size of the change from there, after step 1, 2, ...
    """

    initial: dict[str, float]
    changes: dict[str, list[float]]

    def at(self, quantity: str, step: int) -> float:
        """The initial size at step 0, that of the change after `step` steps otherwise."""
        return self.changes[quantity][step - 1] if step else self.initial[quantity]


@dataclass(frozen=True)
class Slope:
    """Of the logarithm of a size against that of the models' widths or depths.

    Attributes:
        step: 0 is the size of the initial values, later ones of the change from them.
        sizes: of the models in their order, mean over the seeds.
        value: None where a size is 0: an untied output layer starts from 0, and then the others do not move at once.
        lower, upper: what it may be; infinite where nothing is asked.
    """

    axis: Axis
    quantity: str
    step: int
    sizes: list[float]
    value: float | None
    lower: float
    upper: float

    @property
    def passed(self) -> bool:
        """A size that is not finite fails, whatever is asked of it."""
        if not all(map(math.isfinite, self.sizes)):
            return False
        return self.value is None or self.lower <= self.value <= self.upper


def architecture(family: str, width: int, depth: int, tied: bool) -> Architecture:
    """A tiny model of `family`.

    Groups of query heads share keys and values as in the family: groups of the same size at every width, or,
    where the family has as many key-value heads at every depth, as many at every width.

    Raises:
        ValueError: a family, width or depth that cannot be.
    """
    whole, deeper = (build_architecture(family, d) for d in (16, 32))
    kv_heads, group = whole.num_query_groups, whole.num_attention_heads // whole.num_query_groups
    same_number = deeper.num_query_groups == kv_heads
    pairs = 2 if whole.differential_attention else 1
    multiple = HEAD_DIM * (kv_heads if same_number else group * pairs)
    if width < 1 or width % multiple:
        raise ValueError(f"--widths {width}: with heads of {HEAD_DIM} channels, {family} needs multiples of {multiple}")
    heads = width // HEAD_DIM
    experts: dict[str, Any] = {"sparsity": 4, "top_k": 2} if MOE in whole.pattern else {}
    arch = build_architecture(
        family,
        depth,
        head_dim=HEAD_DIM,
        num_heads=heads,
        num_kv_heads=kv_heads if same_number else heads // group,
        local_window=SEQUENCE // 4,
        context_length=SEQUENCE,
        vocab_size=VOCABULARY,
        tied_embeddings=tied,
        **experts,
    )
    return replace(
        arch,
        hidden_size=width,
        ffn_hidden_size=4 * width,
        mamba2_state_size=16,
        mamba2_head_dim=HEAD_DIM,
        gdn_head_dim=2 * HEAD_DIM,
    )


def limits(axis: Axis, quantity: str, step: int) -> tuple[float, float]:
    """The least and the largest slope of a quantity, `step` 0 at the start and after the last step otherwise.

    With the width, no initial size may grow, and that of the logits may shrink. Changes have the same size at every
    width: where they shrink, a part of a wide model does not learn.

    With the depth this holds of the residual stream as a whole, and what depends on one learning rate, the logits of an
    output layer that starts from 0, may shrink with it as 1 / sqrt(depth). A layer's own change may shrink more: it is
    one of many.
    """
    whole = quantity in (STREAM, LOGITS)
    if step == 0:
        return -math.inf, TOLERANCE if axis == "width" or whole else math.inf
    if axis == "width":
        return -TOLERANCE, TOLERANCE
    return -0.5 - TOLERANCE if whole else -math.inf, TOLERANCE


def slopes(setting: Setting, measured: Mapping[Model, Sequence[Sizes]]) -> list[Slope]:
    """Of every quantity that all models of an axis have, at every step; only the first and the last have limits."""
    return [
        slope for axis, models in setting.axes.items() for slope in _slopes_of_axis(setting, measured, axis, models)
    ]


def _slopes_of_axis(
    setting: Setting, measured: Mapping[Model, Sequence[Sizes]], axis: Axis, models: list[Model]
) -> Iterator[Slope]:
    positions = [width if axis == "width" else depth for width, depth in models]
    for quantity in measured[models[-1]][0].initial:
        if not all(quantity in measured[model][0].initial for model in models):
            continue
        for step in range(setting.steps + 1):
            sizes = [float(np.mean([run.at(quantity, step) for run in measured[model]])) for model in models]
            judged = step in (0, setting.steps)
            lower, upper = limits(axis, quantity, step) if judged else (-math.inf, math.inf)
            yield Slope(axis, quantity, step, sizes, log_slope(positions, sizes), lower, upper)


def log_slope(positions: Sequence[float], sizes: Sequence[float]) -> float | None:
    """b of log(size) = a + b log(position) by least squares; None if a size has no logarithm."""
    if not all(math.isfinite(size) and size > 0 for size in sizes):
        return None
    return float(np.polyfit(np.log(positions), np.log(sizes), 1)[0])
