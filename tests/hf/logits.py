"""The logits of exported models beside those of Megatron's.

    python -m tests.hf.logits

prints a table for the documentation: the largest difference over the largest logit, of checkpoints from every layout,
in fp32.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from archscale_megatron.hf.auto import register
from archscale_megatron.hf.export import export
from archscale_megatron.hf.folder import HFFolder
from tests.hf import phi4flash_reference
from tests.hf.cases import MODELS, directory_of, tokens
from tests.launch import torchrun

Case = tuple[str, bool]
"""A model, and whether its embeddings are tied."""
CASES: list[Case] = [(model, tied) for model in MODELS for tied in (True, False)]
LAYOUTS = {"single": (1, 1), "stp2": (2, 1), "pp2": (1, 2), "stp2_pp2": (2, 2)}
"""Tensor (with sequence) and pipeline parallelism."""


def save(directory: Path, cases: Sequence[Case], layout: str = "stp2_pp2") -> None:
    """Make the checkpoints, each rank its part."""
    tensor, pipeline = LAYOUTS[layout]
    names = (directory_of(*case) for case in cases)
    torchrun(tensor * pipeline, "-m", "tests.hf.worker", str(directory), f"{tensor},{pipeline}", *names)


@torch.no_grad()
def exported(directory: Path, case: Case) -> tuple[str, float]:
    """Export the checkpoint of `case` into DIRECTORY/CASE.hf; the format, and the difference of the logits."""
    run = directory / directory_of(*case)
    folder = directory / f"{run.name}.hf"
    format = export(run, folder)
    expected = torch.load(run / "logits.pt")
    got = (phi4flash_logits if format == "phi4flash" else transformers_logits)(folder)
    assert got.shape == expected.shape and expected.abs().max() > 0.1
    return format, ((got - expected).abs().max() / expected.abs().max()).item()


def transformers_logits(folder: Path) -> Tensor:
    register()
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()(tokens()).logits


def phi4flash_logits(folder: Path) -> Tensor:
    """The public code needs a GPU: those of a model written from its names and config, in float64."""
    found = HFFolder(folder)
    weights = {name: found.read(name).double() for name in found.names()}
    return torch.stack([phi4flash_reference.logits(found.config, weights, row) for row in tokens()])


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        for layout in LAYOUTS:
            save(Path(temporary, layout), CASES, layout)
        print(f"| model | exported as | {' | '.join(LAYOUTS)} |\n|---|---|{'---|' * len(LAYOUTS)}")
        for model in MODELS:
            cells = []
            for layout in LAYOUTS:
                (format, tied), (_, untied) = (
                    exported(Path(temporary, layout), (model, tied)) for tied in (True, False)
                )
                cells.append(f"{tied:.1e}, {untied:.1e}")
            print(f"| {model} | {format} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
