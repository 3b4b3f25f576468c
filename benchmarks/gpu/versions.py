"""What a result was measured with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess

PACKAGES = (
    "torch", "triton", "megatron-core", "transformer-engine", "flash-attn", "mamba-ssm", "causal-conv1d",
    "flash-linear-attention", "transformers",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Of Python, packages, the GPU and its driver, and the commit; what is not there is `none`."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    found["GPU"] = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    found["commit"] = _output("git", "rev-parse", "--short", "HEAD")
    return found


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"
