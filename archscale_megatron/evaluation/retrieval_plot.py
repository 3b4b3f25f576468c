"""Pictures of needles and phone books: accuracy against length, and against length and depth."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import NDArray

from archscale_megatron import pictures
from archscale_megatron.evaluation.report import Report, read

Values = NDArray[np.float64]
KINDS = ("needles", "phonebook")


def add_commands(commands: Any) -> None:
    """Add `plot`."""
    parser = commands.add_parser("plot", help="draw reports of needles or phonebook against length, a line a report")
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT", help="their JSON files")
    parser.add_argument("-o", dest="picture", type=Path, required=True, metavar="FILE", help="picture, such as a .png")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Raises ValueError for files that are no such reports."""
    pictures.check_path(args.picture)
    reports = [read(path) for path in args.reports]
    for report in reports:
        if report.kind not in KINDS:
            raise ValueError(f"{report.path}: a report of {report.kind}; only those of {' and '.join(KINDS)} are drawn")
        if report.kind != reports[0].kind:
            raise ValueError(f"{report.path}: a report of {report.kind}, and the first is of {reports[0].kind}")
    pictures.save(lines(reports), args.picture, dpi=150)


def lines(reports: Sequence[Report]) -> Figure:
    """Accuracy against tokens, a line a report, the mean of the tasks; within a standard deviation over the seeds where
    there are several."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    points = [_points(report) for report in reports]
    for report, (tokens, mean, deviation) in zip(reports, points, strict=True):
        (line,) = axes.plot(tokens, mean, "o-", label=label(report))
        band = np.clip([mean - deviation, mean + deviation], 0, 1)
        axes.fill_between(tokens, *band, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="tokens", ylabel="right", ylim=(-0.03, 1.03), title=reports[0].kind)
    _lengths(axes, np.concatenate([tokens for tokens, *_ in points]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", fontsize="small", ncols=2)
    return figure


def _points(report: Report) -> tuple[Values, Values, Values]:
    """[lengths] each, by length: tokens of a prompt, mean, deviation over the seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, details in report.details.items():
        groups.setdefault(name.partition("@")[2], []).append(details)
    found = []
    for group in groups.values():
        seeds = [statistics.mean(scores) for scores in zip(*(one["seeds"].values() for one in group), strict=True)]
        deviation = statistics.stdev(seeds) if len(seeds) > 1 else 0.0
        found.append((statistics.mean(one["tokens"] for one in group), statistics.mean(seeds), deviation))
    tokens, mean, deviation = np.array(sorted(found), dtype=float).T
    return tokens, mean, deviation


def heat_maps(reports: Sequence[Report]) -> Figure:
    """A panel a task of one report: what was found at which depth of how long a context. Grey: nothing was there."""
    (report,) = reports
    tasks = list(dict.fromkeys(name.partition("@")[0] for name in report.details))
    lengths = list(dict.fromkeys(name.partition("@")[2] for name in report.details))
    columns = min(len(tasks), 4)
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(1.5 + 3 * columns, 1 + 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel in panels.flat[len(tasks) :]:
        panel.remove()
    for panel, task in zip(panels.flat, tasks, strict=False):
        depths = [[score for score, _ in report.details[f"{task}@{length}"]["depths"]] for length in lengths]
        values = np.array(depths, dtype=float).T
        panel.set_facecolor("lightgrey")
        image = panel.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", extent=(0, len(lengths), 100, 0))
        panel.set_xticks(np.arange(len(lengths)) + 0.5, [_size(int(length)) for length in lengths], fontsize="small")
        panel.set(title=task)
    for panel in panels[:, 0]:
        panel.set(ylabel="depth, %")
    figure.supxlabel("tokens")
    figure.suptitle(label(report))
    figure.colorbar(image, ax=panels, label="found", format=FuncFormatter(lambda value, _: f"{value:.0%}"))
    return figure


def label(report: Report) -> str:
    """What a report is of."""
    source = report.checkpoint
    if not source.get("architecture"):
        return str(source.get("path", report.path.stem))
    iteration = source.get("iteration")
    return source["architecture"] if iteration is None else f"{source['architecture']}, iteration {iteration:,}"


def _lengths(axes: Axes, tokens: Values) -> None:
    axes.set_xscale("log", base=2)
    if tokens.max() < 2 * tokens.min():
        axes.set_xlim(tokens.min() / 2, tokens.max() * 2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _size(round(value))))
    axes.xaxis.set_minor_locator(NullLocator())


def _size(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens and tokens % 1024 == 0 else str(tokens)
