"""Coordinate checks: what is measured against a second training loop; SP and planted mistakes fail, μP++ passes."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.model.config import config_of
from archscale_megatron.model.spec import build_model
from archscale_megatron.mup import __main__ as program
from archscale_megatron.mup.classes import MATRICES, ParameterClass, parameter_class
from archscale_megatron.mup.coordinate_check import Setting, Slope, architecture, log_slope, slopes
from archscale_megatron.mup.coordinates import measure, measure_all, standard_library
from archscale_megatron.mup.rules import Parametrization

ROOT = Path(__file__).parents[2]
WIDTHS = {"widths": [64, 128, 256], "depths": [8]}
DEPTHS = {"widths": [64], "depths": [8, 16, 32]}


class SameRateOfMatrices(Parametrization):
    def learning_rate_multiplier(self, kind: ParameterClass) -> float:
        return 1.0


class NoLogitMultiplier(Parametrization):
    def apply(self, arch: Architecture) -> Architecture:
        return replace(super().apply(arch), logit_multiplier=1.0)


class NoResidualMultiplier(Parametrization):
    def apply(self, arch: Architecture) -> Architecture:
        return replace(super().apply(arch), residual_multiplier=1.0)


class SameRateAtEveryDepth(Parametrization):
    scales_with_depth = False

    def apply(self, arch: Architecture) -> Architecture:
        return replace(super().apply(arch), residual_multiplier=1 / math.sqrt(2 * arch.depth))


MLP, STREAM = "SwiGLU MLP", "residual stream"


@pytest.mark.parametrize(
    ("parametrization", "sizes", "fails"),
    [
        (Parametrization("mup++"), WIDTHS, set()),
        (Parametrization("mup++"), DEPTHS, set()),
        (Parametrization("sp"), WIDTHS, {"logits", MLP, STREAM, "Mamba-1", "full attention", "Gated Memory Unit"}),
        (Parametrization("sp"), DEPTHS, {STREAM}),
        (Parametrization("mup"), DEPTHS, {STREAM}),
        (SameRateOfMatrices("mup++"), WIDTHS, {MLP, STREAM, "Mamba-1", "full attention", "Gated Memory Unit"}),
        (NoLogitMultiplier("mup++"), WIDTHS, {"logits"}),
        (NoResidualMultiplier("mup++"), DEPTHS, {STREAM}),
        (SameRateAtEveryDepth("mup++"), DEPTHS, {STREAM}),
    ],
)
def test_verdicts(
    one_process: None, parametrization: Parametrization, sizes: dict[str, list[int]], fails: set[str]
) -> None:
    """`fails`: at least these quantities do, and nothing if it is empty. What passes, does with all seeds."""
    seeds = 1 if fails else Setting.seeds
    setting = Setting(family="sambay", parametrization=parametrization, seeds=seeds, **sizes)  # type: ignore[arg-type]
    found = slopes(setting, measure_all(setting))
    failed = {slope.quantity for slope in found if not slope.passed}
    values = {(slope.quantity, slope.step): slope.value for slope in found if slope.step in (0, setting.steps)}
    assert fails <= failed and bool(fails) == bool(failed), (failed, values)


def test_measure(one_process: None) -> None:
    """Against a loop with torch's AdamW, whose groups are written out, and logits instead of hooks."""
    arch, steps, rate = architecture("sambay", 64, 8, tied=False), 3, 2e-3
    parametrization = Parametrization("mup++", width_ratio=4.0, base_head_dim=8)
    tokens = standard_library()[:2]
    sizes = measure(arch, parametrization, rate, steps, seed=5, tokens=tokens)

    config = config_of(parametrization.apply(arch), parametrization=parametrization)
    model = build_model(config, padded_vocab_size=arch.vocab_size, max_sequence_length=64, seed=5)
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter_class(name) in MATRICES].append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": groups[True], "lr": rate / 4, "weight_decay": 0.1},
            {"params": groups[False], "lr": rate, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    outputs = []
    for _ in range(steps + 1):
        logits = model(tokens[:, :-1], torch.arange(64).expand(2, -1), None)
        embedding = F.embedding(tokens[:, :-1], model.embedding.word_embeddings.weight)
        outputs.append({"logits": logits.detach(), "embedding": embedding.detach().clone()})
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for name, first in outputs[0].items():
        assert sizes.initial[name] == pytest.approx(float(first.square().mean().sqrt()), rel=1e-5)
        changes = [float((output[name] - first).square().mean().sqrt()) for output in outputs[1:]]
        assert sizes.changes[name] == pytest.approx(changes, rel=1e-3, abs=1e-9)
        assert changes[-1] > 0


def test_slopes() -> None:
    positions = [8, 16, 64]
    assert log_slope(positions, [3 * n**-0.7 for n in positions]) == pytest.approx(-0.7)
    sizes = [1.0, 5.0, 2.0]
    x, y = np.log(positions), np.log(sizes)
    expected = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    assert log_slope(positions, sizes) == pytest.approx(expected)
    assert log_slope(positions, [0.0, 1.0, 1.0]) is None
    for value, size, passed in ((0.2, 1.0, True), (0.3, 1.0, False), (-0.3, 1.0, False), (None, 0.0, True)):
        assert Slope("width", MLP, 1, [size], value, -0.25, 0.25).passed is passed
    assert not Slope("width", MLP, 1, [1.0, math.nan], None, -math.inf, math.inf).passed


@pytest.mark.parametrize(
    ("family", "heads", "kv_heads"),
    [("sambay", 8, 2), ("transformer_mha", 8, 8), ("transformer_gqa4", 8, 4), ("phi4miniflash", 8, 4)],
)
def test_heads_of_a_width(family: str, heads: int, kv_heads: int) -> None:
    for factor in (1, 2, 4):
        arch = architecture(family, 64 * factor, 8, tied=True)
        assert (arch.hidden_size, arch.ffn_hidden_size, arch.num_attention_heads) == (
            64 * factor, 256 * factor, heads * factor,
        )  # fmt: skip
        assert arch.num_query_groups == (4 if family == "transformer_gqa4" else kv_heads * factor)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--train-model sambai", "sambai: unknown family; did you mean"),
        ("--train-model sambay --depths 6 12", "--depth 6: the depth of sambay must be a multiple of 4"),
        ("--train-model sambay --widths 48", "--widths 48: with heads of 8 channels, sambay needs multiples of 32"),
        ("--train-model sambay --widths 0 64", "--widths 0: must be a positive integer"),
        ("--train-model sambay --widths 64 --depths 8 8", "one size each"),
        ("--train-model sambay --steps 1", "--steps 1: give 2 or more"),
        ("--train-model sambay --seeds 0", "--seeds 0: must be a positive integer"),
        ("--train-model sambay --lr nan", "--lr nan: must be a positive number"),
        ("--train-model sambay -o picture.doc", "-o picture.doc: cannot write .doc"),
        ("--train-model sambay --parametrization hyperp", "invalid choice: 'hyperp'"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    with pytest.raises(SystemExit) as exit:
        program.main(["coord-check", *arguments.split()])
    captured = capsys.readouterr().err
    assert exit.value.code == 2 and message in captured and captured.count("\n") == 1


def test_command(tmp_path: Path) -> None:
    """As a user starts it: SP fails with exit code 1, and there is a picture."""
    picture = tmp_path / "sp.png"
    command = (
        "coord-check --train-model transformer --parametrization sp --widths 32 64 128 --depths 2 --seeds 1 --json"
    )
    finished = subprocess.run(
        [sys.executable, "-m", "archscale_megatron.mup", *command.split(), "-o", str(picture)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert finished.returncode == 1, finished.stderr
    result = json.loads(finished.stdout)
    assert result["passed"] is False and len(result["models"]["width"]) == 3
    assert {slope["quantity"] for slope in result["slopes"]} == {"embedding", "full attention", MLP, STREAM, "logits"}
    height, width, _ = matplotlib.image.imread(picture).shape
    assert height > 150 and width > 500
