"""Saves on two ranks, of which one fails: what each scenario did, as JSON lines of rank 0."""

from __future__ import annotations

import errno
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from archscale_megatron import cpu

cpu.install()

from archscale_megatron import megatron_patches  # noqa: E402

megatron_patches.apply()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.dist_checkpointing import ShardedTensor, core  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue  # noqa: E402
from megatron.training import checkpointing  # noqa: E402
from torch.distributed.checkpoint import FileSystemWriter  # noqa: E402

from archscale_megatron.checkpoint import CheckpointError, files, manifest, resume, retention, saving  # noqa: E402
from archscale_megatron.checkpoint.writing import DigestingFile  # noqa: E402

QUEUE = AsyncCallsQueue()


def full(*args: object, **kwargs: object) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def opening(rank: int) -> AbstractContextManager:
    return mock.patch.object(filesystem_async, "open", full if dist.get_rank() == rank else DigestingFile)


def save(
    run: Path, iteration: int, *, asynchronous: bool = False, before: Callable[[Path], None] | None = None
) -> None:
    """One save as training's, of a tensor that says the iteration."""
    args = Namespace(save=str(run), load=str(run), keep_last=None, save_retain_interval=None, finetune=False)
    checkpoint = run / f"iter_{iteration:07d}"

    def megatrons_save() -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        if before is not None:
            before(checkpoint)
        weight = ShardedTensor.from_rank_offsets("weight", torch.full((100_000,), float(iteration)), (0, rank, size))
        request = checkpointing.dist_checkpointing.save(
            {"weight": weight}, str(checkpoint), async_sharded_save=asynchronous, async_strategy="mcore"
        )
        if request is not None:
            QUEUE.schedule_async_request(request)

    saving.save(args, iteration, None, megatrons_save)


def finalize() -> None:
    saving.finalize(lambda: QUEUE.maybe_finalize_async_calls(blocking=True))


def scenario(name: str, run: Path, action: Callable[[], None], patch: AbstractContextManager | None = None) -> None:
    with patch or nullcontext():
        action()
    dist.barrier()
    if dist.get_rank() == 0:
        kept = {path.name: not manifest.is_half_written(path) for path in retention.checkpoints(run).values()}
        for checkpoint in kept:
            manifest.verify(run / checkpoint)
        tracker = run / resume.TRACKER
        result = {
            "name": name, "whole": kept, "tracker": tracker.read_text() if tracker.exists() else None,
            "failed": saving._last_failed, "pending": len(saving._pending),
        }  # fmt: skip
        print("result " + json.dumps(result), flush=True)
    dist.barrier()


def leave_a_file(checkpoint: Path) -> None:
    if dist.get_rank() == 0:
        assert not list(checkpoint.iterdir())  # of the older attempt
    dist.barrier()


def removing(rank: int) -> AbstractContextManager:
    """The directory goes when `rank` begins to write."""

    def open_nothing(path: str, mode: str) -> DigestingFile:
        checkpoint = Path(path).parent
        checkpoint.rename(checkpoint.parent.parent / "gone")  # at once, whatever the other rank writes meanwhile
        checkpoint.write_text("no directory any more")
        return DigestingFile(path, mode)

    return mock.patch.object(filesystem_async, "open", open_nothing if dist.get_rank() == rank else DigestingFile)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    filesystem_async.get_write_results_queue("fork")  # as Megatron's checkpoint worker does
    run = folder / "run"
    mock.patch.object(saving.run_description, "describe", lambda args, iteration: {"iteration": iteration}).start()
    if dist.get_rank() == 0:
        run.mkdir()
        (run / "architecture.json").write_text("{}")
        leftover = run / "iter_0000002"
        leftover.mkdir()
        (leftover / "__7_0.distcp").write_text("of a layout with more ranks")
    dist.barrier()

    scenario("good", run, lambda: save(run, 2, before=leave_a_file))
    scenario("data of rank 1", run, lambda: save(run, 4), opening(1))
    scenario("data of rank 0", run, lambda: save(run, 4), opening(0))
    scenario(".metadata", run, lambda: save(run, 4), mock.patch.object(FileSystemWriter, "finish", full))
    failing = mock.Mock(wraps=core.maybe_msc, open=full)
    scenario("metadata.json", run, lambda: save(run, 4), mock.patch.object(core, "maybe_msc", failing))
    scenario("manifest", run, lambda: save(run, 4), mock.patch.object(files, "sync", full))
    scenario("directory is gone", run, lambda: save(run, 4), removing(0))
    scenario("no directory", run, lambda: save(run, 4), mock.patch.object(retention, "make_room", full))
    scenario("replacing a whole one", run, lambda: save(run, 2), opening(1))
    try:
        saving.exit_if_unsaved()
    except SystemExit as stop:
        assert stop.code == 1
    else:
        raise AssertionError("a failed last save, and exit code 0")
    scenario("good again", run, lambda: save(run, 4))
    saving.exit_if_unsaved()
    scenario("replaced", run, lambda: save(run, 4))

    scenario("asynchronous", run, lambda: save(run, 6, asynchronous=True) or finalize())  # type: ignore[func-returns-value]

    def two_of_which_the_first_fails() -> None:
        with opening(1):
            save(run, 8, asynchronous=True)
        save(run, 10, asynchronous=True)
        finalize()

    scenario("two asynchronous", run, two_of_which_the_first_fails)

    # The file that rank 1 verifies is damaged: both go on from the one before.
    if dist.get_rank() == 0:
        damaged = run / "iter_0000010" / "__1_0.distcp"  # the second largest
        data = damaged.read_bytes()
        damaged.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    dist.barrier()
    args = Namespace(load=str(run), save=str(run), ckpt_step=None, pretrained_checkpoint=None)
    resume.choose(args)
    chosen: list[Any] = [None, None]
    dist.all_gather_object(chosen, args.ckpt_step)
    args.ckpt_step = 10
    try:
        resume.choose(args)
    except CheckpointError:
        chosen.append("refused")
    if dist.get_rank() == 0:
        print("chosen " + json.dumps(chosen), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
