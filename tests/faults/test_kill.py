"""kill -9 of a rank, at any step and within a save: the run goes on as if nothing had been, bit for bit.

Prints a line a kill (`pytest -s`). FAULTS_SEED is of all that is random; FAULTS_REPORT a file for the lines of the long
test.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.faults.harness import ASYNC, DROPOUT, PIPELINE, TENSOR, Killer, Run, same_tensors

SEED = int(os.environ.get("FAULTS_SEED", "5"))


def test_killed_in_saves(whole: Run, tmp_path: Path) -> None:
    """In a synchronous save, then in an asynchronous one, after which a bit of the newest checkpoint is flipped."""
    killer = Killer(whole.again(tmp_path), whole, random.Random(SEED))
    killer.in_save(8, file="metadata")
    killer.in_save(12, *ASYNC, file="__1_0")
    killer.flip_a_bit()
    killer.run.finish()
    print(killer.report())
    killer.check_curve()
    same_tensors(killer.run, whole)


def test_killed_and_resumed_at_another_layout(data: Path, tmp_path: Path) -> None:
    """TP 2 goes on as PP 2. Without dropout, whose masks belong to a layout."""
    whole = Run(tmp_path / "whole", data, steps=12, save_interval=4, options=TENSOR)
    whole.finish()
    killer = Killer(whole.again(tmp_path / "killed"), whole, random.Random(SEED))
    killer.at_step(6)
    killer.run.options = PIPELINE
    killer.run.finish()
    print(killer.report())
    killer.check_curve(relative=1e-5)


@pytest.mark.slow
def test_twenty_kills(data: Path, tmp_path: Path) -> None:
    """Every other one in a save, of which every other one is asynchronous; after every fifth the newest checkpoint has
    a bit flipped."""
    kills, interval = 20, 5
    whole = Run(tmp_path / "whole", data, (kills + 1) * interval, interval, options=[*PIPELINE, *DROPOUT])
    whole.finish()
    draw = random.Random(SEED)
    killer = Killer(whole.again(tmp_path / "killed"), whole, draw)
    for kill in range(kills):
        options = ASYNC if kill % 4 > 1 else []
        if kill % 2:
            killer.in_save((kill + 1) * interval, *options)
        else:
            killer.at_step(kill * interval + draw.randint(1, interval), *options)
        if kill % 5 == 4:
            killer.flip_a_bit()
    killer.run.finish()
    report = f"{kills} times kill -9, seed {SEED}\n\n{killer.report()}\n"
    print(report)
    if "FAULTS_REPORT" in os.environ:
        Path(os.environ["FAULTS_REPORT"]).write_text(report)
    killer.check_curve()
    same_tensors(killer.run, whole)
