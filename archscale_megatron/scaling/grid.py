"""What a sweep is: grids of training options, from a command line or a YAML file, and the points that they span."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Options = dict[str, tuple[str, ...]]
"""Option without its two dashes -> the words behind it; a switch has none."""

LEARNING_RATES = ("base-hps.eta0", "lr")  # the option that is carried over, the first of these that is given
NAMING = ("train-model", "depth", "train-name", *LEARNING_RATES)  # whose values are in a point's name
OWN = ("tensorboard-dir", "save", "load", "resume")  # the sweep's to set


@dataclass(frozen=True)
class Point:
    """One training run. Points are the same if their options are, in whatever order and spelling of numbers."""

    options: Options

    @property
    def key(self) -> str:
        """8 hexadecimal digits that stand for the options."""
        values = {name: canonical(words) for name, words in self.options.items()}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def name(self) -> str:
        """The point's directory: what most sweeps vary, and the key."""
        said = [("d" if name == "depth" else "") + "".join(self.options.get(name, ())) for name in NAMING]
        readable = "-".join(word for word in said if word not in ("", "d"))
        return "".join(c if c.isalnum() or c in "._+-" else "_" for c in readable)[:100] + "-" + self.key

    @property
    def arguments(self) -> list[str]:
        """The options as a command line has them."""
        return [word for name, words in self.options.items() for word in (f"--{name}", *words)]


def canonical(words: Sequence[str]) -> tuple[Any, ...]:
    """`words`, where 1e-3 and 0.001, or 2_097_152 and 2097152, are the same."""
    return tuple(_number(word) for word in words)


def _number(word: str) -> int | float | str:
    for kind in (int, float):
        try:
            value = kind(word)
        except ValueError:
            continue
        return int(value) if value == value and abs(value) < 2**53 and value == int(value) else value
    return word


def points_of(fixed: Mapping[str, Any], grid: Mapping[str, Any]) -> list[Point]:
    """The points of one grid, the last option of `grid` varying fastest.

    Args:
        fixed: option -> value: text, a number, a list (several words), True (a switch) or False (left out).
        grid: option -> list of such values.
    Raises:
        ValueError: an option that is the sweep's own or in both, or a value that is none.
    """
    fixed, grid = _dashes(fixed), _dashes(grid)
    for name in (*fixed, *grid):
        if name in OWN:
            raise ValueError(f"--{name} is set by the sweep; leave it out (--save-checkpoints keeps them)")
    if both := fixed.keys() & grid.keys():
        raise ValueError(f"{', '.join(sorted(both))}: both fixed and in the grid; give each option once")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{name}: {values!r} is no list of values; write {name}: [value, value]")
    found = []
    for values in itertools.product(*grid.values()):
        chosen = {**fixed, **dict(zip(grid, values, strict=True))}
        words = {name: _words(name, value) for name, value in chosen.items()}
        found.append(Point({name: value for name, value in words.items() if value is not None}))
    return found


def _dashes(options: Mapping[str, Any]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for name, value in options.items():
        dashed = str(name).removeprefix("--").replace("_", "-")
        if dashed in renamed:
            raise ValueError(f"{dashed}: given twice; give each option once")
        renamed[dashed] = value
    return renamed


def _words(name: str, value: Any) -> tuple[str, ...] | None:
    if isinstance(value, bool):
        return () if value else None
    if isinstance(value, list | tuple) and all(isinstance(v, str | int | float) for v in value):
        return tuple(str(v) for v in value)
    if not isinstance(value, str | int | float) or value == "":
        raise ValueError(f"{name}: {value!r} is no value; use a number, text, a list of words, true or false")
    return (str(value),)


def distinct(points: Iterable[Point]) -> list[Point]:
    """`points` without repetitions."""
    return list({point.key: point for point in points}.values())


def parse_grid(texts: Sequence[str]) -> dict[str, Any]:
    """`depth=4,8,12` and the like, as a grid."""
    grid: dict[str, Any] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not name or "" in values.split(","):
            raise ValueError(f"--grid {text}: write OPTION=VALUE,VALUE, such as depth=4,8,12")
        if name in grid:
            raise ValueError(f"--grid {name}: given twice; give each option once")
        grid[name] = values.split(",")
    return grid


def parse_training(words: Sequence[str]) -> dict[str, Any]:
    """Training options as on a command line: option -> True, or a list of words."""
    options: dict[str, Any] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if name in options:
                raise ValueError(f"--{name}: given twice; give each option once")
            options[name] = [value] if equals else []
        elif name is None:
            raise ValueError(f"{word}: expected an option of training, such as --depth 8, behind --")
        else:
            options[name].append(word)
    return {name: values or True for name, values in options.items()}


def read_yaml(path: Path, fixed: Mapping[str, Any]) -> list[Point]:
    """The points of all grids of a file such as examples/hp_sweep.yaml.

    Args:
        fixed: options for all points, which win over the file's.
    Raises:
        ValueError: the file is no YAML, a key is unknown, or as `points_of`.
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    top = _section(str(path), content, fixed=dict, grids=list)
    if not top["grids"]:
        raise ValueError(f"{path}: no grids; write grids: and below it a list, each with grid: and maybe fixed:")
    points = []
    for number, entry in enumerate(top["grids"], 1):
        where = f"{path}: grid {number}"
        section = _section(where, entry, fixed=dict, grid=dict)
        try:
            own = _dashes(top["fixed"]) | _dashes(section["fixed"]) | _dashes(fixed)
            points += points_of(own, section["grid"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return points


def _section(where: str, content: Any, **kinds: type) -> dict[str, Any]:
    """`content`, whose keys must be those of `kinds`; one that is not there is empty."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected {' and '.join(f'{key}:' for key in kinds)}")
    for key, value in content.items():
        if key not in kinds:
            raise ValueError(f"{where}: unknown key {key!r}; known are {', '.join(kinds)}")
        if not isinstance(value, kinds[key]):
            raise ValueError(f"{where}: {key} is {value!r}; it must be a {kinds[key].__name__}")
    return {key: content.get(key, kind()) for key, kind in kinds.items()}
