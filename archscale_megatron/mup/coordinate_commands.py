"""`coord-check`: a coordinate check of a family and a parametrisation, as a table of slopes and a picture."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from archscale_megatron.mup.coordinate_check import Setting, Slope, slopes
from archscale_megatron.mup.rules import Parametrization
from archscale_megatron.pictures import check_path

PARAMETRIZATIONS = ("sp", "mup", "mup++")  # with AdamW; HyperP is for another optimizer


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add `coord-check` to the subcommands of a parser; its `run` returns the exit code.

    `run` raises ValueError or OSError for arguments that cannot be.
    """
    command = commands.add_parser("coord-check", help="do sizes of activations depend on a model's width and depth?")
    command.set_defaults(run=run)
    command.add_argument("--train-model", required=True, metavar="FAMILY", help="architecture family")
    command.add_argument("--parametrization", choices=PARAMETRIZATIONS, default="mup++", help="(mup++)")
    command.add_argument(
        "--widths", type=int, nargs="+", default=[64, 128, 256], metavar="N", help="hidden sizes (64 128 256)"
    )
    command.add_argument(
        "--depths", type=int, nargs="+", default=[8, 16, 32], metavar="N", help="(8 16 32); one leaves this axis out"
    )
    command.add_argument("--steps", type=int, default=4, help="of the optimizer, all on one batch (4)")
    command.add_argument("--seeds", type=int, default=4, help="initial values over which sizes are averaged (4)")
    command.add_argument("--lr", type=float, default=2e-3, help="learning rate of the smallest model (0.002)")
    command.add_argument("--tied-embeddings", action="store_true", help="the output layer is the embedding")
    command.add_argument("-o", "--output", type=Path, help="file for the picture, such as one with .png or .svg")
    command.add_argument("--json", action="store_true", help="all sizes and slopes, for programs")


def run(args: argparse.Namespace) -> int:
    """0: all slopes are within their limits; 1: some are not."""
    _check(args)
    setting = Setting(
        family=args.train_model,
        parametrization=Parametrization(args.parametrization),
        widths=args.widths,
        depths=args.depths,
        tied=args.tied_embeddings,
        steps=args.steps,
        seeds=args.seeds,
        learning_rate=args.lr,
    )
    _ = setting.architectures  # raises what is wrong with them before Megatron is imported

    from tqdm import tqdm

    from archscale_megatron import single_process

    single_process.prepare()
    from archscale_megatron.mup.coordinate_plot import draw
    from archscale_megatron.mup.coordinates import measure_all

    total = len(setting.models) * setting.seeds * (setting.steps + 1)
    with single_process.process_groups(), tqdm(total=total, unit="pass", disable=None, leave=False) as bar:
        found = slopes(setting, measure_all(setting, bar.update))
    if args.output:
        draw(setting, found).savefig(args.output)
    print(json.dumps(_for_programs(setting, found), indent=2) if args.json else table(setting, found))
    return 0 if all(slope.passed for slope in found) else 1


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError if a number is out of range."""
    for name in ("widths", "depths"):
        if bad := [size for size in getattr(args, name) if size < 1]:
            raise ValueError(f"--{name} {bad[0]}: must be a positive integer")
    if len(set(args.widths)) == len(set(args.depths)) == 1:
        raise ValueError("--widths and --depths have one size each; give two or more of one of them to compare")
    if args.steps < 2:
        raise ValueError(
            f"--steps {args.steps}: give 2 or more; behind an output layer of zeros nothing learns in the first"
        )
    if args.seeds < 1:
        raise ValueError(f"--seeds {args.seeds}: must be a positive integer")
    if args.output:
        check_path(args.output)
    if not (math.isfinite(args.lr) and args.lr > 0):
        raise ValueError(f"--lr {args.lr}: must be a positive number")


def table(setting: Setting, slopes: list[Slope]) -> str:
    """A line a quantity and axis, then one for each slope that is outside its limits."""
    lines = []
    last = setting.steps
    for axis, models in setting.axes.items():
        width, depth = models[0]
        sizes = ", ".join(str(model[axis == "depth"]) for model in models)
        fixed = f"depth {depth}" if axis == "width" else f"width {width}"
        lines += [f"slopes of log(size) against log({axis}), {axis}s {sizes} at {fixed}", ""]
        lines += [f"{'':26}{'initial':>9}   change after step", f"{'':26}{'':9}{_steps(last)}{'limits':>16}"]
        for quantity in dict.fromkeys(slope.quantity for slope in slopes if slope.axis == axis):
            of_quantity = [slope for slope in slopes if (slope.axis, slope.quantity) == (axis, quantity)]
            values = "".join(_number(slope.value) for slope in of_quantity[1:])
            lines.append(f"{quantity:26}{_number(of_quantity[0].value):>9}{values}{_limits(of_quantity[-1]):>16}")
        lines.append("")
    failed = [slope for slope in slopes if not slope.passed]
    lines += [_complaint(slope) for slope in failed]
    name = f"{setting.family}, {setting.parametrization.name}"
    lines.append(f"{name}: failed, {len(failed)} of the slopes" if failed else f"{name}: passed")
    return "\n".join(lines)


def _steps(last: int) -> str:
    return "".join(f"{step:>7}" for step in range(1, last + 1))


def _number(value: float | None) -> str:
    return f"{'-':>7}" if value is None else f"{value:7.2f}"


def _limits(slope: Slope) -> str:
    return f"{slope.lower:.2f} to {slope.upper:.2f}" if math.isfinite(slope.lower) else f"up to {slope.upper:.2f}"


def _complaint(slope: Slope) -> str:
    what = f"change after step {slope.step}" if slope.step else "initial size"
    of = f"{slope.quantity}, {what}, against {slope.axis}"
    if not all(map(math.isfinite, slope.sizes)):
        return f"failed: {of}: not finite"
    return f"failed: {of}: slope {slope.value:.2f}, limits {_limits(slope)}"


def _for_programs(setting: Setting, slopes: list[Slope]) -> dict[str, Any]:
    """Infinite limits and sizes are null."""
    rows = [{name: _finite(value) for name, value in asdict(slope).items()} for slope in slopes]
    return {
        "train_model": setting.family,
        "parametrization": setting.parametrization.name,
        "tied_embeddings": setting.tied,
        "models": {axis: [{"width": w, "depth": d} for w, d in models] for axis, models in setting.axes.items()},
        "steps": setting.steps,
        "seeds": setting.seeds,
        "learning_rate": setting.learning_rate,
        "passed": all(slope.passed for slope in slopes),
        "slopes": [row | {"passed": slope.passed} for row, slope in zip(rows, slopes, strict=True)],
    }


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
