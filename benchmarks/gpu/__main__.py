"""Kernels and training steps on one GPU, measured side by side: `python -m benchmarks.gpu --output DIR`.

Writes DIR/results.jsonl a row at a time, so that a run that is cut off leaves what it had, and DIR/results.md, the same
as tables. `--rehearse` does it all in tiny sizes on a CPU; `--only steps` and `--models sambay` measure less. Rows that
fail say why, and the run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.report import report
from benchmarks.gpu.steps import Settings
from benchmarks.gpu.versions import versions

ROOT = Path(__file__).resolve().parents[2]
# A Transformer++ of SambaY's size at 32K: the paper's comparison (arXiv 2507.06607, Table 2).
LONG = {"length": 32768, "micro_batch": 1, "steps": 5}
MODELS = {
    "transformer d16": Settings("transformer", 16),
    "sambay d16": Settings("sambay", 16),
    "sambay d16, mamba_ssm": Settings("sambay", 16, scan="mamba_ssm"),
    "sambay d16, documents": Settings("sambay", 16, document_length=1024),
    "transformer d16, documents": Settings("transformer", 16, document_length=1024),
    "transformer d16, 8 micro-batches": Settings(
        "transformer", 16, micro_batches=8, steps=4, warm_up=2, profiled=False
    ),
    "sambay d16, 8 micro-batches": Settings("sambay", 16, micro_batches=8, steps=4, warm_up=2, profiled=False),
    "samba d16": Settings("samba", 16),
    "transformer d16, 32K": Settings("transformer", 16, **LONG),
    "sambay d16, 32K": Settings("sambay", 16, **LONG),
    "phi4miniflash d16": Settings("phi4miniflash", 16, micro_batch=2, micro_batches=2),
    "mambay2 d16": Settings("mambay2", 16, micro_batch=2),
    "sgdny d16": Settings("sgdny", 16, micro_batch=2),
}
TINY = (
    "--aspect-ratio", "16", "--head-dim", "16", "--num-heads", "8", "--num-kv-heads", "4", "--local-window", "32",
    "--vocab-size", "256",
)  # fmt: skip


def rehearsal(settings: Settings) -> Settings:
    """The same, as small as it goes."""
    length = settings.length // 64
    return dataclasses.replace(
        settings, depth=8, length=length, micro_batch=1, options=(*settings.options, *TINY), warm_up=1, steps=2,
        document_length=settings.document_length // 64,
    )  # fmt: skip


def start(command: list[str], log: Path, timeout: float) -> None:
    """Run one process to its end; its output goes to `log`."""
    with log.open("w") as file:
        try:
            subprocess.run(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env=os.environ | {"PYTHONWARNINGS": "ignore", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            print(f"{command[0]}: ended after {timeout:.0f} s", file=file)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", choices=("kernels", "steps"), nargs="+", default=["kernels", "steps"])
    parser.add_argument("--models", nargs="+", metavar="WORD", help="models whose names hold one of these words")
    parser.add_argument("--timeout", type=int, default=90, help="seconds of one model (90)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    results = options.output / "results.jsonl"
    with results.open("a") as file:
        file.write(json.dumps({"part": "versions", **versions()}) + "\n")

    def measure(job: tuple[str, list[str]]) -> None:
        name, command = job
        began = time.perf_counter()
        start(command, options.output / f"{re.sub('[^a-z0-9]+', '-', name.lower())}.log", 3 * options.timeout)
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)

    jobs: list[tuple[str, list[str]]] = []
    if "kernels" in options.only:
        jobs.append(("kernels", ["benchmarks.gpu.kernels", str(results), *["--rehearse"] * options.rehearse]))
    if "steps" in options.only:
        for name, settings in MODELS.items():
            if not options.models or any(word in name for word in options.models):
                chosen = dataclasses.replace(settings, seconds=options.timeout)
                chosen = rehearsal(chosen) if options.rehearse else chosen
                jobs.append(
                    (name, ["benchmarks.gpu.steps", name, json.dumps(dataclasses.asdict(chosen)), str(results)])
                )
    # Two at a time: while one measures, which a lock keeps to one, the next imports what it needs.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(measure, jobs))
    (options.output / "results.md").write_text(report(results))
    print((options.output / "results.md").read_text())


if __name__ == "__main__":
    main()
