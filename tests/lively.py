"""Parameters with which nothing in a model is negligible, for models of Megatron's and of transformers' names."""

import math

import torch
from torch import Generator, Tensor


def lively_values(name: str, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Values of a parameter with which no layer is negligible, unlike the initial ones, nor any factor next to 1."""
    normal, uniform = (draw(shape, generator=generator) for draw in (torch.randn, torch.rand))
    if "embed" in name:
        return 0.05 * normal  # small: the norm's epsilon counts
    if name.endswith(".D") or ("norm" in name and name.endswith("weight")):
        return 1 + 0.3 * normal
    if name.endswith("A_log"):
        return (0.5 + 15.5 * uniform).log()
    if name.endswith(("dt_proj.bias", "dt_bias")):  # steps of 1e-3 to 0.1
        return (uniform * math.log(100) + math.log(1e-3)).exp().expm1().log()
    if ".conv1d." in name:
        return 0.5 * normal
    if ".lambda_" in name:  # a lambda near 1 would make the first token's difference all but 0, and its norm rough
        return 0.1 * normal
    if len(shape) == 1:  # other biases, sinks
        return normal
    return normal / math.sqrt(shape[1])
