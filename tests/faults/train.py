"""pretrain_archscale.py as the fault tests start it: the same program, which also says what it does and may be ill.

What to write and what to do is JSON in the environment variable FAULTS:
    directory: a file `steps.jsonl` in it has one line a step of this launch (loss, gradient norm, learning rate, as the
        floats they are), `ranks/N` the process of rank N, `writes.jsonl` every file that a checkpoint is written with.
    kill: {rank, iteration, file, delay, tracker, saved}: when `rank` opens `file` of the checkpoint of `iteration` for
        writing, or renames something to it, and the file `tracker` names a checkpoint no older than `saved` (the one
        before may still be under way), kill -9 the rank `delay` seconds later, and the process that writes for it.
    plant: {rank, iteration, value, times}: the loss of the first micro-batch on `rank` in `iteration` is multiplied by
        `value` (NaN, say), or has a gradient of NaN for the value "gradient", the first `times` times that it is run.
    host: the host's name that ranks see.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pretrain_archscale

FAULTS: dict[str, Any] = json.loads(os.environ.get("FAULTS", "{}"))
RANK = int(os.environ.get("RANK", 0))


class Journal:
    """A file of JSON lines, each of which is there once it is written, whatever happens to the process."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, **entry: Any) -> None:
        os.write(self.descriptor, (json.dumps(entry) + "\n").encode())


def watch_writes(journal: Journal, kill: dict[str, Any] | None) -> None:
    """Journal every file of a checkpoint that this process, or one forked from it, opens for writing or renames, and
    Megatron's tracker, which is the last. Called first in a rank.

    By Python's audit events, so that it does not matter who writes, and how.
    """
    rank_process = int(os.environ.setdefault("RANK_PROCESS", str(os.getpid())))
    save = 0

    def wait_for_the_save_before(tracker: Path, saved: int) -> None:
        end = time.monotonic() + 60
        while (int(tracker.read_text()) if tracker.exists() else 0) < saved and time.monotonic() < end:
            time.sleep(0.01)

    def die() -> None:
        os.kill(rank_process, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal save
        if event not in ("open", "os.rename"):
            return
        path = Path(os.fsdecode(arguments[event == "os.rename"])) if not isinstance(arguments[0], int) else Path()
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        checkpoint = next((part for part in path.parts if part.startswith("iter_")), None)
        if checkpoint:
            save = int(checkpoint[5:])
        elif not save or not path.name.startswith("latest_checkpointed_iteration"):
            return
        name = path.name.replace(f".{os.getpid()}.", ".PID.")  # of a temporary file
        now = kill is not None and (kill["rank"], kill["iteration"], kill["file"]) == (RANK, save, name)
        journal.write(rank=RANK, save=save, name=name, kill=now)
        if not now or not kill:
            return
        wait_for_the_save_before(Path(kill["tracker"]), kill["saved"])
        if kill["delay"]:
            threading.Timer(kill["delay"], die).start()
        else:
            die()

    sys.addaudithook(hook)


def journal_steps(journal: Journal) -> None:
    """A line a step, on the rank that has the loss."""
    import torch
    from megatron.training import get_args, training
    from megatron.training.utils import is_last_rank

    log = training.training_log

    def training_log(losses: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        if is_last_rank():
            _, learning_rate, iteration, _, _, skipped, gradient_norm, *_ = args
            journal.write(
                iteration=iteration,
                time=time.time(),
                loss=losses["lm loss"].item(),
                gradient_norm=float(gradient_norm),
                learning_rate=learning_rate,
                samples=get_args().consumed_train_samples,
                skipped=skipped,
            )
        return log(losses, *args, **kwargs)

    training.training_log = training_log


def plant(iteration: int, rank: int, value: float | str, times: int) -> None:
    """Multiply the loss, and with it the gradients, where and as often as is said."""
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    from archscale_megatron.training import step

    original, planted, last = step.loss_function, 0, None

    def loss_function(mask: Any, losses: Any) -> Any:
        nonlocal planted, last
        now, state = get_args().curr_iteration + 1, get_rerun_state_machine().state
        if rank == RANK and now == iteration and state != last and planted < times:
            planted += 1  # adds 0, with the derivative 0 * infinity, or
            losses = losses + 0 * (0 * losses).sqrt() if value == "gradient" else losses * value
        last = state if now == iteration else None
        return original(mask, losses)

    step.loss_function = loss_function


def main() -> None:
    directory = Path(FAULTS["directory"])
    (directory / "ranks").mkdir(parents=True, exist_ok=True)
    (directory / "ranks" / str(RANK)).write_text(str(os.getpid()))
    watch_writes(Journal(directory / "writes.jsonl"), FAULTS.get("kill"))
    journal_steps(Journal(directory / "steps.jsonl"))
    if "plant" in FAULTS:
        plant(**FAULTS["plant"])
    if "host" in FAULTS:
        names = os.uname()
        os.uname = lambda: os.uname_result((names[0], FAULTS["host"], *names[2:]))  # type: ignore[assignment]
    pretrain_archscale.main()


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__" and FAULTS:  # in the process from which that of asynchronous saves is forked
    watch_writes(Journal(Path(FAULTS["directory"]) / "writes.jsonl"), FAULTS.get("kill"))
