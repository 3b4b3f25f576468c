"""Dry runs for tests: each as the program does it, in a forked process, so that Megatron is imported once.

Run as a program it reads a JSON list of option lists, and writes the list of [exit code, result or standard error].
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def dry_runs(cases: list[list[str]]) -> list[tuple[int, Any]]:
    """For each list of options: the exit code, and the --json result or what was on standard error."""
    finished = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(cases),
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def _dry_run(options: list[str], directory: Path) -> tuple[int, Any]:
    from archscale_megatron.dryrun.__main__ import main

    result, errors = directory / "result.json", directory / "errors"
    if (child := os.fork()) == 0:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["dryrun", "--json", str(result), *options]
        try:
            main()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, errors.read_text() if code else json.loads(result.read_text())


if __name__ == "__main__":
    from archscale_megatron import cpu

    cpu.install()

    import archscale_megatron.dryrun.stage  # noqa: F401

    found = []
    for case in json.load(sys.stdin):
        with tempfile.TemporaryDirectory() as temporary:
            found.append(_dry_run(case, Path(temporary)))
    print("\n" + json.dumps(found))
