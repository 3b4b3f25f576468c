"""What each parameter is: its name decides its class, and the class its initial values and its optimizer group."""

from __future__ import annotations

import re
from enum import StrEnum


class ParameterClass(StrEnum):
    """The rows of a parametrisation's table (`mup.rules`)."""

    EMBEDDING = "embedding"
    OUTPUT = "output layer"
    MATRIX = "matrix"
    LAST_MATRIX = "last matrix"
    ROUTER = "router"
    NORM = "norm"
    BIAS = "bias"
    CONV = "convolution"
    STEP_BIAS = "step bias"
    DECAY = "state decay"
    SKIP = "skip"
    LAMBDA = "lambda"
    SINK = "sink"


C = ParameterClass
MATRICES = (C.MATRIX, C.LAST_MATRIX, C.ROUTER)
"""Both sides grow with the width (the router's output does not). All other classes are vector-like."""

# Class -> the ends of its parameters' names. "last" is the projection whose output is added to the residual stream. The
# experts of a grouped product are weight0, weight1, ...
_ENDS = {
    C.EMBEDDING: r"embedding\.word_embeddings\.weight",
    C.OUTPUT: r"output_layer\.weight",
    C.MATRIX: r"(linear_qkv|linear_q|linear_gate|linear_fc1|in_proj|x_proj|dt_proj)\.weight\d*",
    C.LAST_MATRIX: r"(linear_proj|linear_fc2|out_proj)\.weight\d*",
    C.ROUTER: r"router\.weight",
    C.NORM: r"(norm|final_norm|sub_norm|q_layernorm|k_layernorm)\.(weight|bias)",
    C.BIAS: r"(linear_qkv|linear_q|linear_gate|linear_proj|linear_fc1|linear_fc2|in_proj|out_proj)\.bias",
    C.CONV: r"conv1d\.(weight|bias)",
    C.STEP_BIAS: r"(dt_proj\.bias|dt_bias)",
    C.DECAY: r"A_log",
    C.SKIP: r"mixer\.D",
    C.LAMBDA: r"lambda_[qk][12]",
    C.SINK: r"sink",
}
_PATTERNS = {kind: re.compile(rf"(.*\.)?{end}") for kind, end in _ENDS.items()}


def parameter_class(name: str) -> ParameterClass:
    """The class of the parameter `name`, a name within the model, with local or global numbers of layers and experts.

    Raises:
        ValueError: no class, or several, are the parameter's.
    """
    classes = [kind for kind, pattern in _PATTERNS.items() if pattern.fullmatch(name)]
    if len(classes) != 1:
        found = f"is in the classes {', '.join(classes)}" if classes else "is in no class"
        raise ValueError(f"parameter {name} {found}; mup/classes.py must give it exactly one")
    return classes[0]
