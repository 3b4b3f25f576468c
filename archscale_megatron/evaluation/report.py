"""What an evaluation leaves: one JSON file of scores, and what they are of.

A score's name is what was measured, `arc_easy` or `phonebook@4096`; where a task has several metrics, each is a score
with a name of its own, `arc_easy/acc_norm`. `options` are those that decide the numbers, not those that say how fast
they come or where they go.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xxhash

from archscale_megatron.checkpoint import files, manifest
from archscale_megatron.checkpoint.resume import RELEASE, find_checkpoint, is_checkpoint
from archscale_megatron.checkpoint.retention import iteration_of
from archscale_megatron.checkpoint.run_description import versions

FORMAT = 1
FOLDER = "evaluation"  # of reports, in a run directory or an export
PACKAGES = ("torch", "transformers", "megatron-core", "lm-eval", "math-verify", "vllm")
SAMPLED = 1 << 20  # bytes at each end of a large file that a fingerprint covers
WEIGHTS = (".safetensors", ".distcp", ".metadata", ".json", ".model")  # suffixes or names of what makes a model


@dataclass(frozen=True)
class Score:
    """
    Attributes:
        value: nan where there is none; nothing that is not finite is written.
        stderr: standard error of `value`, None where it has none.
        n: how many items it is of.
        metric: what `value` is, such as `acc` or `perplexity`.
    """

    value: float
    stderr: float | None
    n: int
    metric: str
    higher_is_better: bool = True


@dataclass(frozen=True)
class Report:
    """
    Attributes:
        path: of its file.
        kind: the command that made it.
        time: UTC, ISO 8601.
        details: whatever the command wants to tell besides.
        checkpoint: an engine's `source`.
    """

    path: Path
    kind: str
    time: str
    scores: dict[str, Score]
    details: Any
    options: dict[str, Any]
    versions: dict[str, str]
    checkpoint: dict[str, Any]


def write(
    path: Path,
    *,
    kind: str,
    scores: Mapping[str, Score],
    options: Mapping[str, Any],
    source: Mapping[str, Any],
    details: Any = None,
) -> Report:
    """Write a report as `path`, whole or not at all. Called on one rank."""
    content = {
        "format": FORMAT,
        "kind": kind,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "scores": {name: dataclasses.asdict(score) for name, score in scores.items()},
        "details": details,
        "options": options,
        "versions": versions(PACKAGES),
        "checkpoint": source,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return read(path)


def read(path: Path) -> Report:
    """The report in a file.

    Raises:
        ValueError: it holds none, or one of another format; the message is one line.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict) or not {"format", "kind", "scores"} <= content.keys():
        raise ValueError(f"{path}: not a report of an evaluation")
    if content["format"] != FORMAT:
        raise ValueError(f"{path}: a report of format {content['format']}; this release reads {FORMAT}")
    try:
        scores = {name: _score(fields) for name, fields in content["scores"].items()}
        fields = {name: content[name] for name in ("kind", "time", "details", "options", "versions", "checkpoint")}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: a damaged report ({type(error).__name__}: {error})") from None
    return Report(path=path, scores=scores, **fields)


def _score(fields: dict[str, Any]) -> Score:
    value = fields["value"]
    return Score(**fields | {"value": math.nan if value is None else float(value)})


def add_output_option(parser: argparse.ArgumentParser) -> None:
    """`--output`, `--again` and `--json`."""
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="of the report (evaluation/ in the run directory or the export)"
    )
    parser.add_argument("--again", action="store_true", help="compute it although the report is there already")
    parser.add_argument("--json", action="store_true", help="print the report instead of a table")


def output_path(output: Path | None, load: Path, kind: str, options: Mapping[str, Any]) -> Path:
    """The file of a report: `{kind}-{checkpoint or folder}-{digest}.json`, the digest that of the model's fingerprint
    and of the options.

    Raises:
        CheckpointError: `load` holds no model.
    """
    model = _model(load)
    directory = output or (model.parent if _in_run_directory(model) else model) / FOLDER
    of = json.dumps(plain([kind, options, fingerprint(load)]), sort_keys=True)
    return directory / f"{kind}-{model.resolve().name}-{xxhash.xxh3_64_hexdigest(of.encode())[:8]}.json"


def shown_if_there(path: Path, args: argparse.Namespace) -> bool:
    """Whether the report is there and need not be computed; rank 0 has printed it then."""
    if args.again or not path.is_file():
        return False
    show(read(path), args.json)
    if not args.json and is_first_rank():
        print(f"{path} was there already; --again computes it anew")
    return True


def show(report: Report, as_json: bool = False) -> None:
    """Print the report: a table of its scores, or its file. Rank 0 does."""
    if is_first_rank():
        print(report.path.read_text("utf-8").rstrip("\n") if as_json else table(report))


def table(report: Report) -> str:
    """The scores, to be read."""
    rows = [("score", "metric", "value", "± stderr", "n")]
    for name, score in report.scores.items():
        error = "" if score.stderr is None else f"± {score.stderr:.4f}"
        rows.append((name, score.metric, f"{score.value:.4f}", error, f"{score.n:,}"))
    return "\n".join([*aligned(rows, left=2), str(report.path)])


def aligned(rows: Sequence[Sequence[str]], left: int = 1, bold: Collection[tuple[int, int]] = ()) -> list[str]:
    """Rows of cells as lines of columns, the first `left` of them aligned to the left, the others to the right.

    `bold` are (row, column) of cells that a terminal shows so.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for y, row in enumerate(rows):
        cells = [
            cell.ljust(w) if x < left else cell.rjust(w) for x, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        cells = [f"\033[1m{cell}\033[0m" if (y, x) in bold else cell for x, cell in enumerate(cells)]
        lines.append("  ".join(cells).rstrip())
    return lines


def fingerprint(load: Path) -> str:
    """xxh3_128, hexadecimal, of the model in a run directory, checkpoint or export: it changes when the weights do.

    Of a training checkpoint it is the digest of manifest.json, and so covers every byte. Of an export, and of a
    checkpoint of Megatron's own, it covers names and sizes of weights, tokenizer and JSON files, and the first and
    last MiB of each.

    Raises:
        CheckpointError: `load` holds no model.
    """
    model = _model(load)
    if (model / manifest.FILE_NAME).is_file():
        return manifest.digest(model / manifest.FILE_NAME)
    state = xxhash.xxh3_128()
    for path in sorted(model.iterdir()):
        if path.is_file() and (path.suffix in WEIGHTS or path.name in WEIGHTS):
            state.update(json.dumps(described_file(path)).encode())
    return state.hexdigest()


def described_file(path: Path) -> dict[str, Any]:
    """What tells one data file from another, for a report's options: name, bytes, and the xxh3_128 of its first and
    last MiB."""
    state, size = xxhash.xxh3_128(), path.stat().st_size
    with path.open("rb") as file:
        state.update(file.read(SAMPLED))
        file.seek(max(size - SAMPLED, 0))
        state.update(file.read(SAMPLED))
    return {"name": path.name, "bytes": size, "digest": state.hexdigest()}


def plain(value: Any) -> Any:
    """`value` as JSON has it: tuples as lists, numbers that are not finite as None, all else as its text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    return plain(value.item()) if hasattr(value, "item") else str(value)


def _model(load: Path) -> Path:
    """The directory of the checkpoint or of the export."""
    return load if (load / "config.json").exists() else find_checkpoint(load)


def _in_run_directory(model: Path) -> bool:
    return is_checkpoint(model) and (iteration_of(model) is not None or model.name == RELEASE)


def is_first_rank() -> bool:
    """Whether this process may print, before torch.distributed is there, too."""
    return int(os.environ.get("RANK", "0")) == 0
