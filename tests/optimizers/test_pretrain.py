"""pretrain_archscale.py with Muon and MuonH: checkpoints resume exactly and at other layouts, and norms are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.launch import torchrun
from tests.training.data import write_dataset
from tests.training.runs import scalars, tensors
from tests.training.test_pretrain import FOUR, STEPS, command, go_back

DISTRIBUTED = "--use-distributed-optimizer"
PLAIN = ("--hidden-dropout", "0", "--attention-dropout", "0")
UNTIED = "--untie-embeddings-and-output-weights"
EXPERTS = (
    "--train-model", "sambay_gqa4_moe", "--aspect-ratio", "9", "--sparsity", "3", "--top-k", "3", "--shared-expert",
    "--sqrt-gate",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "stdlib")


def run(processes: int, data: Path, directory: Path, *options: str) -> dict[int, float]:
    """The losses of a run; Megatron's distributed optimizer is used if `options` has it."""
    arguments = command(data, directory, *PLAIN)
    arguments.remove(DISTRIBUTED)
    torchrun(processes, *arguments, *options)
    return scalars(directory, "lm loss")


def resumes_exactly(processes: int, data: Path, tmp_path: Path, *options: str) -> dict[int, float]:
    losses = run(processes, data, tmp_path / "whole", *options)
    assert losses[STEPS] < losses[1]
    go_back(tmp_path / "whole", tmp_path / "resumed")
    assert run(processes, data, tmp_path / "resumed", *options) == losses
    found, expected = (tensors(tmp_path / name, STEPS) for name in ("resumed", "whole"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    return losses


def test_muonh_resumes(data: Path, tmp_path: Path) -> None:
    """Exactly, and at another layout. The untied output layer's group is empty on the rank that saves the groups."""
    options = ("--optimizer", "muonh", UNTIED, "--lr", "0.01", "--muon-fp32-matmul-prec", "high")
    losses = resumes_exactly(4, data, tmp_path, *options, *FOUR)
    go_back(tmp_path / "whole", tmp_path / "moved")
    assert run(2, data, tmp_path / "moved", *options) == pytest.approx(losses, rel=1e-4)
    first, last = (tensors(tmp_path / "whole", step) for step in (STEPS // 2, STEPS))
    for key in ("output_layer.weight", "decoder.layers.0.mixer.A_log", "decoder.layers.1.mixer.linear_fc1.weight"):
        norms = [state[key].double().norm().item() for state in (first, last)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-6)
        assert not torch.equal(last[key], first[key])


def test_layer_wise_distributed_muon(data: Path, tmp_path: Path) -> None:
    """In bf16, with fp32 parameters among the others; the losses are those without it."""
    options = ("--optimizer", "muon", "--bf16")
    losses = resumes_exactly(2, data, tmp_path, *options, DISTRIBUTED)
    assert run(2, data, tmp_path / "replicated", *options) == pytest.approx(losses, rel=1e-3)


@pytest.mark.slow
def test_bf16_with_experts_resumes(data: Path, tmp_path: Path) -> None:
    options = ("--optimizer", "muonh", "--bf16", "--lr", "0.01", "--expert-model-parallel-size", "2")
    resumes_exactly(2, data, tmp_path, *EXPERTS, *options)
