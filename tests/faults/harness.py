"""Runs that are hurt: launch pretrain_archscale.py under torchrun, kill it, look at what is left."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from archscale_megatron.checkpoint import manifest
from tests.launch import ROOT
from tests.training.data import VOCABULARY
from tests.training.runs import tensors

ENTRY = "tests/faults/train.py"
TIMEOUT = 600.0  # seconds that a launch may take
# Hidden size 64, hybrid layers m-W-m-*-.
MODEL = [
    "--train-model", "sambay", "--depth", "4", "--aspect-ratio", "16", "--head-dim", "8", "--num-kv-heads", "2",
    "--local-window", "16",
]  # fmt: skip
DROPOUT = ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
TENSOR = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
PIPELINE = ["--pipeline-model-parallel-size", "2"]
CURVE = ("loss", "gradient_norm", "learning_rate", "samples")  # what two runs are compared by
ASYNC = ["--async-save", "--async-strategy", "mcore"]


@dataclass
class Launch:
    """One start of torchrun: its output, and the journals of its ranks (see train.py)."""

    process: subprocess.Popen
    directory: Path

    def journal(self, name: str) -> list[dict[str, Any]]:
        file = self.directory / f"{name}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def steps(self) -> list[dict[str, Any]]:
        return self.journal("steps")

    def output(self) -> str:
        return (self.directory / "output").read_text(errors="replace")

    def exit_codes(self) -> set[int]:
        """Of the ranks that ended by themselves, as torchrun reports them: its own exit code is 1 for all of them."""
        return {int(code) for code in re.findall(r"exitcode +: (-?\d+)", self.output())} - {-signal.SIGTERM}

    def processes(self) -> list[int]:
        """The ranks, and what they started: torchrun gives each rank a session of its own."""
        ranks, found = {int(file.read_text()) for file in self.directory.glob("ranks/*")}, []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                session = int(stat.read_text().rpartition(")")[2].split()[3])
            except OSError:  # it has just ended
                continue
            if session in ranks:
                found.append(int(stat.parent.name))
        return found

    def wait_for_step(self, iteration: int) -> None:
        """Return as soon as `iteration` is over; AssertionError if the launch ends before."""
        end = time.monotonic() + TIMEOUT
        while not any(step["iteration"] >= iteration for step in self.steps()):
            assert self.process.poll() is None, f"ended before iteration {iteration}:\n{self.output()[-6000:]}"
            assert time.monotonic() < end, f"no iteration {iteration} in {TIMEOUT} s:\n{self.output()[-6000:]}"
            time.sleep(0.01)

    def kill(self, rank: int, how: signal.Signals = signal.SIGKILL) -> None:
        os.kill(int((self.directory / "ranks" / str(rank)).read_text()), how)

    def wait(self) -> int:
        """torchrun's exit code, once nothing of the launch runs any more."""
        try:
            code = self.process.wait(TIMEOUT)
        finally:
            self.process.kill()
            for process in self.processes():  # what a killed rank leaves behind
                os.kill(process, signal.SIGKILL)
        return code


@dataclass
class Run:
    """A run directory, with which torchrun is started again and again by one command."""

    directory: Path
    data: Path
    steps: int
    save_interval: int
    processes: int = 2
    options: list[str] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)

    @property
    def checkpoints(self) -> Path:
        return self.directory / "run"

    def command(self) -> list[str]:
        return [
            ENTRY, *MODEL, "--vocab-size", str(VOCABULARY), "--data-path", str(self.data),
            "--tokenizer-type", "NullTokenizer", "--seq-length", "32", "--micro-batch-size", "2",
            "--global-batch-size", "4", "--train-iters", str(self.steps), "--lr", "1e-3", "--min-lr", "1e-4",
            "--lr-warmup-iters", "2", "--lr-decay-style", "cosine", "--clip-grad", "1.0",
            "--use-distributed-optimizer", "--save", str(self.checkpoints), "--resume", "auto",
            "--save-interval", str(self.save_interval), "--eval-interval", "1000000", "--eval-iters", "1",
            "--log-interval", "1", "--num-workers", "1", "--split", "80,10,10", *self.options,
        ]  # fmt: skip

    def start(self, *options: str, **faults: Any) -> Launch:
        """Start the command with `options` after it; `faults` as train.py has them."""
        directory = self.directory / f"launch_{len(self.launches):02d}"
        directory.mkdir(parents=True)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        with (directory / "output").open("w") as output:
            process = subprocess.Popen(
                [*launcher, "--nproc-per-node", str(self.processes), *self.command(), *options],
                cwd=ROOT,
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}
                | {"FAULTS": json.dumps({"directory": str(directory)} | faults)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.launches.append(Launch(process, directory))
        return self.launches[-1]

    def finish(self, *options: str) -> Launch:
        """Start the command and let it end; AssertionError if it fails."""
        launch = self.start(*options)
        assert launch.wait() == 0, launch.output()[-6000:]
        return launch

    def again(self, directory: Path) -> Run:
        """The same command in another directory, which has not run yet."""
        return Run(directory, self.data, self.steps, self.save_interval, self.processes, list(self.options))

    def curve(self) -> dict[int, dict[str, Any]]:
        """Iteration -> what its last launch wrote of it."""
        return {step["iteration"]: step for launch in self.launches for step in launch.steps()}

    def values(self) -> dict[int, dict[str, float]]:
        """Iteration -> what runs are compared by."""
        return {iteration: {key: step[key] for key in CURVE} for iteration, step in self.curve().items()}

    @property
    def tracker(self) -> Path:
        return self.checkpoints / "latest_checkpointed_iteration.txt"

    def checkpoint(self, iteration: int) -> Path:
        return self.checkpoints / f"iter_{iteration:07d}"

    def saved(self) -> int:
        """The iteration of the newest checkpoint that Megatron's tracker knows; 0 if there is none."""
        return int(self.tracker.read_text()) if self.tracker.exists() else 0


@dataclass
class Killer:
    """Kills launches of `run`, which is the same command as the undisturbed run `whole`."""

    run: Run
    whole: Run
    draw: random.Random
    kills: list[dict[str, Any]] = field(default_factory=list)

    def at_step(self, iteration: int, *options: str) -> None:
        """kill -9 a random rank at some time in the step after `iteration`."""
        rank = self.draw.randrange(self.run.processes)
        steps = [step["time"] for step in self.whole.launches[0].steps()]
        pause = self.draw.uniform(0, (steps[-1] - steps[0]) / (len(steps) - 1))
        launch = self.run.start(*options)
        launch.wait_for_step(iteration)
        time.sleep(pause)
        launch.kill(rank)
        code = launch.wait()
        self._note(rank, f"after step {launch.steps()[-1]['iteration']}", code)

    def in_save(self, iteration: int, *options: str, file: str = "") -> None:
        """kill -9 a rank when it opens or renames one of its files of the checkpoint of `iteration`, or a moment later.

        Args:
            file: which file, by a part of its name; of several, a random one.
        """
        save = self.whole.save_interval
        writes = [w for w in self.whole.launches[0].journal("writes") if w["save"] == save and file in w["name"]]
        write = self.draw.choice(writes)
        delay = self.draw.choice([0.0, 0.001, 0.003])
        before = {"tracker": str(self.run.tracker), "saved": iteration - save}
        kill = {"rank": write["rank"], "iteration": iteration, "file": write["name"], "delay": delay, **before}
        launch = self.run.start(*options, kill=kill)
        code = launch.wait()
        killed = [write for write in launch.journal("writes") if write["kill"]]
        assert killed, f"{kill} did not happen:\n{launch.output()[-6000:]}"
        how = "asynchronous" if "--async-save" in options else "synchronous"
        moment = f"{delay * 1e3:.0f} ms after the opening" if delay else "at the opening"
        there, whole = (set(os.listdir(r.checkpoint(i))) for r, i in ((self.run, iteration), (self.whole, save)))
        count = f"{len(there & whole)} of {len(whole)} files there"
        when = f"in the {how} save of {iteration}, {moment} of {write['name']} ({count})"
        self._note(write["rank"], when, code)

    def flip_a_bit(self) -> None:
        """Of a random data file of the newest checkpoint, after the last kill: it must not be resumed from."""
        newest = self.run.saved()
        file = self.draw.choice(sorted(self.run.checkpoint(newest).glob("*.distcp")))
        content = bytearray(file.read_bytes())
        content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
        file.write_bytes(content)
        kill = self.kills[-1]
        kill["when"] += f", then a bit of {file.name} of {newest} flipped"
        kill |= {"saved": newest - self.run.save_interval, "damaged": newest}

    def _note(self, rank: int, when: str, code: int) -> None:
        assert code != 0, "a rank was killed, and torchrun says that all is well"
        saved = self.run.saved()
        if self.kills and self.kills[-1]["damaged"] == saved and not self._is_whole(saved):
            saved = self.kills[-1]["saved"]  # the damaged one was not yet written again
        self.kills.append({"rank": rank, "when": when, "saved": saved, "damaged": None})

    def _is_whole(self, iteration: int) -> bool:
        try:
            manifest.verify(self.run.checkpoint(iteration))
        except ValueError:
            return False
        return True

    def report(self) -> str:
        """A line a kill, and what the next launch made of it."""
        lines = []
        for number, (kill, launch) in enumerate(zip(self.kills, self.run.launches[1:], strict=True), start=1):
            steps = [step["iteration"] for step in launch.steps()]
            where = f"resumed from {steps[0] - 1}, ran {steps[0]} to {steps[-1]}" if steps else "did not resume"
            lines.append(f"kill {number:2d}: rank {kill['rank']} {kill['when']}; {where}: {self._difference(launch)}")
        return "\n".join(lines)

    def _difference(self, launch: Launch) -> str:
        expected = self.whole.curve()
        differences = [abs(step["loss"] / expected[step["iteration"]]["loss"] - 1) for step in launch.steps()]
        same = all(step[key] == expected[step["iteration"]][key] for step in launch.steps() for key in CURVE)
        return "equal bit for bit" if same else f"loss differs by {max(differences):.1e}"

    def check_curve(self, relative: float = 0.0) -> None:
        """Raises AssertionError unless every step of every launch equals the undisturbed run's, and none was lost that
        a checkpoint had."""
        expected = self.whole.curve()
        for launch in self.run.launches:
            for step in launch.steps():
                for key in CURVE:
                    reference = expected[step["iteration"]][key]
                    assert step[key] == pytest.approx(reference, rel=relative, abs=0), (launch.directory.name, step)
        for kill, launch in zip(self.kills, self.run.launches[1:], strict=True):
            steps = [step["iteration"] for step in launch.steps()]
            assert kill["saved"] <= steps[0] - 1 != kill["damaged"], f"{kill}: resumed from {steps[0] - 1}"
            assert steps == list(range(steps[0], steps[-1] + 1))
        assert list(self.run.curve()) == list(range(1, self.run.steps + 1)) == list(expected)


def same_tensors(found: Run, expected: Run) -> None:
    """Raises AssertionError unless the last checkpoints have the same weights and optimizer state, bit for bit."""
    a, b = (tensors(run.checkpoints, run.steps) for run in (found, expected))
    assert a.keys() == b.keys()
    assert any(key.startswith("optimizer") for key in b)
    assert not [key for key in b if not torch.equal(a[key], b[key])]
