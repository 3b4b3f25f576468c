"""Losses of texts under a window that slides over them: which tokens are scored with what before them, and their sums.

Window, stride and counts are in tokens, losses in nats.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from archscale_megatron.checkpoint import agreement
from archscale_megatron.evaluation.journal import Journal
from archscale_megatron.evaluation.report import Score
from archscale_megatron.evaluation.texts import Document

if TYPE_CHECKING:
    from archscale_megatron.evaluation.engine import Engine

CHUNK_TOKENS = 1 << 18  # given to the engine at once
EDGES = sorted({*range(1, 8), *((8 + j) << octave for octave in range(28) for j in range(8))})
"""Where the bins of context lengths begin: each length up to 16 its own, then 8 to an octave."""


@dataclass(frozen=True)
class Window:
    """Tokens begin ... end - 1 of a document, of which first ... end - 1 are scored."""

    document: int
    begin: int
    first: int
    end: int

    def bins(self) -> list[tuple[int, int]]:
        """(bin, tokens), by how many tokens of the window are before a scored one."""
        low, high = self.first - self.begin, self.end - self.begin
        first, last = _bin(low), _bin(high - 1)
        return [(i, min(EDGES[i + 1], high) - max(EDGES[i], low)) for i in range(first, last + 1)]

    def sums(self, losses: NDArray[np.float64]) -> list[float]:
        """Of the scored tokens' losses [end - first], one a bin."""
        counts = [count for _, count in self.bins()]
        return np.add.reduceat(losses, [0, *itertools.accumulate(counts[:-1])]).tolist()


def _bin(context: int) -> int:
    return bisect.bisect_right(EDGES, context) - 1


def windows_of(document: int, length: int, window: int, stride: int, whole: bool = False) -> Iterator[Window]:
    """The windows over a document of `length` tokens.

    Args:
        stride: at most window - 1.
        whole: all windows of `window` tokens that begin at multiples of `stride`, all of whose tokens are scored; as in
            ArchScale, one that ends with the document's last token and the last of the others are left out.
    """
    if whole:
        for begin in range(0, length - window, stride)[:-1]:
            yield Window(document, begin, begin + 1, begin + window)
        return
    first, end = 1, min(window, length)
    while first < end:
        yield Window(document, max(end - window, 0), first, end)
        first, end = end, min(end + stride, length)


@dataclass
class Losses:
    """Sums of losses (nats) of one window length.

    Attributes:
        window: its length.
        units: (count, sum) of each bin of contexts, of each unit that counts as independent.
    """

    window: int
    units: dict[tuple[int, int], dict[int, tuple[int, float]]] = field(default_factory=dict)

    def add(self, unit: tuple[int, int], window: Window, sums: Sequence[float]) -> None:
        """Add what `Window.sums` gave."""
        bins = self.units.setdefault(unit, {})
        for (i, count), loss in zip(window.bins(), sums, strict=True):
            before = bins.get(i, (0, 0.0))
            bins[i] = before[0] + count, before[1] + loss

    def mean(self, only: int | None = None) -> tuple[int, float, float | None]:
        """Tokens, mean loss and its standard error, in all bins or in one.

        The error is that of a ratio of sums over units (the linearised variance of survey statistics), which takes the
        units for independent; None for one unit.
        """
        of_units = [[pair for i, pair in bins.items() if only in (None, i)] for bins in self.units.values()]
        counts = np.array([sum(count for count, _ in pairs) for pairs in of_units if pairs], float)
        sums = np.array([sum(loss for _, loss in pairs) for pairs in of_units if pairs], float)
        tokens, mean = int(counts.sum()), float(sums.sum() / counts.sum())
        if len(counts) < 2:
            return tokens, mean, None
        spread = float(np.square(sums - mean * counts).sum()) * len(counts) / (len(counts) - 1)
        return tokens, mean, math.sqrt(spread) / tokens

    def by_context(self) -> list[dict[str, Any]]:
        """For each bin the least and the greatest "context" (tokens before), its "tokens", mean "loss", "stderr"."""
        found = []
        for i in sorted({i for bins in self.units.values() for i in bins}):
            tokens, mean, error = self.mean(i)
            context = [EDGES[i], min(EDGES[i + 1], self.window) - 1]
            found.append({"context": context, "tokens": tokens, "loss": mean, "stderr": error})
        return found

    def scores(self, size: int | None) -> dict[str, Score]:
        """Loss, perplexity and bits per byte; `size` is the bytes of the scored text, each scored once."""
        tokens, loss, error = self.mean()
        values = {"loss": (loss, 1.0), "perplexity": (_exp(loss), _exp(loss))}
        if size:
            bits = tokens / math.log(2) / size
            values["bits_per_byte"] = loss * bits, bits
        return {
            f"{name}@{self.window}": Score(value, None if error is None else error * slope, tokens, name, False)
            for name, (value, slope) in values.items()
        }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def measure(
    engine: Engine,
    documents: Sequence[Document],
    windows: Iterable[Window],
    journal: Journal,
    prefix: str,
    advance: Callable[[int], object] = lambda tokens: None,
) -> Iterator[tuple[Window, list[float]]]:
    """Each window with the sums of its losses, from the journal or from the engine.

    Every rank gets all; data-parallel ranks divide the work.
    """
    for chunk in _chunks(windows):
        keys = {window: f"{prefix}/{window.document}/{window.begin}-{window.first}-{window.end}" for window in chunk}
        todo = [window for window in chunk if keys[window] not in journal.done]
        advance(sum(w.end - w.first for w in chunk) - sum(w.end - w.first for w in todo))
        own = todo[engine.rank :: engine.world_size]
        sequences = [documents[w.document].ids[w.begin : w.end].tolist() for w in own]
        found = {}
        for index, scored in engine.score(sequences, [w.first - w.begin for w in own]):
            found[index] = own[index].sums(-scored.logprobs.double().cpu().numpy())
            if engine.world_size == 1:  # at once, for the sake of a kill
                journal.append(keys[own[index]], found[index])
                advance(own[index].end - own[index].first)
        if engine.world_size > 1:
            for rank, results in enumerate(agreement.of_all_ranks(found)):
                for index, sums in results.items():
                    window = todo[rank + index * engine.world_size]
                    journal.append(keys[window], sums)
                    advance(window.end - window.first)
        for window in chunk:
            yield window, journal.done[keys[window]]


def _chunks(windows: Iterable[Window]) -> Iterator[list[Window]]:
    chunk: list[Window] = []
    tokens = 0
    for window in windows:
        chunk.append(window)
        tokens += window.end - window.begin
        if tokens >= CHUNK_TOKENS:
            yield chunk
            chunk, tokens = [], 0
    if chunk:
        yield chunk
