"""The commands `sweep` and `plot-lr` of `python -m archscale_megatron.scaling`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from archscale_megatron.scaling.check_points import PROGRAM, check
from archscale_megatron.scaling.grid import Point, distinct, parse_grid, parse_training, points_of, read_yaml
from archscale_megatron.scaling.results import read_result
from archscale_megatron.scaling.runner import Settings, run_points

SCRIPT = Path(__file__).resolve().parents[2] / PROGRAM


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the parsers of both commands; each sets `run`, a function of the parsed arguments."""
    sweep = commands.add_parser(
        "sweep",
        help="train a grid of models",
        description="Train every point of a grid. Started again, a sweep goes on where it stopped.",
        epilog="The training's options for all points stand at the end, behind --.",
        allow_abbrev=False,
    )
    sweep.add_argument("--output", type=Path, required=True, metavar="DIR", help="results.csv, and a directory a point")
    what = sweep.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--grid", action="append", metavar="OPTION=VALUE,...", help="values of an option; may be repeated"
    )
    what.add_argument("--config", type=Path, metavar="FILE", help="grids in YAML, such as examples/hp_sweep.yaml")
    what.add_argument("--points", type=Path, metavar="FILE", help="points that --slurm wrote; with --point")
    sweep.add_argument("--point", type=int, metavar="INDEX", help="run one point of --points")
    sweep.add_argument("--list", action="store_true", help="print the points and their commands, and run nothing")
    sweep.add_argument("--slurm", action="store_true", help="write a SLURM array job, and run nothing")
    sweep.add_argument("--jobs", type=int, metavar="N", help="points at a time (1; of a SLURM array, all)")
    sweep.add_argument("--processes-per-point", type=int, default=1, metavar="N", help="above 1 by torchrun (1)")
    sweep.add_argument("--timeout", type=float, metavar="SECONDS", help="kill a point that takes longer")
    sweep.add_argument(
        "--retry", action="store_true", help="run points again that failed or were killed at the timeout"
    )
    sweep.add_argument("--save-checkpoints", action="store_true", help="keep each point's model")
    sweep.add_argument(
        "--last", type=int, default=10, metavar="K", help="training loss: mean of K logged iterations (10)"
    )
    sweep.add_argument("--script", type=Path, default=SCRIPT, help=f"what trains ({PROGRAM})")
    sweep.add_argument("training", nargs="*", metavar="-- OPTIONS", help="training options for all points")
    sweep.set_defaults(run=_sweep)

    plot = commands.add_parser("plot-lr", help="loss against learning rate, and how far the best one moves with depth")
    plot.add_argument("results", type=Path, help="results.csv of a sweep")
    plot.add_argument("-o", "--output", type=Path, required=True, help="a .png, .svg or .pdf file")
    plot.add_argument("--loss", choices=("loss", "validation_loss"), default="loss", help="which loss (loss)")
    plot.add_argument("--json", action="store_true", help="print JSON in the place of the table")
    plot.set_defaults(run=_plot_lr)


def _sweep(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    settings = _settings(args)
    if args.points:
        if args.point is None or args.training:
            raise ValueError("--points: give --point INDEX with it, and no options of training")
        from archscale_megatron.scaling.slurm import read_point

        point, fact = read_point(args.points, args.point)
        points, facts = [point], [fact]
    elif args.point is not None:
        raise ValueError(f"--point {args.point}: needs --points FILE, which --slurm writes")
    else:
        points = distinct(_points(args))
        facts = check(points, settings.processes)
    if args.list:
        return _list(settings, points)
    if args.slurm:
        return _slurm(settings, points, facts, args.jobs)
    settings.output.mkdir(parents=True, exist_ok=True)
    try:
        counts = run_points(settings, points, facts)
    except KeyboardInterrupt:
        print("\nscaling: interrupted; the same command goes on with the sweep", file=sys.stderr)
        sys.exit(130)
    print(f"{', '.join(f'{n} {status}' for status, n in counts.items())}; {settings.output / 'results.csv'}")


def _settings(args: argparse.Namespace) -> Settings:
    for name in ("jobs", "processes_per_point", "last"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    if args.timeout is not None and not args.timeout > 0:
        raise ValueError(f"--timeout {args.timeout:g}: must be more than 0 seconds")
    if not args.script.is_file():
        raise ValueError(f"--script {args.script}: no such file; give the path of {PROGRAM}")
    runs_here = not (args.list or args.slurm)
    jobs = args.jobs or 1
    return Settings(
        output=args.output.resolve(),
        script=args.script.resolve(),
        processes=args.processes_per_point,
        jobs=jobs,
        timeout=args.timeout,
        retry=args.retry,
        save_checkpoints=args.save_checkpoints,
        last=args.last,
        devices=_devices(jobs, args.processes_per_point) if runs_here and jobs > 1 else (),
    )


def _devices(jobs: int, processes: int) -> tuple[str, ...]:
    """The GPUs of this machine that its points divide among them, none on a machine without."""
    import torch

    count = torch.cuda.device_count()
    if 0 < count < jobs * processes:
        raise ValueError(f"--jobs {jobs} of {processes} processes need {jobs * processes} GPUs; there are {count}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return tuple(visible.split(",") if visible else map(str, range(count))) if count else ()


def _points(args: argparse.Namespace) -> list[Point]:
    fixed: dict[str, Any] = parse_training(args.training)
    if args.config:
        return read_yaml(args.config, fixed)
    return points_of(fixed, parse_grid(args.grid))


def _list(settings: Settings, points: Sequence[Point]) -> None:
    for point in points:
        result = read_result(settings.output / point.name)
        print(f"{point.name}: {'to do' if settings.wants(result) or not result else result['status']}")
        print(f"    {shlex.join(settings.command(point))}")


def _slurm(settings: Settings, points: Sequence[Point], facts: Sequence[dict[str, Any]], at_a_time: int | None) -> None:
    from archscale_megatron.scaling.slurm import write_job

    todo = [(p, f) for p, f in zip(points, facts, strict=True) if settings.wants(read_result(settings.output / p.name))]
    if not todo:
        print("all points are finished")
        return
    points, facts = zip(*todo, strict=True)
    script = write_job(settings, points, facts, at_a_time)
    print(f"{len(todo)} points: sbatch {shlex.quote(str(script))}")


def _plot_lr(args: argparse.Namespace) -> None:
    from archscale_megatron.scaling.plot_lr import as_json, draw, panels_of, read_table, table

    panels = panels_of(read_table(args.results), args.loss)
    draw(panels, args.output, args.loss)
    print(json.dumps(as_json(panels), indent=2) if args.json else table(panels))
