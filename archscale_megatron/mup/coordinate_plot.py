"""The pictures of a coordinate check: a row for each axis, a panel for each quantity, a line for each step."""

from __future__ import annotations

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from archscale_megatron.mup.coordinate_check import Setting, Slope

PANEL = (1.75, 1.9)  # inches
PASSED, FAILED = "0.2", "#c0261c"


def draw(setting: Setting, slopes: list[Slope]) -> Figure:
    """Sizes of changes against width and depth, both logarithmic, and dotted the initial sizes. Over each panel the
    slope of the last step, red if a limit fails."""
    axes_of_models = list(dict.fromkeys(slope.axis for slope in slopes))
    quantities = list(dict.fromkeys(slope.quantity for slope in slopes))
    figure = Figure(
        figsize=(PANEL[0] * len(quantities) + 0.5, PANEL[1] * len(axes_of_models) + 0.55), dpi=100, layout="constrained"
    )
    verdict = "passed" if all(slope.passed for slope in slopes) else "failed"
    figure.suptitle(
        f"{setting.family}, {setting.parametrization.name}: {verdict}. "
        f"Root mean square of activations' change after each step (dotted: of their initial values)",
        fontsize=9,
    )
    panels = figure.subplots(len(axes_of_models), len(quantities), squeeze=False)
    for row, axis in zip(panels, axes_of_models, strict=True):
        positions = [model[axis == "depth"] for model in setting.axes[axis]]
        for panel, quantity in zip(row, quantities, strict=True):
            lines = [slope for slope in slopes if (slope.axis, slope.quantity) == (axis, quantity)]
            if lines:
                _panel(panel, positions, lines)
            else:
                panel.set_axis_off()
        row[0].set_ylabel(f"against {axis}", fontsize=8)
    last = max(slope.step for slope in slopes)
    handles = [
        panels[0][0].plot([], [], color=_colour(step, last), label=f"step {step}")[0] for step in range(1, last + 1)
    ]
    panels[0][0].legend(handles=handles, fontsize=5.5, frameon=False, handlelength=1)
    return figure


def _panel(panel: Axes, positions: list[int], lines: list[Slope]) -> None:
    last = lines[-1].step
    for line in lines:
        if any(size > 0 for size in line.sizes):
            style = {"color": "0.6", "ls": ":"} if line.step == 0 else {"color": _colour(line.step, last)}
            panel.plot(positions, line.sizes, marker="o", ms=2.5, lw=1.2, **style)
    panel.set(xscale="log", yscale="log")
    panel.set_xticks(positions, [str(position) for position in positions], fontsize=6)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.tick_params(axis="y", which="both", labelsize=5.5)
    low, high = panel.get_ylim()
    middle = (low * high) ** 0.5  # at least two decades, so that noise does not look like a slope
    panel.set_ylim(min(low, middle / 10), max(high, middle * 10))
    slope = "" if lines[-1].value is None else f": {lines[-1].value:+.2f}"
    passed = all(line.passed for line in lines)
    panel.set_title(f"{lines[0].quantity}{slope}", fontsize=6.5, color=PASSED if passed else FAILED)


def _colour(step: int, last: int) -> tuple[float, ...]:
    return matplotlib.colormaps["viridis"](0.9 * (1 - step / last))
