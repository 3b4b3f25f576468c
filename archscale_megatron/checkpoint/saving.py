"""What is done around Megatron's save: the directory before, manifest and tracker behind, and errors agreed on.

A save that fails costs no training: all ranks learn of it, rank 0 says so, and the next one is tried at its time. The
program then ends with exit code 1 if its last save failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archscale_megatron.checkpoint import agreement, files, manifest, retention, run_description, run_directory
from archscale_megatron.checkpoint.resume import TRACKER


class SaveError(Exception):
    """A save failed, on all ranks; the message says why."""


@dataclass
class Save:
    """One save, from the preparation of its directory until it is whole."""

    checkpoint: Path
    description: dict[str, Any]
    keep_last: int | None
    permanent: int | None


_pending: deque[Save] = deque()
"""Saves that have begun; more than one if asynchronous ones overlap."""
_rank_0_error: OSError | None = None
"""Of a small file that Megatron lets rank 0 alone write."""
_last_failed = False


def save(args: argparse.Namespace, iteration: int, loaded: int | None, megatrons_save: Callable[[], object]) -> None:
    """Save a checkpoint with `megatrons_save`, which calls `finish` (see `megatron_patches`). Called on all ranks.

    Args:
        loaded: the iteration of the checkpoint from which this run goes on.
    """
    checkpoint = Path(args.save) / f"iter_{iteration:07d}"
    # Nothing has been trained since: of all saves the one that could only lose something.
    untrained = loaded == iteration and args.load == args.save and not args.finetune
    if untrained and agreement.first_problem(lambda: manifest.check_sizes(checkpoint)) is None:
        agreement.say(f"  checkpoint {checkpoint} is there already")
        return
    _pending.append(
        Save(checkpoint, run_description.describe(args, iteration), args.keep_last, args.save_retain_interval)
    )
    with _reported(_pending.pop):
        _on_rank_0(lambda: _prepare(checkpoint, args))
        megatrons_save()


def finish() -> None:
    """All data of the oldest pending save is written: make it a checkpoint. Called on all ranks.

    Raises:
        SaveError: on all ranks: it could not be.
    """
    global _last_failed
    current = _pending[0]
    rank = agreement.rank_and_size()[0]
    found = agreement.of_all_ranks(_own_digests(current.checkpoint, rank))
    for problem in found:
        if isinstance(problem, str):
            raise SaveError(problem)
    digests = {name: entry for part in found for name, entry in part.items()}
    _on_rank_0(lambda: _make_whole(current, digests))
    manifest.remove_own_sidecars(current.checkpoint, rank)
    _pending.popleft()
    _last_failed = False


def finalize(megatrons_finalize: Callable[[], object]) -> None:
    """Finish asynchronous saves whose data is written, with `megatrons_finalize`; a failed one is reported."""
    while True:
        with _reported(_pending.popleft):
            megatrons_finalize()
            return


@contextlib.contextmanager
def held() -> Iterator[None]:
    """An OSError inside, on rank 0 alone, is kept until all ranks have come to `finish`."""
    global _rank_0_error
    try:
        yield
    except OSError as error:
        _rank_0_error = _rank_0_error or error


def exit_if_unsaved() -> None:
    """Exit with code 1 if the last save failed: what was trained since the one before is nowhere."""
    if _last_failed:
        sys.exit(1)


def _own_digests(checkpoint: Path, rank: int) -> dict[str, manifest.Entry] | str:
    """Of this rank's files; the message, if they cannot be read."""
    try:
        return manifest.own_digests(checkpoint, rank)
    except (OSError, ValueError) as error:
        return str(error)


def _prepare(checkpoint: Path, args: argparse.Namespace) -> None:
    retention.make_room(checkpoint)
    checkpoint.mkdir(parents=True)
    retention.sweep(checkpoint.parent)
    if not (checkpoint.parent / run_directory.FILE_NAME).is_file():
        run_directory.write_architecture(args.save, args.architecture)


def _make_whole(current: Save, digests: dict[str, manifest.Entry]) -> None:
    if _rank_0_error is not None:
        raise _rank_0_error
    checkpoint, directory = current.checkpoint, current.checkpoint.parent
    description = json.dumps(current.description, indent=1)
    files.replace(checkpoint / run_description.FILE_NAME, description + "\n")
    manifest.write(checkpoint, digests)
    iteration = retention.iteration_of(checkpoint)
    assert iteration is not None
    files.replace(directory / TRACKER, str(iteration))
    retention.put_back(checkpoint)
    pending = [save.checkpoint for save in _pending]
    for old in retention.expired(directory, iteration, current.keep_last, current.permanent, pending):
        try:
            retention.delete(old)
        except OSError as error:
            agreement.say(f"WARNING: checkpoint {old} was not deleted: {error}")


def _on_rank_0(function: Callable[[], object]) -> None:
    global _rank_0_error
    problem = agreement.first_problem(function if agreement.rank_and_size()[0] == 0 else lambda: None)
    _rank_0_error = None
    if problem is not None:
        raise SaveError(problem)


@contextlib.contextmanager
def _reported(take_failed: Callable[[], Save]) -> Iterator[None]:
    """A failure of a save inside is said, and over; `take_failed` takes the save out of those that are pending."""
    from torch.distributed.checkpoint import CheckpointException

    global _last_failed, _rank_0_error
    try:
        yield
    except (CheckpointException, SaveError) as error:
        failed = take_failed()
        _rank_0_error = None
        _last_failed = True
        if agreement.rank_and_size()[0] == 0:
            shutil.rmtree(failed.checkpoint, ignore_errors=True)  # half-written, it only takes room
            with contextlib.suppress(OSError):
                retention.put_back(failed.checkpoint)
            print(
                f"WARNING: checkpoint {failed.checkpoint} was not saved: {_reason(error)}; {_left(failed)}", flush=True
            )


def _reason(error: BaseException) -> str:
    failures = getattr(error, "failures", None)
    if not failures:
        return str(error)
    rank, (cause, _) = sorted(failures.items())[0]
    return f"{str(cause).removeprefix('Worker failure: ')} (rank {rank})"


def _left(failed: Save) -> str:
    try:
        whole = [
            i for i, p in retention.checkpoints(failed.checkpoint.parent).items() if not manifest.is_half_written(p)
        ]
    except OSError:
        whole = []
    return f"training goes on; the last whole checkpoint is of iteration {whole[-1]}" if whole else "there is no other"
