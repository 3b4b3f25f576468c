"""Points, fitted laws and their limits on logarithmic axes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from archscale_megatron.pictures import save
from archscale_megatron.scaling.laws import Law

if TYPE_CHECKING:
    from archscale_megatron.scaling.fit_commands import Series

TITLES = {"flops": "training FLOPs", "tokens": "training tokens"}
BEYOND = 3.0  # how far a law is drawn past the largest point


def plot(law: Law, fitted: list[Series], path: Path) -> None:
    """Draw the series into the file `path`, whose suffix says of which kind; an existing one is replaced.

    Raises:
        ValueError: a suffix that matplotlib cannot write, or a directory that is not there.
    """
    save(draw(law, fitted), path, dpi=150)


def draw(law: Law, fitted: list[Series]) -> Figure:
    """Loss against the law's last variable, a colour a series, the limit dashed. A law of two variables is one line for
    each value of the first."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for i, series in enumerate(fitted):
        _draw_series(axes, law, series, colours[i % len(colours)])
    axes.set(
        xscale="log", yscale="log", xlabel=TITLES[law.variables[-1]], ylabel="loss (nats a token)", title=law.formula
    )
    axes.yaxis.set_major_formatter(ScalarFormatter())
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter(ScalarFormatter() if high < 10 * low else NullFormatter())
    axes.grid(which="both", alpha=0.25)
    figure.legend(loc="outside lower center", fontsize="small", ncols=2)
    return figure


def _draw_series(axes: Axes, law: Law, series: Series, colour: tuple[float, ...]) -> None:
    x = np.array([[point.values[name] for name in law.variables] for point in series.points])
    values = dict(zip(law.names, series.fit.values, strict=True))
    label = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
    axes.plot(x[:, -1], [p.loss for p in series.points], "o", color=colour, label=f"{series.name}: {label}")
    line = np.geomspace(x[:, -1].min(), x[:, -1].max() * BEYOND, 200)
    for others in np.unique(x[:, :-1], axis=0):
        axes.plot(line, law(series.fit.values, np.column_stack([np.tile(others, (200, 1)), line])), "-", color=colour)
    if limit := series.fit.values[-1]:  # 0 has no place on a logarithmic axis
        axes.axhline(limit, linestyle="--", linewidth=1, color=colour, alpha=0.7)
