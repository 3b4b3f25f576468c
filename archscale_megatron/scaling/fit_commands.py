"""`scaling fit-flops | fit-data | fit-chinchilla`: fit a law to each series of points, and compare the series."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archscale_megatron.scaling import points as reader
from archscale_megatron.scaling.laws import CHINCHILLA, DATA, FLOPS, Fit, HeldOut, Law, fit, predict_largest
from archscale_megatron.scaling.points import Columns, Point
from archscale_megatron.scaling.tensorboard import DEFAULT_TAG

LAWS = (FLOPS, DATA, CHINCHILLA)


@dataclass(frozen=True)
class Series:
    """A fitted series: what a row of the table says."""

    name: str
    points: list[Point]
    fit: Fit
    held_out: HeldOut | None


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the parsers of the three fits; each sets `run`, a function of the parsed arguments."""
    for law in LAWS:
        command = commands.add_parser(
            f"fit-{law.name}",
            help=law.formula,
            description=f"Fit {law.formula} to each series of points.\n\n{reader.__doc__}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_argument(
            "inputs", nargs="+", type=Path, metavar="TABLE|FOLDER", help="of points, or of TensorBoard"
        )
        command.add_argument("--by", metavar="COLUMN,...", help="columns that name a series (those above)")
        for column in ("loss", *law.variables):
            command.add_argument(f"--{column}-column", default=column, metavar="COLUMN", help=f"({column})")
        command.add_argument(
            "--where", action="append", default=[], metavar="COLUMN=VALUE", help="take these rows only; may be repeated"
        )
        command.add_argument(
            "--best", action="store_true", help="of points that differ only in the loss (learning rates), take the best"
        )
        command.add_argument("--tag", default=DEFAULT_TAG, help=f"TensorBoard's loss ({DEFAULT_TAG})")
        command.add_argument("--last", type=int, default=1, metavar="K", help="mean of its last K values (1)")
        command.add_argument("--draws", type=int, default=500, help="of the bootstrap; 0 for no intervals (500)")
        command.add_argument("--level", type=float, default=95, metavar="PERCENT", help="of the intervals (95)")
        command.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
        command.add_argument("-o", "--output", type=Path, help="draw points and fits: a .png, .svg or .pdf file")
        command.add_argument("--json", action="store_true", help="for programs")
        command.set_defaults(run=_fit, law=law)


def _fit(args: argparse.Namespace) -> None:
    law: Law = args.law
    _check(args)
    columns = Columns(
        **{name: getattr(args, f"{name}_column") for name in ("loss", *law.variables)},
        series=tuple(args.by.split(",")) if args.by else None,
    )
    where = dict(text.split("=", 1) for text in args.where)
    points = reader.read(args.inputs, law, columns, where=where, tag=args.tag, last=args.last)
    if args.best:
        points.keep_best()
    fitted, refused = _fit_all(law, reader.by_series(points.used, law), args)
    left_out = points.left_out_in_words()
    if not fitted:
        why = [f"{name}: {reason}" for name, reason in refused.items()] or ["no points"]
        raise ValueError("; ".join([*why, *filter(None, [left_out])]))
    if args.output:
        from archscale_megatron.scaling.fit_plot import plot  # matplotlib takes a second to import

        plot(law, fitted, args.output)
    if args.json:
        print(json.dumps(_described(law, fitted, refused, points.left_out), indent=2))
    else:
        print(_table(law, fitted, args.level if args.draws else None))
        for name, reason in refused.items():
            print(f"{name}: no fit: {reason}")
        if left_out:
            print(left_out)


def _check(args: argparse.Namespace) -> None:
    for name, least in {"draws": 0, "last": 1, "seed": 0}.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: must be {least} or more")
    if not 0 < args.level < 100:
        raise ValueError(f"--level {args.level:g}: must be between 0 and 100")
    if wrong := [text for text in args.where if "=" not in text]:
        raise ValueError(f"--where {wrong[0]}: give COLUMN=VALUE")


def _fit_all(law: Law, groups: dict[str, list[Point]], args: argparse.Namespace) -> tuple[list[Series], dict[str, str]]:
    """The fitted series, and why those without a fit have none."""
    import numpy as np

    fitted, refused = [], {}
    for name, group in groups.items():
        x = np.array([[point.values[variable] for variable in law.variables] for point in group])
        loss = np.array([point.loss for point in group])
        try:
            found = fit(law, x, loss, draws=args.draws, level=args.level / 100, seed=args.seed)
        except ValueError as error:
            refused[name] = str(error)
        else:
            fitted.append(Series(name, group, found, predict_largest(law, x, loss)))
    return fitted, refused


def _table(law: Law, fitted: list[Series], level: float | None) -> str:
    """One row a series."""
    header = ["", "points"]
    for name in law.names:
        header += [name] if level is None else [name, f"{level:g}%"]
    header += ["R^2", "largest", "predicted", "error"]
    rows = [header]
    for series in fitted:
        row = [series.name, str(len(series.points))]
        for i, (name, value) in enumerate(zip(law.names, series.fit.values, strict=True)):
            row.append(_short(name, value))
            if series.fit.intervals is not None:
                row.append(" to ".join(_short(name, bound) for bound in series.fit.intervals[i]))
        row.append(f"{series.fit.r_squared:.5f}")
        if held := series.held_out:
            row += [f"{held.loss:.4f}", f"{held.predicted:.4f}", f"{held.relative_error:+.2%}"]
        else:
            row += ["-"] * 3
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    notes = [LEGEND]
    if any(series.fit.values[-1] == 0 for series in fitted):
        notes.append(f"{law.names[-1]} 0.0000: at its bound; these points do not tell {law.names[-1]} from none")
    return "\n".join([law.formula, *(line.rstrip() for line in lines), *notes])


LEGEND = "largest: the loss of the largest point; predicted: what a fit without that point says of it"


def _short(name: str, value: float) -> str:
    """Factors have any size; exponents and limits are near 1."""
    return f"{value:.4g}" if name in ("A", "B") else f"{value:.4f}"


def _described(law: Law, fitted: list[Series], refused: dict[str, str], left_out: dict[str, int]) -> dict[str, Any]:
    return {
        "law": law.formula,
        "series": [
            {
                "name": series.name,
                "points": [{**point.values, "loss": point.loss} for point in series.points],
                **dict(zip(law.names, map(_finite, series.fit.values), strict=True)),
                "r_squared": series.fit.r_squared,
                "intervals": None
                if series.fit.intervals is None
                else {
                    name: [_finite(bound) for bound in bounds]
                    for name, bounds in zip(law.names, series.fit.intervals, strict=True)
                },
                "held_out": series.held_out
                and {**dataclasses.asdict(series.held_out), "relative_error": series.held_out.relative_error},
            }
            for series in fitted
        ],
        "without_fit": refused,
        "left_out": left_out,
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return float(value) if math.isfinite(value) else None
