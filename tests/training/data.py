"""A small indexed dataset of real text, one token a byte."""

from __future__ import annotations

import string
import sysconfig
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

VOCABULARY, END_OF_DOCUMENT = 128, 127


def write_dataset(prefix: Path, documents: int = 40, characters: int = 4000) -> Path:
    """Write the beginnings of modules of the standard library as `prefix`.bin and .idx; returns `prefix`."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:documents]
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for source in sources:
        text = "".join(c for c in source.read_text(errors="ignore")[:characters] if c in string.printable)
        tokens = torch.tensor([*text.encode(), END_OF_DOCUMENT])
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix
