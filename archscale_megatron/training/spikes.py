"""Notes of steps whose loss or gradient norm is far above the last ones: a line in the log, a mark in TensorBoard.

How far is counted in deviations above a running median, and a deviation is what a normal distribution's standard
deviation would be, from the median absolute deviation: neither moves for a few spikes among the last values. It is the
"modified z-score" of Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993), of values above alone.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

WINDOW, THRESHOLD = 100, 6.0  # of `--spike-window` and `--spike-threshold`
SMALLEST_WINDOW = 10
NORMAL = 1.4826  # standard deviation of a normal distribution / its median absolute deviation
LEAST_DEVIATION = 1e-3  # of the median: values that hardly vary have no spikes below THRESHOLD thousandths


@dataclass
class Spike:
    value: float
    deviations: float
    median: float
    of: int  # values in the window

    def line(self, name: str, iteration: int) -> str:
        return (
            f"spike: {name} {self.value:.4g} at iteration {iteration}, {self.deviations:.1f} deviations above the "
            f"median {self.median:.4g} of the last {self.of}"
        )


class Baseline:
    """The last `window` values of one number, and which value is a spike above them.

    Silent until the window is half full, so at the start of a run and after each resume: the window is not saved. A
    value that falls never is a spike, and where all values fall, as in warm-up, deviations are large.
    """

    def __init__(self, window: int, threshold: float) -> None:
        self.values: deque[float] = deque(maxlen=window)
        self.enough = window / 2
        self.threshold = threshold

    def observe(self, value: float) -> Spike | None:
        """Take the next value into the window; the spike that it is above the ones before, if it is one.

        A value that is not finite is neither: whoever checks for NaN has it.
        """
        if not math.isfinite(value):
            return None
        spike = self._spike(value) if len(self.values) >= self.enough else None
        self.values.append(value)
        return spike

    def _spike(self, value: float) -> Spike | None:
        median = statistics.median(self.values)
        spread = statistics.median(abs(v - median) for v in self.values)
        deviation = max(NORMAL * spread, LEAST_DEVIATION * abs(median), math.ulp(0.0))
        deviations = (value - median) / deviation
        return Spike(value, deviations, median, len(self.values)) if deviations > self.threshold else None


def add_options(group: Any) -> None:
    """Add `--spike-window` and `--spike-threshold` to a group of argparse's."""
    group.add_argument(
        "--spike-window",
        type=int,
        default=WINDOW,
        metavar="N",
        help=f"note losses and gradient norms far above the median of the last N ({WINDOW}); 0: note none",
    )
    group.add_argument(
        "--spike-threshold", type=float, default=THRESHOLD, metavar="X", help=f"how far, in deviations ({THRESHOLD:g})"
    )


def check_options(window: int, threshold: float) -> None:
    """Raises ValueError if `--spike-window` or `--spike-threshold` cannot be."""
    if window and window < SMALLEST_WINDOW:
        raise ValueError(f"--spike-window {window}: use {SMALLEST_WINDOW} or more, or 0 for no notes of spikes")
    if not threshold > 0:
        raise ValueError(f"--spike-threshold {threshold:g}: must be above 0")


_baselines: dict[str, Baseline] = {}


def note_spikes(losses: dict[str, Any], gradient_norm: float | None, iteration: int) -> None:
    """Compare a step's losses (scalars, or tensors of one element) and gradient norm with the last ones, on the last
    rank, which has them and writes for TensorBoard."""
    from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer
    from megatron.training.utils import is_last_rank

    args = get_args()
    if not args.spike_window or not is_last_rank():
        return
    values = {name: float(value) for name, value in losses.items()}
    if gradient_norm is not None:
        values["grad-norm"] = float(gradient_norm)
    for name, value in values.items():
        baseline = _baselines.setdefault(name, Baseline(args.spike_window, args.spike_threshold))
        if (spike := baseline.observe(value)) is None:
            continue
        line = spike.line(name, iteration)
        print(line, flush=True)
        if writer := get_tensorboard_writer():
            writer.add_scalar(f"spikes/{name}", spike.deviations, iteration)
            writer.add_text("spikes", line, iteration)
        if wandb := get_wandb_writer():
            wandb.log({f"spikes/{name}": spike.deviations}, iteration)
