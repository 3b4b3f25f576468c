"""Run the points of a sweep, each as processes of its own: in which order, for how long, and how they end."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from archscale_megatron.scaling.grid import Point
from archscale_megatron.scaling.results import DONE, FAILED, NAN, assemble, judge, locked, read_result, write_result

GRACE = 10  # seconds between SIGTERM and SIGKILL
POLL = 0.1  # seconds


@dataclass(frozen=True)
class Settings:
    """How the points of a sweep are run; none of it changes what a point is."""

    output: Path
    script: Path
    processes: int = 1  # of each point
    jobs: int = 1  # points at a time
    timeout: float | None = None  # seconds a point
    retry: bool = False  # run points again that failed or were killed at the timeout
    save_checkpoints: bool = False
    last: int = 10  # logged iterations whose mean is the training loss
    devices: tuple[str, ...] = ()  # GPUs to divide among the jobs; none: the environment is left alone

    def command(self, point: Point) -> list[str]:
        """What runs `point`."""
        launcher = [sys.executable]
        if self.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.processes)]
        directory = self.output / point.name
        own = ["--tensorboard-dir", str(directory / "tensorboard")]
        if self.save_checkpoints:
            own += ["--save", str(directory / "checkpoints")]
        return [*launcher, str(self.script), *point.arguments, *own]

    def environment(self, slot: int) -> dict[str, str]:
        """That of the point that runs as number `slot` of those at a time. Port 0: any that is free."""
        variables = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONUNBUFFERED": "1"}
        if self.processes == 1:
            variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
            variables["LOCAL_RANK"] = "0"
        if self.devices:
            first = slot * self.processes
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices[first : first + self.processes])
        return variables

    def wants(self, result: dict[str, Any] | None) -> bool:
        """Whether a point with this result is to be run."""
        return result is None or (self.retry and result["status"] not in (DONE, NAN))


@dataclass
class Run:
    """A point that is running."""

    point: Point
    facts: dict[str, Any]
    directory: Path
    slot: int
    process: subprocess.Popen[bytes]
    lock: contextlib.ExitStack
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


def start(settings: Settings, point: Point, facts: dict[str, Any], slot: int) -> Run | None:
    """Start `point` in its directory, afresh; None if another sweep is running it or has run it."""
    directory = settings.output / point.name
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            descriptor = stack.enter_context(locked(directory / ".lock", wait=False))
        except BlockingIOError:
            return None
        if not settings.wants(read_result(directory)):
            return None
        for half_done in ("tensorboard", "checkpoints"):
            shutil.rmtree(directory / half_done, ignore_errors=True)
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                settings.command(point),
                env=settings.environment(slot),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the sweep's to handle
                pass_fds=[descriptor],  # should the sweep be killed, the point is locked for as long as it runs on
            )
        return Run(point, facts, directory, slot, process, stack.pop_all())


def kill(processes: Sequence[subprocess.Popen[bytes]], grace: float = GRACE) -> None:
    """End `processes` and all that descends from them, also torchrun's workers, which have sessions of their own."""
    tree: list[psutil.Process] = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(process.pid)
            tree += [root, *root.children(recursive=True)]
    for member in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()
    for member in psutil.wait_procs(tree, timeout=grace)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    for process in processes:
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what a run has left in its process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, 9)
    process.wait()


def finish(settings: Settings, run: Run) -> dict[str, Any] | None:
    """Record how `run` ended, and return it; None while it goes on."""
    exit_code = run.process.poll()
    if exit_code is None:
        if settings.timeout is None or run.seconds < settings.timeout:
            return None
        kill([run.process])
    seconds = round(run.seconds, 1)
    end_group(run.process)
    found = judge(run.directory, run.facts, exit_code, settings.last)
    facts = {name: value for name, value in run.facts.items() if name not in ("samples", "logged_samples")}
    named = {"name": run.point.name, "seconds": seconds, "options": run.point.options}
    result = named | facts | found
    write_result(run.directory, result)
    run.lock.close()
    return result


def run_points(settings: Settings, points: Sequence[Point], facts: Sequence[dict[str, Any]]) -> Counter[str]:
    """Run what of `points` is to be run; returns how many ended how, those of earlier sweeps too.

    Whatever ends the sweep ends its runs, and their points are as if they had not been started.
    """
    from tqdm import tqdm

    counts: Counter[str] = Counter()
    waiting: list[tuple[Point, dict[str, Any]]] = []
    for point, fact in zip(points, facts, strict=True):
        result = read_result(settings.output / point.name)
        if settings.wants(result):
            waiting.append((point, fact))
        else:
            assert result is not None
            counts[result["status"]] += 1
    running: list[Run] = []
    polls = 0
    slots = list(range(settings.jobs))
    bar = tqdm(
        total=len(points), initial=len(points) - len(waiting), unit="point", desc="sweep", smoothing=0, disable=None
    )  # where nobody sees it there is none: each point has its line
    try:
        while waiting or running:
            while waiting and slots:
                slot = slots.pop(0)
                run = start(settings, *waiting.pop(0), slot)
                if run is None:
                    slots.insert(0, slot)
                    counts["another sweep's"] += 1
                    bar.update()
                else:
                    running.append(run)
            bar.set_postfix_str(_summary(counts, len(running)), refresh=polls % 10 == 0)
            polls += 1
            time.sleep(POLL)
            for run in list(running):
                if (result := finish(settings, run)) is not None:
                    running.remove(run)
                    slots.append(run.slot)
                    counts[result["status"]] += 1
                    assemble(settings.output)
                    bar.write(report(result), file=sys.stdout)
                    bar.update()
    finally:
        kill([run.process for run in running])
        for run in running:
            run.lock.close()
        bar.set_postfix_str(_summary(counts, 0), refresh=False)
        bar.close()
    assemble(settings.output)
    return counts


def report(result: dict[str, Any]) -> str:
    """A result in one line."""
    if result["status"] == DONE:
        validation = result["validation_loss"]
        said = f"loss {result['loss']:.4f}" + ("" if validation is None else f", validation {validation:.4f}")
    else:
        said = result["error"]
    return f"{result['name']}: {result['status']} in {result['seconds']:.0f} s: {said}"


def _summary(counts: Counter[str], running: int) -> str:
    shown = {name: counts[name] for name in dict.fromkeys([DONE, FAILED, *counts])} | {"running": running}
    return ", ".join(f"{count} {name}" for name, count in shown.items() if count or name in (DONE, FAILED))
