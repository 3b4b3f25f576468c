"""A drawing of an architecture, as in the figure of arXiv 2507.06607: the stack, and its shared state as arrows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from archscale_megatron.archs.architecture import (
    CROSS_ATTENTION,
    FULL_ATTENTION,
    GATED_DELTA_NET,
    GMU,
    MAMBA1,
    MAMBA2,
    MLP,
    MOE,
    WINDOW_ATTENTION,
    Architecture,
)
from archscale_megatron.archs.counts import non_embedding_parameters, parameters
from archscale_megatron.archs.show import name_of, window_of
from archscale_megatron.pictures import save

COLOURS = {
    MAMBA1: "#a6cee8", MAMBA2: "#7fb3dc", GATED_DELTA_NET: "#8fd0cf",
    WINDOW_ATTENTION: "#fddcb5", FULL_ATTENTION: "#f9a35f", CROSS_ATTENTION: "#f7c6c0",
    GMU: "#b5dfa8", MLP: "#e9e9e9", MOE: "#d9cbea",
}  # fmt: skip
ENDS = "#ffffff"  # embedding and output layer
MEMORY, KEYS_AND_VALUES = "#2a7d38", "#c2410c"

# Inches.
WIDTH, MIXER, FEED_FORWARD, GAP, BETWEEN_LAYERS = 2.5, 0.2, 0.13, 0.025, 0.055
MARGIN, TITLE, SIDE, LEGEND, LEGEND_ROW = 0.2, 0.6, 0.65, 2.2, 0.2


def plot(arch: Architecture, path: Path) -> None:
    """Draw `arch` into the file `path`, whose suffix says of which kind; an existing one is replaced.

    Raises:
        ValueError: a suffix that matplotlib cannot write, or a directory that is not there.
    """
    save(draw(arch), path)


def draw(arch: Architecture) -> Figure:
    """The drawing: the input at the bottom, each mixer and MLP a box, the shared state's ways beside them."""
    left = MARGIN + (SIDE if arch.memory_writer is not None else 0)
    right = left + WIDTH
    legend_at = right + (SIDE if arch.kv_writer is not None else 0) + MARGIN

    boxes: list[Rectangle] = []
    y = MARGIN + MIXER + 2 * BETWEEN_LAYERS
    for symbol in arch.pattern:
        experts_or_mlp = symbol in (MLP, MOE)
        height = FEED_FORWARD if experts_or_mlp else MIXER
        boxes.append(Rectangle((left, y), WIDTH, height, facecolor=COLOURS[symbol], edgecolor="0.45", linewidth=0.6))
        y += height + (BETWEEN_LAYERS if experts_or_mlp else GAP)
    top = y + BETWEEN_LAYERS
    rows = len(set(arch.pattern)) + 2 * (arch.memory_writer is not None) + 2 * (arch.kv_writer is not None)
    height = max(top + MIXER + MARGIN, rows * LEGEND_ROW + 2 * MARGIN) + TITLE

    figure = Figure(figsize=(legend_at + LEGEND, height), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, legend_at + LEGEND), ylim=(0, height))
    axes.set_axis_off()
    middle = left + WIDTH / 2
    axes.annotate("", (middle, top), (middle, MARGIN), arrowprops={"arrowstyle": "-|>", "color": "0.45"}, zorder=0)
    for y, text in ((MARGIN, f"embedding ({arch.vocab_size:,})"), (top, "output layer")):
        axes.add_patch(Rectangle((left, y), WIDTH, MIXER, facecolor=ENDS, edgecolor="0.45", linewidth=0.6))
        _write(axes, middle, y + MIXER / 2, text)
    for index, (symbol, box) in enumerate(zip(arch.pattern, boxes, strict=True)):
        axes.add_patch(box)
        _label(axes, arch, index, symbol, box)
    _ways(axes, arch, boxes)

    kept = "tied" if arch.tied_embeddings else "untied"
    millions = [f"{n / 1e6:,.1f} M" for n in (parameters(arch), non_embedding_parameters(arch))]
    axes.text(MARGIN, height - 0.2, f"{arch.family}, depth {arch.depth}", size=12, weight="bold", va="center")
    details = f"{millions[0]} parameters ({kept}), {millions[1]} without embeddings; hidden size {arch.hidden_size:,}"
    axes.text(MARGIN, height - 0.42, details, size=7.5, color="0.35", va="center")
    axes.legend(
        handles=_legend(arch), loc="upper left", bbox_to_anchor=(legend_at, height - TITLE - 0.06),
        bbox_transform=axes.transData, frameon=False, fontsize=7.5, borderaxespad=0, borderpad=0,
    )  # fmt: skip
    return figure


def _write(axes: Axes, x: float, y: float, text: str, size: float = 7.5, **options: Any) -> None:
    axes.text(x, y, text, size=size, ha=options.pop("ha", "center"), va="center_baseline", **options)


def _label(axes: Axes, arch: Architecture, index: int, symbol: str, box: Rectangle) -> None:
    middle, height = box.get_x() + WIDTH / 2, box.get_y() + box.get_height() / 2
    if symbol in (MLP, MOE):
        _write(axes, middle, height, name_of(symbol), size=6, color="0.3")
        return
    window = window_of(arch, symbol)
    _write(axes, middle, height, name_of(symbol) + (f" ({window:,})" if window else ""))
    _write(axes, box.get_x() + 0.08, height, str(index // 2), size=6, ha="left", color="0.35")


def _ways(axes: Axes, arch: Architecture, boxes: list[Rectangle]) -> None:
    """From each writer a line along the stack, and from that an arrow to each reader: the memory to the left, the keys
    and values to the right."""
    ways = (
        (arch.memory_writer, GMU, MEMORY, -1),
        (arch.kv_writer, CROSS_ATTENTION, KEYS_AND_VALUES, 1),
    )
    for writer, reader, colour, side in ways:
        if writer is None:
            continue
        edge = boxes[0].get_x() + (WIDTH if side > 0 else 0)
        way = edge + side * 0.55 * SIDE
        heights = {i: box.get_y() + box.get_height() / 2 for i, box in enumerate(boxes)}
        readers = [i for i, symbol in enumerate(arch.pattern) if symbol == reader]
        start, end = heights[writer], heights[readers[-1]]
        boxes[writer].set(edgecolor=colour, linewidth=1.8, zorder=3)
        axes.plot([edge, way, way], [start, start, end], color=colour, lw=1.4, solid_joinstyle="round", zorder=2)
        axes.plot([edge], [start], "o", color=colour, ms=4.5, zorder=4)
        for i in readers:
            arrow = {"arrowstyle": "-|>", "color": colour, "lw": 1.1, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7}
            axes.annotate("", (edge, heights[i]), (way, heights[i]), arrowprops=arrow)


def _legend(arch: Architecture) -> list[Patch | Line2D]:
    """What colours mean, in the order in which the stack has them, and how often it has each."""
    handles: list[Patch | Line2D] = [
        Patch(
            facecolor=COLOURS[symbol], edgecolor="0.45", linewidth=0.6,
            label=f"{arch.pattern.count(symbol)} x {name_of(symbol)}",
        )
        for symbol in dict.fromkeys(arch.pattern)
    ]  # fmt: skip
    if arch.memory_writer is not None:
        label = f"memory of layer {arch.memory_writer // 2}\n{arch.memory_size:,} channels"
        handles.append(Line2D([], [], color=MEMORY, lw=1.4, marker="o", ms=4.5, label=label))
    if arch.kv_writer is not None:
        label = f"keys and values of layer {arch.kv_writer // 2}\n2 x {arch.kv_size:,} channels"
        handles.append(Line2D([], [], color=KEYS_AND_VALUES, lw=1.4, marker="o", ms=4.5, label=label))
    return handles
