"""The best learning rate and how it moves: planted parabolas, edges, and points without a loss."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from archscale_megatron.scaling.__main__ import main
from archscale_megatron.scaling.plot_lr import DIVERGENCE_EDGE, GRID_EDGE, as_json, panels_of, read_table, table
from archscale_megatron.scaling.results import COLUMNS

RATES = [2.0**exponent for exponent in range(-12, -4)]


def row(rate: float, loss: float | str, depth: int = 4, name: str = "scaling_tie", **other: str) -> dict[str, str]:
    known = {"status": "done", "family": "sambay", "depth": depth, "train_name": name, "base_learning_rate": rate}
    return {**dict.fromkeys(COLUMNS, ""), **{k: str(v) for k, v in known.items()}, "loss": str(loss), **other}


def parabola(best: float, depth: int, name: str, rates: list[float] = RATES) -> list[dict[str, str]]:
    return [row(rate, 3 + 1 / depth + 0.3 * (math.log2(rate / best)) ** 2, depth, name) for rate in rates]


def test_planted_minima_and_shifts() -> None:
    """SP moves down by 0.7 octaves a depth, muP++ stays."""
    planted = {("scaling_tie", d): 2.0 ** (-7.3 - 0.7 * i) for i, d in enumerate((4, 8, 12))}
    planted |= {("scaling_mup_tie", d): 2.0**-8.2 for d in (4, 8, 12)}
    uneven = [2.0**x for x in (-12, -10.5, -9.1, -8, -7.2, -6, -4.9)]
    rows = [r for (name, d), best in planted.items() for r in parabola(best, d, name, uneven if d == 8 else RATES)]
    panels = panels_of(rows[::-1])
    assert {p.title for p in panels} == {"sambay, scaling_tie", "sambay, scaling_mup_tie"}
    for panel in panels:
        assert [curve.depth for curve in panel.curves] == [4, 8, 12]
        for index, curve in enumerate(panel.curves):
            assert curve.best[0] == pytest.approx(planted[panel.title.split()[1], curve.depth], rel=1e-9)
            assert curve.best[1] == pytest.approx(3 + 1 / curve.depth, rel=1e-9)
            assert curve.edge == ""
            expected = 0 if "mup" in panel.title else -0.7 * index
            assert panel.shift(curve) == pytest.approx(expected, abs=1e-9)
    assert "-1.40" in table(panels)


@pytest.mark.parametrize("losses, best, edge", [
    ([1, 2, 3], 2**-12, GRID_EDGE),
    ([3, 2, 1], 2**-10, GRID_EDGE),
    ([3, 2, 1, "nan"], 2**-10, DIVERGENCE_EDGE),
    ([3, 2, 1, "inf"], 2**-10, DIVERGENCE_EDGE),
    (["nan", 1, 2, 3], 2**-11, GRID_EDGE),
    ([2, 1, "nan", 2], 2**-10.5, ""),
    ([1], 2**-12, GRID_EDGE),
    ([1, 1, 1], 2**-12, GRID_EDGE),
    ([2, 1, 1, 2], 2**-10.5, ""),
    ([1.5, 1, 1.5], 2**-11, ""),
])  # fmt: skip
def test_edges(losses: list[float | str], best: float, edge: str) -> None:
    (panel,) = panels_of([row(rate, loss) for rate, loss in zip(RATES, losses, strict=False)])
    (curve,) = panel.curves
    assert curve.edge == edge
    assert curve.best[0] == pytest.approx(best, rel=1e-9)
    assert sum(curve.left_out.values()) == sum(isinstance(loss, str) for loss in losses)


def test_points_without_a_loss_are_counted() -> None:
    statuses = ["failed", "timeout", "nan", "nan"]
    gone = [row(rate, "", status=status) for rate, status in zip(RATES, statuses, strict=False)]
    (panel,) = panels_of(gone)
    assert panel.curves[0].best is None and panel.shift(panel.curves[0]) is None
    (panel,) = panels_of([*gone, *parabola(2**-8.4, 8, "scaling_tie")])
    assert [panel.shift(curve) for curve in panel.curves] == [None, 0]
    assert "left out: 1 failed, 1 timeout, 2 nan" in table([panel])
    assert "octaves from depth 8" in table([panel])
    assert as_json([panel])[0]["curves"][0]["left_out"] == {"failed": 1, "timeout": 1, "nan": 2}


def test_what_else_varies_at_a_depth_is_a_panel_of_its_own() -> None:
    """A batch size does; what follows the depth (a token budget) does not."""
    rows = [
        r | {"global-batch-size": batch, "max-tokens": str(depth), "lr": "x"}
        for batch in ("8", "16")
        for depth in (4, 8)
        for r in parabola(2**-8, depth, "scaling_tie")
    ]
    panels = panels_of(rows)
    assert [p.title for p in panels] == [f"sambay, scaling_tie, global-batch-size {b}" for b in (8, 16)]
    assert all(len(p.curves) == 2 for p in panels)


@pytest.mark.parametrize("rows, error", [
    ([row(1e-3, 1), row(1e-3, 2)], "two points with learning rate 0.001"),
    ([row(1e-3, "low", name="x")], "loss is 'low', not a number"),
    ([row(0, 1)], "must be positive"),
])  # fmt: skip
def test_bad_rows(rows: list[dict[str, str]], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        panels_of(rows)


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*parabola(2**-7.5, 4, "scaling_tie"), *parabola(2**-9, 8, "scaling_tie"), row(1, "", 8, status="failed")]
    file, picture = write(tmp_path / "results.csv", rows), tmp_path / "lr.png"
    main(["plot-lr", str(file), "-o", str(picture)])
    assert "-1.50" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    main(["plot-lr", str(file), "-o", str(picture), "--json"])
    (panel,) = json.loads(capsys.readouterr().out)
    assert panel["curves"][1]["octaves"] == pytest.approx(-1.5)


def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good.csv", parabola(1e-3, 4, ""))
    no_column = tmp_path / "column.csv"
    no_column.write_text("a,b\n1,2\n")
    empty = write(tmp_path / "empty.csv", parabola(1e-3, 4, ""))
    empty.write_text(empty.read_text().splitlines()[0] + "\n")
    for file, picture, error in [
        (tmp_path / "none.csv", "a.png", "none.csv"),
        (no_column, "a.png", "no column status, family"),
        (empty, "a.png", "no points"),
        (good, "a.doc", "cannot write .doc"),
        (good, "nowhere/a.png", "there is no directory"),
    ]:
        with pytest.raises(SystemExit):
            main(["plot-lr", str(file), "-o", str(tmp_path / picture)])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("scaling: error: ") and error in line
    assert len(read_table(good)) == len(RATES)
