"""Look at checkpoints and verify them: `python -m archscale_megatron.checkpoint info | verify PATH`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from archscale_megatron.checkpoint import CheckpointError, manifest, run_description
from archscale_megatron.checkpoint.resume import RELEASE, check, is_checkpoint, tracked
from archscale_megatron.checkpoint.retention import checkpoints
from archscale_megatron.command_line import Parser, run, start

LARGE = 1 << 30  # bytes, from which on there is a progress bar


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 1 if a checkpoint is bad, 2 (and one line) for bad input."""
    parser = _parser()
    return run(parser, parser.parse_args(arguments))


def _parser() -> Parser:
    parser = Parser(prog="python -m archscale_megatron.checkpoint", description="Look at training checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="info | verify")
    info = commands.add_parser("info", help="what made a checkpoint, what it holds, whether it is complete")
    info.set_defaults(run=_info)
    verify = commands.add_parser("verify", help="compare every file's digest; exit code 1 if one is bad")
    verify.set_defaults(run=_verify)
    for command in (info, verify):
        command.add_argument("path", type=Path, help="a run directory (--save), or one checkpoint in it")
        command.add_argument("--json", action="store_true", help="for programs")
    return parser


def _found(path: Path) -> list[Path]:
    """The checkpoints that `path` is or holds; raises CheckpointError if there is none."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    if is_checkpoint(path):
        return [path]
    found = [*checkpoints(path).values(), *([path / RELEASE] if (path / RELEASE).is_dir() else [])]
    if not found:
        raise CheckpointError(f"{path}: holds no checkpoint")
    return found


def _info(args: argparse.Namespace) -> int:
    reports = [_report(checkpoint) for checkpoint in _found(args.path)]
    if args.json:
        print(json.dumps(reports, indent=2))
    else:
        print("\n\n".join("\n".join(_lines(report)) for report in reports))
    return 0


def _report(checkpoint: Path) -> dict[str, Any]:
    """What can be said without reading the data."""
    state, problem = _state(checkpoint)
    files = {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir()) if path.is_file()}
    try:
        made_by = run_description.read(checkpoint) or {}
    except CheckpointError as error:
        made_by, problem = {}, problem or str(error)
    made_by.pop("options", None)
    samples, length = made_by.get("consumed_samples"), made_by.get("data", {}).get("seq_length")
    return {
        "path": str(checkpoint),
        "state": state,
        "problem": problem,
        "latest": tracked(checkpoint.parent) in (made_by.get("iteration"), checkpoint.name),
        "bytes": sum(files.values()),
        "files": files,
        "consumed_tokens": samples * length if samples is not None and length else None,
    } | made_by


def _state(checkpoint: Path) -> tuple[str, str | None]:
    """`complete`, `bad` or `unverified`, and what is wrong."""
    try:
        check(checkpoint)
    except CheckpointError as error:
        return "bad", str(error)
    if (checkpoint / manifest.FILE_NAME).is_file():
        return "complete", None
    return "unverified", f"it has no {manifest.FILE_NAME}: Megatron's own, or from before there were any"


def _lines(report: dict[str, Any]) -> Iterator[str]:
    note = "; verify compares digests" if report["state"] == "complete" else ""
    yield f"{report['path']}  {report['state']}{f': {report["problem"]}' if report['problem'] else note}"
    if report["latest"]:
        yield "  the latest, from which training goes on"
    yield f"  {report['bytes']:,} bytes in {len(report['files'])} files"
    arch = report.get("architecture")
    if not arch:
        return
    tokens = f", {report['consumed_tokens']:,} tokens" if report["consumed_tokens"] is not None else ""
    yield f"  iteration {report.get('iteration')}{tokens}, at {report.get('time')}"
    yield f"  {arch.get('family')} of depth {arch.get('depth')}, {arch.get('hidden_size')} wide: {arch.get('pattern')}"
    for title in ("layout", "versions", "tokenizer", "git"):
        values = report.get(title) or {}
        yield f"  {title}: " + (", ".join(f"{name} {value}" for name, value in values.items()) or "unknown")
    data = report.get("data") or {}
    yield f"  data: {' '.join(map(str, data.get('blend') or ['unknown']))}, split {data.get('split')}"
    yield f"  command: {' '.join(report.get('command') or [])}"


def _verify(args: argparse.Namespace) -> int:
    results = []
    for checkpoint in _found(args.path):
        state, problem = _state(checkpoint)
        if state == "complete":
            state, problem = _compare(checkpoint)
        results.append({"path": str(checkpoint), "state": state, "problem": problem})
        if not args.json:
            print(f"{checkpoint}  {state}{f': {problem}' if problem else ''}", flush=True)
    if args.json:
        print(json.dumps(results, indent=2))
    return int(any(result["state"] == "bad" for result in results))


def _compare(checkpoint: Path) -> tuple[str, str | None]:
    total = sum(entry["bytes"] for entry in manifest.read(checkpoint).values())
    quiet = total < LARGE
    with tqdm(total=total, unit="B", unit_scale=True, desc=checkpoint.name, leave=False, disable=quiet) as bar:
        progress: Callable[[int], object] = bar.update
        try:
            manifest.verify(checkpoint, progress=progress)
        except CheckpointError as error:
            return "bad", str(error)
    return "whole", None


if __name__ == "__main__":
    start(main)
