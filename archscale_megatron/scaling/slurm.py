"""A sweep as a SLURM array job: the points in a file, and a script of which each task runs one."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from archscale_megatron.scaling.grid import Point
from archscale_megatron.scaling.results import replace
from archscale_megatron.scaling.runner import Settings

SCRIPT = """#!/usr/bin/env bash
# Written by `scaling sweep --slurm`. Options of sbatch win: sbatch --partition=gpu --time=2:00:00 {name}
#SBATCH --job-name=sweep
#SBATCH --array=0-{last}{at_a_time}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node={processes}
#SBATCH --output="{logs}/%A_%a.log"
#SBATCH --signal=TERM@60
cd {here}
exec srun {command} --point "$SLURM_ARRAY_TASK_ID"
"""


def write_job(
    settings: Settings, points: Sequence[Point], facts: Sequence[dict[str, Any]], at_a_time: int | None
) -> Path:
    """Write the points that are not finished, and the script for them; returns the script.

    Both have a name of their own for each set of points, so that tasks in the queue keep the points they had.
    """
    entries = [{"options": p.options, "facts": f} for p, f in zip(points, facts, strict=True)]
    text = json.dumps(entries, indent=1) + "\n"
    name = f"sweep-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    (settings.output / "slurm").mkdir(parents=True, exist_ok=True)
    file = settings.output / f"{name}.json"
    replace(file, text)
    command = [sys.executable, "-m", "archscale_megatron.scaling", "sweep", "--output", str(settings.output)]
    command += ["--points", str(file), "--script", str(settings.script), "--last", str(settings.last)]
    command += ["--processes-per-point", str(settings.processes)]
    command += ["--timeout", str(settings.timeout)] if settings.timeout else []
    command += ["--retry"] * settings.retry + ["--save-checkpoints"] * settings.save_checkpoints
    script = file.with_suffix(".slurm")
    replace(
        script,
        SCRIPT.format(
            name=script.name,
            last=len(points) - 1,
            at_a_time=f"%{at_a_time}" if at_a_time else "",
            processes=settings.processes,
            logs=settings.output / "slurm",
            here=shlex.quote(str(Path.cwd())),
            command=shlex.join(command),
        ),
    )
    return script


def read_point(path: Path, index: int) -> tuple[Point, dict[str, Any]]:
    """Point number `index` of a file of `write_job`, and its facts.

    Raises:
        ValueError: there is none of that number.
    """
    entries = json.loads(path.read_text("utf-8"))
    if not 0 <= index < len(entries):
        raise ValueError(f"--point {index}: {path} has points 0 to {len(entries) - 1}")
    entry = entries[index]
    return Point({name: tuple(words) for name, words in entry["options"].items()}), entry["facts"]
