"""Grids as points: from options, command lines and YAML; what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from archscale_megatron.scaling.grid import Point, distinct, parse_grid, parse_training, points_of, read_yaml
from tests.command_lines import ROOT


def test_product_in_order() -> None:
    fixed = parse_training(["--train-model", "sambay", "--bf16", "--data-path", "1", "a", "2", "b", "--split=98,2,0"])
    points = points_of(fixed, parse_grid(["depth=4,8", "base_hps.eta0=1e-3,2e-3"]))
    assert [p.arguments[-4:] for p in points] == [
        ["--depth", depth, "--base-hps.eta0", rate] for depth in "48" for rate in ("1e-3", "2e-3")
    ]
    first = ["--train-model", "sambay", "--bf16", "--data-path", "1", "a", "2", "b", "--split", "98,2,0"]
    assert points[0].arguments[:-4] == first
    assert points[0].name.startswith("sambay-d4-1e-3-")


def test_a_point_is_its_options() -> None:
    def key(**options: str) -> str:
        return Point({name.replace("_", "-"): (value,) for name, value in options.items()}).key

    assert key(lr="1e-3", max_tokens="2_097_152") == key(max_tokens="2097152", lr="0.001")
    assert key(lr="1e-3") != key(lr="1.1e-3") != key(lr="1.1e-3", seed="1")
    assert key(train_name="scaling_tie") != key(train_name="scaling_mup_tie")
    assert len(distinct(points_of({}, {"lr": ["1e-3", 0.001, 2e-3]}))) == 2
    assert Point({"bf16": ()}).key != Point({}).key
    assert "/" not in Point({"train-model": ("../../x",)}).name


GRID = """
fixed: {seq-length: 128, bf16: true, fp16: false, max-tokens: 1e6}
grids:
  - fixed: {train-model: sambay}
    grid: {depth: [4, 8], data-path: [[1, a, 2, b], c]}
  - fixed: {train-model: samba, seq-length: 256}
    grid: {depth: [4]}
"""


def test_yaml(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(GRID)
    points = read_yaml(tmp_path / "grid.yaml", {"seed": ["7"]})
    assert [" ".join(p.arguments) for p in points] == [
        "--seq-length 128 --bf16 --max-tokens 1e6 --train-model sambay --seed 7 --depth 4 --data-path 1 a 2 b",
        "--seq-length 128 --bf16 --max-tokens 1e6 --train-model sambay --seed 7 --depth 4 --data-path c",
        "--seq-length 128 --bf16 --max-tokens 1e6 --train-model sambay --seed 7 --depth 8 --data-path 1 a 2 b",
        "--seq-length 128 --bf16 --max-tokens 1e6 --train-model sambay --seed 7 --depth 8 --data-path c",
        "--seq-length 256 --bf16 --max-tokens 1e6 --train-model samba --seed 7 --depth 4",
    ]


@pytest.mark.parametrize("text, error", [
    ("- a", "expected fixed: and grids:"),
    ("fixed: {}", "no grids"),
    ("grids: []\nseeds: [1]", "unknown key 'seeds'; known are fixed, grids"),
    ("grids: {depth: [1]}", "it must be a list"),
    ("grids:\n  - {depth: [1]}", "grid 1: unknown key 'depth'; known are fixed, grid"),
    ("grids:\n  - grid: {depth: 4}", "grid 1: depth: 4 is no list of values"),
    ("grids:\n  - grid: {depth: []}", "no list of values"),
    ("grids:\n  - grid: {depth: [{a: 1}]}", "is no value"),
    ("grids:\n  - grid: {depth: [null]}", "None is no value"),
    ("grids:\n  - fixed: {lr: 1}\n    grid: {depth: [4], lr: [2]}", "lr: both fixed and in the grid"),
    ("grids:\n  - grid: {tensorboard_dir: [a]}", "--tensorboard-dir is set by the sweep"),
    ("grids:\n  - grid: {max_tokens: [1], max-tokens: [2]}", "max-tokens: given twice"),
    ("grids: [", "not YAML"),
    ("grids: !!python/object/apply:os.getcwd []", "not YAML"),
])  # fmt: skip
def test_bad_yaml(text: str, error: str, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(ValueError, match="grid.yaml") as raised:
        read_yaml(tmp_path / "grid.yaml", {})
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("texts", [["depth"], ["depth="], ["depth=4,,8"], ["=4"], ["depth=4", "depth=8"]])
def test_bad_grid(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="--grid"):
        parse_grid(texts)


@pytest.mark.parametrize("words", [["depth", "8"], ["--lr", "1", "--lr", "2"]])
def test_bad_training_options(words: list[str]) -> None:
    with pytest.raises(ValueError, match="expected an option|given twice"):
        parse_training(words)


@pytest.mark.parametrize("name, count", [("hp_sweep.yaml", 60), ("lr_transfer.yaml", 40)])
def test_examples(name: str, count: int) -> None:
    points = read_yaml(ROOT / "examples" / name, {})
    assert len(points) == len(distinct(points)) == count
