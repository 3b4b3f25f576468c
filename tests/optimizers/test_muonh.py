"""Muon, MuonH and AdamH against a float64 reference, whole and in tensor-parallel parts; norms are kept."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from archscale_megatron.optimizers.muonh import ADAMH, MuonH
from tests.launch import torchrun
from tests.optimizers.worker import (
    BETAS,
    COLUMN_OF_ADAM,
    EPS,
    LR,
    MATRICES,
    STEPS,
    WEIGHT_DECAY,
    gradient,
    initial,
)

# Of five steps of Newton-Schulz, and the momentum of the Nesterov step.
COEFFICIENTS = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
MOMENTUM = 0.95


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    file = tmp_path_factory.mktemp("muon") / "runs.safetensors"
    torchrun(2, "-m", "tests.optimizers.worker", str(file))
    return load_file(file)


def orthogonal(x: Tensor) -> Tensor:
    """Newton-Schulz: of a x + b (x x') x + c (x x')^2 x, five times."""
    x = x / x.square().sum().sqrt()
    for a, b, c in COEFFICIENTS:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def matrices(name: str, whole: Tensor) -> list[Tensor]:
    """The matrices that are fused in a parameter."""
    rows, groups = MATRICES[name].rows, MATRICES[name].groups
    if not rows:
        return [whole]
    parts: list[list[Tensor]] = [[] for _ in rows]
    start = 0
    for _ in range(groups):
        for part, count in zip(parts, rows, strict=True):
            part.append(whole[start : start + count])
            start += count
    return [torch.cat(part) for part in parts]


def reference(kind: str, name: str) -> list[list[Tensor]]:
    """Each step's matrices of a parameter. Momentum is a sum, as in ArchScale."""
    weights = matrices(name, initial(name).double())
    momentum = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    history = []
    for step in range(STEPS):
        for i, g in enumerate(matrices(name, gradient(name, step).double())):
            w = weights[i]
            if name == COLUMN_OF_ADAM:
                momentum[i] = BETAS[0] * momentum[i] + (1 - BETAS[0]) * g
                second[i] = BETAS[1] * second[i] + (1 - BETAS[1]) * g * g
                mean = momentum[i] / (1 - BETAS[0] ** (step + 1))
                u = mean / ((second[i] / (1 - BETAS[1] ** (step + 1))).sqrt() + EPS)
            else:
                momentum[i] = MOMENTUM * momentum[i] + g
                u = orthogonal(g + MOMENTUM * momentum[i])
            if kind == "muon":
                scale = (w.shape[0] / w.shape[1]) ** 0.5
                weights[i] = w - LR * WEIGHT_DECAY * w - LR * scale * u
            else:
                moved = w - LR * u * w.norm() / u.norm()
                weights[i] = moved * w.norm() / moved.norm()
        history.append(list(weights))
    return history


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", ["muon", "muonh"])
def test_steps_are_those_of_the_reference(runs: dict[str, Tensor], kind: str, tp: int, name: str) -> None:
    if kind == "muon" and name == COLUMN_OF_ADAM:
        assert torch.equal(runs[f"muon.{tp}.{STEPS - 1}.{name}"], initial(name))
        return
    start = matrices(name, initial(name).double())
    for step, expected in enumerate(reference(kind, name)):
        found = matrices(name, runs[f"{kind}.{tp}.{step}.{name}"].double())
        for a, b, before in zip(found, expected, start, strict=True):
            assert (a - b).abs().max() <= 1e-5 * (b - before).abs().max(), step


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("tp", [1, 2])
def test_norms_are_kept(runs: dict[str, Tensor], tp: int, name: str) -> None:
    expected = [m.norm().item() for m in matrices(name, initial(name).double())]
    for step in range(STEPS):
        found = [m.norm().item() for m in matrices(name, runs[f"muonh.{tp}.{step}.{name}"].double())]
        assert found == pytest.approx(expected, rel=1e-6), step


def test_a_gradient_of_zero_moves_nothing() -> None:
    """Of an expert that no token has chosen."""
    p = nn.Parameter(torch.randn(8, 4))
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    MuonH([p], lr=0.1).step()
    assert torch.allclose(p, before, rtol=1e-6, atol=0)


def test_norms_do_not_drift() -> None:
    p = nn.Parameter(torch.randn(16, 32))
    optimizer = MuonH([{"params": [p], "algorithm": ADAMH}], lr=0.05)
    before = p.detach().double().norm().item()
    for _ in range(1000):
        p.grad = torch.randn(16, 32)
        optimizer.step()
    assert p.detach().double().norm().item() == pytest.approx(before, rel=1e-5)


def test_adamh_counts_the_steps_of_a_group_without_parameters() -> None:
    """The first pipeline stage saves the groups of all, and may have none of their parameters."""
    optimizer = MuonH([{"params": [], "algorithm": ADAMH}], lr=0.1)
    optimizer.step()
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 2


def test_weight_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="weight decay must be 0, not 0.1"):
        MuonH([nn.Parameter(torch.ones(2, 2))], weight_decay=0.1)
