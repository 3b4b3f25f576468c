"""Drawings of every family: boxes in the order of the pattern, arrows from writers to readers, text that fits."""

from itertools import combinations
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation, Text

from archscale_megatron.archs import __main__ as program
from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.families import FAMILIES
from archscale_megatron.archs.plot import COLOURS, KEYS_AND_VALUES, MEMORY, draw


def boxes(figure: Figure, arch: Architecture) -> list[Rectangle]:
    """Of the hybrid layers, bottom first: without the embedding and the output layer."""
    found = sorted((p for p in figure.axes[0].patches if isinstance(p, Rectangle)), key=lambda p: p.get_y())
    assert len(found) == len(arch.pattern) + 2
    return found[1:-1]


def check(arch: Architecture) -> None:
    figure = draw(arch)
    layers = boxes(figure, arch)
    assert [to_hex(box.get_facecolor()) for box in layers] == [COLOURS[symbol] for symbol in arch.pattern]

    def layer_at(y: float) -> int:
        (index,) = [i for i, box in enumerate(layers) if box.get_y() < y < box.get_y() + box.get_height()]
        return index

    arrows: dict[str, list[int]] = {MEMORY: [], KEYS_AND_VALUES: []}
    for text in figure.axes[0].texts:
        if isinstance(text, Annotation) and to_hex(text.arrow_patch.get_edgecolor()) in arrows:
            arrows[to_hex(text.arrow_patch.get_edgecolor())].append(layer_at(text.xy[1]))
    for colour, reader, writer in ((MEMORY, "U", arch.memory_writer), (KEYS_AND_VALUES, "X", arch.kv_writer)):
        assert arrows[colour] == [i for i, symbol in enumerate(arch.pattern) if symbol == reader]
        starts = [line for line in figure.axes[0].lines if line.get_marker() == "o" and line.get_color() == colour]
        assert [layer_at(line.get_ydata()[0]) for line in starts] == ([] if writer is None else [writer])

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # places the legend
    legend = figure.axes[0].get_legend()
    texts: list[Text] = [t for t in (*figure.axes[0].texts, *legend.get_texts()) if t.get_text()]
    extents = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    page = figure.bbox
    assert all(page.x0 <= e.x0 and e.x1 <= page.x1 and page.y0 <= e.y0 and e.y1 <= page.y1 for e in extents)
    for box in layers:
        inside = [e for e in extents if box.contains_point(((e.x0 + e.x1) / 2, (e.y0 + e.y1) / 2))]
        outline = box.get_window_extent()
        assert inside and all(outline.y0 <= e.y0 and e.y1 <= outline.y1 for e in inside)
    overlapping = [
        (a.get_text(), b.get_text())
        for (a, first), (b, second) in combinations(zip(texts, extents, strict=True), 2)
        if first.overlaps(second)
    ]
    assert not overlapping


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    depths = [depth for depth in program._models(family) if depth in (1, 4, 8, 16, 32)]
    for depth in depths:
        check(build_architecture(family, depth))


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "sambay.png"
    for depth in ("8", "16"):  # the second over the first
        program.main(["plot", "sambay", "--depth", depth, "-o", str(path)])
    height, width, _ = matplotlib.image.imread(path).shape
    assert 500 < width < 1000 and 500 < height < 1000
