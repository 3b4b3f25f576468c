"""Sizes of activations in the first steps of training: what a parametrisation keeps independent of the model's size.

A coordinate check (arXiv 2203.03466, appendix D.1) trains a tiny model for a few steps on one batch. Of each quantity
x, the output of a kind of layer say, it notes the root mean square of x at the start, and of x_t - x_0 after t steps.
"""

from __future__ import annotations

import math
import sysconfig
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor, nn

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.show import name_of
from archscale_megatron.model.config import config_of
from archscale_megatron.model.spec import build_model
from archscale_megatron.mup.coordinate_check import (
    EMBEDDING,
    HEAD_DIM,
    LOGITS,
    SEQUENCE,
    STREAM,
    Model,
    Setting,
    Sizes,
)
from archscale_megatron.mup.overrides import optimizer_overrides
from archscale_megatron.mup.rules import Parametrization

BATCH = 8  # sequences
WEIGHT_DECAY, CLIP, BETAS = 0.1, 1.0, (0.9, 0.95)  # arXiv 2507.06607's


def standard_library() -> Tensor:
    """The batch of every model: int64 [BATCH, SEQUENCE + 1], bytes of this Python's standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)
    starts = range(0, len(text) - SEQUENCE, len(text) // BATCH)[:BATCH]
    return torch.tensor([list(text[start : start + SEQUENCE + 1]) for start in starts])


def measure_all(setting: Setting, progress: Callable[[], object] = lambda: None) -> dict[Model, list[Sizes]]:
    """The sizes of each model, one a seed; `progress` is called `steps + 1` times for each of these.

    Needs Megatron's process groups, of one process.

    Raises:
        ValueError: a model that the family cannot have, before any of them trains.
    """
    base_width, base_depth = min(setting.widths), min(setting.depths)
    tokens = standard_library()
    measured = {}
    for (width, depth), arch in setting.architectures.items():
        parametrization = replace(setting.parametrization, width_ratio=width / base_width, base_head_dim=HEAD_DIM)
        shrink = math.sqrt(base_depth / depth) if parametrization.scales_with_depth else 1.0
        measured[width, depth] = [
            measure(arch, parametrization, setting.learning_rate * shrink, setting.steps, seed, tokens, progress)
            for seed in range(1, setting.seeds + 1)
        ]
    return measured


def measure(
    arch: Architecture,
    parametrization: Parametrization,
    learning_rate: float,
    steps: int,
    seed: int,
    tokens: Tensor,
    progress: Callable[[], object] = lambda: None,
) -> Sizes:
    """Train `arch` for `steps` steps of AdamW on `tokens`, in fp32.

    Needs Megatron's process groups, of one process.

    Args:
        arch: without the multipliers of `parametrization`, which are applied here.
        learning_rate: of the vector-like parameters; `parametrization` says what the others have.
        seed: of the initial values.
        tokens: int64 [b, s + 1].
        progress: called after each forward pass, `steps + 1` times.
    """
    config = config_of(parametrization.apply(arch), parametrization=parametrization)
    model = build_model(config, padded_vocab_size=arch.vocab_size, max_sequence_length=tokens.shape[1], seed=seed)
    chunk = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    optimizer = _optimizer(chunk, parametrization, learning_rate)
    tokens = tokens.to(torch.cuda.current_device())
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(inputs.shape[1], device=tokens.device).expand_as(inputs)
    recorder = Recorder(model)
    for step in range(steps + 1):
        recorder.begin()
        loss = chunk(inputs, positions, None, labels=labels).mean()
        progress()
        if step < steps:
            chunk.zero_grad_buffer()
            optimizer.zero_grad()
            loss.backward()
            chunk.finish_grad_sync()
            optimizer.step()
    return recorder.sizes()


def _optimizer(chunk: DistributedDataParallel, parametrization: Parametrization, learning_rate: float) -> Any:
    """Megatron's AdamW at a constant learning rate."""
    config = OptimizerConfig(
        optimizer="adam", lr=learning_rate, weight_decay=WEIGHT_DECAY, clip_grad=CLIP,
        adam_beta1=BETAS[0], adam_beta2=BETAS[1],
    )  # fmt: skip
    overrides = optimizer_overrides(parametrization, config)
    optimizer = get_megatron_optimizer(config, [chunk], config_overrides=overrides)
    # It is the scheduler that gives each group its own learning rate.
    OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=learning_rate, min_lr=0.0, lr_warmup_steps=0, lr_decay_steps=1,
        lr_decay_style="constant", start_wd=WEIGHT_DECAY, end_wd=WEIGHT_DECAY, wd_incr_steps=1,
        wd_incr_style="constant",
    )  # fmt: skip
    return optimizer


class Recorder:
    """Notes, in every forward pass of `model`, the outputs of its embedding, of each kind of mixer (before they are
    added to the residual stream), of the whole stream before the last norm, and of the output layer."""

    def __init__(self, model: Any) -> None:
        self._first: dict[nn.Module, Tensor] = {}
        self._passes: list[dict[str, list[Tensor]]] = []
        self._hook(model.embedding, EMBEDDING)
        for symbol, layer in zip(model.config.architecture.pattern, model.decoder.layers, strict=True):
            self._hook(layer.mixer, name_of(symbol))
        model.decoder.final_norm.register_forward_pre_hook(lambda module, inputs: self._note(module, STREAM, *inputs))
        self._hook(model.output_layer, LOGITS)

    def begin(self) -> None:
        """A forward pass follows."""
        self._passes.append(defaultdict(list))

    def sizes(self) -> Sizes:
        first, *later = [{name: float(torch.stack(x).mean().sqrt()) for name, x in p.items()} for p in self._passes]
        return Sizes(first, {name: [sizes[name] for sizes in later] for name in first})

    def _hook(self, module: nn.Module, quantity: str) -> None:
        module.register_forward_hook(lambda module, _, output: self._note(module, quantity, output))

    @torch.no_grad()
    def _note(self, module: nn.Module, quantity: str, output: Any) -> None:
        value, bias = output if isinstance(output, tuple) else (output, None)
        value = (value if bias is None else value + bias).detach()
        if len(self._passes) == 1:
            self._first[module] = value.clone()  # Megatron's loss writes over the logits
        else:
            value = value - self._first[module]
        self._passes[-1][quantity].append(value.double().square().mean())
