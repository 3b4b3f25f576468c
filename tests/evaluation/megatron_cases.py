"""Tiny models of many kinds, as checkpoints of one process, and what engines are asked of them."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from archscale_megatron.checkpoint.tensors import write_release
from archscale_megatron.evaluation.engine import Sampling
from archscale_megatron.hf import archscale
from archscale_megatron.hf.modeling_archscale import ArchScaleForCausalLM
from tests.hf import models

# GMUs and shared keys and values, windows, differential attention, biases and sinks, gated delta nets, experts.
CASES = [
    ("sambay", True), ("samba", False), ("phi4miniflash", True), ("transformer with options", False), ("gdny", True),
    ("sambay_gqa4_moe", True),
]  # fmt: skip
CONTINUED = [CASES[0], CASES[-1]]
"""Models that also write."""
LAYOUTS = {(2, 2): CASES, (2, 1): CASES[:1], (1, 2): CASES[-1:]}
"""(tensor, pipeline) parallel sizes on four processes -> models."""
CONTEXT, BATCH_SIZE = 24, 2  # some sequences are longer; several batches
GREEDY = Sampling(max_new_tokens=5)
SAMPLED = Sampling(max_new_tokens=5, temperature=0.8, top_k=9, top_p=0.95, seed=3)


def directory_of(model: str, tied: bool) -> str:
    return f"{model.replace(' ', '-')}.{'tied' if tied else 'untied'}"


def write(directory: Path, model: str, tied: bool) -> ArchScaleForCausalLM:
    """A run directory, and the model in it, in float64, of a class that knows nothing of Megatron."""
    arch = models.architecture(model, tied)
    whole = models.build(arch, torch.float32)
    state, tensors = whole.state_dict(), {}
    for one in archscale.maps(arch):
        tensors |= zip(one.megatron, one.to_megatron([state[name] for name in one.hf]), strict=True)
    run = {
        "format": 1,
        "options": {"max_position_embeddings": CONTEXT},
        "tokenizer": {"type": "ByteLevelTokenizer", "model": None},
    }
    write_release(directory / directory_of(model, tied), arch, tensors.items(), run)
    return whole.double()


def requests() -> tuple[list[list[int]], list[int]]:
    """Sequences of many lengths, among them some that begin alike, and the first token of each that is scored."""
    draw = random.Random(5)
    sequences = [[draw.randrange(models.VOCABULARY) for _ in range(draw.randrange(2, 40))] for _ in range(11)]
    first = [draw.randrange(1, len(sequence)) for sequence in sequences]
    shared = sequences[0][:4]
    sequences += [[*shared, token] for token in (1, 2, 3)] + [
        shared,
        shared,
    ]  # one-token answers; one that is all there
    return sequences, [*first, 4, 4, 4, 3, 1]


def prompts() -> list[list[int]]:
    return [sequence[: 1 + 3 * i] for i, sequence in enumerate(requests()[0][:5])]
