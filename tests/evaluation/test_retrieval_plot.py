"""Pictures show the numbers of the reports."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archscale_megatron.evaluation.report import Report
from archscale_megatron.evaluation.retrieval_plot import heat_maps, label, lines


def report_of(kind: str, groups: dict[str, dict[str, Any]], **source: Any) -> Report:
    """A report with these details."""
    return Report(Path("x.json"), kind, "", {}, groups, {}, {}, source)


def test_lines() -> None:
    groups = {
        "phonebook@1000": {"tokens": 990, "seeds": {"0": 0.5, "1": 0.7}},
        "phonebook@500": {"tokens": 480, "seeds": {"0": 0.8, "1": 0.6}},
    }
    one = {"phonebook@20 entries": {"tokens": 300, "seeds": {"0": 0.25}}}
    source = {"architecture": "sambay d8", "iteration": 100}
    figure = lines([report_of("phonebook", groups, **source), report_of("phonebook", one, path="here")])
    (axes,) = figure.axes
    first, second = axes.lines
    assert first.get_xdata().tolist() == [480, 990] and first.get_ydata() == pytest.approx([0.7, 0.6])
    assert second.get_xdata().tolist() == [300] and second.get_ydata() == pytest.approx([0.25])
    assert [first.get_label(), second.get_label()] == ["sambay d8, iteration 100", "here"]
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(0.7 + 0.02**0.5) and band[:, 1].min() == pytest.approx(0.6 - 0.02**0.5)


def test_lines_are_means_of_tasks() -> None:
    groups = {
        "a@100": {"tokens": 90, "seeds": {"0": 1.0, "1": 0.0}},
        "b@100": {"tokens": 92, "seeds": {"0": 0.0, "1": 0.5}},
    }
    (axes,) = lines([report_of("needles", groups, path="x")]).axes
    assert axes.lines[0].get_xdata().tolist() == [91] and axes.lines[0].get_ydata() == pytest.approx([0.375])


def test_heat_maps() -> None:
    def depths(*values: float | None) -> dict[str, Any]:
        return {"depths": [[value, 0 if value is None else 2] for value in values]}

    groups = {
        "a@100": depths(1.0, 0.5),
        "a@2048": depths(0.0, None),
        "b@100": depths(0.25, 0.5),
        "b@2048": depths(0.75, 0.125),
    }
    figure = heat_maps([report_of("needles", groups, path="x")])
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == ["a", "b"]
    assert [text.get_text() for text in panels[0].get_xticklabels()] == ["100", "2K"]
    shown = panels[0].images[0].get_array()
    assert np.ma.filled(shown, -1).tolist() == [[1.0, 0.0], [0.5, -1.0]]
    assert panels[0].images[0].get_extent() == [0, 2, 100, 0]  # the start of the context is above


def test_label() -> None:
    assert label(report_of("needles", {}, architecture="samba", iteration=0)) == "samba, iteration 0"
    assert label(report_of("needles", {}, iteration=None)) == "x"
