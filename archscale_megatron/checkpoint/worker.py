"""The processes that write asynchronous checkpoints for a rank: SIGTERM does not end them, the end of the rank does.

A scheduler, and torchrun, send SIGTERM to all processes of a job, so that the ranks may save and exit. The functions
take the places of Megatron's (see `megatron_patches`), at module level, so that a process of its own finds them.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.managers import SyncManager
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

_megatrons_loop = PersistentAsyncCaller.async_loop
_megatrons_start = PersistentAsyncCaller._get_process
_megatrons_schedule = PersistentAsyncCaller.schedule_async_call
_megatrons_check = PersistentAsyncCaller.is_current_async_call_done
_manager: SyncManager | None = None
_results: Any = None


@contextlib.contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Processes that are started inside never get a SIGTERM; this one gets what came meanwhile behind the block."""
    multiprocessing.resource_tracker.ensure_running()  # unblocks SIGTERM when it is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_rank() -> None:
    def wait() -> None:
        rank = multiprocessing.parent_process()
        assert rank is not None
        multiprocessing.connection.wait([rank.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def start(*args: Any, **kwargs: Any) -> Any:
    """Megatron's `_get_process`: the process that writes, started by the first call."""
    if PersistentAsyncCaller._persistent_process is not None:
        return PersistentAsyncCaller._persistent_process
    with _sigterm_blocked():
        process = _megatrons_start(*args, **kwargs)
    atexit.register(process.kill)  # multiprocessing would end it with SIGTERM, and wait
    for queue in (PersistentAsyncCaller._persistent_queue, PersistentAsyncCaller._persistent_preload_q):
        queue.cancel_join_thread()  # a rank that ends with an error would wait until the writer has read all
    return process


def async_loop(*args: Any, **kwargs: Any) -> None:
    """Megatron's, in the process that writes."""
    _end_with_rank()
    _megatrons_loop(*args, **kwargs)


def get_write_results_queue(mp_mode: str = "spawn") -> Any:
    """Megatron's: the queue, one a rank, in which the writer says what it has written."""
    global _manager, _results
    if _manager is None:
        _manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
        with _sigterm_blocked():
            _manager.start(_end_with_rank)
        _results = _manager.Queue()
    return _results


def schedule_async_call(self: PersistentAsyncCaller, *args: Any, **kwargs: Any) -> None:
    """Megatron's; raises RuntimeError if the process that writes has been killed, for which Megatron waits."""
    _check_alive(self)
    _megatrons_schedule(self, *args, **kwargs)


def is_current_async_call_done(self: PersistentAsyncCaller, *args: Any, **kwargs: Any) -> bool:
    """Megatron's; raises RuntimeError if the process that writes has been killed, for which Megatron waits."""
    _check_alive(self)
    return _megatrons_check(self, *args, **kwargs)


def _check_alive(caller: PersistentAsyncCaller) -> None:
    if caller.process and not caller.process.is_alive():
        raise RuntimeError(
            f"the process that writes checkpoints ended with exit code {caller.process.exitcode}; its checkpoint is "
            "not whole, and the one before it is the last"
        )
