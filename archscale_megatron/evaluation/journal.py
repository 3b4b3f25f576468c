"""What a killed evaluation had finished: lines of JSON beside the report, until that is there."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from archscale_megatron.checkpoint import agreement
from archscale_megatron.evaluation.report import plain

SUFFIX = ".jsonl"


class Journal:
    """Results one by one. Rank 0 reads and writes the file; every rank is told what is in it.

    Attributes:
        done: key -> record, of what an earlier run finished, and then this one.
    """

    def __init__(self, report: Path, header: Mapping[str, Any], *, again: bool = False) -> None:
        """
        Args:
            report: path of the report; the journal has its name with the suffix .jsonl.
            header: what the records depend on, JSON: the options, the checkpoint's fingerprint.
            again: forget what an earlier run finished.
        Raises:
            ValueError: on all ranks: the journal is of another header, is damaged, or another process writes it.
            OSError: it cannot be written.
        """
        self.path = report.with_suffix(SUFFIX)
        self.done: dict[str, Any] = {}
        self._file: IO[str] | None = None
        problem = agreement.first_problem(lambda: self._open(plain(header), again))
        if problem is not None:
            raise ValueError(problem)
        self.done = agreement.of_first_rank(self.done)

    def append(self, key: str, record: Any) -> None:
        """Note that `key` is finished; `record`, JSON, outlives a kill of the process once this returns."""
        self.done[key] = record
        if self._file is not None:
            self._file.write(json.dumps([key, record], ensure_ascii=False) + "\n")
            self._file.flush()

    def finish(self) -> None:
        """Remove the file. Called once the report is there."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()

    def _open(self, header: Any, again: bool) -> None:
        if agreement.rank_and_size()[0] > 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a", encoding="utf-8")
        try:
            self._begin(file, header, again)
        except ValueError:
            file.close()
            raise
        self._file = file

    def _begin(self, file: IO[str], header: Any, again: bool) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path}: another process is at this evaluation; wait for it, or end it") from None
        if again:
            file.truncate(0)
        lines, whole = self._lines()
        file.truncate(whole)
        if not lines:
            file.write(json.dumps(header, ensure_ascii=False) + "\n")
            file.flush()
        elif lines[0] != header:
            differing = ", ".join(_differences(lines[0], header))
            raise ValueError(f"{self.path}: begun with other options ({differing}); give those, or --again")
        else:
            self.done = dict(lines[1:])

    def _lines(self) -> tuple[list[Any], int]:
        """The values in the file, and how many bytes they are, without a torn last line."""
        found: list[Any] = []
        whole = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                value = json.loads(line)
                if found and not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)):
                    raise ValueError("no key and record")
            except ValueError as error:
                if line.endswith(b"\n"):
                    raise ValueError(f"{self.path}: line {len(found) + 1} is damaged ({error}); give --again") from None
                break
            if not line.endswith(b"\n"):
                break
            found.append(value)
            whole += len(line)
        return found, whole


def _differences(stored: Any, given: Any) -> list[str]:
    if not isinstance(stored, dict) or not isinstance(given, dict):
        return [f"{stored!r} there and {given!r} here"]
    differing: list[str] = []
    for name in dict.fromkeys([*given, *stored]):
        there, here = stored.get(name), given.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            differing += [f"{name}: {each}" for each in _differences(there, here)]
        elif there != here:
            differing.append(f"{name} is {there!r} there and {here!r} here")
    return differing
