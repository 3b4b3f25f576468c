"""Start a test's worker on several processes, as a user starts training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def torchrun(
    processes: int, *command: str, timeout: float = 600, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `torchrun --nproc-per-node PROCESSES COMMAND...` in the project's root, one thread a process.

    Returns the finished process with standard output and error together in `stdout`; if `check`, a failure fails the
    test and shows the end of them.
    """
    finished = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and finished.returncode:
        raise AssertionError(f"{' '.join(command)} on {processes} processes failed:\n{finished.stdout[-6000:]}")
    return finished
