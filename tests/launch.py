"""Start a test's worker on several processes, as a user starts training."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
MARK = "TESTS_LAUNCH"  # the environment variable by which a launch's processes are found, whoever started them
_numbers = itertools.count()


def torchrun(
    processes: int, *command: str, timeout: float = 600, check: bool = True, prefix: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run `PREFIX torchrun --nproc-per-node PROCESSES COMMAND...` in the project's root, one thread a process.

    Returns the finished process with standard output and error together in `stdout`; if `check`, a failure fails the
    test and shows the end of them. A launch that takes longer than `timeout` seconds fails the test too, and shows
    where each process stood. Nothing that was started outlives the call.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return _launch([*prefix, *launcher, *command], {}, timeout, check)


def one_process(
    *command: str, timeout: float = 600, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python COMMAND...` as the only rank there is, otherwise likewise: without torchrun, which takes a process
    and an import of torch more."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    return _launch([sys.executable, *command], ranks | environment, timeout, check)


def _launch(
    command: list[str], environment: dict[str, str], timeout: float, check: bool
) -> subprocess.CompletedProcess[str]:
    mark = f"{os.getpid()}.{next(_numbers)}"
    # A file, because a pipe ends only when all who inherited it have.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONFAULTHANDLER": "1", MARK: mark}
            | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            late = None
            process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            late = error
            _signal(mark, signal.SIGABRT)  # upon which Python prints where it is
        finally:
            _signal(mark, signal.SIGKILL)
            process.wait()
        output.seek(0)
        finished = subprocess.CompletedProcess(process.args, process.returncode, output.read())
    if late:
        raise AssertionError(f"{' '.join(command)}: {late}\n{finished.stdout[-30000:]}")
    if check and finished.returncode:
        raise AssertionError(f"{' '.join(command)} failed:\n{finished.stdout[-6000:]}")
    return finished


def _signal(mark: str, number: signal.Signals) -> None:
    """Send it to every process of a launch, and give them some seconds to end."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                process.send_signal(number)
                found.append(process)
        except psutil.Error:  # it has just ended, or is not ours
            continue
    psutil.wait_procs(found, timeout=10)
