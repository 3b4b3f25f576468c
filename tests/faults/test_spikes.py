"""A run notes a planted spike in its log and in TensorBoard."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.faults.harness import Run


def test_noted(data: Path, tmp_path: Path) -> None:
    board = tmp_path / "tensorboard"
    options = ["--spike-window", "10", "--tensorboard-dir", str(board), "--tensorboard-log-interval", "1"]
    run = Run(tmp_path, data, steps=9, save_interval=100, processes=1, options=options)
    launch = run.start(plant={"rank": 0, "iteration": 8, "value": 10.0, "times": 1})
    assert launch.wait() == 0, launch.output()[-6000:]
    found = re.findall(r"^spike: (.+) ([0-9.]+) at iteration 8, ([0-9.]+) deviations above .* of the last 7$",
                       launch.output(), re.MULTILINE)  # fmt: skip
    assert [name for name, _, _ in found] == ["lm loss", "grad-norm"]
    assert launch.output().count("spike: ") == 2
    events = EventAccumulator(str(board)).Reload()
    for (name, value, deviations), key in zip(found, ("loss", "gradient_norm"), strict=True):
        assert float(value) == pytest.approx(launch.steps()[7][key], rel=1e-3)
        (mark,) = events.Scalars(f"spikes/{name}")
        assert mark.step == 8 and mark.value == pytest.approx(float(deviations), abs=0.1)
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("spikes/text_summary")]
    assert texts == [line for line in launch.output().splitlines() if line.startswith("spike: ")]
