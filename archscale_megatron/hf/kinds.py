"""How parameters of a training checkpoint become tensors of an export, and back: one small object a parameter kind.

A map takes whole tensors; what tensor parallelism splits is whole in a checkpoint's tensor. Its `megatron` are the
names in the training checkpoint, its `hf` the names in the export, and both ways keep this order. Tensors that come out
may be views of those that went in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Map(ABC):
    """
    Attributes:
        megatron: names of the training checkpoint.
        hf: names of the export.
    """

    megatron: tuple[str, ...]
    hf: tuple[str, ...]

    @abstractmethod
    def megatron_shapes(self) -> dict[str, Shape]:
        """The shape of each tensor of the training checkpoint."""

    @abstractmethod
    def hf_shapes(self) -> dict[str, Shape]:
        """The shape of each tensor of the export."""

    @abstractmethod
    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of `megatron` -> those of `hf`, in their dtype."""

    @abstractmethod
    def to_megatron(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of `hf` -> those of `megatron`, in their dtype."""


@dataclass(frozen=True)
class Rows(Map):
    """The tensors of one side, one below the other, are those of the other side: a copy, the gate's and the up
    branch's rows of a fused projection, or the blocks of a checkpoint that are one tensor in the export.

    Attributes:
        megatron_rows, hf_rows: the first dimension of each tensor.
        rest: the other dimensions.
    """

    megatron_rows: tuple[int, ...]
    hf_rows: tuple[int, ...]
    rest: Shape = ()

    def __post_init__(self) -> None:
        assert sum(self.megatron_rows) == sum(self.hf_rows), self

    def megatron_shapes(self) -> dict[str, Shape]:
        return _shapes(self.megatron, self.megatron_rows, self.rest)

    def hf_shapes(self) -> dict[str, Shape]:
        return _shapes(self.hf, self.hf_rows, self.rest)

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(_joined(tensors).split(self.hf_rows))

    def to_megatron(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(_joined(tensors).split(self.megatron_rows))


def copied(megatron: str, hf: str, shape: Shape) -> Rows:
    """The same tensor under two names."""
    return Rows((megatron,), (hf,), shape[:1], shape[:1], shape[1:])


def split(megatron: str, hf: Sequence[str], rows: int, rest: Shape = ()) -> Rows:
    """A fused projection, whose parts have `rows` rows each."""
    return Rows((megatron,), tuple(hf), (len(hf) * rows,), (rows,) * len(hf), rest)


def joined(megatron: str, blocks: dict[str, int], hf: str, rest: Shape = ()) -> Rows:
    """Blocks, given with their rows, that the training checkpoint keeps as `megatron`.BLOCK (`layers.recurrent`)."""
    names = tuple(f"{megatron}.{block}" for block in blocks)
    return Rows(names, (hf,), tuple(blocks.values()), (sum(blocks.values()),), rest)


@dataclass(frozen=True)
class QKV(Map):
    """Megatron's linear_qkv: for each query group the rows of its query heads, its key and its value. Apart, they are
    q, k and v, with their heads in order.

    Attributes:
        heads, groups, head_dim: query heads and query groups of the whole model.
        rest: the dimensions behind the rows, () for a bias.
    """

    heads: int
    groups: int
    head_dim: int
    rest: Shape = ()

    @property
    def _heads_of_a_group(self) -> tuple[int, int, int]:
        return self.heads // self.groups, 1, 1

    def megatron_shapes(self) -> dict[str, Shape]:
        return _shapes(self.megatron, [(self.heads + 2 * self.groups) * self.head_dim], self.rest)

    def hf_shapes(self) -> dict[str, Shape]:
        rows = [heads * self.groups * self.head_dim for heads in self._heads_of_a_group]
        return _shapes(self.hf, rows, self.rest)

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        (fused,) = tensors
        groups = fused.unflatten(0, (self.groups, -1, self.head_dim))
        return [part.flatten(0, 2) for part in groups.split(self._heads_of_a_group, dim=1)]

    def to_megatron(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        parts = [part.unflatten(0, (self.groups, -1, self.head_dim)) for part in tensors]
        return [torch.cat(parts, dim=1).flatten(0, 2)]


@dataclass(frozen=True)
class Vocabulary(Map):
    """An embedding or output layer, without the rows that fill it up behind the vocabulary. A checkpoint without them
    loads at every layout.

    Attributes:
        vocab_size, hidden_size: the shape of the export.
    """

    vocab_size: int
    hidden_size: int

    def megatron_shapes(self) -> dict[str, Shape]:
        """Of a checkpoint without rows behind the vocabulary."""
        return _shapes(self.megatron, [self.vocab_size], (self.hidden_size,))

    def hf_shapes(self) -> dict[str, Shape]:
        return _shapes(self.hf, [self.vocab_size], (self.hidden_size,))

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor[: self.vocab_size] for tensor in tensors]

    def to_megatron(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)


@dataclass(frozen=True)
class Experts(Map):
    """One tensor with a dimension of experts; a tensor an expert, or as many an expert as its rows have parts.

    Attributes:
        experts: experts of the whole model.
        rows, columns: the shape of each tensor of an expert.
    """

    experts: int
    rows: int
    columns: int

    def megatron_shapes(self) -> dict[str, Shape]:
        parts = len(self.hf) // self.experts
        return _shapes(self.megatron, [self.experts], (parts * self.rows, self.columns))

    def hf_shapes(self) -> dict[str, Shape]:
        return _shapes(self.hf, [self.rows] * len(self.hf), (self.columns,))

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        (together,) = tensors
        return list(together.flatten(0, 1).split(self.rows))

    def to_megatron(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(tensors)).unflatten(0, (self.experts, -1))]


@dataclass(frozen=True)
class Scaled(Map):
    """Another map, each of whose exported tensors is multiplied by a factor of the model's forward pass.

    The way back divides: to the last bit if a factor is a power of 2, otherwise to a rounding.

    Attributes:
        inner: the map.
        factors: one for each name of `hf`.
    """

    inner: Map
    factors: tuple[float, ...]

    def megatron_shapes(self) -> dict[str, Shape]:
        return self.inner.megatron_shapes()

    def hf_shapes(self) -> dict[str, Shape]:
        return self.inner.hf_shapes()

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        scaled = zip(self.inner.to_hf(tensors), self.factors, strict=True)
        return [tensor if factor == 1 else tensor * factor for tensor, factor in scaled]

    def to_megatron(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        scaled = zip(tensors, self.factors, strict=True)
        return self.inner.to_megatron([tensor if factor == 1 else tensor / factor for tensor, factor in scaled])


def scaled(inner: Map, *factors: float) -> Map:
    """`inner` with `factors`, one for each exported tensor; `inner` itself if all are 1."""
    if all(factor == 1 for factor in factors):
        return inner
    return Scaled(inner.megatron, inner.hf, inner, factors)


@dataclass(frozen=True)
class Stacked(Map):
    """Another map, whose exported tensors are one, one below the other: [Q | K | V] of Phi4Flash.

    Attributes:
        inner: the map.
    """

    inner: Map

    def _rows(self) -> list[int]:
        return [shape[0] for shape in self.inner.hf_shapes().values()]

    def megatron_shapes(self) -> dict[str, Shape]:
        return self.inner.megatron_shapes()

    def hf_shapes(self) -> dict[str, Shape]:
        rest = next(iter(self.inner.hf_shapes().values()))[1:]
        return _shapes(self.hf, [sum(self._rows())], rest)

    def to_hf(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [_joined(self.inner.to_hf(tensors))]

    def to_megatron(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        (together,) = tensors
        return self.inner.to_megatron(together.split(self._rows()))


def stacked(inner: Map, hf: str) -> Stacked:
    """The exported tensors of `inner` as one under the name `hf`."""
    return Stacked(inner.megatron, (hf,), inner)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _shapes(names: Sequence[str], rows: Sequence[int], rest: Shape) -> dict[str, Shape]:
    return {name: (count, *rest) for name, count in zip(names, rows, strict=True)}
