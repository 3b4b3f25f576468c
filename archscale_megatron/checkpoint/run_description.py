"""What made a checkpoint? `run.json` in it: options, versions, tokenizer, data, commit."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import archscale_megatron
from archscale_megatron.checkpoint import CheckpointError

FILE_NAME = "run.json"
FORMAT = 1
PACKAGES = (
    "torch", "megatron-core", "numpy", "triton", "transformers", "tokenizers", "transformer-engine", "flash-attn",
    "mamba-ssm", "causal-conv1d", "flash-linear-attention", "emerging-optimizers",
)  # fmt: skip
# Of a tokenizer that is a folder: what decides its tokens.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
DATA = (
    "data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path", "per_split_data_args_path",
    "mock_data", "seq_length", "seed", "reset_at_eod", "eod_mask_loss",
)  # fmt: skip


def describe(args: argparse.Namespace, iteration: int) -> dict[str, Any]:
    """What is written as `run.json`, of a run with Megatron's and our arguments `args`."""
    return {
        "format": FORMAT,
        "iteration": iteration,
        "consumed_samples": getattr(args, "consumed_train_samples", 0),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "options": {name: _plain(value) for name, value in sorted(vars(args).items())},
        "architecture": dataclasses.asdict(args.architecture),
        "layout": {
            "world_size": args.world_size,
            "tensor": args.tensor_model_parallel_size,
            "sequence_parallel": args.sequence_parallel,
            "pipeline": args.pipeline_model_parallel_size,
            "virtual_pipeline": args.virtual_pipeline_model_parallel_size or 1,
            "data": args.data_parallel_size,
            "expert": args.expert_model_parallel_size,
            "expert_tensor": args.expert_tensor_parallel_size,
            "context": args.context_parallel_size,
        },
        "versions": versions(PACKAGES),
        "git": _commit(),
        "tokenizer": {
            "type": args.tokenizer_type,
            "model": _plain(args.tokenizer_model),
            "vocab_size": args.vocab_size,
            "sha256": _fingerprint(str(args.tokenizer_model)) if args.tokenizer_model else None,
        },
        "data": {"blend": _plain(args.data_path), "split": _plain(args.split)}
        | {name: _plain(getattr(args, name, None)) for name in DATA},
    }


def read(checkpoint: Path) -> dict[str, Any] | None:
    """`run.json` of a checkpoint, None if it has none; raises CheckpointError if it is damaged."""
    path = checkpoint / FILE_NAME
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise CheckpointError(f"{path} is damaged: it is not JSON") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it does not say what made the checkpoint")
    return content


def _plain(value: Any) -> Any:
    """`value` if JSON has it, else lists and dictionaries of such, else its text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    return str(value)


@functools.cache
def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of this package, of Python, and of those `packages` that are installed."""
    found = {"archscale-megatron": archscale_megatron.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def _commit() -> dict[str, Any] | None:
    """The commit of the source that runs, and whether files differ from it; None if it is not from a repository."""
    source = Path(archscale_megatron.__file__).resolve().parent

    def git(*words: str) -> str:
        finished = subprocess.run(
            ["git", "-C", str(source), *words], capture_output=True, text=True, timeout=10, check=True
        )
        return finished.stdout.strip()

    try:
        if git("ls-files", "--", "__init__.py") != "__init__.py":
            return None  # installed somewhere inside of another repository
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


@functools.cache
def _fingerprint(model: str) -> str | None:
    """SHA-256 of the tokenizer's file, or of the names and contents of those in its folder; None if it is a name."""
    path = Path(model)
    if path.is_dir():
        files = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
    else:
        files = [path] if path.is_file() else []
    if not files:
        return None
    state = hashlib.sha256()
    for file in files:
        if path.is_dir():
            state.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        state.update(file.read_bytes())
    return state.hexdigest()
