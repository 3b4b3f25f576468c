"""Run directories with small models of random parameters, as training leaves them, and a tokenizer of 2,000 ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from archscale_megatron import single_process
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.checkpoint.tensors import write_release
from archscale_megatron.hf import archscale
from tests.data.models import train_bpe
from tests.lively import lively_values

CONTEXT = 96  # tokens that the models were trained on


def write_run(directory: Path, family: str, tokenizer: str, depth: int = 8, **options: Any) -> Path:
    """A run directory of a model of width 40, windows of 8 tokens."""
    single_process.prepare()
    arch = build_architecture(
        family, depth, aspect_ratio=40 // depth, head_dim=8, num_heads=8, num_kv_heads=4, local_window=8,
        context_length=CONTEXT, vocab_size=2000, tied_embeddings=False, **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    shapes = {name: shape for one in archscale.maps(arch) for name, shape in one.megatron_shapes().items()}
    tensors = ((name, lively_values(name, shape, generator)) for name, shape in sorted(shapes.items()))
    described = {
        "format": 1,
        "tokenizer": {"type": "HuggingFaceTokenizer", "model": tokenizer},
        "options": {"max_position_embeddings": CONTEXT},
    }
    write_release(directory, arch, tensors, described)
    return directory


def write_tokenizer(directory: Path, **config: Any) -> str:
    """The directory of a byte-level BPE tokenizer with an end of text, and with what `config` adds."""
    return train_bpe(directory, **config)
