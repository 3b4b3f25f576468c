"""What became of the points of a sweep: one JSON file a point, and the two tables that are made of them."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from archscale_megatron.scaling.grid import canonical

RESULT = "result.json"
COLUMNS = (
    "name", "status", "family", "depth", "train_name", "base_learning_rate", "learning_rate", "parameters", "tokens",
    "flops", "loss", "validation_loss", "seconds", "error",
)  # fmt: skip
DONE, FAILED, TIMEOUT, NAN = "done", "failed", "timeout", "nan"
# How this program and Megatron end a run whose numbers are none.
NOT_FINITE = re.compile(r"found (NaN|Inf) in [\w ]+|(NaN|infinity) in the loss[\w -]*")
SAYS_WHY = re.compile(r"\b\w*(Error|Exception)\b|\berror:")


def read_result(directory: Path) -> dict[str, Any] | None:
    """What is recorded of the point in `directory`, or None."""
    try:
        return json.loads((directory / RESULT).read_text("utf-8"))
    except FileNotFoundError:
        return None


def write_result(directory: Path, result: dict[str, Any]) -> None:
    replace(directory / RESULT, json.dumps(result, indent=2) + "\n")


def judge(directory: Path, facts: dict[str, Any], exit_code: int | None, last: int) -> dict[str, Any]:
    """status, error, loss and validation_loss of a run that has ended.

    Args:
        directory: the point's; has `log` and `tensorboard`.
        facts: as `check_points.facts_of` says; a run that logs fewer samples has failed.
        exit_code: None where the run was killed at the timeout.
        last: logged iterations whose mean is the training loss.
    """
    losses, validation, samples = _logged(directory / "tensorboard")
    log = (directory / "log").read_text("utf-8", "replace")

    def ended(status: str, error: str) -> dict[str, Any]:
        return {"status": status, "error": error, "loss": None, "validation_loss": None}

    if exit_code is None:
        return ended(TIMEOUT, "killed at the timeout")
    if exit_code and (found := NOT_FINITE.search(log)):
        return ended(NAN, found[0])
    if not all(math.isfinite(loss) for loss in [*losses, *validation]):
        return ended(NAN, "the loss is not finite")
    if exit_code:
        return ended(FAILED, f"exit code {exit_code}: {_reason(log)}")
    if samples <= facts["samples"] - facts["logged_samples"]:
        return ended(FAILED, f"logged {samples} of {facts['samples']} samples, then ended without an error")
    return {
        "status": DONE,
        "error": "",
        "loss": math.fsum(losses[-last:]) / len(losses[-last:]),
        "validation_loss": validation[-1] if validation else None,
    }


def _logged(directory: Path) -> tuple[list[float], list[float], int]:
    """Training losses, validation losses and the samples behind the last of them, from TensorBoard's files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not directory.is_dir():
        return [], [], 0
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    known = events.Tags()["scalars"]

    def values(tag: str) -> list[Any]:
        return events.Scalars(tag) if tag in known else []

    samples = max((event.step for event in values("lm loss vs samples")), default=0)
    losses, validation = ([event.value for event in values(tag)] for tag in ("lm loss", "lm loss validation"))
    return losses, validation, samples


def _reason(log: str) -> str:
    """The line of a log that says why a run failed, before torchrun's own report, which is long and says less."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    end = next((i for i, line in enumerate(lines) if "torch/distributed/elastic" in line), len(lines))
    lines = lines[:end] or lines or ["no output"]
    return next((line for line in reversed(lines) if SAYS_WHY.search(line)), lines[-1])[:300]


def assemble(directory: Path) -> list[dict[str, Any]]:
    """Write `results.csv` and `results.jsonl` from the points that have ended; returns their lines.

    A line has `COLUMNS`, then each option that is not the same for all points. Several processes may do so at once.
    """
    with locked(directory / ".lock"):
        files = sorted(directory.glob(f"*/{RESULT}"))
        results = [json.loads(file.read_text("utf-8")) for file in files]
        results.sort(
            key=lambda r: [r[name] for name in ("family", "train_name", "depth", "base_learning_rate", "name")]
        )
        names = dict.fromkeys(name for result in results for name in result["options"])
        varying = [n for n in names if n not in COLUMNS and len({_canonical_option(r, n) for r in results}) > 1]
        lines = [
            {column: result[column] for column in COLUMNS} | {n: _text(result["options"].get(n)) for n in varying}
            for result in results
        ]
        table = io.StringIO()
        writer = csv.DictWriter(table, [*COLUMNS, *varying], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        replace(directory / "results.csv", table.getvalue())
        replace(directory / "results.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def _canonical_option(result: dict[str, Any], name: str) -> Any:
    words = result["options"].get(name)
    return None if words is None else canonical(words)


def _text(words: list[str] | None) -> str:
    """An option in a table: its words, `true` for a switch, empty where it is not given."""
    return "" if words is None else " ".join(words) or "true"


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[int]:
    """Hold the lock `path` and yield its file descriptor; a process that has this keeps the lock.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield descriptor
    finally:
        os.close(descriptor)


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)
