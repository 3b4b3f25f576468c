"""From which checkpoint does a run go on? The newest that is whole."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from archscale_megatron.checkpoint import CheckpointError, agreement, manifest
from archscale_megatron.checkpoint.retention import checkpoints, iteration_of, put_all_back

TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's, beside the checkpoints
RELEASE = "release"  # an imported model: weights alone


def find_checkpoint(path: Path) -> Path:
    """The directory of one checkpoint: `path` itself, or in a run directory the tracker's, else the newest before it.

    Looks at the sizes of files, not at their digests. A checkpoint of Megatron's own, without a manifest, counts.

    Raises:
        CheckpointError: there is none, or `path` is one that cannot be used.
    """
    path = Path(path)
    if is_checkpoint(path):
        check(path)
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    found = candidates(path)
    reasons = []
    for checkpoint in found:
        try:
            check(checkpoint)
        except CheckpointError as error:
            reasons.append(str(error))
        else:
            return checkpoint
    raise CheckpointError(_none_whole(path, reasons))


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is one checkpoint, rather than a run directory with several."""
    return path.is_dir() and (
        iteration_of(path) is not None or any((path / name).exists() for name in (".metadata", manifest.FILE_NAME))
    )


def tracked(directory: Path) -> int | str | None:
    """What the tracker says: an iteration or `release`; None if there is none that can be read."""
    try:
        text = (directory / TRACKER).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if text == RELEASE else int(text) if text.isascii() and text.isdigit() else None


def candidates(directory: Path) -> list[Path]:
    """The checkpoints of a run directory, whole or not, in the order in which to try them.

    The tracker's first, then older ones. Newer ones belong to a run that was rewound (`--ckpt-step`), or were not
    finished.
    """
    newest = tracked(directory)
    if newest == RELEASE:
        return [directory / RELEASE]
    found = checkpoints(directory)
    if isinstance(newest, int):
        found = {newest: directory / f"iter_{newest:07d}"} | {i: p for i, p in found.items() if i < newest}
    return [found[i] for i in sorted(found, reverse=True)]


def check(checkpoint: Path) -> None:
    """Raises CheckpointError if the checkpoint cannot be whole: as far as names and sizes of files tell."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is missing")
    if (checkpoint / manifest.FILE_NAME).is_file():
        manifest.check_sizes(checkpoint)
    elif any(checkpoint.glob("mp_rank_*")):
        raise CheckpointError(
            f"{checkpoint} is of Megatron's old format, pickles, which are not read here; "
            "convert it with Megatron's own tools to torch_dist"
        )
    elif manifest.is_half_written(checkpoint):
        raise CheckpointError(f"{checkpoint} is half-written: it has no {manifest.FILE_NAME}, which is written last")


def split_load(args: argparse.Namespace) -> None:
    """`--load RUN/iter_0000004` becomes `--load RUN --ckpt-step 4`.

    Raises:
        CheckpointError: `--ckpt-step` says otherwise, or Megatron knows no such name.
    """
    path = Path(args.load or "")
    if not args.load or not is_checkpoint(path):
        return
    iteration = iteration_of(path)
    if iteration is None and (path.name != RELEASE or tracked(path.parent) != RELEASE):
        raise CheckpointError(
            f"--load {path}: Megatron loads a checkpoint named iter_ and seven digits, "
            f"or {RELEASE} beside a {TRACKER} that says so"
        )
    if args.ckpt_step not in (None, iteration):
        raise CheckpointError(f"--load {path} and --ckpt-step {args.ckpt_step} contradict; give one of them")
    args.load, args.ckpt_step = str(path.parent), iteration


def check_load(args: argparse.Namespace) -> None:
    """Raises CheckpointError if there is nothing to load, unless `--load` is `--save`, of a run that begins."""
    if not args.load:
        return
    path = Path(args.load)
    if args.ckpt_step is not None:
        check(path / f"iter_{args.ckpt_step:07d}")
    elif args.load != args.save and not args.pretrained_checkpoint and not candidates(path):
        raise CheckpointError(f"--load {path}: there is no checkpoint; give another directory, or leave --load out")


def choose(args: argparse.Namespace) -> None:
    """Set `args.ckpt_step` to the checkpoint that is loaded: the newest that is whole. Called on all ranks.

    Each rank reads its part of the files. Without `--ckpt-step` a bad checkpoint is said on rank 0, and the next
    older one is tried. Without any checkpoint, or with one alone that was never finished, training starts anew.

    Raises:
        CheckpointError: on all ranks: the one asked for is not whole, or none is.
    """
    directory = Path(args.load or args.pretrained_checkpoint)
    if args.pretrained_checkpoint and not (args.load and candidates(Path(args.load))):
        directory = Path(args.pretrained_checkpoint)
    if agreement.rank_and_size()[0] == 0 and args.load == args.save and directory.is_dir():
        with contextlib.suppress(OSError):  # then it stays aside, and an older one is taken
            put_all_back(directory)
    if args.ckpt_step is not None:
        names = [f"iter_{args.ckpt_step:07d}"]
    else:
        names = [path.name for path in candidates(directory)] if directory.is_dir() else []
    tracker_there, names = agreement.of_first_rank(((directory / TRACKER).exists(), names))
    rejected: list[str] = []
    for name in names:
        problem = agreement.first_problem(lambda name=name: _verify_part(directory / name))  # type: ignore[misc]
        if problem is None:
            for reason in rejected:
                agreement.say(f"WARNING: not whole, so going on from {name} instead: {reason}")
            if not (directory / name / manifest.FILE_NAME).is_file():
                agreement.say(f"WARNING: {directory / name} has no {manifest.FILE_NAME}; its files cannot be verified")
            args.ckpt_step = iteration_of(directory / name)
            return
        rejected.append(problem)
    if args.ckpt_step is not None:
        raise CheckpointError(f"--ckpt-step {args.ckpt_step}: {rejected[0]}")
    if tracker_there:
        raise CheckpointError(_none_whole(directory, rejected))
    for reason in rejected:
        agreement.say(f"WARNING: not whole, so starting anew: {reason}")


@contextlib.contextmanager
def ending_on_errors() -> Iterator[None]:
    """A CheckpointError inside is one line on standard error, and exit code 2."""
    try:
        yield
    except CheckpointError as error:
        if agreement.is_first_to_fail():
            print(f"pretrain_archscale: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _verify_part(checkpoint: Path) -> None:
    check(checkpoint)
    if (checkpoint / manifest.FILE_NAME).is_file():
        manifest.verify(checkpoint, *agreement.rank_and_size())


def _none_whole(directory: Path, reasons: list[str]) -> str:
    if not reasons:
        return f"{directory}: holds no checkpoint"
    return f"{directory}: holds no whole checkpoint ({'; '.join(reasons)})"
