"""Check training commands before any is run, and say what their runs will be.

`check` starts this file as a process of its own: Megatron, which it imports, has global state, and takes seconds to
import, so one process checks all points.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from archscale_megatron.scaling.grid import LEARNING_RATES, Point

PROGRAM = "pretrain_archscale.py"


def check(points: Sequence[Point], processes: int) -> list[dict[str, Any]]:
    """For each point `facts_of` its run on `processes` processes.

    Raises:
        ValueError: training would refuse a point; says which one and why.
    """
    finished = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps([point.arguments for point in points]),
        env=os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise ValueError(
            f"the check of the points failed: {(finished.stderr.strip() or 'no message').splitlines()[-1]}"
        )
    facts = json.loads(finished.stdout.splitlines()[-1])
    for point, found in zip(points, facts, strict=True):
        if "error" in found:
            raise ValueError(f"point {point.name}: {found['error']}")
        given = [point.options[name] for name in LEARNING_RATES if point.options.get(name)]
        found["base_learning_rate"] = float(given[0][0]) if given else found["learning_rate"]
    return facts


def facts_of(arguments: list[str]) -> dict[str, Any]:
    """family, depth, train_name, learning_rate (the largest), parameters, tokens, flops (of all tokens), samples, and
    logged_samples, which are those between two lines of the log; or `error`, one line."""
    from megatron.training.arguments import validate_args

    from archscale_megatron.archs.counts import parameters, training_flops
    from archscale_megatron.data.datasets import check_data
    from archscale_megatron.training.arguments import apply_arguments, check_schedule, parse_command_line

    sys.argv = [PROGRAM, *arguments]
    printed = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(printed):
        try:
            args, explicit = parse_command_line()
            apply_arguments(args, explicit)
            check_schedule(args)
            check_data(args)
            validate_args(args)
        except SystemExit:
            return {"error": (printed.getvalue().strip() or "refused").splitlines()[-1].partition("error: ")[2]}
        except (AssertionError, OSError, ValueError) as error:
            return {"error": str(error) or type(error).__name__}
    samples = args.train_samples or args.train_iters * args.global_batch_size
    return {
        "family": args.architecture.family,
        "depth": args.architecture.depth,
        "train_name": args.train_name or "",
        "learning_rate": args.lr,
        "parameters": parameters(args.architecture),
        "tokens": samples * args.seq_length,
        "flops": training_flops(args.architecture, args.seq_length) * samples * args.seq_length,
        "samples": samples,
        "logged_samples": args.global_batch_size * args.tensorboard_log_interval,
    }


def main() -> None:
    commands = json.load(sys.stdin)

    from archscale_megatron import cpu

    cpu.install()

    from archscale_megatron import megatron_patches

    megatron_patches.apply()
    print("\n" + json.dumps([facts_of(arguments) for arguments in commands]))


if __name__ == "__main__":
    main()
