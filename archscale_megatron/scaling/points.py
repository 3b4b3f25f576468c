"""The points of a scaling law, of a table, or of the TensorBoard folders of runs.

A table is a .csv, .tsv or .jsonl file with a point a line: the results of a sweep, or one of your own such as
examples/paper_losses.csv. Its columns:

    family, variant, train_name   together the name of the point's series (`--by` names others)
    parameters, tokens, flops     of the model and of its training; those that the law needs
    loss                          nats per token, of training or validation
    status                        optional: anything but `done` leaves the point out
    scaling                       optional: the law that the point is for, `flops` or `data`; the others leave it out.
                                  Chinchilla's takes all
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from archscale_megatron.scaling.laws import CHINCHILLA, Law

DONE = "done"
SERIES_COLUMNS = ("family", "variant", "parametrization", "train_name")


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are called."""

    loss: str = "loss"
    flops: str = "flops"
    tokens: str = "tokens"
    parameters: str = "parameters"
    series: tuple[str, ...] | None = None  # None: those of `SERIES_COLUMNS` that there are


@dataclass(frozen=True)
class Point:
    """One trained model: `values` are those of the law's variables and, where known, `parameters`."""

    series: str
    values: Mapping[str, float]
    loss: float


@dataclass
class Points:
    """Those that a law is fitted to, and how many were left out for which reason."""

    used: list[Point] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def left_out_in_words(self) -> str | None:
        """Such as `3 points left out: 2 failed, 1 NaN`; None where all are used."""
        total = sum(self.left_out.values())
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())
        return f"{total} point{'' if total == 1 else 's'} left out: {reasons}" if total else None

    def take(self, row: Mapping[str, Any], law: Law, columns: Columns, where: str) -> None:
        """Use a row, or count why not.

        Raises:
            ValueError: a column that is not there, or a number that is none; begins with `where`.
        """
        values: dict[str, float | None] = {}
        reason = _not_for_fit(row, law)
        if reason is None:
            values = {name: _cell(row, getattr(columns, name), name, where) for name in ("loss", *law.variables)}
            reason = next(filter(None, map(_why_not, values, values.values())), None)
        if reason:
            self.left_out[reason] += 1
            return
        values["parameters"] = _number(row.get(columns.parameters), f"{where}: {columns.parameters}")
        known = {name: value for name, value in values.items() if value is not None}
        self.used.append(Point(_series(row, columns, where), known, known.pop("loss")))

    def keep_best(self) -> None:
        """Of the points that differ only in the loss, leave out all but the one with the least: of a sweep, the best
        learning rate."""
        found: dict[Any, Point] = {}
        for point in sorted(self.used, key=lambda point: point.loss):
            found.setdefault((point.series, *sorted(point.values.items())), point)
        if worse := len(self.used) - len(found):
            self.left_out["not the best"] += worse
        self.used = [point for point in self.used if point in found.values()]


def read(paths: Iterable[Path], law: Law, columns: Columns, *, where: Mapping[str, str], tag: str, last: int) -> Points:
    """The points of tables and of TensorBoard folders.

    Args:
        where: column -> text, of the rows to take; those of another value are not counted as left out.
        tag, last: of TensorBoard: which loss, and of how many of its last values the mean is taken.
    Raises:
        FileNotFoundError: a path that is not there.
        ValueError: a line of a table or a folder that cannot be read; says which and why.
    """
    points = Points()
    for path in paths:
        if path.is_dir():
            from archscale_megatron.scaling.tensorboard import runs

            for directory, row in runs(path, tag, last):
                points.take(row, law, Columns(series=columns.series), str(directory))
            continue
        for line, row in _rows(path):
            position = f"{path}, line {line}"
            if missing := [name for name in where if name not in row]:
                raise ValueError(f"{position}: --where {missing[0]}: no such column; there are {', '.join(row)}")
            if all(_same(row[name], text) for name, text in where.items()):
                points.take(row, law, columns, position)
    return points


def by_series(points: Iterable[Point], law: Law) -> dict[str, list[Point]]:
    """Series -> points, in the order of the table. L(D) is a law of one model, so that there each number of parameters
    is a series."""
    points = list(points)
    sizes: dict[str, set[float]] = {}
    for point in points:
        sizes.setdefault(point.series, set()).add(point.values.get("parameters", 0.0))
    result: dict[str, list[Point]] = {}
    for point in points:
        name = point.series
        if "parameters" not in law.variables and "tokens" in law.variables and len(sizes[name]) > 1:
            name = f"{name} {point.values.get('parameters', math.nan):.4g} parameters"
        result.setdefault(name, []).append(point)
    return result


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and columns -> values, of each line of a table."""
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix in (".csv", ".tsv"):
            reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",", restkey="")
            for row in reader:
                if None in row.values() or "" in row:
                    raise ValueError(
                        f"{path}, line {reader.line_num}: not as many values as the first line has columns"
                    )
                yield reader.line_num, row
        elif path.suffix in (".jsonl", ".json"):
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON: {error.msg}") from None
                if not isinstance(row, dict):
                    raise ValueError(f'{path}, line {number}: not a JSON object, such as {{"loss": 2.5}}')
                yield number, row
        else:
            raise ValueError(f"{path}: give a .csv, .tsv or .jsonl file, or a TensorBoard folder")


def _not_for_fit(row: Mapping[str, Any], law: Law) -> str | None:
    status = str(row.get("status") or DONE).strip()
    if status != DONE:
        return "NaN" if status.lower() == "nan" else status
    scaling = str(row.get("scaling") or law.name).strip()
    return None if law is CHINCHILLA or scaling == law.name else f"of {scaling} scaling"


def _cell(row: Mapping[str, Any], column: str, name: str, where: str) -> float | None:
    if column not in row:
        raise ValueError(f"{where}: no column {column}; there are {', '.join(row)}; --{name}-column says which it is")
    value = _number(row[column], f"{where}: {column}")
    if value is not None and value <= 0:
        raise ValueError(f"{where}: {column} {row[column]}: must be more than 0")
    return value


def _why_not(name: str, value: float | None) -> str | None:
    """Why a point with this value is left out."""
    if value is None:
        return f"without {name}"
    return None if math.isfinite(value) else "NaN" if math.isnan(value) else "infinite"


def _number(value: Any, where: str) -> float | None:
    """None where there is none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{where} {value!r}: not a number") from None


def _series(row: Mapping[str, Any], columns: Columns, where: str) -> str:
    names = columns.series or tuple(name for name in SERIES_COLUMNS if name in row)
    if missing := [name for name in names if name not in row]:
        raise ValueError(f"{where}: --by {missing[0]}: no such column; there are {', '.join(row)}")
    return " ".join(str(row[name]) for name in names if row[name] not in (None, "")) or "all"


def _same(value: Any, text: str) -> bool:
    """Numbers are compared as such: 4e-4 is 0.0004."""
    try:
        return float(value) == float(text)
    except (TypeError, ValueError):
        return str(value) == text
