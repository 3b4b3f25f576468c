"""Does the best learning rate stay? Loss against base learning rate, a curve a depth, and how far its minimum moves."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archscale_megatron.pictures import save
from archscale_megatron.scaling.grid import LEARNING_RATES
from archscale_megatron.scaling.results import COLUMNS, DONE, NAN

GRID_EDGE = "at the edge of the grid"
DIVERGENCE_EDGE = "next to a learning rate that diverged"
NEEDED = ("status", "family", "depth", "train_name", "base_learning_rate")
LOSSES = {"loss": "training loss", "validation_loss": "validation loss"}


@dataclass(frozen=True)
class Curve:
    """The points of one depth.

    `points` are (learning rate, loss), the smallest rate first. `best` is the minimum, None where no point is left,
    and `edge` says why it may lie further out, or is empty. `left_out` counts the points without a loss by status.
    """

    depth: int
    points: list[tuple[float, float]]
    left_out: dict[str, int]
    best: tuple[float, float] | None
    edge: str


@dataclass(frozen=True)
class Panel:
    """The curves of one parametrisation, the smallest depth first."""

    title: str
    curves: list[Curve]

    def shift(self, curve: Curve) -> float | None:
        """Octaves by which the best learning rate moves from the smallest depth that has one to `curve`."""
        first = next((c.best for c in self.curves if c.best), None)
        return math.log2(curve.best[0] / first[0]) if curve.best and first else None


def read_table(path: Path) -> list[dict[str, str]]:
    """The lines of a sweep's results.csv.

    Raises:
        ValueError: it lacks a column, or has no lines.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in NEEDED if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}; give the results.csv of a sweep")
        rows = list(reader)
    if not rows:
        raise ValueError(f"{path}: no points; run the sweep first")
    return rows


def panels_of(rows: Sequence[dict[str, str]], column: str = "loss") -> list[Panel]:
    """The rows as panels: one a family, train name, and value of whatever else varies within a depth.

    Args:
        column: the loss that is drawn.
    Raises:
        ValueError: a field is no number, or two points of a curve have the same learning rate.
    """
    others = _varying(rows)
    panels: dict[str, dict[int, list[dict[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        words = [row["family"], row["train_name"], *(f"{name} {row[name] or 'not given'}" for name in others)]
        panels[", ".join(word for word in words if word)][int(_number(row, "depth"))].append(row)
    return [
        Panel(title, [_curve(title, depth, curves[depth], column) for depth in sorted(curves)])
        for title, curves in panels.items()
    ]


def _varying(rows: Sequence[dict[str, str]]) -> list[str]:
    """Swept options other than the learning rate that have several values at one depth of one parametrisation."""
    options = [n for n in rows[0] if n not in (*COLUMNS, *LEARNING_RATES, "train-model", "train-name")]
    values = defaultdict(set)
    for row in rows:
        for name in options:
            values[row["family"], row["train_name"], row["depth"], name].add(row[name])
    return [name for name in options if any(len(v) > 1 for (*_, n), v in values.items() if n == name)]


def _number(row: dict[str, str], column: str) -> float:
    try:
        return float(row[column])
    except (KeyError, ValueError):
        given = row.get(column, "not there")
        raise ValueError(f"point {row.get('name', '')}: {column} is {given!r}, not a number") from None


def _curve(title: str, depth: int, rows: Sequence[dict[str, str]], column: str) -> Curve:
    losses: dict[float, float] = {}
    left_out: dict[str, int] = defaultdict(int)
    diverged = []
    for row in rows:
        rate = _number(row, "base_learning_rate")
        if not 0 < rate < math.inf:
            raise ValueError(f"point {row.get('name', '')}: base_learning_rate is {rate:g}; it must be positive")
        loss = _number(row, column) if row["status"] == DONE else math.nan
        if not math.isfinite(loss):
            status = NAN if row["status"] == DONE else row["status"]
            left_out[status] += 1
            if status == NAN:
                diverged.append(rate)
        elif rate in losses:
            raise ValueError(f"{title}, depth {depth}: two points with learning rate {rate:g}; keep one of them")
        else:
            losses[rate] = loss
    points = sorted(losses.items())
    return Curve(depth, points, dict(left_out), *_minimum(points, diverged))


def _minimum(points: list[tuple[float, float]], diverged: list[float]) -> tuple[tuple[float, float] | None, str]:
    """The minimum of a curve: that of the parabola in log2 of the rate through the lowest point and its neighbours.
    A lowest point without two neighbours is itself the minimum, and the second value says so."""
    if not points:
        return None, ""
    at = min(range(len(points)), key=lambda i: points[i][1])
    if at in (0, len(points) - 1):
        beyond = at == len(points) - 1 and any(rate > points[at][0] for rate in diverged)
        return points[at], DIVERGENCE_EDGE if beyond else GRID_EDGE
    (x0, y0), (x1, y1), (x2, y2) = ((math.log2(rate), loss) for rate, loss in points[at - 1 : at + 2])
    slope = (y1 - y0) / (x1 - x0)
    curvature = ((y2 - y1) / (x2 - x1) - slope) / (x2 - x0)
    if curvature == 0:  # three equal losses
        return points[at], ""
    x = (x0 + x1 - slope / curvature) / 2
    return (2**x, y0 + (slope + curvature * (x - x1)) * (x - x0)), ""


def as_json(panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """The panels for programs."""
    return [
        {
            "title": panel.title,
            "curves": [
                {
                    "depth": curve.depth,
                    "points": [{"learning_rate": rate, "loss": loss} for rate, loss in curve.points],
                    "left_out": curve.left_out,
                    "best_learning_rate": curve.best[0] if curve.best else None,
                    "best_loss": curve.best[1] if curve.best else None,
                    "octaves": panel.shift(curve),
                    "edge": curve.edge,
                }
                for curve in panel.curves
            ],
        }
        for panel in panels
    ]


def table(panels: Sequence[Panel]) -> str:
    """The minima and by how many octaves they move, to be read."""
    lines = []
    for panel in panels:
        first = next((c.depth for c in panel.curves if c.best), panel.curves[0].depth)
        lines += [panel.title, f"  depth  best learning rate      loss  octaves from depth {first}"]
        for curve in panel.curves:
            shift, notes = panel.shift(curve), [curve.edge] if curve.edge else []
            if curve.left_out:
                notes.append("left out: " + ", ".join(f"{n} {status}" for status, n in curve.left_out.items()))
            numbers = f"{curve.best[0]:>18.4g}  {curve.best[1]:8.4f}  {shift:+8.2f}" if curve.best else f"{'-':>18}"
            lines.append(f"  {curve.depth:5}  {numbers}{'  ' if notes else ''}{'; '.join(notes)}")
    return "\n".join(lines)


def draw(panels: Sequence[Panel], path: Path, column: str = "loss") -> None:
    """Write the picture of `panels`, whose kind the suffix of `path` says; an existing file is replaced.

    Raises:
        ValueError: a suffix that matplotlib cannot write, or a directory that is not there.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(1 + 4.6 * len(panels), 4.6), dpi=150, layout="constrained")
    depths = sorted({curve.depth for panel in panels for curve in panel.curves})
    colours = dict(
        zip(depths, colormaps["viridis"]([i / max(len(depths), 2) for i in range(len(depths))]), strict=True)
    )
    for axes, panel in zip(
        figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0], panels, strict=True
    ):
        for curve in panel.curves:
            colour = colours[curve.depth]
            axes.plot(
                *zip(*curve.points, strict=True) if curve.points else ([], []),
                "o-",
                color=colour,
                ms=3.5,
                lw=1.4,
                label=f"depth {curve.depth}",
            )
            if curve.best:
                filled = "none" if curve.edge else colour
                axes.plot(*curve.best, "*", color=colour, mfc=filled, ms=12, zorder=3)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
        axes.tick_params(axis="x", labelsize=8)
        axes.set(xlabel="base learning rate")
        axes.set_title(panel.title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.93")
    first = figure.axes[0]
    losses = sorted(loss for panel in panels for curve in panel.curves for _, loss in curve.points)
    if losses:  # a run that went astray leaves the frame, rather than flatten all others
        middle = losses[len(losses) // 2]
        first.set_ylim(top=min(first.get_ylim()[1], max(middle + 3 * (middle - losses[0]), losses[0] + 0.1)))
    first.set_ylabel(f"{LOSSES[column]} (nats per token)")
    first.plot([], [], "*", color="0.4", ms=11, ls="none", label="minimum (parabola)")
    first.plot([], [], "*", color="0.4", mfc="none", ms=11, ls="none", label="lowest point, at an edge")
    figure.legend(*first.get_legend_handles_labels(), frameon=False, loc="outside right center")
    save(figure, path)
