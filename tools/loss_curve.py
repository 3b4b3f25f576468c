"""The loss of a training run, read from Megatron's log, and the picture of it that the demo draws."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ITERATION = re.compile(r"iteration +(\d+)/ *\d+ \| consumed samples: +(\d+) .* lm loss: (\S+)")
VALIDATION = re.compile(r"validation loss at iteration (\d+).* lm loss value: (\S+)")


@dataclass
class Curve:
    """What Megatron's log says of one run."""

    iterations: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)

    def read(self, line: str) -> bool:
        """Take in one line of the log; True if it was that of an iteration."""
        if match := VALIDATION.search(line):
            self.validation[int(match[1])] = float(match[2])
        if match := ITERATION.search(line):
            self.iterations.append(int(match[1]))
            self.samples.append(int(match[2]))
            self.losses.append(float(match[3]))
        return match is not None


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def smooth(values: Sequence[float], reach: int = 7) -> list[float]:
    """For each value the mean of it and of up to `reach` values on either side, as many as there are."""
    return [mean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def draw(before: Curve, after: Curve, entropy: float, path: Path) -> None:
    """The loss over the iterations, the two layouts in two colours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stop = before.iterations[-1]
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    axes.axhline(entropy, color="0.35", ls="--", lw=1.2)
    axes.annotate(
        f"unigram entropy, {entropy:.2f}", (1, entropy), (0, 4), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", color="0.35",
    )  # fmt: skip
    axes.axvline(stop + 0.5, ymax=0.8, color="0.8", lw=1)
    axes.annotate(
        "stopped, resumed in\nanother layout", (stop + 0.5, 0.03), (6, 0), xycoords=("data", "axes fraction"),
        textcoords="offset points", color="0.5", fontsize=9,
    )  # fmt: skip
    layouts = (
        (before, "tab:blue", "tensor parallel 2 x pipeline parallel 2, sequence parallel"),
        (after, "tab:orange", "data parallel 2"),
    )
    for curve, colour, label in layouts:  # each smoothed by itself: a break between them would show
        axes.plot(curve.iterations, curve.losses, color=colour, lw=0.8, alpha=0.35)
        axes.plot(curve.iterations, smooth(curve.losses), color=colour, lw=2.2, label=label)
    validation = sorted((before.validation | after.validation).items())
    axes.plot(*zip(*validation, strict=True), "o", color="k", ms=5, mfc="w", zorder=3, label="validation")
    axes.set(xlabel="iteration", ylabel="loss (nats per token)", xlim=(0, after.iterations[-1] + 2))
    axes.set_title("A small SambaY learns Python: one run, two parallel layouts", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92")
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path, dpi=150)
