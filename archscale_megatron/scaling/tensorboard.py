"""Points of a scaling law from the TensorBoard folders of `pretrain_archscale.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.counts import parameters, training_flops

EVENTS = "events.out.tfevents.*"
ARCHITECTURE = "architecture.json"  # as training/run_directory.py writes it
DEFAULT_TAG = "lm loss validation"


def runs(directory: Path, tag: str, last: int) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folders with events in `directory` and below, each with its row: family, train_name, status, parameters,
    tokens, flops and loss. Megatron writes a run's arguments into its folder; a run is `unfinished` where fewer
    iterations are logged.

    Raises:
        ValueError: no events, not this tag, or no architecture.json.
    """
    folders = sorted({file.parent for file in directory.rglob(EVENTS)})
    if not folders:
        raise ValueError(f"{directory}: no TensorBoard events here or below")
    for folder in folders:
        yield folder, _row(folder, tag, last)


def _row(folder: Path, tag: str, last: int) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    if tag not in tags or f"{tag} vs samples" not in tags:
        losses = [name.removesuffix(" vs samples") for name in tags if name.endswith("loss vs samples")]
        losses += [name.removesuffix(" vs samples") for name in tags if name.endswith("validation vs samples")]
        raise ValueError(
            f"{folder}: no --tag {tag!r} of Megatron's; there are {', '.join(map(repr, losses)) or 'none'}"
        )

    def argument(name: str) -> str:
        try:
            return events.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()
        except KeyError:
            raise ValueError(f"{folder}: Megatron's argument {name} is not in the events") from None

    def by_step(name: str) -> list[tuple[int, float]]:
        return sorted({event.step: event.value for event in events.Scalars(name)}.items())  # of a step, the last

    losses = by_step(tag)
    sequence_length = int(argument("seq_length"))
    tokens = by_step(f"{tag} vs samples")[-1][0] * sequence_length
    # Not every iteration is logged.
    finished = losses[-1][0] > int(argument("train_iters")) - int(argument("tensorboard_log_interval"))
    arch = _architecture(folder)
    return {
        "family": arch.family,
        "train_name": argument("train_name").removeprefix("None"),
        "status": "done" if finished else "unfinished",
        "parameters": parameters(arch),
        "tokens": tokens,
        "flops": training_flops(arch, sequence_length) * tokens,
        "loss": sum(value for _, value in losses[-last:]) / len(losses[-last:]),
    }


def _architecture(folder: Path) -> Architecture:
    """architecture.json of the folder, of one in it, the folder above, or one beside it that is no other run's."""
    beside = [path for path in folder.parent.iterdir() if path.is_dir() and not any(path.rglob(EVENTS))]
    for places in ([folder], folder.iterdir(), [folder.parent], beside):
        found = [place / ARCHITECTURE for place in places if (place / ARCHITECTURE).is_file()]
        if len(found) > 1:
            raise ValueError(f"{folder}: which run is it of: {' or '.join(map(str, found))}? Put one into the folder")
        if found:
            return Architecture(**json.loads(found[0].read_text()))
    raise ValueError(f"{folder}: no {ARCHITECTURE} here or beside it; copy it from the run's --save")
