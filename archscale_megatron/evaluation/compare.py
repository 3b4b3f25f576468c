"""Scores of several runs side by side, as a table and as bars.

A row is what was measured with the options that decide it: the same task with another number of examples, another
limit or other data is another row. Of reports that measured the same, the newest counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archscale_megatron import pictures
from archscale_megatron.checkpoint.retention import iteration_of
from archscale_megatron.evaluation.report import FOLDER, Report, Score, aligned, plain, read

SELECTING = ("tasks", "lengths", "entries", "windows", "log_samples")
"""Options that say which scores and details there are, not what they are."""
NOTED = "dtype"  # may differ within a row; a line says so
BEYOND = 2  # standard errors of a difference that is marked

Key = tuple[str, str, str, str]
"""Kind, name, metric and the deciding options, as JSON."""


@dataclass(frozen=True)
class Run:
    """One argument of the command: its reports by what they measured."""

    label: str
    reports: dict[Key, Report]
    older: int

    def score(self, key: Key) -> Score | None:
        return self.reports[key].scores[key[1]] if key in self.reports else None


@dataclass(frozen=True)
class Row:
    """
    Attributes:
        options: those in which it differs from rows of the same name, "" where there is none.
        scores: of each run, None where the run has none.
    """

    key: Key
    options: str
    scores: list[Score | None]

    @property
    def higher_is_better(self) -> bool:
        return next(score.higher_is_better for score in self.scores if score)

    @property
    def name(self) -> str:
        return f"{self.key[1]} ({self.options})" if self.options else self.key[1]

    def best(self) -> list[int]:
        """The runs with the best value, where there are several to compare."""
        values = {i: s.value for i, s in enumerate(self.scores) if s and not math.isnan(s.value)}
        best = (max if self.higher_is_better else min)(values.values(), default=0.0)
        return [i for i, value in values.items() if value == best] if len(values) > 1 else []

    def difference(self) -> tuple[float, float | None] | None:
        """Second run minus first, and its standard error as if both were independent; None unless both have a score.

        Runs that were asked the same items err together, so that the true error is rather smaller.
        """
        if len(self.scores) != 2 or self.scores[0] is None or self.scores[1] is None:
            return None
        first, second = self.scores[0], self.scores[1]
        known = first.stderr is not None and second.stderr is not None
        return second.value - first.value, math.hypot(first.stderr or 0, second.stderr or 0) if known else None

    def is_beyond(self) -> bool:
        """Whether the difference is more than `BEYOND` of its standard errors."""
        difference = self.difference()
        return difference is not None and difference[1] is not None and abs(difference[0]) > BEYOND * difference[1]


def open_runs(paths: Sequence[Path]) -> list[Run]:
    """The reports of run directories, checkpoints, folders of reports and report files.

    Raises:
        ValueError: there is none, or one cannot be read.
    """
    labels = [_label(path) for path in paths]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in paths]
    return [_run(label, _reports(path)) for label, path in zip(labels, paths, strict=True)]


def _label(path: Path) -> str:
    path = path.resolve()
    if path.is_file():
        return path.stem
    if path.name == FOLDER:
        path = path.parent
    return path.name if iteration_of(path) is None else f"{path.parent.name}/{path.name}"


def _reports(path: Path) -> list[Report]:
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory; give a run directory or a report")
    if path.is_file():
        return [read(path)]
    pattern = "*.json"
    if iteration_of(path) is not None:
        path, pattern = path.parent, f"*-{path.name}-*.json"
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    # The folder of an export or of a checkpoint has other JSON files.
    found = sorted(folder.glob(pattern)) if folder.name == FOLDER or not (folder / "config.json").exists() else []
    if not found:
        raise ValueError(
            f"{path}: no reports {FOLDER}/{pattern}; make one first, for instance with "
            f"python -m archscale_megatron.evaluation perplexity --load {path}"
        )
    return [read(file) for file in found]


def _run(label: str, reports: Sequence[Report]) -> Run:
    newest: dict[Key, Report] = {}
    for report in sorted(reports, key=lambda report: report.time):
        deciding = {n: v for n, v in report.options.items() if v is not None and n not in (*SELECTING, NOTED)}
        for name, score in report.scores.items():
            newest[report.kind, name, score.metric, json.dumps(deciding, sort_keys=True)] = report
    used = {report.path for report in newest.values()}
    return Run(label, newest, len(reports) - len(used))


def rows_of(runs: Sequence[Run], metrics: Sequence[str] | None = None) -> list[Row]:
    """In the order of kinds, and within a kind as the reports have them.

    Raises:
        ValueError: no score has one of `metrics`.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run.reports))
    there = {key[2] for key in keys}
    for metric in metrics or ():
        if metric not in there:
            raise ValueError(f"--metric {metric}: no score has it; there are {', '.join(sorted(there))}")
    keys = [key for key in keys if not metrics or key[2] in metrics]
    order: dict[tuple[str, ...], int] = {}
    alike = defaultdict(list)
    for key in keys:
        order.setdefault(key[:3], len(order))
        alike[key[:3]].append(json.loads(key[3]))
    keys.sort(key=lambda key: (key[0], order[key[:3]], key[3]))
    return [Row(key, _differing(key, alike[key[:3]]), [run.score(key) for run in runs]) for key in keys]


def _differing(key: Key, alike: Sequence[dict[str, Any]]) -> str:
    own = json.loads(key[3])
    names = [n for n in sorted({n for each in alike for n in each}) if any(e.get(n) != own.get(n) for e in alike)]
    return ", ".join(f"{name} {_shown(own.get(name))}" for name in names)


def _shown(value: Any) -> str:
    if isinstance(value, dict) and {"name", "digest"} <= value.keys():  # a data file
        return f"{value['name']}:{value['digest'][:6]}"
    if isinstance(value, list):
        return "+".join(map(_shown, value))
    if isinstance(value, str):
        return textwrap.shorten(value, 24, placeholder="…")
    return "not given" if value is None else json.dumps(value)


def notes_of(runs: Sequence[Run]) -> list[str]:
    """What a reader of the table must know: from which checkpoints it is, and what was left out."""
    notes = []
    for run in runs:
        used = {report.path: report for report in run.reports.values()}
        of = sorted({str(report.checkpoint.get("path", report.path)) for report in used.values()})
        dtypes = sorted({str(report.options[NOTED]) for report in used.values() if report.options.get(NOTED)})
        left_out = f"; {run.older} older report{'s' * (run.older > 1)} of the same left out" if run.older else ""
        notes.append(f"{run.label}: {', '.join([*of, *dtypes])}{left_out}")
    if len(runs) == 2:
        notes.append(
            f"difference: second - first, its standard error that of independent runs; * beyond {BEYOND} of them"
        )
    return notes


def table(runs: Sequence[Run], rows: Sequence[Row], bold: bool = False) -> str:
    """Rows of what was measured, columns of runs; the best of a row is bold if `bold`."""
    with_difference = len(runs) == 2
    kinds = {row.key[0] for row in rows}
    cells = [["", "metric", *(run.label for run in runs), *(["difference", ""] if with_difference else [])]]
    marked = set()
    for row in rows:
        line = [f"{row.key[0]} {row.name}" if len(kinds) > 1 else row.name]
        line.append(f"{row.key[2]} {'↑' if row.higher_is_better else '↓'}")
        line += ["-" if score is None else _number(score.value, score.stderr) for score in row.scores]
        if with_difference:
            difference = row.difference()
            line += ["-" if difference is None else _number(*difference, sign="+"), "*" if row.is_beyond() else ""]
        marked |= {(len(cells), 2 + i) for i in row.best()}
        cells.append(line)
    return "\n".join(aligned(cells, left=2, bold=marked if bold else ()))


def _number(value: float, stderr: float | None, sign: str = "") -> str:
    digits = 4 if abs(value) < 100 else 1
    return f"{value:{sign},.{digits}f}" + ("" if stderr is None else f" ± {stderr:,.{digits}f}")


def as_json(runs: Sequence[Run], rows: Sequence[Row]) -> dict[str, Any]:
    """The table for programs."""
    return {
        "runs": [
            {"label": run.label, "reports": sorted({str(report.path) for report in run.reports.values()})}
            for run in runs
        ],
        "rows": [
            {
                "kind": row.key[0],
                "name": row.key[1],
                "metric": row.key[2],
                "higher_is_better": row.higher_is_better,
                "options": json.loads(row.key[3]),
                "scores": [score and dataclasses.asdict(score) for score in row.scores],
                "difference": row.difference(),
                "beyond_two_stderr": row.is_beyond(),
            }
            for row in rows
        ],
    }


def draw(runs: Sequence[Run], rows: Sequence[Row], path: Path) -> None:
    """Write bars with standard errors, a panel a metric, since metrics have scales of their own."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = defaultdict(list)
    for row in rows:
        panels[row.key[2], row.higher_is_better].append(row)
    heights = [len(panel) * (0.12 + 0.2 * len(runs)) + 0.6 for panel in panels.values()]
    figure = Figure(figsize=(8, sum(heights) + 0.5), dpi=150, layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, ((metric, higher), panel) in zip(all_axes, panels.items(), strict=True):
        for i in range(len(runs)):
            there = [(at, row.scores[i]) for at, row in enumerate(panel)]
            bars = [(at + (i - (len(runs) - 1) / 2) * 0.8 / len(runs), score) for at, score in there if score]
            axes.barh(
                [at for at, _ in bars],
                [score.value for _, score in bars],
                0.72 / len(runs),
                xerr=[score.stderr or 0 for _, score in bars],
                color=f"C{i}",
                error_kw={"elinewidth": 1, "ecolor": "0.25"},
            )
        axes.set_yticks(range(len(panel)), [row.name for row in panel], fontsize=8)
        axes.set_ylim(len(panel) - 0.5, -0.5)
        axes.set_xlabel(f"{metric} ({'higher' if higher else 'lower'} is better)", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.93")
        axes.set_axisbelow(True)
    handles = [Patch(color=f"C{i}", label=run.label) for i, run in enumerate(runs)]
    figure.legend(handles=handles, frameon=False, loc="outside upper center", ncols=min(len(runs), 4))
    pictures.save(figure, path)


def add_commands(commands: Any) -> None:
    """`compare`."""
    parser = commands.add_parser("compare", help="scores of several runs side by side", description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run directory, a checkpoint or an export that was evaluated, a folder of reports, or a report",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="draw bars into this picture")
    parser.add_argument("--metric", nargs="+", metavar="NAME", help="only these (all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> None:
    if args.output:
        pictures.check_path(args.output)
    runs = open_runs(args.runs)
    rows = rows_of(runs, args.metric)
    if args.json:
        print(json.dumps(plain(as_json(runs, rows)), indent=1, ensure_ascii=False))
    else:
        print(table(runs, rows, bold=sys.stdout.isatty()), *notes_of(runs), sep="\n")
    if args.output:
        draw(runs, rows, args.output)
